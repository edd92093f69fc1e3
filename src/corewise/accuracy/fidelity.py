"""A candidate's outputs against fp32's on the holdout, and whether that is good enough.

The drop is the plain difference of the metric on the whole holdout; what is uncertain about it is its
interval. Both contenders answered the same samples, so every interval is a paired one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corewise.accuracy.metrics import Metric, energies, evaluate, is_class_scores
from corewise.common import stats
from corewise.common.errors import EngineError, MetricError, SamplesError, SourceError
from corewise.records.trial import Fidelity

Rows = NDArray[np.intp]

_REORDERED = 1e-3
"""How much a metric may change when samples change places (rounding, ties) and still be one of independent samples."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's flat outputs for all N holdout rows.

    Each is an array (N, ...), or, where its size varies by row, an object array (N,) of arrays.
    """

    leaves: tuple[NDArray[Any], ...]

    def __post_init__(self) -> None:
        counts = [len(leaf) if leaf.ndim else 0 for leaf in self.leaves]
        if not counts or min(counts) != max(counts) or not counts[0]:
            what = f"outputs have {counts} rows"
            raise EngineError(what, "return at least one output, each with one row per sample on dimension 0")

    @classmethod
    def gather(cls, batches: Iterable[Sequence[NDArray[Any]]]) -> "Outputs":
        """Join what a session returned batch by batch: per batch one array (B, ...) per output.

        The rows come in the batches' order; ``rows(np.argsort(indices))`` puts them back into the samples'.
        """
        return cls(tuple(_join(column) for column in zip(*batches, strict=True)))

    def __len__(self) -> int:
        return len(self.leaves[0])

    def rows(self, rows: Rows) -> "Outputs":
        """These rows, in this order, with repetitions."""
        return Outputs(tuple(leaf[rows] for leaf in self.leaves))


def _join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One array (N, ...), or an object array (N,) where the shapes differ."""
    if not all(part.ndim for part in parts):
        raise EngineError("an output is a single number", "return one row per sample on dimension 0 of every output")
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    rows = [row for part in parts for row in part]
    ragged = np.empty(len(rows), dtype=object)
    for place, row in enumerate(rows):
        ragged[place] = row
    return ragged


@dataclass(frozen=True)
class _Score:
    """The metric as a function of flat outputs and of the rows they are for."""

    reference: Outputs
    metric: Metric
    labels: NDArray[Any] | None
    nest: Callable[[list[NDArray[Any]]], Any]

    def __call__(self, outputs: Outputs, rows: Rows | None = None) -> NDArray[np.float64]:
        """Scores of some rows (all, where none are named): (rows,) or ()."""
        reference, labels = self.reference, self.labels
        if rows is not None:
            outputs, reference = outputs.rows(rows), reference.rows(rows)
            labels = labels if labels is None else labels[rows]
        truth = self.nest(list(reference.leaves)) if self.metric.against_reference else labels
        return evaluate(self.metric, self.nest(list(outputs.leaves)), truth, len(outputs))


def compare(
    reference: Outputs,
    candidate: Outputs,
    *,
    metric: Metric,
    labels: NDArray[Any] | None,
    groups: ArrayLike | None = None,
    nest: Callable[[list[NDArray[Any]]], Any],
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> Fidelity:
    """Compare a candidate with fp32 (``reference``) on the same N rows; fp32 with itself for the baseline.

    ``labels`` (N, ...) goes to the metric with the outputs that ``nest`` has made of the flat ones.
    ``groups`` (N,) names the group of rows that belong together: intervals draw them together.

    Raises ``EngineError`` where the candidate's outputs have other shapes, NaN or infinity, ``SourceError``
    where fp32's have NaN, ``MetricError`` where the metric fails, ``SamplesError`` where labels or groups do not fit.
    """
    _check(reference, candidate)
    members = _members(groups, len(reference))
    if labels is not None and len(labels) != len(reference):
        raise SamplesError(f"there are {len(labels)} labels for {len(reference)} samples", "give one label per sample")
    score = _Score(reference, metric, labels, nest)
    baseline, value, (low, high) = _paired(score, candidate, members, clock=clock, seed=seed)
    sums = energies(reference.leaves, candidate.leaves)
    return Fidelity(
        metric=metric.name,
        samples=len(reference),
        baseline_value=baseline,
        value=value,
        drop=baseline - value,
        drop_low=low,
        drop_high=high,
        sqnr_db=_decibels(float(sums.signal.sum()), float(sums.error.sum())),
        cosine=float(sums.cosine.mean()),
        agreement=_agreement(reference.leaves[0], candidate.leaves[0]),
    )


def _check(reference: Outputs, candidate: Outputs) -> None:
    """Refuse outputs that cannot be compared."""
    if len(reference.leaves) != len(candidate.leaves) or len(reference) != len(candidate):
        raise EngineError(
            f"the candidate returns {len(candidate.leaves)} outputs for {len(candidate)} samples, "
            f"fp32 {len(reference.leaves)} for {len(reference)}"
        )
    for output, (ours, theirs) in enumerate(zip(reference.leaves, candidate.leaves, strict=True)):
        if ours.dtype == object or theirs.dtype == object:
            for row in range(len(ours)):
                _check_values(output, row, ours[row], theirs[row])
        else:
            _check_values(output, None, ours, theirs)


def _check_values(output: int, row: int | None, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
    """The same for one output, or for one row of it."""
    if reference.shape != candidate.shape:
        raise EngineError(f"the candidate's output {output} has shape {candidate.shape}, fp32's {reference.shape}")
    undefined = np.isnan(reference)
    if undefined.any():
        sample = np.argwhere(undefined)[0, 0] if row is None else row
        what = f"the model itself (fp32) returns NaN: output {output} of holdout sample {sample}"
        raise SourceError(what, "check its weights, and that samples are preprocessed as it expects")
    if (np.isnan(candidate) | (np.isinf(candidate) & np.isfinite(reference))).any():
        raise EngineError(f"the candidate's output {output} has NaN or infinity where fp32's has none")


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


def _paired(
    score: _Score, candidate: Outputs, members: Rows | None, **options: Any
) -> tuple[float, float, stats.Interval]:
    """The metric of fp32 and of the candidate, and the interval of their difference."""
    baseline, scores = score(score.reference), score(candidate)
    name = score.metric.name
    if baseline.shape != scores.shape:
        what = f"the metric {name!r} returns shape {baseline.shape} for fp32, {scores.shape} for a candidate"
        raise MetricError(what, "return one kind of score")
    try:
        if scores.ndim:
            interval = _by_sample(baseline, scores, members, **options)
        else:
            interval = _by_resampling(score, candidate, members, **options)
    except ValueError as error:
        raise MetricError(f"the drop of {name!r} has no confidence interval: {error}", "give more samples") from error
    if candidate is score.reference:
        interval = stats.Interval(0.0, 0.0)
    return float(baseline.mean()), float(scores.mean()), interval


def _by_sample(
    baseline: NDArray[np.float64], scores: NDArray[np.float64], members: Rows | None, **options: Any
) -> stats.Interval:
    """The drop's interval where the metric gives one score per sample."""
    drops = baseline - scores
    intervals = []
    if np.isin([baseline, scores], (0, 1)).all():
        worse, better = int((drops > 0).sum()), int((drops < 0).sum())
        intervals.append(stats.paired_proportion_interval(worse, better, len(drops)))
    if not intervals or members is not None:
        intervals.append(stats.bootstrap_mean_interval(drops, members, **options))
    # Right-or-wrong scores in groups: the first interval knows no groups, the second nothing of what did not occur.
    return stats.Interval(min(low for low, _ in intervals), max(high for _, high in intervals))


def _by_resampling(score: _Score, candidate: Outputs, members: Rows | None, **options: Any) -> stats.Interval:
    """The drop's interval where the metric gives one number for all: on resampled rows, or groups of rows."""
    units = len(candidate) if members is None else int(members.max()) + 1
    draw = _drawing(members, len(candidate))
    whole = float(score(score.reference))
    shuffled = float(score(score.reference, draw(np.random.default_rng(0).permutation(units))))
    if abs(whole - shuffled) > _REORDERED * max(1.0, abs(whole)):
        what = f"the metric {score.metric.name!r} changes from {whole:.4f} to {shuffled:.4f} when samples change places"
        raise MetricError(what, "use the labels it is given, and give samples that belong together one group")

    def drop(drawn: Rows) -> float:
        rows = draw(drawn)
        try:
            return float(score(score.reference, rows) - score(candidate, rows))
        except MetricError:  # Undefined on this resample, e.g. a correlation with a constant.
            return float("nan")

    return stats.bootstrap_interval(drop, units, **options)


def _drawing(members: Rows | None, samples: int) -> Callable[[Rows], Rows]:
    """What maps drawn units to rows.

    Each drawn group takes the place of one, so that a layout by place (first all left sentences, then
    all right ones) survives; groups of unequal sizes follow each other.
    """
    if members is None:
        return lambda drawn: drawn
    groups = [np.flatnonzero(members == group) for group in range(int(members.max()) + 1)]
    if len({len(group) for group in groups}) > 1:
        return lambda drawn: np.concatenate([groups[unit] for unit in drawn])
    table = np.stack(groups)

    def place(drawn: Rows) -> Rows:
        rows = np.empty(samples, dtype=np.intp)
        rows[table] = table[drawn]
        return rows

    return place


def _decibels(signal: float, error: float) -> float:
    """10 log10(signal / error), within -200..200."""
    return min(200.0, max(-200.0, 10 * log10((signal or 1e-300) / error))) if error else 200.0


def _agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    """The share of rows with the same top-1 answer; ``None`` where the outputs are no class scores."""
    if not is_class_scores(reference):
        return None
    return float((reference.argmax(axis=1) == candidate.argmax(axis=1)).mean())
