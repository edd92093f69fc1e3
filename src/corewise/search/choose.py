"""Which build wins, and why each other one lost. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from corewise.accuracy.gate import judge
from corewise.common import stats
from corewise.records.build import Build
from corewise.records.goal import Goal, Requirements, Slo
from corewise.records.measurement import Measurement, Rates
from corewise.records.reason import Detail, Reason, ReasonKind
from corewise.records.report import Choice, LosingTrial
from corewise.records.trial import State, Trial
from corewise.search.plans import rate_interval

TIE = 0.98
"""A finalist that reaches this share of the fastest, by an interval that holds 1, is as fast."""
DRIFT = 1.5
"""A speed-up may differ by this factor between the trials and the race without a contradiction."""

_PRECISION_RANK = {"fp32": 3, "bf16": 2, "int8": 1, "int8-dynamic": 0}


@dataclass(frozen=True)
class _Finalist:
    """A build in the race, with its trial's accuracy."""

    rates: Rates
    trial: Trial
    goal: Goal

    @property
    def build(self) -> Build:
        return self.rates.build

    @property
    def median(self) -> float:
        return stats.quantile(self.rates.per_s, 0.5)

    @property
    def score(self) -> tuple[float, float]:
        """Orders by what the goal asks for."""
        return self.goal.score(self.median, self.trial)

    @property
    def closeness(self) -> tuple[int, float]:
        """Orders by accuracy: precision first, signal-to-noise ratio next."""
        sqnr_db = self.trial.fidelity.sqnr_db if self.trial.fidelity else 200.0
        return _PRECISION_RANK[self.build.precision], sqnr_db

    def over(self, other: "_Finalist") -> stats.Ratio:
        return stats.ratio_interval(self.rates.per_s, other.rates.per_s)

    def beats(self, baseline: "_Finalist") -> bool:
        """Whether it serves the goal better. A race asks for a higher median and a ratio above 1 in the median round,
        so that no winner's speed-up is below 1."""
        return self.score > baseline.score and (not self.goal.decided_by_race or self.over(baseline).value > 1)

    def ties(self, fastest: "_Finalist") -> bool:
        """Whether it is as fast as the fastest, as far as the run shows."""
        if not self.goal.decided_by_race:
            (ours, near), (theirs, nearest) = self.score, fastest.score
            return ours >= TIE * theirs and near >= nearest
        ratio = self.over(fastest)
        return ratio.value >= TIE and ratio.high >= 1


@dataclass(frozen=True)
class _Outcome:
    """The finalists, and which of them won."""

    finalists: tuple[_Finalist, ...]
    baseline: _Finalist
    fastest: _Finalist
    winner: _Finalist
    requirements: Requirements
    races: int = 1


def choose_winner(
    trials: Sequence[Trial], finals: Sequence[Rates], requirements: Requirements, baseline: Build, races: int = 1
) -> Choice:
    """The finalist that serves the goal best, unless none serves it better than the baseline: then the baseline.

    Best is the highest median rate in ``finals``, the rates of one alternating race (for latency 1/latency) with the
    baseline among them; for an SLO it is the highest certified rate and, if there is none, the shortest p99 of a call.
    Only builds whose trial is ``ok`` can win. If only the baseline exceeds the memory limit, the best of the others
    wins whatever its speed. Finalists as fast as the fastest (``TIE``) give way to the most accurate of them. Every
    other trial is a loser with a reason. ``finals`` are the rates of the last of ``races`` races.

    Raises ``ValueError`` if the baseline has no trial or no rates.
    """
    outcome = replace(_decide(trials, finals, requirements, baseline), races=races)
    winner, base = outcome.winner, outcome.baseline
    speedup = winner.over(base)
    return Choice(
        winner=winner.build,
        plan=winner.rates.plan,
        throughput_per_s=winner.median,
        baseline_throughput_per_s=base.median,
        speedup=speedup.value,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        reason=_why_won(trials, outcome),
        losers=tuple(
            LosingTrial(build=trial.build, state=trial.state, reason=_why_lost(trial, outcome))
            for trial in trials
            if trial.build != winner.build
        ),
        warnings=tuple(_doubts(outcome)),
        certified=winner.trial.certified,
    )


def find_contradiction(
    trials: Sequence[Trial], finals: Sequence[Rates], requirements: Requirements, baseline: Build
) -> Reason | None:
    """What the race says of the winner's speed-up and its trials deny; ``None`` if they agree.

    Both have intervals. Those of the trials hold one second of calls, and the machine drifts from minute to minute, so
    they contradict each other when not even a factor of ``DRIFT`` makes them meet.
    """
    return _contradiction(_decide(trials, finals, requirements, baseline))


def _contradiction(outcome: _Outcome) -> Reason | None:
    winner, base = outcome.winner, outcome.baseline
    ours, theirs = _in_trial(winner), _in_trial(base)
    if winner is base or ours is None or theirs is None:
        return None
    (our_low, our_high), (their_low, their_high) = rate_interval(ours), rate_interval(theirs)
    if min(our_low, their_low) <= 0:
        return None
    alone = stats.Ratio(ours.throughput_per_s / theirs.throughput_per_s, our_low / their_high, our_high / their_low)
    raced = winner.over(base)
    if raced.low <= DRIFT * alone.high and alone.low <= DRIFT * raced.high:
        return None
    ratios = {**_ratio(raced), **_ratio(alone, "alone_")}
    return Reason(kind=ReasonKind.RACE_CONTRADICTS, details={**ratios, "races": outcome.races})


def _in_trial(finalist: _Finalist) -> Measurement | None:
    """What the trial measured of the plan that raced."""
    measured = (one for one in finalist.trial.measurements if one.plan == finalist.rates.plan)
    return next(measured, None)


def _decide(trials: Sequence[Trial], finals: Sequence[Rates], requirements: Requirements, baseline: Build) -> _Outcome:
    by_build = {trial.build: trial for trial in trials}
    finalists = [
        _Finalist(rates, by_build[rates.build], requirements.goal)
        for rates in finals
        if rates.build in by_build and (by_build[rates.build].state == State.OK or rates.build == baseline)
    ]
    base = max(
        (finalist for finalist in finalists if finalist.build == baseline),
        key=lambda finalist: finalist.median,
        default=None,
    )
    if base is None:
        raise ValueError(f"the baseline {baseline.label} is not among the finals")
    faster = [finalist for finalist in finalists if finalist.beats(base)]
    able = [*faster, base]
    others = [finalist for finalist in finalists if finalist.build != baseline]
    if others and _exceeds_memory(base.trial):
        faster = able = others
    fastest = max(faster, key=lambda finalist: (finalist.score, finalist.closeness, finalist.build.label), default=base)
    tied = [finalist for finalist in able if finalist.ties(fastest)]
    winner = max(tied, key=lambda finalist: (finalist.closeness, finalist.score, finalist.build.label))
    return _Outcome(tuple(finalists), base, fastest, winner, requirements)


def _exceeds_memory(trial: Trial) -> bool:
    """Whether all plans of a trial need more memory than they may."""
    return bool(trial.measurements) and not trial.allowed


def _why_won(trials: Sequence[Trial], outcome: _Outcome) -> Reason:
    winner, base, fastest, goal = outcome.winner, outcome.baseline, outcome.fastest, outcome.requirements.goal
    details: dict[str, Detail] = {
        "winner": winner.build.label,
        "baseline": base.build.label,
        "figure": goal.figure(winner.median),
        "unit": goal.unit,
        "inaccurate": [family for family in ("int8", "bf16") if _all_inaccurate(trials, family)],
    }
    if isinstance(goal, Slo):
        details |= _under_load(winner, goal)
        if winner is not base:
            details |= {f"baseline_{name}": value for name, value in _under_load(base, goal).items()}
        return Reason(kind=ReasonKind.HIGHEST_RATE, details=details)
    if winner is not fastest:
        details |= {"tied_with": fastest.build.label, **_ratio(winner.over(fastest), "tied_")}
    if winner is not base:
        details |= {"rounds": len(base.rates.per_s), **_ratio(winner.over(base))}
        return Reason(kind=ReasonKind.FASTER_THAN_BASELINE, details=details)
    if fastest is not base:
        return Reason(kind=ReasonKind.STAYS_BASELINE, details=details)
    alone = all(finalist is base for finalist in outcome.finalists)
    return Reason(kind=ReasonKind.ONLY_FINALIST if alone else ReasonKind.NO_FINALIST_FASTER, details=details)


def _all_inaccurate(trials: Sequence[Trial], family: str) -> bool:
    """Whether candidates of a precision (int8 with int8-dynamic) reached the gate and none passed it."""
    members = [trial for trial in trials if trial.build.precision.split("-")[0] == family]
    return any(trial.inaccurate for trial in members) and not any(trial.state == State.OK for trial in members)


def _under_load(finalist: _Finalist, goal: Slo) -> dict[str, Detail]:
    """What a finalist was seen to do under the SLO."""
    certified, trial = finalist.trial.certified, finalist.trial
    if certified is None:
        loadable = any(measurement.p99_ms <= goal.p99_ms for measurement in trial.measurements)
        return {"slo_ms": goal.p99_ms, "rate_per_s": None, "loaded": bool(trial.loads) or not loadable}
    return {
        "slo_ms": goal.p99_ms,
        "rate_per_s": certified.rate_per_s,
        "p99_ms": certified.p99_ms,
        "duration_s": certified.duration_s,
    }


def _nearest(finalist: _Finalist) -> dict[str, Detail]:
    """How near a finalist without a certified rate came to the SLO."""
    loads = finalist.trial.loads
    if not loads:
        return {"call_p99_ms": min((measurement.p99_ms for measurement in finalist.trial.measurements), default=inf)}
    if met := [load.rate_per_s or 0.0 for load in loads if load.met]:
        return {"met_per_s": max(met)}
    lowest = min(loads, key=lambda load: load.rate_per_s or inf)
    return {"in_time": lowest.in_time / max(1, lowest.offered), "lowest_per_s": lowest.rate_per_s or 0.0}


def _why_lost(trial: Trial, outcome: _Outcome) -> Reason:
    """Why a trial other than the winner's lost."""
    if trial.state != State.OK:
        return trial.reason
    winner, goal = outcome.winner, outcome.requirements.goal
    if _exceeds_memory(trial) and trial.measurements[0].rejected:
        return trial.measurements[0].rejected
    raced = [finalist for finalist in outcome.finalists if finalist.build == trial.build]
    if raced:
        best = max(raced, key=lambda finalist: finalist.median)
        if isinstance(goal, Slo):
            return Reason(kind=ReasonKind.LOWER_RATE, details=_under_load(best, goal))
        ratio = best.over(winner)
        kind = ReasonKind.LESS_ACCURATE if ratio.value > 1 else ReasonKind.SLOWER_THAN_WINNER
        return Reason(kind=kind, details=_ratio(ratio))
    if not trial.loads and trial.skipped_tuning:
        assert trial.tuned is not None
        return trial.tuned
    theirs, ours = goal.best(trial), goal.best(winner.trial)
    if theirs is None:
        return Reason.of(ReasonKind.NOT_MEASURED)
    against = goal.measured_figure(ours) if ours else goal.figure(winner.median)
    return Reason.of(ReasonKind.NOT_A_FINALIST, figure=goal.measured_figure(theirs), against=against, unit=goal.unit)


def _doubts(outcome: _Outcome) -> Iterator[Reason]:
    """Doubts about the choice."""
    winner, base, requirements = outcome.winner, outcome.baseline, outcome.requirements
    goal = requirements.goal
    if isinstance(goal, Slo) and winner.trial.certified is None:
        details = {"slo_ms": goal.p99_ms, "winner": winner.build.label, **_nearest(winner)}
        yield Reason(kind=ReasonKind.SLO_UNCERTAIN, details=details)
    if requirements.memory_limit_bytes is not None and goal.best(winner.trial) is None:
        least = min(measurement.memory_bytes for measurement in winner.trial.measurements)
        yield Reason.of(
            ReasonKind.NOTHING_FITS_MEMORY,
            limit_bytes=requirements.memory_limit_bytes,
            winner=winner.build.label,
            needs_bytes=least,
        )
    fidelity = base.trial.fidelity
    if fidelity is not None and fidelity.near_chance:
        yield Reason.of(
            ReasonKind.NEAR_CHANCE, metric=fidelity.metric, value=fidelity.baseline_value, chance=fidelity.chance
        )
    if winner is not base and winner.trial.fidelity is not None:
        uncertain = judge(winner.trial.fidelity, requirements).uncertain
        if uncertain is not None:
            yield uncertain
    yield from _doubts_about_rates(outcome)


def _doubts_about_rates(outcome: _Outcome) -> Iterator[Reason]:
    winner, base, goal = outcome.winner, outcome.baseline, outcome.requirements.goal
    contradiction = _contradiction(outcome)
    if contradiction is not None:
        yield contradiction
    rounds = len(base.rates.per_s)
    if rounds < stats.MIN_ROUNDS:
        yield Reason.of(ReasonKind.FEW_ROUNDS, rounds=rounds, needed=stats.MIN_ROUNDS)
    if goal.decided_by_race and winner is not base and winner.over(base).low <= 1:
        yield Reason.of(ReasonKind.SPEEDUP_UNCERTAIN)
    for finalist in (winner,) if winner is base else (winner, base):
        measurement, certified = goal.best(finalist.trial), finalist.trial.certified
        throttled = (measurement.throttled if measurement else 0) + finalist.rates.throttled
        throttled += certified.throttled if certified else 0
        for warning in stats.noise_warnings(finalist.rates.per_s, throttled):
            yield Reason.of(ReasonKind.NOISY, build=finalist.build.label, text=warning)


def _ratio(ratio: stats.Ratio, prefix: str = "") -> dict[str, Detail]:
    return {f"{prefix}ratio": ratio.value, f"{prefix}low": ratio.low, f"{prefix}high": ratio.high}
