"""Warm up and time a session. The clock is a parameter, so that the logic is tested without waiting."""

import time
from collections.abc import Callable, Sequence
from math import prod
from statistics import mean, median
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


Call = Sequence[np.ndarray]
"""The inputs of one call."""

KINDS = 3
"""Calls that stand for samples of several shapes, such as texts: one for each third of them, by their size."""
WARM_WINDOW = 3
WARM_TOLERANCE = 0.05
MIN_CALLS = 3


def batch_of(samples: Samples, size: int) -> tuple[np.ndarray, ...]:
    """Inputs for one call of ``size`` items of one shape, repeating samples if there are too few."""
    _, arrays = next(samples.batches(size))
    repeat = np.resize(np.arange(len(arrays[0])), size)
    return tuple(np.ascontiguousarray(array[repeat]) for array in arrays)


def kinds_of(samples: Samples) -> tuple[Samples, ...]:
    """All samples if they have one shape; else those of ``KINDS`` shapes, each of which stands for a third, by size."""
    shapes = samples.shapes
    if len(set(shapes)) == 1:
        return (samples,)
    order = sorted(range(len(shapes)), key=lambda place: sum(prod(shape) for shape in shapes[place]))
    middles = (order[len(order) * (2 * kind + 1) // (2 * KINDS)] for kind in range(KINDS))
    alike = ([place for place, others in enumerate(shapes) if others == shapes[middle]] for middle in middles)
    return tuple(samples.take(places) for places in alike)


def calls_of(samples: Samples, size: int) -> tuple[Call, ...]:
    """A call of ``size`` items for each kind of sample, whatever ``size`` is, so that batches can be compared."""
    return tuple(batch_of(kind, size) for kind in kinds_of(samples))


def warm_up(session: Session, calls: Sequence[Call], *, budget_s: float, clock: Clock = time.perf_counter) -> int:
    """Make all calls until the median of three passes stays within 5 % of that of the three before, or for the budget.

    Returns the number of calls made (at least one of each).
    """
    seconds: list[float] = []
    start = clock()
    while True:
        seconds.append(sum(_timed(session, calls, clock)))
        if clock() - start >= budget_s:
            break
        if len(seconds) >= 2 * WARM_WINDOW:
            before = median(seconds[-2 * WARM_WINDOW : -WARM_WINDOW])
            if abs(median(seconds[-WARM_WINDOW:]) - before) <= WARM_TOLERANCE * before:
                break
    return len(seconds) * len(calls)


def time_calls(
    session: Session,
    calls: Sequence[Call],
    *,
    budget_s: float,
    min_calls: int = MIN_CALLS,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Seconds of each call, in passes over all ``calls``, for ``budget_s`` and at least ``min_calls`` calls."""
    seconds: list[float] = []
    start = clock()
    while len(seconds) < min_calls or clock() - start < budget_s:
        seconds += _timed(session, calls, clock)
    return seconds


def time_in_turns(
    session: Session, calls: Sequence[Call], *, budget_s: float, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds of each of ``calls`` as they take turns, after one of each that is not timed.

    In a stream of texts nearly every call has another shape than the one before, for which engines prepare. Calls that
    are not reached in half the budget are left out; at least one pass is timed.
    """
    start = clock()
    reached = 0
    while reached < len(calls) and (not reached or clock() - start < budget_s / 2):
        session.run(calls[reached])
        reached += 1
    seconds: list[list[float]] = [[] for _ in range(reached)]
    while not seconds[0] or clock() - start < budget_s:
        for of_call, second in zip(seconds, _timed(session, calls[:reached], clock), strict=True):
            of_call.append(second)
    return seconds


def measure_instances(
    each: Each,
    calls: Sequence[Call],
    plan: Plan,
    *,
    budget_s: float,
    clock: Clock = time.perf_counter,
    throttled: Callable[[], int] = throttled_count,
    memory_per_instance_bytes: int = 0,
) -> Measurement:
    """Warm all instances up for at most half the budget, then time calls of ``plan.batch`` items for all of it.

    ``each`` (``instances.Instances.each``) runs work on all instances at the same time. The throughput of one instance
    is that of its median call, or of the median call of each kind, which is robust to short disturbances. The
    throughput of several is the sum over all of their calls, because they disturb each other.
    """
    each(lambda session: warm_up(session, calls, budget_s=budget_s / 2, clock=clock))
    before, kinds = throttled(), len(calls)
    timed = each(lambda session: time_calls(session, calls, budget_s=budget_s, clock=clock))
    seconds = [second for of_one in timed for second in of_one]
    step = -(-len(seconds) // MOST_LATENCIES)
    step += kinds > 1 and step % kinds == 0  # else calls of one kind only would be kept
    typical_s = mean(median(seconds[kind::kinds]) for kind in range(kinds))
    return Measurement(
        plan=plan,
        latencies_ms=tuple(round(s * 1e3, 4) for s in seconds[::step]),
        throughput_per_s=plan.batch / typical_s if len(timed) == 1 else throughput_per_s(plan.batch, timed),
        p50_ms=median(seconds) * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        spread=spread([mean(seconds[start : start + kinds]) for start in range(0, len(seconds), kinds)]),
        throttled=throttled() - before,
        memory_per_instance_bytes=memory_per_instance_bytes,
    )


def throughput_per_s(batch: int, timed: Sequence[Sequence[float]]) -> float:
    """Items per second of instances whose calls of ``batch`` items took the seconds ``timed``, each its own.

    Each instance's items over its own time: all of them over the wall time would count the others' idleness while the
    last call ends.
    """
    return sum(batch * len(seconds) / sum(seconds) for seconds in timed)


def _timed(session: Session, calls: Sequence[Call], clock: Clock) -> list[float]:
    """Seconds of each call of one pass."""
    seconds = []
    for inputs in calls:
        start = clock()
        session.run(inputs)
        seconds.append(clock() - start)
    return seconds
