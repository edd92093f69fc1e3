"""What calls of the winner cost over their rows and tokens, so that ``predict`` fills the cheapest ones."""

from corewise.artifact.texts import call_limits
from corewise.common.errors import CorewiseError, InputError
from corewise.pipeline import CostTable, cost_points, cost_table
from corewise.pipeline.runner import MULTIPLE
from corewise.records.pipeline import TextPipeline
from corewise.records.report import Choice
from corewise.samples import Samples
from corewise.search.budget import FINISHING
from corewise.search.trial import SearchContext

TIMING_S = 5.0
"""For all calls together; the first one is always timed."""


def time_calls(
    pipeline: TextPipeline | None, samples: Samples, choice: Choice, context: SearchContext
) -> CostTable | None:
    """The table for calls of the lengths that ``samples`` have.

    ``None`` if the winner takes no texts, all its calls have one length, or there is no time.
    """
    if pipeline is None or not pipeline.pads or pipeline.fixed_length or choice.winner.fixed_batch is not None:
        return None
    if context.budget.left_s(FINISHING) < TIMING_S:
        return None
    lengths = [shapes[0][0] for shapes in samples.shapes]
    points = cost_points(lengths, call_limits(choice.plan), MULTIPLE)
    workspace = context.workspace
    try:
        with context.client(choice.winner, share=FINISHING) as client:
            client.open(workspace.payload(choice.winner), choice.winner, choice.plan)
            # A table of positions may end at a length that is no multiple.
            calls = [(rows, min(tokens, pipeline.max_length)) for rows, tokens in points]
            ms = client.time_calls(workspace.holdout, calls, TIMING_S)
    except InputError:
        raise
    except CorewiseError:
        return None  # Calls are filled by their tokens, as without a table.
    return cost_table(dict(zip(points, ms, strict=False)))
