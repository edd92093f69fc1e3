"""Warm up and time a session. The clock is a parameter, so that the logic is tested without waiting."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Protocol, TypeVar

import numpy as np

from corewise.common.stats import quantile, spread
from corewise.engines import Session
from corewise.machine.inspect import throttled_count
from corewise.records.build import Plan
from corewise.records.measurement import MOST_LATENCIES, Measurement
from corewise.samples import Samples

T = TypeVar("T")
Clock = Callable[[], float]


class Each(Protocol):
    """Does ``work`` on all instances at the same time; its results in their order."""

    def __call__(self, work: Callable[[Session], T]) -> list[T]:
        """Do it and wait for all."""
        ...


WARM_WINDOW = 3
WARM_TOLERANCE = 0.05
MIN_CALLS = 3


def batch_of(samples: Samples, size: int) -> tuple[np.ndarray, ...]:
    """Inputs for one call of ``size`` items of one shape, repeating samples if there are too few."""
    _, arrays = next(samples.batches(size))
    repeat = np.resize(np.arange(len(arrays[0])), size)
    return tuple(np.ascontiguousarray(array[repeat]) for array in arrays)


def warm_up(
    session: Session, inputs: Sequence[np.ndarray], *, budget_s: float, clock: Clock = time.perf_counter
) -> int:
    """Call until the median of three calls stays within 5 % of that of the three before, or the budget is spent.

    Returns the number of calls made (at least 1).
    """
    seconds: list[float] = []
    start = clock()
    while True:
        seconds.append(_timed(session, inputs, clock))
        if clock() - start >= budget_s:
            break
        if len(seconds) >= 2 * WARM_WINDOW:
            before = median(seconds[-2 * WARM_WINDOW : -WARM_WINDOW])
            if abs(median(seconds[-WARM_WINDOW:]) - before) <= WARM_TOLERANCE * before:
                break
    return len(seconds)


def time_calls(
    session: Session,
    inputs: Sequence[np.ndarray],
    *,
    budget_s: float,
    min_calls: int = MIN_CALLS,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Seconds of each call, for ``budget_s`` and at least ``min_calls`` calls."""
    seconds: list[float] = []
    start = clock()
    while len(seconds) < min_calls or clock() - start < budget_s:
        seconds.append(_timed(session, inputs, clock))
    return seconds


def measure_instances(
    each: Each,
    inputs: Sequence[np.ndarray],
    plan: Plan,
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
    throttled: Callable[[], int] = throttled_count,
    memory_per_instance_bytes: int = 0,
) -> Measurement:
    """Warm all instances up for at most half the budget, then time calls of ``plan.batch`` items for all of it.

    ``each`` (``instances.Instances.each``) runs work on all instances at the same time. The throughput of one instance
    is that of its median call, which is robust to short disturbances. The throughput of several is the sum over all of
    their calls, because they disturb each other.
    """
    each(lambda session: warm_up(session, inputs, budget_s=budget_s / 2, clock=clock))
    before = throttled()
    timed = each(lambda session: time_calls(session, inputs, budget_s=budget_s, clock=clock))
    seconds = [second for calls in timed for second in calls]
    return Measurement(
        plan=plan,
        latencies_ms=tuple(round(s * 1e3, 4) for s in seconds[:: -(-len(seconds) // MOST_LATENCIES)]),
        throughput_per_s=plan.batch / median(seconds) if len(timed) == 1 else throughput_per_s(plan.batch, timed),
        p50_ms=median(seconds) * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        spread=spread(seconds),
        throttled=throttled() - before,
        memory_per_instance_bytes=memory_per_instance_bytes,
    )


def throughput_per_s(batch: int, timed: Sequence[Sequence[float]]) -> float:
    """Items per second of instances whose calls of ``batch`` items took the seconds ``timed``, each its own.

    Each instance's items over its own time: all of them over the wall time would count the others' idleness while the
    last call ends.
    """
    return sum(batch * len(seconds) / sum(seconds) for seconds in timed)


def _timed(session: Session, inputs: Sequence[np.ndarray], clock: Clock) -> float:
    start = clock()
    session.run(inputs)
    return clock() - start
