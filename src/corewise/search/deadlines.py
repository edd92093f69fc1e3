"""What a budget leaves for the trials of a search: until when they run, which are not tried, and where it went."""

from collections.abc import Sequence

from corewise.common.errors import InputError
from corewise.records.build import Build
from corewise.records.reason import NOT_TRIED, Reason, ReasonKind
from corewise.records.trial import State, Trial
from corewise.search.budget import Budget
from corewise.search.candidates import is_baseline
from corewise.search.forecast import Forecast, is_better_left
from corewise.search.trial import SearchContext

SURE_BY = 1.2
"""Share of the budget until which time for a build in floating point is kept, while only the baseline has passed."""
OVERTIME, OVERTIME_S = 1.5, 25.0
"""While nothing but the baseline has passed, trials may take this share of the budget, or this many seconds more than
it if that is longer: a late result is better than none."""
ON_TIME = 1.05
"""Share of the budget that a search may take without saying why."""
NAMED = 3
"""Builds that are named where more were not tried."""
SHORTEST_TOLD_S = 0.05
"""Steps that took less are not named where a budget was spent too early."""
OUT_OF_TIME = (*NOT_TRIED, ReasonKind.BUDGET_SPENT_DURING)
"""Why a trial says nothing about its build: another run with more time tries it again."""


def seconds_left(trials: Sequence[Trial], context: SearchContext) -> tuple[float, float | None]:
    """Seconds for trials, and those until a build in floating point has to be tried.

    While no candidate has passed, trials have the time for plans as well. Once one has, the second is ``None``.
    """
    budget, split = context.budget, context.split
    if _any_passed(trials):
        return budget.left_s(split.last_trial), None
    return budget.left_s(split.first_trials), budget.left_s(SURE_BY)


def trial_share(trials: Sequence[Trial], context: SearchContext) -> float:
    """The share of the budget at which a candidate's trial has to be finished."""
    return context.split.last_trial if _any_passed(trials) else _overtime_share(context.budget)


def why_not_tried(
    build: Build, left: Sequence[Build], trials: Sequence[Trial], context: SearchContext, forecast: Forecast
) -> Reason | None:
    """Why a build of those ``left`` is not tried in what is left of the budget."""
    budget, split = context.budget, context.split
    passed = _any_passed(trials)
    if budget.ended(split.trials if passed else _overtime_share(budget)):
        return budget.reason(ReasonKind.BUDGET_SPENT_BEFORE)
    if budget.total_s is None or not passed:
        return None
    left_s, _ = seconds_left(trials, context)
    if left_s < (needed_s := forecast.seconds(build)):
        return budget.reason(ReasonKind.BUDGET_TOO_SHORT, left_s=left_s, needed_s=needed_s)
    if is_better_left(build, left, forecast, left_s):
        expected = forecast.speed(build)
        return budget.reason(ReasonKind.BUDGET_BETTER_SPENT, expected=expected, best=forecast.best)
    return None


def left_untried(trials: Sequence[Trial], budget: Budget) -> Reason | None:
    """What the budget left untried, if anything."""
    untried = [trial.build.label for trial in trials if trial.untried]
    return budget.reason(ReasonKind.LEFT_UNTRIED, builds=untried[:NAMED], count=len(untried)) if untried else None


def check_candidates(trials: Sequence[Trial], context: SearchContext, baseline_s: float) -> None:
    """Raise ``InputError`` with where the time went if the budget ended before any candidate was tried.

    The first of ``trials`` is the baseline's, which took ``baseline_s``.
    """
    candidates = trials[1:]
    if not candidates or any(trial.reason.kind not in OUT_OF_TIME or trial.fidelity for trial in candidates):
        return
    budget, before = context.budget, context.preparation
    spent_s = {
        "loading and exporting the model": before.export_s,
        "reading the samples": before.samples_s,
        "the baseline": baseline_s,
    }
    spent_s["candidates and the rest"] = budget.elapsed_s - sum(spent_s.values())
    most, *others = sorted(spent_s, key=lambda name: -spent_s[name])
    rest = "".join(f", {name} {spent_s[name]:.1f} s" for name in others if spent_s[name] >= SHORTEST_TOLD_S)
    raise InputError(
        f"the budget of {budget.total_s:g} s was spent before any build was finished: {most} took "
        f"{spent_s[most]:.1f} s{rest}",
        "give more time or fewer samples" if most == "reading the samples" else "give more time",
    )


def overtime(budget: Budget, *, trials_s: float, race_s: float) -> Reason | None:
    """Why a search took longer than its budget, by when its trials and its race ended; ``None`` if it hardly did."""
    if budget.left_s(ON_TIME) >= 0:
        return None
    return budget.reason(ReasonKind.OVER_BUDGET, trials_s=trials_s, race_s=race_s)


def _any_passed(trials: Sequence[Trial]) -> bool:
    """Whether a candidate has passed."""
    return any(trial.state == State.OK for trial in trials if not is_baseline(trial.build))


def _overtime_share(budget: Budget) -> float:
    """The share of the budget at which trials end while nothing but the baseline has passed."""
    return OVERTIME if budget.total_s is None else max(OVERTIME, 1 + OVERTIME_S / budget.total_s)
