import heapq
import json
import threading
from concurrent.futures import Future
from itertools import cycle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.common.errors import InputError
from corewise.records.build import Plan
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import LoadRun
from corewise.runtime.loadgen import BACKOFF_S, arrivals_s, check_load, closed_loop, open_loop

PLAN = Plan(threads_per_instance=1)


class Full(Exception):
    """The refusal of these tests."""


class World:
    """Virtual time, and a server in it: ``fate(k)`` is what becomes of request k, and after how many seconds.

    Fates: "right", "wrong", "refused" (at once), "dropped", "broken", "cancelled", "silent".
    """

    def __init__(self, fate):
        self.fate = fate
        self.now_s = 100.0
        self.ends = []
        self.sent_s = []
        self.silent = []

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        until_s = self.now_s + seconds
        while self.ends and self.ends[0][0] <= until_s:
            self.now_s, k, future, fate = heapq.heappop(self.ends)
            self.end(k, future, fate)
        self.now_s = until_s

    def submit(self, k):
        assert k == len(self.sent_s), "requests are numbered in their order"
        self.sent_s.append(self.now_s)
        fate, after_s = self.fate(k)
        if fate == "refused":
            self.now_s += after_s
            raise Full
        future = Future()
        if fate == "silent":
            self.silent.append(future)
        else:
            heapq.heappush(self.ends, (self.now_s + after_s, k, future, fate))
            if after_s == 0:
                self.end(*heapq.heappop(self.ends)[1:])
        return future

    @staticmethod
    def end(k, future, fate):
        if fate in ("right", "wrong"):
            future.set_result((k, fate))
        elif fate == "cancelled":
            future.cancel()
        else:
            future.set_exception(Full() if fate == "dropped" else ValueError("broken"))

    def open(self, **options):
        wanted = {
            "plan": PLAN,
            "rate_per_s": 50.0,
            "duration_s": 4.0,
            "refusal": Full,
            "check": self.check,
            "patience_s": 5.0,
        }
        return open_loop(self.submit, clock=self.clock, sleep=self.sleep, **wanted | options)

    def check(self, k, result):
        assert result[0] == k
        return result[1] == "right"


FATES = st.tuples(
    st.sampled_from(["right", "wrong", "refused", "dropped", "broken", "cancelled", "silent"]),
    st.sampled_from([0.0, 0.001, 0.03, 0.5, 3.0]),
)


@given(st.lists(FATES, min_size=1, max_size=30), st.integers(0, 3), st.sampled_from([None, 30.0, 1e6]))
def test_every_request_is_counted_once_whatever_becomes_of_it(fates, seed, slo_ms):
    world = World(lambda k: fates[k % len(fates)])
    run = world.open(seed=seed, slo_ms=slo_ms)
    sent = [fates[k % len(fates)][0] for k in range(len(world.sent_s))]
    assert run.offered == len(sent)
    assert run.answered == sent.count("right")
    assert run.refused == sent.count("refused") + sent.count("dropped")
    assert run.failed == run.offered - run.answered - run.refused
    assert 0 <= run.in_time <= run.answered
    assert run.in_time == run.answered or slo_ms == 30.0
    assert from_json(LoadRun, json.loads(json.dumps(to_json(run)))) == run


def test_what_answers_after_it_was_given_up_is_not_counted_again():
    world = World(lambda k: ("silent", 0.0))
    before = world.open()
    for future in world.silent:
        future.set_result((0, "right"))
    assert (before.answered, before.failed) == (0, before.offered)
    late = World(lambda k: ("right", 40.0))
    run = late.open(patience_s=38.0)
    late.sleep(100.0)
    assert 0 < run.answered < run.offered == run.answered + run.failed


def test_arrivals_are_a_poisson_process_and_the_seeds():
    times_s = arrivals_s(200.0, 100.0, seed=3)
    gaps_s = np.diff(times_s)
    assert len(times_s) == pytest.approx(20_000, abs=3 * 20_000**0.5)
    assert times_s[0] >= 0
    assert times_s[-1] < 100.0
    assert gaps_s.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps_s.std() == pytest.approx(1 / 200, rel=0.05)  # exponential gaps: as wide as their mean
    assert np.corrcoef(gaps_s[:-1], gaps_s[1:])[0, 1] == pytest.approx(0, abs=0.03)
    counts = np.histogram(times_s, bins=2000, range=(0, 100.0))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.12)
    assert np.array_equal(times_s, arrivals_s(200.0, 100.0, seed=3))
    assert not np.array_equal(times_s[:10], arrivals_s(200.0, 100.0, seed=4)[:10])


def test_requests_go_out_when_they_are_due_and_latencies_are_theirs():
    world = World(lambda k: ("right", 0.02 if k % 2 else 0.04))
    run = world.open(slo_ms=30.0)
    assert np.allclose(np.array(world.sent_s) - 100.0, arrivals_s(50.0, 4.0, seed=0))
    assert run.sender_late_p99_ms == pytest.approx(0.0, abs=1e-6)
    assert (run.p50_ms, run.p99_ms) == (pytest.approx(40, abs=20.1), pytest.approx(40))
    assert run.in_time == run.offered // 2
    assert not run.met
    assert run.duration_s == pytest.approx(4.0, abs=0.05)
    assert run.goodput_per_s == run.in_time / run.duration_s


def test_a_sender_that_is_held_up_hides_nothing():
    """One submit takes a second: those that were due meanwhile waited, though each is answered at once when sent."""
    world = World(lambda k: ("right", 0.0))
    submit = world.submit

    def stalls(k):
        if k == 20:
            world.now_s += 1.0
        return submit(k)

    world.submit = stalls
    run = world.open(slo_ms=100.0)
    due_s = 100.0 + arrivals_s(50.0, 4.0, seed=0)
    held_up = (due_s > due_s[20]) & (due_s < due_s[20] + 0.9)
    assert run.offered - run.in_time == held_up.sum() + 1 > 20
    assert run.p99_ms > 900
    assert run.sender_late_p99_ms > 800


def test_work_that_ends_after_the_sending_counts_with_its_time():
    world = World(lambda k: ("right", 4.0))
    run = world.open()
    assert run.answered == run.offered
    assert run.duration_s > 7.5
    assert run.goodput_per_s < 30


def test_refusals_tell_how_long_they_took():
    world = World(lambda k: ("refused", 0.002))
    run = world.open(rate_per_s=5.0)
    assert (run.refused, run.answered, run.p99_ms) == (run.offered, 0, 0.0)
    free_s, waits_ms = 0.0, []
    for due_s in arrivals_s(5.0, 4.0, seed=0):  # a sender that a refusal holds up is late with the next request
        free_s = max(free_s, due_s) + 0.002
        waits_ms.append((free_s - due_s) * 1e3)
    assert run.refusal_p99_ms == pytest.approx(np.quantile(waits_ms, 0.99))
    assert not run.met


def test_what_submit_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        open_loop(lambda k: 1 // 0, plan=PLAN, rate_per_s=1e3, duration_s=0.1, refusal=Full)


# --- the closed loop ----------------------------------------------------------------------------------------------


class Counter:
    """A server that answers the oldest request when all clients wait, a hundredth of a virtual second later."""

    def __init__(self, clients):
        self.clients, self.now_s = clients, 0.0
        self.waiting, self.most = [], 0

    def clock(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds
        if self.waiting:
            self.waiting.pop(0).set_result(None)

    def submit(self, k):
        future = Future()
        self.waiting.append(future)
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == self.clients:
            self.now_s += 0.01
            self.waiting.pop(0).set_result(None)
        return future


@pytest.mark.parametrize("clients", [1, 3])
def test_each_client_sends_again_when_it_has_its_answer(clients):
    server = Counter(clients)
    run = closed_loop(
        server.submit,
        plan=PLAN,
        clients=clients,
        duration_s=1.0,
        refusal=Full,
        clock=server.clock,
        sleep=server.sleep,
    )
    assert (run.clients, run.rate_per_s) == (clients, None)
    assert run.offered == run.answered == pytest.approx(100 + clients - 1, abs=1)
    assert server.most == clients
    assert run.p50_ms == pytest.approx(10.0 * clients)
    assert run.met


def test_a_refused_client_backs_off():
    world = World(lambda k: ("refused", 0.0))
    run = closed_loop(
        world.submit, plan=PLAN, clients=2, duration_s=1.0, refusal=Full, clock=world.clock, sleep=world.sleep
    )
    assert run.refused == run.offered == pytest.approx(2 / BACKOFF_S, abs=2)


@given(st.lists(FATES.filter(lambda fate: fate[0] != "silent"), min_size=1, max_size=20))
def test_a_closed_loop_counts_every_request_once(fates):
    world = World(lambda k: (fates[k % len(fates)][0], 0.0))

    def submit(k):
        world.now_s += 0.01
        return world.submit(k)

    run = closed_loop(
        submit,
        plan=PLAN,
        clients=3,
        duration_s=1.0,
        refusal=Full,
        check=world.check,
        clock=world.clock,
        sleep=world.sleep,
    )
    sent = [fates[k % len(fates)][0] for k in range(len(world.sent_s))]
    assert run.offered == len(sent) > 2
    assert run.answered == sent.count("right")
    assert run.refused == sent.count("refused") + sent.count("dropped")
    assert run.failed == run.offered - run.answered - run.refused


def test_real_threads_that_answer_late_and_in_any_order_lose_nothing():
    """A thread answers what waits in any order: futures end in it, while this thread sends."""
    rng = np.random.default_rng(0)
    waiting, lock, done = [], threading.Lock(), threading.Event()
    ends = cycle([*[lambda future: future.set_result(None)] * 3, lambda future: future.set_exception(Full()),
                  lambda future: future.set_exception(ValueError())])  # fmt: skip

    def answer():
        while not done.is_set() or waiting:
            with lock:
                future = waiting.pop(int(rng.integers(len(waiting)))) if waiting else None
            if future is not None:
                next(ends)(future)
            done.wait(1e-4)

    def submit(k):
        future = Future()
        with lock:
            waiting.append(future)
        return future

    server = threading.Thread(target=answer)
    server.start()
    opened = open_loop(submit, plan=PLAN, rate_per_s=2000.0, duration_s=0.3, refusal=Full)
    closed = closed_loop(submit, plan=PLAN, clients=5, duration_s=0.3, refusal=Full)
    done.set()
    server.join()
    assert 0 < opened.offered <= len(arrivals_s(2000.0, 0.3, 0))  # fewer where the machine is held up
    for run in (opened, closed):
        assert run.offered == run.answered + run.refused + run.failed
    assert closed.offered >= 5  # on a machine that is held up, hardly more than one for each client
    assert min(opened.answered, opened.refused, opened.failed) >= opened.offered // 5


# --- what is no load ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "told"),
    [
        ({"rate_per_s": 0.0}, "the rate is 0; give a number above 0"),
        ({"rate_per_s": -3.0}, "the rate is -3"),
        ({"rate_per_s": float("nan")}, "the rate is nan"),
        ({"rate_per_s": float("inf")}, "the rate is inf"),
        ({"duration_s": 0.0}, "the duration is 0"),
        ({"slo_ms": 0.0}, "the SLO is 0"),
        ({"rate_per_s": 1e9}, "more than one sender can send"),
    ],
)
def test_what_is_no_load_is_said_at_once(load, told):
    with pytest.raises(InputError, match=told):
        World(lambda k: ("right", 0.0)).open(**load)


def test_a_closed_loop_has_no_billion_clients():
    with pytest.raises(InputError, match="1,000,000,000 clients are more than one sender can simulate; give at most"):
        check_load(clients=10**9, duration_s=1.0)


def test_a_closed_loop_needs_a_client():
    with pytest.raises(InputError, match="the number of clients is 0"):
        closed_loop(lambda k: Future(), plan=PLAN, clients=0, duration_s=1.0, refusal=Full)
