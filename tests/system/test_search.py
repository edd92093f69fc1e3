"""search: int8 builds that the gate rejects, plans, budgets and memory limits, with real children."""

from dataclasses import replace

import numpy as np
import pytest
from trial_folder import fill, make_setting

from corewise.records.build import Build, Plan
from corewise.records.goal import Objective
from corewise.records.report import Choice
from corewise.samples import from_python
from corewise.search.budget import Budget
from corewise.search.candidates import returning
from corewise.search.journal import Journal
from corewise.search.plans import NEAR
from corewise.search.stages import explore, finals, revert_layers, with_latency_table
from corewise.search.trial import run_trial

SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)))
LAYERED = "corewise.testing.engines:Layered"


def layered(noise, *options):
    return Build(engine=LAYERED, precision="int8", options=tuple(sorted((("noise", noise), *options))))


def ours(noise):
    return layered(noise, ("quantizer", "corewise"))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.search.trial.MEASURE_S", 0.05)
    fill(tmp_path, SAMPLES)
    return make_setting(tmp_path, max_drop=0.05)


def path_of(setting, *builds):
    """The builds' trials after a reference in fp32, and those that ``revert_layers`` added."""
    with Journal(setting.folder / "journal.jsonl", "key") as journal:
        run_trial(Build(engine=LAYERED, precision="fp32"), setting, is_baseline=True)
        trials = tuple(run_trial(build, setting) for build in builds)
        return trials, revert_layers(trials, setting, journal)[len(trials) :]


def test_layers_go_back_until_the_gate_passes(setting):
    trials, added = path_of(setting, ours(8.0))
    assert trials[0].state == "rejected"
    assert [trial.build for trial in added] == [returning(ours(8.0), count) for count in (1, 2, 4)]
    assert [trial.state for trial in added] == ["rejected", "rejected", "ok"]
    assert added[-1].receipt.words == "int8: 12 of 16 convolutions and linears, 0 fell back"


def test_the_path_ends_when_half_of_the_layers_are_back(setting):
    _, added = path_of(setting, ours(1e9))
    assert [trial.build.quantization.reverted_layers for trial in added] == [1, 2, 4, 8]
    assert {trial.state for trial in added} == {"rejected"}


def test_nothing_goes_back_where_another_int8_build_of_the_engine_passed(setting):
    trials, added = path_of(setting, ours(8.0), layered(0.0))
    assert [trial.state for trial in trials] == ["rejected", "ok"]
    assert added == ()


def test_only_our_quantizer_gives_layers_back(setting):
    trials, added = path_of(setting, layered(8.0))
    assert trials[0].state == "rejected"
    assert added == ()


# --- plans ----------------------------------------------------------------------------------------------------------

SHAPES = ((2, 1), (1, 2))
THROUGHPUT = Objective(goal="throughput")


def fake(**options):
    return Build(engine="fake", precision="int8", options=tuple(sorted(options.items())))


def explored(setting, *builds, objective=THROUGHPUT):
    """The builds' trials with their plans searched."""
    with Journal(setting.folder / "journal.jsonl", "key") as journal:
        trials = [run_trial(build, setting, is_baseline=True) for build in builds]
        return explore(trials, setting, journal, objective)


def setting_with(tmp_path, **options):
    return make_setting(
        tmp_path, max_drop=0.05, plan=Plan(threads_per_instance=2, batch=16), shapes=lambda build: SHAPES, **options
    )


def test_plans_are_searched_and_every_one_has_its_reason(setting, tmp_path):
    setting = setting_with(tmp_path)
    # Half of an item's time does not divide among threads, so two instances of one thread do most.
    (found,) = explored(setting, fake(seconds_per_call=0.01, seconds_per_item=0.001, serial=0.5))
    best = found.best("throughput")
    assert (best.plan.threads_per_instance, best.plan.instances) == (1, 2)
    assert best.plan.batch >= 32
    assert {(2, 1), (1, 2)} <= {(m.plan.threads_per_instance, m.plan.instances) for m in found.measurements}
    assert all(measured.why for measured in found.measurements)
    assert found.explored.startswith(f"{best.plan.label} is the fastest of what was tried")
    assert best.memory_bytes > 20e6


def test_builds_that_are_much_slower_are_not_searched_and_are_told_why(setting, tmp_path):
    fast, slow = explored(
        setting_with(tmp_path), fake(seconds_per_call=0.01), fake(seconds_per_call=0.1, seconds_per_item=0.001)
    )
    assert len(fast.measurements) > 1
    assert len(slow.measurements) == 1
    assert slow.explored.startswith("its plans were not searched: ")
    assert "/s under 2 threads x 1, batch 16 against " in slow.explored


def test_a_search_that_was_finished_is_read_from_the_journal(setting, tmp_path):
    setting, build = setting_with(tmp_path), fake(seconds_per_call=0.01)
    (first,) = explored(setting, build)
    with Journal(setting.folder / "journal.jsonl", "key") as journal:
        kept = journal.get(build)
        assert kept == first
        assert explore([kept], setting, journal, THROUGHPUT) == (first,)


def test_a_spent_budget_ends_the_search_and_is_not_kept(setting, tmp_path):
    clock = iter(range(0, 1000, 3))
    setting = setting_with(tmp_path, budget=Budget(total_s=15.0, clock=lambda: float(next(clock)), started_s=0.0))
    (found,) = explored(setting, fake(seconds_per_call=0.01))
    assert found.explored == "the budget of 15 s was spent"
    assert 1 <= len(found.measurements) < 8
    with Journal(setting.folder / "journal.jsonl", "key") as journal:
        assert journal.get(found.build) is None


def test_plans_over_the_memory_limit_are_no_choice(setting, tmp_path):
    tight = Objective(goal="throughput", memory_limit_bytes=10**6)
    (found,) = explored(setting_with(tmp_path), fake(seconds_per_call=0.01), objective=tight)
    assert found.state == "rejected"
    assert found.best("throughput") is None
    assert "MB of memory, more than 1 MB" in found.reason
    roomy = Objective(goal="throughput", memory_limit_bytes=10**12)
    (found,) = explored(setting_with(tmp_path), fake(seconds_per_call=0.01), objective=roomy)
    assert found.state == "ok"


def test_a_build_whose_memory_is_not_known_is_no_choice_under_a_limit(setting, tmp_path):
    roomy = Objective(goal="throughput", memory_limit_bytes=10**12)
    fast, slow = explored(
        setting_with(tmp_path),
        fake(seconds_per_call=0.01),
        fake(seconds_per_call=0.1, seconds_per_item=0.001),
        objective=roomy,
    )
    assert fast.best("throughput") is not None
    assert slow.best("throughput") is None
    assert slow.measurements[0].rejected.startswith("its memory is not known: its plans were not searched")


HEAVY = """
from corewise.engines.fake import Fake

BALLAST = b"x" * 400_000_000

class Heavy(Fake):
    pass
"""


def test_a_build_that_does_not_fit_makes_room_for_a_slower_one_that_does(setting, tmp_path, monkeypatch):
    (tmp_path / "heavy_engines.py").write_text(HEAVY)
    monkeypatch.syspath_prepend(tmp_path)
    heavy = Build(engine="heavy_engines:Heavy", precision="int8", options=(("seconds_per_call", 0.01),))
    limit = Objective(goal="throughput", memory_limit_bytes=400_000_000)
    fast, slow = explored(setting_with(tmp_path), heavy, fake(seconds_per_call=0.05), objective=limit)
    assert fast.state == "rejected"
    assert slow.state == "ok"
    assert slow.best("throughput") is not None


PICKY = """
from corewise.engines.fake import Fake
from corewise.common.errors import EngineError

class Picky(Fake):
    def open(self, folder, build, plan):
        if plan.instances > 1 or plan.batch == 8:
            raise EngineError(f"no {plan.label} here", "try another")
        return super().open(folder, build, plan)
"""


def test_plans_that_do_not_run_do_not_end_the_search(setting, tmp_path, monkeypatch):
    (tmp_path / "picky_engines.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    build = Build(engine="picky_engines:Picky", precision="int8", options=(("seconds_per_call", 0.01),))
    (found,) = explored(setting_with(tmp_path), build)
    plans = {one.plan for one in found.measurements}
    assert {(plan.instances, plan.batch) for plan in plans} >= {(1, 16), (1, 32)}
    assert not any(plan.instances > 1 or plan.batch == 8 for plan in plans)
    assert "plans did not run, 1 thread x 2, batch 16: " in found.explored
    assert "no 1 thread x 2, batch 16 here" in found.explored
    assert found.state == "ok"


def test_the_winners_latency_table_has_the_small_batches(setting, tmp_path):
    setting = setting_with(tmp_path)
    build = fake(seconds_per_call=0.02)
    first = run_trial(build, setting, is_baseline=True)
    plan = first.measurements[0].plan
    choice = Choice(
        winner=build,
        plan=plan,
        throughput_per_s=1.0,
        baseline_throughput_per_s=1.0,
        speedup=1.0,
        speedup_low=1.0,
        speedup_high=1.0,
        reason="",
        losers=(),
        warnings=(),
    )
    (found,) = with_latency_table([first], choice, setting)
    assert sorted(one.plan.batch for one in found.measurements) == [1, 2, 4, 8, 16]
    spent = replace(setting, budget=Budget(total_s=1e-3))
    (found,) = with_latency_table([first], choice, spent)
    assert sorted(one.plan.batch for one in found.measurements) == [1, 16]


def test_the_best_build_races_with_its_best_plans(setting, tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    monkeypatch.setattr("corewise.search.stages.ROUNDS", 6)
    setting = setting_with(tmp_path)
    trials = explored(setting, fake(seconds_per_call=0.02), fake(seconds_per_call=0.01, seconds_per_item=0.0005))
    trials, run = finals(trials, setting, THROUGHPUT)
    raced = [(rates.build, rates.plan) for rates in run.rates]
    assert len(set(raced)) == len(raced)
    near = [
        one
        for one in trials[1].measurements
        if one.throughput_per_s > NEAR * trials[1].best("throughput").throughput_per_s
    ]
    assert len([build for build, _ in raced if build == trials[1].build]) == min(3, len(near))
    assert raced[0][0] == trials[0].build
    assert {len(rates.per_s) for rates in run.rates} == {6}
