"""Whether a build should keep two thread layouts open, so that its cores are divided as the load has it.

Both layouts are measured with few batches while all cores work, so what calls cost beside others is in their times. The
elastic plan and each layout alone are then simulated from these times, from idle to saturated. Where that promises
something, real load on the elastic plan and on the fixed one, in turns, has the last word.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import inf, sqrt
from pathlib import Path
from typing import NamedTuple

from corewise.artifact.tuned import elastic_tables, partitions
from corewise.batching import LatencyTable, Partitions
from corewise.batching.simulate import Simulated, Wide, capacity_per_s, service_of, simulate_callers, simulate_load
from corewise.common.errors import CorewiseError, InputError
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.events import LoadEnded, Stage, StageStarted
from corewise.records.goal import Requirements, Slo
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import Reason, ReasonKind
from corewise.records.trial import Trial
from corewise.records.tuned import Duel, Elasticity, LoadPoint
from corewise.runtime.client import Client
from corewise.search import slo, trial
from corewise.search.budget import FINISHING
from corewise.search.plans import BATCHES, SLOW_CALL_MS, START_BATCH, tables
from corewise.search.trial import SearchContext

FEW_BATCHES = (1, 4, 16, 64)
"""Batches that a search measures for an elastic plan, beside those of both plans."""
NEEDED_S = 1.0
"""Under a budget, what must be left to measure another plan."""
LOADS = (0.05, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.95)
"""Simulated loads, as shares of the rate at which the fixed plan is saturated."""
REQUESTS, FULL_CALLS = 1000, 200
WORSE, BETTER = 0.92, 1.1
"""An elastic plan pays if nowhere it does less than this share of the fixed plan, and somewhere as much more."""
DUELS, ROUNDS = (1 / 3, 2 / 3), 3
"""Real loads, as ``LOADS``, and how often the plans take turns at each."""
DUEL_S, SHORTEST_DUEL_S = 1.0, 0.3
"""How long each load lasts."""
OPENING_S = 4.0
"""What opening both plans is expected to take."""


def elastic_plan(plan: Plan, measured: Sequence[Measurement], fixed_batch: int | None = None) -> ElasticPlan | None:
    """The two layouts to keep open beside the fixed plan: its own, and the other way to use as many threads.

    Of several ways to divide one instance's threads, that which had the most items per second, or else instances of
    one thread. Calls have the rows of the program where these are fixed. ``None`` for a plan of one thread.
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
    batch = fixed_batch or (_most_rows(measured) if plan.batch == 1 else plan.batch)
    layout = ThreadLayout.of(best.plan) if best else ThreadLayout(threads=1, instances=threads)
    return ElasticPlan(wide=replace(plan, batch=batch), narrow=layout.plan(batch))


def _most_rows(measured: Sequence[Measurement]) -> int:
    """Rows of a call where the plan has single ones for latency, and not because larger calls were slower."""
    row_ms = min((one.p50_ms for one in measured if one.plan.batch == 1), default=inf)
    return BATCHES[-1] if row_ms * BATCHES[-1] <= SLOW_CALL_MS else START_BATCH


def judge_elastic(winner: Trial, plan: Plan, context: SearchContext) -> Elasticity | Reason | None:
    """Measure what is not known of the winner's elastic plan, and judge it by simulation and by real load.

    For an SLO it has to meet the certified rate too.

    Returns:
        ``None`` where there is nothing to divide, and a reason where it could not be measured.
    """
    build, known, measured = winner.build, winner.measurements, list[Measurement]()
    elastic = elastic_plan(plan, known, build.fixed_batch)
    if elastic is None:
        return None
    wanted = plans_to_measure(elastic, known, FEW_BATCHES if build.fixed_batch is None else (1,))
    try:
        with ExitStack() as stack:
            client: Client | None = None
            for layout in (elastic.wide, elastic.narrow):
                plans = [wish for wish in wanted if ThreadLayout.of(wish) == ThreadLayout.of(layout)]
                if plans and context.budget.left_s(FINISHING) < NEEDED_S * len(plans):
                    return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why="the budget was spent")
                if plans:
                    client = client or stack.enter_context(context.client(build, share=FINISHING))
                    measured += _measured(client, build, layout, plans, context)
            both = (*known, *measured)
            found = elasticity(plan, elastic, both, context.requirements)
            if found is None or not found.pays:
                return found and replace(found, measurements=tuple(measured))
            left_s = context.budget.left_s(FINISHING)
            if winner.certified:
                left_s -= OPENING_S + slo.LOAD_S / slo.OF_WHAT_IS_LEFT
            duel_s = affordable_duel_s(left_s)
            if duel_s is None:
                return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why="no time was left to load it")
            client = client or stack.enter_context(context.client(build, share=FINISHING))
            other = stack.enter_context(context.client(build, share=FINISHING))
            opened = Opened(context.workspace.payload(build), build, context.workspace.holdout)
            found = judged_by_load(found, plan, both, opened, (client, other), duel_s)
            if not found.pays or winner.certified is None:
                return replace(found, measurements=tuple(measured))
            run = _load(client, build, elastic, both, winner.certified, context)
    except InputError:
        raise
    except CorewiseError as error:
        return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why=str(error))
    holds = run.met and run.in_time >= slo.CONFIRMED * run.offered
    return replace(found, measurements=tuple(measured), load=run, pays=holds)


def affordable_duel_s(left_s: float) -> float | None:
    """How long each real load may last if both plans are opened and loaded in so much time; ``None`` for too little."""
    each_s = (left_s - OPENING_S) / (2 * ROUNDS * len(DUELS))
    return None if each_s < SHORTEST_DUEL_S else min(DUEL_S, each_s)


class Opened(NamedTuple):
    """What a plan is opened from, and the samples that are sent to it."""

    payload: Path
    build: Build
    samples: Path


def judged_by_load(
    found: Elasticity,
    plan: Plan,
    measured: Sequence[Measurement],
    opened: Opened,
    clients: tuple[Client, Client],
    duel_s: float,
) -> Elasticity:
    """What real load says of an elastic plan: it and its layout that is like ``plan``, each in a client, in turns."""
    elastic = found.plan
    fixed = elastic.wide if plan.instances == 1 else elastic.narrow
    ours, theirs = clients
    ours.open(opened.payload, opened.build, elastic.narrow, elastic.wide)
    theirs.open(opened.payload, opened.build, fixed)
    loads = (
        partial(
            client.load,
            opened.samples,
            layout,
            LatencyTable.of(_table(layout, measured)),
            duration_s=duel_s,
            elastic=tables,
        )
        for client, layout, tables in (
            (ours, elastic.narrow, elastic_tables(elastic, measured)),
            (theirs, fixed, None),
        )
    )
    ours_at, theirs_at = loads
    most_per_s = _most_per_s(fixed, measured)
    duels = []
    for load in DUELS:
        pairs = [
            (ours_at(rate_per_s=load * most_per_s, seed=k), theirs_at(rate_per_s=load * most_per_s, seed=k))
            for k in range(ROUNDS)
        ]
        duels.append(Duel(load=load, elastic=tuple(a for a, _ in pairs), fixed=tuple(b for _, b in pairs)))
    return replace(found, duels=tuple(duels), pays=min(map(_gain, duels)) >= WORSE)


def _gain(duel: Duel) -> float:
    """The fixed layout's p50 and p99 over the elastic plan's, their geometric mean; 0 if not all were answered."""
    if not duel.all_answered:
        return 0.0
    (p50_ms, fixed_p50_ms), (p99_ms, fixed_p99_ms) = duel.p50_ms, duel.p99_ms
    return sqrt(fixed_p50_ms / p50_ms * fixed_p99_ms / p99_ms)


def _table(plan: Plan, measured: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with a layout's threads, up to its batch."""
    return [
        one for one in measured if ThreadLayout.of(one.plan) == ThreadLayout.of(plan) and one.plan.batch <= plan.batch
    ]


def _most_per_s(plan: Plan, measured: Sequence[Measurement]) -> float:
    """The rate at which a layout is saturated."""
    return capacity_per_s(service_of(_table(plan, measured)), instances=plan.instances, max_batch=plan.batch)


def _measured(
    client: Client, build: Build, layout: Plan, plans: Sequence[Plan], context: SearchContext
) -> list[Measurement]:
    """Batches of one layout, which is opened once, as those who serve it do."""
    context.on_event(StageStarted(Stage.MEASURING_PLAN, plan=layout))
    opened = client.open(context.workspace.payload(build), build, layout)
    samples, why = context.workspace.holdout, Reason.of(ReasonKind.ELASTIC_TABLE)
    return [
        replace(client.measure(samples, plan, trial.MEASURE_S / 2), why=why, warning=opened.warning) for plan in plans
    ]


def _load(
    client: Client,
    build: Build,
    elastic: ElasticPlan,
    measured: Sequence[Measurement],
    certified: LoadRun,
    context: SearchContext,
) -> LoadRun:
    """The certified rate on the elastic plan."""
    narrow = ThreadLayout.of(elastic.narrow)
    client.open(context.workspace.payload(build), build, elastic.narrow, elastic.wide)
    rate_per_s = certified.rate_per_s or 0.0
    least_s, left_s = max(slo.CONFIRM_S, slo.REQUESTS / rate_per_s), context.budget.left_s(FINISHING)
    run = client.load(
        context.workspace.holdout,
        elastic.narrow,
        LatencyTable.of([one for one in measured if ThreadLayout.of(one.plan) == narrow]),
        rate_per_s=rate_per_s,
        duration_s=max(slo.LOAD_S, min(slo.LONGEST_S, least_s, slo.OF_WHAT_IS_LEFT * left_s)),
        slo_ms=certified.slo_ms,
        elastic=elastic_tables(elastic, measured),
    )
    context.on_event(LoadEnded(build, run))
    return run


def plans_to_measure(
    elastic: ElasticPlan, measured: Sequence[Measurement], batches: Sequence[int] = BATCHES
) -> list[Plan]:
    """What an elastic plan's tables still lack, single rows first."""
    known = {measurement.plan for measurement in measured}
    wanted = [
        ThreadLayout.of(layout).plan(batch)
        for batch in sorted({*batches, elastic.wide.batch})
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
    curve = _curve(elastic, measured, elastic.wide if fixed == 1 else elastic.narrow)
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


def _curve(elastic: ElasticPlan, measured: Sequence[Measurement], fixed: Plan) -> tuple[LoadPoint, ...]:
    """Latencies of requests that share calls as the server has them, from idle to saturated."""
    tables = elastic_tables(elastic, measured)
    by_plan = {layout: _table(layout, measured) for layout in (elastic.wide, elastic.narrow)}
    wide, most_per_s = by_plan[elastic.wide], _most_per_s(fixed, measured)
    ways = (
        (elastic.narrow, Wide(tables=tables, service=service_of(wide))),
        (elastic.wide, None),
        (elastic.narrow, None),
    )

    def at(load: float, plan: Plan, both: Wide | None) -> Simulated:
        return simulate_load(
            LatencyTable.of(by_plan[plan]),
            service=service_of(by_plan[plan]),
            instances=plan.instances,
            rate_per_s=load * most_per_s,
            requests=REQUESTS,
            max_batch=plan.batch,
            max_waiting=REQUESTS,
            wide=both,
        )

    return tuple(_point(load, [at(load, *way) for way in ways]) for load in LOADS)


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
