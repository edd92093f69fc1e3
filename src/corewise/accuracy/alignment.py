"""Lists of detections in fp32's order: a candidate that finds the same objects may list them in another one.

Detectors that choose their best boxes inside the model return them by score (YOLOv10, YOLO26), or choose queries by
score (RT-DETR). Rounding then exchanges places whose scores are nearly equal, and most places show nothing at all. What
is compared is therefore each object that fp32 is sure of with the candidate's for it, whatever their places.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.detection import CONFIDENT
from corewise.accuracy.outputs import Array, Outputs
from corewise.common.detections import Detections, Head, find_head

NEARLY = 0.5 * CONFIDENT
"""A candidate's detection that fp32 scores no less than this is no false one."""
OVERLAP = 0.5
"""Least intersection over union of two boxes that show the same object."""


def listing_head(names: Sequence[str], outputs: Outputs) -> Head | None:
    """How the outputs list detections; ``None`` where they do not, or where fp32 is sure of none."""
    if any(leaf.dtype == object for leaf in outputs.leaves):
        return None
    head = find_head(names, outputs.leaves)
    if head is None or not (head.final or (head.scores is not None and not head.overlapping)):
        return None
    return head if any((each.scores >= CONFIDENT).any() for each in head.places(outputs.leaves)) else None


def aligned(head: Head, reference: Outputs, candidate: Outputs) -> tuple[Outputs, Outputs]:
    """Both with the objects of each sample in the same places, and zeros where neither is sure of one."""
    pairs = [_pairs(*both) for both in zip(head.places(reference.leaves), head.places(candidate.leaves), strict=True)]
    listed = reference.leaves[head.boxes].shape[:2]
    leaves = [
        _placed(ours, theirs, pairs) if ours.shape[:2] == listed == theirs.shape[:2] else (ours, theirs)
        for ours, theirs in zip(reference.leaves, candidate.leaves, strict=True)
    ]
    return Outputs(tuple(ours for ours, _ in leaves)), Outputs(tuple(theirs for _, theirs in leaves))


def _placed(ours: Array, theirs: Array, pairs: Sequence[NDArray[np.intp]]) -> tuple[Array, Array]:
    """Both arrays with only the objects of ``pairs``, the two of a pair in one place."""
    ours_placed, theirs_placed = np.zeros_like(ours), np.zeros_like(theirs)
    for row, both in enumerate(pairs):
        has, found = both[:, 0] >= 0, both[:, 1] >= 0
        places = both[:, 0].copy()
        empty = np.setdiff1d(np.arange(ours.shape[1]), places)
        places[~has] = empty[: (~has).sum()]
        ours_placed[row, places[has]] = ours[row, both[has, 0]]
        theirs_placed[row, places[found]] = theirs[row, both[found, 1]]
    return ours_placed, theirs_placed


def _pairs(ours: Detections, theirs: Detections) -> NDArray[np.intp]:
    """The places of each object in both lists, (objects, 2); -1 where one of them has lost it."""
    left = set(np.flatnonzero(theirs.scores >= NEARLY / 2).tolist())
    pairs = []
    for place in np.argsort(-ours.scores, kind="stable"):
        if ours.scores[place] < NEARLY:
            break
        rivals = [other for other in left if theirs.classes[other] == ours.classes[place]]
        overlaps = _overlaps(ours.boxes[place], theirs.boxes[rivals])
        if rivals and overlaps.max() >= OVERLAP:
            found = rivals[int(overlaps.argmax())]
            left.remove(found)
            pairs.append((int(place), found))
        elif ours.scores[place] >= CONFIDENT:
            pairs.append((int(place), -1))
    room = len(ours.scores) - len(pairs)
    false = sorted((other for other in left if theirs.scores[other] >= CONFIDENT), key=lambda k: -theirs.scores[k])
    pairs += [(-1, other) for other in false[:room]]
    return np.asarray(pairs, np.intp).reshape(-1, 2)


def _overlaps(box: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The intersection over union of one box (4,) with others (k, 4)."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=1)
    areas = [np.prod(np.maximum(part[..., 2:] - part[..., :2], 0), axis=-1) for part in (box, others)]
    return np.asarray(both / np.maximum(areas[0] + areas[1] - both, 1e-12))
