"""Detectors that list what they find: another order of the list is no loss, a lost object is one."""

import numpy as np
import pytest

from corewise.accuracy.alignment import listing_head
from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Outputs
from corewise.common.nested import flatten, leaf_names
from corewise.records.goal import Requirements
from corewise.samples import from_python

pytestmark = pytest.mark.usefixtures("few_resamples")

IMAGES, PLACES, CLASSES = 40, 60, 20


def listed():
    """(40, 60, 6) after the choice of the best boxes: corners in pixels, falling scores, classes; most show nothing."""
    rows = []
    for image in range(IMAGES):
        rng = np.random.default_rng(image)
        objects = rng.integers(1, 10)
        scores = np.r_[rng.uniform(0.3, 0.95, objects), rng.uniform(0.001, 0.05, PLACES - objects)]
        corners, sizes = rng.uniform(0, 500, (PLACES, 2)), rng.uniform(20, 140, (PLACES, 2))
        row = np.c_[corners, corners + sizes, scores, rng.integers(CLASSES, size=PLACES)]
        rows.append(row[np.argsort(-scores)])
    return np.stack(rows).astype(np.float32)


def rounded(lists):
    """Every object a little off, what shows nothing somewhere else, and both in the order of their new scores."""
    rows = []
    for image, row in enumerate(lists):
        rng, row = np.random.default_rng(100 + image), row.copy()
        row[:, 4] += 0.02 * np.minimum(1, 4 * row[:, 4]) * rng.normal(size=PLACES)
        row[:, :4] += rng.normal(size=(PLACES, 4))
        idle = row[:, 4] < 0.1
        row[idle, :2] = rng.uniform(0, 500, (idle.sum(), 2))
        row[idle, 2:4] = row[idle, :2] + 30
        row[idle, 5] = rng.integers(CLASSES, size=idle.sum())
        rows.append(row[np.argsort(-row[:, 4])])
    return np.stack(rows)


def queries():
    """The same as DETR and its kin return it."""
    lists = listed()
    logits = np.full((IMAGES, PLACES, CLASSES), -6, np.float32)
    image, place = np.ogrid[:IMAGES, :PLACES]
    logits[image, place, lists[..., 5].astype(int)] = np.log(lists[..., 4] / (1 - lists[..., 4]))
    center, size = (lists[..., :2] + lists[..., 2:4]) / 2, lists[..., 2:4] - lists[..., :2]
    return {"logits": logits, "pred_boxes": np.concatenate([center, size], axis=-1) / 640}


def judged(reference, candidate, **limits):
    leaves, structure = flatten(reference)
    gate = AccuracyGate(None, from_python([np.zeros(1, np.float32)] * IMAGES), structure, Requirements(**limits), 0)
    gate(Outputs(tuple(leaves)))
    return gate(Outputs(tuple(flatten(candidate)[0])))


def test_another_order_of_the_list_is_no_loss():
    reference = listed()
    candidate = rounded(reference)
    assert (np.abs(candidate - reference)[..., 5] > 0.5).mean() > 0.5
    fidelity, verdict = judged(reference, candidate)
    assert verdict.passed, verdict.reason
    assert fidelity.value < 1


def test_another_order_of_queries_is_no_loss():
    reference = queries()
    order = np.stack([np.random.default_rng(image).permutation(PLACES) for image in range(IMAGES)])
    moved = {name: np.take_along_axis(leaf, order[..., None], axis=1) for name, leaf in reference.items()}
    fidelity, verdict = judged(reference, moved)
    assert verdict.passed
    assert fidelity.value == pytest.approx(1)
    _, verdict = judged(reference, {**moved, "pred_boxes": reference["pred_boxes"]}, max_drop=2.0)
    assert verdict.rule == "floor"


FAULTS = {
    "no object is found": np.s_[..., 4],
    "a fifth of the images are empty": np.s_[:8, :, 4],
    "the best of each image is lost": np.s_[:, 0, 4],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_object_is_a_loss(fault):
    candidate = rounded(listed())
    candidate[FAULTS[fault]] = 0.001
    assert judged(listed(), candidate)[1].rule == "drop"
    assert judged(listed(), candidate, max_drop=2.0)[1].rule == "floor"


def test_other_classes_boxes_and_false_objects_are_losses():
    for columns, change in (
        (np.s_[..., 5], lambda v: (v + 1) % CLASSES),
        (np.s_[..., :4], lambda v: v + 64),
        (np.s_[..., 4], lambda v: np.where(v < 0.1, 0.5, v)),
        (np.s_[..., 4], lambda v: 0.6 * v),
    ):
        candidate = rounded(listed())
        candidate[columns] = change(candidate[columns])
        assert judged(listed(), candidate, max_drop=2.0)[1].rule == "floor"


def test_cells_that_stay_in_their_places_and_lists_without_an_object_are_compared_as_they_are():
    for outputs in (listed() * [1, 1, 1, 1, 0.1, 1], np.random.default_rng(0).normal(size=(8, 12, 100))):
        leaves, structure = flatten(outputs.astype(np.float32))
        assert listing_head(leaf_names(structure), Outputs(tuple(leaves))) is None
