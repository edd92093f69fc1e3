import dataclasses
from functools import partial

import numpy as np
import pytest
from builders import requirements, said
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

from corewise.accuracy.fidelity import Outputs, compare
from corewise.accuracy.gate import judge
from corewise.accuracy.metrics import resolve
from corewise.common.errors import EngineError, MetricError, SamplesError, SourceError


def first(leaves):
    return leaves[0]


def outputs(*leaves):
    return Outputs(tuple(np.asarray(leaf) for leaf in leaves))


def ragged(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


def fidelity_of(reference, candidate, metric="cosine", labels=None, **options):
    return compare(reference, candidate, metric=resolve(metric), labels=labels, **{"nest": first, **options})


@pytest.fixture(scope="module")
def classified():
    """300 samples of 10 classes: fp32 is right on 276, the candidate disagrees on 12 samples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=300)
    reference = rng.normal(size=(300, 10)).astype(np.float32)
    reference[np.arange(300), (labels + (np.arange(300) < 24)) % 10] += 20
    candidate = reference + rng.normal(0, 0.1, size=reference.shape).astype(np.float32)
    candidate[20:32] = np.roll(candidate[20:32], 1, axis=1)
    return outputs(reference), outputs(candidate), labels


def test_batches_are_joined_and_put_back_in_order():
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    joined = Outputs.gather([[rows[[4, 1]], rows[[4, 1], 0]], [rows[[0, 2, 3, 5]], rows[[0, 2, 3, 5], 0]]])
    back = joined.rows(np.argsort([4, 1, 0, 2, 3, 5]))
    assert len(back) == 6
    assert (back.leaves[0] == rows).all()
    assert (back.leaves[1] == rows[:, 0]).all()


def test_batches_of_different_widths_keep_their_rows():
    joined = Outputs.gather([[np.ones((2, 3))], [np.zeros((1, 5))]])
    assert [row.shape for row in joined.leaves[0]] == [(3,), (3,), (5,)]
    assert joined.rows(np.array([2, 2])).leaves[0][1].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"outputs have \[\] rows"),
        ([[np.ones((2, 3)), np.ones(3)]], r"outputs have \[2, 3\] rows"),
        ([[np.float32(1)]], "an output is a single number"),
    ],
)
def test_outputs_without_rows_are_refused(batches, message):
    with pytest.raises(EngineError, match=message):
        Outputs.gather(batches)


@given(
    hnp.arrays(np.float32, (6, 3), elements=st.floats(-1e3, 1e3, width=32)), st.sampled_from(["cosine", "agreement"])
)
def test_fp32_against_itself_is_perfect(array, metric):
    same = outputs(array)
    for candidate in (same, outputs(array.copy())):
        fidelity = fidelity_of(same, candidate, metric)
        assert (fidelity.sqnr_db, fidelity.agreement, fidelity.drop) == (200, 1, 0)
        assert fidelity.baseline_value == fidelity.value == pytest.approx(1)
        assert fidelity.cosine == pytest.approx(1)
    assert (fidelity_of(same, same, metric).drop_low, fidelity_of(same, same, metric).drop_high) == (0, 0)


def test_sqnr_is_signal_over_error_over_all_floating_outputs():
    reference = outputs(np.full((4, 2), 3.0, np.float32), np.arange(4), np.full((4, 1), 4.0))
    candidate = outputs(np.full((4, 2), 3.0, np.float32), np.arange(4) + 1, np.full((4, 1), 4.5))
    assert fidelity_of(reference, candidate).sqnr_db == pytest.approx(10 * np.log10((18 + 16) / 0.25))
    zeros = outputs(np.zeros((4, 2)))
    assert fidelity_of(zeros, outputs(np.ones((4, 2)))).sqnr_db == -200
    assert fidelity_of(zeros, outputs(np.zeros((4, 2)))).sqnr_db == 200


def test_small_errors_on_large_half_precision_outputs_do_not_overflow():
    reference = outputs(np.full((2, 4), 6e4, np.float16))
    candidate = outputs(np.full((2, 4), 5.9e4, np.float16))
    assert fidelity_of(reference, candidate).sqnr_db == pytest.approx(20 * np.log10(60), abs=0.1)


def test_top1_is_paired_and_its_drop_not_shrunk(classified):
    reference, candidate, labels = classified
    fidelity = fidelity_of(reference, candidate, "top1", labels)
    assert (fidelity.metric, fidelity.samples) == ("top1", 300)
    assert fidelity.baseline_value == 276 / 300
    assert fidelity.drop == pytest.approx(fidelity.baseline_value - fidelity.value, abs=1e-12)
    assert fidelity.drop_low < fidelity.drop < fidelity.drop_high
    assert fidelity.drop_high - fidelity.drop_low < 0.06  # Unpaired, it would be 0.09.
    assert fidelity.agreement == 288 / 300
    assert 5 < fidelity.sqnr_db < 30


def test_equal_answers_on_few_samples_leave_doubt():
    scores = np.eye(8)
    fidelity = fidelity_of(outputs(scores), outputs(scores * 0.9), "top1", np.arange(8))
    assert fidelity.drop == 0
    assert fidelity.drop_high > 0.2


def test_groups_widen_the_interval_of_answers_that_go_together(classified):
    reference, candidate, labels = classified
    groups = np.arange(300) // 12
    grouped = fidelity_of(reference, candidate, "top1", labels, groups=groups)
    single = fidelity_of(reference, candidate, "top1", labels)
    assert grouped.drop == single.drop
    assert grouped.drop_high - grouped.drop_low > 1.3 * (single.drop_high - single.drop_low)


def test_scores_between_0_and_1_are_bootstrapped():
    rng = np.random.default_rng(1)
    reference = outputs(rng.normal(size=(100, 16)))
    candidate = outputs(reference.leaves[0] + rng.normal(0, 0.3, size=(100, 16)))
    fidelity = fidelity_of(reference, candidate)
    assert fidelity.metric == "cosine"
    assert fidelity.agreement is not None
    assert fidelity.value == pytest.approx(fidelity.cosine)
    assert 0 < fidelity.drop_low < fidelity.drop < fidelity.drop_high < 0.1


def sentence_pairs(left, right):
    """100 pairs of sentence embeddings, in one of two layouts; labels are how alike the pairs are."""
    rng = np.random.default_rng(2)
    alike = rng.uniform(size=100)
    a = rng.normal(size=(100, 32))
    b = alike[:, None] * a + (1 - alike[:, None]) * rng.normal(size=(100, 32))
    array, labels, groups = np.empty((200, 32)), np.empty(200), np.empty(200, int)
    for place, half in ((left, a), (right, b)):
        array[place], labels[place], groups[place] = half, alike, np.arange(100)
    return array, labels, groups


def spearman(outputs, labels, left, right):
    a, b = outputs[left], outputs[right]
    similarity = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(spearmanr(similarity, labels[left])[0])


LAYOUTS = {
    "one after the other": (slice(0, None, 2), slice(1, None, 2)),
    "all left, then all right": (slice(0, 100), slice(100, None)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_metric_of_pairs_is_resampled_by_pairs(layout):
    left, right = LAYOUTS[layout]
    array, labels, groups = sentence_pairs(left, right)
    noisy = array + np.random.default_rng(3).normal(0, 0.3, size=array.shape)
    metric = partial(spearman, left=left, right=right)
    fidelity = fidelity_of(outputs(array), outputs(noisy), metric, labels, groups=groups)
    assert fidelity.metric == "partial"
    assert fidelity.baseline_value > 0.9
    assert 0 < fidelity.drop_low < fidelity.drop < fidelity.drop_high < 0.1


def test_a_metric_of_pairs_without_groups_is_refused():
    left, right = LAYOUTS["one after the other"]
    array, labels, _ = sentence_pairs(left, right)
    with pytest.raises(
        MetricError, match="when samples are reordered; use the labels that are passed to it, and put samples"
    ):
        fidelity_of(outputs(array), outputs(array), partial(spearman, left=left, right=right), labels)


def test_groups_of_different_sizes_stay_whole():
    array, seen = np.arange(12.0)[:, None], []

    def metric(outputs, labels):
        seen.append(outputs[:, 0].astype(int).tolist())
        return float(outputs.mean() > -1)

    fidelity_of(outputs(array), outputs(array + 1), metric, groups=[0] * 2 + [1] * 4 + [2] * 6)
    runs = {tuple(rows[:4]) for rows in seen}
    assert runs <= {(0, 1, 0, 1), (0, 1, 2, 3), (0, 1, 6, 7), (2, 3, 4, 5), (6, 7, 8, 9)} | {
        (1, 2, 1, 2),
        (1, 2, 3, 4),
        (1, 2, 7, 8),
        (3, 4, 5, 6),
        (7, 8, 9, 10),
    }
    assert len(runs) > 4


def test_a_slow_metric_is_resampled_less():
    calls = 0

    def metric(outputs, labels):
        nonlocal calls
        calls += 1
        return float(outputs.mean())

    array = np.random.default_rng(4).normal(size=(50, 1))
    fidelity = fidelity_of(outputs(array), outputs(array * 0.9), metric, clock=lambda: calls * 1.0)
    assert calls < 70
    assert fidelity.drop_low < fidelity.drop < fidelity.drop_high


def test_a_metric_that_needs_all_of_the_holdout_is_refused():
    def metric(outputs, labels):
        return 1.0 if len(np.unique(outputs)) == len(outputs) else float("nan")

    array = np.arange(20.0)[:, None]
    with pytest.raises(MetricError, match="no confidence interval: it is undefined on 1000 of 1000"):
        fidelity_of(outputs(array), outputs(array + 1), metric)


def test_one_sample_has_an_interval_only_where_answers_are_counted():
    one = outputs(np.ones((1, 2)))
    assert fidelity_of(one, outputs(np.ones((1, 2))), "agreement").drop_high > 0.9
    with pytest.raises(MetricError, match="'cosine' has no confidence interval: it needs at least 2 samples"):
        fidelity_of(one, outputs(np.array([[1.0, 0.5]])))


def test_nan_of_the_candidate_is_its_failure_and_of_the_model_the_users():
    good, bad = np.ones((3, 2)), np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(EngineError, match="build's output 0 has NaN or infinity where fp32's has none"):
        fidelity_of(outputs(good), outputs(bad))
    with pytest.raises(SourceError, match="returns NaN: output 0 of holdout sample 1; check its weights"):
        fidelity_of(outputs(bad), outputs(bad))
    bad[1, 0] = np.inf
    with pytest.raises(EngineError, match="infinity"):
        fidelity_of(outputs(good), outputs(bad))


def test_infinity_that_fp32_returns_too_is_left_out():
    masked = np.array([[1.0, -np.inf], [2.0, 3.0]])
    fidelity = fidelity_of(outputs(masked), outputs(np.array([[1.0, -1e30], [2.0, 3.3]])))
    assert fidelity.sqnr_db == pytest.approx(10 * np.log10(14 / 0.09))
    with pytest.raises(EngineError, match="output 0 has a number where fp32's has infinity, for holdout sample 0"):
        fidelity_of(outputs(masked), outputs(np.array([[1.0, -2.0], [2.0, 3.0]])))


def test_rows_of_different_lengths_are_compared_row_by_row():
    rows = [np.ones((2, 4)), np.ones((7, 4)), np.ones((1, 4))]
    half = [row / 2 for row in rows]
    fidelity = fidelity_of(outputs(ragged(rows)), outputs(ragged(half)))
    assert fidelity.sqnr_db == pytest.approx(10 * np.log10(4))
    assert (fidelity.cosine, fidelity.agreement) == (pytest.approx(1), None)
    with pytest.raises(EngineError, match=r"output 0 has shape \(7, 3\), fp32's \(7, 4\)"):
        fidelity_of(outputs(ragged(rows)), outputs(ragged([rows[0], np.ones((7, 3)), rows[2]])))
    half[2] = half[2] * np.nan
    with pytest.raises(SourceError, match="holdout sample 2"):
        fidelity_of(outputs(ragged(half)), outputs(ragged(rows)))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (outputs(np.ones((3, 2)), np.ones(3)), "returns 2 outputs for 3 samples, fp32 1 for 3"),
        (outputs(np.ones((2, 2))), "returns 1 outputs for 2 samples"),
        (outputs(np.ones((3, 4))), r"output 0 has shape \(3, 4\), fp32's \(3, 2\)"),
    ],
)
def test_outputs_of_another_shape_are_the_candidates_failure(candidate, message):
    with pytest.raises(EngineError, match=message):
        fidelity_of(outputs(np.ones((3, 2))), candidate)


def test_labels_and_groups_must_fit():
    three = outputs(np.ones((3, 2)))
    with pytest.raises(SamplesError, match="2 labels for 3 samples"):
        fidelity_of(three, three, labels=np.ones(2))
    with pytest.raises(SamplesError, match="belong to one group"):
        fidelity_of(three, three, groups=[1, 1, 1])
    with pytest.raises(SamplesError, match=r"shape \(2,\) for 3"):
        fidelity_of(three, three, groups=[1, 2])


def test_a_metric_must_return_one_kind_of_score():
    turns = iter([1.0, np.ones(3)])
    with pytest.raises(MetricError, match=r"shape \(\) for fp32 but \(3,\) for a build"):
        fidelity_of(outputs(np.ones((3, 2))), outputs(np.ones((3, 2))), lambda outputs, labels: next(turns))


def test_the_metric_sees_nested_outputs_and_the_labels(classified):
    reference, candidate, labels = classified

    def metric(outputs, truth):
        return outputs["logits"].argmax(axis=1) == truth

    nested = fidelity_of(reference, candidate, metric, labels, nest=lambda leaves: {"logits": leaves[0]})
    named = fidelity_of(reference, candidate, "top1", labels)
    assert dataclasses.replace(named, metric="metric", chance=None, chance_limit=None) == nested


def figures(drop, low, high, samples=300):
    """What ``gate`` reads, around real outputs' other figures."""
    any_outputs = outputs(np.ones((4, 2)))
    return dataclasses.replace(
        fidelity_of(any_outputs, any_outputs),
        metric="top1",
        samples=samples,
        baseline_value=0.92,
        value=0.92 - drop,
        drop=drop,
        drop_low=low,
        drop_high=high,
    )


def test_the_gate_speaks_in_figures():
    verdict = judge(figures(0.92 - 0.91667, -0.008, 0.015), requirements(max_drop=0.01))
    assert verdict.passed
    assert said(verdict.reason) == "top1 0.9167 against 0.9200: drop 0.0033 [-0.0080, 0.0150] within 0.01"
    # 300 * ((0.0150 - 0.0033) / (0.01 - 0.0033))^2, rounded up
    assert said(verdict.uncertain) == (
        "a holdout of 300 is too small to show whether the drop is within 0.01; about 920 samples would show it"
    )


@pytest.mark.parametrize(
    ("drop", "low", "high", "strict", "passed", "certain"),
    [
        (0.003, 0.001, 0.009, False, True, True),
        (0.003, 0.001, 0.009, True, True, True),
        (0.003, -0.008, 0.015, True, False, False),
        (0.02, -0.001, 0.04, False, False, False),
        (0.05, 0.02, 0.08, False, False, True),
        (-0.02, -0.03, -0.01, True, True, True),
        (0.92 - 0.91, 0.002, 0.92 - 0.91, True, True, True),
    ],
)
def test_the_gate_passes_the_estimate_or_strictly_the_upper_end(drop, low, high, strict, passed, certain):
    verdict = judge(figures(drop, low, high), requirements(max_drop=0.01, strict=strict))
    assert (verdict.passed, not verdict.uncertain) == (passed, certain)
    assert ("at its upper end" in said(verdict.reason)) == strict


def test_a_drop_at_the_limit_is_told_by_no_holdout():
    for drop in (0.01, 0.0100001):
        verdict = judge(figures(drop, 0.0, 0.02), requirements(max_drop=0.01))
        assert "too close to the limit for any number" in said(verdict.uncertain)


@given(
    st.floats(-0.5, 0.5),
    st.floats(0, 0.2),
    st.floats(0, 0.2),
    st.floats(0, 0.1),
    st.integers(1, 10**6),
)
def test_strict_is_stricter_and_what_is_certain_is_certain_for_both(drop, below, above, max_drop, samples):
    fidelity = figures(drop, drop - below, drop + above, samples)
    lenient = judge(fidelity, requirements(max_drop=max_drop))
    strict = judge(fidelity, requirements(max_drop=max_drop, strict=True))
    assert lenient.passed or not strict.passed
    assert lenient.uncertain == strict.uncertain
    assert lenient.uncertain or lenient.passed == strict.passed


def test_the_advised_holdout_would_tell():
    rng = np.random.default_rng(7)
    wrong = rng.uniform(size=200_000)

    def drop(samples):
        correct = np.eye(2)[np.zeros(samples, int)]
        candidate = np.where(wrong[:samples, None] < 0.015, correct[:, ::-1], correct)
        labels = np.zeros(samples, int)
        return judge(fidelity_of(outputs(correct), outputs(candidate), "top1", labels), requirements(max_drop=0.02))

    advised = int(said(drop(400).uncertain).split("about ")[1].split(" ")[0])
    assert 400 < advised < 100_000
    assert not drop(2 * advised).uncertain
