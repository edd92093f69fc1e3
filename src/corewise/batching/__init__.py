"""Requests to batches, under deadlines: a pure ``policy`` that decides, a ``runner`` that drives instances by it."""

from corewise.batching.policy import Accepted, Batch, Dropped, LatencyTable, Policy, Reason, Refused, Request
from corewise.batching.runner import Answer, Batcher, CallFailed, InstanceDied, NotServed, Run

__all__ = [
    "Accepted",
    "Answer",
    "Batch",
    "Batcher",
    "CallFailed",
    "Dropped",
    "InstanceDied",
    "LatencyTable",
    "NotServed",
    "Policy",
    "Reason",
    "Refused",
    "Request",
    "Run",
]
