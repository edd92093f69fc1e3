"""Errors as HTTP tells them. Pure."""

from collections.abc import Sequence
from http import HTTPStatus
from math import ceil

import msgspec

from corewise.batching import NotServed
from corewise.common.errors import CorewiseError
from corewise.serving.protocol import ProtocolError

Headers = list[tuple[bytes, bytes]]

NOT_NOW = 503
NEVER = ("too large", "too urgent")
"""Refusals of requests that would be refused again."""


def told(error: CorewiseError) -> tuple[int, Headers, bytes] | None:
    """Status, headers and body of the answer to a request that was refused; ``None`` for what was not foreseen."""
    if isinstance(error, NotServed):
        status = 400 if error.reason == "too large" else NOT_NOW
        again = [] if error.reason in NEVER else [(b"retry-after", b"%d" % max(1, ceil(error.retry_after_s or 0)))]
        return plain(status, str(error), again)
    if isinstance(error, ProtocolError):
        return plain(error.status, str(error))
    return None


def plain(status: int, what: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> tuple[int, Headers, bytes]:
    """An answer that says what was wrong."""
    body = msgspec.json.encode({"error": what})
    return status, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers], body


def on_wire(status: int, headers: Headers, body: bytes) -> bytes:
    """An answer as HTTP/1.1 sends it."""
    lines = [b"HTTP/1.1 %d %b" % (status, HTTPStatus(status).phrase.encode()), *(b"%b: %b" % pair for pair in headers)]
    return b"\r\n".join((*lines, b"", body))
