"""Whether a build should keep two thread layouts open, so that its cores are divided as the load has it. Pure.

Both layouts are measured with few batches while all cores work, so what calls cost beside others is in their times. The
elastic plan and each layout alone are then simulated from these times, from idle to saturated.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from corewise.artifact.tuned import partitions
from corewise.batching import Partitions
from corewise.batching.simulate import Simulated, simulate_callers, simulate_calls
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import ElasticPlan, Plan
from corewise.records.goal import Requirements, Slo
from corewise.records.measurement import Measurement
from corewise.records.tuned import Elasticity, LoadPoint
from corewise.search.plans import BATCHES, START_BATCH, tables

LOADS = (0.05, 1 / 3, 2 / 3, 0.9)
"""Simulated loads, as shares of the rate at which the fixed plan is saturated."""
CALLS, FULL_CALLS = 1000, 200
CALLERS = 2
"""Callers for each instance that saturate it with calls of one row."""
WORSE, BETTER = 0.95, 1.05
"""An elastic plan pays if nowhere it does less than this share of the fixed plan, and somewhere as much more."""


def elastic_plan(plan: Plan, measured: Sequence[Measurement]) -> ElasticPlan | None:
    """The two layouts to keep open beside the fixed plan: its own, and the other way to use as many threads.

    Of several ways to divide one instance's threads, that which had the most items per second, or else instances of
    one thread. ``None`` for a plan of one thread.
    """
    threads = plan.threads_per_instance * plan.instances
    if threads == 1:
        return None
    if plan.instances > 1:
        return ElasticPlan(wide=Plan(threads_per_instance=threads, batch=plan.batch), narrow=plan)
    divided = [
        max(table, key=lambda measurement: measurement.throughput_per_s)
        for layout, table in tables(measured).items()
        if layout.instances > 1 and layout.threads * layout.instances == threads
    ]
    best = max(divided, key=lambda measurement: measurement.throughput_per_s, default=None)
    # A plan for latency has calls of one row, and not because larger ones were slower.
    batch = START_BATCH if plan.batch == 1 else plan.batch
    layout = ThreadLayout.of(best.plan) if best else ThreadLayout(threads=1, instances=threads)
    return ElasticPlan(wide=replace(plan, batch=batch), narrow=layout.plan(batch))


def plans_to_measure(elastic: ElasticPlan, measured: Sequence[Measurement]) -> list[Plan]:
    """What an elastic plan's tables still lack, single rows first."""
    known = {measurement.plan for measurement in measured}
    wanted = [
        ThreadLayout.of(layout).plan(batch)
        for batch in sorted({*BATCHES, elastic.wide.batch})
        for layout in (elastic.wide, elastic.narrow)
        if batch <= layout.batch
    ]
    return [plan for plan in wanted if plan not in known]


def elasticity(
    plan: Plan, elastic: ElasticPlan, measured: Sequence[Measurement], requirements: Requirements
) -> Elasticity | None:
    """How an elastic plan would do beside each of its layouts alone; ``None`` if not all its calls were measured."""
    if not {elastic.wide, elastic.narrow} <= {measurement.plan for measurement in measured}:
        return None
    try:
        both = partitions(elastic, measured)
    except ValueError:
        return None
    wide, narrow = (
        Partitions({threads: both.tables[threads]}, both.cores)
        for threads in (elastic.wide.threads_per_instance, elastic.narrow.threads_per_instance)
    )
    contenders = (both, wide, narrow)
    fixed = 1 if plan.instances == 1 else 2
    callers = CALLERS * elastic.narrow.instances
    most_per_s = simulate_callers(contenders[fixed], callers=callers, calls=CALLS).rate_per_s
    curve = tuple(
        _point(load, [simulate_calls(one, rate_per_s=load * most_per_s, calls=CALLS) for one in contenders])
        for load in LOADS
    )
    rows, instances = elastic.narrow.batch, elastic.narrow.instances
    full = [
        rows * simulate_callers(one, callers=instances, rows=rows, calls=FULL_CALLS).rate_per_s for one in contenders
    ]
    memory_bytes = _memory_bytes(elastic, measured)
    return Elasticity(
        plan=elastic,
        pays=requirements.within_memory(memory_bytes) and _pays(curve, full, fixed, requirements),
        curve=curve,
        saturated_per_s=(full[0], full[1], full[2]),
        memory_bytes=memory_bytes,
    )


def _pays(curve: Sequence[LoadPoint], saturated_per_s: Sequence[float], fixed: int, requirements: Requirements) -> bool:
    """By the rate of full batches and by latencies: for an SLO the p99, else the geometric mean of p50 and p99."""
    gains = [saturated_per_s[0] / saturated_per_s[fixed]]
    for point in curve:
        median, tail = (latencies_ms[fixed] / latencies_ms[0] for latencies_ms in (point.p50_ms, point.p99_ms))
        gains.append(tail if isinstance(requirements.goal, Slo) else sqrt(median * tail))
    return min(gains) >= WORSE and max(gains) >= BETTER


def _point(load: float, runs: Sequence[Simulated]) -> LoadPoint:
    elastic, wide, narrow = runs
    return LoadPoint(
        load=load,
        p50_ms=(elastic.p50_ms, wide.p50_ms, narrow.p50_ms),
        p99_ms=(elastic.p99_ms, wide.p99_ms, narrow.p99_ms),
    )


def _memory_bytes(elastic: ElasticPlan, measured: Sequence[Measurement]) -> int:
    """The sum of what processes with one of the layouts need; 0 if that of one is not known."""
    needed = [
        max((one.memory_bytes for one in measured if ThreadLayout.of(one.plan) == ThreadLayout.of(layout)), default=0)
        for layout in (elastic.wide, elastic.narrow)
    ]
    return sum(needed) if all(needed) else 0
