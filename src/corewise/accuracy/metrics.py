"""Accuracy metrics: the table of those there are, and the one place where a user's metric is called.

A metric is ``metric(outputs, labels)``. ``outputs`` is what the model returns (its nested structure,
numpy arrays batched on dimension 0; an output whose size varies by sample is an object array (N,) of
arrays), ``labels`` is whatever array (N, ...) the samples came with, or ``None``. It returns one score
per sample, shape (N,), which makes paired statistics exact, or one number. Higher is better.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import MetricError, SamplesError
from corewise.common.nested import flatten
from corewise.common.references import find_reference, guard

METRICS = {
    "top1": "corewise.accuracy.metrics:top1",
    "top5": "corewise.accuracy.metrics:top5",
    "agreement": "corewise.accuracy.metrics:agreement",
    "cosine": "corewise.accuracy.metrics:cosine",
}
"""Name to ``module:function``. Any other metric is named by its own ``module:function`` or ``file.py:function``."""


class Energies(NamedTuple):
    """Sums of squares and products over all outputs of each sample: float64 arrays (N,)."""

    signal: NDArray[np.float64]
    error: NDArray[np.float64]
    candidate: NDArray[np.float64]
    product: NDArray[np.float64]

    @property
    def cosine(self) -> NDArray[np.float64]:
        """Each sample's cosine, (N,); 1 where both are all zero, 0 where only one is."""
        norm = np.sqrt(self.signal * self.candidate)
        alike = (self.signal == self.candidate).astype(np.float64)
        return np.asarray(np.clip(np.divide(self.product, norm, out=alike, where=norm > 0), -1, 1))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric by name; one ``against_reference`` is given fp32's outputs in place of labels."""

    name: str
    score: Callable[[Any, Any], Any]
    against_reference: bool = False


def resolve(metric: str | Callable[[Any, Any], Any]) -> Metric:
    """The metric of that name in ``METRICS``, that ``module:function`` or ``file.py:function``, or the function itself.

    Raises ``MetricError`` where there is none.
    """
    if not isinstance(metric, str):
        function, name = metric, getattr(metric, "__name__", type(metric).__name__)
        if not callable(function):
            raise MetricError(f"the metric is a {name}", "give a name or a function (outputs, labels) -> score")
    elif metric in METRICS or ":" in metric:
        function, name = find_reference(METRICS.get(metric, metric), MetricError, "metric"), metric.rpartition(":")[2]
    else:
        near = difflib.get_close_matches(metric, METRICS) or METRICS
        raise MetricError(
            f"no metric is named {metric!r}", f"use {', '.join(near)}, module:function or file.py:function"
        )
    return Metric(name=name, score=function, against_reference=function in (agreement, cosine))


def default(outputs: Any, labels: NDArray[Any] | None) -> Metric:
    """The metric where the user names none, from what fp32 returned.

    Class scores with integer labels, one per sample: ``top1``; class scores: ``agreement``; else ``cosine``.
    """
    if not is_class_scores(flatten(outputs)[0][0]):
        return resolve("cosine")
    labelled = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
    return resolve("top1" if labelled else "agreement")


def evaluate(metric: Metric, outputs: Any, labels: Any, samples: int) -> NDArray[np.float64]:
    """The metric's scores, float64, of shape (samples,) or (): the mean is its value.

    Raises ``MetricError`` where it raises or returns something else, ``SamplesError`` where labels do not fit.
    """
    with guard(MetricError, f"the metric {metric.name!r} failed", "mend it, or name another metric"):
        scores = np.asarray(metric.score(outputs, labels))
    if scores.dtype.kind not in "biuf":
        what = f"the metric {metric.name!r} returns no numbers (dtype {scores.dtype})"
        raise MetricError(what, "return a float, or one per sample")
    if scores.shape not in ((), (samples,)):
        what = f"the metric {metric.name!r} returns shape {scores.shape} for {samples} samples"
        raise MetricError(what, f"return a float, or one per sample: shape ({samples},)")
    if not np.isfinite(scores).all():
        raise MetricError(f"the metric {metric.name!r} returns NaN or infinity", "return finite scores")
    return scores.astype(np.float64)


def top1(outputs: Any, labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether the label is the class with the highest score: outputs' first array (N, C), labels (N,) integer."""
    scores, labels = _labelled("top1", outputs, labels)
    return np.asarray(scores.argmax(axis=1) == labels)


def top5(outputs: Any, labels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether the label is among the five highest of C > 5 scores: outputs' first array (N, C), labels (N,) integer."""
    scores, labels = _labelled("top5", outputs, labels)
    if scores.shape[1] <= 5:
        raise MetricError(f"top5 of {scores.shape[1]} classes is always right", "use top1")
    return np.asarray((np.argpartition(-scores, 4, axis=1)[:, :5] == labels[:, None]).any(axis=1))


def agreement(outputs: Any, reference: Any) -> NDArray[np.bool_]:
    """Whether both give the same top-1 answer: first arrays (N, C)."""
    return np.asarray(_scores("agreement", outputs).argmax(axis=1) == _scores("agreement", reference).argmax(axis=1))


def cosine(outputs: Any, reference: Any) -> NDArray[np.float64]:
    """The cosine of each sample's outputs to the reference's, all arrays taken as one vector: (N,)."""
    return energies(flatten(reference)[0], flatten(outputs)[0]).cosine


def energies(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> Energies:
    """Over all floating outputs (over all, where none is floating) of equal shapes, where the reference is finite."""
    pairs = list(zip(reference, candidate, strict=True))
    floating = [pair for pair in pairs if _kind(pair[0]) == "f"]
    signal, error, of_candidate, product = np.sum([_energies(*pair) for pair in floating or pairs], axis=0)
    return Energies(signal, error, of_candidate, product)


def _kind(output: NDArray[Any]) -> str:
    return output[0].dtype.kind if output.dtype == object else output.dtype.kind


def _energies(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """The four rows of ``Energies`` of one output."""
    if reference.dtype == object:
        return np.concatenate([_energies(r[None], c[None]) for r, c in zip(reference, candidate, strict=True)], axis=1)
    wide = np.promote_types(reference.dtype, np.float32)
    r, c = (
        array.reshape(len(array), prod(array.shape[1:])).astype(wide, copy=False) for array in (reference, candidate)
    )
    if not (known := np.isfinite(r)).all():
        r, c = np.where(known, r, 0), np.where(known, c, 0)
    pairs = ((r, r), (c - r, c - r), (c, c), (r, c))
    return np.stack([np.einsum("nk,nk->n", a, b, dtype=np.float64) for a, b in pairs])


def is_class_scores(output: NDArray[Any]) -> bool:
    """Whether the array can be class scores: floating, of shape (N, C) with C of at least 2."""
    return output.dtype.kind == "f" and output.ndim == 2 and output.shape[1] >= 2


def _scores(metric: str, outputs: Any) -> NDArray[Any]:
    first: NDArray[Any] = flatten(outputs)[0][0]
    if not is_class_scores(first):
        what = f"{metric} needs class scores (N, C) as first output, not {first.dtype} of shape {first.shape}"
        raise MetricError(what, "name another metric: cosine, module:function or file.py:function")
    return first


def _labelled(metric: str, outputs: Any, labels: Any) -> tuple[NDArray[Any], NDArray[np.integer]]:
    """Scores (N, C) and labels (N,), each in 0..C-1."""
    scores = _scores(metric, outputs)
    if labels is None:
        raise SamplesError(
            f"{metric} needs labels and the samples have none", "label them, or use the metric agreement"
        )
    if labels.dtype.kind not in "iu" or labels.shape != scores.shape[:1]:
        what = f"{metric} needs one integer label per sample, not {labels.dtype} of shape {labels.shape}"
        raise SamplesError(what, f"give integers of shape ({len(scores)},)")
    classes = scores.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        what = f"holdout sample {outside[0]} has label {labels[outside[0]]}, the model's classes are 0..{classes - 1}"
        raise SamplesError(what, "give the labels the model was trained on")
    return scores, labels
