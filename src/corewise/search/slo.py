"""The rate at which a build meets an SLO: simulated for each of its latency tables, then tried with real load."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import NamedTuple

from corewise.artifact.tuned import elastic_tables
from corewise.batching import ElasticTables, LatencyTable
from corewise.batching.simulate import most_rate, service_of
from corewise.common.errors import CorewiseError, InputError
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, ElasticPlan
from corewise.records.events import LoadEnded, Stage, StageStarted
from corewise.records.goal import Requirements
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import Reason
from corewise.records.trial import State, Trial
from corewise.runtime.client import Client
from corewise.runtime.worker import MAX_WAITING
from corewise.search.candidates import is_baseline
from corewise.search.plans import memory_of_both, tables
from corewise.search.trial import SearchContext, reason_of

FIRST = 0.9
"""Share of the simulated rate that is tried first."""
UP, DOWN = 1.1, 0.85
"""Steps from the last rate to the next until one was met and one missed; then rates between them, until they are as
near as ``UP``."""
LEAP = 2.0
"""Upper bound on growth between attempts, as a multiple of the highest rate met; used if the p99 was below half of the
SLO."""
ENOUGH = 0.97
"""A plan's batch is the smallest that reaches this share of the highest rate: a larger one only makes others wait."""
DONE = 0.95
"""As long as no rate was met, the next one is at most this share of what was answered in time at the last one."""
ATTEMPTS, MOST_LOADS = 6, 16
"""Loads on one plan, and on all together."""
SLOWEST = 2.0
"""Upper bound on how much slower calls are under load: more than that is a queue, and not slower calls."""
CERTIFIED, LEAST_CERTIFIED = 0.9, 0.55
"""Share of the highest rate met that is certified: a machine is never as quiet for hours as for seconds. If it is not
confirmed, the same share of it is asked for, and so on down to the least share."""
CONFIRMED = 0.995
"""Share of the requests that must be in time at the rate to certify. Of 200 requests that barely meet a p99, two are
late as easily as four: a rate certified on the edge was missed by the next minute."""
LOAD_S, CONFIRM_S = 5.0, 30.0
"""The least seconds of a load that looks for a rate, and of one that confirms it, if there is as much time."""
REQUESTS = 200
"""Least requests of a load: a p99 of fewer is chance."""
LONGEST_S = 60.0
OF_WHAT_IS_LEFT = 0.75
"""Share of the remaining budget that one load may take."""
SHARE = 0.8
"""Share of the budget after which the highest rate is no longer looked for, and the rate found so far is certified."""


class Elastic(NamedTuple):
    """An elastic plan, which is loaded with more than its layouts met alone."""

    plan: ElasticPlan
    tables: ElasticTables
    layouts: tuple["Contender", "Contender"]


@dataclass
class Contender:
    """A plan of a build, and the loads that were put on it to find the rate that it meets."""

    build: Build
    table: Sequence[Measurement]
    """Measurements of one layout by rising batch, all within the SLO; the last one's plan is loaded."""
    simulated_per_s: float
    """The rate that it meets in simulation; ``inf`` for an elastic plan, of which its layouts' loads say more."""
    loads: list[LoadRun] = field(default_factory=list)
    elastic: Elastic | None = None
    """If another layout is open too: the plan with both; ``table`` is of the narrow one."""

    @property
    def layout(self) -> ThreadLayout:
        """The thread layout of its plans."""
        return ThreadLayout.of(self.table[-1].plan)

    @property
    def met_per_s(self) -> float:
        """The highest rate that it met; 0 for none."""
        return max((_rate(load) for load in self.loads if load.met), default=0.0)

    @property
    def missed_per_s(self) -> float:
        """The lowest rate that it missed."""
        return min((_rate(load) for load in self.loads if not load.met), default=inf)

    @property
    def closed(self) -> bool:
        """Whether its highest rate is known well enough."""
        return len(self.loads) >= ATTEMPTS or self.missed_per_s <= UP * self.met_per_s

    @property
    def next_per_s(self) -> float:
        """The rate to try next."""
        if not self.loads and self.elastic is not None:
            return UP * max(layout.met_per_s for layout in self.elastic.layouts)
        if not self.loads:
            return FIRST * self.simulated_per_s
        last, met_per_s = self.loads[-1], self.met_per_s
        if not met_per_s:
            lower = min(DOWN * _rate(last), DONE * last.goodput_per_s) or _rate(last) / 2
            # That no rate is met in simulation, with calls as slow as under the first load, is no proof.
            return min(lower, self.simulated_per_s or lower)
        if self.missed_per_s < inf:
            return met_per_s * min(LEAP, sqrt(self.missed_per_s / met_per_s))
        easy = last.slo_ms is not None and last.p99_ms < last.slo_ms / 2
        return met_per_s * (LEAP if easy else UP)

    @property
    def hope_per_s(self) -> float:
        """The rate that it may meet, or does meet if that is known."""
        if not self.loads and self.elastic is None:
            return self.simulated_per_s
        return self.met_per_s if self.closed else max(self.met_per_s, self.next_per_s)


def _rate(load: LoadRun) -> float:
    assert load.rate_per_s is not None  # all loads here arrive at a rate
    return load.rate_per_s


Load = Callable[[Contender, float, float], LoadRun | None]
"""Puts a rate on a contender for at least that many seconds; ``None`` if its build cannot be loaded."""


def find_rates(trials: Sequence[Trial], context: SearchContext, slo_ms: float) -> tuple[Trial, ...]:
    """The trials with the loads that were put on the most promising plans and, with the time left, on the baseline.

    The build that met the highest rate has one more load at the end, a little lower: its ``Trial.certified``. It may be
    on an elastic plan, if that met more than its layouts alone.
    """
    waiting = [trial for trial in trials if trial.state == State.OK and not trial.loads]
    bench = _LoadBench(context, slo_ms)
    for group in (
        [trial for trial in waiting if not is_baseline(trial.build)],
        # Baseline last: at its low rate, 200 requests take longest.
        [trial for trial in waiting if is_baseline(trial.build)],
    ):
        contenders = [one for trial in group for one in contenders_of(trial, slo_ms, context.requirements)]
        with bench:
            best = climb(contenders, bench.load, lambda table: simulated(table, slo_ms), context.budget.ended)
        if best is not None:
            bench.certify(best.build)
    return tuple(bench.loaded(trial) for trial in trials)


def climb(
    contenders: Sequence[Contender],
    load: Load,
    simulate: Callable[[Sequence[Measurement]], float],
    ended: Callable[[float], object],
) -> Contender | None:
    """Find the contender that meets the highest rate and confirm a rate for it; ``None`` if none meets any.

    The contender that may meet most is tried next (best first). Each load narrows its plan's rate, and the first load
    also shows how much slower calls are beside arriving requests than one after the other, for all plans of that
    layout. ``ended(share)`` is true when that share of the time is spent.
    """
    left = list(contenders)
    while left and sum(len(contender.loads) for contender in contenders) < MOST_LOADS and not ended(SHARE):
        contender = max(left, key=lambda contender: contender.hope_per_s)
        if contender.closed or contender.hope_per_s <= 0:
            break
        run = load(contender, contender.next_per_s, LOAD_S)
        if run is None:
            # The memory may be enough for one layout and not for two.
            left = [one for one in left if one is not contender and (contender.elastic or one.build != contender.build)]
            continue
        contender.loads.append(run)
        if len(contender.loads) == 1 and contender.elastic is None:
            _slow_down(contender, left, run, simulate)
    return _confirmed([contender for contender in left if contender.met_per_s], load, ended)


def _confirmed(contenders: Sequence[Contender], load: Load, ended: Callable[[float], object]) -> Contender | None:
    """Ask for a little less than what was met, the highest rate first, until one is confirmed; whose it is."""
    asked_per_s = [CERTIFIED * contender.met_per_s for contender in contenders]
    while any(asked_per_s) and not ended(1.0):
        best = asked_per_s.index(max(asked_per_s))
        contender = contenders[best]
        run = load(contender, asked_per_s[best], CONFIRM_S)
        if run is not None and is_confirmed(run):
            return contender
        lower_per_s = CERTIFIED * asked_per_s[best]
        given_up = run is None or lower_per_s < LEAST_CERTIFIED * contender.met_per_s
        asked_per_s[best] = 0.0 if given_up else lower_per_s
    return None


def is_confirmed(run: LoadRun) -> bool:
    """Whether a load at a rate shows that it can be certified."""
    return run.met and run.in_time >= CONFIRMED * run.offered


def _slow_down(
    loaded: Contender, contenders: Sequence[Contender], run: LoadRun, simulate: Callable[[Sequence[Measurement]], float]
) -> None:
    """Simulate all plans of the loaded contender's layout again with calls as slow as under its load."""
    factor = min(SLOWEST, run.p50_ms / loaded.table[0].p50_ms)
    if factor <= 1:
        return
    for other in contenders:
        if other.layout == loaded.layout and other.elastic is None and (other is loaded or not other.loads):
            other.simulated_per_s = simulate([_slower(row, factor) for row in other.table])


def _slower(measurement: Measurement, factor: float) -> Measurement:
    return replace(
        measurement,
        latencies_ms=tuple(ms * factor for ms in measurement.latencies_ms),
        p50_ms=measurement.p50_ms * factor,
        p99_ms=measurement.p99_ms * factor,
    )


def contenders_of(trial: Trial, slo_ms: float, requirements: Requirements) -> list[Contender]:
    """The trial's tables that meet a rate in simulation, and the elastic plan of two of them."""
    contenders = []
    for table in tables(trial.allowed).values():
        within = worthwhile([measurement for measurement in table if measurement.p99_ms <= slo_ms])
        if within and (rate_per_s := simulated(within, slo_ms)) > 0:
            contenders.append(Contender(build=trial.build, table=within, simulated_per_s=rate_per_s))
    elastic = None if is_baseline(trial.build) else _elastic(contenders, trial.measurements, requirements)
    return contenders if elastic is None else [*contenders, elastic]


def _elastic(
    layouts: Sequence[Contender], measured: Sequence[Measurement], requirements: Requirements
) -> Contender | None:
    """The elastic plan of the two layouts that promise most; ``None`` if there are none, or no memory for both.

    Calls on all cores have no more rows than the others, because instances are warmed up for these.
    """
    pairs = [
        (wide, narrow)
        for wide in layouts
        for narrow in layouts
        if wide.layout.instances == 1 < narrow.layout.instances
        and wide.layout.threads == narrow.layout.threads * narrow.layout.instances
        and wide.table[0].plan.batch == narrow.table[0].plan.batch == 1  # a program may take calls of many rows only
    ]
    if not pairs:
        return None
    wide, narrow = max(pairs, key=lambda pair: sorted((one.simulated_per_s for one in pair), reverse=True))
    most = narrow.table[-1].plan
    plan = ElasticPlan(wide=[one.plan for one in wide.table if one.plan.batch <= most.batch][-1], narrow=most)
    if not requirements.within_memory(memory_of_both(plan, measured)):
        return None
    found = Elastic(plan, elastic_tables(plan, measured), (wide, narrow))
    return replace(narrow, simulated_per_s=inf, loads=[], elastic=found)


def worthwhile(table: Sequence[Measurement]) -> Sequence[Measurement]:
    """The table up to the smallest batch that nearly reaches the highest rate."""
    enough_per_s = ENOUGH * max((measurement.throughput_per_s for measurement in table), default=0.0)
    last = next((k for k, measurement in enumerate(table) if measurement.throughput_per_s >= enough_per_s), 0)
    return table[: last + 1]


def simulated(table: Sequence[Measurement], slo_ms: float) -> float:
    """The highest rate that meets the SLO in simulation."""
    plan = table[-1].plan
    return most_rate(
        LatencyTable.of(table),
        service=service_of(table),
        instances=plan.instances,
        slo_ms=slo_ms,
        max_batch=plan.batch,
        max_waiting=max(MAX_WAITING, plan.batch),
    )


def load_s(rate_per_s: float, least_s: float, left_s: float) -> float:
    """How long a load lasts, if ``left_s`` are left."""
    # Not all of what is left: the process is ended then, and the requests that were sent need answers.
    return min(LONGEST_S, max(least_s, REQUESTS / rate_per_s), max(1.0, OF_WHAT_IS_LEFT * left_s))


class _LoadBench:
    """Puts loads on contenders, whose process stays open until another one's turn, and keeps the results."""

    def __init__(self, context: SearchContext, slo_ms: float) -> None:
        self._context, self._slo_ms = context, slo_ms
        self._stack = ExitStack()
        self._open: tuple[Contender, Client] | None = None
        self._loads: dict[Build, list[LoadRun]] = {}
        self._failures: dict[Build, Reason] = {}

    def __enter__(self) -> "_LoadBench":
        return self

    def __exit__(self, *about: object) -> None:
        self._close()

    def loaded(self, trial: Trial) -> Trial:
        """The trial with its loads, and why they ended if that was early."""
        loads = (*trial.loads, *self._loads.get(trial.build, ()))
        return replace(trial, loads=loads, load_failure=self._failures.get(trial.build))

    def load(self, contender: Contender, rate_per_s: float, least_s: float) -> LoadRun | None:
        """As ``Load``."""
        context, elastic = self._context, contender.elastic
        duration_s = min(context.timeout_s / 2, load_s(rate_per_s, least_s, context.budget.left_s()))
        try:
            run = self._client(contender).load(
                context.workspace.holdout,
                contender.table[-1].plan,
                LatencyTable.of(contender.table),
                rate_per_s=rate_per_s,
                duration_s=duration_s,
                slo_ms=self._slo_ms,
                elastic=None if elastic is None else elastic.tables,
            )
        except InputError:
            raise
        except CorewiseError as error:
            self._close()
            if elastic is None:
                self._failures[contender.build] = reason_of(error)
            return None
        run = run if elastic is None else replace(run, elastic=elastic.plan)
        context.on_event(LoadEnded(contender.build, run))
        self._loads.setdefault(contender.build, []).append(run)
        return run

    def certify(self, build: Build) -> None:
        """Note that the build's last load confirmed its rate."""
        self._loads[build][-1] = replace(self._loads[build][-1], certified=True)

    def _client(self, contender: Contender) -> Client:
        if self._open is None or self._open[0] is not contender:
            self._close()
            build, plan = contender.build, contender.table[-1].plan
            self._context.on_event(StageStarted(Stage.LOADING, build=build, plan=plan))
            client = self._stack.enter_context(self._context.client(build))
            wide = None if contender.elastic is None else contender.elastic.plan.wide
            client.open(self._context.workspace.payload(build), build, plan, wide)
            self._open = contender, client
        return self._open[1]

    def _close(self) -> None:
        self._open = None
        self._stack.close()
