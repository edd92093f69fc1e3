"""Accuracy metrics: the table of those there are, and the one place where a user's metric is called.

A metric is ``metric(outputs, labels)``. ``outputs`` is what the model returns (its nested structure,
numpy arrays batched on dimension 0; an output whose size varies by sample is an object array (N,) of
arrays), ``labels`` is whatever array (N, ...) the samples came with, an object array (N,) where they vary in
size or are dicts, or ``None``. It returns one score per sample, shape (N,), which makes paired statistics exact,
or one number. A user's metric is higher for better outputs; of the built-in ones, errors are lower.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.classification import first, is_answers, is_class_scores
from corewise.accuracy.detection import decoder
from corewise.accuracy.labels import answer_labels, class_axis, class_labels, is_multi_hot
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled
from corewise.common.errors import MetricError, SamplesError
from corewise.common.references import find_reference, guard

METRICS = {
    "top1": "corewise.accuracy.classification:top1",
    "top5": "corewise.accuracy.classification:top5",
    "f1": "corewise.accuracy.classification:f1",
    "auc": "corewise.accuracy.classification:auc",
    "map": "corewise.accuracy.detection:mean_average_precision",
    "miou": "corewise.accuracy.images:miou",
    "psnr": "corewise.accuracy.images:psnr",
    "ssim": "corewise.accuracy.images:ssim",
    "mae": "corewise.accuracy.regression:mae",
    "rmse": "corewise.accuracy.regression:rmse",
    "pearson": "corewise.accuracy.regression:pearson",
    "spearman": "corewise.accuracy.regression:spearman",
    "ndcg@10": "corewise.accuracy.ranking:ndcg",
    "wer": "corewise.accuracy.transcripts:wer",
    "cer": "corewise.accuracy.transcripts:cer",
    "agreement": "corewise.accuracy.classification:agreement",
    "detections": "corewise.accuracy.detection:detections",
    "recall@10": "corewise.accuracy.ranking:recall",
    "cosine": "corewise.accuracy.closeness:cosine",
    "concordance": "corewise.accuracy.closeness:concordance",
}
"""Name to ``module:function``. Any other metric is named by its own ``module:function`` or ``file.py:function``.
``ndcg`` and ``recall`` take any other number behind the ``@`` too."""
AGAINST_REFERENCE = frozenset({"agreement", "detections", "recall", "cosine", "concordance"})
LOWER_IS_BETTER = frozenset({"mae", "rmse", "wer", "cer"})

ONE_ANSWER = 0.9
"""Where fp32 gives one answer for this share of samples, the outputs are hardly class scores."""
UNIT = 1e-3
"""How far the norm of an embedding may be from 1."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric by name; one ``against_reference`` is given fp32's outputs in place of labels."""

    name: str
    score: Callable[[Any, Any], Any]
    against_reference: bool = False
    lower_is_better: bool = False
    """Whether it is an error: the drop is then how much it grows."""


def resolve(metric: str | Callable[[Any, Any], Any]) -> Metric:
    """The metric of that name in ``METRICS``, that ``module:function`` or ``file.py:function``, or the function itself.

    Raises ``MetricError`` where there is none.
    """
    if not isinstance(metric, str):
        name = getattr(metric, "__name__", type(metric).__name__)
        if not callable(metric):
            raise MetricError(f"the metric has the type {name}", "give a name or a function (outputs, labels) -> score")
        built_in = (known for known in map(_built_in, METRICS) if known.score is metric)
        return next(built_in, Metric(name=name, score=metric))
    if metric in METRICS or re.fullmatch(r"(ndcg|recall)@[1-9]\d*", metric):
        return _built_in(metric)
    if ":" in metric:
        return Metric(name=metric.rpartition(":")[2], score=find_reference(metric, MetricError, "metric"))
    near = difflib.get_close_matches(metric, METRICS) or METRICS
    raise MetricError(f"no metric is named {metric!r}", f"use {', '.join(near)}, module:function or file.py:function")


def _built_in(name: str) -> Metric:
    base, _, k = name.partition("@")
    function = find_reference(METRICS[name if name in METRICS else f"{base}@10"], MetricError, "metric")
    return Metric(
        name=name,
        score=partial(function, k=int(k)) if k else function,
        against_reference=base in AGAINST_REFERENCE,
        lower_is_better=base in LOWER_IS_BETTER,
    )


def default(outputs: Any, labels: Array | None) -> Metric:
    """The metric where the user names none, from what fp32 returned.

    With labels, the one that fits them: classes ``top1``, several classes for a sample ``f1``, maps of classes
    ``miou``, targets of a detector ``map``, one number for each sample ``pearson`` or, where it is 0 or 1, ``auc``.
    For embeddings of norm 1 there is none: what their labels mean, only the user knows.
    Without, class scores ``agreement``, embeddings of norm 1 ``cosine``, all else ``concordance``.

    Raises ``SamplesError`` where no metric fits the labels: they are never left unused.
    """
    if labels is not None:
        return resolve(_fitting_labels(outputs, labels))
    scores = first(outputs)
    if not is_class_scores(scores):
        return resolve("concordance")
    if is_embeddings(scores):
        return resolve("cosine")
    answers = np.bincount(scores.argmax(axis=1))
    return resolve("agreement" if answers.max() < ONE_ANSWER * len(scores) or len(scores) < 10 else "concordance")


def is_embeddings(output: Array) -> bool:
    """Whether the output can be embeddings of norm 1: (N, D), and no shares of 1, as probabilities of classes are."""
    if not is_class_scores(output):
        return False
    wide = output.astype(np.float64)
    shares = not (wide < 0).any() and (np.abs(wide.sum(axis=1) - 1) < UNIT).all()
    return not shares and bool((np.abs(np.linalg.norm(wide, axis=1) - 1) < UNIT).all())


def suggested(outputs: Any) -> tuple[str, ...]:
    """Built-in metrics that fit such outputs, those that need no labels first."""
    scores = first(outputs)
    if decoder(outputs) is not None:
        return ("detections", "map")
    if is_embeddings(scores):
        return ("recall@10", "spearman", "ndcg@10")
    if is_class_scores(scores):
        return ("agreement", "top1", "f1", "auc")
    if scores.dtype != object and scores.size == len(scores):
        return ("pearson", "spearman", "mae", "rmse", "auc", "ndcg@10")
    if scores.dtype != object and scores.ndim == 4:
        return ("miou", "psnr", "ssim", "mae")
    return ("top1", "f1", "cer", "wer", "mae", "rmse")


def _fitting_labels(outputs: Any, labels: Array) -> str:
    """The name of the metric that takes such labels with such outputs. Raises ``SamplesError``."""
    scores = first(outputs)
    if labels.dtype == object and all(isinstance(label, Mapping) for label in labels):
        if decoder(outputs) is not None and all("boxes" in label for label in labels):
            return "map"
        raise _unfit(scores, labels, outputs)
    if is_embeddings(scores):  # their largest number is no class
        raise _unfit(scores, labels, outputs)
    if is_class_scores(scores):
        if labels.shape == scores.shape and is_multi_hot(labels) and (labels.sum(axis=1) != 1).any():
            return "f1"
        class_labels(labels, scores)
        return "top1"
    if is_answers(scores):
        answer_labels(labels, len(scores), "top1")
        return "top1"
    if scores.dtype != object and scores.size == len(scores):
        if labels.dtype != object and labels.size == len(labels):
            return "auc" if np.isin(labels, (0, 1)).all() else "pearson"
        raise _unfit(scores, labels, outputs)
    score, label = np.asarray(scores[0]), np.asarray(labels[0])
    if label.dtype.kind in "iub" and class_axis(score.shape, label.shape) is not None:
        return "miou" if label.ndim == 2 else "top1"
    raise _unfit(scores, labels, outputs)


def _unfit(scores: Array, labels: Array, outputs: Any) -> SamplesError:
    kind = "of varying size" if labels.dtype == object else f"{labels.dtype} of shape {labels.shape}"
    what = f"no default metric takes labels {kind} with outputs {scores.dtype} of shape {scores.shape}"
    fix = f"name a metric ({', '.join(suggested(outputs))}, or a function of your own), or leave the labels out"
    return SamplesError(what, fix)


class UndefinedScore(MetricError):
    """The metric has no value for these outputs, as a correlation with a constant."""


def evaluate(metric: Metric, outputs: Any, labels: Any, samples: int) -> NDArray[np.float64] | Pooled:
    """The metric's scores, float64, of shape (samples,) or (), or pooled: the mean is its value.

    Raises ``MetricError`` where it raises or returns something else, ``UndefinedScore`` where that is NaN or infinity,
    ``SamplesError`` where labels do not fit.
    """
    with guard(MetricError, f"the metric {metric.name!r} failed", "correct it, or name another metric"):
        returned = metric.score(outputs, labels)
        scores = np.asarray(returned.value if isinstance(returned, Pooled) else returned)
    if scores.dtype.kind not in "biuf":
        what = f"the metric {metric.name!r} returns {scores.dtype} instead of numbers"
        raise MetricError(what, "return a float, or one per sample")
    if scores.shape not in ((), (samples,)):
        what = f"the metric {metric.name!r} returns shape {scores.shape} for {samples} samples"
        raise MetricError(what, f"return a float, or one per sample: shape ({samples},)")
    if not np.isfinite(scores).all():
        if isinstance(returned, Pooled):
            what = f"the metric {metric.name!r} has no value: outputs or labels are all the same, or no label counts"
            raise UndefinedScore(what, "give samples that differ, or name another metric")
        raise UndefinedScore(f"the metric {metric.name!r} returns NaN or infinity", "return finite scores")
    return returned if isinstance(returned, Pooled) else scores.astype(np.float64)
