"""The order of steps of ``corewise retune``: the plans of an artifact's build, measured on the machine that runs it.

The search starts from the artifact's latency table, because the best batch for a number of threads is similar on both
machines. The best plan replaces the plan used so far only if it wins a race against it.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf, log2
from pathlib import Path
from statistics import median
from typing import Any

from corewise.artifact import PAYLOAD, Artifact, read, tuned
from corewise.artifact.open import check_available, check_trusted, golden_samples, opener
from corewise.common.errors import CorewiseError, EngineError, InputError
from corewise.common.stats import ratio_interval
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import ThreadLayout, thread_layouts
from corewise.records.build import Plan
from corewise.records.cpu import Cpu
from corewise.records.events import OnEvent, Stage, StageStarted
from corewise.records.goal import Requirements, Slo
from corewise.records.measurement import Measurement
from corewise.records.tuned import Comparison, Elasticity, Machine, Retuned, Tuned
from corewise.runtime.client import Client, Died, InProcess, Worker
from corewise.runtime.race import ROUND_S, ROUNDS, WARM_S, Contender, ContenderFailed, run_race
from corewise.runtime.workspace import Workspace
from corewise.search.elastic import BuildOnDisk, ProcessPair, elastic_plan, judged
from corewise.search.plans import BATCHES, SLOW_CALL_MS, START_BATCH, tables

BUDGET_S = 30.0
ELASTIC_S, ELASTIC_SHARE = 15.0, 0.2
"""What measuring and loading an elastic plan takes; it gets that share of a budget that has less than twice as much."""
SEARCH_SHARE = 0.6
"""Share of the time before that after which no plan is measured; the rest is for the race of two."""
MEASURE_S = 0.4
FEWEST_ROUNDS = 3
LEAST_TIMEOUT_S = 60.0


def retune(
    folder: str | Path, *, budget_s: float = BUDGET_S, model: Any = None, on_event: OnEvent = lambda event: None
) -> Retuned:
    """Find the best plan of an artifact on this machine, and save it in the artifact's folder for ``load``.

    Args:
        folder: the artifact.
        budget_s: seconds for all of it; the plan used so far is measured and raced even if that takes longer.
        model: the ``nn.Module``, needed only for a model that could not be exported (see ``load``).
        on_event: called with each event of ``corewise.records.events`` as it happens.

    Returns:
        Both plans and how they compare.

    Raises:
        OutputError: the folder cannot be written.
        InputError, ArtifactError, EngineError: as ``load``.

    Example:
        >>> import corewise
        >>> corewise.retune("model.cw", budget_s=1.0).tried > 0
        True
    """
    retuned = find_plan(folder, budget_s=budget_s, model=model, on_event=on_event)
    tuned.write(retuned.folder, retuned.entry)
    return retuned


def find_plan(
    folder: str | Path, *, budget_s: float = BUDGET_S, model: Any = None, on_event: OnEvent = lambda event: None
) -> Retuned:
    """``retune`` without saving."""
    started_s = time.monotonic()
    if not 0 < budget_s < inf:
        raise InputError(f"the budget is {budget_s:g} s", "give more than 0, e.g. 30")
    cpu = inspect_cpu()
    artifact = read(Path(folder), cpu=cpu)
    check_trusted(artifact, artifact.manifest.build.engine)
    check_available(artifact.manifest.build.engine, f"retuning {folder}")
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        workspace = Workspace(Path(name))
        golden_samples(artifact).save(workspace.calibration)
        bench = _Bench(artifact, cpu, workspace, max(LEAST_TIMEOUT_S, budget_s), model, on_event)
        return _retune(bench, started_s, budget_s)


class _Bench:
    """Measures plans of one artifact in a trial process; a process that died is replaced by a new one."""

    def __init__(
        self, artifact: Artifact, cpu: Cpu, workspace: Workspace, timeout_s: float, model: Any, on_event: OnEvent
    ) -> None:
        self.artifact = artifact
        self.cpu = cpu
        self.on_event = on_event
        self.samples = workspace.calibration
        self.build = artifact.manifest.build
        self.payload = artifact.folder / PAYLOAD
        self.opening_s = 0.0
        """Seconds to start a process and open the first plan."""
        self._log = workspace.folder / "retune.log"
        self._timeout_s = timeout_s
        self._in_process = None if model is None else opener(artifact, model)

    def start(self, *_: Any) -> Client:
        if self._in_process is not None:
            return InProcess(self._in_process)
        return Worker(cpu=self.cpu, log=self._log, timeout_s=self._timeout_s)

    def search(
        self, first: Plan, then: Callable[[Sequence[Measurement], Sequence[Plan]], Plan | None], until_s: float
    ) -> tuple[list[Measurement], dict[Plan, str]]:
        """Measurements of ``first`` and of the plans that ``then`` names, and why other plans could not be measured."""
        measurements: list[Measurement] = []
        failed: dict[Plan, str] = {}
        plan: Plan | None = first
        started_s = time.monotonic()
        with ExitStack() as stack:
            client: Client | None = None
            while plan is not None and (plan == first or time.monotonic() < until_s):
                self.on_event(StageStarted(Stage.MEASURING_PLAN, plan=plan))
                client = client or stack.enter_context(self.start())
                try:
                    opened = client.open(self.payload, self.build, plan)
                    self.opening_s = self.opening_s or time.monotonic() - started_s
                    measurement = client.measure(self.samples, plan, MEASURE_S)
                    measurements.append(replace(measurement, warning=opened.warning))
                except InputError:
                    raise
                except CorewiseError as error:
                    failed[plan] = str(error)
                    client = None if isinstance(error, Died) else client
                plan = then(measurements, list(failed))
        return measurements, failed

    def race(self, old: Plan, best: Plan, rounds: int, round_s: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Items per second of each in each round."""
        self.on_event(StageStarted(Stage.RACING, plan=best, count=1))
        race = run_race(
            [Contender(build=self.build, plan=plan, payload=self.payload) for plan in (old, best)],
            samples=self.samples,
            start=self.start,
            rounds=rounds,
            round_s=round_s,
        )
        first, second = race.rates
        return first.per_s, second.per_s


@dataclass(frozen=True, kw_only=True)
class _Duel:
    """The old plan against the best one that was measured."""

    old_per_s: float | None
    best_per_s: float
    comparison: Comparison | None = None
    notes: tuple[str, ...] = ()


def _retune(bench: _Bench, started_s: float, budget_s: float) -> Retuned:
    """Search, race, and decide."""
    report, fit = bench.artifact.report, tuned.fit(bench.artifact, bench.cpu)
    requirements, old = report.requirements, fit.plan
    stored = fit.tuned.measurements if fit.tuned else report.winner.measurements
    first, race_s = guesses(bench.cpu, requirements, stored), before_elastic_s(budget_s)
    measurements, failed = bench.search(
        old,
        lambda so_far, lost: next_plan(first, so_far, lost, requirements),
        started_s + SEARCH_SHARE * race_s,
    )
    if not measurements:
        raise EngineError(f"{bench.artifact.folder} runs under no plan here: {next(iter(failed.values()))}")
    notes = [f"{plan.label} does not run here: {why}" for plan, why in failed.items()]
    if any(measurement.throttled for measurement in measurements):
        notes.append("the CPU quota throttled some measurements: their figures are too low")
    by_plan = {measurement.plan: measurement for measurement in measurements}
    best = best_measurement(measurements, requirements) or measurements[0]
    duel = _duel(bench, by_plan.get(old), best, race_s - (time.monotonic() - started_s))
    wins = duel.comparison is None or duel.comparison.low > 1
    if not wins and allowed(best, requirements) and not allowed(by_plan[old], requirements):
        wins = True
        notes.append(f"{old.label} breaks the {_limits(requirements)} here, so it is not kept")
    plan, kept = best.plan if wins else old, []
    elastic = _elastic(bench, plan, measurements, requirements, started_s + budget_s)
    if fit.tuned or Machine.of(report.cpu) == Machine.of(bench.cpu):
        # Admission needs the small batches of the plan's layout, which the search visits for the best one only.
        layout, fresh = ThreadLayout.of(plan), {measurement.plan for measurement in measurements}
        kept = [
            measurement
            for measurement in stored
            if ThreadLayout.of(measurement.plan) == layout and measurement.plan not in fresh
        ]
    entry = Tuned(
        machine=Machine.of(bench.cpu),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        goal=requirements.goal.name,
        plan=plan,
        measurements=(*measurements, *kept),
        elastic=elastic.plan if elastic and elastic.pays else None,
    )
    return Retuned(
        folder=bench.artifact.folder,
        entry=entry,
        old=old,
        best=best.plan,
        old_per_s=duel.old_per_s,
        best_per_s=duel.best_per_s,
        comparison=duel.comparison,
        tried=len(measurements),
        notes=(*notes, *duel.notes),
        wall_s=time.monotonic() - started_s,
        elasticity=elastic,
    )


def _elastic(
    bench: _Bench, plan: Plan, measured: list[Measurement], requirements: Requirements, until_s: float
) -> Elasticity | None:
    """Judge the elastic plan as a search does; what is measured for it comes into ``measured``."""
    elastic = elastic_plan(plan, measured, bench.build.fixed_batch)
    if elastic is None:
        return None
    on_disk, left_s = BuildOnDisk(bench.payload, bench.build, bench.samples), lambda: until_s - time.monotonic()
    try:
        with ProcessPair(on_disk, start=bench.start, left_s=left_s, on_event=bench.on_event) as processes:
            found = judged(elastic, plan, measured, requirements, processes, measure_s=MEASURE_S)
    except InputError:
        raise
    except CorewiseError:
        return None
    if not isinstance(found, Elasticity):
        return None
    measured += found.measurements
    return replace(found, measurements=())


def _duel(bench: _Bench, old: Measurement | None, best: Measurement, left_s: float) -> _Duel:
    """Race the best plan against the old one, if there are two that run here."""
    measured = _Duel(old_per_s=old.throughput_per_s if old else None, best_per_s=best.throughput_per_s)
    if old is None or best.plan == old.plan:
        return measured
    left_s -= 2 * (bench.opening_s + WARM_S)
    try:
        old_rates, best_rates = bench.race(old.plan, best.plan, *affordable(left_s, (old.p50_ms + best.p50_ms) / 1e3))
    except ContenderFailed as failure:  # two processes at a time may be too much for the memory here
        return replace(measured, notes=(f"{failure}; each plan was therefore only measured alone",))
    ratio = ratio_interval(best_rates, old_rates)
    comparison = Comparison(ratio=ratio.value, low=ratio.low, high=ratio.high, rounds=len(old_rates))
    return _Duel(old_per_s=median(old_rates), best_per_s=median(best_rates), comparison=comparison)


def guesses(cpu: Cpu, requirements: Requirements, stored: Sequence[Measurement]) -> tuple[Plan, ...]:
    """One plan for each shape worth trying here, the most promising first. Pure.

    For latency, single items on one instance. Otherwise the batch that was best for the nearest number of threads in
    the stored table, scaled so that each thread has as much to do, ordered by that table's items per second and thread.
    """
    shapes = thread_layouts(cpu)
    if requirements.goal.single_items:
        return tuple(
            Plan(threads_per_instance=n) for n in dict.fromkeys(n for n, instances in shapes if instances == 1)
        )
    tops = [max(table, key=lambda measurement: measurement.throughput_per_s) for table in tables(stored).values()]
    if not tops:
        return tuple(Plan(threads_per_instance=n, instances=m, batch=START_BATCH) for n, m in shapes)
    ranked = {}
    for threads, instances in shapes:
        like = min(tops, key=lambda measurement: (_distance(measurement, threads), -measurement.throughput_per_s))
        scaled = like.plan.batch * threads / like.plan.threads_per_instance
        batch = min(BATCHES, key=lambda size: abs(log2(size / scaled)))
        per_thread = like.throughput_per_s / (like.plan.threads_per_instance * like.plan.instances)
        expected = per_thread * min(threads * instances, cpu.usable_cores)
        plan = Plan(threads_per_instance=threads, instances=instances, batch=batch)
        ranked[plan] = (-expected, _distance(like, threads))
    return tuple(sorted(ranked, key=lambda plan: ranked[plan]))


def next_plan(
    first: Sequence[Plan], measured: Sequence[Measurement], failed: Sequence[Plan], requirements: Requirements
) -> Plan | None:
    """What to measure next; ``None`` when nothing is worth it. Pure.

    All the ``first`` ones, then larger and smaller batches beside the best so far until both are slower, then what
    is missing below it in its latency table, which admission control needs.
    """
    done = {*(measurement.plan for measurement in measured), *failed}
    for plan in first:
        if plan not in done and not _too_slow(plan, measured):
            return plan
    top = best_measurement(measured, requirements)
    if top is None or requirements.goal.single_items:
        return None
    larger = [size for size in BATCHES if size > top.plan.batch][:1]
    smaller = [size for size in BATCHES if size < top.plan.batch]
    for size in (*larger, *smaller[-1:], *smaller):
        plan = replace(top.plan, batch=size)
        if plan not in done and not _too_slow(plan, measured):
            return plan
    return None


def best_measurement(measured: Sequence[Measurement], requirements: Requirements) -> Measurement | None:
    """The measurement that serves the requirements best; ``None`` if all need more memory than allowed. Pure.

    For an SLO the most items per second of those that ``allowed`` lets through, else the shortest p99.
    """
    choices = [measurement for measurement in measured if requirements.within_memory(measurement.memory_bytes)]
    if requirements.goal.single_items:
        return min(choices, key=lambda measurement: (measurement.plan.batch, measurement.p50_ms), default=None)
    within = [measurement for measurement in choices if allowed(measurement, requirements)]
    if not within:
        return min(choices, key=lambda measurement: measurement.p99_ms, default=None)
    return max(within, key=lambda measurement: measurement.throughput_per_s)


def allowed(measurement: Measurement, requirements: Requirements) -> bool:
    """Whether it keeps the limits: of memory, and for an SLO its slowest calls take half the time. Pure.

    A request may come just after a call has begun, and has to wait for that and then for its own.
    """
    if not requirements.within_memory(measurement.memory_bytes):
        return False
    goal = requirements.goal
    return not isinstance(goal, Slo) or 2 * measurement.p99_ms <= goal.p99_ms


def _limits(requirements: Requirements) -> str:
    goal = requirements.goal
    slo = f"SLO of {goal.p99_ms:g} ms" if isinstance(goal, Slo) else ""
    memory = "" if requirements.memory_limit_bytes is None else "memory limit"
    return " or the ".join(filter(None, (slo, memory)))


def before_elastic_s(budget_s: float) -> float:
    """When the search and the race of two end, so that what is left is enough for an elastic plan. Pure."""
    return budget_s - (ELASTIC_S if budget_s >= 2 * ELASTIC_S else ELASTIC_SHARE * budget_s)


def affordable(left_s: float, calls_s: float) -> tuple[int, float]:
    """Rounds of a race of two and the seconds of a round for each, in the time that is left. Pure.

    ``calls_s`` is the time of one call of each together; each makes an untimed call and at least one more a round.
    """
    least_s = 2 * calls_s + 0.1
    rounds = min(ROUNDS, max(FEWEST_ROUNDS, int(left_s / least_s)))
    return rounds, min(ROUND_S, max(0.05, (left_s / rounds - 2 * calls_s) / 2))


def _distance(measurement: Measurement, threads: int) -> float:
    """Between its number of threads an instance and another, in doublings."""
    return abs(log2(measurement.plan.threads_per_instance / threads))


def _too_slow(plan: Plan, measured: Sequence[Measurement]) -> bool:
    """Whether a smaller batch of the shape takes long already."""
    return any(
        replace(measurement.plan, batch=plan.batch) == plan
        and measurement.plan.batch < plan.batch
        and measurement.p50_ms > SLOW_CALL_MS
        for measurement in measured
    )
