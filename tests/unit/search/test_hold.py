"""The rate under an SLO: closed in on with loads, from whatever the simulation said, on the plan that holds most."""

from dataclasses import replace
from math import inf

import pytest
from builders import requirements, trial

from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.measurement import LoadRun, Measurement
from corewise.search import slo
from corewise.search.slo import (
    ATTEMPTS,
    CERTIFIED,
    CONFIRM_S,
    ENOUGH,
    MOST_LOADS,
    UP,
    Contender,
    Elastic,
    climb,
    contenders_of,
    worthwhile,
)

SLO_MS = 100.0


def measurement(threads, instances, call_ms, batch=8):
    return Measurement(
        plan=Plan(threads_per_instance=threads, instances=instances, batch=batch),
        latencies_ms=(call_ms,),
        throughput_per_s=batch * 1e3 / call_ms,
        p50_ms=call_ms,
        p99_ms=1.2 * call_ms,
        spread=0.0,
    )


def contender(simulated_per_s, *, engine="a", threads=2, instances=1):
    return Contender(
        build=Build(engine=engine, precision="int8"),
        table=[measurement(threads, instances, 10.0)],
        simulated_per_s=simulated_per_s,
    )


class Machine:
    """Each contender holds any rate up to what it can do; above, that much is answered in time."""

    def __init__(self, *most_per_s, slower=1.0, dies=()):
        self.most_per_s, self.slower, self.dies = most_per_s, slower, dies
        self.loads = []

    def climb(self, contenders, *, simulate=lambda table: 1000.0, ended=lambda share: False, never_again=()):
        most = {id(one): rate for one, rate in zip(contenders, self.most_per_s, strict=True)}

        def load(one, rate_per_s, least_s):
            if one.build.engine in self.dies or (one.elastic and "elastic" in self.dies):
                return None
            offered = max(1, round(rate_per_s * least_s))
            answered = min(offered, int(most[id(one)] * least_s))
            if least_s == CONFIRM_S and one in never_again:
                answered = 0
            run = LoadRun(
                plan=one.table[-1].plan,
                rate_per_s=rate_per_s,
                clients=None,
                duration_s=least_s,
                offered=offered,
                answered=answered,
                refused=offered - answered,
                failed=0,
                in_time=answered,
                p50_ms=10.0 * self.slower,
                p99_ms=SLO_MS / 2,
                refusal_p99_ms=0.1,
                slo_ms=SLO_MS,
            )
            self.loads.append((one, run))
            return run

        return climb(contenders, load, simulate, ended)


@pytest.mark.parametrize("simulated_per_s", [70.0, 90.0, 100.0, 130.0, 300.0, 3000.0])
def test_the_promise_is_near_the_most_that_is_held(simulated_per_s):
    machine = Machine(100.0)
    one = contender(simulated_per_s)
    assert machine.climb([one]) is one
    runs = [run for _, run in machine.loads]
    assert len(runs) <= ATTEMPTS + 1
    assert runs[-1].met
    assert CERTIFIED / UP * 98.0 <= runs[-1].rate_per_s <= CERTIFIED * 102.0
    assert runs[-1].duration_s >= runs[0].duration_s


def test_what_holds_nothing_promises_nothing():
    machine = Machine(0.0)
    assert machine.climb([contender(1000.0)]) is None
    runs = [run for _, run in machine.loads]
    assert len(runs) == ATTEMPTS
    assert not any(run.met for run in runs)
    rates = [run.rate_per_s for run in runs]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("most", [(40.0, 90.0), (90.0, 40.0), (0.0, 80.0)])
def test_the_plan_that_holds_most_is_found_though_the_simulation_preferred_another(most):
    machine = Machine(*most)
    both = [contender(120.0), contender(110.0, engine="b")]
    best = machine.climb(both)
    assert best is both[most.index(max(most))]
    last, run = machine.loads[-1]
    assert last is best
    assert run.met
    assert CERTIFIED / UP * 0.95 * max(most) <= run.rate_per_s <= max(most)
    assert len(machine.loads) <= MOST_LOADS + 1


def test_who_cannot_hold_more_than_another_does_is_not_tried():
    machine = Machine(100.0, 20.0)
    both = [contender(110.0), contender(50.0, engine="b")]
    assert machine.climb(both) is both[0]
    assert {one.build.engine for one, _ in machine.loads} == {"a"}


def test_calls_that_are_slower_under_load_lower_the_hopes_of_their_shape_only():
    machine = Machine(30.0, 30.0, 60.0, slower=1.5)
    three = [
        contender(100.0, threads=1, instances=2),
        contender(95.0, engine="b", threads=1, instances=2),
        contender(70.0, engine="c", threads=2, instances=1),
    ]
    best = machine.climb(three, simulate=lambda table: 40.0 if table[0].p50_ms > 10 else 100.0)
    assert best is three[2]
    assert machine.loads[1][0] is three[2]


def test_a_plan_that_was_too_slow_once_is_tried_with_lower_rates_though_it_meets_none_in_simulation():
    machine, one = Machine(30.0, slower=1.9), contender(100.0)
    assert machine.climb([one], simulate=lambda table: 0.0) is one
    assert CERTIFIED / UP * 0.95 * 30.0 <= machine.loads[-1][1].rate_per_s <= 30.0


def test_a_build_that_dies_under_load_is_left_and_the_others_are_tried():
    machine = Machine(100.0, 50.0, dies=("a",))
    both = [contender(110.0), contender(60.0, engine="b")]
    assert machine.climb(both) is both[1]


def test_where_the_highest_rate_is_not_held_again_the_next_one_is_promised():
    both = [contender(110.0), contender(70.0, engine="b")]
    Machine(60.0).climb(both[1:])
    machine = Machine(100.0, 60.0)
    best = machine.climb(both, never_again=both[:1])
    assert best is both[1]
    assert machine.loads[-1][0] is both[1]
    assert machine.loads[-1][1].met


def test_what_is_left_of_the_time_is_for_the_promise():
    machine = Machine(100.0)
    one = contender(50.0)
    assert machine.climb([one], ended=lambda share: share < 1 and len(machine.loads) >= 1) is one
    assert [run.rate_per_s for _, run in machine.loads] == pytest.approx([45.0, 0.9 * 45.0])


def with_elastic():
    """Two layouts of a build and the elastic plan of both."""
    wide, narrow = contender(120.0), contender(110.0, threads=1, instances=2)
    plan = ElasticPlan(wide=wide.table[-1].plan, narrow=narrow.table[-1].plan)
    return wide, narrow, replace(narrow, simulated_per_s=inf, loads=[], elastic=Elastic(plan, None, (wide, narrow)))


def test_an_elastic_plan_that_meets_more_than_its_layouts_is_certified_for_it():
    machine, (wide, narrow, elastic) = Machine(60.0, 100.0, 130.0), with_elastic()
    assert machine.climb([wide, narrow, elastic]) is elastic
    assert elastic.loads[0].rate_per_s == pytest.approx(UP * narrow.met_per_s)
    assert CERTIFIED / UP * 130.0 <= machine.loads[-1][1].rate_per_s <= CERTIFIED * 130.0


@pytest.mark.parametrize("dies", [(), ("elastic",)])
def test_one_that_meets_no_more_or_cannot_run_leaves_the_rate_to_its_better_layout(dies):
    machine, (wide, narrow, elastic) = Machine(60.0, 100.0, 100.0, dies=dies), with_elastic()
    assert machine.climb([wide, narrow, elastic]) is narrow
    assert len(elastic.loads) == 1 - len(dies)


def test_the_next_rate_to_be_confirmed_is_the_highest_of_all_plans():
    machine, three = Machine(60.0, 100.0, 130.0), with_elastic()
    assert machine.climb(three, never_again=three[2:]) is three[1]
    asked = [run.rate_per_s for _, run in machine.loads if run.duration_s == CONFIRM_S]
    assert len(asked) > 1
    assert asked == sorted(asked, reverse=True)


def test_the_elastic_plan_is_that_of_two_layouts_with_as_many_threads_if_there_is_memory_for_both(monkeypatch):
    monkeypatch.setattr(slo, "simulated", lambda table, slo_ms: table[-1].throughput_per_s)
    measured = tuple(
        replace(measurement(threads, instances, ms, batch=batch), memory_bytes=500)
        for threads, instances, ms in ((4, 1, 10.0), (2, 2, 16.0), (1, 4, 30.0), (1, 3, 29.0))
        for batch in (1, 8)
    )

    def elastic_of(build, limit_bytes=None):
        limits = requirements("slo", slo_ms=SLO_MS, memory_limit_bytes=limit_bytes)
        found = contenders_of(trial(build, measurements=measured), SLO_MS, limits)
        assert [one.layout for one in found[:4]] == [(4, 1), (2, 2), (1, 4), (1, 3)]
        return found[4:]

    (elastic,) = elastic_of(Build(engine="a", precision="int8"), 1000)
    assert (elastic.elastic.plan.wide, elastic.elastic.plan.narrow) == (
        Plan(threads_per_instance=4, batch=8),
        Plan(threads_per_instance=2, instances=2, batch=8),
    )
    assert elastic.layout == (2, 2)
    assert elastic_of(Build(engine="a", precision="int8"), 999) == []
    assert elastic_of(Build(engine="eager", precision="fp32")) == []


def batches_of(*per_s):
    """What is left of a table whose batches 1, 2, 4, ... do so much."""
    table = [measurement(2, 1, 2**k * 1e3 / rate, batch=2**k) for k, rate in enumerate(per_s)]
    return [one.plan.batch for one in worthwhile(table)]


def test_a_batch_is_no_larger_than_does_nearly_the_most():
    assert batches_of(100.0, 190.0, 350.0, 600.0) == [1, 2, 4, 8]
    assert batches_of(90.6, 99.4, 104.3, 101.7, 105.5, 99.3) == [1, 2, 4]
    assert batches_of(100.0, 100.0 / ENOUGH) == [1]
    assert worthwhile([]) == []
