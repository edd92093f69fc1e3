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
from corewise.runtime.client import read_outputs
from corewise.runtime.workspace import Workspace
from corewise.search.trial import VERIFY_BATCH, SearchContext, holdout_outputs, reason_of

TWIN = 1.3
"""A twin takes about this many times as long as its build: it also answers the holdout, and its cache begins empty."""


@dataclass
class ShiftGuard:
    """Judges trials that passed the gate once more, where calibration has not seen what is asked."""

    gate: AccuracyGate
    context: SearchContext
    inputs: BuildInputs
    reference: Build
    """The baseline: what it answers for the calibration samples says which of them are alike."""
    _split: ShiftSplit | Literal["none"] | None = field(default=None)
    _twins: Workspace | None = field(default=None)

    def judged(self, trial: Trial, *, share: float) -> Trial:
        """The trial with its drop under shift, rejected if the gate is robust and that drop too large.

        Int8 with ranges gets a twin, calibrated without a part of the samples and judged on that part. All else needs
        no calibration: its own answers for that part are judged. Where a robust gate cannot judge it, for lack of time
        too, it is pruned. Nothing changes where samples are too few or too alike to be split.

        Args:
            trial: One that is ok.
            share: Of the budget, when the work has to be finished.
        """
        if trial.fidelity is None or trial.fidelity.shift is not None or self._split == "none":
            return trial
        if not enough(len(self.inputs.calibration), len(self.gate.holdout)):
            self._split = "none"
            return trial
        self.context.on_event(StageStarted(Stage.UNDER_SHIFT, build=trial.build))
        try:
            if no_time := self._no_time(trial, share):
                return self._unjudged(trial, no_time)
            split = self._split = self._split or self._made(share) or "none"
            if split == "none":
                return trial
            fidelity, verdict = self.gate.under_shift(trial.fidelity, self._outputs(trial, split, share), split.judged)
        except InputError:
            raise
        except CorewiseError as error:
            why = sentence(reason_of(error))
            return self._unjudged(trial, Reason.of(ReasonKind.NOT_JUDGED_UNDER_SHIFT, why=why))
        if verdict.passed:
            return replace(trial, fidelity=fidelity)
        return replace(trial, fidelity=fidelity, state=State.REJECTED, reason=verdict.reason, measurements=())

    @property
    def unsplit(self) -> bool:
        """Whether it was seen that samples are too few or too alike."""
        return self._split == "none"

    def doubt(self, trial: Trial) -> Reason | None:
        """What a robust gate would have said against it."""
        if trial.fidelity is None or trial.fidelity.shift is None:
            return None
        verdict = judge(trial.fidelity, self.gate.requirements, robust=True)
        return None if verdict.passed else Reason.of(ReasonKind.LOSES_UNDER_SHIFT, why=sentence(verdict.reason))

    def _unjudged(self, trial: Trial, why: Reason) -> Trial:
        return replace(trial, state=State.PRUNED, reason=why) if self.gate.is_robust else trial

    def _no_time(self, trial: Trial, share: float) -> Reason | None:
        """Why a twin cannot be built in what is left of the budget."""
        budget, needed_s = self.context.budget, TWIN * trial.build_s
        left_s = budget.left_s(share)
        if trial.build.precision != "int8" or left_s >= needed_s:
            return None
        return budget.reason(ReasonKind.BUDGET_TOO_SHORT, left_s=max(0.0, left_s), needed_s=needed_s)

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
        if build.precision != "int8":
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
