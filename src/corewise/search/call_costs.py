"""What calls of the winner cost over their rows and tokens, so that ``predict`` fills the cheapest ones."""

from corewise.common.errors import CorewiseError, InputError
from corewise.pipeline import CallLimits, CostTable, cost_points, cost_table
from corewise.pipeline.runner import MULTIPLE
from corewise.records.pipeline import TextPipeline
from corewise.records.report import Choice
from corewise.samples import Samples
from corewise.search.budget import FINISHING
from corewise.search.trial import SearchContext

TIMING_S = 5.0
"""Time for all calls together; the first one is always timed."""
ROWS = 64
"""Rows of a call, at most, unless the plan has more. The plan's batch is the best for all lengths together, and of
short texts more are cheaper: with 96 tokens MiniLM took 10 % less for each of 8 rows than of 2, which was the best
batch for Cranfield's abstracts (two instances, Zen 4)."""


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
    is_limited = context.requirements.memory_limit_bytes is not None  # which the plan's batch keeps
    rows = choice.plan.batch if is_limited else max(choice.plan.batch, ROWS)
    points = cost_points(lengths, CallLimits.of_few_sizes(rows), MULTIPLE)
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
