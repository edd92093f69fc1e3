"""Requests to batches, under deadlines: a pure ``policy`` that decides, a ``runner`` that drives instances by it.

``partition`` and ``elastic`` decide how calls share the cores where several thread layouts are open, and
``elastic_queue`` how requests do.
"""

from corewise.batching.elastic import ElasticPolicy
from corewise.batching.elastic_queue import ElasticQueue, ElasticTables, policy_of
from corewise.batching.latency import LatencyTable
from corewise.batching.partition import Partitions
from corewise.batching.policy import Policy
from corewise.batching.requests import Accepted, Batch, Dropped, Reason, Refused, Request
from corewise.batching.runner import (
    ONE_BATCH,
    Answer,
    Arrays,
    Batcher,
    CallFailed,
    InstanceDied,
    Joining,
    NotServed,
    OneBatch,
    Run,
)

__all__ = [
    "ONE_BATCH",
    "Accepted",
    "Answer",
    "Arrays",
    "Batch",
    "Batcher",
    "CallFailed",
    "Dropped",
    "ElasticPolicy",
    "ElasticQueue",
    "ElasticTables",
    "InstanceDied",
    "Joining",
    "LatencyTable",
    "NotServed",
    "OneBatch",
    "Partitions",
    "Policy",
    "Reason",
    "Refused",
    "Request",
    "Run",
    "policy_of",
]
