"""The winner judged once more on texts that are alone, without neighbours and padding, as a server meets them."""

from dataclasses import dataclass, replace

import numpy as np

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Rows
from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Plan
from corewise.records.pipeline import TextPipeline
from corewise.records.trial import State, Trial
from corewise.runtime.client import read_outputs
from corewise.samples import Samples
from corewise.samples.drawing import draw
from corewise.search.trial import SearchContext

MOST_TEXTS, FEWEST_TEXTS = 256, 32
ALONE_S = 5.0
"""Under a budget: what eager PyTorch would need for the texts that are judged."""


@dataclass(frozen=True, kw_only=True)
class AloneGuard:
    """Judges a build on some texts of the holdout, each in a call of its own."""

    gate: AccuracyGate
    context: SearchContext
    texts: Samples
    """Without their padding."""
    rows: Rows
    """Their places in the holdout."""

    def judged(self, trial: Trial) -> Trial:
        """The trial, rejected if its answers to texts alone fail the gate; as it was if they cannot be had."""
        build, workspace = trial.build, self.context.workspace
        path = workspace.folder / "alone.safetensors"
        self.texts.save(path)
        try:
            with self.context.client(build) as client:
                client.open(workspace.payload(build), build, Plan(threads_per_instance=self.context.cpu.usable_cores))
                outputs = path.with_name("alone-outputs.safetensors")
                client.run_samples(path, 1, outputs, alone=False)
            verdict = self.gate.alone(read_outputs(outputs), self.rows)
        except InputError:
            raise
        except CorewiseError:
            return trial
        return trial if verdict.passed else replace(trial, state=State.REJECTED, reason=verdict.reason, measurements=())


def alone_guard(
    pipeline: TextPipeline | None, holdout: Samples, gate: AccuracyGate, context: SearchContext, row_s: float | None
) -> AloneGuard | None:
    """A guard for models of texts that share calls with others; ``row_s`` is eager PyTorch's time for one of them."""
    if pipeline is None or not pipeline.pads or pipeline.fixed_length is not None:
        return None
    most = MOST_TEXTS if row_s is None else min(MOST_TEXTS, max(FEWEST_TEXTS, int(ALONE_S / row_s)))
    chosen, _ = draw(len(holdout), most, gate.seed, holdout.groups)
    mask = next(k for k, each in enumerate(pipeline.inputs) if each.role == "mask")
    return AloneGuard(gate=gate, context=context, texts=unpadded(holdout.take(chosen), mask), rows=np.asarray(chosen))


def unpadded(samples: Samples, mask: int) -> Samples:
    """Samples of tokens without their padding, which is where input number ``mask`` is 0 at the end."""
    rows = [tuple(array[: int(row[mask].sum())] for array in row) for row in samples.rows]
    return replace(samples, rows=rows)
