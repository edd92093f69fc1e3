"""Which of the calls that wait start now, with how many threads and rows each. Pure.

A call that is alone takes all cores; calls that come from many threads share them. Like ``policy`` it uses no threads
and no clock: time is an argument, so a simulation makes the same decisions as ``runtime.elastic``.
"""

from math import exp
from typing import NamedTuple

from corewise.batching.partition import Part, Partitions

MEMORY = 32
"""Time constant of the arrival rate's exponential mean, in calls of one row on all cores."""
LATER = 1.25
"""Calls run one by one on all cores only if the last one ends within LATER x the time of the other ways."""
MOST_LOAD = 0.95
"""Highest load at which waits are estimated; at 1 they would be infinite."""


class Arrivals:
    """The rate of arrivals while something runs or waits; 0 for one caller that waits for each answer."""

    def __init__(self, call_s: float) -> None:
        """``call_s`` is the time of a call of one row on all cores."""
        self._call_s, self._memory_s = call_s, MEMORY * call_s
        self._now_s = 0.0
        self._count = self._busy_s = 0.0
        """Arrivals while something ran or waited, and how long that was; both decay with time."""

    @property
    def per_s(self) -> float:
        """The recent rate."""
        return self._count / (self._busy_s + self._call_s)

    def reach(self, now_s: float, *, is_busy: bool) -> None:
        """It is ``now_s``, and something ran or waited until now, or not."""
        kept = exp(-max(0.0, now_s - self._now_s) / self._memory_s)
        self._count *= kept
        self._busy_s = self._busy_s * kept + (1 - kept) * self._memory_s * is_busy
        self._now_s = max(self._now_s, now_s)

    def note(self) -> None:
        """Count an arrival while others run or wait."""
        self._count += 1

    def wait_s(self, count: int, busy_s: float, each_s: float) -> float:
        """The summed waits of requests that arrive during ``count`` calls on all cores, and of those behind them.

        The calls take ``busy_s`` in all; under full load each takes ``each_s``. The excess delays every request that
        arrives before the cores are idle again.
        """
        waits_s = busy_s / 2 + max(0.0, busy_s - count * each_s)
        return self.per_s * busy_s * waits_s / (1 - min(MOST_LOAD, self.per_s * each_s))

    def beside_s(self, count: int, room: int, busy_s: float, each_s: float, longer_s: float) -> float:
        """As ``wait_s``, for ``room`` calls side by side, each of which takes ``longer_s`` longer than alone."""
        arriving = self.per_s * busy_s
        if count >= room or not arriving:
            return self.wait_s(count, busy_s, each_s)
        late = max(0.0, 1 - (room - count) / arriving)
        return arriving * longer_s + late * self.wait_s(room, busy_s, each_s)


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
        self._arrivals = Arrivals(partitions.seconds(partitions.cores, 1))

    def arrive(self, call: int, rows: int, now_s: float) -> None:
        """A call of so many rows, at least 1, waits from now on."""
        self._reach(now_s)
        if self._busy:
            self._arrivals.note()
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
            expected = self._arrivals.per_s * self._partitions.seconds(self.free, rows)
            share = self._partitions.share(self.free, rows, 1 + len(self._waiting) + expected)
            if self._is_wide_sooner(share, rows):
                share = self.free
            for part in self._partitions.split(share, rows):
                started.append(Start(call, part))
                self.free -= part.threads
                rows -= part.rows
            if rows:
                self._waiting[call] = rows
        return started

    def _is_wide_sooner(self, share: int, rows: int) -> bool:
        """Whether waiting calls, if all had ``rows`` rows, end sooner one by one on all cores than side by side.

        By the sum of their latencies, with those of the calls that are expected meanwhile.
        """
        cores, count = self._partitions.cores, 1 + len(self._waiting)
        if self.free < cores or share == cores:
            return False
        beside = cores // share
        rounds = -(-count // beside)
        wide_s, narrow_s = self._partitions.seconds(cores, rows), self._partitions.seconds(share, rows)
        if count * wide_s > LATER * rounds * narrow_s:
            return False
        each_s, last = narrow_s / beside, count - (rounds - 1) * beside
        wide_cost_s = wide_s * count * (count + 1) / 2 + self._arrivals.wait_s(count, count * wide_s, each_s)
        narrow_cost_s = narrow_s * (beside * rounds * (rounds - 1) / 2 + rounds * last)
        comers_s = self._arrivals.beside_s(count, beside, rounds * narrow_s, each_s, narrow_s - wide_s)
        return wide_cost_s < narrow_cost_s + comers_s

    @property
    def _busy(self) -> bool:
        return bool(self._waiting) or self.free < self._partitions.cores

    def _reach(self, now_s: float) -> None:
        self._arrivals.reach(now_s, is_busy=self._busy)
