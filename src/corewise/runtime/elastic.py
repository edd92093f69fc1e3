"""Two layouts of a payload as one session: a call that is alone takes all cores, calls from many threads share them."""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Lock, RLock
from time import monotonic
from typing import NamedTuple

import numpy as np

from corewise.batching import ElasticPolicy, Partitions
from corewise.batching.partition import Part
from corewise.engines import Engine, Session
from corewise.engines.base import rows_of
from corewise.machine.layouts import assign
from corewise.records.build import Build, ElasticPlan
from corewise.records.cpu import Cpu
from corewise.runtime.instances import Alone, Instances, OpenedHere, closed, is_forked, open_plan

Outputs = list[np.ndarray]


def open_elastic(
    engine: Engine, folder: Path, build: Build, plan: ElasticPlan, partitions: Partitions, cpu: Cpu
) -> Session:
    """A payload under an elastic plan, as one session that any number of threads may call at any time.

    In a process that was forked after it imported corewise, only the narrow layout, as ``open_plan`` opens it: OpenMP
    hangs there in a thread whose team stayed with the parent.
    Raises what the engine raises, and ``EngineError`` where a thread may not run on its hardware threads.
    """
    if is_forked():
        return open_plan(engine, folder, build, plan.narrow, cpu)
    return Elastic(engine, folder, build, plan, partitions, cpu)


class _Started(NamedTuple):
    """Rows that a call may run now: in its own thread on all cores, or already on an instance."""

    rows: range
    future: "Future[Outputs] | None"


class _Call:
    """A call whose rows are started in order, as cores become free."""

    def __init__(self, inputs: Sequence[np.ndarray]) -> None:
        self._inputs = inputs
        self._taken = 0
        self.leased = False
        """Whether it has all cores, for the rows that it runs in its own thread."""
        self.started: SimpleQueue[_Started | None] = SimpleQueue()
        """What was started; ``None`` if no more will be: the session was closed, or a part failed."""

    def take(self, rows: int) -> range:
        """The next rows."""
        start, self._taken = self._taken, self._taken + rows
        return range(start, self._taken)

    def untaken(self) -> "list[Future[Outputs]]":
        """What is still in ``started`` and runs on instances, once no more is started."""
        rest = [self.started.get() for _ in range(self.started.qsize())]
        return [started.future for started in rest if started is not None and started.future is not None]

    def inputs_of(self, rows: range) -> list[np.ndarray]:
        """The inputs of those rows, copied if they are not contiguous, for which there may be no memory."""
        return [rows_of(array, rows.start, rows.stop, len(rows)) for array in self._inputs]


class Elastic:
    """A session that any number of threads may call at any time; ``ElasticPolicy`` decides which cores a call gets.

    Cores are leased: the instance with all threads runs only while no other does. It runs in the calling thread, as
    ``Alone``; the others run in pinned threads of their own. It works in the process that opened it only.
    """

    def __init__(
        self, engine: Engine, folder: Path, build: Build, plan: ElasticPlan, partitions: Partitions, cpu: Cpu
    ) -> None:
        """Open both layouts. Raises what the engine raises, and ``EngineError`` as ``Instances``."""
        narrow = plan.narrow
        cpus = assign(cpu, narrow.threads_per_instance, narrow.instances)
        with ExitStack() as undo:
            self._wide = Alone(engine, folder, build, plan.wide)
            undo.callback(self._wide.close)
            self._narrow = Instances(engine, folder, build, narrow, cpus)
            undo.pop_all()
        self._process = OpenedHere()
        self._cores = plan.wide.threads_per_instance
        self._policy = ElasticPolicy(partitions)
        self._idle = list(range(narrow.instances))
        """Instances of the narrow layout that do nothing."""
        self._changed = Condition(RLock())  # entered again by ``_forget``
        self._calls: dict[int, _Call] = {}
        self._numbers = count()
        self._closed = False
        self._closing = Lock()

    def run(self, inputs: Sequence[np.ndarray]) -> Outputs:
        """Run any batch of at least one item. After an error in one part no other part starts.

        Raises the error of the first part that failed, when those that had started have ended; and ``EngineError`` if
        the session was closed, or opened by a process that this one was forked from.
        """
        self._process.check()
        rows, call, number = len(inputs[0]), _Call(inputs), next(self._numbers)
        parts: list[Outputs | Future[Outputs]] = []
        try:
            with self._changed:
                if self._closed:
                    raise closed()
                self._calls[number] = call
                self._policy.arrive(number, rows, monotonic())
                self._start()
            while rows and (started := call.started.get()) is not None:
                rows -= len(started.rows)
                parts.append(self._run_here(call, started.rows) if started.future is None else started.future)
        finally:
            self._forget(number, call)
            # The caller may change its arrays afterwards, so nothing may read them any more.
            wait([part for part in (*parts, *call.untaken()) if isinstance(part, Future)])
        outputs = [part.result() if isinstance(part, Future) else part for part in parts]
        if rows:
            raise closed()
        return outputs[0] if len(outputs) == 1 else [np.concatenate(arrays) for arrays in zip(*outputs, strict=True)]

    def close(self) -> None:
        """Close both when what runs has ended; calls that wait raise. In a forked child, leave it to the parent."""
        if self._process.is_other:
            return
        with self._closing:  # a second call waits until the first has ended
            if self._closed:
                return
            with self._changed:
                self._closed = True
                for number in self._calls:
                    self._stop(number)
                while self._policy.free < self._cores:
                    self._changed.wait()
            self._wide.close()
            self._narrow.close()

    def _start(self) -> None:
        """Start what the policy starts now."""
        while starts := self._policy.starts(monotonic()):
            for number, part in starts:
                call = self._calls[number]
                rows = call.take(part.rows)
                call.leased = part.threads == self._cores
                future = None if call.leased else self._start_narrow(number, part, rows)
                call.started.put(_Started(rows, future))
                if future is not None and future.done():  # it failed: what runs ends only when this thread lets it
                    self._stop(number)

    def _start_narrow(self, number: int, part: Part, rows: range) -> "Future[Outputs]":
        """Run rows of a call on an instance that does nothing.

        The thread may be one whose own call has just ended, so an error is not raised but becomes the future's.
        """
        instance = self._idle.pop()
        # The core is given back before the answer is there, so that a caller that calls again at once finds it free.
        ended = partial(self._narrow_ended, number, part.threads, instance)
        try:
            return self._narrow.start(instance, self._calls[number].inputs_of(rows), ended)
        except (RuntimeError, MemoryError) as error:  # RuntimeError: the interpreter ends, and starts nothing more
            failed: Future[Outputs] = Future()
            failed.set_exception(error)
            self._idle.append(instance)
            self._policy.ended(part.threads, monotonic())
            return failed

    def _run_here(self, call: _Call, rows: range) -> Outputs:
        """Run on all cores, in this thread."""
        try:
            return self._wide.run(call.inputs_of(rows))
        finally:
            self._give_back(call)

    def _narrow_ended(self, number: int, threads: int, instance: int, failed: bool) -> None:
        """Give an instance back."""
        with self._changed:
            if failed:
                self._stop(number)
            self._idle.append(instance)
            self._ended(threads)

    def _stop(self, number: int) -> None:
        """Start no more of a call, and have it end when what has started of it has ended."""
        self._policy.leave(number)
        if number in self._calls:
            self._calls[number].started.put(None)

    def _ended(self, threads: int) -> None:
        """Give a part's cores back."""
        with self._changed:
            self._policy.ended(threads, monotonic())
            self._start()
            if self._closed:
                self._changed.notify_all()

    def _forget(self, number: int, call: _Call) -> None:
        """Start no more of a call that has ended; if it was interrupted, give back what it did not use."""
        with self._changed:
            if self._calls.pop(number, None) is not None:
                self._policy.leave(number)
            self._give_back(call)

    def _give_back(self, call: _Call) -> None:
        """Give all cores back, if the call has them."""
        with self._changed:
            if call.leased:
                call.leased = False
                self._ended(self._cores)
