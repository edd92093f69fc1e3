"""The server's HTTP side: Open Inference Protocol v2, health, statistics, metrics and what people look at."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corewise import __version__
from corewise.batching import Answer, NotServed
from corewise.errors import CorewiseError
from corewise.serving import pages, protocol
from corewise.serving.metrics import CONTENT_TYPE, Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import InferRequest, ProtocolError
from corewise.serving.served import Served

log = logging.getLogger("corewise.serve")

EXTENSIONS = ("binary_tensor_data", "parameters", "statistics", "classify")
HEADER_LENGTH = "inference-header-content-length"
TIMEOUT = "x-request-timeout-ms"
REQUEST_ID = "x-request-id"
OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready")
"""A prober has no token."""
NOT_NOW = 503
LARGE_BYTES = 256 * 2**10
CLOSED_REQUEST = 499
"""As nginx says that the client is gone; nobody reads it but the log."""

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may be, before anything is allocated for it."""

    body_bytes: int = 64 * 2**20
    bodies_bytes: int = 512 * 2**20
    """Of all bodies that are coming in together."""
    body_s: float = 30.0
    """How long a body may take to come."""
    timeout_s: float = 60.0
    """For requests that name no time of their own."""


class App:
    """The routes of one server."""

    def __init__(self, models: Models, metrics: Metrics, limits: Limits, tokens: Sequence[str] = ()) -> None:
        self.models, self.metrics, self.limits = models, metrics, limits
        self._reading_bytes = 0
        """Of the bodies that are coming in."""
        routes = [
            Route("/", self.page),
            Route("/live.json", self.live_figures),
            Route("/docs", self.docs),
            Route("/openapi.json", self.openapi),
            Route("/metrics", self.text_metrics),
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/models/stats", self.all_statistics),
        ]
        for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(prefix, self.model),
                Route(f"{prefix}/ready", self.model_ready),
                Route(f"{prefix}/stats", self.model_statistics),
                Route(f"{prefix}/infer", self.infer, methods=["POST"]),
                Route(f"{prefix}/classify", self.classify, methods=["POST"]),
            ]
        handlers = {
            CorewiseError: self._told,
            ClientDisconnect: self._left,
            404: self._absent,
            405: self._absent,
            Exception: self._broken,
        }
        app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
        self.asgi = _Guard(app, tokens) if tokens else app

    # --- health and descriptions --------------------------------------------------------------------------------

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Every model is open, proven, warm and alive, and the server is not stopping."""
        ready = self.models.ready
        return JSONResponse({"ready": ready}, 200 if ready else NOT_NOW)

    async def server(self, request: Request) -> Response:
        """Who this is."""
        return JSONResponse({"name": "corewise", "version": __version__, "extensions": list(EXTENSIONS)})

    async def model(self, request: Request) -> Response:
        """A model's inputs and outputs."""
        served = self._served(request)
        return JSONResponse(
            {
                "name": served.name,
                "versions": self.models.versions(served.name),
                "platform": f"corewise_{served.manifest.build.engine}",
                "inputs": protocol.described(served.inputs),
                "outputs": protocol.described(served.outputs),
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """Whether a model answers."""
        served = self._served(request)
        return JSONResponse({"name": served.name, "ready": served.ready}, 200 if served.ready else NOT_NOW)

    async def model_statistics(self, request: Request) -> Response:
        """What became of a model's requests."""
        return JSONResponse({"model_stats": [statistics(self._served(request))]})

    async def all_statistics(self, request: Request) -> Response:
        """The same of all models."""
        return JSONResponse({"model_stats": [statistics(served) for served in self.models.served]})

    async def text_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        """For people."""
        return HTMLResponse(pages.LIVE, headers=pages.SAFE)

    async def live_figures(self, request: Request) -> Response:
        """What the page shows."""
        return JSONResponse({"ready": self.models.ready, "models": [pages.figures(one) for one in self.models.served]})

    async def docs(self, request: Request) -> Response:
        """How to call it."""
        return HTMLResponse(pages.docs(self.models.served), headers=pages.SAFE)

    async def openapi(self, request: Request) -> Response:
        """The same for programs."""
        return JSONResponse(pages.openapi(self.models.served))

    # --- inference ----------------------------------------------------------------------------------------------

    async def infer(self, request: Request) -> Response:
        """Run a model on tensors."""
        served = self._served(request)

        def read(body: bytes) -> InferRequest:
            asked = protocol.parse(body, _length(request), served.inputs, served.outputs, served.instead)
            return served.prepared(asked)

        served, asked, answer = await self._answered(request, served, read)
        named = {spec.name: array for spec, array in zip(served.outputs, answer.outputs, strict=True)}
        version = request.path_params.get("version")
        parts, json_length = protocol.render(served.name, version or served.version, asked, named)
        if json_length is None:
            return Response(parts[0], media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(json_length)}
        return Response(b"".join(parts), media_type="application/octet-stream", headers=headers)

    async def classify(self, request: Request) -> Response:
        """Name what is in one image, by the preprocessing that the artifact carries."""
        from corewise.serving import people

        served = self._served(request)
        top = people.how_many(request.query_params.get("top"))

        def read(body: bytes) -> InferRequest:
            return people.image(body, served)

        served, _, answer = await self._answered(request, served, read)
        return JSONResponse({"model_name": served.name, "classes": people.classes(answer.outputs[0][0], served, top)})

    async def _answered(
        self, request: Request, served: Served, read: Callable[[bytes], InferRequest]
    ) -> tuple[Served, InferRequest, Answer]:
        """Read a request and wait for its answer, unless the client goes before."""
        started_s, outcome = time.monotonic(), "failed"
        try:
            header_s = _timeout_s(request.headers)
            body = await self._body(request)
            # Large ones not in the loop, where all others would wait.
            asked = read(body) if len(body) < LARGE_BYTES else await asyncio.to_thread(read, body)
            given_s = min(header_s, asked.timeout_s or inf)
            timeout_s = self.limits.timeout_s if given_s == inf else given_s
            served, future = self.models.submit(
                served.name,
                served.version,
                asked.inputs,
                timeout_s=timeout_s - (time.monotonic() - started_s),
                priority=asked.priority,
            )
            answer = await _unless_gone(request, future)
            outcome = "ok"
        except ProtocolError:
            outcome = "invalid"
            raise
        except NotServed as refused:
            outcome = refused.reason
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            outcome = "cancelled"
            raise
        finally:
            self.metrics.ended(served.name, served.version, "http", outcome)
        self.metrics.answered(served.name, served.version, answer, time.monotonic() - started_s)
        return served, asked, answer

    async def _body(self, request: Request) -> bytes:
        """The body, within what all bodies together may have."""
        told = request.headers.get("content-length", "")
        size = int(told) if told.isascii() and told.isdecimal() and len(told) < 12 else self.limits.body_bytes
        size = min(size, self.limits.body_bytes)
        if self._reading_bytes and self._reading_bytes + size > self.limits.bodies_bytes:
            raise ProtocolError("too many large requests are being read", "try again later", NOT_NOW)
        self._reading_bytes += size
        try:
            return await _body(request, self.limits)
        finally:
            self._reading_bytes -= size

    def _served(self, request: Request) -> Served:
        return self.models.find(request.path_params["name"], request.path_params.get("version"))

    # --- errors -------------------------------------------------------------------------------------------------

    async def _told(self, request: Request, error: CorewiseError) -> Response:
        if isinstance(error, ProtocolError):
            return JSONResponse({"error": str(error)}, error.status)
        if isinstance(error, NotServed):
            status = 400 if error.reason == "too large" else NOT_NOW
            never = error.reason in ("too large", "too urgent")
            again = {} if never else {"Retry-After": str(max(1, ceil(error.retry_after_s or 0)))}
            return JSONResponse({"error": str(error)}, status, headers=again)
        return await self._broken(request, error)

    async def _left(self, request: Request, error: Exception) -> Response:
        return Response(status_code=CLOSED_REQUEST)

    async def _absent(self, request: Request, error: Any) -> Response:
        what = "there is nothing at this path" if error.status_code == 404 else "this path has another method"
        return JSONResponse({"error": f"{what}; see /docs"}, error.status_code, headers=error.headers)

    async def _broken(self, request: Request, error: Exception) -> Response:
        """What was not foreseen: the log says what it was, the answer only where to look."""
        name = str(request.scope.get("request_id", "?"))
        log.error("request %s failed: %r", name, error)
        what = "the call failed" if isinstance(error, CorewiseError) else "the server failed"
        return JSONResponse({"error": f"{what}; its log says why, at request {name}"}, 500)


def statistics(served: Served) -> dict[str, Any]:
    """As Triton's extension ``statistics`` has them; nanoseconds."""
    kept = served.statistics

    def spent(one: Any) -> dict[str, int]:
        return {"count": one.count, "ns": int(one.seconds * 1e9)}

    return {
        "name": served.name,
        "version": served.version,
        "last_inference": int(kept.last_s * 1e3),
        "inference_count": kept.rows,
        "execution_count": round(kept.calls),
        "inference_stats": {
            "success": spent(kept.success),
            "fail": spent(kept.fail),
            "queue": spent(kept.queue),
            "compute_infer": spent(kept.infer),
        },
    }


class _Guard:
    """Lets in who has a token, and everybody to the health checks."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] in OPEN_TO_ALL or self._known(scope):
            await self._app(scope, receive, send)
            return
        response = JSONResponse(
            {"error": "a token is missing or wrong; send Authorization: Bearer TOKEN"},
            401,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        return kind.lower() == b"bearer" and allowed(token, self._digests)


def allowed(token: bytes, digests: Sequence[bytes]) -> bool:
    """Whether it is one of those with these sha256; the time it takes tells nothing of them."""
    digest, found = hashlib.sha256(token.strip()).digest(), False
    for one in digests:
        found |= hmac.compare_digest(digest, one)
    return found


class RequestLog:
    """Gives each request an id, or keeps its own, and writes a line when it has its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"").decode("latin-1")
        name = given if 0 < len(given) <= protocol.MOST_ID and given.isprintable() else uuid.uuid4().hex
        scope["request_id"] = name
        started_s, status = time.monotonic(), 0

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), name.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            if log.isEnabledFor(logging.DEBUG):
                took_ms = round((time.monotonic() - started_s) * 1e3, 3)
                line = {"id": name, "method": scope["method"], "path": scope["path"], "status": status, "ms": took_ms}
                log.debug("%s", json.dumps(line))


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, unpacked. Raises ``ProtocolError`` where it is too large, too slow, or no such packing."""
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdecimal() and int(told[:20]) > limits.body_bytes:
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError as error:
        raise ProtocolError(f"the body did not come in {limits.body_s:g} s", status=408) from error
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    packing = request.headers.get("content-encoding", "identity").strip().lower()
    return body if packing == "identity" else _unpacked(body, packing, limits)


def _unpacked(body: bytes, packing: str, limits: Limits) -> bytes:
    if packing not in ("gzip", "deflate"):
        raise ProtocolError(f"the content encoding {packing[:20]!r} is unknown", "use gzip, deflate or none", 415)
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | (16 if packing == "gzip" else 0))
    try:
        found = unpacker.decompress(body, limits.body_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"the body is no {packing}: {error}") from error
    if len(found) > limits.body_bytes:
        raise _too_large(limits)
    if not unpacker.eof:
        raise ProtocolError(f"the body is no whole {packing}")
    return found


def _too_large(limits: Limits) -> ProtocolError:
    return ProtocolError(f"the body has more than {limits.body_bytes} bytes", "send less at a time", 413)


async def _unless_gone(request: Request, future: "Future[Answer]") -> Answer:
    """The future's answer; where the client goes before, the request gives up its place."""
    answer = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _length(request: Request) -> int | None:
    told = request.headers.get(HEADER_LENGTH)
    if told is None:
        return None
    if not (told.isascii() and told.isdecimal()) or len(told) > 12:
        raise ProtocolError("Inference-Header-Content-Length is no whole number")
    return int(told)


def _timeout_s(headers: Mapping[str, str]) -> float:
    told = headers.get(TIMEOUT)
    if told is None:
        return inf
    try:
        timeout_s = float(told) / 1e3
    except ValueError:
        timeout_s = 0.0
    if not isfinite(timeout_s) or timeout_s <= 0:
        raise ProtocolError(f"{TIMEOUT} is no number of milliseconds above 0")
    return timeout_s
