"""Findings from running a model a few times: answers that depend on neighbours, on earlier calls, or on chance."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The operation that causes a finding, and the line of the user's code that calls it."""

    operation: str
    """The operation's name, e.g. ``aten.max``; empty if only the line is known."""
    where: str
    """``file:line``; empty if no line of the user's own code is known."""
    code: str
    """The text of that line."""


@dataclass(frozen=True, kw_only=True)
class BatchMixing:
    """A row's answer depends on the other rows of its call."""

    kind: Literal["neighbours", "position"]
    """``position``: also on its place among the same neighbours."""
    decibels: float
    """Signal-to-noise ratio of the row that changes most, between alone and in a batch (``agreement.worst_row_db``)."""
    origin: Origin | None
    """The first operation whose value for a row changes; ``None`` if the model cannot be exported."""


@dataclass(frozen=True, kw_only=True)
class StateChange:
    """A call changes something that the model keeps."""

    name: str
    """The buffer or attribute, e.g. ``encoder.cache``; empty if none was seen to change."""
    changes_answers: bool
    """Whether the same input is answered differently by the next call."""
    decibels: float
    """Signal-to-noise ratio between the answers of two calls with the same input; 200 if they are equal."""
    origin: Origin | None
    is_read: bool = False
    """Whether the program computes its outputs from it, though no call was seen to answer differently."""


@dataclass(frozen=True, kw_only=True)
class RandomOperation:
    """An operation draws random numbers, so that the same input is answered differently each time."""

    decibels: float
    """Signal-to-noise ratio between the answers of two calls with the same input."""
    origin: Origin | None
