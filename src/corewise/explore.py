"""Which plans of a build to measure, one after the other, each with its reason. Pure.

A strategy is a generator: it yields the plan it wants measured and is sent the measurement, and returns why it ended.
Whoever drives it (``search``) keeps the time, and may end it at any plan: all measurements so far count.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from corewise.values import Goal, Measurement, Plan

BATCHES = (1, 2, 4, 8, 16, 32, 64)
START_BATCH = 16
SLOW_CALL_MS = 250.0
"""Larger batches than the one whose call takes longer are not tried: they add latency and hardly speed."""
NEAR = 0.9
"""A batch or shape that does less than this share of the best is past the top: speed over batch, and over instances,
rises and falls once but for ripples (caches, padding to the width of vectors)."""
NEAR_SHAPE, MOST_NEAR = 0.8, 3
"""So many shapes of at least this share of the best one's speed are tried at its best batch too."""

NOT_SEARCHED = "its plans were not searched"
"""How a trial's ``explored`` begins where only the first plan was measured."""


@dataclass(frozen=True)
class Wanted:
    """The plan to measure next, and why."""

    plan: Plan
    why: str


Strategy = Generator[Wanted, Measurement, str]
Shape = tuple[int, int]
"""Threads per instance, and instances."""


def strategy(goal: Goal, shapes: Sequence[Shape], *, slo_ms: float | None = None) -> Strategy:
    """How to search the plans of one build for a goal; ``shapes`` in the order worth trying."""
    if goal == "latency":
        return _latency(shapes)
    if goal == "slo":
        assert slo_ms is not None
        return _curves(shapes, slo_ms)
    return _throughput(shapes)


def _throughput(shapes: Sequence[Shape]) -> Strategy:
    """Every shape at one batch; then, in turns, other batches of the best shape and near shapes at the best batch."""
    at_start: dict[Shape, Measurement] = {}
    for shape in shapes:
        plan = _plan(shape, START_BATCH)
        at_start[shape] = yield Wanted(plan, "the first look" if not at_start else "other threads and instances")
    ranked = sorted(shapes, key=lambda shape: -at_start[shape].throughput_per_s)
    least = NEAR_SHAPE * at_start[ranked[0]].throughput_per_s
    near = [shape for shape in ranked if at_start[shape].throughput_per_s >= least][:MOST_NEAR]
    top = at_start[ranked[0]]
    best = None
    while best is None or top.throughput_per_s > best.throughput_per_s:
        best = yield from _climb(top)
        top = best
        for plan in _beside(best, near):
            why = f"these threads and instances were about as fast at batch {START_BATCH}"
            top = max(top, (yield Wanted(plan, why)), key=_per_s)
    return f"{best.plan.label} is the fastest of what was tried: {best.throughput_per_s:.4g}/s"


def _beside(best: Measurement, near: Sequence[Shape]) -> Iterator[Plan]:
    """The best plan's batch with the near shapes, and its items in flight, which together must fit into the caches."""
    batch = best.plan.batch
    for shape in near:
        for other in dict.fromkeys((batch, batch * best.plan.instances // shape[1])):
            if other in BATCHES and (other <= batch or best.p50_ms <= SLOW_CALL_MS):
                yield _plan(shape, other)


def _climb(start: Measurement) -> Generator[Wanted, Measurement, Measurement]:
    """From one batch to smaller and larger ones while they are not far below the best; returns the best."""
    best = start
    position = BATCHES.index(start.plan.batch)
    down, up = BATCHES[position - 1 :: -1] if position else (), BATCHES[position + 1 :]
    for batches, words in ((down, "smaller"), (up, "larger")):
        last = start
        for batch in batches:
            if batch > last.plan.batch and last.p50_ms > SLOW_CALL_MS:
                break
            last = yield Wanted(replace(start.plan, batch=batch), f"a {words} batch may be faster")
            best = max(best, last, key=_per_s)
            if last.throughput_per_s < NEAR * best.throughput_per_s:
                break
    return best


def _latency(shapes: Sequence[Shape]) -> Strategy:
    """One item on one instance, with each number of threads."""
    measured: list[Measurement] = []
    for threads in dict.fromkeys(threads for threads, instances in shapes if instances == 1):
        why = "other numbers of threads" if measured else "the first look"
        measured.append((yield Wanted(Plan(threads_per_instance=threads, batch=1), why)))
    best = min(measured, key=lambda m: m.p50_ms)
    return f"{best.plan.label} is the fastest of what was tried: {best.p50_ms:.4g} ms"


def _curves(shapes: Sequence[Shape], slo_ms: float) -> Strategy:
    """The latency table of each shape, as far as calls are within the SLO."""
    within: list[Measurement] = []
    for shape in shapes:
        for batch in BATCHES:
            one = yield Wanted(_plan(shape, batch), "the latency table for the SLO")
            if one.p99_ms > slo_ms:
                break
            within.append(one)
            if one.p50_ms > SLOW_CALL_MS:
                break
    if not within:
        return f"not one call is within {slo_ms:g} ms"
    best = max(within, key=_per_s)
    return f"{best.plan.label} does most within {slo_ms:g} ms a call: {best.throughput_per_s:.4g}/s"


def tables(measurements: Sequence[Measurement]) -> dict[Shape, list[Measurement]]:
    """The measurements by shape, each by rising batch."""
    found: dict[Shape, list[Measurement]] = {}
    for one in sorted(measurements, key=lambda m: m.plan.batch):
        found.setdefault((one.plan.threads_per_instance, one.plan.instances), []).append(one)
    return found


def drive(
    steps: Strategy,
    known: Sequence[Measurement],
    measure: Callable[[Wanted], Measurement],
    *,
    go_on: Callable[[], str] = lambda: "",
) -> Iterator[Measurement | str]:
    """Run a strategy: yields each new measurement, and at last why it ended.

    What is ``known`` is not measured again. ``go_on`` says why no more may be measured; empty where it may.
    """
    found = {one.plan: one for one in known}
    answer: Measurement | None = None
    while True:
        try:
            wanted = next(steps) if answer is None else steps.send(answer)
        except StopIteration as end:
            yield str(end.value)
            return
        if wanted.plan not in found:
            if why := go_on():
                yield why
                return
            found[wanted.plan] = measure(wanted)
            yield found[wanted.plan]
        answer = found[wanted.plan]


def _plan(shape: Shape, batch: int) -> Plan:
    threads, instances = shape
    return Plan(threads_per_instance=threads, instances=instances, batch=batch)


def _per_s(measurement: Measurement) -> float:
    return measurement.throughput_per_s
