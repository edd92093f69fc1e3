"""Metrics of detectors: COCO's average precision, on labels or on fp32's own detections."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.labels import UnfitLabel, sample_name
from corewise.accuracy.pooled import Pooled, Rows
from corewise.common.detections import Detections, corners, find_head
from corewise.common.errors import MetricError, MissingExtra, SamplesError
from corewise.common.nested import flatten, leaf_names

CONFIDENT = 0.25
"""fp32's detections of at least this score are what a candidate has to find: the threshold of Ultralytics' predict."""
MOST_DETECTIONS = 100
THRESHOLDS = 10
RECALLS = np.linspace(0, 1, 101)

Decode = Callable[[Any], list[Detections]]


def mean_average_precision(outputs: Any, labels: Any) -> Pooled:
    """COCO's AP@[.5:.95] of the detections: all areas, at most 100 detections for each image.

    Args:
        outputs: A detector's, in one of the layouts that docs/guides/photos.md lists.
        labels: A dict for each image: ``boxes`` (k, 4) as x1, y1, x2, y2 in the outputs' coordinates and ``labels``
            (k,), as torchvision has them; or ``boxes`` as relative center and size and ``class_labels`` (k,), as
            transformers has them.
    """
    if labels is None:
        fix = "add boxes and labels, or use the metric detections, which compares with fp32's"
        raise SamplesError("map needs labels and the samples have none", fix)
    truth = [_target(label, row) for row, label in enumerate(labels)]
    return average_precision(decoded(decoder(outputs), outputs, "map"), truth, "map")


def detections(outputs: Any, reference: Any) -> Pooled:
    """COCO's AP@[.5:.95] of the candidate's detections, where fp32's confident ones are the right ones.

    Args:
        outputs: A detector's, in one of the layouts that docs/guides/photos.md lists.
        reference: fp32's outputs. Those with a score of at least 0.25 have to be found, of each class the 100 surest of
            an image; fp32 itself scores 1.
    """
    decode = decoder(reference)
    truth = []
    for detected in decoded(decode, reference, "detections"):
        confident = (detected.scores >= CONFIDENT) & (_ranks(detected) < MOST_DETECTIONS)
        truth.append(Detections(detected.boxes[confident], detected.scores[confident], detected.classes[confident]))
    if not any(len(detected.boxes) for detected in truth):
        what = f"fp32 detects nothing with a score of {CONFIDENT} or more in the holdout"
        raise MetricError(what, "give samples that show what the model detects, or use concordance")
    return average_precision(decoded(decode, outputs, "detections"), truth, "detections")


def decoder(outputs: Any) -> Decode | None:
    """How such outputs are decoded, settled on fp32's; ``None`` where they are no detector's."""
    leaves, structure = flatten(outputs)
    head = find_head(leaf_names(structure), leaves)
    return None if head is None else lambda given: head.detections(flatten(given)[0])


def decoded(decode: Decode | None, outputs: Any, metric: str) -> list[Detections]:
    """The detections of each image. Raises ``MetricError`` where the outputs are no detector's."""
    if decode is None:
        shapes = ", ".join(f"{leaf.dtype} {leaf.shape}" for leaf in flatten(outputs)[0])
        fix = "return boxes, scores and labels as torchvision names them, or give a function as metric"
        raise MetricError(f"{metric} finds no boxes and scores in the outputs ({shapes})", fix)
    return decode(outputs)


def average_precision(answers: Sequence[Detections], truth: Sequence[Detections], metric: str) -> Pooled:
    """COCO's AP@[.5:.95], by pycocotools; its matches are found once, and any selection of images is scored again.

    Raises ``MissingExtra`` where pycocotools is not installed, ``SamplesError`` where there is no box to be found.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MissingExtra("pycocotools", "metrics", f"the metric {metric}") from None
    if not any(len(target.boxes) for target in truth):
        raise SamplesError("no image in the holdout has a box", "give images with labelled boxes")
    classes = sorted({int(name) for target in truth for name in target.classes})
    with redirect_stdout(io.StringIO()):
        expected, detected = COCO(), COCO()
        expected.dataset = _dataset(truth, classes, with_scores=False)
        detected.dataset = _dataset(answers, classes, with_scores=True)
        expected.createIndex()
        detected.createIndex()
        evaluation = COCOeval(expected, detected, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST_DETECTIONS]
        evaluation.evaluate()
    images = len(truth)
    curves = [_Curve.of(evaluation.evalImgs[k * images : (k + 1) * images]) for k in range(len(classes))]

    def of_rows(rows: Rows) -> float:
        times = np.bincount(rows, minlength=images)
        precisions = [curve.average_precision(times) for curve in curves]
        known = [precision for precision in precisions if precision is not None]
        return float(np.mean(known)) if known else float("nan")

    return Pooled(of_rows, images)


@dataclass(frozen=True, eq=False)
class _Curve:
    """The detections of one class in all images, the surest first, and the objects that there are to be found."""

    right: NDArray[np.bool_]
    """Whether a detection finds an object, at each threshold of overlap: (thresholds, detections)."""
    images: NDArray[np.intp]
    """The image of each detection."""
    objects: NDArray[np.intp]
    """The number of objects in each image."""

    @classmethod
    def of(cls, matches: Sequence[dict[str, Any] | None]) -> "_Curve":
        """From what COCOeval found for each image; ``None`` where one has neither objects nor detections."""
        known = [(image, match) for image, match in enumerate(matches) if match is not None]
        scores = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in known)])
        order = np.argsort(-scores, kind="stable")
        right = np.concatenate(
            [np.zeros((THRESHOLDS, 0), bool), *(match["dtMatches"] > 0 for _, match in known)], axis=1
        )
        images = np.repeat([image for image, _ in known], [len(match["dtScores"]) for _, match in known])
        objects = np.zeros(len(matches), np.intp)
        for image, match in known:
            objects[image] = len(match["gtIds"])
        return cls(right[:, order], images[order].astype(np.intp), objects)

    def average_precision(self, times: NDArray[np.intp]) -> float | None:
        """COCO's, at 101 recalls, with each image counted ``times`` times; ``None`` if no object is left."""
        whole = int((self.objects * times).sum())
        if not whole:
            return None
        weights = times[self.images]
        hits = np.cumsum(self.right * weights, axis=1)
        precision = hits / np.maximum(np.cumsum(weights), 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        means = []
        for recalls, heights in zip(hits / whole, best, strict=True):
            places = np.searchsorted(recalls, RECALLS, side="left")
            means.append(np.append(heights, 0.0)[places].mean())
        return float(np.mean(means))


def _ranks(detected: Detections) -> NDArray[np.intp]:
    """How many detections of the same class are surer, for each: (k,)."""
    order = np.lexsort((-detected.scores, detected.classes))
    classes = detected.classes[order]
    ranks = np.empty(len(order), np.intp)
    ranks[order] = np.arange(len(order)) - np.searchsorted(classes, classes)
    return ranks


def _dataset(images: Sequence[Detections], classes: Sequence[int], *, with_scores: bool) -> dict[str, Any]:
    """COCO's annotations of boxes: x, y, width, height."""
    annotations: list[dict[str, Any]] = []
    known = set(classes)
    for image, detected in enumerate(images):
        for box, score, name in zip(detected.boxes, detected.scores, detected.classes, strict=True):
            if int(name) not in known:
                continue
            width, height = max(0.0, float(box[2] - box[0])), max(0.0, float(box[3] - box[1]))
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(name),
                "iscrowd": 0,
            }
            annotation |= {"bbox": [float(box[0]), float(box[1]), width, height], "area": width * height}
            annotations.append(annotation | ({"score": float(score)} if with_scores else {}))
    return {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": name} for name in classes],
        "annotations": annotations,
    }


def _target(label: Any, row: int) -> Detections:
    fix = "give a dict with boxes (k, 4) and labels (k,) for each image"
    if not isinstance(label, Mapping) or "boxes" not in label or not {"labels", "class_labels"} & set(label):
        raise UnfitLabel(row, f"the label of {sample_name(row)} has no boxes and labels", fix)
    relative = "class_labels" in label
    classes = np.ravel(np.asarray(label["class_labels" if relative else "labels"]))
    boxes = np.asarray(label["boxes"], np.float64).reshape(-1, 4)
    if len(boxes) != len(classes):
        what = f"the label of {sample_name(row)} has {len(boxes)} boxes and {len(classes)} classes"
        raise UnfitLabel(row, what, fix)
    return Detections(corners(boxes) if relative else boxes, np.ones(len(boxes)), _integers(classes))


def _integers(classes: NDArray[Any]) -> NDArray[np.int64]:
    return np.asarray(classes, np.int64)
