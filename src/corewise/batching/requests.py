"""What a policy is asked and answers: requests, batches, and why a request is not served. Pure values."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Reason = Literal[
    "too large", "too urgent", "queue full", "overloaded", "no instance", "draining", "expired", "displaced"
]
WORDS: dict[Reason, str] = {
    "too large": "it has more rows than a call may have; send it in parts",
    "too urgent": "even an idle instance would miss its deadline; give it more time",
    "queue full": "the queue is full; try again later",
    "overloaded": "it, or a waiting request, would miss its deadline; try again later",
    "no instance": "no instance of the model is running; try again later",
    "draining": "the server is stopping; ask another server",
    "expired": "it waited until it could no longer meet its deadline; try again later",
    "displaced": "a request of higher priority took its place; try again later",
}
"""Why a request is not served. ``expired`` and ``displaced`` apply only to accepted requests."""


class Request(NamedTuple):
    """A request as the policy sees it. Only requests of equal ``group`` share a batch."""

    id: int
    deadline_s: float
    """When the answer is due, on the clock of ``now_s``; ``inf`` for no deadline."""
    priority: int = 0
    """A request displaces those of lower priority if there is not time or room for both."""
    group: Hashable = None
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A request that was accepted and will not be served."""

    request: Request
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request waits; ``dropped`` no longer do."""

    dropped: tuple[Dropped, ...] = ()


ACCEPTED = Accepted()
"""The usual decision: the request waits, and none is dropped for it."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The request is not queued. It may be accepted after ``retry_after_s``; ``None`` where nothing says when."""

    reason: Reason
    retry_after_s: float | None = None
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The requests that an instance runs now, the most urgent first, and the predicted end; empty if none waits."""

    requests: tuple[Request, ...]
    end_s: float
    dropped: tuple[Dropped, ...] = ()
