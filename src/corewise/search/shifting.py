"""Builds judged on samples unlike those that calibrated, by twins of them (``accuracy.shift``)."""

import shutil
from dataclasses import dataclass, field, replace
from typing import Literal

from corewise.accuracy.gate import AccuracyGate, judge
from corewise.accuracy.outputs import Outputs
from corewise.accuracy.shift import ShiftSplit, enough, shift_split
from corewise.common.errors import CorewiseError, InputError
from corewise.engines import BuildInputs
from corewise.records.build import Build, Plan
from corewise.records.events import Stage, StageStarted
from corewise.records.reason import Reason, ReasonKind
from corewise.records.trial import State, Trial
from corewise.report.reasons import sentence
from corewise.runtime.client import Hung, read_outputs
from corewise.runtime.workspace import Workspace
from corewise.search.forecast import SHIFT_TWIN
from corewise.search.trial import VERIFY_BATCH, SearchContext, holdout_outputs, reason_of


@dataclass
class ShiftGuard:
    """Judges trials that passed the gate once more, where calibration has not seen what is asked."""

    gate: AccuracyGate
    context: SearchContext
    inputs: BuildInputs
    reference: Build
    """The baseline: what it answers for the calibration samples says which of them are alike."""
    unjudged: dict[Build, Reason] = field(default_factory=dict)
    """Builds of int8 with ranges that should be judged and could not be, and why."""
    _split: ShiftSplit | Literal["none"] | None = field(default=None)
    _twins: Workspace | None = field(default=None)

    def judged(self, trial: Trial, *, share: float) -> Trial:
        """The trial with its drop under shift, rejected if the gate is robust and that drop too large.

        Int8 with ranges gets a twin, calibrated without a part of the samples and judged on that part. Where that
        cannot be done, it is pruned if the user asked for it, and else kept as ``unjudged``. All else needs no
        calibration: its own answers for that part are judged, if they can be. Nothing changes where samples are too
        few or too alike to be split.

        Args:
            trial: One that is ok.
            share: Of the budget, when the work has to be finished.
        """
        if trial.fidelity is None or trial.fidelity.shift is not None or self._split == "none":
            return trial
        known = self.unjudged.get(trial.build)
        if known is not None and known.kind == ReasonKind.NOT_JUDGED_UNDER_SHIFT:  # more time would not help
            return trial
        if not enough(len(self.inputs.calibration), len(self.gate.holdout)):
            self._split = "none"
            return trial
        if no_time := self._no_time(trial, share):
            return self._without_judgement(trial, no_time)
        self.context.on_event(StageStarted(Stage.UNDER_SHIFT, build=trial.build))
        try:
            split = self._split = self._split or self._made(share) or "none"
            if split == "none":
                return trial
            outputs = self._outputs(trial, split, share)
            fidelity, verdict = self.gate.under_shift(
                trial.fidelity, outputs, split.judged, calibrated=is_calibrated(trial.build)
            )
        except InputError:
            raise
        except CorewiseError as error:
            budget = self.context.budget
            if isinstance(error, Hung) and budget.ended(share):
                return self._without_judgement(trial, budget.reason(ReasonKind.BUDGET_SPENT_DURING))
            return self._without_judgement(trial, not_judged(reason_of(error)))
        self.unjudged.pop(trial.build, None)
        if verdict.passed:
            return replace(trial, fidelity=fidelity)
        return replace(trial, fidelity=fidelity, state=State.REJECTED, reason=verdict.reason, measurements=())

    @property
    def unsplit(self) -> bool:
        """Whether it was seen that samples are too few or too alike."""
        return self._split == "none"

    def doubt(self, trial: Trial) -> Reason | None:
        """What a robust gate has or would have said against it; in one, also that it could not be judged."""
        if trial.fidelity is None or trial.fidelity.shift is None:
            why = self.unjudged.get(trial.build)
            if why is None or not self.gate.is_robust:
                return None
            told = why if why.kind == ReasonKind.NOT_JUDGED_UNDER_SHIFT else not_judged(why)
            return replace(told, details={**told.details, "build": trial.build.label})
        verdict = judge(trial.fidelity, self.gate.requirements, robust=True, calibrated=is_calibrated(trial.build))
        return None if verdict.passed else Reason.of(ReasonKind.LOSES_UNDER_SHIFT, why=sentence(verdict.reason))

    def _without_judgement(self, trial: Trial, why: Reason) -> Trial:
        if not is_calibrated(trial.build):
            return trial
        self.unjudged[trial.build] = why
        return replace(trial, state=State.PRUNED, reason=why) if self.gate.robust else trial

    def _no_time(self, trial: Trial, share: float) -> Reason | None:
        """Why it cannot be judged, by a twin if it needs one, in what is left of the budget."""
        budget, left_s = self.context.budget, self.context.budget.left_s(share)
        needed_s = SHIFT_TWIN * trial.build_s if is_calibrated(trial.build) else 0.0
        if left_s >= needed_s:
            return None
        return budget.reason(ReasonKind.BUDGET_TOO_SHORT, left_s=max(0.0, left_s), needed_s=needed_s, twin=True)

    def _made(self, share: float) -> ShiftSplit | None:
        """Split the samples by what the baseline answers."""
        workspace, calibration, holdout = self.context.workspace, self.inputs.calibration, self.gate.holdout
        path = workspace.folder / "calibration-outputs.safetensors"
        with self.context.client(self.reference, share) as client:
            plan = Plan(threads_per_instance=self.context.cpu.usable_cores, batch=VERIFY_BATCH)
            client.open(workspace.payload(self.reference), self.reference, plan)
            client.run_samples(workspace.calibration, plan.batch, path)
        assert self.gate.reference is not None  # the baseline comes first
        grouped = calibration.groups is not None and holdout.groups is not None
        groups = (calibration.groups, holdout.groups) if grouped else None
        return shift_split(read_outputs(path), self.gate.reference, self.gate.seed, groups)  # type: ignore[arg-type]

    def _outputs(self, trial: Trial, split: ShiftSplit, share: float) -> Outputs:
        """What the trial's twin, or the build itself, answers for the holdout."""
        build, workspace = trial.build, self.context.workspace
        if not is_calibrated(build):
            return read_outputs(workspace.outputs(build))
        if self._twins is None:
            self._twins = workspace.twin(self.inputs, self.inputs.calibration.take(split.calibrating))
        context = replace(self.context, workspace=self._twins)
        payload = self._twins.empty_payload(build)
        with context.client(build, share) as client:
            client.build(self._twins, build, payload)
            outputs, _ = holdout_outputs(build, context, client, payload)
        shutil.rmtree(payload, ignore_errors=True)
        return outputs


def is_calibrated(build: Build) -> bool:
    """Whether its ranges come from samples: bf16 and dynamic quantization have none."""
    return build.precision == "int8"


def not_judged(why: Reason) -> Reason:
    """A build could not be judged under shift, and why."""
    return Reason.of(ReasonKind.NOT_JUDGED_UNDER_SHIFT, why=sentence(why))
