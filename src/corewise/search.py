"""The stages between candidates and a choice: trials, layers given back to floating point, the race."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corewise import metrics
from corewise.candidates import BASELINE, returning
from corewise.engines.qdq import is_ours
from corewise.errors import SourceError
from corewise.events import FinalsRound, StageStarted, TrialEnded, TrialStarted
from corewise.fidelity import Outputs, Verdict, compare, gate
from corewise.journal import Journal
from corewise.nested import Structure, unflatten
from corewise.race import Contender, Fell, Race, race
from corewise.samples import Samples
from corewise.trial import Setting, read_outputs, run_trial
from corewise.values import Build, Fidelity, Goal, Objective, Plan, Trial

FINALISTS = 3


@dataclass
class Judge:
    """Compares outputs for the holdout with the baseline's, which come first."""

    scorer: metrics.Metric | None
    holdout: Samples
    structure: Structure
    objective: Objective
    seed: int
    reference: Outputs | None = field(default=None)

    def __call__(self, outputs: Outputs) -> tuple[Fidelity, Verdict]:
        """The outputs against the reference; the first ones ever seen become it."""

        def nest(leaves: list[Any]) -> Any:
            return unflatten(self.structure, leaves)

        if self.reference is None:
            self.reference = outputs
        if self.scorer is None:
            self.scorer = metrics.default(nest(list(self.reference.leaves)), self.holdout.labels)
        fidelity = compare(
            self.reference,
            outputs,
            metric=self.scorer,
            labels=self.holdout.labels,
            groups=self.holdout.groups,
            nest=nest,
            seed=self.seed,
        )
        return fidelity, gate(fidelity, self.objective)


def run_trials(builds: Sequence[Build], setting: Setting, journal: Journal, judge: Judge) -> tuple[Trial, ...]:
    """One trial a build, the baseline first; those in the journal are not run again."""
    trials: list[Trial] = []
    for number, build in enumerate(builds, 1):
        trial = _trial(build, number, len(builds), trials, setting, journal)
        if build == BASELINE:
            if trial.state != "ok":
                raise SourceError(f"the model does not run as it is: {trial.reason}", "make it run in eager PyTorch")
            judge.reference = judge.reference or read_outputs(setting.outputs(build))
        trials.append(trial)
    return tuple(trials)


def give_back(trials: Sequence[Trial], setting: Setting, journal: Journal) -> tuple[Trial, ...]:
    """The trials, and more where the gate let no int8 build of an engine through.

    Layers of our int8 build go back to floating point, those first that win most accuracy for the time they cost
    (``quantize.sensitivity``): one, two, four, ... of them, until the gate passes or half of them are back.
    """
    path = list(trials)
    passed = {one.build.engine for one in trials if one.build.precision == "int8" and one.state in ("ok", "pruned")}
    for rejected in trials:
        build = rejected.build
        ours = is_ours(build) and rejected.state == "rejected"
        if not ours or build.engine in passed or rejected.receipt is None:
            continue
        count = 1
        while count <= rejected.receipt.int8 // 2:
            build = returning(rejected.build, count)
            path.append(_trial(build, len(path) + 1, len(path) + 1, path, setting, journal))
            if path[-1].state != "rejected":
                passed.add(build.engine)
                break
            count *= 2
    return tuple(path)


def _trial(build: Build, number: int, total: int, before: Sequence[Trial], setting: Setting, journal: Journal) -> Trial:
    """The build's trial: from the journal, or run now."""
    kept = journal.get(build)
    resumed = kept is not None and _still_good(kept, setting)
    if kept is None or not resumed:
        setting.tell(TrialStarted(build, number, total))
        fastest = max((trial.verified_per_s for trial in before if trial.state == "ok"), default=0.0)
        kept = run_trial(build, setting, best_verified_per_s=fastest, is_baseline=build == BASELINE)
        journal.add(kept)
    setting.tell(TrialEnded(kept, resumed=resumed))
    if kept.state != "ok":
        shutil.rmtree(setting.payload(build), ignore_errors=True)
    return kept


def _still_good(kept: Trial, setting: Setting) -> bool:
    """Whether a finished trial counts again: a failure may have had a cause that is gone, and files may be."""
    if kept.state == "ok":
        return setting.payload(kept.build).is_dir() and setting.outputs(kept.build).is_file()
    return kept.state != "failed"


def finals(trials: Sequence[Trial], setting: Setting, goal: Goal) -> tuple[tuple[Trial, ...], Race]:
    """The fastest accurate trials and the baseline, raced; one that falls there has failed, and the rest race again."""
    trials = list(trials)
    while True:
        ranked = sorted(
            (trial for trial in trials if trial.measurements and trial.state == "ok"),
            key=lambda trial: -_per_s(trial, goal),
        )
        finalists = [trial for trial in ranked if trial.build != BASELINE][:FINALISTS]
        contenders = [
            Contender(
                build=trial.build,
                plan=_best_plan(trial, goal),
                payload=setting.payload(trial.build),
            )
            for trial in (trials[0], *finalists)
        ]
        setting.tell(StageStarted(f"racing {len(finalists)} finalists against the baseline"))
        try:
            run = race(
                contenders,
                samples=setting.holdout,
                start=setting.worker,
                on_round=lambda number, rounds, rates: setting.tell(FinalsRound(number, rounds, rates)),
            )
        except Fell as fell:
            if fell.build == BASELINE:
                raise
            trials = [
                replace(trial, state="failed", reason=str(fell)) if trial.build == fell.build else trial
                for trial in trials
            ]
        else:
            return tuple(trials), run


def _per_s(trial: Trial, goal: Goal) -> float:
    best = trial.best(goal)
    assert best is not None
    return best.throughput_per_s


def _best_plan(trial: Trial, goal: Goal) -> Plan:
    best = trial.best(goal)
    assert best is not None
    return best.plan
