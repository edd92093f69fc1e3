"""How many replicas an application needs, by what they say of their queues: a policy for Ray Serve's autoscaler.

Not by CPU percent, as a replica whose plan uses all of its cores is at 100 % long before it is late; and not by the
requests that it has, as a batch of many may take no longer than one. The controller gets this file by value, so it
imports nothing of corewise.
"""

from collections.abc import Iterable, Mapping
from math import ceil
from statistics import fmean
from typing import Any, NamedTuple

TOLERANCE = 0.1
"""As Kubernetes' HorizontalPodAutoscaler: smaller deviations change nothing."""
GROWTH = 2.0
"""Upper bound on the growth of the number of replicas in one step: GROWTH x the current one."""
FULL = 0.6
"""Replicas become fewer if those that stay would be in calls for at most this share of their time."""


class Load(NamedTuple):
    """What one replica says of its last seconds, or the mean of all."""

    queue_s: float
    """Mean seconds that answered requests waited."""
    busy: float
    """Share of its instances that were in a call."""
    answered_per_s: float
    refused_per_s: float


def wanted(current: int, loads: Iterable[Load], target_s: float, outside: float = 0.0) -> int:
    """How many replicas there should be in place of ``current``, whose mean time in the queue should be ``target_s``.

    Requests that were refused waited in no queue: they count as work that further replicas would do. ``outside`` is how
    many wait before the replicas, which have as many as they may have.
    """
    told = list(loads)
    if not told or current < 1:
        return current
    mean = Load(*(fmean(values) for values in zip(*told, strict=True)))
    offered = 1.0 if mean.refused_per_s == 0 else GROWTH
    if mean.answered_per_s > 0:
        offered = 1 + mean.refused_per_s / mean.answered_per_s
    ratio = max(mean.queue_s / target_s, offered, GROWTH if outside >= 1 else 1.0)
    if ratio > 1 + TOLERANCE:
        return ceil(current * min(GROWTH, ratio) - 1e-9)
    fewer = current - 1
    if fewer >= 1 and mean.queue_s < target_s / 2 and mean.busy * current <= FULL * fewer:
        return fewer
    return current


class QueueSeconds:
    """``wanted`` as Ray Serve calls it, which adds its bounds and delays."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``context`` is Ray Serve's ``AutoscalingContext``, with the metrics of all replicas by their names."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics
        names = [metrics.get(name, {}) for name in Load._fields]
        common = set(names[0]).intersection(*names[1:])
        loads = [Load(*(values[replica] for values in names)) for replica in common]
        outside = float(context.total_queued_requests or 0.0)
        return wanted(context.current_num_replicas, loads, self._target_s, outside), {}
