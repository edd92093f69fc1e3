"""Threads for what takes long to read or to write: images, texts, large bodies.

None of that runs in the event loop, where all other requests would wait for it. A pool knows what each kind of work has
cost lately, and refuses at once what it could not finish in time.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from time import monotonic
from typing import TypeVar

from corewise.batching import NotServed

T = TypeVar("T")

MOST_WAITING = 1024
NEW_SHARE = 0.2
"""How much the last work tells of the next, against what came before it."""


class Pool:
    """A fixed number of threads, first come first served. Used from one event loop."""

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._threads = threads
        self._unit_s: dict[str, float] = {}
        """Seconds for each unit of a kind of work."""
        self._waiting = 0
        self._waiting_s = 0.0
        """What was given to the pool and has not ended should take together."""

    async def run(self, work: Callable[[], T], *, kind: str, size: float, deadline_s: float = inf) -> T:
        """Run work of a size, in units of its kind, by a deadline on the monotonic clock.

        Raises ``NotServed`` where it would come too late, and what the work raises.
        """
        expected_s = self._unit_s.get(kind, 0.0) * size
        if self._waiting >= MOST_WAITING:
            raise NotServed("queue full", self._waiting_s / self._threads)
        late_s = monotonic() + self._waiting_s / self._threads + expected_s - deadline_s
        if late_s > 0:
            raise NotServed("overloaded" if self._waiting else "too urgent", late_s)

        def timed() -> tuple[T, float]:
            started_s = monotonic()
            if started_s > deadline_s:
                raise NotServed("expired")
            return work(), monotonic() - started_s

        self._waiting += 1
        self._waiting_s += expected_s
        job = self._executor.submit(timed)
        try:
            result, took_s = await asyncio.wrap_future(job)
        finally:
            del job  # it holds what was raised, which holds this frame, and so the request's data
            self._waiting -= 1
            self._waiting_s = max(0.0, self._waiting_s - expected_s) if self._waiting else 0.0
        old_s = self._unit_s.get(kind, took_s / max(size, 1))
        self._unit_s[kind] = (1 - NEW_SHARE) * old_s + NEW_SHARE * took_s / max(size, 1)
        return result

    def close(self) -> None:
        """Drop what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)
