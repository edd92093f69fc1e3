"""goal: what a user asks for is a goal, or one line that says why not."""

import numpy as np
import pytest

from corewise.common.errors import InputError
from corewise.records.goal import Slo, Throughput, parse_goal


def test_goals_by_name_and_as_objects() -> None:
    assert parse_goal("slo", slo_ms=np.float32(50)) == Slo(p99_ms=50.0)
    assert parse_goal(Throughput()) == Throughput()


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"name": "speed"}, "the objective 'speed' is unknown; give throughput, latency, slo"),
        ({"name": ["slo"]}, "the objective ['slo'] is unknown; give throughput, latency, slo"),
        ({"name": "slo", "slo_ms": "100"}, "the SLO is '100' ms; give milliseconds above 0, e.g. 100"),
        ({"name": "slo", "slo_ms": float("nan")}, "the SLO is nan ms; give milliseconds above 0, e.g. 100"),
        ({"name": "slo"}, "the objective slo and slo_ms go together; give both (e.g. slo and 100) or neither"),
    ],
)
def test_what_is_no_goal_is_told(goal: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_goal(**goal)  # type: ignore[arg-type]
    assert str(caught.value) == message
