"""The stages between candidates and a choice: trials, layers given back to floating point, plans, the race."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import inf, sqrt

from corewise.accuracy.gate import AccuracyGate
from corewise.common.errors import CorewiseError, InputError, SourceError
from corewise.common.stats import MIN_ROUNDS
from corewise.engines.qdq import uses_corewise_quantizer
from corewise.records.build import Build, Plan
from corewise.records.events import Explored, FinalsRound, StageStarted, TrialEnded, TrialStarted, TrialStep
from corewise.records.goal import Objective
from corewise.records.measurement import Measurement
from corewise.records.report import Choice
from corewise.records.trial import Trial
from corewise.runtime.client import AnyWorker, Died, read_outputs
from corewise.runtime.race import ROUND_S, ROUNDS, Contender, ContenderFailed, Race, race
from corewise.search.candidates import BASELINE, following, returning
from corewise.search.journal import Journal
from corewise.search.plans import BATCHES, NEAR, NOT_SEARCHED, PlanRequest, drive, not_run, strategy
from corewise.search.trial import SearchContext, measured, run_trial

FINALISTS = 3
BEST_PLANS = 3
"""Of the best finalist, that are raced where they are near each other."""
EXPLORED = 3
"""The plans of so many builds are searched, beside the baseline's."""
PROMISING = 0.7
"""Builds slower than this share of the fastest under the first plan are not searched: other threads and batches change
the order of builds, and seldom by more (MobileNetV2 as two instances of one thread ran 25 to 35 % faster)."""
CALIBRATING = 2.5
"""So many times as long as any other build our quantizer's first one takes (ResNet-50, two cores: 140 s against 50);
one that is ended for want of time wins nothing."""


def run_trials(
    builds: Sequence[Build], context: SearchContext, journal: Journal, gate: AccuracyGate
) -> tuple[Trial, ...]:
    """One trial a build, the baseline first; those in the journal are not run again."""
    trials: list[Trial] = []
    left = list(builds)
    while left:
        build = following(left, trials)
        left.remove(build)
        trial = _trial(build, len(trials) + 1, len(builds), trials, context, journal)
        if build == BASELINE:
            if trial.state != "ok":
                if context.budget.ended():
                    raise InputError(f"{context.budget.spent} before the baseline was measured", "give more time")
                raise SourceError(f"the model does not run as it is: {trial.reason}", "make it run in eager PyTorch")
            gate.reference = gate.reference or read_outputs(context.outputs(build))
        trials.append(trial)
    spent = context.budget.ended(context.shares.trials)
    if spent and trials[1:] and all(trial.reason.startswith(context.budget.spent) for trial in trials[1:]):
        raise InputError(
            f"{context.budget.spent} before one candidate was tried: the baseline alone took "
            f"{context.budget.elapsed_s:.0f} s",
            "give more time; what is finished is kept",
        )
    return tuple(trials)


def revert_layers(trials: Sequence[Trial], context: SearchContext, journal: Journal) -> tuple[Trial, ...]:
    """The trials, and more where the gate let no int8 build of an engine through.

    Layers of our int8 build go back to floating point, those first that win most accuracy for the time they cost
    (``quantize.sensitivity``): one, two, four, ... of them, until the gate passes or half of them are back.
    """
    path = list(trials)
    passed = {one.build.engine for one in trials if one.build.precision == "int8" and one.state in ("ok", "pruned")}
    for rejected in trials:
        build = rejected.build
        ours = uses_corewise_quantizer(build) and rejected.inaccurate
        if not ours or build.engine in passed or rejected.receipt is None:
            continue
        count = 1
        while count <= rejected.receipt.int8 // 2:
            build = returning(rejected.build, count)
            path.append(_trial(build, len(path) + 1, len(path) + 1, path, context, journal))
            if path[-1].state != "rejected":
                passed.add(build.engine)
                break
            count *= 2
    return tuple(path)


def _trial(
    build: Build, number: int, total: int, before: Sequence[Trial], context: SearchContext, journal: Journal
) -> Trial:
    """The build's trial: from the journal, or run now."""
    kept = journal.get(build)
    resumed = kept is not None and _still_good(kept, context)
    if kept is None or not resumed:
        context.tell(TrialStarted(build, number, total))
        no_time = _no_time(build, before, context)
        if no_time:
            kept = Trial(build=build, state="pruned", reason=no_time)
        else:
            fastest = max((trial.verified_per_s for trial in before if trial.state == "ok"), default=0.0)
            kept = run_trial(
                build,
                context,
                best_verified_per_s=fastest,
                is_baseline=build == BASELINE,
                share=context.shares.last_trial if _any_done(before) else 1.0,
            )
        # What ended for want of time another run, with more of it, tries again.
        if not no_time and (kept.state != "pruned" or not context.budget.ended(context.shares.trials)):
            journal.add(kept)
    context.tell(TrialEnded(kept, resumed=resumed))
    if kept.state != "ok":
        shutil.rmtree(context.payload(build), ignore_errors=True)
    return kept


def _no_time(build: Build, before: Sequence[Trial], context: SearchContext) -> str:
    """Why a build cannot be tried in what is left of the budget; empty where it can."""
    if build == BASELINE:
        return ""
    if context.budget.ended(context.shares.trials):
        return f"{context.budget.spent} before it was tried"
    first_of_ours = uses_corewise_quantizer(build) and not any(
        uses_corewise_quantizer(trial.build) and trial.build_s > 0 for trial in before
    )
    if first_of_ours and _any_done(before):
        needed_s = CALIBRATING * max(trial.build_s for trial in before)
        left_s = context.budget.left_s(context.shares.last_trial)
        if left_s < needed_s:
            return f"{context.budget.spent} but for {left_s:.0f} s, and it needs about {needed_s:.0f} s"
    return ""


def _any_done(trials: Sequence[Trial]) -> bool:
    return any(trial.state == "ok" for trial in trials if trial.build != BASELINE)


def explore(
    trials: Sequence[Trial], context: SearchContext, journal: Journal, objective: Objective
) -> tuple[Trial, ...]:
    """The trials, with the plans of the baseline and of the most promising builds searched and measured.

    The fastest first, for time may end; one that fits into no memory limit makes room for the next.
    """
    found = {trial.build: trial for trial in trials}
    measured = [trial for trial in trials if trial.measurements]
    ranked = sorted(measured, key=lambda trial: (trial.build != BASELINE, -_first_per_s(trial)))
    fit = 0
    for trial in ranked:
        able = (one for one in ranked if one.build != BASELINE and found[one.build].state == "ok")
        fastest = next(able, None)
        why = "" if trial.build == BASELINE or fastest is None else _not_promising(trial, fastest, fit)
        found[trial.build] = _explored(trial, why, context, journal, objective)
        fit += trial.build != BASELINE and found[trial.build].state == "ok"
    return tuple(found.values())


def _not_promising(trial: Trial, fastest: Trial, before: int) -> str:
    """Why its plans are not worth a search, after those of so many others; empty where they are."""
    low, _ = _interval(fastest.measurements[0])
    _, high = _interval(trial.measurements[0])
    first = trial.measurements[0].plan.label
    speed = f"{_first_per_s(trial):.4g}/s under {first} against {_first_per_s(fastest):.4g}/s"
    if high < PROMISING * low:
        return f"{NOT_SEARCHED}: {speed}"
    return f"{NOT_SEARCHED}: {speed}, and {before} others were faster" if before >= EXPLORED else ""


def _explored(trial: Trial, why_not: str, context: SearchContext, journal: Journal, objective: Objective) -> Trial:
    if trial.explored:
        return trial
    limit = objective.memory_limit_bytes
    if why_not:
        left_out = replace(trial, explored=why_not)
        if limit:  # and so nobody knows whether it fits
            unknown = f"its memory is not known: {why_not}"
            left_out = replace(
                left_out, measurements=tuple(replace(one, rejected=unknown) for one in trial.measurements)
            )
        journal.add(left_out)
        return left_out
    context.tell(StageStarted(f"searching the plans of {trial.build.label}"))
    # The child of the trial holds what building left there, so its memory says nothing.
    known = () if limit else trial.measurements
    found, ended = {one.plan: one for one in known}, ""
    steps = strategy(objective.goal, context.shapes(trial.build), slo_ms=objective.slo_ms)
    failed: dict[Plan, str] = {}
    with ExitStack() as stack:
        worker: AnyWorker | None = None

        def measure(wanted: PlanRequest) -> Measurement:
            nonlocal worker
            context.tell(TrialStep(trial.build, f"measuring, {wanted.plan.label}"))
            try:
                worker = worker or stack.enter_context(context.worker(trial.build))
                return _within(measured(trial.build, context, worker, wanted.plan, wanted.why), limit)
            except InputError:
                raise
            except CorewiseError as error:
                failed[wanted.plan] = str(error)
                worker = None if isinstance(error, Died) else worker
                return not_run(wanted.plan, str(error))

        for one in drive(steps, known, measure, go_on=lambda: context.budget.ended(context.shares.plans)):
            if isinstance(one, str):
                ended = one
            elif one.plan not in failed:
                found[one.plan] = one
    if failed:
        plan, why = next(iter(failed.items()))
        ended += f"; {len(failed)} plans did not run, {plan.label}: {why}"
    explored = replace(trial, measurements=tuple(found.values()) or trial.measurements, explored=ended)
    if (not found or explored.best(objective.goal) is None) and explored.build != BASELINE:
        reasons = [one.rejected for one in found.values()] or [ended]
        explored = replace(explored, state="rejected", reason=reasons[0])
    if not context.budget.ended(context.shares.plans):
        journal.add(explored)
    context.tell(Explored(explored))
    return explored


def _within(measurement: Measurement, limit_bytes: int | None) -> Measurement:
    """The measurement, rejected where it needs more memory than there may be."""
    if limit_bytes is None or measurement.memory_bytes <= limit_bytes:
        return measurement
    needs, limit = (f"{size / 1e6:.0f} MB" for size in (measurement.memory_bytes, limit_bytes))
    return replace(measurement, rejected=f"{measurement.plan.label} needs {needs} of memory, more than {limit}")


def _interval(measurement: Measurement) -> tuple[float, float]:
    """An interval of the rate: the notch of a box plot (McGill, Tukey and Larsen 1978), about 95 % for the median."""
    half = 1.57 * measurement.spread / sqrt(max(1, len(measurement.latencies_ms)))
    return measurement.throughput_per_s * (1 - half), measurement.throughput_per_s * (1 + half)


def _first_per_s(trial: Trial) -> float:
    return trial.measurements[0].throughput_per_s


def _still_good(kept: Trial, context: SearchContext) -> bool:
    """Whether a finished trial counts again: a failure may have had a cause that is gone, and files may be."""
    if kept.state == "ok":
        return context.payload(kept.build).is_dir() and context.outputs(kept.build).is_file()
    return kept.state != "failed"


def finals(trials: Sequence[Trial], context: SearchContext, objective: Objective) -> tuple[tuple[Trial, ...], Race]:
    """The fastest accurate trials and the baseline, raced; one that falls there has failed, and the rest race again.

    Where the baseline falls, fewer race: it ran before, and all of them at once need more memory.
    """
    trials = list(trials)
    most = FINALISTS
    while True:
        able = [t for t in trials if t.state == "ok" and t.best(objective.goal, objective.slo_ms) is not None]
        ranked = sorted(
            (trial for trial in able if trial.build != trials[0].build), key=lambda trial: _cost(trial, objective)
        )
        finalists = ranked[:most]
        contenders = [
            Contender(build=trial.build, plan=plan, payload=context.payload(trial.build))
            for trial in (trials[0], *finalists)
            for plan in _best_plans(trial, objective, BEST_PLANS if trial in finalists[:1] and most > 1 else 1)
        ]
        context.tell(StageStarted(f"racing {len(finalists)} finalists against the baseline"))
        try:
            run = race(
                contenders,
                samples=context.holdout,
                # The race has its own end; a slow call at the budget's end must not lose what is done.
                start=lambda build: context.worker(build, share=inf),
                rounds=_rounds(context, contenders, trials),
                on_round=lambda number, rounds, rates: context.tell(FinalsRound(number, rounds, rates)),
            )
        except ContenderFailed as fell:
            if fell.build == BASELINE:
                most = min(most, len(finalists)) - 1
                if most < 1:
                    raise
                continue
            trials = [
                replace(trial, state="failed", reason=str(fell)) if trial.build == fell.build else trial
                for trial in trials
            ]
        else:
            return tuple(trials), run


def with_latency_table(trials: Sequence[Trial], choice: Choice, context: SearchContext) -> tuple[Trial, ...]:
    """The trials, the winner's with the smaller batches of its threads and instances too, which admission needs.

    Only single items when the budget is spent; what cannot be measured is left out.
    """
    winner = next(trial for trial in trials if trial.build == choice.winner)
    known = {one.plan for one in winner.measurements}
    smaller = (replace(choice.plan, batch=batch) for batch in BATCHES if batch < choice.plan.batch)
    missing = [plan for plan in smaller if plan not in known]
    if not missing:
        return tuple(trials)
    found: list[Measurement] = []
    try:
        with context.worker(winner.build, share=inf) as worker:
            for plan in missing[:1] if context.budget.ended() else missing:
                found.append(measured(winner.build, context, worker, plan, "the latency table"))
    except InputError:
        raise
    except CorewiseError:
        pass
    complete = replace(winner, measurements=(*winner.measurements, *found))
    return tuple(complete if trial is winner else trial for trial in trials)


def _rounds(context: SearchContext, contenders: Sequence[Contender], trials: Sequence[Trial]) -> int:
    """As many as the budget has time for, but enough for an interval."""
    calls_s = {(trial.build, one.plan): one.p50_ms / 1e3 for trial in trials for one in trial.measurements}
    # An untimed call, and timed ones for a round, or one.
    round_s = sum(calls_s[one.build, one.plan] + max(ROUND_S, calls_s[one.build, one.plan]) for one in contenders)
    return max(MIN_ROUNDS, int(min(ROUNDS, context.budget.left_s() / round_s)))


def _cost(trial: Trial, objective: Objective) -> tuple[float, float]:
    """Orders trials, the best first: for an SLO by the rate that was held, then by speed."""
    best = trial.best(objective.goal, objective.slo_ms)
    assert best is not None
    held = trial.promise.rate_per_s if objective.goal == "slo" and trial.promise else 0.0
    return -(held or 0.0), best.p50_ms if objective.goal == "latency" else -best.throughput_per_s


def _best_plans(trial: Trial, objective: Objective, count: int) -> list[Plan]:
    """The best plan, and others that are near it: where noise decides between them, the race does so better."""
    best = trial.best(objective.goal, objective.slo_ms)
    if best is None:  # the baseline, where it is over the memory limit: it is raced all the same
        best = max(trial.measurements, key=lambda m: m.throughput_per_s)
    near = [
        one
        for one in trial.measurements
        if not one.rejected and one.plan != best.plan and one.throughput_per_s > NEAR * best.throughput_per_s
    ]
    if objective.goal != "throughput":
        near = []
    near.sort(key=lambda one: -one.throughput_per_s)
    return [best.plan, *(one.plan for one in near[: count - 1])]
