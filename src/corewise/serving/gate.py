"""What is answered from a request's headers alone: health checks, and refusals of what has no room or no time.

These answers are written where the headers are read, before there is a task, a body, a router or an order of turns: a
health check waits for no other request, and a refusal costs a tenth of an answer. All that is not plain here (other
origins, tokens that are wrong, unknown models, old clients) goes the ordinary way, which answers the same. Headers that
come again, byte for byte, are not parsed again to be refused again.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from math import ceil, inf
from typing import NamedTuple

from corewise.batching import NotServed
from corewise.serving import protocol, refusals
from corewise.serving.front import Front
from corewise.serving.infer import TIMEOUT, timeout_s, unread_bytes
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

REQUEST_ID = b"x-request-id"
LIVE, READY = b"/v2/health/live", (b"/v2/health/ready", b"/health")
CALLS = re.compile(rb"/v2/models/([^/%?]+)(?:/versions/([^/%?]+))?/(?:infer|classify|detect)(?:\?|$)")
"""The paths that run a model that they name."""
MOST_UNREAD_BYTES = 2**20
"""Longer bodies are none of a crowd of small requests."""
END = b"\r\n\r\n"
NOT_NOW = b"503 Service Unavailable"
MOST_HEADS, LONGEST_BYTES = 256, 1024
"""Headers that are remembered; then they are forgotten together."""
HEALTH = b"HTTP/1.1 %b\r\ncontent-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b\r\n%b\r\n%b"

Headers = Sequence[tuple[bytes, bytes]]


class _Head(NamedTuple):
    """What a request's headers say that is refused again and again."""

    model: str
    version: str | None
    timeout_s: float
    body_bytes: int


class RequestIds:
    """The id of each request: its client's, or one of its own."""

    def __init__(self) -> None:
        self._prefix = os.urandom(8).hex()
        self._numbers = count()

    def of(self, headers: Headers) -> str:
        """The header ``x-request-id`` if it is one; else a new id."""
        for name, value in headers:
            if name == REQUEST_ID:
                given = value.decode("latin-1")
                if 0 < len(given) <= protocol.MOST_ID and given.isprintable():
                    return given
        return self.new()

    def new(self) -> str:
        """An id of its own."""
        return f"{self._prefix}{next(self._numbers):016x}"


class Gate:
    """Answers early, or lets in. Used from one event loop."""

    def __init__(
        self, models: Models, metrics: Metrics, limits: Limits, tokens: Tokens, front: Front, ids: RequestIds
    ) -> None:
        self._models, self._metrics, self._limits = models, metrics, limits
        self._tokens, self._front, self._ids = tokens, front, ids
        self._refusals: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        """By reason and seconds to wait: few, as no time to wait is longer than the longest deadline."""
        self._heads: dict[bytes, _Head] = {}
        """The heads of plain requests, by the bytes up to the empty line."""

    def answer(
        self, method: bytes, url: bytes, headers: Headers, *, client: str, arrived_s: float, stays_open: bool
    ) -> bytes | None:
        """The whole answer to a request of HTTP/1.1 with these headers (names in lower case), as it goes on the wire.

        ``None`` if it goes the ordinary way. ``stays_open`` is whether the client wants the connection to stay open.
        """
        if self._models.stopping or log.isEnabledFor(logging.DEBUG):  # whose answers, or lines, say more
            return None
        if method == b"GET":
            return self._health(url, headers, stays_open)
        if method != b"POST" or (found := CALLS.match(url)) is None:
            return None
        if not self._front.is_crowded(client):
            self._front.expect()
            return None
        given = dict(headers)
        head = self._head(found, given) if stays_open and self._is_plain(given) else None
        answer = None if head is None else self._refusal(head, self._ids.of(headers), client, arrived_s)
        if answer is None:
            self._front.expect()
        return answer

    def answer_again(self, data: bytes, *, client: str, arrived_s: float) -> bytes | None:
        """The same for bytes of a connection that waits for a request, if they are one that is known and refused."""
        if not self._front.is_crowded(client) or self._models.stopping or log.isEnabledFor(logging.DEBUG):
            return None
        end = data.find(END)
        head = self._heads.get(data[:end])
        if head is None or len(data) != end + len(END) + head.body_bytes:
            return None
        return self._refusal(head, self._ids.new(), client, arrived_s)

    def remember(self, data: bytes, url: bytes, headers: Headers) -> None:
        """Remember the headers of a request that was refused, and of which these are all bytes."""
        end, given, found = data.find(END), dict(headers), CALLS.match(url)
        head = None if found is None or REQUEST_ID in given else self._head(found, given)
        if head is not None and end <= LONGEST_BYTES and len(data) == end + len(END) + head.body_bytes:
            if len(self._heads) >= MOST_HEADS:
                self._heads.clear()
            self._heads[data[:end]] = head

    def _health(self, url: bytes, headers: Headers, stays_open: bool) -> bytes | None:
        if url != LIVE and url not in READY:
            return None
        if any(name in (b"origin", b"content-length", b"transfer-encoding") for name, _ in headers):
            return None
        what, good = (b"live", True) if url == LIVE else (b"ready", self._models.ready)
        body = b'{"%b":%b}' % (what, b"true" if good else b"false")
        more = b"" if stays_open else b"connection: close\r\n"
        length, name = len(body), self._ids.of(headers).encode("latin-1")
        return HEALTH % (b"200 OK" if good else NOT_NOW, length, name, more, body)

    def _is_plain(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a refusal has nothing more to say than that, and what is left of the request is short."""
        if self._tokens.are_needed and not self._tokens.admit(headers.get(b"authorization", b"")):
            return False
        return b"origin" not in headers and 0 < unread_bytes(headers) <= MOST_UNREAD_BYTES

    def _head(self, found: "re.Match[bytes]", headers: Mapping[bytes, bytes]) -> _Head | None:
        """What headers that are plain say; ``None`` if they are wrong."""
        try:
            header_s = timeout_s(headers.get(TIMEOUT))
            name, version = (None if part is None else part.decode("ascii") for part in found.groups())
        except (ProtocolError, UnicodeDecodeError):
            return None
        wait_s = self._limits.timeout_s if header_s == inf else header_s
        return _Head(name or "", version, wait_s, unread_bytes(headers))

    def _refusal(self, head: _Head, request_id: str, client: str, arrived_s: float) -> bytes | None:
        try:
            served = self._models.find(head.model, head.version)
        except ProtocolError:
            return None
        refused = self._front.refusal(client, arrived_s + head.timeout_s)
        if refused is None:
            return None
        served.statistics.not_served()
        self._metrics.count(served, "http", refused.reason, request_id)
        start, body = self._prepared(refused)
        return b"%b%b\r\n\r\n%b" % (start, request_id.encode("latin-1"), body)

    def _prepared(self, refused: NotServed) -> tuple[bytes, bytes]:
        """The answer up to its id, and its body."""
        key = (refused.reason, ceil(refused.retry_after_s or 0))
        if key not in self._refusals:
            told = refusals.told(refused)
            assert told is not None
            _, headers, body = told
            lines = [b"HTTP/1.1 " + NOT_NOW, *(b"%b: %b" % header for header in headers), REQUEST_ID + b": "]
            self._refusals[key] = b"\r\n".join(lines), body
        return self._refusals[key]
