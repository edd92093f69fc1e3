"""Which plans of a build to measure, one after the other, each with its reason. Pure.

A strategy is a generator: it yields the plan it wants measured and is sent the measurement, and returns why it ended.
Its driver keeps the time and may end it at any plan: all measurements so far count.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, isfinite, sqrt

from corewise.machine.layouts import ThreadLayout
from corewise.records.build import ElasticPlan, Plan
from corewise.records.goal import Goal, Latency, Slo
from corewise.records.measurement import MOST_LATENCIES, Measurement
from corewise.records.reason import Reason, ReasonKind

BATCHES = (1, 2, 4, 8, 16, 32, 64)
START_BATCH = 16
SLOW_CALL_MS = 250.0
"""Batches larger than one whose call takes longer are not tried: they add latency and hardly any speed."""
NEAR = 0.9
"""A batch or layout that does less than this share of the best is past the top: speed over batch, and over instances,
rises and falls once, apart from ripples (caches, padding to the width of vectors)."""
NEAR_LAYOUT, MOST_NEAR = 0.8, 3
"""Plans of other layouts that are tried beside the best, if they are expected to reach this share of its rate."""
MOST_AGAIN = 6
"""Most plans that are measured twice."""


@dataclass(frozen=True)
class PlanRequest:
    """The plan to measure next, and why."""

    plan: Plan
    why: ReasonKind
    again: bool = False
    """Measure it although it was measured before: both measurements then count as one."""


Strategy = Generator[PlanRequest, Measurement, Reason]
Measured = dict[Plan, Measurement]


def strategy(
    goal: Goal, layouts: Sequence[ThreadLayout], batches: Sequence[int] = BATCHES, like: Plan | None = None
) -> Strategy:
    """How to search the plans of one build for a goal; ``layouts`` in the order worth trying.

    For throughput the search starts from the plan ``like``, which was the best of a similar build.
    """
    match goal:
        case Latency():
            return _latency(layouts)
        case Slo(p99_ms=p99_ms):
            return _latency_tables(layouts, p99_ms, batches)
        case _:
            return _throughput(layouts, batches) if like is None else _near(like, layouts, batches)


def _throughput(layouts: Sequence[ThreadLayout], batches: Sequence[int]) -> Strategy:
    """Every layout at one batch; then, in turns, other batches of the best layout and what may be as fast beside it.

    At the end the fastest plans are measured again, and the search goes on if another plan turns out to be faster:
    among many plans, the one that was measured to be the fastest was partly lucky.
    """
    measured: Measured = {}
    start = START_BATCH if START_BATCH in batches else batches[-1]
    for layout in layouts:
        why = ReasonKind.OTHER_LAYOUT if measured else ReasonKind.FIRST_LOOK
        yield from _ask(measured, layout.plan(start), why)
    climbed: set[ThreadLayout] = set()
    while (top := _layout(_ranked(measured)[0])) not in climbed:
        climbed.add(top)
        yield from _climb(measured, top, batches)
        for plan in _beside(measured, layouts, _ranked(measured)[0], start, batches):
            yield from _ask(measured, plan, ReasonKind.SIMILAR_SPEED)
    for layout in layouts:
        if _ranked(measured)[0].rejected is None:
            break
        if layout not in climbed:  # another layout may need less memory
            yield from _climb(measured, layout, batches)
    yield from _measure_again(measured, batches)
    return _fastest(measured)


def _near(like: Plan, layouts: Sequence[ThreadLayout], batches: Sequence[int]) -> Strategy:
    """The plan that was the best of a similar build, and the batches around it; all plans if it may not be chosen."""
    measured: Measured = {}
    yield from _ask(measured, like, ReasonKind.TWINS_BEST)
    if measured[like].rejected is not None:
        return (yield from _throughput(layouts, batches))
    yield from _climb(measured, ThreadLayout.of(like), batches)
    yield from _measure_again(measured, batches)
    return _fastest(measured)


def _fastest(measured: Measured) -> Reason:
    fastest = _ranked(measured)[0]
    if fastest.rejected is not None:
        return Reason.of(ReasonKind.NO_PLAN_ALLOWED)
    return Reason.of(ReasonKind.FASTEST_PLAN, plan=fastest.plan.label, per_s=fastest.throughput_per_s)


def _measure_again(measured: Measured, batches: Sequence[int]) -> Generator[PlanRequest, Measurement, None]:
    """The fastest plans a second time, until no plan near the best was measured once only."""
    again: set[Plan] = set()
    while len(again) < MOST_AGAIN:
        ranked = _ranked(measured)
        near_per_s = NEAR * ranked[0].throughput_per_s
        rivals = [
            measurement.plan
            for measurement in ranked[:MOST_NEAR]
            if measurement.rejected is None and measurement.throughput_per_s >= near_per_s
        ]
        if not set(rivals) - again:
            break
        for plan in rivals:
            if plan not in again:
                again.add(plan)
                yield from _ask(measured, plan, ReasonKind.MEASURED_AGAIN, again=True)
        yield from _climb(measured, _layout(_ranked(measured)[0]), batches)


def _ask(
    measured: Measured, plan: Plan, why: ReasonKind, *, again: bool = False
) -> Generator[PlanRequest, Measurement, None]:
    if again or plan not in measured:
        measured[plan] = yield PlanRequest(plan, why, again)


def _ranked(measured: Measured) -> list[Measurement]:
    """The fastest first; plans that may not be chosen come last."""
    return sorted(
        measured.values(),
        key=lambda measurement: (measurement.rejected is not None, -measurement.throughput_per_s),
    )


def _beside(
    measured: Measured, layouts: Sequence[ThreadLayout], best: Measurement, start: int, batches: Sequence[int]
) -> list[Plan]:
    """Plans of other layouts that may be about as fast as the best one.

    They are judged by their calls of ``start`` items, a part of which is the same for every batch. That part weighs
    more, the faster a layout does the rest: at small batches such a layout looks worse than it is at large ones. Half
    the batch, and as many items in flight, are tried because the items in flight share the caches.
    """
    fixed_ms = _fixed_ms(measured, _layout(best))
    expected_per_s: dict[Plan, float] = {}
    for layout in layouts:
        start_ms = measured[layout.plan(start)].p50_ms
        fixed = min(fixed_ms, start_ms)
        item_ms = (start_ms - fixed) / start
        for batch in (best.plan.batch // 2, best.plan.batch, best.plan.batch * best.plan.instances // layout.instances):
            if batch not in batches or layout.plan(batch) in measured:
                continue
            if batch <= start or fixed + item_ms * batch / 2 <= SLOW_CALL_MS:
                plan = layout.plan(batch)
                expected_per_s[plan] = plan.instances * batch * 1e3 / (fixed + item_ms * batch)
    near = [plan for plan, per_s in expected_per_s.items() if per_s >= NEAR_LAYOUT * best.throughput_per_s]
    return sorted(near, key=lambda plan: -expected_per_s[plan])[:MOST_NEAR]


def _fixed_ms(measured: Measured, layout: ThreadLayout) -> float:
    """The part of a layout's call that does not depend on its batch: the most by any two measured batches."""
    calls_ms = sorted(
        (measurement.plan.batch, measurement.p50_ms)
        for measurement in measured.values()
        if _layout(measurement) == layout
    )
    estimates = (
        (few_ms * many - many_ms * few) / (many - few)
        for (few, few_ms), (many, many_ms) in combinations(calls_ms, 2)
        if isfinite(many_ms) and isfinite(few_ms)
    )
    return max(0.0, max(estimates, default=0.0))


def _climb(
    measured: Measured, layout: ThreadLayout, batches: Sequence[int]
) -> Generator[PlanRequest, Measurement, None]:
    """From the layout's best batch to smaller and larger ones while they are not far below the best."""
    best = next(measurement for measurement in _ranked(measured) if _layout(measurement) == layout)
    position = batches.index(best.plan.batch)
    smaller, larger = batches[position - 1 :: -1] if position else (), batches[position + 1 :]
    for direction, why in ((smaller, ReasonKind.SMALLER_BATCH), (larger, ReasonKind.LARGER_BATCH)):
        last = best
        for batch in direction:
            if batch > last.plan.batch and last.p50_ms > SLOW_CALL_MS:
                break
            plan = layout.plan(batch)
            yield from _ask(measured, plan, why)
            last = measured[plan]
            if last.rejected is not None and direction is smaller:  # a smaller batch may need less memory
                continue
            near_per_s = NEAR * _ranked(measured)[0].throughput_per_s
            if last.rejected is not None or last.throughput_per_s < near_per_s:
                break


def _latency(layouts: Sequence[ThreadLayout]) -> Strategy:
    """One item on one instance, with each number of threads."""
    measured: list[Measurement] = []
    for threads in dict.fromkeys(threads for threads, instances in layouts if instances == 1):
        why = ReasonKind.OTHER_THREADS if measured else ReasonKind.FIRST_LOOK
        measured.append((yield PlanRequest(Plan(threads_per_instance=threads, batch=1), why)))
    allowed = [measurement for measurement in measured if measurement.rejected is None]
    if not allowed:
        return Reason.of(ReasonKind.NO_PLAN_ALLOWED)
    best = min(allowed, key=lambda measurement: measurement.p50_ms)
    return Reason.of(ReasonKind.FASTEST_CALL, plan=best.plan.label, p50_ms=best.p50_ms)


def _latency_tables(layouts: Sequence[ThreadLayout], slo_ms: float, batches: Sequence[int]) -> Strategy:
    """The latency table of each layout, as far as calls are within the SLO."""
    within: list[Measurement] = []
    for layout in layouts:
        for batch in batches:
            measurement = yield PlanRequest(layout.plan(batch), ReasonKind.SLO_TABLE)
            if measurement.p99_ms <= slo_ms and measurement.rejected is None:
                within.append(measurement)
            if measurement.p50_ms > min(slo_ms, SLOW_CALL_MS):  # not by its p99, which one slow call makes
                break
    if not within:
        return Reason.of(ReasonKind.NONE_WITHIN_SLO, slo_ms=slo_ms)
    best = max(within, key=lambda measurement: measurement.throughput_per_s)
    return Reason.of(ReasonKind.MOST_WITHIN_SLO, plan=best.plan.label, slo_ms=slo_ms, per_s=best.throughput_per_s)


def tables(measurements: Sequence[Measurement]) -> dict[ThreadLayout, list[Measurement]]:
    """The measurements by layout, each by rising batch."""
    by_layout: dict[ThreadLayout, list[Measurement]] = {}
    for measurement in sorted(measurements, key=lambda measurement: measurement.plan.batch):
        by_layout.setdefault(_layout(measurement), []).append(measurement)
    return by_layout


def memory_of_both(elastic: ElasticPlan, measurements: Sequence[Measurement]) -> int:
    """The sum of what processes with one of an elastic plan's layouts need; 0 if that of one is not known."""
    by_layout = tables(measurements)
    needed = [
        max((measurement.memory_bytes for measurement in by_layout.get(ThreadLayout.of(plan), ())), default=0)
        for plan in (elastic.wide, elastic.narrow)
    ]
    return sum(needed) if all(needed) else 0


def drive(
    steps: Strategy,
    known: Sequence[Measurement],
    measure: Callable[[PlanRequest], Measurement],
    *,
    ended: Callable[[], Reason | None] = lambda: None,
) -> Iterator[Measurement | Reason]:
    """Run a strategy: yields each new measurement, and at last why it ended.

    What is ``known`` is not measured again unless the strategy asks for it; a second measurement of a plan is yielded
    ``pooled`` with the first. ``ended`` returns why no more may be measured, or ``None``.
    """
    measured = {measurement.plan: measurement for measurement in known}
    answer: Measurement | None = None
    while True:
        try:
            request = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            yield end.value
            return
        before = measured.get(request.plan)
        if before is None or request.again:
            if reason := ended():
                yield reason
                return
            taken = measure(request)
            measured[request.plan] = taken if before is None else pooled(before, taken)
            yield measured[request.plan]
        answer = measured[request.plan]


def not_run(plan: Plan, reason: Reason) -> Measurement:
    """What a strategy is answered for a plan that did not run: slower than any, and not to be chosen."""
    return Measurement(
        plan=plan, latencies_ms=(), throughput_per_s=0.0, p50_ms=inf, p99_ms=inf, spread=0.0, rejected=reason
    )


def pooled(first: Measurement, second: Measurement) -> Measurement:
    """Two measurements of one plan as one: mean speed, the worse p99."""
    latencies = first.latencies_ms + second.latencies_ms
    return replace(
        first,
        latencies_ms=latencies[:: max(1, -(-len(latencies) // MOST_LATENCIES))],
        throughput_per_s=(first.throughput_per_s + second.throughput_per_s) / 2,
        p50_ms=(first.p50_ms + second.p50_ms) / 2,
        p99_ms=max(first.p99_ms, second.p99_ms),
        spread=max(first.spread, second.spread),
        throttled=first.throttled + second.throttled,
        memory_bytes=max(first.memory_bytes, second.memory_bytes),
        memory_per_instance_bytes=max(first.memory_per_instance_bytes, second.memory_per_instance_bytes),
        times=first.times + second.times,
        rejected=first.rejected or second.rejected,
    )


def rate_interval(measurement: Measurement) -> tuple[float, float]:
    """An interval of the rate: the notch of a box plot (McGill, Tukey and Larsen 1978), about 95 % for the median."""
    half = 1.57 * measurement.spread / sqrt(max(1, len(measurement.latencies_ms)))
    return measurement.throughput_per_s * (1 - half), measurement.throughput_per_s * (1 + half)


def _layout(measurement: Measurement) -> ThreadLayout:
    return ThreadLayout.of(measurement.plan)
