"""The race at the end: the fastest accurate builds and the baseline, in alternating rounds."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from corewise.common.stats import MIN_ROUNDS
from corewise.records.build import Plan
from corewise.records.events import RaceRound, Stage, StageStarted
from corewise.records.goal import Throughput
from corewise.records.trial import State, Trial
from corewise.runtime.race import ROUND_S, ROUNDS, WARM_S, Contender, ContenderFailed, Race, run_race
from corewise.search.candidates import is_baseline
from corewise.search.plans import NEAR
from corewise.search.trial import SearchContext

FINALISTS = 3
BEST_PLANS = 3
"""Plans of the best finalist that race, if they are near each other."""
OPEN_S = 3.0
"""Seconds to start a contender's process, import its engine and open its payload."""


def race_finalists(trials: Sequence[Trial], context: SearchContext) -> tuple[tuple[Trial, ...], Race]:
    """The trials and the race of the best of them against the baseline, which is the first trial.

    A finalist that fails in the race has failed, and the others race again. If the baseline fails, fewer finalists
    race: it ran before, and all of them together need more memory.
    """
    trials = list(trials)
    most = FINALISTS
    while True:
        finalists = _finalists(trials, context)[:most]
        contenders = _contenders(trials[0], finalists, context, one_plan_each=most == 1)
        contenders = _affordable(contenders, context, trials)
        context.on_event(StageStarted(Stage.RACING, count=len(contenders) - 1))
        try:
            race = run_race(
                contenders,
                samples=context.workspace.holdout,
                # The race has an end of its own; a slow call at the end of the budget must not lose what is done.
                start=lambda build: context.client(build, share=inf),
                rounds=_rounds(context, contenders, trials),
                on_round=lambda number, rounds, rates: context.on_event(RaceRound(number, rounds, rates)),
            )
        except ContenderFailed as failure:
            if is_baseline(failure.build):
                most = min(most, len(finalists)) - 1
                if most < 1:
                    raise
                continue
            trials = [
                replace(trial, state=State.FAILED, reason=failure.reason) if trial.build == failure.build else trial
                for trial in trials
            ]
        else:
            return tuple(trials), race


def has_time_to_race(trials: Sequence[Trial], context: SearchContext) -> bool:
    """Whether the shortest race, of the baseline and the best build, fits in what is left of the budget."""
    contenders = _contenders(trials[0], _finalists(trials, context)[:1], context, one_plan_each=True)
    needed_s = _opening_s(contenders) + MIN_ROUNDS * _round_s(contenders, trials, context.kinds)
    return needed_s <= context.budget.left_s(context.split.race)


def _finalists(trials: Sequence[Trial], context: SearchContext) -> list[Trial]:
    """The builds other than the baseline that may win, the best first."""
    goal = context.requirements.goal
    able = [trial for trial in trials[1:] if trial.state == State.OK and goal.best(trial) is not None]
    return sorted(able, key=goal.cost)


def _contenders(
    baseline: Trial, finalists: Sequence[Trial], context: SearchContext, *, one_plan_each: bool
) -> list[Contender]:
    return [
        Contender(build=trial.build, plan=plan, payload=context.workspace.payload(trial.build))
        for trial in (baseline, *finalists)
        for plan in _best_plans(trial, context, BEST_PLANS if trial in finalists[:1] and not one_plan_each else 1)
    ]


def _best_plans(trial: Trial, context: SearchContext, count: int) -> list[Plan]:
    """The best plan, and others that are near it: where noise decides between them, the race decides better."""
    goal = context.requirements.goal
    best = goal.best(trial)
    if best is None:  # the baseline over the memory limit races all the same
        best = max(trial.measurements, key=lambda measurement: measurement.throughput_per_s)
    near = [
        measurement
        for measurement in trial.allowed
        if measurement.plan != best.plan and measurement.throughput_per_s > NEAR * best.throughput_per_s
    ]
    near.sort(key=lambda measurement: -measurement.throughput_per_s)
    others = near[: count - 1] if isinstance(goal, Throughput) else []
    return [best.plan, *(measurement.plan for measurement in others)]


def _affordable(contenders: Sequence[Contender], context: SearchContext, trials: Sequence[Trial]) -> list[Contender]:
    """The contenders that there is time to race: the baseline and the best plan, and of the others the fastest."""
    per_s = {
        (trial.build, measurement.plan): measurement.throughput_per_s
        for trial in trials
        for measurement in trial.measurements
    }
    left_s = context.budget.left_s(context.split.race)
    chosen, others = list(contenders[:2]), contenders[2:]
    for contender in sorted(others, key=lambda contender: -per_s[contender.build, contender.plan]):
        more = [*chosen, contender]
        if _opening_s(more) + MIN_ROUNDS * _round_s(more, trials, context.kinds) > left_s:
            break
        chosen = more
    return [contender for contender in contenders if contender in chosen]


def _opening_s(contenders: Sequence[Contender]) -> float:
    return len(contenders) * (OPEN_S + WARM_S)


def _round_s(contenders: Sequence[Contender], trials: Sequence[Trial], kinds: int) -> float:
    """Seconds of a round: for each contender an untimed call, and timed calls for ``ROUND_S``, or one pass."""
    calls_s = {
        (trial.build, measurement.plan): measurement.p50_ms / 1e3
        for trial in trials
        for measurement in trial.measurements
    }
    each_s = [calls_s[contender.build, contender.plan] for contender in contenders]
    return sum(call_s + max(ROUND_S, kinds * call_s) for call_s in each_s)


def _rounds(context: SearchContext, contenders: Sequence[Contender], trials: Sequence[Trial]) -> int:
    """As many rounds as the budget has time for, but enough for an interval."""
    left_s = context.budget.left_s(context.split.race) - _opening_s(contenders)
    return max(MIN_ROUNDS, int(min(ROUNDS, left_s / _round_s(contenders, trials, context.kinds))))
