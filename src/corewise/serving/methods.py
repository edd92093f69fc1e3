"""What a gRPC method is, whatever carries it: messages in, messages out."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

Unary = Callable[[Any, Any], Awaitable[Any]]
"""Takes a message and the call's context, and returns a message; raises ``ProtocolError``."""
Streaming = Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]]
"""Takes messages as they arrive and the call's context, and returns as many as it likes."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of a service: ``unary`` or ``streaming``."""

    path: str
    """``/SERVICE/NAME``."""
    request: Any
    response: Any
    """The classes of its messages."""
    unary: Unary | None = None
    streaming: Streaming | None = None
    takes: Literal["messages", "bytes", "one"] = "messages"
    """What a streaming method is given: messages as they arrive, these as bytes, or the first message only."""
    is_open_to_all: bool = False
    """Whether it needs no token."""
