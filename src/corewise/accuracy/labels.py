"""What labels mean: classes in the forms in which people have them, and what guessing them scores."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.outputs import Array
from corewise.common.errors import SamplesError

IGNORED = 255
"""The label that segmentation masks give to pixels that do not count; negative labels do not count either."""
NO_CORRELATION = 2.0
"""Standard errors of a correlation of nothing with nothing, which is 1 / sqrt(samples)."""
NO_DETECTION = 0.01


class UnfitLabel(SamplesError):
    """The label of one row of the holdout does not fit."""

    def __init__(self, row: int, what: str, fix: str) -> None:
        """``what`` names the sample as ``sample_name`` does."""
        super().__init__(what, fix)
        self.row = row

    def named(self, names: Sequence[str]) -> SamplesError:
        """The same error, with the user's own name of the sample."""
        return SamplesError(self.what.replace(sample_name(self.row), sample_name(self.row, names)), self.fix)


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Errors about a row's label name the user's own sample."""
    try:
        yield
    except UnfitLabel as error:
        raise error.named(names) from error


def class_labels(labels: Array | None, scores: Array, metric: str = "top1") -> NDArray[Any]:
    """The class of each sample, int64 (N,), from the forms in which labels come.

    This is the one place that decides what class labels are. Understood are integers (N,) and (N, 1), floats and
    booleans that are whole numbers, and one-hot rows (N, classes).

    Args:
        labels: Whatever the samples came with, N of them.
        scores: fp32's class scores (N, classes).
        metric: The metric that asks, for messages.

    Raises:
        SamplesError: There are no labels, they are no classes, or a class is outside 0..classes - 1.
    """
    count, classes = scores.shape
    numbers = answer_labels(labels, count, metric, classes)
    outside = np.flatnonzero((numbers < 0) | (numbers >= classes))
    if outside.size:
        row = int(outside[0])
        what = f"{sample_name(row)} has label {numbers[row]}, but the model's classes are 0..{classes - 1}"
        counts_from_one = numbers.min() >= 1 and numbers.max() == classes
        fix = "subtract 1: these labels count from 1" if counts_from_one else "give the labels the model was trained on"
        if numbers[outside].max() < 0:
            fix = "leave out the samples that have no label"
        raise UnfitLabel(row, what, fix)
    return numbers


def answer_labels(labels: Array | None, count: int, metric: str, classes: int = 0) -> NDArray[np.int64]:
    """As ``class_labels``, of a model that returns classes and no scores, so that their number is not known."""
    if labels is None:
        raise SamplesError(
            f"{metric} needs labels and the samples have none", "add labels, or use the metric agreement"
        )
    numbers = _class_numbers(labels, count, classes)
    if numbers is None:
        kind = f"{labels.dtype} of shape {labels.shape}"
        if labels.dtype == object:
            kind = "strings" if isinstance(labels[0], str) else "of varying size"
        what = f"the labels are {kind}, which does not name one class for each of {count} samples"
        fix = f"give integers of shape ({count},), name a metric that takes these labels, or leave labels out"
        raise SamplesError(what, fix)
    return numbers


def _class_numbers(labels: Array, count: int, classes: int) -> NDArray[np.int64] | None:
    """The labels as integers (N,); ``None`` where they do not name one class for each sample."""
    if labels.dtype == object:
        sizes = {np.size(label) for label in labels} if not any(isinstance(label, Mapping) for label in labels) else {0}
        if sizes != {1}:
            return None
        labels = np.array([np.asarray(label).item() for label in labels])
    if labels.dtype.kind not in "biuf" or len(labels) != count:
        return None
    if labels.shape[1:] in ((), (1,)):
        flat = labels.reshape(count)
        return flat.astype(np.int64) if np.array_equal(flat, np.round(flat)) else None
    if labels.shape == (count, classes) and is_multi_hot(labels) and (labels.sum(axis=1) == 1).all():
        return np.asarray(labels.argmax(axis=1), np.int64)
    return None


def is_multi_hot(labels: Array) -> bool:
    """Whether the labels are 0 and 1 for each class: (N, classes)."""
    return labels.ndim == 2 and labels.dtype.kind in "biuf" and bool(np.isin(labels, (0, 1)).all())


def dense_labels(labels: Array | None, scores: Array, metric: str) -> list[tuple[Array, Array]]:
    """For each sample its class scores (positions..., classes) and the class of each position.

    Scores are (N, classes, ...) or (N, ..., classes) and labels (N, ...), integers; both may vary in size by sample.
    Raises ``SamplesError`` where labels are missing or do not fit.
    """
    if labels is None:
        raise SamplesError(f"{metric} needs labels and the samples have none", "add labels")
    rows = [(np.asarray(label), np.asarray(score)) for label, score in zip(labels, scores, strict=True)]
    # A sample of as many positions as classes does not say which axis counts classes, but the others do.
    last = any(class_axis(score.shape, label.shape) not in (None, 0) for label, score in rows)
    pairs = []
    for row, (label, score) in enumerate(rows):
        axis = class_axis(score.shape, label.shape, last=last)
        if axis is None or label.dtype.kind not in "iub":
            what = f"the label of {sample_name(row)} is {label.dtype} of shape {label.shape} for scores {score.shape}"
            raise UnfitLabel(row, what, "give one integer class for each position of the scores")
        classes = score.shape[axis]
        if (highest := int(label[counted(label, classes)].max(initial=0))) >= classes:
            what = f"the label of {sample_name(row)} has class {highest}, the model's classes are 0..{classes - 1}"
            raise UnfitLabel(row, what, "give the labels the model was trained on")
        pairs.append((np.moveaxis(score, axis, -1), label))
    return pairs


def class_axis(scores: Sequence[int], labels: Sequence[int], *, last: bool = False) -> int | None:
    """The axis of one sample's scores that counts classes, from the shape of its labels; ``None`` where none fits.

    Where both do, it is the first one, or with ``last`` the last one.
    """
    if len(scores) != len(labels) + 1 or not labels:
        return None
    is_first, is_last = tuple(scores[1:]) == tuple(labels), tuple(scores[:-1]) == tuple(labels)
    if is_first and not (last and is_last):
        return 0
    return len(scores) - 1 if is_last else None


def counted(label: Array, classes: int) -> NDArray[np.bool_]:
    """The positions whose label counts."""
    return np.asarray((label >= 0) & ((label != IGNORED) | (classes > IGNORED)))


def sample_name(row: int, names: Sequence[str] = ()) -> str:
    """How messages call a sample: by the user's own number or file name where they are known."""
    return str(names[row]) if len(names) else f"holdout sample {row}"


def chance(metric: str, scores: Array, samples: int, labels: Array | None = None) -> tuple[float, float] | None:
    """What guessing scores by a built-in metric, and the score below which a model is hardly better.

    ``None`` for metrics without such a level. A model that is hardly better on its own labels was given labels in
    another order, or inputs that were prepared in another way.

    Args:
        metric: The metric's name.
        scores: fp32's first output.
        samples: How many samples were scored.
        labels: Those that they were scored by.
    """
    if metric == "miou":
        return _chance_of_maps(scores)
    guesses = {"auc": 0.5, "pearson": 0.0, "spearman": 0.0, "map": 0.0}
    if metric in ("top1", "top5"):
        guesses[metric] = int(metric[3:]) / _class_count(scores, labels)
    guess = guesses.get(metric)
    if guess is None or guess >= 1:
        return None
    if metric == "map":
        return guess, NO_DETECTION
    if guess == 0:
        return guess, NO_CORRELATION / sqrt(samples)
    # Twice what guessing scores, and never within the noise of guessing; half for two or three classes.
    return guess, max(min(2 * guess, 0.5), guess + 2 * sqrt(guess * (1 - guess) / samples))


def _class_count(scores: Array, labels: Array | None) -> int:
    """How many classes there are to choose from; of answers without scores, as many as were given."""
    if scores.dtype.kind in "iu":
        return max(2, len(np.unique(scores)))
    score, label = np.asarray(scores[0]), np.asarray(0 if labels is None else labels[0])
    axis = class_axis(score.shape, label.shape)
    return int(score.shape[0 if axis is None else axis]) if score.ndim else 2


def _chance_of_maps(scores: Array) -> tuple[float, float] | None:
    """What maps of random classes score by ``miou``, and what maps of a single class may score."""
    if scores.ndim != 4:
        return None
    classes = max(2, min(scores.shape[1], scores.shape[3]))
    return 1 / (2 * classes - 1), 1 / classes
