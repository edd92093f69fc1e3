"""search: int8 builds that the gate rejects, plans, budgets and memory limits.

Trials have real children where memory or an engine of the user's is looked at, and run in this process elsewhere.
"""

from dataclasses import replace

import numpy as np
import pytest
from builders import requirements, said, text
from trial_folder import fill, make_context

from corewise.common.stats import MIN_ROUNDS
from corewise.engines.fake import Fake
from corewise.engines.qdq import first_rung
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, Plan
from corewise.records.goal import Throughput
from corewise.records.reason import ReasonKind
from corewise.records.report import Choice
from corewise.runtime.race import run_race
from corewise.runtime.workspace import Workspace
from corewise.samples import from_python
from corewise.search.budget import Budget
from corewise.search.candidates import with_reverted_layers
from corewise.search.finals import race_finalists
from corewise.search.journal import Journal
from corewise.search.plans import NEAR
from corewise.search.search import Search
from corewise.search.trial import run_trial
from corewise.testing.engines import Layered

SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)))
LAYERED = "corewise.testing.engines:Layered"


def layered(noise, *options):
    return Build(engine=LAYERED, precision="int8", options=tuple(sorted((("noise", noise), *options))))


def ours(noise):
    return layered(noise, ("quantizer", "corewise"))


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.search.trial.MEASURE_S", 0.05)
    monkeypatch.setattr("corewise.search.trial.HOPELESS", 0.0)  # on a busy machine any build may look hopelessly slow
    return make_context(fill(tmp_path, SAMPLES), max_drop=0.05, in_process=Layered())


def path_of(context, *builds):
    """The builds' trials after a reference in fp32, and those that ``revert_layers`` added."""
    with Journal(context.workspace.journal, "key") as journal:
        run_trial(Build(engine=LAYERED, precision="fp32"), context, is_baseline=True)
        trials = [run_trial(build, context) for build in builds]
        search = searching(context, journal, trials)
        search.revert_layers()
        return trials, tuple(search.trials[len(trials) :])


def searching(context, journal, trials):
    """A search that has these trials already."""
    search = Search([trial.build for trial in trials], None, context, journal)
    search.trials = list(trials)
    return search


def test_layers_go_back_until_the_gate_passes(context):
    trials, added = path_of(context, ours(8.0))
    assert trials[0].state == "rejected"
    assert [trial.build for trial in added] == [with_reverted_layers(ours(8.0), count) for count in (1, 2, 4)]
    assert [trial.state for trial in added] == ["rejected", "rejected", "ok"]
    assert added[-1].receipt.words == "int8: 12 of 16 convolutions and linears, 0 fell back"


def test_rungs_are_climbed_while_the_gate_rejects(context):
    reference, first = Build(engine=LAYERED, precision="fp32"), first_rung(ours(0.002))
    twin = first_rung(layered(0.002, ("quantizer", "corewise"), ("rest", "bf16")))
    with Journal(context.workspace.journal, "key") as journal:
        search = Search([reference, first, twin], None, context, journal)
        search.try_builds()
        search.revert_layers()
    _, *climbing, twins = search.trials
    assert [trial.build.quantization.rung for trial in climbing] == list(range(len(climbing)))
    assert len(climbing) > 1
    assert [trial.state for trial in climbing] == [*["rejected"] * (len(climbing) - 1), "ok"]
    assert twins.state == "ok"
    assert twins.build.quantization.rung == climbing[-1].build.quantization.rung


def test_the_path_ends_when_half_of_the_layers_are_back(context):
    _, added = path_of(context, ours(1e9))
    assert [trial.build.quantization.reverted_layers for trial in added] == [1, 2, 4, 8]
    assert {trial.state for trial in added} == {"rejected"}


def test_nothing_goes_back_where_another_int8_build_of_the_engine_passed(context):
    trials, added = path_of(context, ours(8.0), layered(0.0))
    assert [trial.state for trial in trials] == ["rejected", "ok"]
    assert added == ()


def test_only_our_quantizer_gives_layers_back(context):
    trials, added = path_of(context, layered(8.0))
    assert trials[0].state == "rejected"
    assert added == ()


# --- plans ----------------------------------------------------------------------------------------------------------

FAKE = Fake()
LAYOUTS = (ThreadLayout(2, 1), ThreadLayout(1, 2))
THROUGHPUT = requirements("throughput")


def fake(**options):
    return Build(engine="fake", precision="int8", options=tuple(sorted(options.items())))


def tuned(context, *builds, limits=THROUGHPUT, calls_ms=()):
    """The builds' trials with their plans searched, as if their first calls had taken ``calls_ms``."""
    context = replace(context, requirements=limits)
    with Journal(context.workspace.journal, "key") as journal:
        trials = [run_trial(build, context, is_baseline=True) for build in builds]
        if calls_ms:
            trials = [timed(trial, ms) for trial, ms in zip(trials, calls_ms, strict=True)]
        search = searching(context, journal, trials)
        search.tune_plans()
        return tuple(search.trials)


def timed(trial, ms):
    """The trial as if each of its calls had taken so long."""
    (first,) = trial.measurements
    per_s = 1e3 * first.plan.batch / ms
    return replace(
        trial, measurements=(replace(first, latencies_ms=(ms,) * 5, throughput_per_s=per_s, p50_ms=ms, p99_ms=ms),)
    )


def context_with(tmp_path, *, in_process=FAKE, **options):
    return make_context(
        Workspace(tmp_path),
        max_drop=0.05,
        plan=Plan(threads_per_instance=2, batch=16),
        layouts=lambda build: LAYOUTS,
        in_process=in_process,
        **options,
    )


def test_plans_are_searched_and_every_one_has_its_reason(context, tmp_path):
    context = context_with(tmp_path, in_process=None)
    # Hardly anything divides among threads, so two instances of one thread do twice as much; and a call of twice the
    # batch takes hardly longer. A busy machine does not change that.
    (found,) = tuned(context, fake(seconds_per_call=0.03, seconds_per_item=0.0003, serial=1.0))
    best = Throughput().best(found)
    assert (best.plan.threads_per_instance, best.plan.instances) == (1, 2)
    assert best.plan.batch >= 32
    assert {(2, 1), (1, 2)} <= {(m.plan.threads_per_instance, m.plan.instances) for m in found.measurements}
    assert all(measured.why for measured in found.measurements)
    assert said(found.tuned).startswith(f"{best.plan.label} is the fastest plan tried")
    assert best.memory_bytes > 20e6


def test_builds_that_are_much_slower_are_not_searched_and_are_told_why(context, tmp_path):
    fast, slow = tuned(
        context_with(tmp_path), fake(seconds_per_call=0.01), fake(seconds_per_call=0.011), calls_ms=(10.0, 100.0)
    )
    assert len(fast.measurements) > 1
    assert len(slow.measurements) == 1
    assert said(slow.tuned).startswith("its plans were not searched: ")
    assert "/s under 2 threads x 1, batch 16 against " in said(slow.tuned)


def test_a_search_that_was_finished_is_read_from_the_journal(context, tmp_path):
    context, build = context_with(tmp_path), fake(seconds_per_call=0.01)
    (first,) = tuned(context, build)
    with Journal(context.workspace.journal, "key") as journal:
        kept = journal.get(build)
        assert kept == first
        search = searching(context, journal, [kept])
        search.tune_plans()
        assert search.trials == [first]


def test_a_spent_budget_ends_the_search_and_is_not_kept(context, tmp_path):
    clock = iter(range(0, 1000, 3))
    context = context_with(tmp_path, budget=Budget(total_s=15.0, clock=lambda: float(next(clock)), started_s=0.0))
    (found,) = tuned(context, fake(seconds_per_call=0.01))
    assert said(found.tuned) == "the budget of 15 s was spent"
    assert 1 <= len(found.measurements) < 8
    with Journal(context.workspace.journal, "key") as journal:
        assert journal.get(found.build) is None


def test_plans_over_the_memory_limit_are_no_choice(context, tmp_path):
    tight = requirements("throughput", memory_limit_bytes=10**6)
    (found,) = tuned(context_with(tmp_path, in_process=None), fake(seconds_per_call=0.01), limits=tight)
    assert found.state == "rejected"
    assert Throughput().best(found) is None
    assert "MB of memory, more than 1 MB" in said(found.reason)
    roomy = requirements("throughput", memory_limit_bytes=10**12)
    (found,) = tuned(context_with(tmp_path), fake(seconds_per_call=0.01), limits=roomy)
    assert found.state == "ok"


def test_a_build_whose_memory_is_not_known_is_no_choice_under_a_limit(context, tmp_path):
    roomy = requirements("throughput", memory_limit_bytes=10**12)
    fast, slow = tuned(
        context_with(tmp_path),
        fake(seconds_per_call=0.01),
        fake(seconds_per_call=0.011),
        limits=roomy,
        calls_ms=(10.0, 100.0),
    )
    assert Throughput().best(fast) is not None
    assert Throughput().best(slow) is None
    assert said(slow.measurements[0].rejected).startswith("its memory is not known: its plans were not searched")


HEAVY = """
from corewise.engines.fake import Fake

BALLAST = b"x" * 400_000_000

class Heavy(Fake):
    pass
"""


def test_a_build_that_does_not_fit_makes_room_for_a_slower_one_that_does(context, tmp_path, monkeypatch):
    (tmp_path / "heavy_engines.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(tmp_path)
    heavy = Build(engine="heavy_engines:Heavy", precision="int8", options=(("seconds_per_call", 0.01),))
    limit = requirements("throughput", memory_limit_bytes=400_000_000)
    fast, slow = tuned(context_with(tmp_path, in_process=None), heavy, fake(seconds_per_call=0.05), limits=limit)
    assert fast.state == "rejected"
    assert slow.state == "ok"
    assert Throughput().best(slow) is not None


PICKY = """
from corewise.engines.fake import Fake
from corewise.common.errors import EngineError

class Picky(Fake):
    def open(self, folder, build, plan):
        if plan.instances > 1 or plan.batch == 8:
            raise EngineError(f"no {plan.label} here", "try another")
        return super().open(folder, build, plan)
"""


def test_plans_that_do_not_run_do_not_end_the_search(context, tmp_path, monkeypatch):
    (tmp_path / "picky_engines.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    build = Build(engine="picky_engines:Picky", precision="int8", options=(("seconds_per_call", 0.01),))
    (found,) = tuned(context_with(tmp_path, in_process=None), build)
    plans = {one.plan for one in found.measurements}
    assert {(plan.instances, plan.batch) for plan in plans} >= {(1, 16), (1, 32)}
    assert not any(plan.instances > 1 or plan.batch == 8 for plan in plans)
    assert {one.plan.label for one in found.failed_plans} >= {"1 thread x 2, batch 16"}
    assert "no 1 thread x 2, batch 16 here" in said(found.failed_plans[0].reason)
    assert found.state == "ok"


def test_the_winners_latency_table_has_the_small_batches(context, tmp_path):
    context = context_with(tmp_path)
    build = fake(seconds_per_call=0.02)
    first = run_trial(build, context, is_baseline=True)
    plan = first.measurements[0].plan
    choice = Choice(
        winner=build,
        plan=plan,
        throughput_per_s=1.0,
        baseline_throughput_per_s=1.0,
        speedup=1.0,
        speedup_low=1.0,
        speedup_high=1.0,
        reason=text(),
        losers=(),
        warnings=(),
    )
    spent = replace(context, budget=Budget(total_s=1e-3))
    for each, batches in ((context, [1, 2, 4, 8, 16]), (spent, [1, 16])):
        search = searching(each, None, [first])
        search._complete_latency_table(choice)
        assert sorted(one.plan.batch for one in search.trials[0].measurements) == batches


def test_the_best_build_races_with_its_best_plans(context, tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    monkeypatch.setitem(run_race.__kwdefaults__, "round_s", 0.05)
    monkeypatch.setattr("corewise.search.finals.ROUNDS", 6)
    context = context_with(tmp_path)
    trials = tuned(context, fake(seconds_per_call=0.02), fake(seconds_per_call=0.01, seconds_per_item=0.0005))
    trials, run = race_finalists(trials, context)
    raced = [(rates.build, rates.plan) for rates in run.rates]
    assert len(set(raced)) == len(raced)
    near = [
        one
        for one in trials[1].measurements
        if one.throughput_per_s > NEAR * Throughput().best(trials[1]).throughput_per_s
    ]
    assert len([build for build, _ in raced if build == trials[1].build]) == min(3, len(near))
    assert raced[0][0] == trials[0].build
    assert {len(rates.per_s) for rates in run.rates} == {6}


@pytest.mark.parametrize(("total_s", "allowed_s"), [(20.0, 45.0), (100.0, 150.0)])
def test_a_slow_baseline_leaves_time_for_a_first_build(context, total_s, allowed_s):
    baseline = run_trial(Build(engine="eager", precision="fp32"), context, is_baseline=True)
    build = fake(seconds_per_call=0.001)
    for elapsed_s, kind in ((allowed_s - 1, None), (allowed_s + 1, ReasonKind.BUDGET_SPENT_BEFORE)):
        budget = Budget(total_s=total_s, clock=lambda: elapsed_s, started_s=0.0)  # noqa: B023 - used at once
        search = searching(replace(context, budget=budget), None, [baseline])
        why_not = search._why_not_tried(build, [build])
        assert (why_not and why_not.kind) == kind


def test_a_race_without_time_has_the_baseline_and_the_best_plan(context, tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    monkeypatch.setitem(run_race.__kwdefaults__, "round_s", 0.05)
    context = context_with(tmp_path)
    trials = tuned(context, fake(seconds_per_call=0.02), fake(seconds_per_call=0.01, seconds_per_item=0.0005))
    spent = replace(context, budget=Budget(total_s=1e-3))
    _, run = race_finalists(trials, spent)
    best = Throughput().best(trials[1])
    assert [(rates.build, rates.plan) for rates in run.rates][1:] == [(trials[1].build, best.plan)]
    assert run.rates[0].build == trials[0].build
    assert {len(rates.per_s) for rates in run.rates} == {MIN_ROUNDS}


def test_a_race_that_contradicts_the_trials_is_run_again_only_if_the_budget_has_time(context, tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    monkeypatch.setitem(run_race.__kwdefaults__, "round_s", 0.05)
    monkeypatch.setattr("corewise.search.finals.ROUNDS", 6)
    monkeypatch.setattr("corewise.search.search.find_contradiction", lambda *of: text("they differ"))
    context = context_with(tmp_path)
    trials = tuned(context, fake(seconds_per_call=0.02), fake(seconds_per_call=0.01))
    with Journal(context.workspace.journal, "key") as journal:
        for total_s, races in ((None, 2), (1e-3, 1)):
            search = searching(replace(context, budget=Budget(total_s=total_s)), journal, trials)
            search.race()
            assert search.races == races
