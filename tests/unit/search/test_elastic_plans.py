"""elastic plans: which two layouts are open, what is measured for them, and whether they pay."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from builders import load_run, requirements, said, trial

from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import ReasonKind
from corewise.records.tuned import Machine, Retuned, Tuned
from corewise.report.lines import elasticity_lines, retuned_lines
from corewise.report.words import loaded
from corewise.runtime.workspace import Workspace
from corewise.search import retuning, slo
from corewise.search.budget import Budget
from corewise.search.elastic import (
    DUEL_S,
    FEW_BATCHES,
    NEEDED,
    SHORTEST_DUEL_S,
    affordable_duel_s,
    elastic_plan,
    elasticity,
    judge_elastic,
    plans_to_measure,
)
from corewise.search.trial import SearchContext

WIDE = Plan(threads_per_instance=2, batch=4)
NARROW = Plan(threads_per_instance=1, instances=2, batch=4)


def measured(plan, p50_ms=1.0):
    per_s = 1e3 * plan.batch * plan.instances / p50_ms
    return Measurement(
        plan=plan, latencies_ms=(p50_ms,), throughput_per_s=per_s, p50_ms=p50_ms, p99_ms=p50_ms, spread=0.0
    )


def rows(plan, *ms, **changes):
    """Measurements of batches 1, 2, 4, ..."""
    return [replace(measured(replace(plan, batch=2**k), one), **changes) for k, one in enumerate(ms)]


SCALES = [*rows(WIDE, 2.4, 4.5, 8.8), *rows(NARROW, 4.0, 7.5, 14.5)]
"""A second core makes one call 1.67 times as fast."""
DOES_NOT = [*rows(WIDE, 3.95, 7.4, 14.4), *rows(NARROW, 4.0, 7.5, 14.5)]


def test_beside_instances_there_is_one_with_all_their_threads():
    found = elastic_plan(Plan(threads_per_instance=2, instances=4, batch=16), [])
    assert found.wide == Plan(threads_per_instance=8, batch=16)
    assert found.narrow == Plan(threads_per_instance=2, instances=4, batch=16)


def test_beside_one_instance_there_is_the_fastest_division_that_was_measured_or_one_thread_each():
    alone = Plan(threads_per_instance=4)
    two, four = Plan(threads_per_instance=2, instances=2), Plan(threads_per_instance=1, instances=4)
    assert elastic_plan(alone, [measured(two, 2.0), measured(four, 5.0)]).narrow == replace(two, batch=64)
    assert elastic_plan(alone, [measured(two, 4.0)]).narrow == replace(two, batch=16), "64 rows would take too long"
    assert elastic_plan(alone, [measured(two, 4.0)], fixed_batch=8).narrow == replace(two, batch=8)
    assert elastic_plan(alone, [measured(alone)]).narrow == replace(four, batch=64)
    assert elastic_plan(alone, []).wide == replace(alone, batch=16)


def test_one_thread_is_not_divided():
    assert elastic_plan(Plan(threads_per_instance=1, batch=8), []) is None


def test_what_its_tables_lack_is_measured_single_rows_first():
    elastic = elastic_plan(replace(NARROW, batch=6), [])
    wanted = plans_to_measure(elastic, rows(NARROW, 4.0, 7.5))
    assert wanted == [
        replace(WIDE, batch=1),
        replace(WIDE, batch=2),
        replace(WIDE, batch=4),
        NARROW,
        replace(WIDE, batch=6),
        replace(NARROW, batch=6),
    ]


@pytest.mark.parametrize("plan", [WIDE, NARROW])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_it_pays_where_a_call_gains_by_threads_and_a_crowd_by_instances(plan, objective):
    found = elasticity(plan, elastic_plan(plan, SCALES), SCALES, requirements(objective))
    assert found.pays
    idle, *_, busy = found.curve
    assert idle.p50_ms == pytest.approx((2.4, 2.4, 4.0))
    assert busy.p50_ms[0] <= 1.05 * min(busy.p50_ms)
    assert found.saturated_per_s[0] == pytest.approx(max(found.saturated_per_s))


def test_it_does_not_pay_where_both_layouts_are_alike_or_the_memory_is_not_there():
    elastic = elastic_plan(NARROW, DOES_NOT)
    assert not elasticity(NARROW, elastic, DOES_NOT, requirements()).pays
    large = [replace(one, memory_bytes=600) for one in SCALES]
    assert elasticity(NARROW, elastic, large, requirements()).memory_bytes == 1200
    assert not elasticity(NARROW, elastic, large, requirements(memory_limit_bytes=1000)).pays
    assert elasticity(NARROW, elastic, large, requirements(memory_limit_bytes=1200)).pays


def test_without_single_rows_of_both_layouts_nothing_is_judged():
    elastic = elastic_plan(NARROW, [])
    assert elasticity(NARROW, elastic, SCALES[:3], requirements()) is None
    assert elasticity(NARROW, elastic, SCALES[1:], requirements()) is None


def test_the_words_tell_latency_over_load_and_the_verdict():
    elastic = elastic_plan(NARROW, SCALES)
    lines = elasticity_lines(elasticity(NARROW, elastic, SCALES, requirements()))
    assert lines[0].split("  ")[0] == "simulated p50 of requests"
    assert lines[0].endswith("elastic     2 threads x 1      1 thread x 2")
    assert lines[1].split()[-6:] == ["2.40", "ms", "2.40", "ms", "4.00", "ms"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == f"both are opened, {elastic.label}: a call that is alone takes all cores"
    kept = elasticity_lines(elasticity(NARROW, elastic, DOES_NOT, requirements()))
    assert kept[-1] == "one layout: an elastic plan is not better"


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (Plan(threads_per_instance=1), "one layout: a plan of one thread has no cores to divide"),
        (NARROW, "one layout: there was no time to measure an elastic plan, or it does not run here"),
    ],
)
def test_retune_says_why_no_elastic_plan_was_judged(plan, line):
    machine = Machine.of(inspect_cpu())
    entry = Tuned(machine=machine, created="2026-01-02", goal="throughput", plan=plan, measurements=())
    found = Retuned(
        folder=Path("m.cw"),
        entry=entry,
        old=plan,
        best=plan,
        old_per_s=1.0,
        best_per_s=1.0,
        comparison=None,
        tried=1,
        notes=(),
        wall_s=1.0,
    )
    assert retuned_lines(found)[-1] == line


def context(folder, budget):
    return SearchContext(
        workspace=Workspace(folder),
        plan=NARROW,
        cpu=inspect_cpu(),
        timeout_s=1.0,
        verify=lambda outputs: pytest.fail("nothing is verified"),
        on_event=lambda event: pytest.fail("nothing is measured"),
        budget=budget,
    )


def test_a_search_without_time_for_it_keeps_one_layout_and_says_so(tmp_path):
    spent = context(tmp_path, Budget(total_s=10.0, clock=lambda: 20.0, started_s=0.0))
    build = Build(engine="fake", precision="fp32")
    reason = judge_elastic(trial(build, measurements=tuple(rows(NARROW, 4.0, 7.5))), NARROW, spent)
    assert reason.kind == ReasonKind.ELASTIC_NOT_MEASURED
    assert said(reason) == "one layout stays open: an elastic plan was not measured, because the budget was spent"
    alone = Plan(threads_per_instance=1)
    assert judge_elastic(trial(build, measurements=(measured(alone),)), alone, spent) is None


class Process:
    """A trial process that nothing has to end."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Loads(Process):
    """A trial process whose loads have these latencies: with both layouts open, and with one."""

    def __init__(self, elastic_ms, fixed_ms, failed=0, refused=0, tell=lambda duration_s: None):
        self.ms, self.failed, self.refused, self.opened = (elastic_ms, fixed_ms), failed, refused, []
        self.tell = tell

    def open(self, payload, build, plan, wide=None):
        self.opened.append((plan, wide))

    def load(self, samples, plan, table, *, rate_per_s, duration_s, seed=0, slo_ms=None, elastic=None):
        ms = self.ms[elastic is None]
        self.tell(duration_s)
        return LoadRun(
            plan=plan,
            rate_per_s=rate_per_s,
            clients=None,
            duration_s=duration_s,
            offered=100,
            answered=100 - self.failed - self.refused,
            refused=self.refused,
            failed=self.failed,
            in_time=100,
            p50_ms=ms,
            p99_ms=3 * ms,
            refusal_p99_ms=0.0,
        )


@pytest.mark.parametrize(
    ("elastic_ms", "fixed_ms", "failed", "refused", "pays"),
    [
        (2.4, 4.0, 0, 0, True),
        (4.2, 4.0, 0, 0, True),
        (4.4, 4.0, 0, 0, False),
        (2.4, 4.0, 1, 0, False),
        (2.4, 4.0, 0, 1, False),
    ],
)
def test_real_load_in_turns_has_the_last_word_and_its_figures_are_told(
    tmp_path, monkeypatch, elastic_ms, fixed_ms, failed, refused, pays
):
    build, clients = Build(engine="fake", precision="fp32"), []

    def client(context, build, share=1.0):
        clients.append(Loads(elastic_ms, fixed_ms, failed, refused))
        return clients[-1]

    monkeypatch.setattr(SearchContext, "client", client)
    listening = replace(context(tmp_path, Budget()), on_event=lambda event: None)
    found = judge_elastic(trial(build, measurements=tuple(SCALES)), NARROW, listening)
    assert found.pays == pays
    assert found.measurements == ()
    assert [one.opened for one in clients] == [[(found.plan.narrow, found.plan.wide)], [(found.plan.narrow, None)]]
    assert [(len(duel.elastic), len(duel.fixed), duel.p50_ms) for duel in found.duels] == [
        (3, 3, (elastic_ms, fixed_ms))
    ] * 2
    words = elasticity_lines(found)[-1]
    assert ("both are opened" in words) == pays
    if failed or refused:
        assert words == "one layout: requests failed or were refused under real load"
    elif not pays:
        assert f"at 33 % of the saturated rate p50 {elastic_ms:.2f} ms against {fixed_ms:.2f} ms" in words


@pytest.mark.parametrize("left_s", [24.0, 19.0])
def test_the_load_at_the_certified_rate_has_time_left_after_those_in_turns(tmp_path, monkeypatch, left_s):
    now_s, lasted_s, clients = [0.0], [], []

    def spend(seconds):
        lasted_s.append(seconds)
        now_s[0] += seconds

    def client(context, build, share=1.0):
        clients.append(Loads(2.4, 4.0, tell=spend))
        return clients[-1]

    monkeypatch.setattr(SearchContext, "client", client)
    certified = replace(Loads(2.4, 4.0).load(None, NARROW, None, rate_per_s=100.0, duration_s=5.0), slo_ms=20.0)
    winner = trial(Build(engine="fake", precision="fp32"), measurements=tuple(SCALES))
    winner = replace(winner, loads=(replace(certified, certified=True),))
    budget = Budget(total_s=left_s / 1.1, clock=lambda: now_s[0], started_s=0.0)
    found = judge_elastic(winner, NARROW, replace(context(tmp_path, budget), on_event=lambda event: None))
    assert found.load is not None
    assert len(lasted_s) == 13
    assert min(lasted_s[:12]) >= SHORTEST_DUEL_S
    assert lasted_s[12] >= 5.0


class Meets(Process):
    """A trial process that meets a higher rate with both layouts open than with one."""

    def __init__(self, opened):
        self.opened = opened

    def open(self, payload, build, plan, wide=None):
        self.wide = wide

    def load(self, samples, plan, table, *, rate_per_s, duration_s, slo_ms, elastic):
        assert (self.wide is None) == (elastic is None)
        self.opened.append((plan, self.wide))
        offered = int(rate_per_s * duration_s)
        in_time = offered if rate_per_s <= (100.0 if elastic is None else 140.0) else offered // 2
        return load_run(plan, rate_per_s, duration_s, in_time, p99_ms=0.9 * slo_ms, slo_ms=slo_ms)


def test_a_rate_that_only_an_elastic_plan_meets_is_certified_and_that_plan_stays(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(SearchContext, "client", lambda context, build: Meets(opened))
    monkeypatch.setattr(slo, "simulated", lambda table, slo_ms: 100.0)
    asked = replace(
        context(tmp_path, Budget()), on_event=lambda event: None, requirements=requirements("slo", slo_ms=20.0)
    )
    searched = trial(Build(engine="fake", precision="int8"), measurements=tuple(SCALES))
    (winner,) = slo.find_rates([searched], asked, 20.0)
    elastic = ElasticPlan(wide=replace(WIDE, batch=2), narrow=NARROW)
    assert winner.certified.elastic == elastic
    assert 100.0 < winner.certified.rate_per_s <= 0.9 * 140.0
    assert asked.requirements.goal.best(winner).plan == NARROW
    assert opened[-1] == (elastic.narrow, elastic.wide)
    assert "by an elastic plan" in loaded(winner)
    monkeypatch.setattr(SearchContext, "client", lambda *_, **__: pytest.fail("it is loaded already"))
    found = judge_elastic(winner, NARROW, asked)
    assert (found.chosen, found.load, found.duels) == (elastic, winner.certified, ())


def test_loads_in_turns_last_no_longer_than_what_is_left_and_are_not_begun_with_too_little():
    assert affordable_duel_s(float("inf")) == DUEL_S
    assert affordable_duel_s(4.0 + 12 * 0.5) == pytest.approx(0.5)
    assert affordable_duel_s(4.0 + 12 * SHORTEST_DUEL_S - 0.1) is None
    assert affordable_duel_s(-5.0) is None


def test_retuning_begins_no_load_when_its_budget_is_spent():
    class Bench:
        build, payload, samples = Build(engine="fake", precision="fp32"), Path("payload"), Path("samples")

        def start(self):
            pytest.fail("nothing begins")

        on_event = start

    assert retuning._elastic(Bench(), NARROW, list(SCALES), requirements(), time.monotonic() - 1.0) is None


def test_what_retuning_leaves_for_an_elastic_plan_is_enough_to_load_it():
    left_s = retuning.BUDGET_S - retuning.before_elastic_s(retuning.BUDGET_S)
    tables_s = NEEDED * retuning.MEASURE_S * 2 * len(FEW_BATCHES)
    assert affordable_duel_s(left_s - tables_s) is not None
    assert [retuning.before_elastic_s(budget_s) for budget_s in (1.0, 10.0, 60.0)] == [0.8, 8.0, 45.0]


def test_where_simulation_promises_nothing_no_load_is_put_on_it(tmp_path):
    build = Build(engine="fake", precision="fp32")
    found = judge_elastic(trial(build, measurements=tuple(DOES_NOT)), NARROW, context(tmp_path, Budget()))
    assert (found.pays, found.duels) == (False, ())
