"""Which plans of a build to measure, one after the other, each with its reason. Pure.

A strategy is a generator: it yields the plan it wants measured and is sent the measurement, and returns why it ended.
Whoever drives it (``search``) keeps the time, and may end it at any plan: all measurements so far count.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, isfinite

from corewise.records.build import Plan
from corewise.records.goal import Goal
from corewise.records.measurement import MOST_LATENCIES, Measurement

BATCHES = (1, 2, 4, 8, 16, 32, 64)
START_BATCH = 16
SLOW_CALL_MS = 250.0
"""Larger batches than the one whose call takes longer are not tried: they add latency and hardly speed."""
NEAR = 0.9
"""A batch or shape that does less than this share of the best is past the top: speed over batch, and over instances,
rises and falls once but for ripples (caches, padding to the width of vectors)."""
NEAR_SHAPE, MOST_NEAR = 0.8, 3
"""So many plans of other shapes are tried beside the best one that are expected to do this share of its speed."""
MOST_AGAIN = 6
"""So many plans are measured twice."""

NONE_FITS = "no plan that was tried may be chosen"
NOT_SEARCHED = "its plans were not searched"
"""How a trial's ``explored`` begins where only the first plan was measured."""


@dataclass(frozen=True)
class PlanRequest:
    """The plan to measure next, and why."""

    plan: Plan
    why: str
    anew: bool = False
    """Though it was measured before: both measurements then count as one."""


Strategy = Generator[PlanRequest, Measurement, str]
ThreadLayout = tuple[int, int]
"""Threads per instance, and instances."""
Found = dict[Plan, Measurement]


def strategy(goal: Goal, shapes: Sequence[ThreadLayout], *, slo_ms: float | None = None) -> Strategy:
    """How to search the plans of one build for a goal; ``shapes`` in the order worth trying."""
    if goal == "latency":
        return _latency(shapes)
    if goal == "slo":
        assert slo_ms is not None
        return _curves(shapes, slo_ms)
    return _throughput(shapes)


def _throughput(shapes: Sequence[ThreadLayout]) -> Strategy:
    """Every shape at one batch; then, in turns, other batches of the best shape and what may be as fast beside it.

    Last the fastest ones again, and on from there where another one turns out to be: among many plans the one that was
    measured to be the fastest was partly lucky.
    """
    found: Found = {}
    for shape in shapes:
        why = "other threads and instances" if found else "the first look"
        yield from _ask(found, _plan(shape, START_BATCH), why)
    climbed: set[ThreadLayout] = set()
    while (top := _shape(_ranked(found)[0])) not in climbed:
        climbed.add(top)
        yield from _climb(found, top)
        why = f"by their calls of {START_BATCH}, these threads and instances may be about as fast"
        for plan in _beside(found, shapes, _ranked(found)[0]):
            yield from _ask(found, plan, why)
    for shape in shapes:
        if not _ranked(found)[0].rejected:
            break
        if shape not in climbed:  # another one may need less memory
            yield from _climb(found, shape)
    again: set[Plan] = set()
    while len(again) < MOST_AGAIN:
        best = _ranked(found)
        near_per_s = NEAR * best[0].throughput_per_s
        rivals = [one.plan for one in best[:MOST_NEAR] if not one.rejected and one.throughput_per_s >= near_per_s]
        if not set(rivals) - again:
            break
        for plan in rivals:
            if plan not in again:
                again.add(plan)
                yield from _ask(found, plan, "again", anew=True)
        yield from _climb(found, _shape(_ranked(found)[0]))
    fastest = _ranked(found)[0]
    if fastest.rejected:
        return NONE_FITS
    return f"{fastest.plan.label} is the fastest of what was tried: {fastest.throughput_per_s:.4g}/s"


def _ask(found: Found, plan: Plan, why: str, *, anew: bool = False) -> Generator[PlanRequest, Measurement, None]:
    if anew or plan not in found:
        found[plan] = yield PlanRequest(plan, why, anew)


def _ranked(found: Found) -> list[Measurement]:
    """The fastest first; behind all others those that may not be chosen."""
    return sorted(found.values(), key=lambda one: (bool(one.rejected), -one.throughput_per_s))


def _beside(found: Found, shapes: Sequence[ThreadLayout], best: Measurement) -> list[Plan]:
    """Plans of other shapes that may be about as fast as the best one.

    Judged by their calls of START_BATCH items, of which some part is the same for every batch. That part weighs the
    more, the faster a shape does the rest: at small batches such a shape looks worse than it is at large ones. Half the
    batch, or as many items in flight, are tried because the items in flight share the caches.
    """
    fixed_ms = _fixed_ms(found, _shape(best))
    expected_per_s: dict[Plan, float] = {}
    for shape in shapes:
        start_ms = found[_plan(shape, START_BATCH)].p50_ms
        fixed = min(fixed_ms, start_ms)
        item_ms = (start_ms - fixed) / START_BATCH
        for batch in (best.plan.batch // 2, best.plan.batch, best.plan.batch * best.plan.instances // shape[1]):
            plan = _plan(shape, batch)
            too_slow = batch > START_BATCH and fixed + item_ms * batch / 2 > SLOW_CALL_MS
            if batch in BATCHES and plan not in found and not too_slow:
                expected_per_s[plan] = plan.instances * batch * 1e3 / (fixed + item_ms * batch)
    near = [plan for plan, per_s in expected_per_s.items() if per_s >= NEAR_SHAPE * best.throughput_per_s]
    return sorted(near, key=lambda plan: -expected_per_s[plan])[:MOST_NEAR]


def _fixed_ms(found: Found, shape: ThreadLayout) -> float:
    """What a call of a shape takes whatever its batch: the most by any two of its measured batches."""
    calls_ms = sorted((one.plan.batch, one.p50_ms) for one in found.values() if _shape(one) == shape)
    estimates = (
        (few_ms * many - many_ms * few) / (many - few)
        for (few, few_ms), (many, many_ms) in combinations(calls_ms, 2)
        if isfinite(many_ms) and isfinite(few_ms)
    )
    return max(0.0, max(estimates, default=0.0))


def _climb(found: Found, shape: ThreadLayout) -> Generator[PlanRequest, Measurement, None]:
    """From the shape's best batch to smaller and larger ones while they are not far below the best."""
    best = next(one for one in _ranked(found) if _shape(one) == shape)
    position = BATCHES.index(best.plan.batch)
    down, up = BATCHES[position - 1 :: -1] if position else (), BATCHES[position + 1 :]
    for batches, words in ((down, "smaller"), (up, "larger")):
        last = best
        for batch in batches:
            if batch > last.plan.batch and last.p50_ms > SLOW_CALL_MS:
                break
            plan = _plan(shape, batch)
            yield from _ask(found, plan, f"a {words} batch may be faster")
            last = found[plan]
            if last.rejected and batches is down:  # a smaller one may need less memory
                continue
            if last.rejected or last.throughput_per_s < NEAR * _ranked(found)[0].throughput_per_s:
                break


def _latency(shapes: Sequence[ThreadLayout]) -> Strategy:
    """One item on one instance, with each number of threads."""
    measured: list[Measurement] = []
    for threads in dict.fromkeys(threads for threads, instances in shapes if instances == 1):
        why = "other numbers of threads" if measured else "the first look"
        measured.append((yield PlanRequest(Plan(threads_per_instance=threads, batch=1), why)))
    able = [one for one in measured if not one.rejected]
    if not able:
        return NONE_FITS
    best = min(able, key=lambda m: m.p50_ms)
    return f"{best.plan.label} is the fastest of what was tried: {best.p50_ms:.4g} ms"


def _curves(shapes: Sequence[ThreadLayout], slo_ms: float) -> Strategy:
    """The latency table of each shape, as far as calls are within the SLO."""
    within: list[Measurement] = []
    for shape in shapes:
        for batch in BATCHES:
            one = yield PlanRequest(_plan(shape, batch), "the latency table for the SLO")
            if one.p99_ms <= slo_ms and not one.rejected:
                within.append(one)
            if one.p50_ms > min(slo_ms, SLOW_CALL_MS):  # not by its p99, which one slow call makes
                break
    if not within:
        return f"no plan that may be chosen has a call within {slo_ms:g} ms"
    best = max(within, key=lambda m: m.throughput_per_s)
    return f"{best.plan.label} does most within {slo_ms:g} ms a call: {best.throughput_per_s:.4g}/s"


def tables(measurements: Sequence[Measurement]) -> dict[ThreadLayout, list[Measurement]]:
    """The measurements by shape, each by rising batch."""
    found: dict[ThreadLayout, list[Measurement]] = {}
    for one in sorted(measurements, key=lambda m: m.plan.batch):
        found.setdefault(_shape(one), []).append(one)
    return found


def drive(
    steps: Strategy,
    known: Sequence[Measurement],
    measure: Callable[[PlanRequest], Measurement],
    *,
    go_on: Callable[[], str] = lambda: "",
) -> Iterator[Measurement | str]:
    """Run a strategy: yields each new measurement, and at last why it ended.

    What is ``known`` is not measured again unless asked for; a second measurement of a plan is yielded ``pooled`` with
    the first. ``go_on`` says why no more may be measured; empty where it may.
    """
    found = {one.plan: one for one in known}
    answer: Measurement | None = None
    while True:
        try:
            wanted = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            yield str(end.value)
            return
        before = found.get(wanted.plan)
        if before is None or wanted.anew:
            if why := go_on():
                yield why
                return
            taken = measure(wanted)
            found[wanted.plan] = taken if before is None else pooled(before, taken)
            yield found[wanted.plan]
        answer = found[wanted.plan]


def not_run(plan: Plan, why: str) -> Measurement:
    """What a strategy is answered for a plan that did not run: slower than any, and not to be chosen."""
    return Measurement(
        plan=plan, latencies_ms=(), throughput_per_s=0.0, p50_ms=inf, p99_ms=inf, spread=0.0, rejected=why
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
        why=f"{first.why}; measured twice",
        rejected=first.rejected or second.rejected,
    )


def _plan(shape: ThreadLayout, batch: int) -> Plan:
    threads, instances = shape
    return Plan(threads_per_instance=threads, instances=instances, batch=batch)


def _shape(one: Measurement) -> ThreadLayout:
    return one.plan.threads_per_instance, one.plan.instances
