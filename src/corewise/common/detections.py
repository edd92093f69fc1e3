"""What detectors return, as boxes, scores and classes: the common heads, and non-maximum suppression outside of them.

``find_head`` recognises, by names, shapes, values and the number of classes where that is known,

- ``boxes`` (N, K, 4), ``scores`` (N, K) and ``labels`` (N, K), as torchvision names them, also of varying K;
- ``logits`` (N, K, C) and ``pred_boxes`` (N, K, 4), as transformers names DETR's and RT-DETR's: relative center and
  size; softmax where there is a class more for "no object", else sigmoid;
- one array (N, K, 6) after suppression: x1, y1, x2, y2, score, class;
- one array before suppression: (N, 4 + C, cells), as YOLOv8 and later ones export it; (N, cells, 5 + C) with a score
  that there is any object at all, as YOLOv5, YOLOv7 and YOLOX do; (N, cells, 4 + C) without it;
- boxes (N, K, 4) and class scores (N, K, C) as two arrays, as SSD has them, with or without a class for background.

Boxes are x1, y1, x2, y2 where these are in order in every cell, else center and size. Sources: ultralytics/yolov5
``models/yolo.py`` (Detect), ultralytics ``nn/modules/head.py`` (Detect), transformers
``models/detr/image_processing_detr.py`` and ``models/rt_detr/image_processing_rt_detr.py``
(post_process_object_detection), torchvision ``models/detection``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST_SCORE, MOST_CANDIDATES, MOST_BOXES = 0.001, 3000, 300
OVERLAP = 0.7
"""The intersection over union at which Ultralytics' validation suppresses a box."""
MOST_RELATIVE = 2.0
"""Boxes whose coordinates are all smaller are shares of the input's sides."""
MOST_CELLS = 0.999
"""What is true of this share of cells counts as true of all: int8 may turn a size of 0 into -0.1."""
COCO_CLASSES = 80
IDLE = 0.05
"""Half of a detector's cells score less than this for every class, unless a score for any object is multiplied in."""


class Detections(NamedTuple):
    """One image's: boxes (k, 4) as x1, y1, x2, y2, scores (k,) and classes (k,)."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Head:
    """How a detector's flat outputs are read; ``boxes``, ``scores`` and ``labels`` number them."""

    boxes: int
    scores: int | None = None
    """``None`` where the array of the boxes holds the scores too."""
    labels: int | None = None
    final: bool = False
    """Whether there is one score and one class for each box, and overlapping boxes are gone."""
    channels_last: bool = True
    corners: bool = True
    """Whether boxes are x1, y1, x2, y2 rather than center and size."""
    relative: bool = False
    """Whether coordinates are shares of the input's sides rather than its pixels."""
    objectness: bool = False
    """Whether the first score says that there is any object, and those of classes which one it then is."""
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    background: int | None = None
    """The class that means that there is no object."""
    first_class: int = 0
    """The column of class 0."""
    overlapping: bool = False
    """Whether several boxes show one object, so that they have to be suppressed."""

    def detections(
        self, outputs: Sequence[Array], *, least_score: float | None = None, overlap: float = OVERLAP
    ) -> list[Detections]:
        """The detections of each image, boxes as x1, y1, x2, y2 in the units of the outputs.

        Args:
            outputs: The flat outputs, with N rows each.
            least_score: Leave out those of lower scores. Default: 0.001 where boxes have to be suppressed, else none.
            overlap: Suppress a box that has at least this intersection over union with a better one of its class.
        """
        boxes = outputs[self.boxes]
        if self.final:
            return [_kept(self._final(outputs, row), least_score or 0.0) for row in range(len(boxes))]
        if self.scores is None:
            rows = boxes if self.channels_last else np.swapaxes(boxes, 1, 2)
            boxes, scores = rows[..., :4], rows[..., 4:]
        else:
            scores = outputs[self.scores]
        least = (LEAST_SCORE if self.overlapping else 0.0) if least_score is None else least_score
        return [self._image(*row, least, overlap) for row in zip(boxes, scores, strict=True)]

    def places(self, outputs: Sequence[Array]) -> list[Detections]:
        """What each place of a list shows, in order: of outputs that are ``final``, or need no suppression."""
        if self.final:
            return [self._final(outputs, row) for row in range(len(outputs[self.boxes]))]
        assert self.scores is not None
        return [self._image(*row, 0.0, 1.0) for row in zip(outputs[self.boxes], outputs[self.scores], strict=True)]

    def _final(self, outputs: Sequence[Array], row: int) -> Detections:
        boxes = np.asarray(outputs[self.boxes][row], np.float64)
        if self.scores is None or self.labels is None:
            return Detections(boxes[:, :4], boxes[:, 4], boxes[:, 5].astype(np.int64))
        scores, labels = (np.asarray(outputs[k][row]).reshape(-1) for k in (self.scores, self.labels))
        return Detections(boxes.reshape(-1, 4), scores.astype(np.float64), labels.astype(np.int64))

    def _image(self, boxes: Array, scores: Array, least_score: float, overlap: float) -> Detections:
        best, classes = self._best(scores)
        chosen = np.flatnonzero(best >= least_score) if least_score > 0 else np.arange(len(best))
        boxes = boxes[chosen].astype(np.float64)
        found = Detections(boxes if self.corners else corners(boxes), best[chosen], classes[chosen])
        return suppressed(found, overlap, least_score) if self.overlapping else found

    def _best(self, scores: Array) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The score and the class of each box (k,), of its scores (k, C)."""
        every = np.arange(len(scores))
        objects, of_classes = (scores[:, 0], scores[:, 1:]) if self.objectness else (None, scores)
        if self.activation == "softmax":
            wide = of_classes.astype(np.float64)
            powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
            of_classes = powers / powers.sum(axis=-1, keepdims=True)
        if self.background is not None:
            of_classes = of_classes.copy()
            of_classes[:, self.background] = -np.inf
        classes = of_classes.argmax(axis=1)
        best = of_classes[every, classes].astype(np.float64)
        if self.activation == "sigmoid":  # it keeps the order, so only the best is computed
            best = _sigmoid(best)
            objects = None if objects is None else _sigmoid(objects)
        if objects is not None:
            best = best * objects
        return best, (classes - self.first_class).astype(np.int64)


def find_head(names: Sequence[str], outputs: Sequence[Array], classes: int | None = None) -> Head | None:
    """How such outputs of a detector are read; ``None`` where they are no detector's.

    Args:
        names: Of the flat outputs, as ``nested.leaf_names`` gives them.
        outputs: Their values for some rows, of fp32 where there is a choice.
        classes: How many classes the detector knows, if that is known.
    """
    places = {name: number for number, name in enumerate(names)}
    if {"boxes", "scores", "labels"} <= places.keys():
        return _final(outputs, places["boxes"], places["scores"], places["labels"])
    if {"logits", "pred_boxes"} <= places.keys():
        return _queries(outputs, places["logits"], places["pred_boxes"], classes)
    usable = [number for number, one in enumerate(outputs) if one.dtype != object and one.size]
    fours = [k for k in usable if outputs[k].ndim == 3 and outputs[k].shape[2] == 4]
    if fours and len(usable) > 1:  # scores of four classes look like boxes, but are not in order
        boxes = max(fours, key=lambda k: ("box" in names[k].lower(), _are_ordered(outputs[k])))
        return _separate(outputs, usable, boxes, classes)
    first = outputs[0]
    return _together(first, classes) if 0 in usable and first.ndim == 3 and first.dtype.kind == "f" else None


def corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (k, 4) of center and size as x1, y1, x2, y2."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], axis=1)


def suppressed(detections: Detections, overlap: float = OVERLAP, least_score: float = LEAST_SCORE) -> Detections:
    """The best of each group of boxes of one class that overlap: greedy non-maximum suppression.

    As Girshick et al., Rich feature hierarchies for accurate object detection, 2014, and torchvision's ``batched_nms``
    for classes; the 3,000 surest boxes compete, and 300 are left at most.
    """
    order = np.argsort(-detections.scores, kind="stable")[:MOST_CANDIDATES]
    order = order[detections.scores[order] >= least_score]
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
        shared = both / np.maximum(areas[best] + areas[rest] - both, 1e-12)
        left = rest[(shared <= overlap) | (classes[rest] != classes[best])]
    return Detections(detections.boxes[kept], detections.scores[kept], detections.classes[kept])


def _final(outputs: Sequence[Array], boxes: int, scores: int, labels: int) -> Head:
    rows = [np.asarray(row).reshape(-1, 4) for row in outputs[boxes]]
    return Head(
        boxes=boxes, scores=scores, labels=labels, final=True, relative=_is_relative(np.concatenate(rows or [_NONE]))
    )


_NONE = np.zeros((0, 4))


def _queries(outputs: Sequence[Array], logits: int, boxes: int, classes: int | None) -> Head:
    """DETR's last class means that there is no object, and is the answer of most queries; RT-DETR has none such."""
    scores = outputs[logits]
    last = scores.shape[-1] - 1
    softmax = classes == last or bool((scores.argmax(axis=-1) == last).mean() > 0.5)
    return Head(
        boxes=boxes,
        scores=logits,
        corners=False,
        relative=True,
        activation="softmax" if softmax else "sigmoid",
        background=last if softmax else None,
    )


def _separate(outputs: Sequence[Array], usable: Sequence[int], boxes: int, classes: int | None) -> Head | None:
    """Boxes (N, K, 4) and class scores (N, K, C) or (N, K), in any order."""
    shape = outputs[boxes].shape[:2]
    others = [k for k in usable if k != boxes and outputs[k].shape[:2] == shape]
    scores = next((k for k in others if outputs[k].ndim == 3), None)
    if scores is None:
        flat = [k for k in others if outputs[k].ndim == 2]
        labels = next((k for k in flat if _are_numbers(outputs[k])), None)
        sure = next((k for k in flat if k != labels and not _are_logits(outputs[k])), None)
        return None if labels is None or sure is None else _final(outputs, boxes, sure, labels)
    ordered = _are_ordered(outputs[boxes])
    if not (ordered or _have_sizes(outputs[boxes])):
        return None
    background = _background(outputs[scores], classes)
    logits = _are_logits(outputs[scores])
    columns = outputs[scores].shape[2]
    return Head(
        boxes=boxes,
        scores=scores,
        corners=ordered,
        relative=_is_relative(outputs[boxes]),
        activation="none" if not logits else "sigmoid" if background is None else "softmax",
        background=background,
        first_class=1 if background == 0 and classes == columns - 1 else 0,
        overlapping=True,
    )


def _background(scores: Array, classes: int | None) -> int | None:
    """The class that most boxes have, if scores are shares of one whole, or logits of such: the first or the last."""
    columns = scores.shape[2]
    if columns < 2:
        return None
    answers = scores.argmax(axis=2)
    place = next((k for k in (0, columns - 1) if (answers == k).mean() > 0.5), None)
    if place is None:
        return None
    if _are_logits(scores):
        return place if classes == columns - 1 or np.median(scores.max(axis=2)) > 0 else None
    return place if np.abs(scores.sum(axis=2) - 1).max() < 0.02 else None


def _together(array: Array, classes: int | None) -> Head | None:
    if array.shape[2] == 6 and _are_numbers(array[..., 5]) and _are_ordered(array) and not _are_logits(array[..., 4]):
        return Head(boxes=0, final=True, relative=_is_relative(array[..., :4]))
    last = _channels_last(array, classes)
    if last is None:
        return None
    rows = array if last else np.swapaxes(array, 1, 2)
    if classes is not None and rows.shape[2] - classes not in (4, 5) and _is_relative(rows[..., :4]):
        return None  # a map of probabilities, as far as anyone can tell
    logits = _are_logits(rows[..., 4:])
    return Head(
        boxes=0,
        channels_last=last,
        corners=_are_ordered(rows),
        relative=_is_relative(rows[..., :4]),
        objectness=_has_objectness(_sigmoid(rows[..., 4:]) if logits else rows[..., 4:], last, classes),
        activation="sigmoid" if logits else "none",
        overlapping=True,
    )


def _channels_last(array: Array, classes: int | None) -> bool | None:
    """Whether the last axis, or the one before, has the channels of boxes and scores; ``None`` where neither has."""
    plausible = [last for last in (True, False) if _has_boxes(array if last else np.swapaxes(array, 1, 2))]
    widths = {True: array.shape[2], False: array.shape[1]}
    if classes is not None:
        known = [last for last in plausible if widths[last] - classes in (4, 5)]
        plausible = known or plausible
    return min(plausible, key=widths.__getitem__, default=None)


def _has_boxes(rows: Array) -> bool:
    """Whether the first four channels (N, cells, channels) can be boxes, and the others scores."""
    if rows.shape[2] < 5 or not (_have_sizes(rows) or _are_ordered(rows)):
        return False
    scores = rows[..., 4:]
    if not _are_logits(scores):
        return True
    return bool(not _is_relative(rows[..., :4]) and np.median(scores.max(axis=2)) < 0)


def _has_objectness(scores: Array, last: bool, classes: int | None) -> bool:
    """Whether the first score is one for any object.

    Class scores that it is multiplied with are high where there is nothing, because they were not trained there.
    """
    columns = scores.shape[2]
    if classes is not None and columns - classes in (0, 1):
        return bool(columns == classes + 1)
    if not last or columns < 2:
        return False
    if columns in (COCO_CLASSES, COCO_CLASSES + 1):
        return bool(columns == COCO_CLASSES + 1)
    return bool(np.median(scores[..., 1:].max(axis=2)) > IDLE > np.median(scores[..., 0]))


def _have_sizes(boxes: Array) -> bool:
    return bool((boxes[..., 2:4] >= 0).mean() >= MOST_CELLS)


def _are_ordered(boxes: Array) -> bool:
    return bool((boxes[..., 2] >= boxes[..., 0]).all() and (boxes[..., 3] >= boxes[..., 1]).all())


def _is_relative(boxes: Array) -> bool:
    return bool(boxes.size and 0 < np.abs(boxes).max() <= MOST_RELATIVE)


def _are_logits(scores: Array) -> bool:
    return bool((scores < 0).any() or (scores > 1 + 1e-3).any())


def _are_numbers(labels: Array) -> bool:
    return labels.dtype.kind in "iu" or bool(np.array_equal(labels, np.round(labels)))


def _kept(detections: Detections, least_score: float) -> Detections:
    chosen = detections.scores >= least_score
    return Detections(detections.boxes[chosen], detections.scores[chosen], detections.classes[chosen])


def _sigmoid(values: Array) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(values.astype(np.float64), -60, 60))))
