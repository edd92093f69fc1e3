"""Samples unlike those that calibrate: what a build is worth on inputs that its ranges were not made for.

A calibration set is narrower than what a model meets. How much that costs is seen by leaving a part of the samples out
that is unlike the rest: a twin of the build is calibrated without it and judged on it. The steps, for a search:

1. ``split = shift_split(fp32's outputs for the calibration samples, fp32's for the holdout, seed)``;
2. build the candidate once more with ``calibration.take(split.calibrating)``, and run that twin on the holdout;
3. ``gate.under_shift(fidelity, outputs, split.judged)`` compares it with fp32 there, keeps the comparison in
   ``Fidelity.shift``, and, in a gate that is ``robust``, lets it decide.

fp32, bf16 and dynamic quantization need no calibration: what they answer for ``split.judged`` is known, and no twin is
built.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.groups import Layout, layouts, real
from corewise.accuracy.metrics import is_embeddings
from corewise.accuracy.outputs import Array, Outputs, Rows, kind

CLUSTERS = 4
FEWEST_JUDGED = 8
"""Fewer samples of the holdout say nothing about a drop."""
FEWEST_CALIBRATING = 0.5
"""The share of the calibration samples that has to be left."""
MOST_FEATURES = 1024
"""If an output has more numbers for each sample, its channels' means over positions are compared."""
ROUNDS = 50
STARTS = 5

Features = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ShiftSplit:
    """Samples to calibrate a twin with, and samples unlike them to judge it on."""

    calibrating: Rows
    """Rows of the calibration samples that are left, in their order."""
    judged: Rows
    """Rows of the holdout that are unlike them."""


def shift_split(
    calibration: Outputs, holdout: Outputs, seed: int, groups: tuple[Rows, Rows] | None = None
) -> ShiftSplit | None:
    """The cluster of samples that is most unlike the rest, left out of calibration and kept to judge.

    Samples are clustered by what fp32 answers for them (k-means). ``None`` where samples are too few, or so alike that
    no cluster leaves enough on both sides.

    Args:
        calibration: fp32's outputs for the calibration samples.
        holdout: fp32's outputs for the holdout, of the same kinds.
        seed: Of the clusters' first centers.
        groups: The numbers of the groups of both, (N,) each: samples of one group stay together, by their mean.
    """
    if not enough(len(calibration), len(holdout)):
        return None
    features = _features(calibration, holdout)
    if features is None:
        return None
    if groups is None:
        members = k_means(features, CLUSTERS, seed)
    else:
        # A group is in one of the two only, so its number stands for the same samples in both.
        _, units = np.unique(np.concatenate(groups), return_inverse=True)
        sums = np.zeros((units.max() + 1, features.shape[1]))
        np.add.at(sums, units, features)
        members = k_means(sums / np.bincount(units)[:, None], CLUSTERS, seed)[units]
    ours, theirs = members[: len(calibration)], members[len(calibration) :]
    best, widest = None, 0.0
    for cluster in range(CLUSTERS):
        inside = members == cluster
        judged, calibrating = np.flatnonzero(theirs == cluster), np.flatnonzero(ours != cluster)
        if len(judged) < FEWEST_JUDGED or len(calibrating) < max(2, FEWEST_CALIBRATING * len(ours)):
            continue
        distance = float(np.square(features[inside].mean(axis=0) - features[~inside].mean(axis=0)).sum())
        if distance > widest:
            best, widest = ShiftSplit(calibrating, judged), distance
    return best


def enough(calibration: int, holdout: int) -> bool:
    """Whether these numbers of samples can be split at all."""
    return calibration >= CLUSTERS and holdout >= FEWEST_JUDGED


def robust_by_default(reference: Outputs, *, integer_inputs: bool) -> bool:
    """Whether the drop under shift decides unless the user says otherwise: for texts and for embeddings.

    Args:
        reference: fp32's outputs.
        integer_inputs: Whether the model takes integers, as token ids are.
    """
    return integer_inputs or is_embeddings(reference.leaves[0])


def k_means(features: Features, clusters: int, seed: int) -> NDArray[np.intp]:
    """The cluster of each row of ``features`` (N, D), by Lloyd's algorithm from the best of some k-means++ starts."""
    rng = np.random.default_rng(seed)
    best, least = np.zeros(len(features), np.intp), np.inf
    for _ in range(STARTS):
        centers = _first_centers(features, clusters, rng)
        members = np.full(len(features), -1)
        for _ in range(ROUNDS):
            distances = _distances(features, centers)
            nearest = distances.argmin(axis=1)
            if np.array_equal(nearest, members):
                break
            members = nearest
            present = np.unique(members)
            centers[present] = [features[members == cluster].mean(axis=0) for cluster in present]
        inertia = float(_distances(features, centers).min(axis=1).sum())
        if inertia < least:
            best, least = members, inertia
    return best


def _first_centers(features: Features, clusters: int, rng: np.random.Generator) -> Features:
    """k-means++: each further center is drawn by its squared distance to those before (Arthur, Vassilvitskii 2007)."""
    centers = features[[int(rng.integers(len(features)))]]
    while len(centers) < clusters:
        distances = _distances(features, centers).min(axis=1)
        total = distances.sum()
        chances = distances / total if total > 0 else np.full(len(features), 1 / len(features))
        centers = np.concatenate([centers, features[[int(rng.choice(len(features), p=chances))]]])
    return centers


def _distances(features: Features, centers: Features) -> Features:
    """Squared distances, (N, centers)."""
    squares = np.square(features).sum(axis=1)[:, None] + np.square(centers).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * features @ centers.T, 0))


def _features(calibration: Outputs, holdout: Outputs) -> Features | None:
    """What samples of both are compared by, each group of channels of one scale: (calibration + holdout, D)."""
    columns = []
    for layout, ours, theirs in zip(layouts(holdout.leaves), calibration.leaves, holdout.leaves, strict=True):
        if kind(theirs) != "f":
            continue
        vectors = np.concatenate([_vectors(layout, ours), _vectors(layout, theirs)])
        vectors = vectors - vectors.mean(axis=0)
        grouped = len(layout.groups) > 1 and vectors.shape[1] == sum(len(group) for group in layout.groups)
        for group in layout.groups if grouped else (np.arange(vectors.shape[1]),):
            part = vectors[:, group]
            scale = float(np.sqrt(np.square(part).sum(axis=1).mean()))
            columns.append(part / scale if scale else part)
    return np.concatenate(columns, axis=1) if columns else None


def _vectors(layout: Layout, output: Array) -> Features:
    """One vector for each sample: its numbers, or, of many or of a varying number, the channels' means."""
    if output.dtype != object and output[0].size <= MOST_FEATURES and len(layout.groups) == 1:
        return _finite(output).reshape(len(output), -1)
    rows = (_finite(np.asarray(row)) for row in output)
    axis = layout.axis
    means = [row.reshape(-1).mean(keepdims=True) if axis is None else _channel_means(row, axis - 1) for row in rows]
    return np.stack(means)


def _finite(array: Array) -> Features:
    """The array with zeros for NaN and for infinity, which masks what does not count."""
    return np.nan_to_num(real(array).astype(np.float64), posinf=0.0, neginf=0.0)


def _channel_means(row: Array, axis: int) -> Array:
    return np.asarray(np.moveaxis(row, axis, -1).reshape(-1, row.shape[axis]).mean(axis=0))
