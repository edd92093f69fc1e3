"""The way of an infer request over HTTP: plain ASGI before any router or middleware, as it is what a server does most.

What is done for a small request is counted in microseconds here. Its JSON head is looked up (``frames``), its answer
comes with those of its call in one wake-up of the event loop (``deliveries``), and no object is made that nobody reads.
"""

import logging
from collections.abc import Mapping
from math import inf, isfinite
from time import monotonic

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from corewise.batching import Answer
from corewise.common.errors import CorewiseError
from corewise.serving import addresses, bodies, json_body, refusals, triton
from corewise.serving.budget import Booking
from corewise.serving.frames import Headers
from corewise.serving.front import SMALL_TENSOR_BYTES, Front
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import VALUE_BYTES, InferRequest, Limits, ProtocolError
from corewise.serving.served import Served

log = logging.getLogger("corewise.serve")

HEADER_LENGTH = b"inference-header-content-length"
TIMEOUT = b"x-request-timeout-ms"
PATH = "/v2/models/"
CLOSED_REQUEST = 499
"""As nginx says that the client is gone; nobody reads it but the log."""
LARGE_BYTES = 2**16
"""From this size on a body costs something to read."""
ARRIVED, WHOLE, GONE = "corewise.arrived_s", "corewise.whole", "corewise.gone"
"""What the server's protocol adds to a scope: when a request's first byte arrived, on the monotonic clock; whether its
last has; and what waits for the client (``Waiters``)."""


def target(scope: Scope) -> dict[str, str] | None:
    """Name and version, if it has one, of the model that a request wants to run on tensors; ``None`` for others."""
    path: str = scope["path"]
    if scope["method"] != "POST" or not path.endswith("/infer") or not path.startswith(PATH):
        return None
    match path[len(PATH) :].split("/"):
        case [name, "infer"] if name:
            return {"name": name}
        case [name, "versions", version, "infer"] if name and version:
            return {"name": name, "version": version}
    return None


class Infer:
    """Runs models on tensors."""

    def __init__(self, models: Models, metrics: Metrics, limits: Limits, front: Front) -> None:
        self._models, self._metrics, self._limits, self._front = models, metrics, limits, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it; the model is in ``path_params``."""
        answered = None
        try:
            headers, body, answered = await self._answer(scope, receive)
            status = 200
        except ClientDisconnect:
            status, headers, body = CLOSED_REQUEST, [(b"content-length", b"0")], b""
        except CorewiseError as error:
            status, headers, body = self._told(error, scope)
        except Exception as error:  # noqa: BLE001 - the request boundary: the log says what it was
            status, headers, body = broken(error, scope)
        if answered is not None:  # not when it is read: slow readers are no reason to refuse others
            self._front.note_sent(*answered)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[Headers, bytes, tuple[Answer, float]]:
        """Headers and body of the answer, with what is noted when it is sent."""
        version = scope["path_params"].get("version")
        served = self._models.find(scope["path_params"]["name"], version)
        given = dict(scope["headers"])
        traced = _texts(given) if self._metrics.is_traced else {}
        client = client_of(scope)
        front = self._front
        arrived_s: float = scope.get(ARRIVED) or monotonic()
        with (
            self._metrics.request(served, "http", traced, scope.get("request_id", ""), arrived_s) as note,
            front.booking(client) as booking,
        ):
            header_s = timeout_s(given.get(TIMEOUT))
            deadline_s = arrived_s + (self._limits.timeout_s if header_s == inf else header_s)
            length = head_bytes(given.get(HEADER_LENGTH))
            with front.place(client, served):
                if not scope.get(WHOLE) and unread_bytes(given) > LARGE_BYTES:
                    front.check_queue(served, deadline_s)
                body = await self._body(scope, receive, given, booking)
                await front.turn(deadline_s, served, scope.get(GONE))
                asked = served.frames.known(body, length)
                if asked is None:
                    asked = await self._parsed(body, length, served, deadline_s)
                asked = await front.prepare(asked, served, client=client, deadline_s=deadline_s)
            booking.cover(asked.inputs)
            if asked.timeout_s is not None:
                deadline_s = arrived_s + min(header_s, asked.timeout_s)
            asked_s = monotonic()
            served, answer = await front.ask(self._models, served, asked, deadline_s, scope.get(GONE))
            note(answer)
            data, headers = await self._rendered(served, version or served.version, asked, answer)
        return headers, data, (answer, asked_s)

    async def _body(self, scope: Scope, receive: Receive, given: Mapping[bytes, bytes], booking: Booking) -> bytes:
        """The whole body; without a timeout or an unpacker if it is there as it is."""
        if not scope.get(WHOLE) or b"content-encoding" in given:
            return await bodies.read(Request(scope, receive), self._limits, booking)
        return await bodies.whole(receive, self._limits, booking)

    async def _parsed(self, body: bytes, length: int | None, served: Served, deadline_s: float) -> InferRequest:
        text_bytes = len(body) if length is None else min(length, len(body))
        asked = await self._front.read(
            lambda: json_body.parse(body, length, served.inputs, served.outputs, served.instead),
            text_bytes,
            len(body) - text_bytes,
            deadline_s=deadline_s,
        )
        served.frames.remember(body, length, asked)
        return asked

    async def _rendered(
        self, served: Served, version: str, asked: InferRequest, answer: Answer
    ) -> tuple[bytes, Headers]:
        """The body of the answer and its headers; a large one is put together beside the event loop."""
        is_small = answer.size_bytes <= SMALL_TENSOR_BYTES
        if is_small and (found := served.frames.render(served.name, version, asked, answer.outputs)) is not None:
            return found
        named = {spec.name: array for spec, array in zip(served.outputs, answer.outputs, strict=True)}
        classes = asked.class_counts

        def render() -> tuple[bytes, int | None]:
            outputs = triton.classified(classes, named, served.manifest.labels)
            parts, json_length = json_body.render(served.name, version, asked, outputs)
            return b"".join(parts), json_length

        values = sum(named[output.name].size for output in asked.outputs if not output.binary)
        text_bytes = VALUE_BYTES * values + triton.class_bytes(classes, named)
        data, json_length = await self._front.read(render, text_bytes, answer.size_bytes, deadline_s=AT_ONCE)
        kind = b"application/json" if json_length is None else b"application/octet-stream"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(data))]
        if json_length is not None:
            headers.append((HEADER_LENGTH, b"%d" % json_length))
        return data, headers

    def _told(self, error: CorewiseError, scope: Scope) -> tuple[int, Headers, bytes]:
        if isinstance(error, ProtocolError) and error.status == 404:
            self._metrics.turned_away("http", "unknown model")
        return refusals.told(error) or broken(error, scope)


def _texts(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}


def broken(error: Exception, scope: Scope) -> tuple[int, Headers, bytes]:
    """What was not foreseen: the log says what it was, the answer only where to look."""
    name = str(scope.get("request_id", "?"))
    log.error("request %s failed: %r", name, error, exc_info=None if isinstance(error, CorewiseError) else error)
    what = "the call failed" if isinstance(error, CorewiseError) else "the server failed"
    return refusals.plain(500, f"{what}; the server's log says why, at request {name}")


def client_of(scope: Scope) -> str:
    """The client (``addresses.client_of``); nothing for a unix socket."""
    return addresses.client_of(scope["client"][0]) if scope.get("client") else ""


def unread_bytes(headers: Mapping[bytes, bytes]) -> int:
    """How many bytes of body a refusal would save to read; 0 where that is not known.

    A client that sends ``Expect: 100-continue`` gets to send its body: after a refusal nobody knows whether it still
    comes.
    """
    told = headers.get(b"content-length", b"")
    return int(told) if told.isdigit() and len(told) < 16 and b"expect" not in headers else 0


def head_bytes(told: bytes | None) -> int | None:
    """The length of the JSON part. Raises ``ProtocolError``."""
    if told is None:
        return None
    if not told.isdigit() or len(told) > 12:
        raise ProtocolError("Inference-Header-Content-Length is not a whole number")
    return int(told)


def timeout_s(told: bytes | None) -> float:
    """How long a request may take; infinite where it does not say. Raises ``ProtocolError``."""
    if told is None:
        return inf
    try:
        seconds = float(told) / 1e3
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or seconds <= 0:
        raise ProtocolError(f"{TIMEOUT.decode()} is not a number of milliseconds above 0")
    return seconds
