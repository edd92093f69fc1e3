"""Metrics of numbers: errors and correlations."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.classification import first, scipy_stats
from corewise.accuracy.labels import UnfitLabel, sample_name
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled, Rows
from corewise.common.errors import SamplesError


def mae(outputs: Any, labels: Any) -> NDArray[np.float64]:
    """The mean absolute error of each sample, (N,); lower is better.

    Args:
        outputs: First array (N, ...), also of varying size.
        labels: Numbers of the same shape, or of the same size for each sample.
    """
    return np.array([np.abs(difference).mean() for difference in _differences("mae", outputs, labels)])


def rmse(outputs: Any, labels: Any) -> Pooled:
    """The root of the mean over samples of each one's mean squared error; lower is better.

    Takes what ``mae`` takes.
    """
    squares = np.array([np.square(difference).mean() for difference in _differences("rmse", outputs, labels)])
    return Pooled(lambda rows: float(np.sqrt(squares[rows].mean())), len(squares))


def pearson(outputs: Any, labels: Any) -> Pooled:
    """Pearson's correlation of the outputs with the labels.

    Args:
        outputs: First array: one number for each sample, (N,) or (N, 1); or embeddings (N, D) of pairs: samples 2i and
            2i + 1 then give the cosine of their embeddings.
        labels: One number for each sample; the same for both samples of a pair.
    """
    return _correlation("pearson", outputs, labels, _pearson)


def spearman(outputs: Any, labels: Any) -> Pooled:
    """Spearman's rank correlation of the outputs with the labels. Takes what ``pearson`` takes."""
    rankdata = scipy_stats("spearman").rankdata
    return _correlation("spearman", outputs, labels, lambda x, y: _pearson(rankdata(x), rankdata(y)))


def _differences(metric: str, outputs: Any, labels: Any) -> list[NDArray[np.float64]]:
    predicted = first(outputs)
    if labels is None:
        raise SamplesError(f"{metric} needs labels and the samples have none", "add the right numbers as labels")
    differences = []
    for row, (ours, theirs) in enumerate(zip(predicted, labels, strict=True)):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
        if theirs.size != ours.size or theirs.dtype.kind not in "biuf":
            what = f"the label of {sample_name(row)} has shape {theirs.shape}, but the output has {ours.shape}"
            raise UnfitLabel(row, what, "give labels in the shape of the output")
        differences.append(ours - theirs.reshape(ours.shape))
    return differences


def _correlation(metric: str, outputs: Any, labels: Any, of: Callable[[Array, Array], float]) -> Pooled:
    predicted = first(outputs)
    numbers = None if labels is None or labels.dtype == object else labels.reshape(len(labels), -1)
    if numbers is None or numbers.shape != (len(predicted), 1):
        given = "there are none" if labels is None else f"they are {labels.dtype} of shape {labels.shape}"
        raise SamplesError(f"{metric} needs one number for each sample as labels, but {given}", "give such labels")
    truth, members = numbers[:, 0].astype(np.float64), None
    if predicted.size == len(predicted):
        values = predicted.reshape(-1).astype(np.float64)
    else:
        values, members = _similarities(metric, predicted, truth)
    return Pooled(lambda rows: of(values[rows], truth[rows]), len(values), members)


def _similarities(metric: str, embeddings: Array, labels: Array) -> tuple[NDArray[np.float64], Rows]:
    """For each sample the cosine of its pair's embeddings, and the pair's number."""
    pairs = len(embeddings) // 2
    if embeddings.dtype == object or embeddings.ndim != 2 or len(embeddings) % 2 or (labels[::2] != labels[1::2]).any():
        what = f"{metric} needs one number for each sample, or embeddings of pairs that share a label"
        raise SamplesError(f"{what}; the output is {embeddings.shape}", "give pairs one after the other, with groups")
    wide = embeddings.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-300)
    cosines = (wide[::2] * wide[1::2]).sum(axis=1)
    return np.repeat(cosines, 2), np.repeat(np.arange(pairs), 2)


def _pearson(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else float("nan")
