import copy
import heapq
import math
import random
import threading
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from corewise.batching import (
    Accepted,
    Batcher,
    CallFailed,
    InstanceDied,
    LatencyTable,
    NotServed,
    Policy,
    Refused,
    Request,
)
from corewise.batching.policy import RARE, REMEMBERED, Place, _Plan
from corewise.common.errors import InputError
from corewise.records.build import Plan
from corewise.records.measurement import Measurement

PATIENCE_S = 30
"""How long a test waits for what must come; a hang fails, a slow machine does not."""


def curve(call_ms=0, row_ms=125, largest=64):
    """Latencies of 1 to ``largest`` rows; by default in eighths of a second, so that sums are exact."""
    return LatencyTable(points=tuple((rows, call_ms + row_ms * rows) for rows in range(1, largest + 1)))


def policy(instances=1, max_batch=4, max_waiting=16, **latency):
    made = Policy(curve(**latency), max_batch=max_batch, max_waiting=max_waiting)
    for instance in range(instances):
        made.finished(instance)
    return made


def ids(batch_or_dropped):
    requests = getattr(batch_or_dropped, "requests", None)
    return [one.id for one in requests] if requests is not None else [one.request.id for one in batch_or_dropped]


# --- the curve ---------------------------------------------------------------------------------------------------


def measurement(batch, p50_ms, p99_ms, threads=2):
    return Measurement(
        plan=Plan(threads_per_instance=threads, batch=batch),
        latencies_ms=(p50_ms,),
        throughput_per_s=1.0,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        spread=0.0,
    )


def test_a_curve_goes_through_its_measurements_and_never_falls():
    measured = [measurement(8, 20.0, 26.0), measurement(1, 5.0, 6.0), measurement(2, 4.0, 10.0)]
    p99, p50 = LatencyTable.of(measured), LatencyTable.of(measured, "p50_ms")
    assert [p99.latency_ms(rows) for rows in (1, 2, 8)] == [6, 10, 26]
    assert [p50.latency_ms(rows) for rows in (1, 2, 8)] == [5, 5, 20]
    assert p50.latency_ms(5) == 12.5
    assert p50.latency_ms(16) == 40


@given(st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e4), min_size=1))
def test_a_curve_rises_with_the_batch(figures):
    made = LatencyTable.of([measurement(batch, ms, ms) for batch, ms in figures.items()])
    latencies = [made.latency_ms(rows) for rows in range(1, 200)]
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(latencies))
    assert all(made.latency_ms(batch) >= ms for batch, ms in figures.items())


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((1, 0.0),), ((2, 1.0), (1, 2.0)), ((1, 2.0), (2, 1.0))])
def test_a_curve_that_falls_is_refused(points):
    with pytest.raises(ValueError, match="latency table"):
        LatencyTable(points=points)


def test_a_curve_is_of_one_way_to_run():
    for measured in ([], [measurement(1, 1.0, 1.0), measurement(2, 2.0, 2.0, threads=1)]):
        with pytest.raises(ValueError, match="same threads"):
            LatencyTable.of(measured)


# --- the schedule played through ---------------------------------------------------------------------------------


@st.composite
def queues(draw):
    """A policy, what waits in it, when its instances are free, and a request that is new or none."""
    made = Policy(curve(10, 4), max_batch=6, max_waiting=64, shared=draw(st.booleans()))
    made.slow_down(draw(st.sampled_from([1.0, 1.7])))
    made.margin_s = draw(st.sampled_from([0.0, 0.02]))
    rows, groups = draw(st.sampled_from([(1, 1), (3, 1), (1, 2), (3, 2)]))
    due_s = draw(st.sampled_from([0.1, 0.4, 3.0]))
    waiting = sorted(
        Place(
            draw(st.floats(0, due_s)),
            0,
            number,
            Request(number, inf, rows=draw(st.integers(1, rows)), group=draw(st.integers(1, groups))),
            draw(st.sampled_from([0.0, 0.01, 0.05])),
        )
        for number in range(draw(st.integers(1, 24)))
    )
    free_s = draw(st.lists(st.one_of(st.just(0.0), st.floats(-0.02, 0.05)), min_size=1, max_size=5))
    return made, waiting, free_s, draw(st.sampled_from([None, *waiting]))


@given(queues())
def test_a_queue_that_is_surely_in_time_is_judged_as_if_it_were_played_through(queue):
    made, waiting, free_s, new = queue
    places = [place if place is new else place._replace(room_s=0.0) for place in waiting]
    _, late_s = made._play(_Plan(free_s, places, -inf))
    judged_s = made._late_s(waiting, free_s, new)
    assert judged_s >= late_s - 1e-9
    assert (judged_s + made.margin_s <= 0) == (late_s + made.margin_s <= 0)
    assert (judged_s > 0) == (late_s > 0)


def test_a_queue_with_much_time_is_not_played_through(monkeypatch):
    made = policy(instances=3, max_waiting=64)
    monkeypatch.setattr(made, "_play_alike", lambda *_: pytest.fail("it is played through"))
    for number in range(40):
        assert isinstance(made.offer(Request(id=number, deadline_s=1000.0), 0.0), Accepted)
    assert made._late_s(made._waiting, [0.0]) < 0


# --- single decisions of the policy ------------------------------------------------------------------------------


def test_the_most_urgent_goes_first_and_equals_go_by_priority_and_then_arrival():
    made = policy(max_batch=8)
    for number, (deadline_s, priority) in enumerate([(9, 0), (8, 0), (9, 1), (9, 0), (8, 0)]):
        assert made.offer(Request(id=number, deadline_s=deadline_s, priority=priority), 0.0) == Accepted()
    assert ids(made.next_batch(0, 0.0)) == [1, 4, 2, 0, 3]


def test_groups_never_share_and_nobody_of_a_group_is_overtaken():
    made = policy(max_batch=4)
    for number, (group, rows) in enumerate([("a", 2), ("b", 1), ("a", 3), ("a", 1), ("b", 3)]):
        made.offer(Request(id=number, deadline_s=math.inf, group=group, rows=rows), 0.0)
    batches = []
    while made.waiting_rows:
        batches.append(ids(made.next_batch(0, 0.0)))
        made.finished(0)
    assert batches == [[0], [1, 4], [2, 3]]


def test_a_batch_is_no_larger_than_its_most_urgent_member_can_wait_for():
    made = policy(max_batch=4)
    assert made.offer(Request(id=0, deadline_s=0.25), 0.0) == Accepted()
    for number in (1, 2, 3):
        assert made.offer(Request(id=number, deadline_s=9.0), 0.0) == Accepted()
    batch = made.next_batch(0, 0.0)
    assert (ids(batch), batch.end_s) == ([0, 1], 0.25)


def test_idle_instances_share_what_waits():
    made = policy(instances=2, max_batch=8)
    for number in range(6):
        made.offer(Request(id=number, deadline_s=9.0), 0.0)
    assert (ids(made.next_batch(0, 0.0)), ids(made.next_batch(1, 0.0))) == ([0, 1, 2], [3, 4, 5])


@pytest.mark.parametrize(
    ("request_", "prepare", "expected"),
    [
        (Request(id=9, deadline_s=9.0, rows=5), lambda p: None, Refused(reason="too large")),
        (Request(id=9, deadline_s=0.1), lambda p: None, Refused(reason="too urgent")),
        (Request(id=9, deadline_s=9.0), lambda p: p.leave(0), Refused(reason="no instance")),
        (Request(id=9, deadline_s=9.0), lambda p: setattr(p, "draining", True), Refused(reason="draining")),
    ],
)
def test_what_waiting_cannot_help_is_refused_without_a_time(request_, prepare, expected):
    made = policy()
    prepare(made)
    assert made.offer(request_, 0.0) == expected


def test_a_full_queue_refuses_until_the_next_call_starts():
    made = policy(max_batch=4, max_waiting=4)
    made.offer(Request(id=0, deadline_s=math.inf, rows=4), 0.0)
    made.next_batch(0, 0.0)
    made.offer(Request(id=1, deadline_s=math.inf, rows=4), 0.125)
    assert made.offer(Request(id=2, deadline_s=math.inf), 0.125) == Refused(reason="queue full", retry_after_s=0.375)


def test_what_would_be_late_behind_the_queue_is_refused_with_how_long_to_wait():
    made = policy(max_batch=4)
    made.offer(Request(id=0, deadline_s=1.0, rows=4), 0.0)
    made.next_batch(0, 0.0)
    assert made.offer(Request(id=1, deadline_s=1.0, rows=4), 0.0) == Accepted()
    assert made.offer(Request(id=2, deadline_s=1.0), 0.0) == Refused(reason="overloaded", retry_after_s=0.5)


def test_what_would_make_another_late_is_refused():
    made = policy(max_batch=1)
    made.offer(Request(id=0, deadline_s=0.25), 0.0)
    assert made.offer(Request(id=1, deadline_s=0.25), 0.0) == Accepted()
    refused = made.offer(Request(id=2, deadline_s=0.125), 0.0)
    assert refused == Refused(reason="overloaded", retry_after_s=0.125)
    assert ids(made.next_batch(0, 0.0)) == [0]


def test_the_higher_priority_displaces_as_few_of_the_lowest_as_it_needs():
    made = policy(max_batch=1)
    for number, priority in enumerate([1, 0, 0, 1]):
        assert made.offer(Request(id=number, deadline_s=0.5, priority=priority), 0.0) == Accepted()
    assert isinstance(made.offer(Request(id=4, deadline_s=0.5, priority=0), 0.0), Refused)
    first = made.offer(Request(id=5, deadline_s=0.5, priority=1), 0.0)
    assert [(one.request.id, one.reason) for one in first.dropped] == [(2, "displaced")]
    second = made.offer(Request(id=6, deadline_s=0.5, priority=2), 0.0)
    assert ids(second.dropped) == [1]
    assert isinstance(made.offer(Request(id=7, deadline_s=0.5, priority=1), 0.0), Refused)


def test_higher_priority_in_vain_displaces_nobody():
    made = policy(max_batch=1)
    for number, (deadline_s, priority) in enumerate([(0.375, 2), (0.375, 2), (0.375, 2), (9.0, 0)]):
        assert made.offer(Request(id=number, deadline_s=deadline_s, priority=priority), 0.0) == Accepted()
    refused = made.offer(Request(id=4, deadline_s=0.375, priority=1), 0.0)
    assert refused == Refused(reason="overloaded", retry_after_s=0.125)
    assert made.waiting_rows == 4


def test_low_priority_does_not_starve_behind_later_deadlines():
    made = policy(max_batch=1, max_waiting=4)
    made.offer(Request(id=-1, deadline_s=2.0, priority=0), 0.0)
    now_s, ran = 0.0, []
    for number in range(32):  # a high priority for every call there is time for
        made.offer(Request(id=number, deadline_s=now_s + 1.0, priority=9), now_s)
        batch = made.next_batch(0, now_s)
        ran += ids(batch)
        now_s = batch.end_s
        made.finished(0)
    assert -1 in ran
    assert ran.index(-1) * 0.125 < 2.0


@pytest.mark.parametrize("rows", [1, 2])
def test_the_plan_of_a_burst_shares_it_among_the_idle(rows):
    made = policy(instances=2, max_batch=8, call_ms=125)
    for number in range(4):
        offered = Request(id=number, deadline_s=0.125 + 0.25 * rows, rows=rows)
        assert made.offer(offered, 0.0) == Accepted()


def test_a_call_that_ends_early_leaves_more_time():
    made = policy(max_batch=4)
    made.offer(Request(id=0, deadline_s=9.0, rows=4), 0.0)
    made.next_batch(0, 0.0)
    assert isinstance(made.offer(Request(id=1, deadline_s=0.5), 0.0), Refused)
    made.finished(0)
    assert made.offer(Request(id=2, deadline_s=0.5), 0.0) == Accepted()


def test_a_full_queue_makes_place_for_higher_priority():
    made = policy(max_batch=2, max_waiting=2)
    for number in range(2):
        made.offer(Request(id=number, deadline_s=9.0), 0.0)
    assert made.offer(Request(id=2, deadline_s=9.0), 0.0).reason == "queue full"
    assert ids(made.offer(Request(id=3, deadline_s=9.0, priority=1), 0.0).dropped) == [1]
    assert ids(made.next_batch(0, 0.0)) == [3, 0]


def run_calls(made, *took_s):
    """Single calls, one after the other, that take so long; a row is measured to take an eighth of a second."""
    for number, seconds in enumerate(took_s):
        made.offer(Request(id=1000 + number, deadline_s=math.inf), 0.0)
        made.next_batch(0, 0.0)
        made.finished(0, seconds)


def door_is_open(made):
    """Whether a second request is let in behind a call of four rows, which ends in time at measured speed only."""
    made.offer(Request(id=0, deadline_s=math.inf, rows=4), 0.0)
    made.next_batch(0, 0.0)
    accepted = made.offer(Request(id=1, deadline_s=0.75), 0.0) == Accepted()
    made.finished(0)
    return accepted


def test_calls_that_take_longer_than_measured_close_the_door_until_they_no_longer_do():
    made = policy()
    run_calls(made, 0.125, 0.0625)
    assert (made.slowness, door_is_open(copy.deepcopy(made))) == (1.0, True)
    run_calls(made, *[0.1875] * RARE)
    assert (made.slowness, door_is_open(copy.deepcopy(made))) == (1.5, False)
    run_calls(made, *[0.0625] * REMEMBERED)
    assert (made.slowness, door_is_open(made)) == (1.0, True)


def test_one_slow_call_is_chance():
    made = policy()
    run_calls(made, 9.0)
    assert (made.slowness, door_is_open(made)) == (1.0, True)


def test_calls_that_failed_or_were_cancelled_tell_nothing():
    made = policy()
    for _ in range(REMEMBERED):
        made.offer(Request(id=1, deadline_s=9.0), 0.0)
        made.next_batch(0, 0.0)
        made.finished(0)
    made.finished(0, 9.0)
    assert made.slowness == 1.0


def test_however_slow_calls_were_an_idle_instance_tries_and_what_waits_is_refused():
    made = policy()
    run_calls(made, *[9.0] * REMEMBERED)
    assert made.offer(Request(id=0, deadline_s=0.25), 0.0) == Accepted()
    assert made.offer(Request(id=1, deadline_s=0.25), 0.0).reason == "overloaded"
    assert ids(made.next_batch(0, 0.0)) == [0]
    assert made.offer(Request(id=2, deadline_s=0.25), 0.0).reason == "overloaded"


def test_a_call_that_is_overdue_closes_the_door():
    made = policy(max_batch=1)
    made.offer(Request(id=0, deadline_s=9.0), 0.0)
    made.next_batch(0, 0.0)
    assert made.offer(Request(id=3, deadline_s=5.125), 0.125) == Accepted()
    made.cancel(3)
    assert made.offer(Request(id=4, deadline_s=5.375), 0.125) == Accepted()
    assert isinstance(made.offer(Request(id=1, deadline_s=5.0 + 0.5), 5.0), Refused)
    assert isinstance(made.offer(Request(id=2, deadline_s=5.0 + 6.0), 5.0), Refused)
    made.cancel(4)
    assert isinstance(made.offer(Request(id=2, deadline_s=5.0 + 6.0), 5.0), Accepted)


def test_bounds_must_hold_a_batch():
    for max_batch, max_waiting in ((0, 4), (8, 4)):
        with pytest.raises(ValueError, match="max_batch"):
            Policy(curve(), max_batch=max_batch, max_waiting=max_waiting)


# --- any sequence of events --------------------------------------------------------------------------------------

REQUESTS = st.fixed_dictionaries(
    {
        "slack": st.integers(0, 40) | st.just(math.inf),
        "priority": st.integers(-1, 1),
        "group": st.sampled_from("ab"),
        "rows": st.integers(1, 5),
    }
)


def request(number, now_s, slack, priority=0, group="a", rows=1):
    """``slack`` is in eighths of a second."""
    return Request(id=number, deadline_s=now_s + slack / 8, priority=priority, group=group, rows=rows)


class AnyEvents(RuleBasedStateMachine):
    """Whatever happens to a policy, in whatever order, against a model that only remembers."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.offered = 0
        self.waiting = {}
        self.fate = {}

    @initialize(
        instances=st.integers(1, 3), max_batch=st.integers(1, 5), more=st.integers(0, 8), call=st.integers(0, 4)
    )
    def open(self, instances, max_batch, more, call):
        self.max_batch, self.max_waiting = max_batch, max_batch + more
        self.policy = policy(instances, max_batch, self.max_waiting, call_ms=125 * call)
        self.seconds = [0, *((call + rows) / 8 for rows in range(1, max_batch + 1))]
        self.idle, self.busy = set(range(instances)), set()

    def settle(self, number, fate):
        assert number not in self.fate, "answered twice"
        del self.waiting[number]
        self.fate[number] = fate

    def drop(self, dropped):
        for one in dropped:
            assert one.request == self.waiting[one.request.id]
            if one.reason == "expired":
                assert self.now_s + self.seconds[one.request.rows] > one.request.deadline_s
            self.settle(one.request.id, one.reason)

    @rule(asked=REQUESTS)
    def offer(self, asked):
        offered = request(self.offered, self.now_s, **asked)
        self.offered += 1
        afresh = copy.deepcopy(self.policy)
        afresh._plan = None
        decision = self.policy.offer(offered, self.now_s)
        assert decision == afresh.offer(offered, self.now_s), "a kept plan decides as a new one"
        self.drop(decision.dropped)
        assert all(d.reason == "expired" or d.request.priority < offered.priority for d in decision.dropped)
        if isinstance(decision, Accepted):
            self.waiting[offered.id] = offered
        else:
            self.fate[offered.id] = decision.reason
            assert decision.retry_after_s is None or decision.retry_after_s > 0
            assert all(one.reason == "expired" for one in decision.dropped)
            if decision.reason == "queue full":
                assert sum(one.rows for one in self.waiting.values()) + offered.rows > self.max_waiting

    @precondition(lambda self: self.idle)
    @rule()
    def start(self):
        order = sorted(self.waiting.values(), key=lambda one: (one.deadline_s, -one.priority, one.id))
        instance = min(self.idle)
        batch = self.policy.next_batch(instance, self.now_s)
        self.drop(batch.dropped)
        order = [one for one in order if one.id in self.waiting]
        assert bool(batch.requests) == bool(order), "it waits though it could work"
        if not batch.requests:
            return
        head, rows = batch.requests[0], sum(one.rows for one in batch.requests)
        assert head == order[0]
        assert list(batch.requests) == [one for one in order if one.group == head.group][: len(batch.requests)]
        assert rows <= self.max_batch
        assert batch.end_s == self.now_s + self.seconds[rows] <= head.deadline_s
        for one in batch.requests:
            self.settle(one.id, "served")
        self.idle.remove(instance)
        self.busy.add(instance)

    @precondition(lambda self: self.busy)
    @rule()
    def finish(self):
        instance = self.busy.pop()
        self.policy.finished(instance)
        self.idle.add(instance)

    @precondition(lambda self: self.busy)
    @rule()
    def die(self):
        self.policy.leave(self.busy.pop())

    @rule()
    def join(self):
        instance = max(self.idle | self.busy, default=0) + 1
        self.policy.finished(instance)
        self.idle.add(instance)

    @rule(which=st.integers(0, 50))
    def cancel(self, which):
        self.policy.cancel(which)
        if which in self.waiting:
            self.settle(which, "cancelled")

    @rule(eighths=st.integers(1, 12))
    def wait(self, eighths):
        self.now_s += eighths / 8
        if self.policy.next_expiry_s > self.now_s:
            assert self.policy.expire(self.now_s) == ()
        self.drop(self.policy.expire(self.now_s))
        assert all(self.now_s + self.seconds[one.rows] <= one.deadline_s for one in self.waiting.values())

    @rule()
    def drop_all(self):
        dropped = self.policy.drop_all("no instance")
        assert sorted(ids(dropped)) == sorted(self.waiting)
        self.drop(dropped)

    @invariant()
    def nobody_is_lost_or_doubled(self):
        if self.offered:
            assert not self.waiting.keys() & self.fate.keys()
            assert self.waiting.keys() | self.fate.keys() == set(range(self.offered))

    @invariant()
    def the_queue_is_bounded(self):
        if self.offered:
            assert self.policy.waiting_rows == sum(one.rows for one in self.waiting.values()) <= self.max_waiting


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=100, stateful_step_count=40)


# --- simulated time ----------------------------------------------------------------------------------------------


@dataclass
class Simulation:
    """Arrivals at a policy whose instances need as long as ``seconds`` says, in simulated time."""

    policy: Policy
    instances: int
    seconds: object = None
    """Of a batch; ``None``: exactly as the policy expects."""
    now_s: float = 0.0
    served: dict = field(default_factory=dict)
    """When each request was answered."""
    dropped: list = field(default_factory=list)
    batches: list = field(default_factory=list)
    ends: list = field(default_factory=list)

    def __post_init__(self):
        self.idle = list(range(self.instances))

    def start(self):
        while self.idle and self.policy.waiting_rows:
            instance = self.idle.pop()
            batch = self.policy.next_batch(instance, self.now_s)
            self.dropped += batch.dropped
            if not batch.requests:
                self.idle.append(instance)
                continue
            self.batches.append(sum(one.rows for one in batch.requests))
            end_s = self.now_s + self.seconds(batch) if self.seconds else batch.end_s
            heapq.heappush(self.ends, (end_s, instance, batch.requests))

    def run(self, until_s):
        """Let all happen that happens by then."""
        while self.ends and self.ends[0][0] <= until_s:
            self.now_s, instance, requests = heapq.heappop(self.ends)
            for one in requests:
                assert one.id not in self.served
                self.served[one.id] = self.now_s
            self.policy.finished(instance)
            self.idle.append(instance)
            self.start()
            assert not (self.idle and self.policy.waiting_rows), "an instance idles while a request waits"
        if until_s < math.inf:
            self.now_s = until_s

    def offer(self, offered):
        decision = self.policy.offer(offered, self.now_s)
        self.dropped += decision.dropped
        self.start()
        return decision


ARRIVALS = st.lists(st.tuples(st.integers(0, 6), REQUESTS), max_size=60)


@settings(max_examples=200)
@given(ARRIVALS, st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_what_is_accepted_makes_its_deadline(arrivals, instances, max_batch, call, priorities):
    simulation = Simulation(policy(instances, max_batch, 16, call_ms=125 * call), instances)
    accepted = {}
    for number, (gap, asked) in enumerate(arrivals):
        simulation.run(simulation.now_s + gap / 8)
        offered = request(number, simulation.now_s, **asked | ({} if priorities else {"priority": 0}))
        if isinstance(simulation.offer(offered), Accepted):
            accepted[number] = offered
    simulation.run(math.inf)
    lost = set(ids(simulation.dropped))
    assert simulation.served.keys() | lost == accepted.keys()
    assert not simulation.served.keys() & lost
    assert all(simulation.served[number] <= accepted[number].deadline_s for number in simulation.served)
    assert all(one.reason == "displaced" for one in simulation.dropped)
    assert priorities or not lost
    assert simulation.policy.waiting_rows == 0


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 5), st.integers(0, 4))
def test_after_the_time_to_retry_it_is_accepted(gaps, instances, max_batch, call):
    simulation = Simulation(policy(instances, max_batch, max(8, max_batch), call_ms=125 * call), instances)
    slack = 2 * (call + max_batch)
    for number, gap in enumerate(gaps):
        simulation.run(simulation.now_s + gap / 8)
        refused = simulation.offer(request(number, simulation.now_s, slack))
        if isinstance(refused, Refused):
            simulation.run(simulation.now_s + refused.retry_after_s)
            again = simulation.offer(request(-1, simulation.now_s, slack))
            assert isinstance(again, Accepted), (refused, again)
            return


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("slack_s", [0.15, 0.4, 2.0])
@pytest.mark.parametrize("call_ms", [2, 20])
@pytest.mark.parametrize(("jitter", "least"), [(0.0, 0.95), (0.1, 0.9)])
def test_at_three_times_capacity_the_work_done_stays_near_capacity(groups, slack_s, call_ms, jitter, least):
    rng = random.Random(0)
    latency_s = [0.0] + [(call_ms + 4 * rows) / 1e3 for rows in range(1, 17)]
    made = policy(2, 16, 256, call_ms=call_ms * (1 + 3 * jitter), row_ms=4 * (1 + 3 * jitter))  # the table is of p99
    simulation = Simulation(
        made, 2, lambda batch: latency_s[len(batch.requests)] * (1 + jitter * max(-2, min(3, rng.gauss(0, 1))))
    )
    capacity_per_s = 2 * 16 / latency_s[16]
    deadlines = {}
    for number in range(3000):
        simulation.run(simulation.now_s + rng.expovariate(3 * capacity_per_s))
        deadlines[number] = simulation.now_s + slack_s
        simulation.offer(Request(id=number, deadline_s=deadlines[number], group=rng.randrange(groups)))
    in_time = sum(end_s <= deadlines[number] for number, end_s in simulation.served.items())
    if slack_s > 2 * latency_s[16] * (1 + 3 * jitter) * groups:  # else full calls are not to be had in time
        assert in_time / simulation.now_s > least * capacity_per_s
    assert in_time == len(simulation.served)
    assert simulation.dropped == []


def test_below_capacity_nothing_is_refused():
    rng = random.Random(1)
    simulation = Simulation(policy(2, 16, 256, call_ms=2, row_ms=6), 2)
    for number in range(3000):
        simulation.run(simulation.now_s + rng.expovariate(0.8 * 2 * 16 / 0.098))
        assert isinstance(simulation.offer(Request(id=number, deadline_s=simulation.now_s + 0.4)), Accepted)
    simulation.run(math.inf)
    assert len(simulation.served) == 3000


# --- the runner, with real threads -------------------------------------------------------------------------------


class Gate:
    """An instance that answers x -> (2 x, x summed over its row) and, where it has a gate, waits at it in each call."""

    def __init__(self, is_open=True):
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches = []
        self.running = threading.Lock()

    def __call__(self, inputs):
        assert self.running.acquire(blocking=False), "two calls of one instance at once"
        try:
            self.batches.append(inputs[0].copy())
            self.entered.release()
            assert self.gate.wait(PATIENCE_S)
            if np.any(inputs[0] == 666):
                raise ValueError("a devilish row")
            if np.any(inputs[0] == 999):
                raise InstanceDied("it is gone")
            if np.any(inputs[0] == 1000):
                raise SystemExit
            return [inputs[0] * 2, inputs[0].reshape(len(inputs[0]), -1).sum(axis=1)]
        finally:
            self.running.release()


def rows(*values, width=3):
    return np.array([[value] * width for value in values], dtype=np.float32)


def right(answer, x):
    return np.array_equal(answer.outputs[0], 2 * x) and np.array_equal(answer.outputs[1], x.sum(axis=1))


def quick(max_batch=8, max_waiting=64, shared=True):
    """A policy that expects a call to take a microsecond."""
    return Policy(curve(row_ms=0, call_ms=0.001), max_batch=max_batch, max_waiting=max_waiting, shared=shared)


def fill(batcher, instance):
    """A request that keeps the one instance busy until its gate opens."""
    future = batcher.submit([rows(0)])
    assert instance.entered.acquire(timeout=PATIENCE_S)
    return future


def test_every_answer_is_the_requests_own():
    instances = [Gate(), Gate(), Gate()]
    wrong, count = [], 150

    def client(seed):
        rng = random.Random(seed)
        futures = []
        for number in range(count):
            x = rows(*(rng.randrange(600) for _ in range(rng.randint(1, 4))), width=rng.choice((2, 3)))
            futures.append((x, batcher.submit([x]), number))
            if rng.random() < 0.3:
                futures[rng.randrange(len(futures))][1].cancel()
        for x, future, _ in futures:
            try:
                if not right(future.result(PATIENCE_S), x):
                    wrong.append(x)
            except CancelledError:
                pass

    with Batcher(instances, quick(max_waiting=10_000)) as batcher:
        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    assert wrong == []
    assert batcher.waiting_rows == 0
    assert max(len(batch) for instance in instances for batch in instance.batches) <= 8


def test_requests_of_one_shape_share_a_call_and_hear_where_their_time_went():
    instance = Gate(is_open=False)
    with Batcher([instance], quick()) as batcher:
        first = fill(batcher, instance)
        together = [batcher.submit([rows(1, 2)]), batcher.submit([rows(3)])]
        alone = batcher.submit([rows(4, width=5)])
        instance.gate.set()
        answers = [future.result(PATIENCE_S) for future in (*together, alone)]
        assert [answer.batch_rows for answer in answers] == [3, 3, 1]
        assert all(answer.waited_s >= 0 and answer.ran_s > 0 for answer in answers)
        assert right(answers[0], rows(1, 2))
        assert right(first.result(), rows(0))


def test_no_instance_idles_while_a_request_waits():
    both = threading.Barrier(2)

    def run(inputs):
        both.wait(PATIENCE_S)
        return inputs

    with Batcher([run, run], quick()) as batcher:
        wait([batcher.submit([rows(1)]), batcher.submit([rows(2)])], PATIENCE_S)
        assert not both.broken


def test_who_cancels_frees_a_place_and_harms_no_neighbour():
    instance = Gate(is_open=False)
    with Batcher([instance], quick(max_batch=3, max_waiting=3)) as batcher:
        first = fill(batcher, instance)
        waiting = [batcher.submit([rows(value)]) for value in (1, 2, 3)]
        with pytest.raises(NotServed, match="queue is full"):
            batcher.submit([rows(4)])
        assert waiting[1].cancel()
        assert not first.cancel()
        last = batcher.submit([rows(4)])
        instance.gate.set()
        assert [future.result(PATIENCE_S).outputs[1][0] for future in (waiting[0], waiting[2], last)] == [3, 9, 12]
        assert instance.batches[1][:, 0].tolist() == [1, 3, 4]


class Exclusive(Policy):
    """Starts nothing while a request of priority 1 waits."""

    def __init__(self):
        super().__init__(curve(row_ms=0, call_ms=1), max_batch=8, max_waiting=64)
        self.asked = threading.Event()
        """``turn`` was asked while two waited."""

    def turn(self, now_s):
        if self.waiting_rows == 2:
            self.asked.set()
        return None if self._ranks[-1] else super().turn(now_s)


@pytest.mark.parametrize("timeout_s", [math.inf, 0.2])
def test_a_call_that_can_start_because_a_request_left_or_expired_starts_at_once(timeout_s):
    made = Exclusive()
    with Batcher([Gate()], made) as batcher:
        first = batcher.submit([rows(1)], priority=1, timeout_s=timeout_s)
        other = batcher.submit([rows(2)])
        if timeout_s == math.inf:
            assert made.asked.wait(PATIENCE_S)
            assert first.cancel()
        assert right(other.result(PATIENCE_S), rows(2))
        assert first.cancelled() or isinstance(first.exception(PATIENCE_S), NotServed)


def test_admission_counts_a_call_for_each_request_where_none_share_one():
    policy = Policy(curve(row_ms=0, call_ms=10), max_batch=8, max_waiting=64, shared=False)
    policy.finished(0)
    decisions = [policy.offer(Request(id=number, deadline_s=0.0355), 0.0) for number in range(5)]
    assert [type(decision) for decision in decisions] == [Accepted] * 3 + [Refused] * 2
    assert policy.expected_s(0.0) == pytest.approx(0.04)
    assert [request.id for request in policy.next_batch(0, 0.0).requests] == [0]


def test_requests_have_calls_of_their_own_where_rows_depend_on_each_other():
    instance = Gate(is_open=False)
    with Batcher([instance], quick(shared=False)) as batcher:
        fill(batcher, instance)
        waiting = [batcher.submit([rows(*values)]) for values in ((1,), (2, 3), (4,))]
        instance.gate.set()
        for future, values in zip(waiting, ((1,), (2, 3), (4,)), strict=True):
            assert right(future.result(PATIENCE_S), rows(*values))
    assert [batch[:, 0].tolist() for batch in instance.batches[1:]] == [[1], [2, 3], [4]]


def test_a_failing_call_is_the_answer_of_its_batch_alone():
    instance = Gate(is_open=False)
    with Batcher([instance], quick()) as batcher:
        fill(batcher, instance)
        bad = [batcher.submit([rows(666)]), batcher.submit([rows(1)])]
        good = batcher.submit([rows(2, width=4)])
        instance.gate.set()
        assert right(good.result(PATIENCE_S), rows(2, width=4))
        for future in bad:
            with pytest.raises(CallFailed, match="a devilish row") as caught:
                future.result(PATIENCE_S)
            assert isinstance(caught.value.__cause__, ValueError)
        assert right(batcher.submit([rows(3)]).result(PATIENCE_S), rows(3))


def test_an_engine_that_exits_or_answers_too_few_rows_fails_its_batch_alone():
    with Batcher([Gate()], quick()) as batcher:
        with pytest.raises(CallFailed, match="SystemExit"):
            batcher.submit([rows(1000)]).result(PATIENCE_S)
        assert right(batcher.submit([rows(3)]).result(PATIENCE_S), rows(3))
    with (
        Batcher([lambda inputs: [inputs[0][:1]]], quick()) as batcher,
        pytest.raises(CallFailed, match=r"\[1\] rows for 2 rows"),
    ):
        batcher.submit([rows(1, 2)]).result(PATIENCE_S)


def test_a_dead_instance_is_replaced_and_only_its_batch_is_hurt():
    healthy, successor = Gate(is_open=False), Gate()
    reopened = threading.Event()

    def reopen(instance):
        reopened.set()
        return successor

    with Batcher([healthy, healthy.__class__()], quick(max_batch=1), reopen=reopen) as batcher:
        futures = [batcher.submit([rows(value)]) for value in (1, 999, 2, 3)]
        healthy.gate.set()
        assert [right(futures[i].result(PATIENCE_S), rows(v)) for i, v in ((0, 1), (2, 2), (3, 3))] == [True] * 3
        with pytest.raises(CallFailed, match="it is gone"):
            futures[1].result(PATIENCE_S)
        assert reopened.wait(PATIENCE_S)
    assert batcher.instances == 2


def test_without_a_successor_the_others_go_on_alone():
    with Batcher([Gate(), Gate()], quick()) as batcher:
        with pytest.raises(CallFailed):
            batcher.submit([rows(999)]).result(PATIENCE_S)
        for value in range(20):
            assert right(batcher.submit([rows(value)]).result(PATIENCE_S), rows(value))
    assert batcher.instances == 1


def test_when_the_last_instance_dies_all_that_wait_are_told():
    instance = Gate(is_open=False)
    with Batcher([instance], quick(max_batch=1), reopen=lambda i: open_nothing()) as batcher:
        fill(batcher, instance)
        dying, waiting = batcher.submit([rows(999)]), batcher.submit([rows(1)])
        instance.gate.set()
        with pytest.raises(CallFailed):
            dying.result(PATIENCE_S)
        with pytest.raises(NotServed, match="no instance"):
            waiting.result(PATIENCE_S)
        with pytest.raises(NotServed, match="no instance"):
            batcher.submit([rows(2)])


def open_nothing():
    raise OSError("out of memory")


def outcome(batcher, x):
    """The future, or why there is none."""
    try:
        return batcher.submit([x])
    except NotServed as refused:
        return refused.reason


def test_closing_finishes_what_was_accepted_and_refuses_the_rest():
    instance = Gate(is_open=False)
    batcher = Batcher([instance], quick(max_batch=2))
    accepted = [fill(batcher, instance), *(batcher.submit([rows(value)]) for value in range(1, 8))]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while (more := outcome(batcher, rows(len(accepted)))) != "draining":
        accepted += [more] if more != "queue full" else []
    instance.gate.set()
    closing.join(PATIENCE_S)
    assert all(future.done() and right(future.result(), rows(v)) for v, future in enumerate(accepted))
    assert batcher.close() is True


def test_closing_in_a_hurry_tells_those_that_wait():
    instance = Gate(is_open=False)
    batcher = Batcher([instance], quick())
    running, waiting = fill(batcher, instance), batcher.submit([rows(1)])
    assert batcher.close(drain_s=0.0) is False
    with pytest.raises(NotServed, match="stopping"):
        waiting.result(PATIENCE_S)
    instance.gate.set()
    assert right(running.result(PATIENCE_S), rows(0))
    assert batcher.close() is True


def test_what_waits_too_long_is_told_though_every_instance_hangs():
    instance = Gate(is_open=False)
    with Batcher([instance], Policy(curve(row_ms=0, call_ms=200), max_batch=8, max_waiting=64)) as batcher:
        running = fill(batcher, instance)
        patient = batcher.submit([rows(1)])
        with pytest.raises(NotServed, match="could no longer meet its deadline"):
            batcher.submit([rows(2)], timeout_s=1.2).result(PATIENCE_S)
        instance.gate.set()
        assert right(running.result(PATIENCE_S), rows(0))
        assert right(patient.result(PATIENCE_S), rows(1))


def test_overload_is_refused_at_once_with_a_time_while_the_instance_is_busy():
    instance = Gate(is_open=False)
    made = Policy(curve(row_ms=60_000), max_batch=1, max_waiting=1000)
    with Batcher([instance], made) as batcher:
        running = fill(batcher, instance)
        accepted, refused = [], []
        for value in range(1, 100):
            try:
                accepted.append(batcher.submit([rows(value)], timeout_s=300))
            except NotServed as error:
                refused.append(error)
        assert len(accepted) == 4
        assert {error.reason for error in refused} == {"overloaded"}
        assert all(0 < error.retry_after_s < 61 for error in refused)
        for future in accepted:
            assert future.cancel()
        instance.gate.set()
        assert right(running.result(PATIENCE_S), rows(0))


@pytest.mark.parametrize(
    "inputs",
    [[], [np.float32(1)], [np.zeros((0, 2))], [np.zeros((1, 2)), np.zeros((2, 2))], [np.zeros(()), np.zeros((1, 2))]],
)
def test_what_is_no_batch_is_said_at_once(inputs):
    with Batcher([Gate()], quick()) as batcher, pytest.raises(InputError, match="are not a request"):
        batcher.submit(inputs)
    with Batcher([Gate()], quick()) as batcher, pytest.raises(InputError, match="timeout nan"):
        batcher.submit([rows(1)], timeout_s=math.nan)
