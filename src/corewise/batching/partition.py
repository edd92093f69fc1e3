"""How many threads and rows each call gets, so that the last row ends as early as possible. Pure.

The calls of a partition start together, on cores of their own, and may differ in threads and rows. The best one comes
from the dynamic program of Packrat (Bhardwaj et al., ICML 2025):
``opt[c, n] = min over (c', n') of max(opt[c - c', n - n'], ms[c', n'])``. It is solved once for all numbers of free
cores and waiting rows; a decision looks its answer up.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

import numpy as np

from corewise.batching.latency import LatencyTable

MOST_ROWS = 1024
"""Most rows of a round that partitions are made for; more rows take several rounds."""


class Part(NamedTuple):
    """One call of a partition."""

    threads: int
    rows: int


class Partitions:
    """The best partition of any number of cores and rows, by measured times.

    Args:
        tables: Milliseconds of a call over its rows, for each number of threads that instances have, measured while
            calls on all other cores run too. A call has at most the rows of its table's last point.
        cores: How many cores there are. A call takes one for each of its threads.

    Raises:
        ValueError: There is no table, or one has more threads than there are cores.

    Example:
        >>> from corewise.batching import LatencyTable, Partitions
        >>> one, both = LatencyTable(points=((1, 4.0), (4, 10.0))), LatencyTable(points=((1, 2.0), (8, 12.0)))
        >>> partitions = Partitions({1: one, 2: both}, cores=2)
        >>> partitions.split(2, 1), partitions.split(2, 8)
        ((Part(threads=2, rows=1),), (Part(threads=1, rows=4), Part(threads=1, rows=4)))
    """

    def __init__(self, tables: Mapping[int, LatencyTable], cores: int) -> None:
        if not tables or not 1 <= min(tables) <= max(tables) <= cores:
            raise ValueError(f"calls of {sorted(tables)} threads are not for {cores} cores")
        most = {threads: table.points[-1][0] for threads, table in tables.items()}
        self.cores = cores
        self.tables = dict(tables)
        self.threads = tuple(sorted(tables))
        """How many threads instances have, rising."""
        size = min(MOST_ROWS, max(most[threads] * (cores // threads) for threads in tables))
        self._calls_s = {
            threads: [table.latency_ms(rows) / 1e3 for rows in range(1, min(most[threads], size) + 1)]
            for threads, table in tables.items()
        }
        self._seconds, self._first = _solved(self._calls_s, cores, size)
        self._most = [max(rows for rows, end_s in enumerate(row) if end_s < inf) for row in self._seconds]
        """Most rows of one round, for each number of cores."""
        self._round = [
            max(range(1, most + 1), key=lambda rows: rows / row[rows], default=0)
            for most, row in zip(self._most, self._seconds, strict=True)
        ]
        """Rows of the round with the highest rate, for each number of cores."""

    @property
    def most_rows(self) -> int:
        """Most rows of one round on all cores."""
        return self._most[self.cores]

    def call_s(self, part: Part) -> float:
        """How long one call of a partition takes."""
        return self._calls_s[part.threads][part.rows - 1]

    def seconds(self, cores: int, rows: int) -> float:
        """How long ``rows`` take on ``cores``; ``inf`` if no call has so few threads."""
        rounds, last = self._rounds(cores, rows)
        full_s = rounds * self._seconds[cores][self._round[cores]] if rounds else 0.0
        return full_s + self._seconds[cores][last]

    def split(self, cores: int, rows: int) -> tuple[Part, ...]:
        """The calls of ``rows`` that start now, on at most ``cores``. Rows that they leave take further rounds."""
        rounds, last = self._rounds(cores, rows)
        left = self._round[cores] if rounds else last
        parts = []
        while left and self._seconds[cores][left] < inf:
            part = self._first[cores][left]
            parts.append(part)
            cores, left = cores - part.threads, left - part.rows
        return tuple(parts)

    def share(self, free: int, rows: int, calls: float) -> int:
        """How many of the free cores a call of ``rows`` takes, if ``calls`` like it have to run, itself included.

        It is the share with which the last of them ends earliest: all free cores for one call after the other, or equal
        shares for some at once. A call that is alone takes all; one of several does so if more threads speed it up
        enough.
        """
        shares = [*(threads for threads in self.threads if threads < free), free]
        return min(
            reversed(shares), key=lambda share: max(1.0, calls / (free // share)) * self.seconds(share, rows), default=0
        )

    def _rounds(self, cores: int, rows: int) -> tuple[int, int]:
        """Full rounds, and the rows of the last one, which may be larger than a full round is."""
        most, full = self._most[cores], self._round[cores]
        rounds = -(-(rows - most) // full) if rows > most and full else 0
        return rounds, rows - rounds * full if full else min(rows, len(self._seconds[0]) - 1)


def _solved(
    calls_s: Mapping[int, Sequence[float]], cores: int, size: int
) -> tuple[list[list[float]], list[list[Part]]]:
    """For each number of cores and rows: the end of the best partition, and one of its calls."""
    best_s = np.full((cores + 1, size + 1), inf)
    best_s[:, 0] = 0.0
    first = np.zeros((cores + 1, size + 1, 2), int)
    for c in range(1, cores + 1):
        best_s[c], first[c] = best_s[c - 1], first[c - 1]
        for threads, times_s in calls_s.items():
            if threads > c:
                continue
            # others_s[n, k]: the end of the n - (most - k) rows that a call of most - k rows leaves.
            most = len(times_s)
            padded = np.concatenate([np.full(most, inf), best_s[c - threads]])
            others_s = np.lib.stride_tricks.sliding_window_view(padded, most)[: size + 1]
            ends_s = np.maximum(others_s, np.array(times_s[::-1]))
            place = ends_s.argmin(axis=1)
            found_s = ends_s[np.arange(size + 1), place]
            better = found_s < best_s[c]
            best_s[c][better] = found_s[better]
            first[c, better, 0], first[c, better, 1] = threads, (most - place)[better]
    parts = [[Part(*pair) for pair in row] for row in first.tolist()]
    return best_s.tolist(), parts
