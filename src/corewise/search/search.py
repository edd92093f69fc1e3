"""One search: its builds, trials, journal and workspace, and the stages that lead from builds to a choice."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import CorewiseError, InputError, SourceError
from corewise.engines.qdq import climbed, uses_corewise_quantizer
from corewise.records.build import Build
from corewise.records.events import BuildsLeftUntried, PlansTuned, TrialEnded, TrialStarted
from corewise.records.goal import Slo
from corewise.records.measurement import Measurement, Rates
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Choice
from corewise.records.trial import State, Trial
from corewise.report.reasons import sentence
from corewise.runtime.client import read_outputs
from corewise.runtime.race import Race
from corewise.search import deadlines, slo
from corewise.search.alone import AloneGuard
from corewise.search.budget import BASELINE_SHARE
from corewise.search.candidates import (
    at_learned_rung,
    at_rung_of,
    family,
    highest_rungs,
    is_baseline,
    with_reverted_layers,
    worth_climbing,
)
from corewise.search.choose import choose_winner, find_contradiction
from corewise.search.elastic import judge_elastic
from corewise.search.finals import has_time_to_race, race_finalists
from corewise.search.forecast import PROMISING, Forecast, following, learned_plan
from corewise.search.journal import Journal
from corewise.search.plans import BATCHES, rate_interval
from corewise.search.shifting import ShiftGuard
from corewise.search.trial import SearchContext, measure_plan, run_trial
from corewise.search.tuning import not_tuned, tune

TUNED = 3
"""Builds beside the baseline whose plans are searched."""


class Search:
    """Runs the stages in the order in which its methods stand here."""

    def __init__(
        self,
        builds: Sequence[Build],
        gate: AccuracyGate,
        context: SearchContext,
        journal: Journal,
        shift: ShiftGuard | None = None,
        alone: AloneGuard | None = None,
        baseline_doubt: Callable[[Outputs], Reason | None] = lambda outputs: None,
    ) -> None:
        self.builds = tuple(builds)
        self.gate = gate
        self.context = context
        self.journal = journal
        self.shift = shift
        self.alone = alone
        self.baseline_doubt = baseline_doubt
        self.trials: list[Trial] = []
        self.notes: list[Reason] = []
        """What limited the search."""
        self.baseline_s = 0.0
        """Seconds that the baseline's trial took."""
        self.race_result: Race | None = None
        self.races = 0
        self.race_began_s, self.race_ended_s = 0.0, 0.0
        """Seconds of the budget that had passed."""

    @property
    def rates(self) -> tuple[Rates, ...]:
        """The rates of the race."""
        assert self.race_result is not None  # race() comes first
        return self.race_result.rates

    @property
    def peak_memory_bytes(self) -> int:
        """The peak memory of all processes that ran at the same time."""
        race_bytes = self.race_result.peak_memory_bytes if self.race_result else 0
        return max(race_bytes, *(trial.peak_memory_bytes for trial in self.trials))

    def try_builds(self) -> None:
        """One trial a build, the baseline first; a trial in the journal is not run again."""
        baseline, *left = self.builds
        trial = self._try(baseline, total=len(self.builds))
        if is_baseline(baseline):
            self._check_baseline(trial)
        while left:
            left = [at_learned_rung(build, self.trials) for build in left]
            left_s, sure_s = deadlines.seconds_left(self.trials, self.context)
            build = following(left, self._forecast(), left_s, sure_s)
            why_not = self._why_not_tried(build, left)
            left.remove(build)
            trial = self._try(build, total=len(self.trials) + len(left) + 1, why_not=why_not)
            if trial.inaccurate and (further := self._climbed(trial.build)):
                left = [further, *(at_rung_of(further, build) for build in left)]
        deadlines.check_candidates(self.trials, self.context, self.baseline_s)
        self._report_untried()

    def revert_layers(self) -> None:
        """More trials for engines whose int8 builds were all rejected by the gate.

        Layers of corewise's int8 build go back to floating point, first those that win most accuracy for the time they
        cost (``quantize.sensitivity``): one, two, four, ... layers, until the gate passes or half of them are back.
        """
        passed = {
            trial.build.engine
            for trial in self.trials
            if trial.build.precision == "int8"
            and trial.state in (State.OK, State.PRUNED)
            and trial.reason.kind not in deadlines.OUT_OF_TIME
        }
        for rejected in highest_rungs([trial for trial in self.trials if trial.inaccurate]):
            build = rejected.build
            repairable = uses_corewise_quantizer(build) and rejected.inaccurate and rejected.receipt is not None
            if not repairable or build.engine in passed:
                continue
            assert rejected.receipt is not None
            count = 1
            while count <= rejected.receipt.int8 // 2:
                repaired = with_reverted_layers(build, count)
                why_not = self._why_not_tried(repaired, (repaired,))
                trial = self._try(repaired, total=len(self.trials) + 1, why_not=why_not)
                if trial.state != State.REJECTED:
                    passed.add(build.engine)
                    break
                count *= 2

    def judge_under_shift(self) -> None:
        """In a robust search, judge the builds whose plans are worth a search on samples unlike those that calibrated.

        The fastest come first, until enough of them hold. What there was no time to judge stays if no int8 that holds
        is about as fast.
        """
        held = 0
        for trial in sorted(self.trials, key=lambda trial: -_first_per_s(trial) if trial.measurements else 0.0):
            if is_baseline(trial.build) or trial.state != State.OK or held == TUNED:
                continue
            judged = self._judged_under_shift(trial)
            if judged is not trial:
                if judged.reason.kind not in deadlines.OUT_OF_TIME:
                    self.journal.add(judged)
                self._replace_and_report(judged)
            held += judged.state == State.OK
        self._prefer_judged()

    def tune_plans(self) -> None:
        """Search the plans of the most promising builds, and of the baseline at last.

        The fastest build comes first, because time may end; one that exceeds the memory limit makes room for the next.
        """
        ranked = sorted(
            (trial for trial in self.trials if trial.state == State.OK),
            key=lambda trial: (is_baseline(trial.build), -_first_per_s(trial)),
        )
        fit = 0
        for trial in ranked:
            why_not = self._why_not_tuned(trial, ranked, fit)
            tuned = self._tune(trial, why_not)
            self._replace(tuned)
            fit += not is_baseline(trial.build) and tuned.state == State.OK

    def climb_rungs(self) -> None:
        """Correct the fastest build of corewise's quantizer further if it is close to a limit and time is left.

        All corrections are made at once if there is time for them, else one after the other.
        """
        left_s = self.context.budget.left_s(self.context.split.plans)
        while worth := worth_climbing(self.trials, self.context.requirements):
            forecast, top = self._forecast(judged_under_shift=self._is_robust), family(worth.build)
            if any(trial.build == top for trial in self.trials):
                return
            further = top if forecast.seconds(top) <= left_s else self._climbed(worth.build)
            if further is None or forecast.seconds(further) > left_s:
                return
            trial = self._try(further, total=len(self.trials) + 1, share=self.context.split.plans)
            if trial.state == State.OK:
                trial = self._judged_under_shift(trial, self.context.split.plans)
                self._replace(self._tune(trial, None) if trial.state == State.OK else trial)
                self._prefer_judged()
            left_s = self.context.budget.left_s(self.context.split.plans)

    def find_slo_rate(self) -> None:
        """For an SLO, load the most promising plans and certify the highest rate that meets it."""
        goal = self.context.requirements.goal
        if not isinstance(goal, Slo):
            return
        for trial in slo.find_rates(self.trials, self.context, goal.p99_ms):
            if trial != self._of(trial.build):
                if not self.context.budget.ended():  # otherwise another run, with more time, loads it again
                    self.journal.add(trial)
                self._replace(trial)
                self.context.on_event(PlansTuned(trial))

    def race(self) -> None:
        """Race the best builds against the baseline; once more if the race contradicts the trials and time is left."""
        self.race_began_s = self.context.budget.elapsed_s
        self._race_once()
        baseline = self.trials[0].build
        contradiction = find_contradiction(self.trials, self.rates, self.context.requirements, baseline)
        if contradiction is not None and has_time_to_race(self.trials, self.context):
            self._race_once()

    def choose(self) -> Choice:
        """The winner of the race, whose trial then has the latency table that admission needs."""
        while True:
            choice = choose_winner(
                self.trials, self.rates, self.context.requirements, self.trials[0].build, races=self.races
            )
            winner = self._of(choice.winner)
            judged = winner if is_baseline(winner.build) else self._judged_under_shift(winner, share=1.0)
            if self.alone is not None and judged.state == State.OK and not is_baseline(winner.build):
                judged = self.alone.judged(judged)
            if judged.state == State.OK:
                break
            self._replace_and_report(judged)
        self._replace(judged)
        self._complete_latency_table(choice)
        return self._with_doubt_under_shift(choice)

    def overtime(self) -> Reason | None:
        """Why the whole search took longer than its budget; ``None`` if it hardly did."""
        return deadlines.overtime(self.context.budget, trials_s=self.race_began_s, race_s=self.race_ended_s)

    def choose_layouts(self, choice: Choice) -> Choice:
        """The choice with what there is to say about an elastic plan of the winner."""
        found = judge_elastic(self._of(choice.winner), choice.plan, self.context)
        if isinstance(found, Reason):
            self.notes.append(found)
            return choice
        return replace(choice, elasticity=found)

    def _race_once(self) -> None:
        trials, self.race_result = race_finalists(self.trials, self.context)
        self.trials = list(trials)
        self.races += 1
        self.race_ended_s = self.context.budget.elapsed_s

    def _climbed(self, build: Build) -> Build | None:
        """The build with one more of corewise's corrections that was not tried; ``None`` if there is none."""
        if not uses_corewise_quantizer(build):
            return None
        further = climbed(build, self.context.workspace.cache)
        return None if any(trial.build == further for trial in self.trials) else further

    def _of(self, build: Build) -> Trial:
        return next(trial for trial in self.trials if trial.build == build)

    def _replace(self, trial: Trial) -> None:
        self.trials = [trial if other.build == trial.build else other for other in self.trials]

    def _replace_and_report(self, trial: Trial) -> None:
        """Replace the trial of a build that was ok, and say so if it no longer is."""
        self._replace(trial)
        if trial.state != State.OK:
            self.context.on_event(TrialEnded(trial, resumed=False))

    def _forecast(self, *, judged_under_shift: bool | None = None) -> Forecast:
        """Expectations, with the time of twins; by default only where a build must not win without one."""
        context = self.context
        if judged_under_shift is None:
            judged_under_shift = self._is_robust and bool(self.gate.robust)
        return Forecast(
            cpu=context.cpu,
            calibration=context.calibration,
            holdout=context.holdout,
            convolves=context.convolves,
            trials=tuple(self.trials),
            judged_under_shift=judged_under_shift,
        )

    @property
    def _is_robust(self) -> bool:
        """Whether builds are judged under shift, as far as samples allow it."""
        return self.shift is not None and self.gate.is_robust and not self.shift.unsplit

    def _try(self, build: Build, *, total: int, why_not: Reason | None = None, share: float | None = None) -> Trial:
        """The build's trial: from the journal, or run now until ``share`` of the budget is spent; or ``why_not``."""
        context = self.context
        trial = self.journal.get(build)
        resumed = trial is not None and self._still_good(trial)
        if trial is None or not resumed:
            context.on_event(TrialStarted(build, len(self.trials) + 1, total))
            trial = Trial(build=build, state=State.PRUNED, reason=why_not) if why_not else self._run(build, share)
            if trial.state == State.OK and self._leads(trial):
                trial = self._judged_under_shift(trial, share)
            # What ended for lack of time is tried again by another run with more of it.
            if trial.reason.kind not in deadlines.OUT_OF_TIME:
                self.journal.add(trial)
        context.on_event(TrialEnded(trial, resumed=resumed))
        if trial.state != State.OK:
            shutil.rmtree(context.workspace.payload(build), ignore_errors=True)
        self.trials.append(trial)
        return trial

    def _run(self, build: Build, share: float | None) -> Trial:
        best_verified_per_s = max((trial.verified_per_s for trial in self.trials if trial.state == State.OK), default=0)
        started_s = self.context.budget.elapsed_s
        if is_baseline(build):
            share = inf  # nothing can be judged without its answers
        elif share is None:
            share = deadlines.trial_share(self.trials, self.context)
        trial = run_trial(
            build,
            self.context,
            best_verified_per_s=best_verified_per_s,
            is_baseline=is_baseline(build),
            share=share,
        )
        if is_baseline(build):
            self.baseline_s = self.context.budget.elapsed_s - started_s
        return trial

    def _leads(self, trial: Trial) -> bool:
        """Whether it is faster than all candidates before it, so that others need not be tried if it holds."""
        before = (other for other in self.trials if other.state == State.OK and not is_baseline(other.build))
        fastest = max((_first_per_s(other) for other in before), default=0.0)
        return not is_baseline(trial.build) and _first_per_s(trial) > fastest

    def _judged_under_shift(self, trial: Trial, share: float | None = None) -> Trial:
        """The trial as a robust search judges it, until ``share`` of the budget is spent."""
        if self.shift is None or not self._is_robust:
            return trial
        if share is None:  # only a build that must be judged may last longer than the budget
            trial_share = deadlines.trial_share(self.trials, self.context)
            share = trial_share if self.gate.robust else self.context.split.last_trial
        judged = self.shift.judged(trial, share=share)
        unsplit = Reason.of(ReasonKind.NOT_SPLIT)
        if self.shift.unsplit and unsplit not in self.notes:
            self.notes.append(unsplit)
        return judged

    def _prefer_judged(self) -> None:
        """Leave int8 that there was no time to judge under shift, where int8 that holds there is about as fast."""
        if self.shift is None or not self._is_robust:
            return
        held = (trial for trial in self.trials if trial.state == State.OK and trial.build.precision == "int8")
        fastest = max((_first_per_s(trial) for trial in held if _is_judged(trial)), default=0.0)
        for trial in self.trials:
            why = self.shift.unjudged.get(trial.build)
            if why and trial.state == State.OK and fastest > PROMISING * _first_per_s(trial):
                self._replace_and_report(replace(trial, state=State.PRUNED, reason=why))

    def _with_doubt_under_shift(self, choice: Choice) -> Choice:
        """Where the drop under shift decides nothing, the winner's is found out all the same if there is time."""
        winner = self._of(choice.winner)
        if self.shift is None or winner.build.precision != "int8":
            return choice
        if not self.gate.is_robust:
            winner = self.shift.judged(winner, share=1.0)
            self._replace(winner)
        doubt = self.shift.doubt(winner)
        return choice if doubt is None else replace(choice, warnings=(*choice.warnings, doubt))

    def _why_not_tried(self, build: Build, left: Sequence[Build]) -> Reason | None:
        """Why a build of those ``left`` is not tried in what is left of the budget."""
        return deadlines.why_not_tried(build, left, self.trials, self.context, self._forecast())

    def _report_untried(self) -> None:
        """Say at once what the budget leaves untried."""
        reason = deadlines.left_untried(self.trials, self.context.budget)
        if reason is not None:
            self.notes.append(reason)
            self.context.on_event(BuildsLeftUntried(reason))

    def _still_good(self, trial: Trial) -> bool:
        """Whether a finished trial counts again: the cause of a failure, and files, may be gone."""
        if trial.state == State.OK:
            workspace = self.context.workspace
            return workspace.payload(trial.build).is_dir() and workspace.outputs(trial.build).is_file()
        return trial.state != State.FAILED

    def _check_baseline(self, trial: Trial) -> None:
        if trial.state != State.OK:
            raise SourceError(
                f"the model does not run as it is: {sentence(trial.reason)}", "change it so that it runs in PyTorch"
            )
        outputs = read_outputs(self.context.workspace.outputs(trial.build))
        self.gate.reference = self.gate.reference or outputs
        doubt = self.baseline_doubt(outputs)
        if doubt is not None:
            self.notes.append(doubt)

    def _why_not_tuned(self, trial: Trial, ranked: Sequence[Trial], fit: int) -> Reason | None:
        """Why its plans are not worth a search after ``fit`` others; ``None`` if they are."""
        able = (other for other in ranked if not is_baseline(other.build) and self._of(other.build).state == State.OK)
        fastest = next(able, None)
        if is_baseline(trial.build) or fastest is None:
            return None
        low_per_s, _ = rate_interval(fastest.measurements[0])
        _, high_per_s = rate_interval(trial.measurements[0])
        kind = None
        if high_per_s < PROMISING * low_per_s:
            kind = ReasonKind.MUCH_SLOWER
        elif fit >= TUNED:
            kind = ReasonKind.OTHERS_FASTER
        if kind is None:
            return None
        return Reason.of(
            kind,
            per_s=_first_per_s(trial),
            plan=trial.measurements[0].plan.label,
            best_per_s=_first_per_s(fastest),
            count=fit,
        )

    def _tune(self, trial: Trial, why_not: Reason | None) -> Trial:
        if trial.tuned is not None:
            return trial
        if why_not is not None:
            left_out = not_tuned(trial, why_not, self.context.requirements)
            self.journal.add(left_out)
            return left_out
        goal, budget = self.context.requirements.goal, self.context.budget
        most_s = inf
        if is_baseline(trial.build) and budget.total_s is not None:
            most_s = BASELINE_SHARE * budget.total_s - self.baseline_s
        tuned = tune(trial, self.context, like=learned_plan(trial.build, self.trials, goal), most_s=most_s)
        if not self.context.budget.ended(self.context.split.plans):
            self.journal.add(tuned)
        self.context.on_event(PlansTuned(tuned))
        return tuned

    def _complete_latency_table(self, choice: Choice) -> None:
        """Measure the smaller batches of the winner's layout; only single items if the budget is spent."""
        winner = self._of(choice.winner)
        known = {measurement.plan for measurement in winner.measurements}
        batches = BATCHES if choice.winner.fixed_batch is None else ()
        smaller = (replace(choice.plan, batch=batch) for batch in batches if batch < choice.plan.batch)
        missing = [plan for plan in smaller if plan not in known]
        if not missing:
            return
        measurements: list[Measurement] = []
        why = Reason.of(ReasonKind.LATENCY_TABLE)
        try:
            with self.context.client(winner.build, share=inf) as client:
                for plan in missing[:1] if self.context.budget.ended() else missing:
                    measurements.append(measure_plan(winner.build, self.context, client, plan, why))
        except InputError:
            raise
        except CorewiseError:
            pass  # The table stays as it is; admission estimates the rest.
        self._replace(replace(winner, measurements=(*winner.measurements, *measurements)))


def _first_per_s(trial: Trial) -> float:
    return trial.measurements[0].throughput_per_s


def _is_judged(trial: Trial) -> bool:
    """Whether it was judged under shift."""
    return trial.fidelity is not None and trial.fidelity.shift is not None
