"""The winner judged once more on texts that are alone, without neighbours and padding, as a server meets them."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from corewise.accuracy.gate import AccuracyGate, Verdict
from corewise.accuracy.outputs import Rows
from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Build, Plan
from corewise.records.trial import State, Trial
from corewise.runtime.client import Hung, read_outputs
from corewise.samples import Samples
from corewise.samples.drawing import draw
from corewise.search.task import Task
from corewise.search.trial import SearchContext, reason_of

MOST_TEXTS, FEWEST_TEXTS = 256, 32
ALONE_S = 5.0
"""Under a budget: what eager PyTorch, whose time for one text is known then, would need for all that are judged."""


@dataclass(frozen=True, kw_only=True)
class AloneGuard:
    """Judges a build on some texts of the holdout, each in a call of its own, also when the budget is spent."""

    gate: AccuracyGate
    context: SearchContext
    baseline: Build
    texts: Samples
    """Without their padding."""
    rows: Rows
    """Their places in the holdout."""

    def judged(self, trial: Trial) -> Trial:
        """The trial, rejected if its answers to texts alone fail the gate, and those of the baseline do not.

        A build that cannot answer them has failed. One that has not answered when the budget ends stays as it was.
        """
        try:
            verdict = self._verdict(trial.build)
        except InputError:
            raise
        except CorewiseError as error:
            if isinstance(error, Hung) and self.context.budget.ended():
                return trial
            return replace(trial, state=State.FAILED, reason=reason_of(error), measurements=())
        if verdict.passed or not self._baseline_passes:
            return trial
        return replace(trial, state=State.REJECTED, reason=verdict.reason, measurements=())

    @cached_property
    def _baseline_passes(self) -> bool:
        """Whether the model itself answers texts alone as in batches; padding may leak into its answers."""
        try:
            return self._verdict(self.baseline).passed
        except InputError:
            raise
        except CorewiseError:
            return False

    def _verdict(self, build: Build) -> Verdict:
        workspace = self.context.workspace
        path = workspace.folder / "alone.safetensors"
        outputs = path.with_name("alone-outputs.safetensors")
        self.texts.save(path)
        with self.context.client(build) as client:
            client.open(workspace.payload(build), build, Plan(threads_per_instance=self.context.cpu.usable_cores))
            client.run_samples(path, 1, outputs, alone=False)
        return self.gate.alone(read_outputs(outputs), self.rows)


def alone_guard(task: Task, gate: AccuracyGate, context: SearchContext) -> AloneGuard | None:
    """A guard for models of texts that share calls with others and have answers whose shape no padding changes."""
    pipeline, holdout, row_s = task.pipeline, task.holdout, task.row_s
    if pipeline is None or not pipeline.pads or pipeline.fixed_length is not None:
        return None
    if pipeline.task == "tokens" or (pipeline.task == "vectors" and pipeline.pooling == "none"):
        return None
    most = MOST_TEXTS if row_s is None else min(MOST_TEXTS, max(FEWEST_TEXTS, int(ALONE_S / row_s)))
    chosen, _ = draw(len(holdout), most, gate.seed, holdout.groups)
    mask = next(k for k, each in enumerate(pipeline.inputs) if each.role == "mask")
    texts = unpadded(holdout.take(chosen), mask)
    return AloneGuard(gate=gate, context=context, baseline=task.builds[0], texts=texts, rows=np.asarray(chosen))


def unpadded(samples: Samples, mask: int) -> Samples:
    """Samples of tokens without the padding at their end, where input number ``mask`` is 0."""
    lengths = [int(row[mask].nonzero()[0].max(initial=0)) + 1 for row in samples.rows]
    rows = [tuple(array[:length] for array in row) for row, length in zip(samples.rows, lengths, strict=True)]
    return replace(samples, rows=rows)
