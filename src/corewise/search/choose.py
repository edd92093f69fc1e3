"""Which build wins, and why each other one lost. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from corewise.accuracy.gate import judge
from corewise.common import stats
from corewise.records.build import Build
from corewise.records.goal import Goal, Objective
from corewise.records.measurement import Measurement, Rates
from corewise.records.report import Choice, LosingTrial
from corewise.records.trial import Trial
from corewise.search.plans import NOT_SEARCHED

TIE = 0.98
"""A finalist this near to the fastest, by an interval that holds 1, is as fast."""

_PRECISION_RANK = {"fp32": 3, "bf16": 2, "int8": 1, "int8-dynamic": 0}


@dataclass(frozen=True)
class _Finalist:
    """A build in the alternating run, with its trial's accuracy."""

    rates: Rates
    trial: Trial

    @property
    def build(self) -> Build:
        return self.rates.build

    @property
    def median(self) -> float:
        return stats.quantile(self.rates.per_s, 0.5)

    def score(self, goal: Goal) -> tuple[float, float]:
        """Orders by what the goal asks for: the rate, or the promised rate and then how near to the SLO it comes."""
        if goal != "slo":
            return self.median, 0.0
        promise = self.trial.promise
        p99_ms = min((one.p99_ms for one in self.trial.measurements), default=inf)
        return (promise.rate_per_s or 0.0, 0.0) if promise else (0.0, -p99_ms)

    @property
    def closeness(self) -> tuple[int, float]:
        """Orders by accuracy: precision first, signal-to-noise ratio next."""
        sqnr_db = self.trial.fidelity.sqnr_db if self.trial.fidelity else 200.0
        return _PRECISION_RANK[self.build.precision], sqnr_db

    def over(self, other: "_Finalist") -> stats.Ratio:
        return stats.ratio_interval(self.rates.per_s, other.rates.per_s)


def choose(trials: Sequence[Trial], finals: Sequence[Rates], objective: Objective, baseline: Build) -> Choice:
    """The finalist that serves the goal best, unless none serves it better than the baseline: then the baseline.

    Best is the highest median rate in ``finals``, which are the rates of one alternating run (for the latency goal
    1/latency), the baseline's among them; for an SLO it is the highest rate that was held under it, and where none
    was, the shortest p99 of a call, whatever the speed-up. Only builds whose trial is ``ok`` can win. Else faster than
    the baseline is a higher median and a ratio above 1 in the median round, so that no winner's speed-up is below 1,
    but where only the baseline exceeds the memory limit.
    Finalists as fast as the fastest (``TIE``) give way to the most accurate of them. Every other trial is a loser with
    a reason.

    Raises ``ValueError`` where the baseline has no trial or no rates.
    """
    by_build = {trial.build: trial for trial in trials}
    finalists = [_Finalist(rates, by_build[rates.build]) for rates in finals if rates.build in by_build]
    finalists = [f for f in finalists if f.trial.state == "ok" or f.build == baseline]
    base = max((f for f in finalists if f.build == baseline), key=lambda f: f.median, default=None)
    if base is None:
        raise ValueError(f"the baseline {baseline.label} is not among the finals")
    goal = objective.goal
    base_score = base.score(goal)
    faster = [f for f in finalists if f.score(goal) > base_score and (goal == "slo" or f.over(base).value > 1)]
    able = [*faster, base]
    if _exceeds(base.trial, objective) and (others := [f for f in finalists if f.build != baseline]):
        faster = able = others
    fastest = max(faster, key=lambda f: (f.score(goal), f.closeness, f.build.label), default=base)
    tied = [f for f in able if _ties(f, fastest, goal)]
    winner = max(tied, key=lambda f: (f.closeness, f.score(goal), f.build.label))
    speedup = winner.over(base)
    return Choice(
        winner=winner.build,
        plan=winner.rates.plan,
        throughput_per_s=winner.median,
        baseline_throughput_per_s=base.median,
        speedup=speedup.value,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        reason=_reason(trials, finalists, winner, fastest, base, objective),
        losers=tuple(
            LosingTrial(build=trial.build, state=trial.state, reason=_why_not(trial, finalists, winner, objective))
            for trial in trials
            if trial.build != winner.build
        ),
        warnings=tuple(_warnings(winner, base, objective)),
        promise=winner.trial.promise,
    )


def _exceeds(trial: Trial, objective: Objective) -> bool:
    """Whether all plans of a trial need more memory than there may be."""
    return bool(trial.measurements) and trial.best(objective.goal, objective.slo_ms) is None


def _ties(finalist: _Finalist, fastest: _Finalist, goal: Goal) -> bool:
    """Whether it is as fast as the fastest, as far as the run can tell."""
    if goal == "slo":
        (ours, near), (theirs, nearest) = finalist.score(goal), fastest.score(goal)
        return ours >= TIE * theirs and near >= nearest
    ratio = finalist.over(fastest)
    return ratio.value >= TIE and ratio.high >= 1


def _reason(
    trials: Sequence[Trial],
    finalists: Sequence[_Finalist],
    winner: _Finalist,
    fastest: _Finalist,
    base: _Finalist,
    objective: Objective,
) -> str:
    """Why the winner won, in words with figures."""
    rate = _rate(winner.median, objective.goal)
    if objective.goal == "slo":
        why = f"{_held(winner, objective)}, where the baseline {_held(base, objective)}" if winner is not base else ""
        why = why or f"{_held(winner, objective)}, and no finalist did better"
    elif winner is not base:
        speedup = winner.over(base)
        why = f"{rate}, {_times(speedup)} the baseline {base.build.label} in {len(base.rates.per_s)} alternating rounds"
    elif fastest is base:
        others = any(f is not base for f in finalists)
        why = f"{rate}, and no finalist was faster" if others else f"{rate}, the only finalist"
    else:
        why = f"{rate}, the baseline"
    if winner is not fastest and objective.goal != "slo":
        why += f"; as fast as {fastest.build.label} ({_times(winner.over(fastest))} of it) and more accurate"
    inaccurate = [family for family in ("int8", "bf16") if _all_rejected(trials, family)]
    if inaccurate:
        return f"no {' or '.join(inaccurate)} candidate was accurate enough; {winner.build.label} wins: {why}"
    return f"{winner.build.label} wins: {why}"


def _held(finalist: _Finalist, objective: Objective) -> str:
    """What it was seen to hold under the SLO."""
    promise = finalist.trial.promise
    if promise is None:
        within = f"with p99 <= {objective.slo_ms:g} ms"
        assert objective.slo_ms is not None
        if not finalist.trial.loads and any(one.p99_ms <= objective.slo_ms for one in finalist.trial.measurements):
            return f"was not put under load, so holds no known rate {within}"
        return f"holds no rate {within}"
    return (
        f"holds {promise.rate_per_s:.1f} requests/s with p99 <= {objective.slo_ms:g} ms "
        f"(p99 {promise.p99_ms:.1f} ms over {promise.duration_s:.0f} s)"
    )


def _nearest(finalist: _Finalist) -> str:
    """How near one that promises nothing came to the SLO."""
    loads = finalist.trial.loads
    if not loads:
        return f"is the closest, a single call of which takes p99 {-finalist.score('slo')[1]:.1f} ms"
    if held := [one.rate_per_s or 0.0 for one in loads if one.held]:
        return f"held {max(held):.1f} requests/s, and nothing a little below it once more"
    lowest = min(loads, key=lambda one: one.rate_per_s or inf)
    return (
        f"answered {lowest.in_time / max(1, lowest.offered):.0%} of {lowest.rate_per_s or 0.0:.1f} requests/s in time"
    )


def _all_rejected(trials: Sequence[Trial], family: str) -> bool:
    """Whether candidates of a precision (int8 with int8-dynamic) reached the gate and none passed it."""
    members = [trial for trial in trials if trial.build.precision.startswith(family)]
    return any(one.inaccurate for one in members) and not any(one.state == "ok" for one in members)


def _why_not(trial: Trial, finalists: Sequence[_Finalist], winner: _Finalist, objective: Objective) -> str:
    """Why a trial other than the winner's lost."""
    if trial.state != "ok":
        return trial.reason
    best = max((f for f in finalists if f.build == trial.build), key=lambda f: f.median, default=None)
    goal = objective.goal
    if _exceeds(trial, objective):
        return trial.measurements[0].rejected
    if best is not None and goal == "slo":
        return _held(best, objective)
    if best is not None:
        ratio = best.over(winner)
        why = f"{_times(ratio)} of the winner in the alternating run"
        return f"{why}: as fast, but less accurate" if ratio.value > 1 else why
    if not trial.loads and trial.explored.startswith(NOT_SEARCHED):
        return f"not a finalist: {trial.explored}"
    theirs, ours = (one.best(goal, objective.slo_ms) for one in (trial, winner.trial))
    if theirs is None:
        return "not a finalist: its speed was not measured"
    against = _measured(ours, goal) if ours else _rate(winner.median, goal)
    return f"not a finalist: {_measured(theirs, goal)} in its trial against {against}"


def _warnings(winner: _Finalist, base: _Finalist, objective: Objective) -> Iterator[str]:
    """Doubts about the choice."""
    if objective.goal == "slo" and winner.trial.promise is None:
        yield f"nothing meets p99 <= {objective.slo_ms:g} ms for certain: {winner.build.label} {_nearest(winner)}"
    if objective.memory_limit_bytes is not None and winner.trial.best(objective.goal, objective.slo_ms) is None:
        least = min(one.memory_bytes for one in winner.trial.measurements)
        yield (
            f"no build fits into {objective.memory_limit_bytes / 1e6:.0f} MB of memory; "
            f"{winner.build.label} needs at least {least / 1e6:.0f} MB"
        )
    if winner is not base and winner.trial.fidelity is not None:
        uncertain = judge(winner.trial.fidelity, objective).uncertain
        if uncertain:
            yield uncertain
    rounds = len(base.rates.per_s)
    if rounds < stats.MIN_ROUNDS:
        yield f"only {rounds} alternating rounds: {stats.MIN_ROUNDS} are needed for a 95 % interval of the speed-up"
    if objective.goal != "slo" and winner is not base and winner.over(base).low <= 1:
        yield "the interval of the speed-up holds 1: the winner may be no faster than the baseline"
    for finalist in (winner,) if winner is base else (winner, base):
        measured = finalist.trial.best(objective.goal, objective.slo_ms)
        throttled = (measured.throttled if measured else 0) + finalist.rates.throttled
        throttled += promise.throttled if (promise := finalist.trial.promise) else 0
        for warning in stats.noise_warnings(finalist.rates.per_s, throttled):
            yield f"{finalist.build.label}: {warning}"


def _times(ratio: stats.Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _rate(per_s: float, goal: Goal) -> str:
    return f"{1000 / per_s:.2f} ms" if goal == "latency" else f"{per_s:.1f}/s"


def _measured(measurement: Measurement, goal: Goal) -> str:
    return f"{measurement.p50_ms:.2f} ms" if goal == "latency" else f"{measurement.throughput_per_s:.1f}/s"
