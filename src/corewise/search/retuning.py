"""The order of steps of ``corewise retune``: the plans of an artifact's build, measured on the machine that runs it.

The latency table that the artifact keeps says where to begin: what was the best batch for so many threads there is near
the best one here. What is found is raced against the plan used so far before it takes its place.
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

from corewise import artifact
from corewise.artifact import Artifact, tuned
from corewise.artifact.open import check_available, check_trusted, golden_samples, opener
from corewise.artifact.tuned import Machine, Tuned
from corewise.common.errors import CorewiseError, EngineError, InputError
from corewise.common.stats import Ratio, ratio_interval
from corewise.machine.inspect import inspect
from corewise.machine.layouts import thread_plans
from corewise.records.build import Plan
from corewise.records.cpu import Cpu
from corewise.records.events import OnEvent, StageStarted
from corewise.records.goal import Objective
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import Measurement
from corewise.runtime.client import AnyWorker, Died, InProcess, Worker
from corewise.runtime.race import ROUND_S, ROUNDS, WARM_S, Contender, ContenderFailed, race
from corewise.runtime.worker import CALIBRATION
from corewise.search.plans import BATCHES, SLOW_CALL_MS, START_BATCH, tables

BUDGET_S = 30.0
SEARCH_SHARE = 0.5
"""Of the budget; the rest is for the race, which opens both plans again."""
MEASURE_S = 0.4
FEWEST_ROUNDS = 3
LEAST_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Retuned:
    """What was found: the plan for this machine, and how it compares with the one used so far."""

    folder: Path
    entry: Tuned
    old: Plan
    best: Plan
    """The fastest one measured; it is the entry's unless the race could not tell it from the old one."""
    old_per_s: float | None
    """Items per second in the race, or as measured where there was none; ``None`` where it does not run here."""
    best_per_s: float
    ratio: Ratio | None
    """The best plan's rate over the old one's, alternating; ``None`` where there was no race."""
    rounds: int
    tried: int
    """How many plans were measured."""
    notes: tuple[str, ...]
    wall_s: float

    @property
    def kept(self) -> bool:
        """Whether the old plan stays."""
        return self.entry.plan == self.old

    def save(self) -> Path:
        """Write it beside the manifest; returns the file. Raises ``OutputError`` where the folder is read-only."""
        tuned.write(self.folder, self.entry)
        return self.folder / artifact.TUNED


def retune(
    folder: str | Path, *, budget_s: float = BUDGET_S, model: Any = None, tell: OnEvent = lambda event: None
) -> Retuned:
    """Find the best plan of an artifact on this machine, and save it in the artifact's folder for ``load``.

    ``model`` is needed only for one that could not be exported (see ``load``). ``budget_s`` is for all of it; the plan
    used so far is measured and raced whatever that takes. Raises ``OutputError`` where the folder cannot be written,
    and what ``load`` raises.
    """
    found = find(folder, budget_s=budget_s, model=model, tell=tell)
    found.save()
    return found


def find(
    folder: str | Path, *, budget_s: float = BUDGET_S, model: Any = None, tell: OnEvent = lambda event: None
) -> Retuned:
    """``retune`` without saving."""
    started_s = time.monotonic()
    if not 0 < budget_s < inf:
        raise InputError(f"the budget is {budget_s:g} s", "give more than 0, e.g. 30")
    cpu = inspect()
    found = artifact.read(Path(folder), cpu=cpu)
    check_trusted(found, found.manifest.build.engine)
    check_available(found.manifest.build.engine, f"retuning {folder}")
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        work = Path(name)
        golden_samples(found).save(work / CALIBRATION)
        bench = _Bench(found, cpu, work, max(LEAST_TIMEOUT_S, budget_s), model, tell)
        return _find(bench, started_s, budget_s)


class _Bench:
    """Where plans of one artifact are measured: in a child, a new one after each that died."""

    def __init__(self, found: Artifact, cpu: Cpu, work: Path, timeout_s: float, model: Any, tell: OnEvent) -> None:
        self.found = found
        self.cpu = cpu
        self.tell = tell
        self.samples = str(work / CALIBRATION)
        self.payload = found.folder / artifact.PAYLOAD
        self.opening_s = 0.0
        """What starting a child and opening the first plan took."""
        self._log = work / "retune.log"
        self._timeout_s = timeout_s
        self._in_process = None if model is None else opener(found, model)

    def start(self, *_: Any) -> AnyWorker:
        if self._in_process is not None:
            return InProcess(self._in_process)
        return Worker(cpu=self.cpu, log=self._log, timeout_s=self._timeout_s)

    def search(
        self, first: Plan, then: Callable[[Sequence[Measurement], Sequence[Plan]], Plan | None], until_s: float
    ) -> tuple[list[Measurement], dict[Plan, str]]:
        """Measurements of ``first`` and what ``then`` names, and why other plans could not be measured."""
        measured: list[Measurement] = []
        failed: dict[Plan, str] = {}
        wanted: Plan | None = first
        started_s = time.monotonic()
        with ExitStack() as stack:
            worker: AnyWorker | None = None
            while wanted is not None and (wanted == first or time.monotonic() < until_s):
                self.tell(StageStarted(f"measuring {wanted.label}"))
                worker = worker or stack.enter_context(self.start())
                try:
                    warning = self._open(worker, wanted)
                    self.opening_s = self.opening_s or time.monotonic() - started_s
                    measured.append(self._measure(worker, wanted, warning))
                except InputError:
                    raise
                except CorewiseError as error:
                    failed[wanted] = str(error)
                    worker = None if isinstance(error, Died) else worker
                wanted = then(measured, list(failed))
        return measured, failed

    def race(self, old: Plan, best: Plan, rounds: int, round_s: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Items per second of each in each round."""
        self.tell(StageStarted(f"racing {best.label} against {old.label}"))
        build = self.found.manifest.build
        run = race(
            [Contender(build=build, plan=plan, payload=self.payload) for plan in (old, best)],
            samples=self.samples,
            start=self.start,
            rounds=rounds,
            round_s=round_s,
        )
        first, second = run.rates
        return first.per_s, second.per_s

    def _open(self, worker: AnyWorker, plan: Plan) -> str:
        build, how = to_json(self.found.manifest.build), to_json(plan)
        opened = worker.call("open", f"opening {plan.label}", folder=str(self.payload), build=build, plan=how)
        return str(opened["warning"])

    def _measure(self, worker: AnyWorker, plan: Plan, warning: str) -> Measurement:
        doing, how = f"measuring {plan.label}", to_json(plan)
        answer = worker.call("measure", doing, samples=self.samples, plan=how, budget_s=MEASURE_S)
        return replace(from_json(Measurement, answer["measurement"]), why=warning)


def _find(bench: _Bench, started_s: float, budget_s: float) -> Retuned:
    """Search, race, and decide."""
    report, fit = bench.found.report, tuned.fit(bench.found, bench.cpu)
    objective, old = report.objective, fit.plan
    stored = fit.tuned.measurements if fit.tuned else report.winner.measurements
    first = guesses(bench.cpu, objective, stored)
    measured, failed = bench.search(
        old, lambda so_far, lost: next_plan(first, so_far, lost, objective), started_s + SEARCH_SHARE * budget_s
    )
    if not measured:
        raise EngineError(f"{bench.found.folder} runs under no plan here: {next(iter(failed.values()))}")
    by_plan = {one.plan: one for one in measured}
    found = best(measured, objective) or measured[0]
    notes = [f"{plan.label} does not run here: {why}" for plan, why in failed.items()]
    if any(one.throttled for one in measured):
        notes.append("the CPU quota throttled some measurements: their figures are too low")
    ratio, rounds, wins = None, 0, True
    old_per_s = by_plan[old].throughput_per_s if old in by_plan else None
    best_per_s = found.throughput_per_s
    if found.plan != old and old in by_plan:
        left_s = budget_s - (time.monotonic() - started_s) - 2 * (bench.opening_s + WARM_S)
        calls_s = (by_plan[old].p50_ms + found.p50_ms) / 1e3
        try:
            rates = bench.race(old, found.plan, *affordable(left_s, calls_s))
        except ContenderFailed as fell:  # two at a time may be too much for the memory here
            notes.append(f"{fell}; so each was only measured alone")
        else:
            ratio, rounds = ratio_interval(rates[1], rates[0]), len(rates[0])
            old_per_s, best_per_s = map(median, rates)
        wins = ratio is None or ratio.low > 1
        if not wins and allowed(found, objective) and not allowed(by_plan[old], objective):
            wins = True
            notes.append(f"{old.label} breaks the {_limits(objective)} here, and so does not stay")
    plan, kept = found.plan if wins else old, []
    if fit.tuned or Machine.of(report.cpu) == Machine.of(bench.cpu):
        # Admission needs the small batches of the plan's shape, which the search visits for the best one only.
        shape = replace(plan, batch=1)
        kept = [one for one in stored if replace(one.plan, batch=1) == shape and one.plan not in by_plan]
    return Retuned(
        folder=bench.found.folder,
        entry=Tuned(
            machine=Machine.of(bench.cpu),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            goal=objective.goal,
            plan=plan,
            measurements=(*measured, *kept),
        ),
        old=old,
        best=found.plan,
        old_per_s=old_per_s,
        best_per_s=best_per_s,
        ratio=ratio,
        rounds=rounds,
        tried=len(measured),
        notes=tuple(notes),
        wall_s=time.monotonic() - started_s,
    )


def words(found: Retuned) -> list[str]:
    """What was found, line by line: both plans and speeds, what the race says, and doubts."""

    def speed(per_s: float | None) -> str:
        if per_s is None:
            return "does not run here"
        return f"{1e3 / per_s:.2f} ms" if found.entry.goal == "latency" else f"{per_s:.1f}/s"

    lines = [f"old plan  {found.old.label:32s} {speed(found.old_per_s)}"]
    if found.best != found.old:
        lines.append(f"new plan  {found.best.label:32s} {speed(found.best_per_s)}")
    if found.ratio is not None:
        ratio = f"{found.ratio.value:.2f}x [{found.ratio.low:.2f}, {found.ratio.high:.2f}]"
        if found.kept:
            verdict = "the old plan is as good and stays"
        else:
            verdict = "the new plan is faster" if found.ratio.low > 1 else "the new plan keeps the limits"
        lines.append(f"{ratio} over {found.rounds} alternating rounds: {verdict}")
    elif found.kept:
        lines.append("no plan that was tried is faster: the old one stays")
    lines.append(f"{found.tried} plans measured in {found.wall_s:.0f} s on {found.entry.machine.label}")
    return [*lines, *(f"note: {note}" for note in found.notes)]


def guesses(cpu: Cpu, objective: Objective, stored: Sequence[Measurement]) -> tuple[Plan, ...]:
    """One plan for each shape worth trying here, the most promising first. Pure.

    For latency single items on one instance. Else the batch that was best for the nearest number of threads in the
    stored table, scaled so that each thread has as much to do; the order is by that table's items per second and
    thread.
    """
    shapes = thread_plans(cpu)
    if objective.goal == "latency":
        return tuple(
            Plan(threads_per_instance=n) for n in dict.fromkeys(n for n, instances in shapes if instances == 1)
        )
    tops = [max(table, key=lambda one: one.throughput_per_s) for table in tables(stored).values()]
    if not tops:
        return tuple(Plan(threads_per_instance=n, instances=m, batch=START_BATCH) for n, m in shapes)
    ranked = {}
    for threads, instances in shapes:
        like = min(tops, key=lambda one: (_distance(one, threads), -one.throughput_per_s))
        wanted = like.plan.batch * threads / like.plan.threads_per_instance
        batch = min(BATCHES, key=lambda size: abs(log2(size / wanted)))
        per_thread = like.throughput_per_s / (like.plan.threads_per_instance * like.plan.instances)
        expected = per_thread * min(threads * instances, cpu.usable_cores)
        plan = Plan(threads_per_instance=threads, instances=instances, batch=batch)
        ranked[plan] = (-expected, _distance(like, threads))
    return tuple(sorted(ranked, key=lambda plan: ranked[plan]))


def next_plan(
    first: Sequence[Plan], measured: Sequence[Measurement], failed: Sequence[Plan], objective: Objective
) -> Plan | None:
    """What to measure next; ``None`` when nothing is worth it. Pure.

    All the ``first`` ones, then larger and smaller batches beside the best so far until both are slower, then what
    is missing below it in its latency table, which admission control needs.
    """
    done = {*(one.plan for one in measured), *failed}
    for plan in first:
        if plan not in done and not _too_slow(plan, measured):
            return plan
    top = best(measured, objective)
    if top is None or objective.goal == "latency":
        return None
    larger = [size for size in BATCHES if size > top.plan.batch][:1]
    smaller = [size for size in BATCHES if size < top.plan.batch]
    for size in (*larger, *smaller[-1:], *smaller):
        plan = replace(top.plan, batch=size)
        if plan not in done and not _too_slow(plan, measured):
            return plan
    return None


def best(measured: Sequence[Measurement], objective: Objective) -> Measurement | None:
    """The one that serves the objective best; ``None`` where all need more memory than allowed. Pure.

    For an SLO the most items per second of those that ``allowed`` lets through, else the shortest p99.
    """
    limit = objective.memory_limit_bytes or inf
    choices = [one for one in measured if one.memory_bytes <= limit]
    if objective.goal == "latency":
        return min(choices, key=lambda one: (one.plan.batch, one.p50_ms), default=None)
    within = [one for one in choices if allowed(one, objective)]
    if not within:
        return min(choices, key=lambda one: one.p99_ms, default=None)
    return max(within, key=lambda one: one.throughput_per_s)


def allowed(one: Measurement, objective: Objective) -> bool:
    """Whether it keeps the limits: of memory, and for an SLO its slowest calls take half the time. Pure.

    A request may come just after a call has begun, and has to wait for that and then for its own.
    """
    if one.memory_bytes > (objective.memory_limit_bytes or inf):
        return False
    return objective.slo_ms is None or 2 * one.p99_ms <= objective.slo_ms


def _limits(objective: Objective) -> str:
    slo = "" if objective.slo_ms is None else f"SLO of {objective.slo_ms:g} ms"
    memory = "" if objective.memory_limit_bytes is None else "memory limit"
    return " or the ".join(filter(None, (slo, memory)))


def affordable(left_s: float, calls_s: float) -> tuple[int, float]:
    """Rounds of a race of two and the seconds of a round for each, in the time that is left. Pure.

    ``calls_s`` is what one call of each takes together; each makes an untimed one and at least one more a round.
    """
    least_s = 2 * calls_s + 0.1
    rounds = min(ROUNDS, max(FEWEST_ROUNDS, int(left_s / least_s)))
    return rounds, min(ROUND_S, max(0.05, (left_s / rounds - 2 * calls_s) / 2))


def _distance(one: Measurement, threads: int) -> float:
    """Between its number of threads an instance and another, in doublings."""
    return abs(log2(one.plan.threads_per_instance / threads))


def _too_slow(plan: Plan, measured: Sequence[Measurement]) -> bool:
    """Whether a smaller batch of the shape takes long already."""
    return any(
        replace(one.plan, batch=plan.batch) == plan and one.plan.batch < plan.batch and one.p50_ms > SLOW_CALL_MS
        for one in measured
    )
