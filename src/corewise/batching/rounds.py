"""Whether what waits starts wide or narrow when all cores are free. Pure.

When a round begins, some requests wait. They run in one wide call, or the first of them does, or all start narrow;
those that come meanwhile wait for the next round or take a core that is free. Which of these gives the least mean
latency, later requests included, is a Markov decision process of the number that waits (Deb and Serfozo, Optimal
control of batch service queues, 1973). It is solved by policy iteration (Howard, 1960) once for each rate of arrivals,
in steps; a decision looks its answer up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STATES = 32
"""Most waiting requests that decisions differ by, or twice the number of instances; more are a backlog."""
STEPS = 10
"""Rates that decisions differ by, up to the most that the machine does."""
LEAST, MOST = 0.02, 0.98
"""The lowest and the highest of them, as a share of it: at 1 all means are infinite."""
ITERATIONS = 20
"""Policy iteration ends after three to six."""
LARGEST = 64
"""LAPACK solves larger systems in threads, which wait for each other for up to seconds where all cores are busy."""


class Way(NamedTuple):
    """One way to begin a round, by the number of requests that wait: how it goes on, what it costs, and how long."""

    after: np.ndarray
    """Probabilities (waiting, waiting after the round)."""
    cost_s: np.ndarray
    """Summed seconds that requests wait or run meanwhile."""
    seconds: np.ndarray


class Rounds:
    """The best way to begin a round, by the rate of arrivals and the number of requests that wait.

    Args:
        wide_s: Seconds of a wide call, for 0, 1, 2, ... rows.
        narrow_s: The same of a narrow call.
        instances: How many narrow calls run at the same time.
        shared: Whether requests share calls.
    """

    def __init__(
        self, wide_s: Sequence[float], narrow_s: Sequence[float], *, instances: int, shared: bool = True
    ) -> None:
        self._wide_s, self.narrow_s, self._instances, self._shared = tuple(wide_s), tuple(narrow_s), instances, shared
        self._states = max(STATES, 2 * instances)
        self._rates: dict[int, float] = {}
        """The highest rate of requests, by the rows of each."""
        self._tables: dict[tuple[int, int], list[int]] = {}
        """``wide_requests`` by the rows of a request and the step of the rate, for each number that waits."""
        for step in range(STEPS + 1):  # so that none is solved while single rows wait
            self.wide_requests(1, 1, step / STEPS * self._most_per_s(1))

    def wide_requests(self, waiting: int, rows: int, per_s: float) -> int:
        """How many of the requests that wait, each of ``rows``, the wide call takes; 0 if they start narrow.

        The rows count as the next power of two, if calls have that many: few sizes are solved.
        """
        asked, most = rows, min(len(self._wide_s), len(self.narrow_s)) - 1
        rows = min(1 << (rows - 1).bit_length(), max(rows, most))
        per_s *= asked / rows
        if rows not in self._rates:
            self._rates[rows] = self._most_per_s(rows)
        step = min(STEPS, round(STEPS * per_s / self._rates[rows]))
        if (rows, step) not in self._tables:
            load = min(MOST, max(LEAST, step / STEPS))
            self._tables[rows, step] = self._solved(rows, load * self._rates[rows])
        return self._tables[rows, step][min(waiting, self._states)]

    @property
    def wide_rows_of_crowd(self) -> int:
        """The rows of a full wide call if such calls answer more rows per second than full narrow ones; else 0.

        Small calls may have the highest measured rate, but what passes between two calls is not in it.
        """
        wide, narrow = len(self._wide_s) - 1, len(self.narrow_s) - 1
        return wide if wide / self._wide_s[-1] > self._instances * narrow / self.narrow_s[-1] else 0

    def _most_wide(self, rows: int) -> int:
        """How many requests of ``rows`` a wide call takes; 0 if they are too large."""
        most = (len(self._wide_s) - 1) // rows
        return most if self._shared else min(1, most)

    def _most_narrow(self, rows: int) -> int:
        return max(1, (len(self.narrow_s) - 1) // rows) if self._shared else 1

    def _most_per_s(self, rows: int) -> float:
        wide = [k / self._wide_s[k * rows] for k in range(1, 1 + self._most_wide(rows))]
        narrow = [self._instances * k / self.narrow_s[k * rows] for k in range(1, 1 + self._most_narrow(rows))]
        return max([*wide, *narrow])

    def _solved(self, rows: int, per_s: float) -> list[int]:
        """``wide_requests`` for each number that waits, at a rate of arrivals."""
        states, counts = np.arange(self._states + 1), self._counts(rows)
        ways = [self._way(taken, rows, per_s) for taken in counts]
        after, cost_s, seconds = (np.stack(parts) for parts in zip(*ways, strict=True))
        # The first guess is the way that does most when many wait: others may fall far behind the arrivals.
        most = min(self._states, self._instances * self._most_narrow(rows))
        each_s = [way.seconds[-1] / (taken[-1] or most) for way, taken in zip(ways, counts, strict=True)]
        chosen = np.full(len(states), int(np.argmin(each_s)))
        for _ in range(ITERATIONS):
            # value(n) - sum(after * value) + mean * seconds = cost: the mean takes the place of value(0), which is 0.
            system = np.eye(len(states)) - after[chosen, states]
            system[:, 0] = seconds[chosen, states]
            try:
                value = _solution(system, cost_s[chosen, states, None])[:, 0]
            except np.linalg.LinAlgError:  # it falls behind by so much that rounding leaves no solution
                break
            mean, value[0] = value[0], 0.0
            better = (cost_s - mean * seconds + np.einsum("wij,j->wi", after, value)).argmin(axis=0)
            if (better == chosen).all():
                break
            chosen = better
        return [int(counts[way][waiting]) for waiting, way in enumerate(chosen)]

    def _counts(self, rows: int) -> list[np.ndarray]:
        """The requests of the wide call in each way to begin, by those that wait; 0 for narrow calls."""
        waiting = np.arange(self._states + 1)
        most = self._most_wide(rows)
        return [*([np.minimum(waiting, most), np.minimum(waiting, 1)] if most else []), np.zeros_like(waiting)]

    def _way(self, wide: np.ndarray, rows: int, per_s: float) -> Way:
        """A way to begin, by the number of requests that its wide call takes of those that wait.

        A request that takes a core left free makes the round longer, by half a call if it is the only one.
        """
        size, instances = self._states + 1, self._instances
        waiting, most = np.arange(1, size), instances * self._most_narrow(rows)
        is_wide, taken = wide[1:] > 0, np.where(wide[1:], wide[1:], np.minimum(waiting, most))
        calls_s = [
            self._wide_s[count * rows] if wide[k] else self._side_by_side_s(count, rows)
            for k, count in enumerate(taken.tolist(), 1)
        ]
        call_s, free = np.array(calls_s), np.where(is_wide, 0, np.maximum(0, instances - taken))
        came = per_s * call_s
        beside = np.minimum(came, free)
        # Of m arrivals the last one comes after m / (m + 1) of a call; this is the mean over m.
        longer_s = np.where(free, call_s * (1 + np.expm1(-came) / came), 0.0)
        late, seconds, left = came - beside, call_s + longer_s, waiting - taken
        after = _poisson(np.arange(size) - left[:, None], (late + per_s * longer_s)[:, None])
        beyond = np.maximum(0.0, 1 - after.sum(axis=1))
        after[:, -1] += beyond
        cost_s = beside * call_s + late * (call_s / 2 + longer_s) + per_s * longer_s**2 / 2
        # One request more than the states know of waits behind all others, and delays those that come.
        cost_s += taken * call_s + left * seconds + beyond * size / (self._rates[rows] - per_s)
        # While none waits, the round is the time until one comes.
        first = np.eye(1, size, 1)
        return Way(np.vstack([first, after]), np.append(0.0, cost_s), np.append(1 / per_s, seconds))

    def _side_by_side_s(self, requests: int, rows: int) -> float:
        """Mean seconds of narrow calls of ``requests``. A core whose call is shorter than others takes the next."""
        each = max(1.0, requests / self._instances)
        less = int(each)
        few_s, many_s = (self.narrow_s[min(count * rows, len(self.narrow_s) - 1)] for count in (less, less + 1))
        return few_s + (each - less) * (many_s - few_s)


def _poisson(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The probability of each number of arrivals, by logarithms, because powers of large means overflow."""
    come = np.maximum(counts, 0)
    log_factorials = np.append(0.0, np.cumsum(np.log(np.arange(1, come.max() + 1))))
    return np.where(counts < 0, 0.0, np.exp(come * np.log(mean) - mean - log_factorials[come]))


def _solution(system: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """As ``np.linalg.solve``, in one thread: by blocks (the Schur complement), and without BLAS between them."""
    size = len(system)
    if size <= LARGEST:
        return np.linalg.solve(system, sums)
    half = size // 2
    first = _solution(system[:half, :half], np.hstack([system[:half, half:], sums[:half]]))
    rest = np.hstack([system[half:, half:], sums[half:]]) - np.einsum("ij,jk->ik", system[half:, :half], first)
    last = _solution(rest[:, : size - half], rest[:, size - half :])
    known = first[:, size - half :] - np.einsum("ij,jk->ik", first[:, : size - half], last)
    return np.vstack([known, last])
