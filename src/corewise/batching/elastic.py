"""Which calls of ``corewise.load`` start now, with how many threads and rows each. Pure.

A call that is alone takes all cores; calls that come from many threads share them. Like ``policy`` it uses no threads
and no clock: time is an argument, so a simulation makes the same decisions as ``runtime.elastic``.
"""

from math import exp
from typing import NamedTuple

from corewise.batching.partition import Part, Partitions
from corewise.batching.rounds import Rounds

MEMORY = 32
"""Time constant of the arrival rate's exponential mean, in calls of one row on all cores."""


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
        """The recent rate per second."""
        return self._count / (self._busy_s + self._call_s)

    def reach(self, now_s: float, *, is_busy: bool) -> None:
        """Move the clock to ``now_s``; ``is_busy`` says whether something has run or waited since the last move."""
        kept = exp(-max(0.0, now_s - self._now_s) / self._memory_s)
        self._count *= kept
        self._busy_s = self._busy_s * kept + (1 - kept) * self._memory_s * is_busy
        self._now_s = max(self._now_s, now_s)

    def note(self) -> None:
        """Count an arrival while others run or wait."""
        self._count += 1


class Start(NamedTuple):
    """A part of a waiting call that runs now."""

    call: int
    part: Part


class ElasticPolicy:
    """The calls that wait, the oldest first, and the cores that are free. Not thread-safe; ``now_s`` never goes back.

    Rows of different calls never share a part. If not all rows of a call fit, the rest waits behind the other calls.
    No core that a waiting call could use stays free. When all cores are free, ``Rounds`` decides by the recent rate of
    arrivals whether the oldest call takes them all, as in ``ElasticQueue``. Otherwise a call leaves cores to those that
    wait or should arrive while it runs, if the last of them then ends earlier.
    """

    def __init__(self, partitions: Partitions) -> None:
        self._partitions = partitions
        self.free = partitions.cores
        """Cores on which nothing runs."""
        self._waiting: dict[int, int] = {}
        """Rows of each waiting call that have not started."""
        self._arrivals = Arrivals(partitions.seconds(partitions.cores, 1))
        self._most_rows = partitions.most_rows
        few = partitions.threads[0]
        wide_s, narrow_s = (
            [0.0, *(partitions.seconds(cores, rows) for rows in range(1, self._most_rows + 1))]
            for cores in (partitions.cores, few)
        )
        self._rounds = Rounds(wide_s, narrow_s, instances=partitions.cores // few, shared=False)

    def arrive(self, call: int, rows: int, now_s: float) -> None:
        """A call of ``rows``, at least 1, waits from now on."""
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
        """The parts that start now, on cores that are then no longer free. A call's parts take its rows in order."""
        started: list[Start] = []
        if not self._waiting:
            return started
        self._reach(now_s)
        while self._waiting and self.free >= self._partitions.threads[0]:
            call, rows = next(iter(self._waiting.items()))
            del self._waiting[call]
            share = self.free
            if not self._is_wide(rows):
                expected = self._arrivals.per_s * self._partitions.seconds(self.free, rows)
                share = self._partitions.share(self.free, rows, 1 + len(self._waiting) + expected)
            for part in self._partitions.split(share, rows):
                started.append(Start(call, part))
                self.free -= part.threads
                rows -= part.rows
            if rows:
                self._waiting[call] = rows
        return started

    def _is_wide(self, rows: int) -> bool:
        """Whether a call takes all cores though others wait or are expected, because that lowers the mean latency."""
        if self.free < self._partitions.cores or rows > self._most_rows:
            return False
        return self._rounds.wide_requests(1 + len(self._waiting), rows, self._arrivals.per_s) > 0

    @property
    def _busy(self) -> bool:
        return bool(self._waiting) or self.free < self._partitions.cores

    def _reach(self, now_s: float) -> None:
        self._arrivals.reach(now_s, is_busy=self._busy)
