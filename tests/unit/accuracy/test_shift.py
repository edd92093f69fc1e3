"""The samples that are left out because they are unlike the rest, and what the gate makes of a drop on them."""

from dataclasses import replace

import numpy as np
import pytest

from corewise.accuracy.gate import UNDER_SHIFT, AccuracyGate, judge
from corewise.accuracy.metrics import resolve
from corewise.accuracy.outputs import Outputs, ragged
from corewise.accuracy.shift import FEWEST_JUDGED, k_means, robust_by_default, shift_split
from corewise.common.nested import flatten
from corewise.records.fidelity import Fidelity
from corewise.records.goal import Requirements
from corewise.records.jsonable import from_json, to_json
from corewise.report.reasons import sentence
from corewise.samples import from_python


def rng(seed=0):
    return np.random.default_rng(seed)


def topics(count, seed=0):
    """Embeddings of texts on five topics; the last is far from the others. Also the topic of each."""
    centers = np.concatenate([rng(100).normal(size=(4, 16)), np.full((1, 16), 3.0)])
    members = rng(seed).integers(5, size=count)
    return Outputs((centers[members] + 0.3 * rng(seed + 1).normal(size=(count, 16)),)), members


def test_k_means_finds_clusters_that_are_there():
    outputs, members = topics(200)
    found = k_means(outputs.leaves[0], 5, seed=0)
    assert all(len(np.unique(members[found == cluster])) == 1 for cluster in range(5))
    assert np.array_equal(found, k_means(outputs.leaves[0], 5, seed=0))
    assert (k_means(np.zeros((10, 3)), 4, seed=0) == 0).all()


def test_the_cluster_most_unlike_the_rest_is_left_out():
    (calibration, ours), (holdout, theirs) = topics(100), topics(100, seed=7)
    split = shift_split(calibration, holdout, seed=0)
    assert set(theirs[split.judged]) == {4}
    assert 4 not in ours[split.calibrating]
    assert len(split.calibrating) == (ours != 4).sum()


def test_boxes_do_not_outweigh_scores():
    """Scores that part the samples decide beside boxes of another scale that do not."""
    (calibration, ours), (holdout, theirs) = topics(100), topics(100, seed=7)

    def detector(outputs, seed):
        boxes = 300 + 50 * rng(seed).normal(size=(100, 4, 16))
        return Outputs((np.concatenate([boxes, 0.01 * outputs.leaves[0][:, None]], axis=1),))

    split = shift_split(detector(calibration, 3), detector(holdout, 4), seed=0)
    assert split is None or set(theirs[split.judged]) != set(range(5))
    assert ours is not None


def test_outputs_of_varying_length_are_compared_by_their_channels():
    (calibration, _), (holdout, theirs) = topics(100), topics(100, seed=7)

    def varying(outputs):
        return Outputs((ragged([row[None].repeat(3 + k % 4, axis=0) for k, row in enumerate(outputs.leaves[0])]),))

    assert set(theirs[shift_split(varying(calibration), varying(holdout), seed=0).judged]) == {4}


def test_infinity_that_masks_a_channel_changes_no_cluster():
    (calibration, _), (holdout, theirs) = topics(100), topics(100, seed=7)

    def masked(outputs):
        return Outputs((np.insert(outputs.leaves[0], 3, -np.inf, axis=1),))

    assert set(theirs[shift_split(masked(calibration), masked(holdout), seed=0).judged]) == {4}


@pytest.mark.parametrize(("calibrating", "held_out"), [(3, 100), (100, FEWEST_JUDGED - 1)])
def test_too_few_samples_are_not_split(calibrating, held_out):
    assert shift_split(topics(calibrating)[0], topics(held_out)[0], seed=0) is None


def test_integers_alone_cannot_be_clustered():
    ids = Outputs((rng().integers(9, size=(50, 4)),))
    assert shift_split(ids, ids, seed=0) is None


def gate_of(outputs, **options):
    leaves, structure = flatten(outputs.leaves[0])
    gate = AccuracyGate(
        None, from_python([np.zeros(1, np.float32)] * len(leaves[0])), structure, Requirements(), 0, **options
    )
    gate(outputs)
    return gate


@pytest.mark.parametrize("robust", [False, True])
def test_a_drop_under_shift_decides_only_where_it_is_asked_for(robust):
    holdout, members = topics(200, seed=7)
    gate = gate_of(holdout, robust=robust)
    good = Outputs((holdout.leaves[0] * 1.001,))
    fidelity, verdict = gate(good)
    assert verdict.passed
    twin = Outputs((np.where((members == 4)[:, None], rng(5).normal(size=(200, 16)), good.leaves[0]),))
    rows = np.flatnonzero(members == 4)
    fidelity, verdict = gate.under_shift(fidelity, twin, rows, calibrated=True)
    assert fidelity.drop < 0.01 < fidelity.shift_drop
    assert fidelity.shift.samples == len(rows)
    assert verdict.passed == (not robust)
    assert verdict.rule == ("shift_drop" if robust else "passed")
    assert from_json(Fidelity, to_json(fidelity)) == fidelity


def test_a_floor_under_shift_decides_too():
    holdout, members = topics(200, seed=7)
    gate = gate_of(holdout, robust=True)
    fidelity, _ = gate(holdout)
    twin = Outputs((holdout.leaves[0] * np.where(np.arange(16) == 3, 0, 1),))
    fidelity, _ = gate.under_shift(fidelity, twin, np.flatnonzero(members == 4), calibrated=True)
    lenient = judge(fidelity, Requirements(max_drop=2.0), robust=True)
    assert (lenient.passed, lenient.rule) == (False, "shift_floor")


def test_what_needs_no_calibration_may_lose_as_much_under_shift_as_elsewhere():
    holdout, members = topics(200, seed=7)
    gate = gate_of(holdout, robust=True)
    rows = np.flatnonzero(members == 4)
    off = holdout.leaves[0] * (1 + 0.03 * rng(5).normal(size=(200, 16)))
    outputs = Outputs((off,))
    fidelity, _ = gate(outputs)
    judged = gate.under_shift(fidelity, outputs, rows, calibrated=False)[0]
    between = Requirements(max_drop=1.5 * max(judged.drop, judged.shift_drop))
    assert judged.shift_drop > UNDER_SHIFT * between.max_drop
    rules = [judge(judged, between, robust=True, calibrated=calibrated).rule for calibrated in (True, False)]
    assert rules == ["shift_drop", "passed"]


def test_texts_and_embeddings_are_robust_by_default():
    vectors = rng().normal(size=(20, 8))
    unit = Outputs((vectors / np.linalg.norm(vectors, axis=1, keepdims=True),))
    assert robust_by_default(unit, integer_inputs=False)
    assert robust_by_default(Outputs((vectors,)), integer_inputs=True)
    assert not robust_by_default(Outputs((vectors,)), integer_inputs=False)


def test_under_shift_half_of_the_drop_is_allowed_and_more_has_to_be_certain():
    def judged(low, drop=0.05, **limits):
        plain = gate_of(topics(200, seed=7)[0])(topics(200, seed=7)[0])[0]
        plain = replace(plain, drop_low=0.0, drop_high=0.0)
        shift = replace(plain, drop=drop, drop_low=low, drop_high=0.15)
        return judge(replace(plain, shift=shift), Requirements(**limits), robust=True)

    assert judged(low=-0.05).passed
    assert judged(low=0.01).rule == "shift_drop"
    assert judged(low=-0.05, strict=True).passed
    assert judged(low=0.001, drop=0.0049).passed
    shifted = judged(low=0.001, drop=0.0051)
    assert shifted.rule == "shift_drop"
    assert "above 0.005" in sentence(shifted.reason)


def test_samples_of_one_group_stay_together():
    calibration, _ = topics(100, seed=3)
    holdout, _ = topics(200, seed=4)
    groups = np.repeat(np.arange(50), 2), 50 + np.repeat(np.arange(100), 2)
    split = shift_split(calibration, holdout, 0, groups)
    assert split is not None
    for rows, members in zip((split.calibrating, split.judged), groups, strict=True):
        _, counts = np.unique(members[rows], return_counts=True)
        assert set(counts) == {2}


def test_a_metric_that_a_part_of_the_holdout_does_not_define_gives_way_to_closeness():
    scores = np.linspace(0, 1, 200)[:, None].astype(np.float32)
    labels = (np.arange(200) >= 100).astype(np.int64)
    leaves, structure = flatten(scores)
    samples = from_python([(np.zeros(1, np.float32), int(label)) for label in labels])
    gate = AccuracyGate(resolve("auc"), samples, structure, Requirements(), 0, robust=True)
    outputs = Outputs(tuple(leaves))
    fidelity, _ = gate(outputs)
    fidelity, verdict = gate.under_shift(fidelity, outputs, np.arange(150, 200), calibrated=True)  # labels of one class
    assert (fidelity.metric, fidelity.shift.metric, fidelity.shift_drop) == ("auc", "concordance", 0)
    assert verdict.passed
