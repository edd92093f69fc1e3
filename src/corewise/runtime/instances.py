"""A payload run by several instances in one process: a pinned thread for each, and shared weights.

An instance's thread is pinned before it opens its session, so that the engine's own threads (an OpenMP team, a thread
pool) inherit its hardware threads: in OpenMP the number of threads and the team belong to the calling thread. OpenVINO
uses streams instead, which it pins itself.

``open_plan`` opens a payload under its plan: several instances as one session, or one instance in the caller's thread.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines import Engine, Session
from corewise.engines.base import Sharing, chunks, mixes_rows, rows_of, run_cut
from corewise.engines.denormals import flush, flushing
from corewise.machine.layouts import assign
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu

T = TypeVar("T")

M_ARENA_MAX = -8
"""From glibc's malloc.h; see mallopt(3)."""
IMPORTED_BY = os.getpid()
"""The process that imported this module; a child that was forked from it has another number."""


class Instances:
    """The opened instances of one payload under one plan, and the wide one of an elastic plan after them.

    A context manager. Each has a thread of its own that opens, runs and closes it, on the hardware threads ``cpus``
    gives it (``layouts.assign``; if empty, it is not pinned), with denormals as zeros. An instance runs one call at a
    time; calls to different instances run at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        build: Build,
        plan: Plan,
        cpus: Sequence[Sequence[int]],
        wide: Plan | None = None,
    ) -> None:
        """Open ``plan.instances`` of them, one after the other, and then the one of ``wide``; ``cpus`` are of all.

        Raises what the engine raises, and ``EngineError`` where a thread may not run on its hardware threads.
        """
        one_arena()
        self.mixes_rows = mixes_rows(engine, build)
        """Whether requests must not share calls."""
        self.memory_per_instance_bytes = 0
        """What the second instance added to this process's memory by being opened and, after ``touch``, by running."""
        self._sessions: list[Session] = []
        self._first: Session | None = None
        self._threads_of_first = 0
        self._threads: list[ThreadPoolExecutor] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for number, opened in enumerate([plan] * plan.instances + ([] if wide is None else [wide])):
                self._threads.append(ThreadPoolExecutor(1, f"instance-{number}"))
                self._submit(number, _settle, cpus[number]).result()
                before = memory_bytes(trimmed=True)
                self._sessions.append(self._submit(number, self._open, engine, folder, build, opened).result())
                self._note(number, memory_bytes(trimmed=True) - before)
            undo.pop_all()

    def __len__(self) -> int:
        return len(self._sessions)

    def touch(self, inputs: Sequence[np.ndarray]) -> None:
        """Run each once, one after the other: what they allocate then belongs to ``memory_per_instance_bytes``."""
        for number in range(len(self)):
            # Trimmed, because it would otherwise reuse memory that the instance before it allocated and freed.
            before = memory_bytes(trimmed=True)
            self.run(number, inputs)
            self._note(number, memory_bytes() - before)

    def run(self, instance: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch on the instance of that number, and wait for it."""
        return self.start(instance, inputs).result()

    def start(
        self, instance: int, inputs: Sequence[np.ndarray], then: Callable[[bool], None] = lambda failed: None
    ) -> "Future[list[np.ndarray]]":
        """Run one batch on the instance of that number, after its earlier work.

        ``then`` is called in its thread, with whether the batch failed, before the future has its result.
        """
        return self._submit(instance, _run_then, self._sessions[instance], inputs, then)

    def each(self, work: Callable[[Session], T]) -> list[T]:
        """Do ``work`` on all instances at the same time, each in its thread; its results in their order.

        When all have ended, raises the error of the first instance that failed.
        """
        futures = self.start_each(lambda number, session: work(session))
        wait(futures)
        return [future.result() for future in futures]

    def start_each(self, work: Callable[[int, Session], T]) -> list["Future[T]"]:
        """Begin ``work`` with each instance's number and session, in its thread; other calls wait until it ends."""
        return [self._submit(number, work, number, session) for number, session in enumerate(self._sessions)]

    def close(self) -> None:
        """Close all, and end their threads."""
        with ExitStack() as stack:
            for thread in self._threads:
                stack.callback(thread.shutdown)
            for number, session in enumerate(self._sessions):
                stack.callback(lambda number, session: self._submit(number, session.close).result(), number, session)
        self._sessions.clear()
        self._threads.clear()
        self._first = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, instance: int, work: Callable[..., T], *arguments: object) -> "Future[T]":
        return self._threads[instance].submit(work, *arguments)

    def _open(self, engine: Engine, folder: Path, build: Build, plan: Plan) -> Session:
        if isinstance(self._first, Sharing) and self._threads_of_first == plan.threads_per_instance:
            session: Session = self._first.another()
        else:
            session = engine.open(folder, build, plan_to_open(build, plan))
        if self._first is None:
            self._first, self._threads_of_first = session, plan.threads_per_instance
        return in_calls_of(build.fixed_batch, session)

    def _note(self, instance: int, grown_bytes: int) -> None:
        # The first one's memory is the payload's, and the second's is what each further one costs.
        if instance == 1:
            self.memory_per_instance_bytes += max(0, grown_bytes)


def _run_then(session: Session, inputs: Sequence[np.ndarray], then: Callable[[bool], None]) -> list[np.ndarray]:
    failed = True
    try:
        outputs = session.run(inputs)
        failed = False
    finally:
        then(failed)
    return outputs


class FixedBatch:
    """A session whose program takes exactly ``rows`` rows a call: batches are cut, and the last call is padded."""

    def __init__(self, session: Session, rows: int) -> None:
        self._session = session
        self._rows = rows

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run any batch of at least one item."""
        return run_cut(self._session.run, inputs, chunks(len(inputs[0]), (self._rows,)))

    def close(self) -> None:
        """Close the session."""
        self._session.close()


def in_calls_of(rows: int | None, session: Session) -> Session:
    """The session as one that takes any batch, where its program takes only ``rows`` rows a call."""
    return session if rows is None else FixedBatch(session, rows)


def plan_to_open(build: Build, plan: Plan) -> Plan:
    """The plan that an engine opens for ``plan``: its batch is the program's where that is fixed."""
    return plan if build.fixed_batch is None else replace(plan, batch=build.fixed_batch)


def open_layouts(
    engine: Engine, folder: Path, build: Build, plan: Plan, cpu: Cpu, wide: Plan | None = None
) -> Instances:
    """The instances of a plan, and the wide one of an elastic plan, each pinned to hardware threads of its own.

    Raises as ``Instances``.
    """
    cpus = assign(cpu, plan.threads_per_instance, plan.instances)
    if wide is not None:
        cpus += assign(cpu, wide.threads_per_instance, wide.instances)
    return Instances(engine, folder, build, plan, cpus, wide)


def open_plan(engine: Engine, folder: Path, build: Build, plan: Plan, cpu: Cpu) -> Session:
    """A payload under its plan, as one session that any number of threads may call at any time.

    A batch of more rows than the plan's runs in micro-batches of that size, which was measured to be the fastest. A
    smaller one is divided among the instances that are idle. The rows of a call to one instance stay together where
    the plan's batch is 1: that is what a plan for latency has.
    It works in the process that opened it only: no thread lives on in a child that is forked. In such a child even
    one instance gets a thread of its own, because OpenMP hangs in a thread whose team stayed with the parent.
    Raises what the engine raises, and ``EngineError`` where a thread may not run on its hardware threads.
    """
    if plan.instances > 1:
        return Pool(open_layouts(engine, folder, build, plan, cpu), plan.batch)
    if is_forked():
        return Pool(Instances(engine, folder, build, plan, [()]), plan.batch if plan.batch > 1 else sys.maxsize)
    return Alone(engine, folder, build, plan)


def is_forked() -> bool:
    """Whether this process was forked after it imported corewise."""
    return os.getpid() != IMPORTED_BY


class OpenedHere:
    """The process that opened a session. Threads and OpenMP's teams do not follow into a child that is forked."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_other(self) -> bool:
        """Whether this is a child that was forked after the session was opened."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise ``EngineError`` in a forked child, in which a call would wait forever."""
        if self.is_other:
            raise EngineError(
                f"the model was opened by process {self._pid}, and this is process {os.getpid()}, forked from it",
                "load it in each process after the fork (gunicorn: without --preload, or in the post_fork hook; "
                "multiprocessing: in the worker's function or initializer)",
            )


class Alone:
    """One instance that runs in the calling thread, one call at a time, because a thread of its own costs latency.

    The calling thread is not pinned, and treats denormals as zeros only during calls. An OpenMP team that it started
    before keeps its own setting.
    """

    def __init__(self, engine: Engine, folder: Path, build: Build, plan: Plan) -> None:
        self._process = OpenedHere()
        with flushing():
            session = engine.open(folder, build, plan_to_open(build, plan))
        self._session = in_calls_of(build.fixed_batch, session)
        self._batch = plan.batch
        self._lock = threading.Lock()
        self._closed = False

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run any batch of at least one item. Raises ``EngineError`` as ``Pool.run``."""
        self._process.check()
        with self._lock, flushing():
            if self._closed:
                raise closed()
            if self._batch == 1 or len(inputs[0]) <= self._batch:
                return self._session.run(inputs)
            return run_cut(self._session.run, inputs, _micro_batches(len(inputs[0]), self._batch))

    def run_whole(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a batch as ``run``, but as one call however many rows it has: for callers that fill calls themselves."""
        self._process.check()
        with self._lock, flushing():
            if self._closed:
                raise closed()
            return self._session.run(inputs)

    def close(self) -> None:
        """Close it when the call that runs has ended; in a forked child, leave it to the parent."""
        if self._process.is_other:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._session.close()


class Pool:
    """Instances as one session: a call's rows go to all instances that are idle, each part to the first free one."""

    def __init__(self, instances: Instances, batch: int) -> None:
        self._process = OpenedHere()
        self._instances = instances
        self._batch = batch
        self._free: SimpleQueue[int | None] = SimpleQueue()
        """Numbers of the instances that do nothing; after closing, ``None``."""
        for number in range(len(instances)):
            self._free.put(number)
        self._closing = threading.Lock()
        self._closed = False

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run any batch of at least one item. When all micro-batches have ended, raises the first one's error, if any.

        Raises ``EngineError`` if it was closed, and in a process that was forked after it was opened.
        """
        self._process.check()
        rows, idle = len(inputs[0]), max(1, self._free.qsize())
        # A call that is alone would otherwise leave all instances but one idle.
        cuts = _micro_batches(rows, min(self._batch, ceil(rows / idle)))
        futures = [self._start([rows_of(array, *cut) for array in inputs]) for cut in cuts]
        wait(futures)
        parts = [future.result() for future in futures]
        return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def run_whole(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a batch as ``run``, but as one call: for callers that fill calls themselves, and have more for others."""
        self._process.check()
        return self._start([np.ascontiguousarray(array) for array in inputs]).result()

    def close(self) -> None:
        """Close all instances when the calls that run have ended; in a forked child, leave them to the parent."""
        if self._process.is_other:
            return
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for _ in range(len(self._instances)):
                self._free.get()
            self._instances.close()
            self._free.put(None)

    def _start(self, inputs: Sequence[np.ndarray]) -> "Future[list[np.ndarray]]":
        number = self._free.get()
        if number is None:
            self._free.put(None)
            raise closed()
        future = self._instances.start(number, inputs)
        future.add_done_callback(lambda done: self._free.put(number))
        return future


def whole_calls(session: Session) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """What runs a batch as one call on one instance; ``run`` of a session that has its own ways to divide it."""
    return session.run_whole if isinstance(session, Pool | Alone) else session.run


def closed() -> EngineError:
    """The error of a call that comes after the session was closed."""
    return EngineError("the model was closed", "load it again")


def _micro_batches(rows: int, size: int) -> list[tuple[int, int, int]]:
    """As ``engines.base.chunks``, the last one as short as it is."""
    return [(start, min(start + size, rows), min(size, rows - start)) for start in range(0, rows, size)]


def memory_bytes(*, trimmed: bool = False) -> int:
    """This process's memory with its share of shared pages (PSS), or its resident memory if the kernel has no PSS.

    ``trimmed`` returns freed memory to the kernel first (malloc_trim(3)).
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trimmed and malloc_trim is not None:
        malloc_trim(0)
    with suppress(OSError):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def one_arena() -> None:
    """Have threads that start from now on allocate where the main thread does.

    glibc gives each thread an arena of its own, and its heaps of 64 MB back to the kernel whenever they are empty,
    whatever its thresholds say: eager MobileNetV2 at batch 16 in a thread met 5,000 to 8,000 page faults an image and
    took 32 to 50 ms; from the main arena it meets 0 to 100 and takes 24 to 27 (Zen 3). Does nothing where the C
    library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _settle(cpus: Sequence[int]) -> None:
    """Make the calling thread ready to open an instance."""
    flush()
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise EngineError(
            f"an instance cannot run on the hardware threads {', '.join(map(str, cpus))}: {error.strerror}",
            "measure again on this machine: this process may use others now",
        ) from error
