"""Labels in the forms in which people have them, and models that do no better than guessing."""

from dataclasses import replace

import numpy as np
import pytest

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.labels import class_labels
from corewise.accuracy.metrics import resolve
from corewise.accuracy.outputs import Outputs, ragged
from corewise.common.errors import EngineError, MetricError, SamplesError
from corewise.common.nested import flatten
from corewise.records.goal import Requirements
from corewise.samples import from_python

SCORES = np.eye(4, dtype=np.float32)[np.arange(12) % 4]
WRONG = (np.arange(12) + 1) % 4
FORMS = {
    "integers": WRONG,
    "a column": WRONG[:, None],
    "floats": WRONG.astype(np.float32),
    "a column of floats": WRONG[:, None].astype(np.float64),
    "one-hot": np.eye(4)[WRONG],
    "one-hot booleans": np.eye(4)[WRONG].astype(bool),
    "objects": ragged([np.array([label]) for label in WRONG]),
}


@pytest.mark.parametrize("form", FORMS)
def test_class_labels_are_understood_in_every_form(form):
    assert class_labels(FORMS[form], SCORES).tolist() == WRONG.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (WRONG + 0.5, r"the labels are float64 of shape \(12,\), which does not name one class for each of 12"),
        (np.ones((12, 4)), r"float64 of shape \(12, 4\)"),
        (np.full((12, 4), 0.25), r"float64 of shape \(12, 4\)"),
        (WRONG[:11], r"int64 of shape \(11,\)"),
        (ragged([np.zeros(1 + row % 2) for row in range(12)]), "the labels are of varying size"),
        (ragged([{"boxes": np.zeros((1, 4))}] * 12), "the labels are of varying size"),
        (WRONG + 1, r"holdout sample 2 has label 4, but the model's classes are 0\.\.3; subtract 1"),
        (WRONG - 1, r"sample 3 has label -1, but the model's classes are 0\.\.3; leave out the samples that have no"),
        (WRONG + 2, r"holdout sample 1 has label 4, .*; give the labels the model was trained on"),
        (np.array(["cat", "dog", "ant"] * 4, object), "the labels are strings, which does not name one class"),
    ],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises(SamplesError, match=message):
        class_labels(labels, SCORES)


def fidelity_of(outputs, labels, names=None, metric=None):
    leaves, structure = flatten(outputs)
    samples = from_python([np.zeros(1, np.float32)] * len(leaves[0]))
    samples = replace(samples, labels=labels, names=names)
    gate = AccuracyGate(metric, samples, structure, Requirements(), 0)
    return gate(Outputs(tuple(leaves)))[0]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "objects"])
def test_labels_decide_in_every_form(form):
    fidelity = fidelity_of(SCORES, FORMS[form])
    assert (fidelity.metric, fidelity.basis, fidelity.baseline_value) == ("top1", "labels", 0)
    assert fidelity.near_chance
    assert fidelity.chance == 0.25


def test_messages_name_the_users_own_samples():
    names = [f"cats/{row}.png" for row in range(12)]
    with pytest.raises(SamplesError, match=r"sample 2 \(cats/2\.png\) has label 4"):
        fidelity_of(SCORES, WRONG + 1, names)
    assert fidelity_of(SCORES, WRONG, names).worst_sample == "sample 0 (cats/0.png)"


@pytest.mark.parametrize(
    ("right", "count", "classes", "near"),
    [
        (0, 100, 1000, True),
        (1, 100, 10, True),
        (18, 100, 10, True),
        (30, 100, 10, False),
        (85, 100, 1000, False),
        (55, 100, 2, True),
        (70, 100, 2, False),
        (45, 100, 3, True),
        (60, 100, 3, False),
        (1, 100, 1000, False),
    ],
)
def test_a_model_near_chance_is_told(right, count, classes, near):
    answers = np.arange(count) % classes
    labels = np.where(np.arange(count) < right, answers, (answers + 1) % classes)
    assert fidelity_of(np.eye(classes)[answers], labels).near_chance == near


def test_guessing_is_by_the_classes_that_there_are():
    """Nine classes of tokens, in samples of one length and of several, and of a model that answers with classes."""
    truth = np.random.default_rng(3).integers(9, size=(40, 12))
    answers = np.where(np.random.default_rng(4).random(truth.shape) < 0.4, truth, (truth + 1) % 9)
    tokens = np.eye(9)[answers]
    lengths = 6 + np.arange(40) % 7
    cut = [ragged([row[:length] for row, length in zip(rows, lengths, strict=True)]) for rows in (tokens, truth)]
    for fidelity in (
        fidelity_of(tokens, truth),
        fidelity_of(*cut),
        fidelity_of(answers.reshape(-1), truth.reshape(-1)),
    ):
        assert fidelity.metric == "top1"
        assert fidelity.chance == pytest.approx(1 / 9)
        assert not fidelity.near_chance


def test_a_sample_of_as_many_tokens_as_classes_is_scored_as_the_others():
    truth = [np.arange(1, length + 1) % 9 for length in (7, 9, 12)]
    tokens = ragged([np.eye(9)[labels] for labels in truth])
    assert fidelity_of(tokens, ragged(truth)).baseline_value == 1


def test_correlations_and_areas_have_a_chance_level_too():
    truth = np.random.default_rng(0).normal(size=100)
    assert not fidelity_of(truth[:, None] + 0.1, truth).near_chance
    assert fidelity_of(np.random.default_rng(1).normal(size=(100, 1)), truth).near_chance
    assert fidelity_of(-truth[:, None], truth).near_chance
    assert fidelity_of(-truth[:, None], (truth > 0).astype(int)).near_chance
    assert not fidelity_of(truth[:, None], (truth > 0).astype(int)).near_chance


def test_a_candidate_whose_answers_died_is_rejected_where_its_metric_then_has_no_value():
    truth = np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32)
    samples = replace(from_python([np.zeros(1, np.float32)] * 40), labels=truth)
    gate = AccuracyGate(None, samples, flatten(truth)[1], Requirements(), 0)
    assert gate(Outputs((truth + 0.1,)))[0].metric == "pearson"
    fidelity, verdict = gate(Outputs((np.ones_like(truth),)))
    assert (fidelity.metric, fidelity.value) == ("concordance", pytest.approx(0, abs=0.1))
    assert (verdict.passed, verdict.rule) == (False, "drop")


def test_a_metric_that_has_no_value_for_good_outputs_fails_the_candidate_alone():
    truth = np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32)
    samples, turns = from_python([np.zeros(1, np.float32)] * 40), iter([1.0, np.nan])
    metric = resolve(lambda outputs, labels: np.full(40, next(turns)))
    gate = AccuracyGate(metric, samples, flatten(truth)[1], Requirements(), 0)
    gate(Outputs((truth,)))
    with pytest.raises(EngineError, match=r"returns NaN or infinity \(for the build's outputs; fp32's have"):
        gate(Outputs((truth.copy(),)))


def test_a_metric_without_a_value_for_fp32_says_why():
    truth = np.random.default_rng(0).normal(size=40)
    with pytest.raises(MetricError, match="'pearson' has no value: outputs or labels are all the same"):
        fidelity_of(np.ones((40, 1)), truth)
    with pytest.raises(MetricError, match=r"'auc' has no value.*; give samples that differ, or name another"):
        fidelity_of(truth[:, None], np.zeros(40, np.int64))


def test_maps_have_a_chance_level_too():
    truth = np.random.default_rng(2).integers(3, size=(12, 8, 8))
    scores = np.moveaxis(np.eye(3)[truth], -1, 1)
    assert not fidelity_of(scores, truth).near_chance
    assert fidelity_of(np.roll(scores, 3, axis=3), truth).near_chance
    assert fidelity_of(np.broadcast_to(np.eye(3)[0].reshape(1, 3, 1, 1), scores.shape), truth).near_chance


def test_what_was_judged_stands_in_the_record():
    maps = np.random.default_rng(0).normal(size=(12, 3, 8, 8))
    by_outputs = fidelity_of(maps, None)
    assert (by_outputs.metric, by_outputs.basis) == ("concordance", "outputs")
    assert by_outputs.suggested_metrics == ("miou", "psnr", "ssim", "mae")
    assert fidelity_of(SCORES, None).basis == "answers"
    assert fidelity_of(SCORES, None).suggested_metrics == ()
