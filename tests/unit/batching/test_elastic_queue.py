"""A queue for an elastic plan: which calls are wide, whether those accepted are in time, and threads that run both."""

import heapq
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from itertools import count
from math import inf
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corewise.batching import (
    Accepted,
    Batcher,
    ElasticQueue,
    ElasticTables,
    InstanceDied,
    LatencyTable,
    Refused,
    Request,
)
from corewise.batching.elastic_queue import SOON
from corewise.batching.policy import LONG
from corewise.batching.simulate import Wide, capacity_per_s, simulate_load

PATIENCE_S = 30


def table(*ms):
    return LatencyTable(points=tuple((2**k, value) for k, value in enumerate(ms)))


NARROW, BOTH = table(4.0, 7.5, 14.5, 28.0), table(2.4, 4.5, 8.8, 17.4)
"""On two cores a call of one row gains 1.67 by the second, and calls of more rows are no faster wide."""
SLOW_BOTH = table(3.8, 7.2, 14.0, 27.0)
"""A second core that hardly helps."""
WIDE = 2
"""The number of the wide instance, after the two narrow ones."""


def tables(narrow=NARROW, wide=BOTH, instances=2):
    return ElasticTables(cores=instances, threads=1, wide=wide, narrow=narrow, wide_slow=wide)


def queue(max_batch=8, max_waiting=64, shared=True, narrow=NARROW, wide=BOTH, instances=2):
    made = ElasticQueue(
        narrow, tables(narrow, wide, instances), max_batch=max_batch, max_waiting=max_waiting, shared=shared
    )
    for instance in range(instances + 1):
        made.finished(instance)
    return made


def offer(made, now_s, *numbers, due_s=float("inf"), **about):
    for number in numbers:
        assert isinstance(made.offer(Request(id=number, deadline_s=due_s, **about), now_s), Accepted)


def started(made, now_s):
    """The instance and the requests of each call that starts now."""
    calls = []
    while (instance := made.turn(now_s)) is not None:
        batch = made.next_batch(instance, now_s)
        calls.append((instance, [one.id for one in batch.requests]))
    return calls


def test_a_request_that_is_alone_is_wide_however_often_it_comes_and_two_are_as_is_sooner():
    made, now_s = queue(), 0.0
    for number in range(20):
        offer(made, now_s, number)
        assert started(made, now_s) == [(WIDE, [number])]
        assert started(made, now_s) == []
        now_s += 0.0024
        made.finished(WIDE, 0.0024)
    poor = queue(wide=SLOW_BOTH)
    for each in (made, poor):
        offer(each, now_s, 20, 21)
    # One after the other they end after 2.4 and 4.8 ms, or after 3.8 and 7.6; at the same time both after 4.0.
    assert started(made, now_s) == [(WIDE, [20])]
    assert started(poor, now_s) == [(0, [20]), (1, [21])]


def test_while_a_wide_call_runs_nothing_starts_and_what_came_starts_at_its_end():
    made = queue()
    offer(made, 0.0, 0)
    assert started(made, 0.0) == [(WIDE, [0])]
    offer(made, 0.001, 1, 2, 3, 4)
    assert started(made, 0.001) == []
    made.finished(WIDE, 0.0024)
    assert started(made, 0.0024) == [(0, [1, 2]), (1, [3, 4])]
    offer(made, 0.003, 5)
    made.finished(1, 0.0075)
    assert started(made, 0.0099) == [], "the other call should end in a moment, and all cores are free then"
    made.finished(0, 0.0076)
    assert started(made, 0.01) == [(WIDE, [5])]


def test_a_core_waits_only_for_a_moment_only_for_few_requests_and_never_beyond_a_deadline():
    for now_s, numbers, due_s, first in (
        (0.0095, [5], inf, []),
        (0.0085, [5], inf, [(1, [5])]),  # the other call takes 1.4 ms more
        (0.0115, [5], inf, [(1, [5])]),  # it takes longer than it should
        (0.0095, [5, 6, 7, 8, 9], inf, [(1, [5, 6, 7, 8, 9])]),
        (0.0095, [5], 0.0122, [(1, [5])]),
        (0.0095, [5], 0.0124, []),  # all cores are free at 9.9 ms, and the wide call takes 2.4 ms
    ):
        made = queue()
        offer(made, 0.0, 0)
        started(made, 0.0)
        offer(made, 0.001, 1, 2, 3, 4)
        made.finished(WIDE, 0.0024)
        assert started(made, 0.0024) == [(0, [1, 2]), (1, [3, 4])]
        made.finished(1, 0.0075)
        offer(made, now_s, *numbers, due_s=due_s)
        assert started(made, now_s) == first


def test_a_wide_call_that_alone_is_in_time_is_waited_for_though_a_narrow_one_needs_longer():
    made = queue(narrow=table(8.0), wide=table(3.0), max_batch=1)
    offer(made, 0.032, 0)
    assert made.next_batch(0, 0.032).requests
    offer(made, 0.036, 1, due_s=0.0435)
    assert started(made, 0.036) == [], "narrow it would end at 44 ms, wide at 43"
    assert made.look_again_s == pytest.approx(0.04)
    made.finished(0, 0.008)
    assert started(made, 0.04) == [(WIDE, [1])]


def test_a_call_that_overruns_is_not_waited_for():
    made = queue(instances=4)
    offer(made, 0.0, 0)
    assert made.next_batch(0, 0.0).requests
    offer(made, 0.0035, 1)
    assert started(made, 0.0035) == []
    assert made.look_again_s == pytest.approx(0.004 + SOON * 0.004)
    assert started(made, made.look_again_s) == [(1, [1])]
    assert made.look_again_s == inf


def test_a_long_queue_is_not_played_through_for_each_call(monkeypatch):
    made = queue(max_waiting=1000)
    offer(made, 0.0, *range(LONG + 1), due_s=10.0)
    monkeypatch.setattr(made, "_late_s", lambda *_: pytest.fail("it is played through"))
    assert made.turn(0.0) == 0
    made.next_batch(0, 0.0)
    offer(made, 0.0, *range(100, 110), due_s=10.0)
    assert made.turn(0.0) == 1


def test_a_crowd_is_narrow():
    made = queue()
    offer(made, 0.0, *range(20))
    assert started(made, 0.0) == [(0, list(range(8))), (1, list(range(8, 16)))]


def test_a_wide_call_that_the_next_one_would_regret_is_not_started():
    made, now_s = queue(wide=SLOW_BOTH), 0.0
    offer(made, now_s, 0, 1)
    started(made, now_s)
    for number in range(2, 40):  # each comes while the one before it runs
        now_s += 0.0025
        made.finished(number % 2, 0.004)
        offer(made, now_s, number)
        assert started(made, now_s) == [(number % 2, [number])]
    for instance in (0, 1):
        made.finished(instance, 0.004)
    now_s += 0.004
    offer(made, now_s, 100)
    assert started(made, now_s) == [(0, [100])]
    made.finished(0, 0.004)
    offer(made, 60.0, 101)
    assert started(made, 60.0) == [(WIDE, [101])]


def test_the_rows_of_a_request_stay_together_so_one_of_many_is_wide():
    made = queue()
    offer(made, 0.0, 0, rows=8)
    assert started(made, 0.0) == [(WIDE, [0])], "narrow it would leave a core idle"
    made.finished(WIDE, 0.0174)
    offer(made, 60.0, 1, 2, rows=8)
    assert started(made, 60.0) == [(0, [1]), (1, [2])]


def test_a_request_of_more_rows_than_wide_calls_were_measured_with_is_narrow():
    made = queue(wide=table(0.5, 0.9))
    offer(made, 0.0, 0, rows=8)
    offer(made, 0.0, 1, 2, 3, 4, 5, 6, 7)
    assert started(made, 0.0) == [(0, [0]), (1, [1, 2, 3, 4, 5, 6, 7])]


@pytest.mark.parametrize(("shared", "kinds"), [(True, "abc"), (False, "aaa")])
def test_requests_that_share_no_call_run_one_after_the_other_on_all_cores_if_those_do_more(shared, kinds):
    made, now_s = queue(wide=table(1.85, 3.6, 7.1, 14.2), shared=shared), 0.0
    for number, kind in enumerate(kinds):
        offer(made, now_s, number, group=kind)
    for number in range(len(kinds)):
        assert started(made, now_s) == [(WIDE, [number])]
        now_s += 0.00185
        made.finished(WIDE, 0.00185)


def test_a_request_of_another_kind_that_would_be_late_after_a_wide_call_has_its_core_at_once():
    made = queue(wide=table(3.0, 3.6, 7.1, 14.2))
    offer(made, 0.0, 0, due_s=0.0041, group="a")
    offer(made, 0.0, 1, due_s=0.0045, group="b")
    assert started(made, 0.0) == [(0, [0]), (1, [1])]


def test_rows_of_other_shapes_and_requests_that_share_no_call_run_beside_each_other_if_that_does_more():
    made = queue()
    offer(made, 0.0, 0, group="a")
    offer(made, 0.0, 1, group="b")
    assert started(made, 0.0) == [(0, [0]), (1, [1])]
    alone = queue(shared=False)
    offer(alone, 0.0, 0)
    assert started(alone, 0.0) == [(WIDE, [0])]
    alone.finished(WIDE)
    offer(alone, 0.1, 1, 2)
    assert started(alone, 0.1) == [(0, [1]), (1, [2])]


def test_a_backlog_takes_the_layout_that_does_more_rows():
    faster_wide = table(2.0, 3.0, 5.0, 9.0, 17.0)
    made = queue(wide=faster_wide)
    offer(made, 0.0, *range(20))
    assert started(made, 0.0) == [(WIDE, list(range(16)))]


def test_a_deadline_that_only_one_layout_meets_decides():
    for due_s, instance in ((0.00395, WIDE), (float("inf"), 0)):
        made = queue(wide=SLOW_BOTH)
        offer(made, 0.0, 0, 1)
        started(made, 0.0)
        for number in range(2, 40):
            made.finished(number % 2, 0.004)
            offer(made, 0.0025 * number, number)
            started(made, 0.0025 * number)
        for number in (0, 1):
            made.finished(number, 0.004)
        offer(made, 0.1, 100, due_s=0.1 + due_s)
        assert started(made, 0.1) == [(instance, [100])]
    uneven = ElasticQueue(NARROW, replace(tables(), wide_slow=table(6.0, 8.0, 12.0)), max_batch=8, max_waiting=64)
    for number in range(3):
        uneven.finished(number)
    offer(uneven, 0.0, 0, due_s=0.005)
    assert started(uneven, 0.0) == [(0, [0])]


def test_an_instance_that_is_gone_or_came_back_takes_no_core_twice():
    made = queue()
    offer(made, 0.0, 0)
    assert started(made, 0.0) == [(WIDE, [0])]
    made.leave(1)
    made.finished(1)
    offer(made, 0.001, 1)
    assert started(made, 0.001) == []
    made.leave(WIDE)
    assert started(made, 0.001) == [(0, [1])]
    made.finished(0, 0.004)
    offer(made, 0.1, 2)
    assert started(made, 0.1) == [(0, [2])]
    made.finished(0, 0.004)
    made.finished(WIDE)
    offer(made, 60.0, 3)
    assert started(made, 60.0) == [(WIDE, [3])]


def test_wide_calls_that_take_long_slow_all_predictions():
    made = queue()
    assert made.expected_s(0.0) == pytest.approx(0.0024)
    for number in range(40):
        offer(made, float(number), number)
        assert started(made, float(number)) == [(WIDE, [number])]
        made.finished(WIDE, 0.0048)
    assert made.slowness == pytest.approx(2.0)
    assert made.expected_s(100.0) == pytest.approx(0.0048)


STEPS = st.lists(st.floats(0.1, 8.0), min_size=1, max_size=5)


ASKED = st.tuples(st.floats(0.0, 0.02), st.integers(1, 4), st.floats(0.001, 0.06), st.sampled_from("aab"))


@given(STEPS, STEPS, st.lists(ASKED, max_size=25))
def test_whoever_was_not_started_at_once_is_in_time_if_calls_last_as_measured(few, many, asked):
    """For any tables, arrivals, rows, deadlines and kinds; a core is idle for a moment only while a request waits; none
    is lost."""
    narrow, wide = (
        LatencyTable(points=tuple((k + 1, sum(steps[: k + 1])) for k in range(len(steps)))) for steps in (few, many)
    )
    made = queue(max_batch=4, narrow=narrow, wide=wide)
    ends, order, waiting, answered, lost, now_s = [], count(), {}, set(), set(), 0.0

    def start():
        while (instance := made.turn(now_s)) is not None:
            batch = made.next_batch(instance, now_s)
            lost.update(one.request.id for one in batch.dropped)
            if batch.requests:
                assert instance == WIDE or WIDE not in [one[2] for one in ends]
                assert instance != WIDE or not ends, "a wide call has all cores"
                assert sum(one.rows for one in batch.requests) <= (len(many) if instance == WIDE else 4)
                heapq.heappush(ends, (batch.end_s, next(order), instance, now_s, batch.requests))
        if made.waiting_rows and len(ends) < 2 and [one[2] for one in ends] != [WIDE]:
            assert ends, "all cores are idle"
            free_s = made._free_s(now_s)
            only_wide = made._late_s(made._waiting, free_s) > 0 >= made._late_wide_s(made._waiting, max(free_s))
            assert only_wide or ends[0][0] - now_s <= SOON * narrow.latency_ms(1) / 1e3 + 1e-9

    def finish(until_s):
        nonlocal now_s
        while ends and ends[0][0] <= until_s:
            now_s, _, instance, began_s, requests = heapq.heappop(ends)
            for one in requests:
                assert now_s <= one.deadline_s + 1e-9 or waiting[one.id] == began_s
                answered.add(one.id)
            made.finished(instance, now_s - began_s)
            start()

    accepted = set()
    for number, (gap_s, rows, left_s, kind) in enumerate(asked):
        until_s = now_s + gap_s
        finish(until_s)
        now_s = until_s
        decision = made.offer(Request(id=number, deadline_s=now_s + left_s, rows=rows, group=kind), now_s)
        lost.update(one.request.id for one in decision.dropped)
        if isinstance(decision, Accepted):
            accepted.add(number)
            waiting[number] = now_s
        start()
    finish(float("inf"))
    assert answered == accepted - lost
    assert not lost


class AnyEvents:
    """An elastic queue to which anything happens, and what has become of its requests."""

    def __init__(self, random):
        self.random, self.now_s = random, 0.0
        self.instances, self.most = random.choice([2, 3, 8]), random.choice([1, 4, 9])
        narrow, wide = self.times(self.most), self.times(random.choice([1, 4, 9]))
        self.most_wide, self.shared = wide.points[-1][0], random.random() < 0.7
        self.queue = ElasticQueue(
            narrow, tables(narrow, wide, self.instances), max_batch=self.most, max_waiting=200, shared=self.shared
        )
        self.wide, self.gone, self.running, self.state = self.queue.wide, set(), {}, {}
        self.kinds, self.is_due = random.choice([1, 2, 16]), random.random() < 0.6
        self.row_s = narrow.points[0][1] / 1e3
        for instance in range(self.instances + 1):
            self.queue.finished(instance)

    def times(self, most):
        """A table up to at most so many rows."""
        steps = [self.random.uniform(0.1, 8.0) for _ in range(self.random.randint(1, most))]
        return LatencyTable(points=tuple((k + 1, sum(steps[: k + 1])) for k in range(len(steps))))

    def drop(self, dropped):
        for one in dropped:
            assert self.state[one.request.id] == "waiting"
            self.state[one.request.id] = one.reason

    def offer(self):
        number, left_s = len(self.state), self.random.uniform(-0.5, 30) * self.row_s
        asked = Request(
            id=number,
            deadline_s=self.now_s + left_s if self.is_due else inf,
            priority=self.random.randint(-1, 1),
            group=self.random.randrange(self.kinds),
            rows=self.random.choice([1, 1, self.random.randint(1, self.most + 1)]),
        )
        decision = self.queue.offer(asked, self.now_s)
        self.state[number] = "waiting" if isinstance(decision, Accepted) else "refused"
        self.drop(decision.dropped)

    def end(self, instance):
        """A call ends, or its instance dies with it."""
        began_s, end_s, requests = self.running.pop(instance)
        self.now_s = max(self.now_s, end_s * self.random.choice([1.0, 1.0, 1.3]))
        if self.random.random() < 0.05:
            self.queue.leave(instance)
            self.gone.add(instance)
        else:
            self.queue.finished(instance, None if self.random.random() < 0.1 else self.now_s - began_s)
        self.state.update((one.id, "ended") for one in requests)

    def cancel(self):
        number = self.random.randrange(len(self.state) + 1)
        self.queue.cancel(number)
        if self.state.get(number) == "waiting":
            self.state[number] = "cancelled"

    def start(self):
        while (instance := self.queue.turn(self.now_s)) is not None:
            batch = self.queue.next_batch(instance, self.now_s)
            self.drop(batch.dropped)
            if batch.requests:
                self.begin(instance, batch)
        narrow = set(range(self.instances)) - self.gone
        if self.queue.waiting_rows and narrow - set(self.running) and self.wide not in self.running:
            assert self.running, "all cores are idle"
            assert self.queue.look_again_s < inf, "a core is idle"

    def begin(self, instance, batch):
        assert instance not in self.gone | set(self.running)
        assert not self.running if instance == self.wide else self.wide not in self.running, "a core has two calls"
        assert sum(one.rows for one in batch.requests) <= (self.most_wide if instance == self.wide else self.most)
        assert len({one.group for one in batch.requests}) == 1
        assert self.shared or len(batch.requests) == 1
        for one in batch.requests:
            assert self.state[one.id] == "waiting"
            self.state[one.id] = "running"
        self.running[instance] = self.now_s, batch.end_s, batch.requests

    def happen(self):
        chance = self.random.random()
        if chance < 0.5:
            for _ in range(self.random.choice([1, 1, 5, 30])):
                self.offer()
        elif chance < 0.85 and self.running:
            self.end(self.random.choice([min(self.running, key=lambda each: self.running[each][1]), *self.running]))
        elif chance < 0.9:
            self.cancel()
        elif chance < 0.95 and self.gone:
            self.queue.finished(self.gone.pop())
        else:
            self.now_s += self.random.uniform(0.0, 5.0) * self.row_s
            self.drop(self.queue.expire(self.now_s))
        self.start()


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_whatever_happens_no_core_has_two_calls_none_is_idle_for_nothing_and_every_request_ends(random):
    made = AnyEvents(random)
    for _ in range(random.randint(1, 80)):
        made.happen()
    made.random = SimpleNamespace(choice=lambda values: values[0], random=lambda: 1.0)  # all goes well from now on
    while made.gone:
        made.queue.finished(made.gone.pop())
    made.start()
    while made.running:
        made.end(min(made.running, key=lambda each: made.running[each][1]))
        made.start()
    assert made.queue.waiting_rows == 0
    assert not {"waiting", "running"} & set(made.state.values())


def test_a_request_that_only_wide_calls_answer_in_time_is_accepted_and_gets_one():
    made = queue()
    offer(made, 0.0, 0, due_s=0.0092)
    assert started(made, 0.0) == [(WIDE, [0])]
    offer(made, 0.001, 1, 2, 3, due_s=0.0092)
    assert isinstance(made.offer(Request(id=4, deadline_s=0.0092), 0.001), Refused)
    made.finished(WIDE, 0.0024)
    assert started(made, 0.0024) == [(WIDE, [1, 2, 3])], "until 9.05 ms; narrow the third would end after 9.9 ms"


def test_a_request_of_higher_priority_displaces_none_where_wide_calls_are_in_time_for_all():
    made = queue()
    offer(made, 0.0, 0, due_s=0.0092)
    assert started(made, 0.0) == [(WIDE, [0])]
    offer(made, 0.001, 1, 2, due_s=0.0092)
    decision = made.offer(Request(id=3, deadline_s=0.0092, priority=1), 0.001)
    assert decision == Accepted(), "narrow one of three would end after 9.9 ms"
    made.finished(WIDE, 0.0024)
    assert [sorted(numbers) for _, numbers in started(made, 0.0024)] == [[1, 2, 3]]
    offer(made, 0.0025, 4, due_s=0.0092 + 0.0067)
    decision = made.offer(Request(id=5, deadline_s=0.0092, priority=1), 0.0025)
    assert isinstance(decision, Refused), "no call that runs makes room for it"


# --- simulated ------------------------------------------------------------------------------------------------------


def test_at_every_load_requests_are_about_as_fast_as_under_the_better_layout_alone():
    def exactly(found):
        return lambda rows, rng: found.latency_ms(rows) / 1e3

    most_per_s = capacity_per_s(exactly(NARROW), instances=2, max_batch=8)
    for load in (0.05, 1 / 3, 2 / 3, 0.95):
        told = {"rate_per_s": load * most_per_s, "max_batch": 8, "max_waiting": 1024}
        both = Wide(tables(), exactly(BOTH))
        elastic = simulate_load(NARROW, service=exactly(NARROW), instances=2, wide=both, **told)
        alone = [
            simulate_load(found, service=exactly(found), instances=instances, **told)
            for found, instances in ((BOTH, 1), (NARROW, 2))
        ]
        assert elastic.p50_ms <= 1.1 * min(one.p50_ms for one in alone)
        assert elastic.p99_ms <= 1.15 * min(one.p99_ms for one in alone)
        assert (elastic.answered, elastic.refused) == (2000, 0)


@pytest.mark.parametrize("load", [0.1, 0.3])
def test_under_deadlines_no_more_is_refused_than_by_the_better_layout_alone(load):
    def exactly(found):
        return lambda rows, rng: found.latency_ms(rows) / 1e3

    most_per_s = capacity_per_s(exactly(NARROW), instances=2, max_batch=8)
    told = {"rate_per_s": load * most_per_s, "slo_ms": 7.2, "max_batch": 8, "max_waiting": 1024}
    both = Wide(tables(), exactly(BOTH))
    elastic = simulate_load(NARROW, service=exactly(NARROW), instances=2, wide=both, **told)
    alone = [
        simulate_load(found, service=exactly(found), instances=instances, **told)
        for found, instances in ((BOTH, 1), (NARROW, 2))
    ]
    assert elastic.refused <= min(one.refused for one in alone)
    assert elastic.p99_ms <= 7.2


# --- threads --------------------------------------------------------------------------------------------------------


class Cores:
    """Runs that double numbers and fail where two calls have one core."""

    def __init__(self):
        self.free, self.ran, self.lock = 2, [], threading.Lock()
        self.dies, self.opened = set(), threading.Event()
        self.opened.set()

    def run(self, cores, inputs):
        with self.lock:
            self.free -= cores
            assert self.free >= 0
            self.ran.append((cores, len(inputs[0])))
            dies = cores in self.dies
            self.dies.discard(cores)
        assert self.opened.wait(PATIENCE_S)
        with self.lock:
            self.free += cores
        if dies:
            raise InstanceDied("not today")
        return [2 * array for array in inputs]


def batcher(cores, **more):
    runs = [lambda inputs, few=few: cores.run(few, inputs) for few in (1, 1, 2)]
    quick = table(0.001, 0.002, 0.003, 0.004)
    made = ElasticQueue(quick, tables(quick, table(0.0005, 0.001, 0.002, 0.004)), max_batch=8, max_waiting=10_000)
    return Batcher(runs, made, **more)


def test_threads_share_the_cores_and_every_answer_is_its_own():
    cores = Cores()
    with batcher(cores) as made:
        for number in range(20):
            answer = made.submit([np.full((1, 2), number)]).result(PATIENCE_S)
            assert (answer.outputs[0] == 2 * number).all()
            assert answer.instance == WIDE
        cores.opened.clear()
        futures = [made.submit([np.full((1 + k % 3, 2), k)]) for k in range(300)]
        cores.opened.set()
        wait(futures, PATIENCE_S)
        for k, future in enumerate(futures):
            assert np.array_equal(future.result().outputs[0], np.full((1 + k % 3, 2), 2 * k))
    assert {threads for threads, _ in cores.ran[:20]} == {2}
    assert 1 in {threads for threads, _ in cores.ran[20:]}, "a crowd has a core for each call"
    assert cores.free == 2


def test_a_request_that_waits_for_the_last_core_does_not_wait_for_a_call_that_hangs():
    held, hangs, queued = threading.Event(), threading.Event(), threading.Event()

    def wide(inputs):
        held.set()
        assert queued.wait(PATIENCE_S)
        return inputs

    def narrow(inputs):
        if inputs[0][0, 0] == 1:
            assert hangs.wait(PATIENCE_S)
        elif inputs[0][0, 0] == 2:
            time.sleep(0.2)
        return inputs

    slow = table(200.0, 400.0)
    made = ElasticQueue(slow, tables(slow, table(190.0, 390.0)), max_batch=1, max_waiting=64)
    with Batcher([narrow, narrow, wide], made) as batching:
        first = batching.submit([np.zeros((1, 1))])
        assert held.wait(PATIENCE_S)
        hanging, other = (batching.submit([np.full((1, 1), k)]) for k in (1, 2))
        queued.set()
        first.result(PATIENCE_S)
        other.result(PATIENCE_S)
        try:
            assert batching.submit([np.full((1, 1), 3)]).result(PATIENCE_S).instance != WIDE
        finally:
            hangs.set()
        hanging.result(PATIENCE_S)


def test_draining_answers_all_that_wait_and_an_instance_that_died_is_replaced():
    cores = Cores()
    cores.dies = {1, 2}
    made = batcher(cores, reopen=lambda instance: lambda inputs: cores.run(2 if instance == WIDE else 1, inputs))
    futures = [made.submit([np.full((2, 2), k)]) for k in range(100)]
    wait(futures, PATIENCE_S)
    futures += [made.submit([np.full((2, 2), k)]) for k in range(100, 200)]
    assert made.close(PATIENCE_S)
    lost = [k for k, future in enumerate(futures) if future.exception() is not None]
    assert len(lost) <= 8, "two calls died, each of at most eight rows"
    for k, future in enumerate(futures):
        assert k in lost or np.array_equal(future.result().outputs[0], np.full((2, 2), 2 * k))


def test_a_crowd_is_answered_at_the_highest_rate_whatever_lowers_the_mean_latency():
    for waiting, calls in ((15, [(WIDE, [0])]), (16, [(0, [*range(8)]), (1, [*range(8, 16)])])):
        made = queue()
        made._rounds = SimpleNamespace(wide_requests=lambda *state: 1)  # as where small wide calls are short
        offer(made, 0.0, *range(waiting))
        assert started(made, 0.0) == calls


def test_a_crowd_has_full_calls_though_single_rows_were_measured_to_be_the_fastest():
    made = queue(wide=table(1.5, 4.5, 8.8, 17.4, 34.8))
    offer(made, 0.0, *range(16))
    assert started(made, 0.0) == [(0, [*range(8)]), (1, [*range(8, 16)])]


def test_a_crowd_of_several_kinds_runs_narrow():
    made = queue()
    for k in range(6):
        made.offer(Request(id=k, deadline_s=inf, group=k), 0.0)
    assert [instance for instance, _ in started(made, 0.0)] == [0, 1]
