"""Whether a build should keep two thread layouts open, so that the load decides how the cores are divided.

Both layouts are measured with few batches while all cores work, so their times include what calls cost each other. The
elastic plan and each layout alone are then simulated from these times, from idle to saturated. If the elastic plan is
better there, real load on it and on the fixed plan, in turns, decides.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from math import inf, sqrt
from pathlib import Path
from typing import NamedTuple, Self

from corewise.artifact.tuned import elastic_tables, partitions
from corewise.batching import LatencyTable, Partitions
from corewise.batching.simulate import Simulated, Wide, capacity_per_s, service_of, simulate_callers, simulate_load
from corewise.common.errors import CorewiseError, InputError
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.events import LoadEnded, OnEvent, Stage, StageStarted
from corewise.records.goal import Requirements, Slo
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import Reason, ReasonKind
from corewise.records.trial import Trial
from corewise.records.tuned import Duel, Elasticity, LoadPoint
from corewise.runtime.client import Client
from corewise.search import slo, trial
from corewise.search.budget import FINISHING
from corewise.search.plans import BATCHES, SLOW_CALL_MS, START_BATCH, memory_of_both, tables
from corewise.search.trial import SearchContext

FEW_BATCHES = (1, 4, 16, 64)
"""Batches that a search measures for an elastic plan, beside those of both plans."""
NEEDED = 2.0
"""Under a budget, what must be left for each plan that is measured, as a multiple of the time that it is measured."""
LOADS = (0.05, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.95)
"""Simulated loads, as shares of the rate at which the fixed plan is saturated."""
REQUESTS, FULL_CALLS = 1000, 200
WORSE, BETTER = 0.92, 1.1
"""How many times as good as the fixed plan an elastic plan must be, at least: at every load, and at one of them."""
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

    For an SLO it has to meet the certified rate too. One that was certified for more than its layouts meet alone stays.

    Args:
        winner: The trial that won, with its measurements.
        plan: The plan that won, which the elastic one would replace.
        context: What all trials share.

    Returns:
        What was found, whose ``pays`` is the verdict; ``None`` for a plan of one thread, which has nothing to divide;
        or the reason why it could not be measured.
    """
    build, known, certified = winner.build, winner.measurements, winner.certified
    if certified is not None and certified.elastic is not None:
        found = elasticity(plan, certified.elastic, known, context.requirements)
        assert found is not None  # both layouts were measured before they were loaded
        return replace(found, load=certified, pays=True)
    elastic = elastic_plan(plan, known, build.fixed_batch)
    if elastic is None:
        return None
    opened = Opened(context.workspace.payload(build), build, context.workspace.holdout)
    try:
        with Site(
            opened,
            start=lambda: context.client(build, share=FINISHING),
            left_s=lambda: context.budget.left_s(FINISHING),
            on_event=context.on_event,
        ) as site:
            kept_s = OPENING_S + slo.LOAD_S / slo.OF_WHAT_IS_LEFT if certified else 0.0
            judgement = judged(elastic, plan, known, context.requirements, site, kept_s=kept_s)
            if not isinstance(judgement, Elasticity) or not judgement.pays or certified is None:
                return judgement
            run = _load(site, elastic, (*known, *judgement.measurements), certified)
    except InputError:
        raise
    except CorewiseError as error:
        return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why=str(error))
    return replace(judgement, load=run, pays=slo.is_confirmed(run))


class Opened(NamedTuple):
    """What a plan is opened from, and the samples that are sent to it."""

    payload: Path
    build: Build
    samples: Path


class Site:
    """Where an elastic plan is measured and loaded: two trial processes, each started when it is first needed.

    A context manager that ends them. ``left_s`` says how much time there is.
    """

    def __init__(
        self, opened: Opened, *, start: Callable[[], Client], left_s: Callable[[], float], on_event: OnEvent
    ) -> None:
        self.opened, self.left_s, self.on_event = opened, left_s, on_event
        self._start, self._stack = start, ExitStack()

    @cached_property
    def ours(self) -> Client:
        """Measures both layouts, and is loaded with both open."""
        return self._stack.enter_context(self._start())

    @cached_property
    def theirs(self) -> Client:
        """Is loaded with one layout open."""
        return self._stack.enter_context(self._start())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self._stack.close()


def judged(
    elastic: ElasticPlan,
    plan: Plan,
    known: Sequence[Measurement],
    requirements: Requirements,
    site: Site,
    *,
    measure_s: float = trial.MEASURE_S / 2,
    kept_s: float = 0.0,
) -> Elasticity | Reason | None:
    """An elastic plan beside the plan that it would replace, by simulation and, if that promises something, by load.

    What the tables lack is measured first, each plan for ``measure_s``. Real load leaves ``kept_s`` of the time.
    Returns as ``judge_elastic``. Raises ``CorewiseError`` where a process fails.
    """
    measured: list[Measurement] = []
    wanted = plans_to_measure(elastic, known, FEW_BATCHES if site.opened.build.fixed_batch is None else (1,))
    for layout in (elastic.wide, elastic.narrow):
        plans = [wish for wish in wanted if ThreadLayout.of(wish) == ThreadLayout.of(layout)]
        if plans and site.left_s() < NEEDED * measure_s * len(plans):
            return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why="the budget was spent")
        if plans:
            measured += _measured(site, layout, plans, measure_s)
    both = (*known, *measured)
    found = elasticity(plan, elastic, both, requirements)
    if found is None:
        return None
    found = replace(found, measurements=tuple(measured))
    if not found.pays:
        return found
    duel_s = affordable_duel_s(site.left_s() - kept_s)
    if duel_s is None:
        return Reason.of(ReasonKind.ELASTIC_NOT_MEASURED, why="no time was left to test it under load")
    return judged_by_load(found, plan, both, site, duel_s)


def affordable_duel_s(left_s: float) -> float | None:
    """How long each real load may last if both plans are opened and loaded in ``left_s``; ``None`` for too little."""
    each_s = (left_s - OPENING_S) / (2 * ROUNDS * len(DUELS))
    return None if each_s < SHORTEST_DUEL_S else min(DUEL_S, each_s)


def judged_by_load(
    found: Elasticity, plan: Plan, measured: Sequence[Measurement], site: Site, duel_s: float
) -> Elasticity:
    """What real load says of an elastic plan: it and its layout that is like ``plan``, each in a client, in turns."""
    elastic = found.plan
    fixed = elastic.wide if plan.instances == 1 else elastic.narrow
    payload, build, samples = site.opened
    site.on_event(StageStarted(Stage.LOADING, build=build, plan=elastic.narrow))
    site.ours.open(payload, build, elastic.narrow, elastic.wide)
    site.theirs.open(payload, build, fixed)
    loads = (
        partial(
            client.load,
            samples,
            layout,
            LatencyTable.of(_table(layout, measured)),
            duration_s=duel_s,
            elastic=tables,
        )
        for client, layout, tables in (
            (site.ours, elastic.narrow, elastic_tables(elastic, measured)),
            (site.theirs, fixed, None),
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


def _measured(site: Site, layout: Plan, plans: Sequence[Plan], measure_s: float) -> list[Measurement]:
    """Batches of one layout, which is opened once for all of them, as the server opens it."""
    payload, build, samples = site.opened
    opened = site.ours.open(payload, build, layout)
    found = list[Measurement]()
    for plan in plans:
        site.on_event(StageStarted(Stage.MEASURING_PLAN, plan=plan))
        measurement = site.ours.measure(samples, plan, measure_s)
        found.append(replace(measurement, why=Reason.of(ReasonKind.ELASTIC_TABLE), warning=opened.warning))
    return found


def _load(site: Site, elastic: ElasticPlan, measured: Sequence[Measurement], certified: LoadRun) -> LoadRun:
    """The certified rate on the elastic plan."""
    payload, build, samples = site.opened
    site.ours.open(payload, build, elastic.narrow, elastic.wide)
    rate_per_s = certified.rate_per_s or 0.0
    least_s = max(slo.CONFIRM_S, slo.REQUESTS / rate_per_s)
    run = site.ours.load(
        samples,
        elastic.narrow,
        LatencyTable.of(_table(elastic.narrow, measured)),
        rate_per_s=rate_per_s,
        duration_s=max(slo.LOAD_S, min(slo.LONGEST_S, least_s, slo.OF_WHAT_IS_LEFT * site.left_s())),
        slo_ms=certified.slo_ms,
        elastic=elastic_tables(elastic, measured),
    )
    site.on_event(LoadEnded(build, run))
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
    memory_bytes = memory_of_both(elastic, measured)
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
