from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from corewise.accuracy.classification import agreement
from corewise.accuracy.metrics import METRICS, Metric, default, evaluate, resolve
from corewise.common.errors import CorewiseError, MetricError, SamplesError

SCORES = np.array([[0.1, 0.7, 0.2], [0.9, 0.0, 0.1], [0.3, 0.3, 0.4]], np.float32)


def run(metric, outputs=SCORES, labels=None, samples=3):
    return evaluate(resolve(metric), outputs, labels, samples)


def test_every_metric_of_the_table_is_there_under_its_name():
    assert [resolve(name).name for name in METRICS] == list(METRICS)
    assert [name for name in METRICS if resolve(name).against_reference] == [
        *("agreement", "detections", "recall@10", "cosine", "concordance")
    ]
    assert [name for name in METRICS if resolve(name).lower_is_better] == ["mae", "rmse", "wer", "cer"]


def test_rankings_take_any_number():
    assert (resolve("recall@3").name, resolve("recall@3").against_reference) == ("recall@3", True)
    assert resolve("ndcg@5").name == "ndcg@5"
    with pytest.raises(MetricError, match="no metric is named 'recall@0'; use recall@10"):
        resolve("recall@0")


def test_top1_scores_each_sample():
    assert run("top1", labels=np.array([1, 0, 0])).tolist() == [1, 1, 0]


def test_top5_takes_the_five_highest():
    scores = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    assert run("top5", scores, np.array([7, 3, 2, 0]), 4).tolist() == [1, 1, 0, 0]
    with pytest.raises(MetricError, match="top5 is always right with 3 classes; use top1"):
        run("top5", labels=np.array([1, 0, 0]))


def test_scores_that_are_all_equal_are_not_all_right():
    flat = np.zeros((10, 10), np.float32)
    assert run("top1", flat, np.arange(10), 10).sum() == 1
    assert run("top5", flat, np.arange(10), 10).sum() == 5


@dataclass
class Logits:
    logits: np.ndarray
    hidden: np.ndarray | None = None


@pytest.mark.parametrize("nest", [lambda a: a, lambda a: {"logits": a, "x": a[:, :1]}, lambda a: (a, a), Logits])
def test_class_scores_are_the_first_output_however_nested(nest):
    assert run("top1", nest(SCORES), np.array([1, 0, 0])).tolist() == [1, 1, 0]
    assert run("agreement", nest(SCORES), nest(SCORES[[0, 1, 1]])).tolist() == [1, 1, 0]
    assert default(nest(SCORES), None).name == "agreement"


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-100, 100, width=32)))
def test_outputs_agree_with_themselves(outputs):
    assert run("agreement", outputs, outputs, 5).tolist() == [1] * 5
    assert run("cosine", outputs, outputs, 5) == pytest.approx(np.ones(5))


def test_cosine_takes_all_floating_outputs_as_one_vector():
    a = {"x": np.array([[3.0, 0.0], [0.0, 0.0]]), "ids": np.array([1, 2]), "y": np.array([[4.0], [0.0]])}
    b = {"x": np.array([[3.0, 0.0], [0.0, 1.0]]), "ids": np.array([9, 9]), "y": np.array([[0.0], [0.0]])}
    assert run("cosine", b, a, 2) == pytest.approx([0.6, 0.0])


def test_cosine_of_outputs_whose_length_varies():
    rows = np.empty(2, dtype=object)
    rows[:] = [np.ones((3, 2), np.float32), np.ones((1, 2), np.float32)]
    assert run("cosine", [-rows], [rows], 2) == pytest.approx([-1, -1])


def test_the_default_metric_follows_outputs_and_labels():
    labels = np.array([0, 1, 2])
    assert default(SCORES, labels).name == "top1"
    assert default(SCORES, None).name == "agreement"
    assert default(SCORES[:, :1], None).name == "concordance"
    assert default(SCORES[:, :1], labels).name == "pearson"
    assert default(SCORES[:, :1], labels > 0).name == "auc"
    assert default(SCORES.argmax(axis=1), labels).name == "top1"
    assert default(SCORES[:, None], None).name == "concordance"
    assert default(SCORES - SCORES.mean(axis=1, keepdims=True), None).name == "agreement"


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (np.ones((3, 4, 5, 5), np.float32), np.zeros((3, 5, 5), np.int64), "miou"),
        (np.ones((3, 5, 5, 4), np.float32), np.zeros((3, 5, 5), np.int64), "miou"),
        (np.ones((3, 7, 4), np.float32), np.zeros((3, 7), np.int64), "top1"),
        (np.ones((3, 4), np.float32), np.array([[0, 1, 1, 0]] * 3), "f1"),
        (np.ones((3, 4), np.float32), np.array([[0, 1, 0, 0]] * 3), "top1"),
    ],
)
def test_the_default_metric_takes_labels_as_they_are(outputs, labels, expected):
    assert default(outputs, labels).name == expected


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (SCORES, np.array([0.2, 1.5, 3.0]), r"the labels are float64 of shape \(3,\)"),
        (SCORES, SCORES, r"the labels are float32 of shape \(3, 3\), which does not name one class"),
        (SCORES[:, :1], np.ones((3, 2)), r"no default metric takes labels float64 of shape \(3, 2\)"),
        (np.ones((3, 4, 5, 5), np.float32), np.ones((3, 4, 5, 5)), r"name a metric \(miou, psnr, ssim, mae, or a"),
    ],
)
def test_labels_that_no_metric_takes_are_refused_and_never_unused(outputs, labels, message):
    with pytest.raises(SamplesError, match=message):
        default(outputs, labels)


def test_embeddings_and_constant_answers_are_no_class_scores():
    vectors = np.random.default_rng(0).normal(size=(30, 16))
    assert default(vectors, None).name == "agreement"
    assert default(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), None).name == "cosine"
    with pytest.raises(SamplesError, match=r"no default metric takes .* \(recall@10, spearman"):
        default(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.arange(len(vectors)) % 2)
    positive = np.maximum(vectors, 0)
    assert default(positive / np.linalg.norm(positive, axis=1, keepdims=True), None).name == "cosine"
    assert default(np.eye(16)[vectors.argmax(1)], None).name == "agreement"
    # The first of four box sides is always the largest: an agreement of 100 % would say nothing.
    assert default(np.abs(vectors[:, :4]) + np.array([9, 0, 0, 0]), None).name == "concordance"


def test_a_function_is_its_own_metric():
    metric = resolve(agreement)
    assert (metric.name, metric.against_reference) == ("agreement", True)
    assert resolve(lambda outputs, labels: 1.0).name == "<lambda>"
    with pytest.raises(MetricError, match="the metric has the type float"):
        resolve(0.5)


def test_a_reference_is_found_in_a_module_or_file(tmp_path):
    (tmp_path / "my_metrics.py").write_text("def mine(outputs, labels):\n    return (outputs.sum(axis=1) > 0.5)\n")
    metric = resolve(f"{tmp_path / 'my_metrics.py'}:mine")
    assert metric.name == "mine"
    assert evaluate(metric, SCORES, None, 3).tolist() == [1, 1, 1]
    assert resolve("numpy:dot") == Metric(name="dot", score=np.dot)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("top_1", "no metric is named 'top_1'; use top1"),
        ("accuracy", "use top1, top5, .*concordance, module:function or file.py:function"),
        ("no_such_module:f", "no_such_module"),
        ("numpy:no_such_function", "no_such_function"),
        ("missing.py:f", "missing.py"),
    ],
)
def test_what_is_no_metric_is_refused(reference, message):
    with pytest.raises(MetricError, match=message):
        resolve(reference)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "top1 needs labels and the samples have none; add labels, or use the metric agreement"),
        (np.array([0, 3, 1]), "holdout sample 1 has label 3, but the model's classes are 0..2"),
        (np.array([0, 1, -1]), "holdout sample 2 has label -1"),
        (np.array([0, 1]), r"labels are int64 of shape \(2,\), .*; give integers of shape \(3,\)"),
        (np.array([0.5, 1, 2]), "labels are float64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(SamplesError, match=message):
        run("top1", labels=labels)


def test_class_metrics_need_class_scores():
    with pytest.raises(
        MetricError, match=r"top1 needs class scores \(N, C\) .* float32 of shape \(3, 1\); name another"
    ):
        run("top1", SCORES[:, :1], np.array([0, 0, 0]))


def broken(outputs, labels):
    return outputs["missing"]


def test_a_metric_that_raises_says_where():
    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(MetricError, match=rf"the metric 'broken' failed: IndexError: .*test_metrics\.py:{line}"):
        run(broken)
    with pytest.raises(MetricError, match=r"'<lambda>' failed: TypeError: .* 2 were given"):
        run(lambda outputs: 1.0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "instead of numbers"),
        ("0.9", "instead of numbers"),
        (float("nan"), "NaN or infinity"),
        (np.array([1.0, np.inf, 0.0]), "NaN or infinity"),
        (np.ones((3, 1)), r"shape \(3, 1\) for 3 samples; return a float, or one per sample: shape \(3,\)"),
        ([1.0, 2.0], r"shape \(2,\)"),
        ([[1.0], [1.0, 2.0]], "failed: ValueError"),
    ],
)
def test_what_is_no_score_is_refused(returned, message):
    with pytest.raises(MetricError, match=message):
        run(lambda outputs, labels: returned)


@pytest.mark.parametrize("returned", [1, 0.5, True, np.float32(0.5), [True, False, True], np.arange(3)])
def test_numbers_of_any_kind_are_scores(returned):
    scores = run(lambda outputs, labels: returned)
    assert scores.dtype == np.float64
    assert scores.tolist() == np.asarray(returned, float).tolist()


def test_our_own_errors_pass_a_metric_unchanged():
    def refuses(outputs, labels):
        raise SamplesError("these labels are upside down")

    with pytest.raises(CorewiseError, match=r"^these labels are upside down$"):
        run(refuses)
