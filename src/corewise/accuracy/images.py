"""Metrics of pictures: segmentation maps and restored images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.classification import first, probability_threshold
from corewise.accuracy.labels import IGNORED, UnfitLabel, class_axis, counted, sample_name
from corewise.accuracy.outputs import Array
from corewise.accuracy.pooled import Pooled, mean_share_of
from corewise.common.errors import MetricError, MissingExtra, SamplesError

EQUAL_DB = 100.0
"""The PSNR of equal images."""
SIGMA, RADIUS = 1.5, 5
"""The window of SSIM, 11 pixels wide."""


def miou(outputs: Any, labels: Any) -> Pooled:
    """The mean over classes of intersection over union of the maps with the labels.

    Args:
        outputs: First array: class scores (N, C, H, W) or (N, H, W, C), classes (N, H, W), or one score for each
            pixel (N, 1, H, W); maps smaller than the labels by a whole factor are enlarged to the nearest pixel.
        labels: Classes, integers (N, H, W), also of varying size; negative ones and 255 do not count. Where there are
            two classes and labels are only 0 and 255, as pictures of masks have them, 255 is the second class.
    """
    maps = first(outputs)
    if labels is None:
        raise SamplesError("miou needs labels and the samples have none", "add a map of classes for each sample")
    truth = [np.asarray(label).squeeze() for label in labels]
    predicted = [
        _classes(np.asarray(row), label, index) for index, (row, label) in enumerate(zip(maps, truth, strict=True))
    ]
    classes = _class_count(np.asarray(maps[0]), truth[0])
    if classes == 2 and {int(value) for label in truth for value in np.unique(label)} == {0, IGNORED}:
        truth = [(label == IGNORED).astype(np.int64) for label in truth]
    pairs = list(zip(predicted, truth, strict=True))
    highest = [int(label[counted(label, 0)].max(initial=0)) for label in truth]
    if classes is not None and max(highest) >= classes:
        row = int(np.argmax(highest))
        what = f"the label of {sample_name(row)} has class {highest[row]}, the model's classes are 0..{classes - 1}"
        raise UnfitLabel(row, what, "give the labels the model was trained on")
    count = 1 + max(*highest, *(int(each.max()) for each in predicted))
    sums = [_overlap(predicted, label, count) for predicted, label in pairs]
    return mean_share_of(np.stack([both for both, _ in sums]), np.stack([either for _, either in sums]))


def psnr(outputs: Any, labels: Any) -> NDArray[np.float64]:
    """The peak signal-to-noise ratio of each image in dB, (N,); 100 for equal images.

    Args:
        outputs: First array: images of any layout.
        labels: The right images, in the same shape. The peak is 255 where a label is above 1, 2 where one is below 0
            (-1..1), else 1.
    """
    pairs = _images("psnr", outputs, labels)
    peak = _peak([label for _, label in pairs])
    errors = np.array([np.square(image - label).mean() for image, label in pairs])
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(EQUAL_DB, 10 * np.log10(peak**2 / errors)))


def ssim(outputs: Any, labels: Any) -> NDArray[np.float64]:
    """The structural similarity of each image, (N,): window of 11 pixels, sigma 1.5, mean over channels.

    Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.

    Args:
        outputs: First array: images (N, H, W) or (N, C, H, W).
        labels: As ``psnr`` takes them.
    """
    try:
        from scipy.ndimage import gaussian_filter
    except ImportError:
        raise MissingExtra("scipy", "metrics", "the metric ssim") from None
    pairs = _images("ssim", outputs, labels)
    peak = _peak([label for _, label in pairs])

    def smooth(image: Array) -> Array:
        axes = (image.ndim - 2, image.ndim - 1)
        blurred: Array = gaussian_filter(image, SIGMA, radius=RADIUS, axes=axes)
        inner = [slice(RADIUS, -RADIUS) if image.shape[axis] > 2 * RADIUS else slice(None) for axis in axes]
        return blurred[(..., *inner)]

    return np.array([_ssim(image, label, peak, smooth) for image, label in pairs])


def _ssim(x: Array, y: Array, peak: float, smooth: Any) -> float:
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    a, b = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = (2 * mean_x * mean_y + a) * (2 * covariance + b)
    return float((similar / ((mean_x**2 + mean_y**2 + a) * (var_x + var_y + b))).mean())


def _images(metric: str, outputs: Any, labels: Any) -> list[tuple[Array, Array]]:
    images = first(outputs)
    if labels is None:
        fix = "add the right images as labels, or use concordance to compare with fp32"
        raise SamplesError(f"{metric} needs labels and the samples have none", fix)
    pairs = []
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        image, label = np.asarray(image, np.float64), np.asarray(label, np.float64)
        if image.size != label.size or image.ndim < 2:
            what = f"the label of {sample_name(row)} has shape {label.shape}, the output {image.shape}"
            raise UnfitLabel(row, what, f"give {metric} images, and labels in the shape of the output")
        pairs.append((image, label.reshape(image.shape)))
    return pairs


def _peak(labels: list[Array]) -> float:
    if max(float(label.max()) for label in labels) > 1:
        return 255.0
    return 2.0 if min(float(label.min()) for label in labels) < 0 else 1.0


def _classes(scores: Array, label: Array, row: int) -> NDArray[np.int64]:
    """The class of each pixel of the label, from one sample's output."""
    if scores.ndim == label.ndim + 1:
        axis = _score_axis(scores, label)
        if scores.shape[axis] == 1:
            classes = scores.squeeze(axis) > probability_threshold(scores)
        else:
            classes = scores.argmax(axis=axis)
    else:
        classes = scores
    classes = np.asarray(classes)
    if (
        classes.ndim != label.ndim
        or classes.ndim != 2
        or label.dtype.kind not in "iub"
        or classes.dtype.kind not in "iub"
    ):
        what = f"miou needs maps of classes; {sample_name(row)} has {scores.dtype} {scores.shape} for {label.shape}"
        raise MetricError(what, "return class scores (N, C, H, W), and give labels (N, H, W), integers")
    factors = [target // size for target, size in zip(label.shape, classes.shape, strict=True)]
    if any(size * factor != target for size, factor, target in zip(classes.shape, factors, label.shape, strict=True)):
        what = f"the map of {sample_name(row)} is {classes.shape}, its label {label.shape}"
        raise UnfitLabel(row, what, "give labels in the size of the output, or a whole multiple of it")
    return np.asarray(classes.repeat(factors[0], 0).repeat(factors[1], 1), np.int64)


def _class_count(scores: Array, label: Array) -> int | None:
    """How many classes one sample's scores have; ``None`` where the output is classes."""
    if scores.ndim != label.ndim + 1:
        return None
    return max(2, int(scores.shape[_score_axis(scores, label)]))


def _score_axis(scores: Array, label: Array) -> int:
    axis = class_axis(scores.shape, label.shape)
    if axis is not None:
        return axis
    return 0 if scores.shape[0] < scores.shape[-1] else scores.ndim - 1


def _overlap(predicted: Array, label: Array, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels in both and in either of the two maps, for each class."""
    valid = counted(label, classes)
    predicted, label = predicted[valid], label[valid].astype(np.int64)
    both = np.bincount(label[predicted == label], minlength=classes)
    either = np.bincount(label, minlength=classes) + np.bincount(predicted, minlength=classes) - both
    return both.astype(np.float64), either.astype(np.float64)
