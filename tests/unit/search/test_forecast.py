"""forecast and budget: the order of builds, what they cost, and what a small budget leaves for the baseline."""

from dataclasses import replace
from math import inf

import pytest
from builders import trial
from test_candidates import CPU, judged, ours_at

from corewise.engines import engine
from corewise.records.build import Build, Plan
from corewise.records.goal import Throughput
from corewise.records.reason import Reason, ReasonKind
from corewise.search.budget import (
    BASELINE_SHARE,
    CALL_S,
    FEWEST_HOLDOUT,
    RACE_S,
    WITH_LOADS,
    WITH_PHOTOS,
    BudgetSplit,
    SampleLimits,
    baseline_batch,
    sample_limits,
)
from corewise.search.candidates import BASELINE, list_candidates
from corewise.search.forecast import START_S, Forecast, following, is_better_left, learned_plan

VNNI, AVX2 = CPU, replace(CPU, isa=("avx2",))
CNN = {"aten.conv2d.default": 53, "aten.add.Tensor": 16, "aten.linear.default": 1}
RESNET_PER_S = 14.0
"""Eager PyTorch's rows per second on two cores of a Zen 4."""


def seen(build, per_s, state="ok", build_s=10.0):
    """A trial that was verified at a speed."""
    return replace(judged(build, state=state, per_s=per_s), verified_per_s=per_s, build_s=build_s)


def forecast(*trials, cpu=VNNI, per_s=RESNET_PER_S, calibration=64, holdout=64):
    baseline = seen(BASELINE, per_s)
    return Forecast(cpu=cpu, calibration=calibration, holdout=holdout, trials=(baseline, *trials))


def builds(cpu=VNNI, engines=("openvino", "onnxruntime")):
    return list_candidates(cpu, CNN, {name: engine(name) for name in engines})[1:]


def own(name="openvino", **options):
    return Build(engine=name, precision="int8", options=tuple(sorted(options.items())))


@pytest.mark.parametrize("left_s", [inf, 200.0, 40.0])
def test_where_the_cpu_multiplies_int8_its_own_int8_comes_before_bf16_and_fp32(left_s):
    first = following(builds(), forecast(), left_s, left_s)
    assert first.precision == "int8"


def test_what_does_not_fit_into_the_time_gives_way_to_what_does():
    expected = forecast(per_s=2.0)
    first = following(builds(), expected, 60.0, 60.0)
    assert first.precision in ("bf16", "fp32")
    assert expected.seconds(first) <= 60.0
    assert following(builds(), expected, 3.0) == min(builds(), key=expected.seconds)


def test_where_there_is_time_for_one_trial_it_is_that_of_the_fastest_build():
    expected = forecast()
    int8 = next(build for build in builds() if build.precision == "int8")
    left_s = expected.seconds(int8) + 1
    assert expected.seconds(Build(engine="openvino", precision="bf16")) < left_s / 2
    assert following(builds(), expected, left_s, left_s + 20).precision == "int8"


def test_time_for_a_sure_build_is_kept_while_nothing_passed():
    expected, int8, fp32 = forecast(), own(), Build(engine="openvino", precision="fp32")
    both = expected.seconds(int8) + expected.seconds(fp32)
    assert following([int8, fp32], expected, both + 1, both + 1) == int8
    assert following([int8, fp32], expected, both - 1, both - 1) == fp32
    assert following([int8, fp32], expected, both - 1) == int8
    assert following([int8, fp32], expected, both - 1, both + 1) == int8  # a sure build may be late


def test_where_an_engines_own_int8_was_rejected_corewises_comes_before_slower_precisions():
    rejected = seen(own(rest="bf16"), 90.0, state="rejected")
    left = [build for build in builds() if build != rejected.build]
    following_it = following(left, forecast(rejected), 100.0, 100.0)
    assert following_it.quantization.quantizer == "corewise"
    ours = [seen(following_it, 90.0, state="rejected")]
    climbed = following_it.with_quantization(replace(following_it.quantization, rung=1))
    left = [climbed, *(build for build in left if build != following_it)]
    assert following(left, forecast(rejected, *ours), 100.0, 100.0) == climbed


def test_what_was_seen_replaces_what_is_usual():
    usual = forecast()
    slow = forecast(seen(own(), 2 * RESNET_PER_S))
    assert slow.speed(own(rest="bf16")) == pytest.approx(2)
    assert slow.speed(own("onnxruntime")) < usual.speed(own("onnxruntime")) / 2
    assert slow.speed(Build(engine="openvino", precision="bf16")) == usual.speed(
        Build(engine="openvino", precision="bf16")
    )
    # On models whose int8 wins nothing, other precisions come next.
    assert following([own(rest="bf16"), Build(engine="openvino", precision="bf16")], slow).precision == "bf16"


def test_a_twin_of_a_rejected_build_is_hardly_expected_to_pass():
    rejected = seen(own(), 90.0, state="rejected")
    assert forecast(rejected).passes(own(rest="bf16")) < 0.2
    assert forecast(seen(own(), 90.0)).passes(own(rest="bf16")) > 0.9


def test_the_first_rung_takes_about_as_long_as_an_engines_own_quantizer():
    expected = forecast(calibration=120)
    assert expected.seconds(ours_at(0, "openvino")) <= 1.5 * expected.seconds(own())
    assert expected.seconds(ours_at(None, "openvino")) > expected.seconds(own())
    made = forecast(seen(ours_at(0, "openvino"), 90.0), calibration=120)
    other = ours_at(0, "openvino", placement="everywhere")
    assert made.seconds(other) < expected.seconds(other)


def test_where_int8_must_be_judged_under_shift_its_trial_needs_time_for_the_twin():
    usual, fp32 = forecast(), Build(engine="openvino", precision="fp32")
    robust = replace(usual, judged_under_shift=True)
    assert robust.seconds(own()) > usual.seconds(own()) + START_S
    assert robust.seconds(fp32) == usual.seconds(fp32)


def test_much_slower_builds_are_left_where_time_is_short():
    fp32, left = Build(engine="openvino", precision="fp32"), builds()
    found = forecast(seen(own(), 6 * RESNET_PER_S))
    assert is_better_left(fp32, left, found, 30.0)
    assert not is_better_left(fp32, left, found, 3000.0)
    assert not is_better_left(own(rest="bf16"), left, found, 30.0)
    assert not is_better_left(fp32, left, forecast(seen(own(), RESNET_PER_S)), 30.0)


def test_a_twin_starts_at_the_plan_that_its_sibling_found_best():
    searched = replace(seen(own(), 90.0), tuned=Reason.of(ReasonKind.FASTEST_PLAN))
    best = Plan(threads_per_instance=1, instances=2, batch=4)
    searched = replace(
        searched,
        measurements=(*searched.measurements, replace(searched.measurements[0], plan=best, throughput_per_s=200.0)),
    )
    goal = Throughput()
    assert learned_plan(own(rest="bf16"), [searched], goal) == best
    assert learned_plan(ours_at(0, "openvino"), [searched], goal) == best
    assert learned_plan(own(), [searched], goal) is None
    assert learned_plan(own("onnxruntime"), [searched], goal) is None
    assert learned_plan(own(rest="bf16"), [replace(searched, tuned=None)], goal) is None
    assert learned_plan(own(rest="bf16"), [replace(searched, tuned=Reason.of(ReasonKind.MUCH_SLOWER))], goal) is None


@pytest.mark.parametrize("row_s", [0.001, 0.02, 0.07, 0.5])
def test_the_baseline_answers_no_more_samples_than_its_share_has_time_for(row_s):
    found = sample_limits(60.0, row_s).holdout
    assert found >= FEWEST_HOLDOUT
    assert found == FEWEST_HOLDOUT or found * row_s <= BASELINE_SHARE * 60.0
    assert sample_limits(600.0, row_s).holdout >= found
    again = sample_limits(60.0, row_s * 1.02).holdout
    assert again in (found, *(int(found * share) for share in (2 / 3, 3 / 4)))


def test_a_run_that_resumes_has_the_samples_of_the_one_before(tmp_path):
    path, first = tmp_path / "limits.json", sample_limits(60.0, 0.02)
    assert SampleLimits.kept(path, 60.0) is None
    first.keep(path)
    assert SampleLimits.kept(path, 60.0) == first
    assert SampleLimits.kept(path, 120.0) is None
    path.write_text("{")
    assert SampleLimits.kept(path, 60.0) is None


@pytest.mark.parametrize("whole", [BudgetSplit(), WITH_PHOTOS, WITH_LOADS])
@pytest.mark.parametrize("total_s", [20.0, 45.0, 60.0, 100.0])
def test_a_short_budget_keeps_time_for_the_race(total_s, whole):
    split = whole.leaving(total_s, RACE_S)
    assert split.trials < split.last_trial < split.plans < split.first_trials <= 1
    assert split.plans <= whole.plans
    assert (split.race - split.plans) * total_s >= RACE_S - 1e-9 or split.plans == split.race / 2


@pytest.mark.parametrize("total_s", [None, 300.0])
def test_a_long_budget_is_shared_as_ever(total_s):
    assert BudgetSplit().leaving(total_s, RACE_S) == BudgetSplit()


def test_without_int8_instructions_transformers_are_not_expected_to_win_by_int8_with_ranges():
    fp32 = Build(engine="openvino", precision="fp32")
    transformer = replace(forecast(cpu=AVX2), convolves=False)
    assert following([own(), fp32], transformer, 60.0, 60.0) == fp32
    assert transformer.speed(own()) < forecast(cpu=AVX2).speed(own())


def test_the_baselines_first_call_is_short_under_a_budget():
    assert baseline_batch(0.001, 16) == 16
    assert baseline_batch(0.07, 16) * 0.07 <= CALL_S
    assert baseline_batch(5.0, 16) == 1


def test_nothing_that_was_seen_is_no_error():
    bare = Forecast(cpu=AVX2, calibration=64, holdout=64, trials=(trial(BASELINE),))
    assert following(builds(AVX2), bare, 10.0, 10.0) in builds(AVX2)
    assert bare.best == 1.0


def test_a_short_budget_keeps_seconds_for_photos() -> None:
    assert WITH_PHOTOS.ending_before(None, 25.0) == WITH_PHOTOS
    assert WITH_PHOTOS.ending_before(600.0, 25.0) == WITH_PHOTOS
    short = WITH_PHOTOS.ending_before(100.0, 25.0).leaving(100.0, 18.0)
    assert (short.race, short.plans) == pytest.approx((0.75, 0.57))
    assert WITH_PHOTOS.ending_before(20.0, 25.0).race == pytest.approx(2 / 3)
