"""How many rows a call of texts may have."""

import pytest

from corewise.artifact.texts import ROWS_ALONE, call_limits
from corewise.pipeline import CallCost, CostTable
from corewise.pipeline.calls import by_tokens
from corewise.records.build import Plan

MEASURED = CostTable(rows=(1, 8), tokens=(16,), ms=((1.0,), (4.0,)))


@pytest.mark.parametrize(
    ("instances", "batch", "cost", "rows"),
    [
        (2, 2, by_tokens, 2),
        (2, 2, MEASURED, 8),  # the plan's batch is the best for all lengths together
        (2, 16, MEASURED, 16),  # the time ended before larger calls were measured
        (1, 1, by_tokens, ROWS_ALONE),
    ],
)
def test_a_call_has_the_plans_rows_or_more_if_they_were_measured(
    instances: int, batch: int, cost: CallCost, rows: int
) -> None:
    limits = call_limits(Plan(threads_per_instance=1, instances=instances, batch=batch), cost)
    assert limits.rows == max(limits.sizes) == rows
