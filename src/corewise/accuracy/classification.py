"""Metrics of classes: right answers, F1 and areas under curves."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.labels import (
    UnfitLabel,
    answer_labels,
    class_labels,
    counted,
    dense_labels,
    is_multi_hot,
    sample_name,
)
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled, Rows, mean_share_of
from corewise.common.errors import MetricError, MissingExtra, SamplesError
from corewise.common.nested import flatten


def top1(outputs: Any, labels: Any) -> NDArray[Any]:
    """Whether the label is the class with the highest score, or, for scores of positions, the share of right ones.

    Args:
        outputs: First array (N, C) class scores; (N, T, C), (N, C, H, W) and the like; or classes, integers (N,).
        labels: The class of each sample: integers (N,) or (N, 1), floats or booleans that are whole numbers, or one-hot
            rows (N, C); or of each position: integers (N, T), (N, H, W), also of varying size, where negative ones and
            255 do not count.
    """
    scores = first(outputs)
    if is_class_scores(scores):
        return np.asarray(scores.argmax(axis=1) == class_labels(labels, scores))
    if is_answers(scores):
        return np.asarray(scores.reshape(-1) == answer_labels(labels, len(scores), "top1"))
    shares = []
    for row, (dense, label) in enumerate(dense_labels(labels, _dense(scores, "top1"), "top1")):
        valid = counted(label, dense.shape[-1])
        if not valid.any():
            raise UnfitLabel(row, f"no position of {sample_name(row)} has a class", "label at least one position")
        shares.append((dense.argmax(axis=-1) == label)[valid].mean())
    return np.asarray(shares)


def top5(outputs: Any, labels: Any) -> NDArray[np.bool_]:
    """Whether the label is among the five highest of C > 5 scores.

    Args:
        outputs: First array (N, C).
        labels: The class of each sample, as ``top1`` takes it.
    """
    scores = _scores("top5", outputs)
    classes = class_labels(labels, scores, metric="top5")
    if scores.shape[1] <= 5:
        raise MetricError(f"top5 is always right with {scores.shape[1]} classes", "use top1")
    return np.asarray((np.argpartition(-scores, 4, axis=1)[:, :5] == classes[:, None]).any(axis=1))


def agreement(outputs: Any, reference: Any) -> NDArray[np.bool_]:
    """Whether both give the same top-1 answer: first arrays (N, C)."""
    return np.asarray(_scores("agreement", outputs).argmax(axis=1) == _scores("agreement", reference).argmax(axis=1))


def f1(outputs: Any, labels: Any) -> Pooled:
    """The mean over classes of F1, 2 TP / (2 TP + FP + FN); classes that neither occur nor are answered do not count.

    Args:
        outputs: First array (N, C); or scores of positions as ``top1`` takes them.
        labels: Classes as ``top1`` takes them; or 0 and 1 for each class (N, C), where several may be 1: a class is
            then answered if its score is above 0.5, or above 0 where scores are no probabilities.
    """
    scores = first(outputs)
    if is_class_scores(scores) and labels is not None and _several(labels, scores):
        truth = labels.astype(bool)
        answered = scores > probability_threshold(scores)
        hits = 2.0 * (truth & answered)
        return mean_share_of(hits, truth.astype(np.float64) + answered)
    if is_class_scores(scores):
        pairs = [
            (row[None], label[None])
            for row, label in zip(scores, class_labels(labels, scores, metric="f1"), strict=True)
        ]
    else:
        pairs = dense_labels(labels, _dense(scores, "f1"), "f1")
    counts = [_f1_counts(dense, label) for dense, label in pairs]
    return mean_share_of(np.stack([hits for hits, _ in counts]), np.stack([sizes for _, sizes in counts]))


def _several(labels: Array, scores: Array) -> bool:
    """Whether labels are 0 and 1 for each class, and more or fewer than one class holds for some sample."""
    return labels.shape == scores.shape and is_multi_hot(labels) and not bool((labels.sum(axis=1) == 1).all())


def _f1_counts(scores: Array, labels: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """2 TP and 2 TP + FP + FN of each class, for positions whose label counts."""
    classes = scores.shape[-1]
    valid = counted(labels, classes)
    answers, truth = scores.argmax(axis=-1)[valid], labels[valid]
    hits = np.bincount(truth[answers == truth], minlength=classes)
    sizes = np.bincount(truth, minlength=classes) + np.bincount(answers, minlength=classes)
    return 2 * hits.astype(np.float64), sizes.astype(np.float64)


def auc(outputs: Any, labels: Any) -> Pooled:
    """The area under the ROC curve; of several classes the mean over those that occur, each against the rest.

    Args:
        outputs: First array: one score for each sample (N,) or (N, 1), or class scores (N, C).
        labels: 0 and 1 for each sample; classes as ``top1`` takes them; or 0 and 1 for each class (N, C).
    """
    scores = first(outputs)
    if labels is None:
        raise SamplesError("auc needs labels and the samples have none", "add labels")
    if scores.size == len(scores):
        if labels.size != len(scores) or not np.isin(labels, (0, 1)).all():
            raise SamplesError(
                f"auc needs labels 0 and 1, not {labels.dtype} of shape {labels.shape}", "give 0 or 1 for each"
            )
        scores, truth = scores.reshape(-1, 1), labels.reshape(-1, 1).astype(bool)
    else:
        scores = _scores("auc", outputs)
        if labels.shape == scores.shape and is_multi_hot(labels):
            truth = labels.astype(bool)
        else:
            truth = class_labels(labels, scores, metric="auc")[:, None] == np.arange(scores.shape[1])
        if scores.shape[1] == 2:  # the second of two classes is the one that is asked for
            scores, truth = scores[:, 1:] - scores[:, :1], truth[:, 1:]
    rankdata = scipy_stats("auc").rankdata

    def of_rows(rows: Rows) -> float:
        ranks, right = rankdata(scores[rows], axis=0), truth[rows]
        positive = right.sum(axis=0)
        pairs = positive * (len(rows) - positive)
        over = (ranks * right).sum(axis=0) - positive * (positive + 1) / 2
        return float((over[pairs > 0] / pairs[pairs > 0]).mean()) if (pairs > 0).any() else float("nan")

    return Pooled(of_rows, len(scores))


def first(outputs: Any) -> Array:
    """The first array of the outputs."""
    array: Array = flatten(outputs)[0][0]
    return array


def is_class_scores(output: Array) -> bool:
    """Whether the array can be class scores: floating, of shape (N, C) with C of at least 2."""
    return output.dtype.kind == "f" and output.ndim == 2 and output.shape[1] >= 2


def is_answers(output: Array) -> bool:
    """Whether the array can be the classes themselves: one integer for each sample."""
    return output.dtype.kind in "iu" and output.size == len(output)


def probability_threshold(scores: Array) -> float:
    """Where scores mean yes: above 0.5 for probabilities, above 0 for anything else."""
    return 0.5 if float(scores.min()) >= 0 and float(scores.max()) <= 1 else 0.0


def scipy_stats(metric: str) -> Any:
    """``scipy.stats``. Raises ``MissingExtra`` where it is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise MissingExtra("scipy", "metrics", f"the metric {metric}") from None
    return stats


def _dense(scores: Array, metric: str) -> Array:
    """The scores, if they can be those of classes at positions."""
    sample = np.asarray(scores[0])
    if sample.ndim < 2 or sample.dtype.kind != "f":
        _refuse(metric, scores)
    return scores


def _scores(metric: str, outputs: Any) -> Array:
    scores = first(outputs)
    if not is_class_scores(scores):
        _refuse(metric, scores)
    return scores


def _refuse(metric: str, scores: Array) -> None:
    what = f"{metric} needs class scores (N, C) as first output, not {scores.dtype} of shape {scores.shape}"
    raise MetricError(what, "name another metric: concordance, module:function or file.py:function")
