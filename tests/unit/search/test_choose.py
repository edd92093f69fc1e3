import dataclasses
from statistics import median

import pytest
from builders import requirements, said, text
from hypothesis import given
from hypothesis import strategies as st

from corewise.common.stats import ratio_interval
from corewise.records.build import Build, Plan
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import LoadRun, Measurement, Rates
from corewise.records.reason import ReasonKind
from corewise.records.trial import Fidelity, Trial
from corewise.search.choose import TIE, choose_winner, find_contradiction

EAGER = Build(engine="eager", precision="fp32")
OV_FP32 = Build(engine="openvino", precision="fp32")
OV_BF16 = Build(engine="openvino", precision="bf16")
OV_INT8 = Build(engine="openvino", precision="int8")
ORT_INT8 = Build(engine="onnxruntime", precision="int8")
ORT_DYNAMIC = Build(engine="onnxruntime", precision="int8-dynamic")
PLAN = Plan(threads_per_instance=2, batch=16)


def fidelity(sqnr_db=25.0, drop_high=0.009):
    return Fidelity(
        metric="top1",
        samples=300,
        baseline_value=0.92,
        value=0.917,
        drop=0.003,
        drop_low=-0.005,
        drop_high=drop_high,
        sqnr_db=sqnr_db,
        cosine=0.999,
        agreement=0.99,
    )


def trial(build, per_s=None, state="ok", reason="", throttled=0, **changes):
    measured = Measurement(
        plan=PLAN,
        latencies_ms=(1.0,) * 10,
        throughput_per_s=per_s or 1.0,
        p50_ms=1000 / (per_s or 1.0),
        p99_ms=1000 / (per_s or 1.0),
        spread=0.0,
        throttled=throttled,
    )
    measurements = (measured,) if per_s else ()
    return Trial(build=build, state=state, reason=text(reason), fidelity=fidelity(**changes), measurements=measurements)


def rates(build, per_s, jitter=(0, 0.4, -0.3, 0.1, -0.2, 0.3, -0.1, 0.2, 0)):
    return Rates(build=build, plan=PLAN, per_s=tuple(per_s * (1 + j / 100) for j in jitter))


def chosen(trials, finals, **objective):
    return choose_winner(trials, finals, requirements(**objective), EAGER)


def reasons(choice):
    return {loser.build: said(loser.reason) for loser in choice.losers}


def load(rate_per_s, in_time_share=1.0, *, certified=False):
    offered = 200
    in_time = int(offered * in_time_share)
    return LoadRun(
        plan=PLAN,
        rate_per_s=rate_per_s,
        clients=None,
        duration_s=5.0,
        offered=offered,
        answered=in_time,
        refused=offered - in_time,
        failed=0,
        in_time=in_time,
        p50_ms=10.0,
        p99_ms=90.0,
        refusal_p99_ms=0.1,
        slo_ms=100.0,
        certified=certified,
    )


def loaded(build, per_s, *loads):
    return dataclasses.replace(trial(build, per_s), loads=loads)


def test_under_an_slo_the_promised_rate_decides_and_what_each_held_is_told():
    trials = [
        loaded(EAGER, 16),
        loaded(OV_INT8, 80, load(50), load(45, certified=True)),
        loaded(ORT_INT8, 100, load(40), load(60, 0.9), load(36, certified=True)),
        loaded(OV_BF16, 50, load(30, 0.9)),
    ]
    finals = [rates(EAGER, 16), rates(OV_INT8, 80), rates(ORT_INT8, 100), rates(OV_BF16, 50)]
    choice = chosen(trials, finals, goal="slo", slo_ms=100.0)
    assert choice.winner == OV_INT8
    assert choice.certified.rate_per_s == 45
    assert "meets 45.0 requests/s with p99 <= 100 ms" in said(choice.reason)
    assert said(choice.reason).endswith("the baseline was not put under load, so no rate with p99 <= 100 ms is known")
    why = reasons(choice)
    assert why[ORT_INT8].startswith("meets 36.0 requests/s")
    assert why[OV_BF16] == "meets no rate with p99 <= 100 ms"


def test_a_lower_rate_that_was_held_later_is_no_promise():
    trials = [
        loaded(EAGER, 16),
        loaded(OV_INT8, 80, load(50), load(48)),
        loaded(ORT_INT8, 70, load(45, certified=True)),
    ]
    finals = [rates(EAGER, 16), rates(OV_INT8, 80), rates(ORT_INT8, 70)]
    choice = chosen(trials, finals, goal="slo", slo_ms=100.0)
    assert (choice.winner, choice.certified.rate_per_s) == (ORT_INT8, 45)


def test_an_slo_that_was_held_once_is_no_promise_and_is_told():
    trials = [loaded(EAGER, 16), loaded(OV_INT8, 80, load(50), load(45, 0.9))]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 80)], goal="slo", slo_ms=100.0)
    assert choice.certified is None
    assert "met 50.0 requests/s once, but no slightly lower rate afterwards" in said(choice.warnings[0])
    trials = [loaded(EAGER, 16), loaded(OV_INT8, 80, load(50, 0.5), load(30, 0.9))]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 80)], goal="slo", slo_ms=100.0)
    assert "answered 90 % of 30.0 requests/s in time" in said(choice.warnings[0])


def test_the_fastest_finalist_wins_and_each_other_trial_has_a_reason():
    trials = [
        trial(EAGER, 16),
        trial(OV_INT8, 100),
        trial(OV_BF16, 50),
        trial(ORT_INT8, 81),
        trial(OV_FP32, 25),
        trial(ORT_DYNAMIC, state="failed", reason="killed: out of memory"),
        trial(Build(engine="torch-int8", precision="int8"), state="pruned", reason="slower than the baseline"),
    ]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 100), rates(ORT_INT8, 80, (0,) * 9)])
    assert (choice.winner, choice.plan) == (OV_INT8, PLAN)
    assert choice.throughput_per_s == pytest.approx(100)
    assert choice.speedup == pytest.approx(100 / 16) == choice.speedup_low == choice.speedup_high
    assert said(choice.reason) == (
        "openvino/int8 wins: 100 items/s, 6.25x [6.25, 6.25] the baseline eager/fp32 in 9 alternating rounds"
    )
    assert choice.warnings == ()
    why = reasons(choice)
    assert why[ORT_INT8] == "0.80x [0.80, 0.80] of the winner in the race"
    assert why[EAGER] == "0.16x [0.16, 0.16] of the winner in the race"
    assert why[OV_BF16] == "not a finalist: 50.0 items/s in its trial against 100 items/s"
    assert why[ORT_DYNAMIC] == "killed: out of memory"
    assert choice.losers[-1].state == "pruned"
    assert from_json(type(choice), to_json(choice)) == choice


def test_no_faster_finalist_leaves_the_baseline():
    choice = chosen([trial(EAGER, 16), trial(OV_INT8, 12)], [rates(EAGER, 16), rates(OV_INT8, 12)])
    assert choice.winner == EAGER
    assert (choice.speedup, choice.speedup_low, choice.speedup_high) == (1, 1, 1)
    assert said(choice.reason) == "eager/fp32 wins: 16.0 items/s, and no finalist was faster"
    assert reasons(choice)[OV_INT8].startswith("0.75x")


def test_inaccurate_candidates_are_told_in_the_reason():
    trials = [
        trial(EAGER, 16),
        trial(OV_INT8, state="rejected", reason="drop 0.05 above 0.01"),
        trial(ORT_DYNAMIC, state="rejected", reason="drop 0.08 above 0.01"),
        trial(OV_BF16, 50),
    ]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_BF16, 50)])
    assert said(choice.reason).startswith("no int8 build was accurate enough; openvino/bf16 wins: 50.0 items/s, 3.12x")
    trials[3] = trial(OV_BF16, state="rejected", reason="drop 0.02 above 0.01")
    choice = chosen(trials, [rates(EAGER, 16)])
    assert said(choice.reason) == (
        "no int8 or bf16 build was accurate enough; eager/fp32 wins: 16.0 items/s, the only finalist"
    )
    trials[2] = trial(ORT_DYNAMIC, 60)
    choice = chosen(trials, [rates(EAGER, 16), rates(ORT_DYNAMIC, 60)])
    assert said(choice.reason).startswith("no bf16 build")


def test_a_tie_goes_to_the_more_accurate():
    up, down = (1.5, -1, 0.5, -1.5, 1, 0, -0.5, 0.8, -0.8), (-1.5, 1, -0.5, 1.5, -1, 0, 0.5, -0.8, 0.8)
    trials = [trial(EAGER, 16), trial(OV_BF16, 50), trial(OV_INT8, 51), trial(ORT_INT8, 51, sqnr_db=30.0)]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 50.3, up), rates(OV_BF16, 50, down)])
    assert choice.winner == OV_BF16
    assert "; as fast as openvino/int8 (0.99x [0.9" in said(choice.reason)
    assert said(choice.reason).endswith("of it) and more accurate")
    assert reasons(choice)[OV_INT8].endswith("of the winner in the race: as fast, but less accurate")
    by_noise = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 50.3, up), rates(ORT_INT8, 50, down)])
    assert by_noise.winner == ORT_INT8


def test_a_difference_that_the_run_can_tell_is_no_tie():
    choice = chosen(
        [trial(EAGER, 16), trial(OV_INT8), trial(OV_BF16)],
        [
            rates(EAGER, 16),
            rates(OV_INT8, 50.5),
            rates(OV_BF16, 50),
        ],
    )
    assert choice.winner == OV_INT8


def test_a_tie_with_the_baseline_keeps_the_baseline():
    up, down = (1.5, -1, 0.5, -1.5, 1, 0, -0.5, 0.8, -0.8), (-1.5, 1, -0.5, 1.5, -1, 0, 0.5, -0.8, 0.8)
    choice = chosen([trial(EAGER), trial(OV_INT8)], [rates(EAGER, 16, up), rates(OV_INT8, 16.1, down)])
    assert (choice.winner, choice.speedup) == (EAGER, 1)
    assert "the baseline; as fast as openvino/int8 (0.99x [" in said(choice.reason)


def test_what_did_not_pass_cannot_win_even_from_the_finals():
    trials = [trial(EAGER, 16), trial(OV_INT8, 100, state="rejected", reason="drop 0.05 above 0.01")]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 100)])
    assert choice.winner == EAGER
    assert reasons(choice) == {OV_INT8: "drop 0.05 above 0.01"}


def test_the_best_plan_of_a_build_counts():
    one = dataclasses.replace(rates(OV_INT8, 80), plan=Plan(threads_per_instance=1, instances=2, batch=1))
    choice = chosen([trial(EAGER), trial(OV_INT8)], [rates(EAGER, 16), rates(OV_INT8, 70), one])
    assert choice.plan == one.plan
    assert len(choice.losers) == 1


def test_latency_is_told_in_milliseconds():
    trials = [trial(EAGER, 16), trial(OV_INT8, 100), trial(OV_BF16, 50)]
    choice = chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 100)], goal="latency")
    assert said(choice.reason).startswith("openvino/int8 wins: 10.0 ms, 6.25x")
    assert reasons(choice)[OV_BF16] == "not a finalist: 20.0 ms in its trial against 10.0 ms"


def test_doubts_become_warnings():
    trials = [trial(EAGER, 16, throttled=2), trial(OV_INT8, 17, drop_high=0.03), trial(OV_BF16)]
    finals = [rates(EAGER, 16, (0,) * 5), rates(OV_INT8, 17, (0, 30, -25, 4, -20))]
    uncertain, rounds, speedup, noisy, throttled = map(said, chosen(trials, finals).warnings)
    assert uncertain.startswith("a holdout of 300 is too small to show whether the drop is within 0.01; about ")
    assert rounds == "only 5 alternating rounds: a 95 % interval of the speed-up needs 6"
    assert speedup == "the interval of the speed-up contains 1: the winner may be no faster than the baseline"
    assert noisy.startswith("openvino/int8: noisy")
    assert throttled.startswith("eager/fp32: throttled 2 times")


def test_a_race_that_contradicts_the_trials_is_told():
    trials = [trial(EAGER, 16), trial(OV_INT8, 58)]
    agreeing, denied = (
        find_contradiction(trials, [rates(EAGER, 16), rates(OV_INT8, per_s)], requirements(), EAGER)
        for per_s in (70, 800)
    )
    assert agreeing is None
    assert denied.kind == ReasonKind.RACE_CONTRADICTS
    assert denied in chosen(trials, [rates(EAGER, 16), rates(OV_INT8, 800)]).warnings
    assert "50.0x [" in said(denied)
    assert "3.62x [" in said(denied)
    assert "the budget left no time for a second race" in said(denied)
    twice = choose_winner(trials, [rates(EAGER, 16), rates(OV_INT8, 800)], requirements(), EAGER, races=2)
    assert "in a second race too" in said(twice.warnings[0])
    noisy = [trial(EAGER, 16), dataclasses.replace(trials[1], measurements=(spread(trials[1].measurements[0], 2.0),))]
    assert find_contradiction(noisy, [rates(EAGER, 16), rates(OV_INT8, 100)], requirements(), EAGER) is None
    assert find_contradiction(trials[:1], [rates(EAGER, 16)], requirements(), EAGER) is None


def spread(measurement, value):
    """A measurement on a noisy machine."""
    return dataclasses.replace(measurement, spread=value)


def test_an_ok_trial_that_was_never_measured_says_so():
    choice = chosen([trial(EAGER, 16), trial(OV_BF16)], [rates(EAGER, 16)])
    assert reasons(choice)[OV_BF16] == "not a finalist: its speed was not measured"


def test_finals_without_the_baseline_are_a_bug():
    with pytest.raises(ValueError, match="baseline eager/fp32 is not among the finals"):
        chosen([trial(EAGER, 16), trial(OV_INT8)], [rates(OV_INT8, 100)])


BUILDS = (EAGER, OV_FP32, OV_BF16, OV_INT8, ORT_INT8, ORT_DYNAMIC)


@st.composite
def contests(draw):
    """Trials in any states, and an alternating run of some of them with the baseline."""
    states = {EAGER: "ok"} | {b: draw(st.sampled_from(["ok", "failed", "rejected", "pruned"])) for b in BUILDS[1:]}
    trials = [
        trial(build, draw(st.none() | st.floats(1, 500)), state, f"{state}: as it was", sqnr_db=draw(st.floats(0, 60)))
        for build, state in states.items()
    ]
    rounds = draw(st.integers(1, 9))
    per_s = st.lists(st.floats(1, 200) | st.floats(99, 101), min_size=rounds, max_size=rounds)
    finalists = [EAGER, *draw(st.lists(st.sampled_from(BUILDS[1:]), unique=True))]
    finals = [Rates(build=build, plan=PLAN, per_s=tuple(draw(per_s))) for build in finalists]
    return draw(st.permutations(trials)), draw(st.permutations(finals))


@given(contests(), st.sampled_from(["throughput", "latency"]))
def test_the_choice_is_sound_whatever_happened(contest, goal):
    trials, finals = contest
    choice = choose_winner(trials, finals, requirements(goal=goal), EAGER)
    state = {t.build: t.state for t in trials}
    per_s = {r.build: r.per_s for r in finals}

    assert state[choice.winner] == "ok"
    assert choice.throughput_per_s == median(per_s[choice.winner])
    assert choice.baseline_throughput_per_s == median(per_s[EAGER])
    assert choice.throughput_per_s >= choice.baseline_throughput_per_s
    assert choice.speedup_low <= choice.speedup <= choice.speedup_high
    assert choice.speedup > 1 if choice.winner != EAGER else choice.speedup == 1

    faster = [b for b in per_s if state[b] == "ok" and ratio_interval(per_s[b], per_s[EAGER]).value > 1]
    fastest = max(faster, key=lambda build: median(per_s[build]), default=EAGER)
    if median(per_s[fastest]) > choice.throughput_per_s:
        assert ratio_interval(per_s[choice.winner], per_s[fastest]).value >= TIE
        assert said(choice.reason).endswith("and more accurate")

    assert sorted(loser.build.label for loser in choice.losers) == sorted(
        {b.label for b in BUILDS} - {choice.winner.label}
    )
    for loser in choice.losers:
        assert loser.state == state[loser.build]
        assert loser.reason
        if loser.state != "ok":
            assert said(loser.reason) == f"{loser.state}: as it was"
        elif loser.build in per_s:
            ratio = ratio_interval(per_s[loser.build], per_s[choice.winner])
            assert loser.reason.details == {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}


@given(contests())
def test_the_order_of_trials_and_finals_does_not_matter(contest):
    trials, finals = contest
    there = choose_winner(trials, finals, requirements(), EAGER)
    back = choose_winner(trials[::-1], finals[::-1], requirements(), EAGER)
    assert sorted(there.losers, key=lambda loser: loser.build.label) == sorted(
        back.losers, key=lambda loser: loser.build.label
    )
    assert dataclasses.replace(there, losers=()) == dataclasses.replace(back, losers=())


def test_a_baseline_that_exceeds_the_memory_limit_gives_way_to_a_slower_build_that_does_not():
    rejected = "2 threads x 1, batch 16 needs 500 MB of memory, more than 300 MB"
    large = trial(EAGER, 100)
    large = dataclasses.replace(
        large, measurements=tuple(dataclasses.replace(one, rejected=text(rejected)) for one in large.measurements)
    )
    limit = 300_000_000
    choice = chosen([large, trial(OV_FP32, 95)], [rates(EAGER, 100), rates(OV_FP32, 95)], memory_limit_bytes=limit)
    assert choice.winner == OV_FP32
    assert reasons(choice)[EAGER] == rejected
    assert not any("no build fits" in said(warning) for warning in choice.warnings)
    alone = chosen([large], [rates(EAGER, 100)], memory_limit_bytes=limit)
    assert alone.winner == EAGER
    assert "no build fits in 300 MB" in said(alone.warnings[0])
