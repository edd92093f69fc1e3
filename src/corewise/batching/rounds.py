"""Whether what waits starts wide or narrow when all cores are free. Pure.

When a round begins, some requests wait. They run in one wide call, or the first of them does, or all start narrow; what
comes meanwhile waits for the next round or takes a core that is free. Which of these gives the least mean latency, with
all that follows from it, is a Markov decision process of the number that waits (Deb and Serfozo, Optimal control of
batch service queues, 1973). It is solved by policy iteration (Howard, 1960) once for each rate of arrivals, in steps; a
decision looks its answer up.
"""

from collections.abc import Sequence
from math import exp, expm1
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


class Way(NamedTuple):
    """One way to begin a round, by the number of requests that wait: how it goes on, what it costs, and how long."""

    next: np.ndarray
    """Probabilities (waiting, waiting after the round)."""
    cost_s: np.ndarray
    """Summed seconds that requests wait or run meanwhile; ``inf`` where it cannot begin so."""
    seconds: np.ndarray


class Rounds:
    """The best way to begin a round, by the rate of arrivals and the number of requests that wait.

    Args:
        wide_s: Seconds of a wide call, for 0, 1, 2, ... rows.
        narrow_s: Of a narrow call.
        instances: How many narrow calls run at the same time.
        shared: Whether requests share calls.
    """

    def __init__(
        self, wide_s: Sequence[float], narrow_s: Sequence[float], *, instances: int, shared: bool = True
    ) -> None:
        self._wide_s, self.narrow_s, self._instances, self._shared = tuple(wide_s), tuple(narrow_s), instances, shared
        self._states = max(STATES, 2 * instances)
        self._rates: dict[int, float] = {}
        """The highest rate of requests of so many rows."""
        self._tables: dict[tuple[int, int], list[int]] = {}
        """``wide_requests`` by the rows of a request and the step of the rate, for each number that waits."""

    def wide_requests(self, waiting: int, rows: int, per_s: float) -> int:
        """How many of the requests that wait, each of so many rows, the wide call takes; 0 if they start narrow."""
        if rows not in self._rates:
            self._rates[rows] = self._most_per_s(rows)
        step = min(STEPS, round(STEPS * per_s / self._rates[rows]))
        if (rows, step) not in self._tables:
            load = min(MOST, max(LEAST, step / STEPS))
            self._tables[rows, step] = self._solved(rows, load * self._rates[rows])
        return self._tables[rows, step][min(waiting, self._states)]

    def _most_wide(self, rows: int) -> int:
        """Requests of so many rows that a wide call takes; 0 if they are too large."""
        return min((len(self._wide_s) - 1) // rows, len(self._wide_s) if self._shared else 1)

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
        chosen = np.full(len(states), len(ways) - 1)
        for _ in range(ITERATIONS):
            # value(n) - sum(after * value) + mean * seconds = cost: the mean takes the place of value(0), which is 0.
            system = np.eye(len(states)) - after[chosen, states]
            system[:, 0] = seconds[chosen, states]
            value = np.linalg.solve(system, cost_s[chosen, states])
            mean, value[0] = value[0], 0.0
            better = (cost_s - mean * seconds + after @ value).argmin(axis=0)
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
        """A way to begin, by the number of requests that its wide call takes of those that wait."""
        size, instances = self._states + 1, self._instances
        after, cost_s, seconds = np.zeros((size, size)), np.zeros(size), np.zeros(size)
        after[0, 1], seconds[0] = 1.0, 1 / per_s
        # One request more than the states know of waits behind all others, and delays those that come.
        lost_s = size / (self._rates[rows] - per_s)
        for waiting in range(1, size):
            most = instances * self._most_narrow(rows)
            taken = int(wide[waiting]) or min(waiting, most)
            call_s = self._wide_s[taken * rows] if wide[waiting] else self._side_by_side_s(taken, rows)
            free = 0 if wide[waiting] else max(0, instances - taken)
            left, seconds[waiting], cost_s[waiting] = self._meanwhile(call_s, free, per_s)
            left = left[: size - (waiting - taken)]
            after[waiting, waiting - taken :][: len(left)] = left
            beyond = max(0.0, 1 - left.sum())
            after[waiting, -1] += beyond
            cost_s[waiting] += taken * call_s + (waiting - taken) * seconds[waiting] + beyond * lost_s
        return Way(after, cost_s, seconds)

    def _side_by_side_s(self, requests: int, rows: int) -> float:
        """Mean seconds of narrow calls of so many requests. A core whose call is shorter than others takes the next."""
        each = max(1.0, requests / self._instances)
        less = int(each)
        few_s, many_s = (self.narrow_s[min(count * rows, len(self.narrow_s) - 1)] for count in (less, less + 1))
        return few_s + (each - less) * (many_s - few_s)

    def _meanwhile(self, call_s: float, free: int, per_s: float) -> tuple[np.ndarray, float, float]:
        """Who comes during calls of ``call_s`` beside which so many cores are free: the probabilities of how many wait
        at the end of the round, its mean seconds, and what they cost.

        A request that takes a free core makes the round longer, by half a call if it is the only one.
        """
        size, came = self._states + 1, per_s * call_s
        if not free:
            return _poisson(came, size), call_s, came * call_s / 2
        beside = min(came, free)
        # Of m arrivals the last one comes after m / (m + 1) of a call; this is the mean over m.
        longer_s = call_s * (1 + expm1(-came) / came)
        late = came - beside
        cost_s = beside * call_s + late * (call_s / 2 + longer_s) + per_s * longer_s**2 / 2
        return _poisson(late + per_s * longer_s, size), call_s + longer_s, cost_s


def _poisson(mean: float, size: int) -> np.ndarray:
    """The probabilities of 0, 1, 2, ... arrivals, so many of them."""
    counts = np.arange(1, size)
    return np.concatenate([[1.0], np.cumprod(mean / counts)]) * exp(-mean)
