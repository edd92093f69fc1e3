"""Threads for what takes long to read or to write: images, texts, large bodies.

None of that runs in the event loop, where all other requests would wait for it. A pool knows what each kind of work has
cost lately, does the most urgent first, and refuses at once what could not be answered in time.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from threading import Lock, get_native_id
from time import monotonic
from typing import Any, TypeVar

from corewise.batching import NotServed
from corewise.batching.runner import caught
from corewise.serving.costs import Costs
from corewise.serving.deliveries import Deliveries

T = TypeVar("T")

MOST_WAITING = 1024
AT_ONCE = -inf
"""The deadline of what goes before all else and is never late: answers that only have to be written."""


@dataclass(order=True)
class _Job:
    """Work that waits; jobs sort by deadline and arrival."""

    deadline_s: float
    arrival: int
    expected_s: float = field(compare=False)
    later_s: float = field(compare=False)
    work: Callable[[], Any] = field(compare=False)
    ended: "Future[tuple[Any, float]]" = field(compare=False, default_factory=Future)


class Pool:
    """A fixed number of threads, which do what is due first. Used from one event loop."""

    def __init__(self, name: str, threads: int, *, nice: int = 0) -> None:
        """``nice`` is how much the threads give way to others (setpriority(2)); the event loop is one of these."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_give_way, initargs=(nice,))
        self._threads = threads
        self._costs = Costs()
        self._deliveries = Deliveries()
        self._lock = Lock()
        self._waiting: list[_Job] = []
        """A heap."""
        self._arrivals = count()
        self._running_s: dict[int, float] = {}
        """When each running job should end, by its arrival."""

    @property
    def is_busy(self) -> bool:
        """Whether new work would wait."""
        return len(self._waiting) + len(self._running_s) >= self._threads

    def wait_s(self, deadline_s: float = inf) -> float:
        """How long work with that deadline should wait for a thread, behind what is due before it."""
        if not self.is_busy:
            return 0.0
        now_s = monotonic()
        with self._lock:
            ahead_s = sum(job.expected_s for job in self._waiting if job.deadline_s <= deadline_s)
            ahead_s += sum(max(0.0, end_s - now_s) for end_s in self._running_s.values())
        return ahead_s / self._threads

    def expected_s(self, kind: str, size: float) -> float:
        """What work of a kind and size has cost lately."""
        return self._costs.expected_s(kind, size)

    def check(self, expected_s: float, deadline_s: float, later_s: float = 0.0) -> None:
        """Raise ``NotServed`` where work that takes so long, and what comes ``later_s`` after it, would end too late.

        And where too much waits. If a thread is free, an estimate alone refuses nothing: the work shows how long it
        takes now.
        """
        if deadline_s == AT_ONCE:
            return
        if len(self._waiting) >= MOST_WAITING:
            raise NotServed("queue full", self.wait_s())
        is_busy = self.is_busy
        late_s = monotonic() + (self.wait_s(deadline_s) + expected_s + later_s if is_busy else 0.0) - deadline_s
        if late_s > 0:
            raise NotServed("overloaded" if is_busy else "too urgent", late_s)

    async def run(
        self, work: Callable[[], T], *, kind: str, size: float, deadline_s: float = inf, later_s: float = 0.0
    ) -> T:
        """Run work of a size, in units of its kind, ``later_s`` before a deadline on the monotonic clock.

        Raises ``NotServed`` where it would come too late, and what the work raises.
        """
        expected_s = self.expected_s(kind, size)
        self.check(expected_s, deadline_s, later_s)
        job = _Job(deadline_s, next(self._arrivals), expected_s, later_s, work)
        with self._lock:
            heappush(self._waiting, job)
        self._executor.submit(self._run_most_urgent)
        try:
            result, took_s = await self._deliveries.wait(job.ended)
        finally:
            del job  # it holds what was raised, which holds this frame, and so the request's data
        self._costs.note(kind, size, took_s)
        return result  # type: ignore[no-any-return]

    def _run_most_urgent(self) -> None:
        with self._lock:
            job = heappop(self._waiting)
            started_s = monotonic()
            end_s = started_s + (job.later_s + job.expected_s if self._waiting else 0.0)
            is_late = end_s > job.deadline_s > AT_ONCE
            if not job.ended.set_running_or_notify_cancel():
                return
            if not is_late:
                self._running_s[job.arrival] = started_s + job.expected_s
        if is_late:
            job.ended.set_exception(NotServed("expired"))
            return
        result, error = caught(job.work)
        with self._lock:
            del self._running_s[job.arrival]
        if error is None:
            job.ended.set_result((result, monotonic() - started_s))
        else:
            job.ended.set_exception(error)

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for job in self._waiting:
                job.ended.cancel()


def _give_way(nice: int) -> None:
    """In Linux a thread has a priority of its own."""
    if nice:
        with suppress(OSError):  # some sandboxes know no priorities
            os.setpriority(os.PRIO_PROCESS, get_native_id(), nice)
