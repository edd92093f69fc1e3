"""A detector's outputs as answers: objects with names, scores and boxes in the pixels of the photo."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.detections import Head
from corewise.common.errors import InputError
from corewise.records.pipeline import ImagePipeline
from corewise.samples.image_geometry import input_sides, placement

RAW_SCORE, RAW_OVERLAP = 0.25, 0.45
"""Where overlapping boxes are suppressed: what YOLOv5's ``detect.py`` and OpenCV's examples use."""
FINAL_SCORE = 0.5
"""Where there is one box for each object: what transformers' ``post_process_object_detection`` uses."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object in a photo. ``box`` is x1, y1, x2, y2 in pixels of the upright photo, from its upper left corner."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    number: int
    """The number of its class, from 0."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Which detections count: at least ``score``, and no better one of the class with more overlap than ``iou``."""

    score: float
    iou: float

    @classmethod
    def of(cls, head: Head, score: float | None = None, iou: float | None = None) -> "Thresholds":
        """Those given, else what is usual for such a head. Raises ``InputError`` for one that is not in 0..1."""
        for name, given in (("score", score), ("IoU", iou)):
            if given is not None and not 0 <= given <= 1:
                raise InputError(f"the {name} threshold is {given}", "give a number from 0 to 1")
        usual = RAW_SCORE if head.overlapping else FINAL_SCORE
        return cls(score=usual if score is None else score, iou=RAW_OVERLAP if iou is None else iou)


def detected(
    pipeline: ImagePipeline,
    outputs: Sequence[NDArray[Any]],
    sizes: Sequence[tuple[int, int]],
    thresholds: Thresholds,
) -> list[list[Detection]]:
    """The objects in each photo, the surest first.

    Args:
        pipeline: One of the task ``boxes``.
        outputs: The model's flat outputs, with a row for each photo.
        sizes: Width and height of each photo, upright.
        thresholds: Which detections count.
    """
    if pipeline.head is None:
        raise InputError("the model gives no boxes", "ask for classes")
    found = pipeline.head.detections(outputs, least_score=thresholds.score, overlap=thresholds.iou)
    answers = []
    for one, (width, height) in zip(found, sizes, strict=True):
        place = placement((width, height), pipeline.preprocess)
        sides = input_sides((width, height), pipeline.preprocess) if pipeline.head.relative else (1.0, 1.0)
        boxes = one.boxes * (sides * 2)
        boxes = (boxes - [place.left, place.top] * 2) / ([place.across, place.down] * 2)
        boxes = np.clip(np.nan_to_num(boxes), 0, [width, height] * 2)
        order = np.argsort(-one.scores, kind="stable")
        answers.append(
            [
                Detection(
                    label=pipeline.label(int(one.classes[k])),
                    score=float(one.scores[k]),
                    box=tuple(map(float, boxes[k])),  # type: ignore[arg-type]
                    number=int(one.classes[k]),
                )
                for k in order
                if boxes[k, 2] > boxes[k, 0] and boxes[k, 3] > boxes[k, 1] and np.isfinite(one.scores[k])
            ]
        )
    return answers
