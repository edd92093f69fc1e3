"""elastic session: leases of cores between threads that call, with an engine that shows what runs."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest

from corewise.batching import LatencyTable, Partitions
from corewise.common.errors import EngineError
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.runtime.elastic import Elastic, open_elastic
from corewise.runtime.instances import Pool

CPU = inspect_cpu()
BUILD = Build(engine="shown", precision="fp32")
PLAN = ElasticPlan(
    wide=Plan(threads_per_instance=2, batch=8), narrow=Plan(threads_per_instance=1, instances=2, batch=4)
)
PARTITIONS = Partitions(
    {1: LatencyTable(points=((1, 4.0), (4, 10.0))), 2: LatencyTable(points=((1, 2.4), (8, 14.0)))}, cores=2
)


class Shown:
    """An engine that doubles numbers, notes what ran, and fails where two calls have one core."""

    def __init__(self):
        self.ran = []
        self.hold = threading.Event()
        self.hold.set()
        self.raises = None
        self.closed = 0
        self._lock = threading.Lock()
        self._cores = 2

    def open(self, folder, build, plan):
        return ShownSession(self, plan.threads_per_instance)

    def lease(self, threads):
        with self._lock:
            self._cores -= threads
            assert self._cores >= 0


class ShownSession:
    def __init__(self, engine, threads):
        self._engine, self._threads = engine, threads

    def run(self, inputs):
        self._engine.lease(self._threads)
        try:
            self._engine.ran.append((self._threads, len(inputs[0]), threading.get_ident()))
            assert self._engine.hold.wait(60)
            if self._engine.raises is not None:
                raise self._engine.raises
            return [2 * array for array in inputs]
        finally:
            self._engine.lease(-self._threads)

    def close(self):
        self._engine.closed += 1


@pytest.fixture
def engine():
    return Shown()


@pytest.fixture
def session(engine):
    with_both = Elastic(engine, Path(), BUILD, PLAN, PARTITIONS, CPU)
    yield with_both
    engine.hold.set()
    with_both.close()


def until(condition):
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def numbers(rows, seed=0):
    return [np.random.default_rng(seed).standard_normal((rows, 3)), np.arange(rows)]


def test_a_call_that_is_alone_runs_on_all_cores_in_its_own_thread(session, engine):
    for _ in range(5):
        session.run(numbers(1))
    assert engine.ran == [(2, 1, threading.get_ident())] * 5


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 50])
def test_rows_are_divided_and_come_back_in_order(session, engine, rows):
    inputs = numbers(rows)
    for one, other in zip(session.run(inputs), inputs, strict=True):
        np.testing.assert_array_equal(one, 2 * other)
    assert sum(count for _, count, _ in engine.ran) == rows
    assert (8 if rows >= 8 else 0) <= sum(count for threads, count, _ in engine.ran if threads == 1)


def test_many_threads_get_their_own_answers_and_no_core_twice(session):
    def call(seed):
        inputs = numbers(1 + seed % 11, seed)
        return all(map(np.array_equal, session.run(inputs), [2 * array for array in inputs]))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(call, range(300)))
    assert session._policy.free == 2
    assert not session._calls


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("error", [ValueError("not today"), KeyboardInterrupt()])
def test_after_a_call_that_failed_or_was_interrupted_the_next_one_runs(session, engine, rows, error):
    engine.raises = error
    with pytest.raises(type(error)):
        session.run(numbers(rows))
    until(lambda: session._policy.free == 2)
    engine.raises = None
    assert len(session.run(numbers(3))[0]) == 3


class NotCopied(np.ndarray):
    """There is no memory for a copy of its rows."""

    def __getitem__(self, key):
        raise MemoryError("no room")


@pytest.mark.parametrize("rows", [1, 50])
def test_a_call_for_whose_rows_there_is_no_memory_fails_alone_and_waits_for_nothing(session, engine, rows):
    engine.hold.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(session.run, numbers(1))
        until(lambda: engine.ran)
        second = threads.submit(session.run, [np.zeros((rows, 3)).view(NotCopied)])
        until(lambda: len(session._calls) == 2)
        engine.hold.set()
        assert len(first.result(60)[0]) == 1
        with pytest.raises(MemoryError, match="no room"):
            second.result(60)
    assert session._policy.free == 2
    assert len(session.run(numbers(9))[0]) == 9


def test_after_a_part_that_failed_no_more_of_its_call_starts(session, engine):
    engine.raises = ValueError("not today")
    with pytest.raises(ValueError, match="not today"):
        session.run(numbers(1000))
    assert len(engine.ran) == 2, "those that began together"
    until(lambda: session._policy.free == 2)
    engine.raises = None
    assert len(session.run(numbers(9))[0]) == 9


def test_closing_waits_for_what_runs_and_ends_what_waits(session, engine):
    engine.hold.clear()
    with ThreadPoolExecutor(3) as threads:
        runs = threads.submit(session.run, numbers(1))
        until(lambda: engine.ran)
        waits = threads.submit(session.run, numbers(1))
        until(lambda: len(session._calls) == 2)
        closed = threads.submit(session.close)
        with pytest.raises(EngineError, match="the model was closed"):
            waits.result(60)
        assert engine.closed == 0
        engine.hold.set()
        assert len(runs.result(60)[0]) == 1
        closed.result(60)
    assert engine.closed == 3
    session.close()
    with pytest.raises(EngineError, match="the model was closed"):
        session.run(numbers(1))


def test_whoever_closes_it_again_waits_until_it_is_closed(session, engine):
    engine.hold.clear()
    with ThreadPoolExecutor(3) as threads:
        runs = threads.submit(session.run, numbers(1))
        until(lambda: engine.ran)
        first = threads.submit(session.close)
        until(lambda: session._closed)
        again = threads.submit(session.close)
        assert wait([again], timeout=0.05).not_done, "what runs has not ended"
        engine.hold.set()
        again.result(60)
        assert engine.closed == 3
        assert len(runs.result(60)[0]) == 1
        first.result(60)


def test_calls_of_threads_that_outlive_the_interpreters_main_thread_fail_and_none_waits_for_ever(session, engine):
    ended = []

    def call(rows):
        try:
            ended.append(len(session.run(numbers(rows))[0]))
        except RuntimeError as error:
            ended.append(str(error))

    engine.hold.clear()
    for calls, rows in enumerate([1, 20, 20, 20]):
        until(lambda: len(session._calls) == calls)  # noqa: B023 - it is called at once
        threading.Thread(target=call, args=(rows,), daemon=True).start()
    until(lambda: len(session._calls) == 4)
    for instance in session._narrow._threads:  # as the interpreter does when it ends
        instance.shutdown()
    engine.hold.set()
    until(lambda: len(ended) == 4)
    assert ended.count(1) == 1
    assert ended.count("cannot schedule new futures after shutdown") == 3
    until(lambda: session._policy.free == 2)
    session._narrow._threads.clear()
    session._narrow._sessions.clear()


def test_a_forked_process_is_told_and_one_that_opens_it_gets_the_narrow_layout(session, engine, monkeypatch):
    with monkeypatch.context() as other_process:
        other_process.setattr("corewise.runtime.instances.os.getpid", lambda: -1)
        with pytest.raises(EngineError, match="forked from it"):
            session.run(numbers(1))
        session.close()
        opened = open_elastic(engine, Path(), BUILD, PLAN, PARTITIONS, CPU)
        assert isinstance(opened, Pool)
        assert len(opened.run(numbers(9))[0]) == 9
        opened.close()
    assert len(session.run(numbers(1))[0]) == 1


def test_what_cannot_be_opened_leaves_nothing_open(engine):
    class Refuses(Shown):
        def open(self, folder, build, plan):
            if plan == PLAN.narrow:
                raise EngineError("not today")
            return super().open(folder, build, plan)

    refuses = Refuses()
    with pytest.raises(EngineError, match="not today"):
        Elastic(refuses, Path(), BUILD, PLAN, PARTITIONS, CPU)
    assert refuses.closed == 1


@pytest.mark.parametrize(("wide", "narrow"), [((2, 1), (2, 1)), ((2, 2), (1, 4)), ((3, 1), (1, 2)), ((1, 1), (1, 1))])
def test_an_elastic_plan_has_two_layouts_of_as_many_threads(wide, narrow):
    plans = [Plan(threads_per_instance=threads, instances=instances) for threads, instances in (wide, narrow)]
    with pytest.raises(ValueError, match="is no elastic plan"):
        ElasticPlan(wide=plans[0], narrow=plans[1])
