"""What detectors return, decoded to boxes, scores and classes.

Understood are, by their form,

- ``boxes`` (N, K, 4) as (x1, y1, x2, y2), ``scores`` (N, K) and ``labels`` (N, K), as torchvision names them, also of
  varying K;
- ``pred_boxes`` (N, K, 4) as (center x, center y, width, height) and ``logits`` (N, K, C), as transformers names them;
- one array (N, K, 6): x1, y1, x2, y2, score, class;
- one array (N, 4 + C, cells) or (N, cells, 4 + C) before suppression, as YOLO exports have: boxes, then a score for
  each class. Boxes are (x1, y1, x2, y2) where these are in order in every cell, else (center x, center y, width,
  height); of boxes of one class that overlap by more than ``OVERLAP`` the best stays;
- boxes (N, K, 4) and class scores (N, K, C) as two arrays, as SSD has them, decoded like the former.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.groups import layouts
from corewise.accuracy.outputs import Array
from corewise.common.errors import MetricError
from corewise.common.nested import flatten

OVERLAP = 0.7
"""The intersection over union at which Ultralytics' validation suppresses a box."""
LEAST_SCORE = 0.001
MOST_CANDIDATES = 3000
MOST_BOXES = 300


class Detections(NamedTuple):
    """One image's: boxes (k, 4) as x1, y1, x2, y2, scores (k,) and classes (k,)."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]


Decode = Callable[[Any], list[Detections]]


@dataclass(frozen=True)
class _Raw:
    """How an array of boxes and class scores before suppression is laid out."""

    channels_last: bool
    corners: bool
    """Whether boxes are x1, y1, x2, y2 rather than center and size."""
    logits: bool

    def __call__(self, array: Array) -> list[Detections]:
        rows = array if self.channels_last else np.swapaxes(array, 1, 2)
        return [self._image(row[:, :4], row[:, 4:]) for row in rows]

    def _image(self, boxes: Array, scores: Array) -> Detections:
        wide = _sigmoid(scores) if self.logits else scores.astype(np.float64)
        classes = wide.argmax(axis=1)
        best = wide[np.arange(len(wide)), classes]
        boxes = boxes.astype(np.float64)
        return suppressed(Detections(boxes if self.corners else corners(boxes), best, classes.astype(np.int64)))


def decoder(outputs: Any) -> Decode | None:
    """How such outputs are decoded, settled on fp32's; ``None`` where they are no detector's."""
    if isinstance(outputs, Mapping) or hasattr(outputs, "__dataclass_fields__"):
        known = _named(outputs)
        if known is not None:
            return known
    leaves = flatten(outputs)[0]
    if any(leaf.dtype == object or leaf.ndim != 3 for leaf in leaves[:1]):
        return None
    if len(leaves) >= 2:
        return _separate(leaves)
    return _together(leaves[0])


def decoded(decode: Decode | None, outputs: Any, metric: str) -> list[Detections]:
    """The detections of each image. Raises ``MetricError`` where the outputs are no detector's."""
    if decode is None:
        shapes = ", ".join(f"{leaf.dtype} {leaf.shape}" for leaf in flatten(outputs)[0])
        fix = "return boxes, scores and labels as torchvision names them, or give a function as metric"
        raise MetricError(f"{metric} finds no boxes and scores in the outputs ({shapes})", fix)
    return decode(outputs)


def corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (k, 4) of center and size as x1, y1, x2, y2."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], axis=1)


def suppressed(detections: Detections) -> Detections:
    """Of boxes of one class that overlap, the best: greedy non-maximum suppression."""
    order = np.argsort(-detections.scores, kind="stable")[:MOST_CANDIDATES]
    order = order[detections.scores[order] > LEAST_SCORE]
    boxes, classes = detections.boxes[order], detections.classes[order]
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    left = np.arange(len(order))
    kept: list[int] = []
    while left.size and len(kept) < MOST_BOXES:
        best, rest = left[0], left[1:]
        kept.append(int(order[best]))
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        both = np.prod(np.maximum(high - low, 0), axis=1)
        overlap = both / np.maximum(areas[best] + areas[rest] - both, 1e-12)
        left = rest[(overlap <= OVERLAP) | (classes[rest] != classes[best])]
    return Detections(detections.boxes[kept], detections.scores[kept], detections.classes[kept])


def _named(outputs: Any) -> Decode | None:
    keys = set(_fields(outputs))
    if {"boxes", "scores", "labels"} <= keys:
        return _torchvision
    if {"logits", "pred_boxes"} <= keys:
        logits = _fields(outputs)["logits"]
        # DETR's last class means that there is no object, and is the answer of most queries.
        softmax = bool((logits.argmax(axis=-1) == logits.shape[-1] - 1).mean() > 0.5)
        return lambda given: _transformers(given, softmax)
    return None


def _fields(outputs: Any) -> Mapping[str, Any]:
    return outputs if isinstance(outputs, Mapping) else vars(outputs)


def _torchvision(outputs: Any) -> list[Detections]:
    fields = _fields(outputs)
    rows = zip(fields["boxes"], fields["scores"], fields["labels"], strict=True)
    return [
        Detections(
            np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64), np.asarray(classes, np.int64)
        )
        for boxes, scores, classes in rows
    ]


def _transformers(outputs: Any, softmax: bool) -> list[Detections]:
    fields = _fields(outputs)
    detections = []
    for logits, boxes in zip(fields["logits"], fields["pred_boxes"], strict=True):
        wide = logits.astype(np.float64)
        if softmax:
            shares = np.exp(wide - wide.max(axis=-1, keepdims=True))
            scores = (shares / shares.sum(axis=-1, keepdims=True))[:, :-1]
        else:
            scores = _sigmoid(wide)
        classes = scores.argmax(axis=1)
        best = scores[np.arange(len(scores)), classes]
        detections.append(Detections(corners(boxes.astype(np.float64)), best, classes.astype(np.int64)))
    return detections


def _separate(leaves: list[Array]) -> Decode | None:
    """Boxes (N, K, 4) and class scores (N, K, C), in either order."""
    boxes = next((k for k, leaf in enumerate(leaves) if leaf.ndim == 3 and leaf.shape[2] == 4), None)
    if boxes is None:
        return None
    count = leaves[boxes].shape[1]
    scores = next(
        (k for k, leaf in enumerate(leaves) if k != boxes and leaf.ndim == 3 and leaf.shape[1] == count), None
    )
    if scores is None:
        return None
    raw = _Raw(True, _in_order(leaves[boxes]), _are_logits(leaves[scores]))

    def decode(outputs: Any) -> list[Detections]:
        leaves = flatten(outputs)[0]
        return raw(np.concatenate([leaves[boxes], leaves[scores]], axis=2))

    return decode


def _together(array: Array) -> Decode | None:
    if array.dtype.kind != "f":
        return None
    if array.shape[2] == 6 and np.array_equal(array[..., 5], np.round(array[..., 5])) and _in_order(array):
        return lambda outputs: [
            Detections(row[:, :4].astype(np.float64), row[:, 4].astype(np.float64), row[:, 5].astype(np.int64))
            for row in flatten(outputs)[0][0]
        ]
    (layout,) = layouts([array])
    axis = layout.axis if len(layout.groups) > 1 else 1 + int(array.shape[1] > array.shape[2])
    if axis is None or array.shape[axis] < 5:
        return None
    rows = array if axis == 2 else np.swapaxes(array, 1, 2)
    if len(layout.groups) > 1 and 4 in layout.groups[0]:  # boxes have the larger scale, and there are four
        return None
    raw = _Raw(axis == 2, _in_order(rows), _are_logits(rows[..., 4:]))
    return lambda outputs: raw(flatten(outputs)[0][0])


def _in_order(boxes: Array) -> bool:
    return bool((boxes[..., 2] >= boxes[..., 0]).all() and (boxes[..., 3] >= boxes[..., 1]).all())


def _are_logits(scores: Array) -> bool:
    return bool((scores < 0).any() or (scores > 1).any())


def _sigmoid(values: Array) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(values.astype(np.float64), -60, 60))))
