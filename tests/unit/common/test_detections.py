"""common.detections: the layouts of detectors' outputs, and non-maximum suppression."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from corewise.common.detections import Detections, Head, find_head, suppressed

CLASSES = 3


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(seed: int = 0, images: int = 4) -> tuple[NDArray[Any], NDArray[Any]]:
    """Corners (N, 64, 4) in pixels and probabilities (N, 64, 3): two objects in each image, far from each other."""
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(64, 2) * 80.0 + 10
    boxes = np.concatenate([grid, grid + 50], axis=1)[None].repeat(images, axis=0)
    scores = rng(seed).uniform(1e-4, 0.01, (images, 64, CLASSES))
    for image in range(images):
        for cell in rng(image).choice(64, 2, replace=False):
            scores[image, cell, cell % CLASSES] = 0.5 + cell / 200
    return boxes.astype(np.float32), scores.astype(np.float32)


BOXES, SCORES = scene()
CENTRES = np.concatenate([(BOXES[..., :2] + BOXES[..., 2:]) / 2, BOXES[..., 2:] - BOXES[..., :2]], axis=2)
LOGITS = np.log(SCORES / (1 - SCORES))


def with_objectness() -> NDArray[Any]:
    """(N, 64, 5 + 3) as YOLOv5: where there is nothing, class scores are anything."""
    best, names = SCORES.max(2, keepdims=True), SCORES.argmax(2)
    classes = rng(5).uniform(0.1, 0.6, SCORES.shape).astype(np.float32)
    found = np.nonzero(best[..., 0] > 0.1)
    classes[found] = 0.01
    classes[(*found, names[found])] = 1.0
    return np.concatenate([CENTRES, best, classes], axis=2)


def with_background(first: bool) -> NDArray[Any]:
    """Softmax over the classes and one for nothing, before the others or behind them."""
    parts = [1 - SCORES.sum(2, keepdims=True).clip(0, 1), SCORES]
    return np.concatenate(parts if first else parts[::-1], axis=2)


FORMS: dict[str, tuple[tuple[str, ...], tuple[NDArray[Any], ...], int | None, dict[str, Any]]] = {
    "YOLOv8": (("output_0",), (np.concatenate([CENTRES, SCORES], 2).swapaxes(1, 2),), None, {"channels_last": False}),
    "YOLOv8 with its features": (
        ("0", "1_0"),
        (np.concatenate([CENTRES, SCORES], 2).swapaxes(1, 2), np.zeros((4, 144, 8, 8), np.float32)),
        CLASSES,
        {"objectness": False},
    ),
    "YOLOv5": (("output_0",), (with_objectness(),), None, {"objectness": True}),
    "YOLOv5 of known classes": (("output_0",), (with_objectness(),), CLASSES, {"objectness": True}),
    "YOLO in shares": (
        ("output_0",),
        (np.concatenate([CENTRES / 640, SCORES], 2),),
        CLASSES,
        {"relative": True, "objectness": False},
    ),
    "RT-DETR": (
        ("logits", "pred_boxes"),
        (LOGITS, CENTRES / 640),
        CLASSES,
        {"activation": "sigmoid", "relative": True, "overlapping": False},
    ),
    "DETR": (
        ("logits", "pred_boxes"),
        (np.log(with_background(first=False).clip(1e-6)), CENTRES / 640),
        None,
        {"activation": "softmax", "background": CLASSES},
    ),
    "SSD": (
        ("scores", "boxes"),
        (with_background(first=True), BOXES / 640),
        CLASSES,
        {"background": 0, "first_class": 1, "activation": "none", "overlapping": True},
    ),
    "SSD's logits": (
        ("output_0", "output_1"),
        (BOXES, np.log(with_background(first=True).clip(1e-6)) + 9),
        CLASSES,
        {"background": 0, "activation": "softmax"},
    ),
    "torchvision": (
        ("boxes", "scores", "labels"),
        (BOXES, SCORES.max(2), SCORES.argmax(2)),
        None,
        {"final": True, "relative": False},
    ),
    "without names": (
        ("output_0", "output_1", "output_2"),
        (BOXES, SCORES.argmax(2), SCORES.max(2)),
        None,
        {"final": True, "labels": 1, "scores": 2},
    ),
    "after suppression": (
        ("output_0",),
        (np.concatenate([BOXES, SCORES.max(2)[..., None], SCORES.argmax(2)[..., None]], 2),),
        None,
        {"final": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_objects(form: str) -> None:
    names, outputs, classes, facts = FORMS[form]
    head = find_head(names, outputs, classes)
    assert head is not None
    assert {name: getattr(head, name) for name in facts} == facts
    scale = 640 if head.relative else 1
    for image, found in enumerate(head.detections(outputs, least_score=0.25, overlap=0.45)):
        cells, labels = np.nonzero(SCORES[image] > 0.25)
        order, expected = by_place(found.boxes), by_place(BOXES[image, cells])
        np.testing.assert_allclose(found.boxes[order] * scale, BOXES[image, cells[expected]], atol=0.01)
        np.testing.assert_array_equal(found.classes[order], labels[expected])
        np.testing.assert_allclose(found.scores[order], SCORES[image, cells, labels][expected], atol=0.02)


def by_place(boxes: NDArray[Any]) -> NDArray[Any]:
    """The order of boxes, whose places differ, from top to bottom and left to right."""
    return np.argsort(boxes[:, 0] + 100 * boxes[:, 1])


@pytest.mark.parametrize(
    "output",
    [rng(1).normal(size=(8, 197, 192)), rng(2).normal(size=(8, 10)), rng(3).normal(size=(8, 21, 32, 32))],
    ids=["hidden states", "class scores", "maps"],
)
def test_other_outputs_are_no_detectors(output: NDArray[Any]) -> None:
    assert find_head(("output_0",), (output.astype(np.float32),)) is None


def test_suppression_leaves_what_pairwise_comparison_leaves() -> None:
    corners = rng(1).uniform(0, 80, (200, 2))
    boxes = np.concatenate([corners, corners + rng(2).uniform(5, 40, (200, 2))], axis=1)
    scores, classes = rng(3).uniform(0.1, 1, 200), rng(4).integers(0, 3, 200)
    found = suppressed(Detections(boxes, scores, classes), overlap=0.4)
    kept: list[int] = []
    for row in np.argsort(-scores):
        if all(classes[row] != classes[other] or iou(boxes[row], boxes[other]) <= 0.4 for other in kept):
            kept.append(int(row))
    np.testing.assert_array_equal(found.scores, scores[kept])
    np.testing.assert_array_equal(found.classes, classes[kept])


def iou(one: NDArray[Any], other: NDArray[Any]) -> float:
    sides = np.maximum(0, np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]))
    both = float(sides.prod())
    return both / (float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - both)


def test_an_image_without_objects_has_none() -> None:
    head = Head(boxes=0, corners=False, overlapping=True)
    outputs = [np.zeros((2, 5, 7), np.float32)]
    for found in head.detections(outputs, least_score=0.25):
        assert found.boxes.shape == (0, 4)
        assert len(found.scores) == len(found.classes) == 0
