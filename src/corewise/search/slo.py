"""The rate that a build holds under an SLO: simulated for each of its latency tables, then tried with real load."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf, sqrt

from corewise.batching import LatencyTable
from corewise.batching.simulate import most_rate, service_of
from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Build
from corewise.records.events import Explored, StageStarted, TrialStep
from corewise.records.goal import Objective
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.trial import Trial
from corewise.runtime.client import AnyWorker
from corewise.runtime.worker import MAX_WAITING
from corewise.search.candidates import BASELINE
from corewise.search.journal import Journal
from corewise.search.plans import tables
from corewise.search.trial import SearchContext

FIRST = 0.9
"""Of the simulated rate, the first that is tried."""
UP, DOWN = 1.1, 0.85
"""Of the last rate, the next, until one was held and one missed; then one between, until they are as near as ``UP``."""
LEAP = 2.0
"""The next rate is at most so many times the one that was held, however far away the one is that was missed; and that
much where the p99 was not half of the SLO."""
ENOUGH = 0.97
"""A plan's batch is the smallest one that does so much of the most: a larger one only lets others wait for longer."""
DONE = 0.95
"""Of what was answered in time at a rate that was too high, the most that is tried next."""
ATTEMPTS, MOST_LOADS = 6, 16
"""Loads on one plan, and on all together."""
SLOWEST = 2.0
"""More than so many times as slow as measured is a queue, not slower calls."""
PROMISED = 0.9
"""Of the highest rate that was held, what is promised: a machine is never as quiet for hours as for seconds."""
CONFIRMED = 0.995
"""Of the requests at the rate to promise, so many must be in time. Of 200 that meet a p99 barely, two are late as
easily as four: a promise on the edge was missed by the next minute."""
LOAD_S, CONFIRM_S = 5.0, 30.0
REQUESTS = 200
"""A load lasts at least until so many requests were sent: a p99 of fewer is chance."""
LONGEST_S = 60.0
OF_WHAT_IS_LEFT = 0.75
"""Of the budget, what one load may take."""
SHARE = 0.8
"""Of the budget: when the highest rate is no longer looked for, but the promise made of what was found."""


@dataclass
class Contender:
    """A plan of a build, and the loads that were put on it to find the rate that it holds."""

    build: Build
    table: Sequence[Measurement]
    """Of one division of the cores, by rising batch, all within the SLO; the last one's plan is loaded."""
    simulated_per_s: float
    loads: list[LoadRun] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Threads per instance, and instances."""
        plan = self.table[-1].plan
        return plan.threads_per_instance, plan.instances

    @property
    def held_per_s(self) -> float:
        """The highest rate that it held; 0 for none."""
        return max((_rate(load) for load in self.loads if load.held), default=0.0)

    @property
    def missed_per_s(self) -> float:
        """The lowest rate that it did not hold."""
        return min((_rate(load) for load in self.loads if not load.held), default=inf)

    @property
    def closed(self) -> bool:
        """Whether its highest rate is known well enough."""
        return len(self.loads) >= ATTEMPTS or self.missed_per_s <= UP * self.held_per_s

    @property
    def next_per_s(self) -> float:
        """The rate to try next."""
        if not self.loads:
            return FIRST * self.simulated_per_s
        last, held_per_s = self.loads[-1], self.held_per_s
        if not held_per_s:
            lower = min(DOWN * _rate(last), DONE * last.goodput_per_s) or _rate(last) / 2
            return min(lower, self.simulated_per_s)
        if self.missed_per_s < inf:
            return held_per_s * min(LEAP, sqrt(self.missed_per_s / held_per_s))
        easy = last.slo_ms is not None and last.p99_ms < last.slo_ms / 2
        return held_per_s * (LEAP if easy else UP)

    @property
    def hope_per_s(self) -> float:
        """What it may hold; what it does, where that is known."""
        if not self.loads:
            return self.simulated_per_s
        return self.held_per_s if self.closed else max(self.held_per_s, self.next_per_s)


def _rate(load: LoadRun) -> float:
    assert load.rate_per_s is not None  # all loads here arrive at a rate
    return load.rate_per_s


Load = Callable[[Contender, float, float], LoadRun | None]
"""Puts a rate on a contender, for so many seconds at least; ``None`` where its build cannot be loaded."""


def hold(trials: Sequence[Trial], context: SearchContext, journal: Journal, objective: Objective) -> tuple[Trial, ...]:
    """The trials, with the loads that were put on the most promising plans and, with the time left, on the baseline.

    The build that held the highest rate has one more load at last, a little lower, which is its ``Trial.promise``.
    """
    assert objective.slo_ms is not None
    slo_ms = objective.slo_ms
    waiting = [trial for trial in trials if trial.state == "ok" and not trial.loads]
    bench = _Bench(context, slo_ms)
    for group in (
        [trial for trial in waiting if trial.build != BASELINE],
        # Last, for its few requests take the longest.
        [trial for trial in waiting if trial.build == BASELINE],
    ):
        contenders = [one for trial in group for one in _contenders(trial, slo_ms)]
        with bench:
            best = climb(contenders, bench.load, lambda table: _simulated(table, slo_ms), context.budget.ended)
        if best is not None:
            bench.promise(best.build)
    found = tuple(bench.told(trial) for trial in trials)
    for before, after in zip(trials, found, strict=True):
        if after != before:
            if not context.budget.ended():  # else another run, with more time, loads it again
                journal.add(after)
            context.tell(Explored(after))
    return found


def climb(
    contenders: Sequence[Contender],
    load: Load,
    simulate: Callable[[Sequence[Measurement]], float],
    ended: Callable[[float], object],
) -> Contender | None:
    """Find the contender that holds the highest rate, and put at last what is to be promised on it; ``None`` for none.

    Where that is not held once more, the one that held the next highest rate is asked.

    Whoever may hold most is tried next (best first): each load tells how much the rest of its plan is worth, and the
    first one how much slower calls are beside arriving requests than one after the other, for all plans of that
    division of the cores. ``ended(share)`` is true when that share of the time is spent.
    """
    left = list(contenders)
    while left and sum(len(one.loads) for one in contenders) < MOST_LOADS and not ended(SHARE):
        one = max(left, key=lambda contender: contender.hope_per_s)
        if one.closed or one.hope_per_s <= 0:
            break
        run = load(one, one.next_per_s, LOAD_S)
        if run is None:
            left = [other for other in left if other.build != one.build]
            continue
        one.loads.append(run)
        factor = min(SLOWEST, run.p50_ms / one.table[0].p50_ms)
        if len(one.loads) == 1 and factor > 1:
            for other in left:
                if other.shape == one.shape and (other is one or not other.loads):
                    other.simulated_per_s = simulate([_slower(row, factor) for row in other.table])
    for best in sorted(left, key=lambda contender: -contender.held_per_s):
        rate_per_s = PROMISED * best.held_per_s
        while rate_per_s > PROMISED**6 * best.held_per_s and not ended(1.0):
            run = load(best, rate_per_s, CONFIRM_S)
            if run is None:
                break
            if run.held and run.in_time >= CONFIRMED * run.offered:
                return best
            rate_per_s *= PROMISED
    return None


def _slower(one: Measurement, factor: float) -> Measurement:
    return replace(
        one,
        latencies_ms=tuple(ms * factor for ms in one.latencies_ms),
        p50_ms=one.p50_ms * factor,
        p99_ms=one.p99_ms * factor,
    )


def _contenders(trial: Trial, slo_ms: float) -> list[Contender]:
    """The trial's tables that hold a rate in simulation."""
    found = []
    for table in tables([one for one in trial.measurements if not one.rejected]).values():
        within = worthwhile([one for one in table if one.p99_ms <= slo_ms])
        if within and (rate_per_s := _simulated(within, slo_ms)) > 0:
            found.append(Contender(build=trial.build, table=within, simulated_per_s=rate_per_s))
    return found


def worthwhile(table: Sequence[Measurement]) -> Sequence[Measurement]:
    """The table up to the smallest batch that does nearly the most."""
    enough_per_s = ENOUGH * max((one.throughput_per_s for one in table), default=0.0)
    last = next((k for k, one in enumerate(table) if one.throughput_per_s >= enough_per_s), 0)
    return table[: last + 1]


def _simulated(table: Sequence[Measurement], slo_ms: float) -> float:
    """The highest rate that holds in simulation."""
    plan = table[-1].plan
    return most_rate(
        LatencyTable.of(table),
        service=service_of(table),
        instances=plan.instances,
        slo_ms=slo_ms,
        max_batch=plan.batch,
        max_waiting=max(MAX_WAITING, plan.batch),
    )


class _Bench:
    """Puts loads on contenders, whose child stays open until another one's turn, and keeps what became of them."""

    def __init__(self, context: SearchContext, slo_ms: float) -> None:
        self._setting, self._slo_ms = context, slo_ms
        self._stack = ExitStack()
        self._open: tuple[Contender, AnyWorker] | None = None
        self._loads: dict[Build, list[LoadRun]] = {}
        self._ended: dict[Build, str] = {}

    def __enter__(self) -> "_Bench":
        return self

    def __exit__(self, *about: object) -> None:
        self._open = None
        self._stack.close()

    def told(self, trial: Trial) -> Trial:
        """The trial with its loads, and why they ended if that was early."""
        loads, why = self._loads.get(trial.build, []), self._ended.get(trial.build, "")
        explored = f"{trial.explored}; under load it ended early: {why}" if why else trial.explored
        return replace(trial, loads=(*trial.loads, *loads), explored=explored)

    def load(self, one: Contender, rate_per_s: float, least_s: float) -> LoadRun | None:
        """As ``Load``."""
        context = self._setting
        try:
            worker = self._worker(one)
            answer = worker.call(
                "load",
                "under load",
                samples=context.holdout,
                plan=to_json(one.table[-1].plan),
                curve=to_json(LatencyTable.of(one.table)),
                rate_per_s=rate_per_s,
                # Not all of what is left: the child is ended then, and what it was sent has to be answered.
                duration_s=min(
                    LONGEST_S,
                    context.timeout_s / 2,
                    max(least_s, REQUESTS / rate_per_s),
                    max(1.0, OF_WHAT_IS_LEFT * context.budget.left_s()),
                ),
                slo_ms=self._slo_ms,
            )
        except InputError:
            raise
        except CorewiseError as error:
            self._open = None
            self._stack.close()
            self._ended[one.build] = str(error)
            return None
        run = from_json(LoadRun, answer["load"])
        context.tell(TrialStep(one.build, f"{run.rate_per_s:.4g}/s {'held' if run.held else 'missed'}"))
        self._loads.setdefault(one.build, []).append(run)
        return run

    def promise(self, build: Build) -> None:
        """Note that the build's last load is its promise."""
        self._loads[build][-1] = replace(self._loads[build][-1], promised=True)

    def _worker(self, one: Contender) -> AnyWorker:
        if self._open is None or self._open[0] is not one:
            self._open = None
            self._stack.close()
            self._setting.tell(StageStarted(f"putting {one.build.label} under load, {one.table[-1].plan.label}"))
            worker = self._stack.enter_context(self._setting.worker(one.build))
            worker.call(
                "open",
                "opening for load",
                folder=str(self._setting.payload(one.build)),
                build=to_json(one.build),
                plan=to_json(one.table[-1].plan),
            )
            self._open = one, worker
        return self._open[1]
