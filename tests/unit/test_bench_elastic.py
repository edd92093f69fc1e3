"""The benchmarks of elastic plans: their traces, what is late and whose, comparisons, and the picture."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from builders import load_run, measured, requirements

from bench import elastic_curve, elastic_slo, elastic_switch
from bench.elastic_loads import in_turns, over_the_better
from bench.elastic_picture import picture
from bench.elastic_plans import ELASTIC, FIXED, WAYS, Subject
from bench.wire import Load
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.measurement import Measurement
from corewise.search import slo

WIDE = Plan(threads_per_instance=2, batch=4)
NARROW = Plan(threads_per_instance=1, instances=2, batch=4)


def rows(plan: Plan, *ms: float) -> list[Measurement]:
    """Measurements of batches 1, 2, 4."""
    return [measured(replace(plan, batch=2**k), p50_ms) for k, p50_ms in enumerate(ms)]


@pytest.fixture
def subject() -> Subject:
    """A second core makes one call 1.67 times as fast."""
    artifact = SimpleNamespace(
        folder=Path("small.cw"),
        manifest=SimpleNamespace(build=Build(engine="fake", precision="fp32")),
        report=SimpleNamespace(requirements=requirements()),
    )
    return Subject(
        artifact=artifact,
        cpu=inspect_cpu(),
        plan=NARROW,
        elastic=ElasticPlan(wide=WIDE, narrow=NARROW),
        is_opened=True,
        measured=(*rows(WIDE, 2.4, 4.5, 8.8), *rows(NARROW, 4.0, 7.5, 14.5)),
    )


def test_a_trace_has_each_rate_in_its_turn() -> None:
    times_s = elastic_switch.trace([10.0, 400.0, 100.0], 2.0, 12.0, seed=1)
    assert times_s == sorted(times_s)
    assert times_s != elastic_switch.trace([10.0, 400.0, 100.0], 2.0, 12.0, seed=2)
    counts = [sum(2 * k <= time_s < 2 * (k + 1) for time_s in times_s) for k in range(6)]
    for count, expected in zip(counts, [20, 800, 200] * 2, strict=True):
        assert abs(count - expected) < 5 * expected**0.5


def test_what_became_of_a_trace_is_told_by_share() -> None:
    load = Load(seconds=8.0, offered=5, answered=4, latencies_ms=[1.0, 9.0, 3.0, 5.0], due_s=[0.5, 2.5, 4.5, 7.9])
    found = elastic_switch.facts(load, 4.0, [0.2, 0.9], 2.0)
    assert (found["lost"], found["late"]) == (1, 2)
    assert {share: ms["p50_ms"] for share, ms in found["by_share"].items()} == {"20%": 2.0, "90%": 7.0}


def test_late_requests_are_told_from_one_trace_for_all_three(subject: Subject) -> None:
    times_s = elastic_switch.trace([100.0, 480.0], 1.0, 4.0, seed=0)
    found = elastic_switch.played(subject, times_s, slo_ms=10.0, sent_per_s=subject.simulated_per_s / 2)
    assert [(one["trace"], one["deadlines"]) for one in found] == [
        (words, told) for words in ("as sent", "as dense as simulated calls allow") for told in (False, True)
    ]
    for one in found:
        assert set(one["late"]) == set(WAYS)
        assert one["late"][one["better"]] == min(one["late"][name] for name in FIXED)
        more = one["late_only_if_elastic"] - one["late_only_in_better"]
        assert more == one["late"][ELASTIC] - one["late"][one["better"]]
    assert found[2]["late"][ELASTIC] > found[0]["late"][ELASTIC], "it is twice as dense"


class Machine:
    """Answers as fast as it is told to; rates above ``most_per_s`` overrun it."""

    seconds = 1.0

    def __init__(self, most_per_s: float, p50_ms: float) -> None:
        self.most_per_s, self.p50_ms = most_per_s, p50_ms

    def idle(self):
        return self.at_rate(1.0)

    def saturated(self):
        return self.at_rate(self.most_per_s)

    def at_rate(self, per_s):
        seconds = max(1.0, 2.0 * per_s / self.most_per_s - 1)
        return {"per_s": per_s / seconds, "p50_ms": self.p50_ms, "p99_ms": 2 * self.p50_ms, "seconds": seconds}


def test_loads_are_shares_of_the_better_layout_and_who_is_overrun_gets_no_more() -> None:
    ways = {ELASTIC: Machine(200.0, 1.0), "wide": Machine(100.0, 2.0), "narrow": Machine(200.0, 4.0)}
    loads = in_turns(2, ways, {"slow": Machine(50.0, 8.0)}, {"a third": 1 / 3, "nearly all": 0.9})
    assert [set(by_name) for by_name in loads.values()] == [set(WAYS), set(WAYS), {*WAYS, "slow"}, set(WAYS)]
    assert all(len(runs) == 2 for by_name in loads.values() for runs in by_name.values())
    assert loads["a third"]["narrow"][0]["per_s"] == pytest.approx(200 / 3)
    over = over_the_better(loads)
    assert (over["idle"]["p50_ms"]["layout"], over["idle"]["p50_ms"]["value"]) == ("wide", pytest.approx(0.5))
    assert (over["saturated"]["per_s"]["layout"], over["saturated"]["per_s"]["value"]) == ("narrow", 1.0)
    text = picture(elastic_curve.SERIES, loads, {"a third": 1 / 3, "nearly all": 0.9})
    ElementTree.fromstring(text)
    assert text.count("p99") > 0
    assert [f">{one.key}  {one.name}<" in text for one in elastic_curve.SERIES[:4]] == [True, True, True, False]


class Held:
    """A queue that holds a rate."""

    def __init__(self, most_per_s: float) -> None:
        self.most_per_s = most_per_s
        self.asked = []

    def load(self, way, *, rate_per_s, duration_s, slo_ms):
        self.asked.append((way.plan, way.wide, rate_per_s))
        offered = int(rate_per_s * duration_s)
        in_time = offered if rate_per_s <= self.most_per_s else int(0.97 * self.most_per_s * duration_s)
        return load_run(way.plan, rate_per_s, duration_s, in_time, p99_ms=0.8 * slo_ms, slo_ms=slo_ms)


def test_the_rate_of_an_slo_is_certified_as_a_search_does_it(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slo, "simulated", lambda table, slo_ms: 0.6 * table[-1].throughput_per_s)
    opened = {ELASTIC: Held(300.0), "wide": Held(200.0), "narrow": Held(250.0)}
    fixed, elastic = (
        elastic_slo.certified(subject, opened, names, 15.0, budget_s=60.0) for names in (FIXED, (ELASTIC,))
    )
    assert fixed["way"] == "narrow"
    assert elastic["way"] == ELASTIC
    for found, most_per_s in ((fixed, 250.0), (elastic, 300.0)):
        assert slo.CERTIFIED * most_per_s / slo.UP <= found["rate_per_s"] <= slo.CERTIFIED * most_per_s
    assert {wide for _, wide, _ in opened[ELASTIC].asked} == {WIDE}
    assert {wide for _, wide, _ in opened["narrow"].asked} == {None}
    none = elastic_slo.certified(subject, opened, FIXED, 1.0, budget_s=60.0)
    assert (none["way"], none["rate_per_s"], none["loads"]) == (None, None, [])
