"""Which of the calls that wait start now, with how many threads and rows each. Pure.

A call that is alone takes all cores; calls that come from many threads share them. Like ``policy`` it uses no threads
and no clock: time is an argument, so a simulation makes the same decisions as ``runtime.elastic``.
"""

from math import exp
from typing import NamedTuple

from corewise.batching.partition import Part, Partitions

MEMORY = 32
"""The rate of arrivals is that of the time in which so many calls of one row run, the last ones weighing most."""


class Start(NamedTuple):
    """A part of a waiting call that runs now."""

    call: int
    part: Part


class ElasticPolicy:
    """The calls that wait, the oldest first, and the cores that are free. Not thread-safe; ``now_s`` never goes back.

    Rows of different calls never share a part. A call whose rows do not all fit goes on behind those that wait. No core
    that a waiting call could use stays free. A call leaves cores free only for calls that are expected to come while it
    runs, at the rate seen lately, and only if all of them end sooner so.
    """

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self.free = partitions.cores
        """Cores on which nothing runs."""
        self._waiting: dict[int, int] = {}
        """Rows of each waiting call that have not started."""
        self._now_s = 0.0
        self._call_s = partitions.seconds(partitions.cores, 1)
        self._arrivals = self._busy_s = 0.0
        """Arrivals while something ran or waited, and how long that was; both decay with time."""

    def arrive(self, call: int, rows: int, now_s: float) -> None:
        """A call of so many rows, at least 1, waits from now on."""
        self._reach(now_s)
        self._arrivals += self._busy
        self._waiting[call] = rows

    def leave(self, call: int) -> None:
        """Start no more of a call's rows."""
        self._waiting.pop(call, None)

    def ended(self, threads: int, now_s: float) -> None:
        """A part has ended, and its cores are free."""
        self._reach(now_s)
        self.free += threads

    def starts(self, now_s: float) -> list[Start]:
        """What starts now; its cores are no longer free. The parts of a call take its rows in order."""
        started: list[Start] = []
        if not self._waiting:
            return started
        self._reach(now_s)
        while self._waiting and self.free >= self._partitions.threads[0]:
            call, rows = next(iter(self._waiting.items()))
            del self._waiting[call]
            expected = self._rate_per_s * self._partitions.seconds(self.free, rows)
            share = self._partitions.share(self.free, rows, 1 + len(self._waiting) + expected)
            for part in self._partitions.split(share, rows):
                started.append(Start(call, part))
                self.free -= part.threads
                rows -= part.rows
            if rows:
                self._waiting[call] = rows
        return started

    @property
    def _busy(self) -> bool:
        return bool(self._waiting) or self.free < self._partitions.cores

    @property
    def _rate_per_s(self) -> float:
        """Arrivals per second while calls ran: of one caller that waits for each answer, none."""
        return self._arrivals / (self._busy_s + self._call_s)

    def _reach(self, now_s: float) -> None:
        memory_s = MEMORY * self._call_s
        kept = exp(-max(0.0, now_s - self._now_s) / memory_s)
        self._arrivals *= kept
        self._busy_s = self._busy_s * kept + (1 - kept) * memory_s * self._busy
        self._now_s = max(self._now_s, now_s)
