"""cluster.scaling: how many replicas there should be, by what they say of their queues."""

from types import SimpleNamespace

import pytest

from corewise.cluster.scaling import Load, QueueSeconds, wanted

IDLE = Load(queue_s=0.0, busy=0.0, answered_per_s=0.0, refused_per_s=0.0)
CALM = Load(queue_s=0.019, busy=0.7, answered_per_s=100.0, refused_per_s=0.0)


@pytest.mark.parametrize(
    ("current", "load", "after"),
    [
        (3, CALM, 3),
        (3, CALM._replace(queue_s=0.0215), 3),  # within the tolerance
        (3, CALM._replace(queue_s=0.03), 5),  # 3 x 1.5
        (3, CALM._replace(queue_s=9.0), 6),  # twice at most
        (2, CALM._replace(queue_s=0.0, refused_per_s=50.0), 3),  # half as much again is offered
        (2, CALM._replace(queue_s=0.0, refused_per_s=1e4), 4),
        (2, IDLE._replace(refused_per_s=1.0), 4),
        (4, IDLE, 3),  # one at a time
        (1, IDLE, 1),
        (4, CALM._replace(queue_s=0.001, busy=0.5), 4),  # 3 would be busy for 67 %
        (4, CALM._replace(queue_s=0.001, busy=0.4), 3),  # 3 would be for 53 %
        (0, IDLE, 0),
    ],
)
def test_replicas_follow_the_queue(current: int, load: Load, after: int) -> None:
    assert wanted(current, [load] * current, 0.02) == after


def test_replicas_count_together() -> None:
    assert wanted(2, [CALM._replace(queue_s=0.0), CALM._replace(queue_s=0.08)], 0.02) == 4
    assert wanted(5, [], 0.02) == 5


def test_requests_that_wait_before_full_replicas_need_more_of_them() -> None:
    assert wanted(2, [CALM] * 2, 0.02, outside=3.0) == 4
    assert wanted(2, [CALM] * 2, 0.02, outside=0.2) == 2


def test_ray_serve_asks_with_the_metrics_of_each_replica() -> None:
    late = CALM._replace(queue_s=0.04)._asdict()
    metrics = {name: {"a": value, "b": value} for name, value in late.items()}
    context = SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=2, total_queued_requests=None)
    assert QueueSeconds(0.02)(context) == (4, {})
    calm = {name: {"a": value, "b": value} for name, value in CALM._asdict().items()}
    context.aggregated_metrics, context.total_queued_requests = calm, 5.0
    assert QueueSeconds(0.02)(context) == (4, {})
    context.aggregated_metrics = {}  # of replicas that have just started
    assert QueueSeconds(0.02)(context) == (2, {})
