"""A candidate's outputs against fp32's on the holdout.

The drop is the plain difference of the metric on the whole holdout; what is uncertain about it is its
interval. Both contenders answered the same samples, so every interval is a paired one. Beside the metric, each group
of output channels (``groups``) is compared with fp32's, so that no part of the outputs is lost unseen.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corewise.accuracy.alignment import aligned
from corewise.accuracy.classification import is_class_scores
from corewise.accuracy.closeness import concordance
from corewise.accuracy.floors import group_fidelities, lost_positions, worst_sample
from corewise.accuracy.groups import Energies, decibels, layouts
from corewise.accuracy.labels import chance, naming, sample_name
from corewise.accuracy.metrics import Metric
from corewise.accuracy.outputs import Array, Outputs, Rows
from corewise.accuracy.paired import Nest, Score, paired_scores
from corewise.common.detections import Head
from corewise.common.errors import EngineError, SamplesError, SourceError
from corewise.records.fidelity import Fidelity

__all__ = ["Outputs", "compare"]


def compare(
    reference: Outputs,
    candidate: Outputs,
    *,
    metric: Metric,
    labels: Array | None,
    groups: ArrayLike | None = None,
    nest: Nest,
    names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
    head: Head | None = None,
) -> Fidelity:
    """Compare a candidate with fp32 (``reference``) on the same N rows; fp32 with itself for the baseline.

    Args:
        reference: fp32's outputs.
        candidate: The candidate's, of the same shapes.
        metric: What decides.
        labels: (N, ...), or an object array (N,), for the metric.
        groups: (N,) names the group of rows that belong together: intervals draw them together.
        nest: Makes what the model returns out of flat outputs.
        names: The user's own sample numbers or file names, for messages. Default: ``holdout sample 0`` and so on.
        output_names: The outputs' names, for the groups'. Default: ``output_0`` and so on.
        clock: Seconds, to bound how long intervals are resampled.
        seed: Of the resampling.
        head: How the outputs list detections, if they do: these are then compared whatever their places.

    Raises:
        EngineError: The candidate's outputs have other shapes, NaN or infinity.
        SourceError: fp32's outputs have NaN.
        MetricError: The metric fails.
        SamplesError: Labels or groups do not fit.
    """
    _check(reference, candidate, labels, names)
    members = _members(groups, len(reference))
    ours, theirs = (reference, candidate) if head is None else aligned(head, reference, candidate)
    by_place = metric.score is concordance
    score = Score(ours if by_place else reference, metric, labels, nest)
    with naming(names):
        scored = paired_scores(score, theirs if by_place else candidate, members, clock=clock, seed=seed)
    baseline, value, (low, high) = scored
    drop = value - baseline if metric.lower_is_better else baseline - value
    judged = layouts(ours.leaves, output_names)
    sums = [layout.energies(*pair) for layout, *pair in zip(judged, ours.leaves, theirs.leaves, strict=True)]
    numbers = [energies for energies, layout in zip(sums, judged, strict=True) if layout.mean is not None] or sums
    farthest, farthest_db = worst_sample(sums)
    guess, guess_limit = chance(metric.name, reference.leaves[0], len(reference), labels) or (None, None)
    return Fidelity(
        metric=metric.name,
        samples=len(reference),
        baseline_value=baseline,
        value=value,
        drop=drop,
        drop_low=min(low, drop),
        drop_high=max(high, drop),
        lower_is_better=metric.lower_is_better,
        sqnr_db=decibels(_total(numbers, "raw"), _total(numbers, "error")),
        cosine=_cosine(numbers),
        agreement=_agreement(reference.leaves[0], candidate.leaves[0]),
        groups=(*lost_positions(judged, ours.leaves, theirs.leaves), *group_fidelities(judged, sums)),
        worst_sample=sample_name(farthest, names),
        worst_sample_db=farthest_db,
        chance=guess,
        chance_limit=guess_limit,
    )


def _check(reference: Outputs, candidate: Outputs, labels: Array | None, names: Sequence[str]) -> None:
    """Refuse outputs that cannot be compared, and labels of another number."""
    if labels is not None and len(labels) != len(reference):
        raise SamplesError(f"there are {len(labels)} labels for {len(reference)} samples", "give one label per sample")
    if len(reference.leaves) != len(candidate.leaves) or len(reference) != len(candidate):
        raise EngineError(
            f"the build returns {len(candidate.leaves)} outputs for {len(candidate)} samples, "
            f"fp32 {len(reference.leaves)} for {len(reference)}"
        )
    for output, (ours, theirs) in enumerate(zip(reference.leaves, candidate.leaves, strict=True)):
        if ours.dtype == object or theirs.dtype == object:
            for row in range(len(ours)):
                _check_values(output, np.asarray(ours[row]), np.asarray(theirs[row]), [sample_name(row, names)])
        else:
            _check_values(output, ours, theirs, [sample_name(row, names) for row in range(len(ours))])


def _check_values(output: int, reference: Array, candidate: Array, names: Sequence[str]) -> None:
    """Refuse NaN, infinity and other shapes in one output, or in one row of it."""
    if reference.shape != candidate.shape:
        raise EngineError(f"the build's output {output} has shape {candidate.shape}, fp32's {reference.shape}")
    undefined = np.isnan(reference)
    if undefined.any():
        sample = _first_sample(undefined, names)
        what = f"the model itself (fp32) returns NaN: output {output} of {sample}"
        raise SourceError(what, "check its weights, and that samples are preprocessed as it expects")
    bad = np.isnan(candidate) | (np.isinf(candidate) & np.isfinite(reference))
    lost = _lost_infinity(reference, candidate)
    for places, what in ((bad, "NaN or infinity where fp32's has none"), (lost, "a number where fp32's has infinity")):
        if places.any():
            sample = _first_sample(places, names)
            raise EngineError(f"the build's output {output} has {what}, for {sample}")


def _first_sample(bad: NDArray[np.bool_], names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else names[int(np.argwhere(bad)[0, 0])]


def _lost_infinity(reference: Array, candidate: Array) -> NDArray[np.bool_]:
    """Where fp32's infinity, a mask, is a number that masks nothing: of the other sign, or no larger than the rest."""
    infinite = np.isinf(reference)
    if not infinite.any():
        return infinite
    largest = float(np.abs(np.where(infinite, 0, reference)).max())
    return np.asarray(infinite & ((np.sign(candidate) != np.sign(reference)) | (np.abs(candidate) < largest)))


def _members(groups: ArrayLike | None, samples: int) -> Rows | None:
    """The groups numbered from 0, (samples,)."""
    if groups is None:
        return None
    names = np.asarray(groups)
    if names.shape != (samples,):
        raise SamplesError(f"groups have shape {names.shape} for {samples} samples", "give one group per sample")
    unique, members = np.unique(names, return_inverse=True)
    if len(unique) < 2:
        raise SamplesError("all holdout samples belong to one group", "give at least 2 groups, or none")
    return members


def _agreement(reference: Array, candidate: Array) -> float | None:
    """The share of rows with the same top-1 answer; ``None`` where the outputs are no class scores."""
    if not is_class_scores(reference):
        return None
    return float((reference.argmax(axis=1) == candidate.argmax(axis=1)).mean())


def _total(sums: Sequence[Energies], part: str) -> float:
    """One of the sums over all samples, channels and outputs."""
    return sum(float(getattr(energies, part).sum()) for energies in sums)


def _cosine(sums: Sequence[Energies]) -> float:
    """The mean over samples of the cosine of all outputs as one vector; 1 where both are zero, 0 where only one is."""
    ours, theirs, error = (
        np.sum([getattr(energies, part).sum(axis=1) for energies in sums], axis=0)
        for part in ("raw", "raw_candidate", "error")
    )
    norm = np.sqrt(ours * theirs)
    alike = (ours == theirs).astype(np.float64)
    product = (ours + theirs - error) / 2
    return float(np.clip(np.divide(product, norm, out=alike, where=norm > 0), -1, 1).mean())
