"""The server's HTTP side: Open Inference Protocol v2, health, statistics, metrics and what people look at."""

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from math import inf
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corewise._version import __version__
from corewise.batching import Answer
from corewise.common.errors import CorewiseError
from corewise.serving import bodies, pages, protocol, refusals, triton
from corewise.serving.front import Front
from corewise.serving.gate import REQUEST_ID, RequestIds
from corewise.serving.infer import (
    ARRIVED,
    CLOSED_REQUEST,
    GONE,
    TIMEOUT,
    Infer,
    broken,
    client_of,
    target,
    timeout_s,
    unread_bytes,
)
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.metrics import CONTENT_TYPE, Metrics
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import InferRequest, Limits, NoRoom, ProtocolError
from corewise.serving.served import Served
from corewise.serving.text_routes import TextRoutes, error_body
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

OPEN_TO_ALL = ("/v2/health/live", "/v2/health/ready", "/health")
"""A prober has no token."""
NOT_NOW = refusals.NOT_NOW


class App:
    """The routes of one server."""

    def __init__(self, models: Models, metrics: Metrics, limits: Limits, tokens: Tokens, front: Front) -> None:
        self.models, self.metrics = models, metrics
        self._limits, self._front = limits, front
        infer = Infer(models, metrics, limits, front)
        routes = [
            Route("/", self.page),
            Route("/live.json", self.live_figures),
            Route("/docs", self.docs),
            Route("/openapi.json", self.openapi),
            Route("/metrics", self.text_metrics),
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/health", self.ready),
            Route("/v2/models/stats", self.all_statistics),
        ]
        for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            routes += [
                Route(prefix, self.model),
                Route(f"{prefix}/ready", self.model_ready),
                Route(f"{prefix}/stats", self.model_statistics),
                Route(f"{prefix}/config", self.model_config),
                Route(f"{prefix}/infer", infer, methods=["POST"]),
                Route(f"{prefix}/classify", self.classify, methods=["POST"]),
                Route(f"{prefix}/detect", self.detect, methods=["POST"]),
            ]
        texts = TextRoutes(models, metrics, limits, front, told=self._told, deadline_s=self._deadline_s)
        routes += texts.routes
        handlers = {
            CorewiseError: self._told,
            ClientDisconnect: self._left,
            404: self._absent,
            405: self._absent,
            Exception: self._broken,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False  # its redirects go to whatever the header Host says
        self.asgi = _Guard(app, infer, texts.posts, tokens, metrics)

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
        return JSONResponse({"name": "corewise", "version": __version__, "extensions": list(protocol.EXTENSIONS)})

    async def model(self, request: Request) -> Response:
        """A model's inputs and outputs."""
        served = self._served(request)
        return JSONResponse(
            {
                "name": served.name,
                "versions": self.models.versions(served.name),
                "platform": f"corewise_{served.manifest.build.engine}",
                "inputs": served.described_inputs(),
                "outputs": protocol.described(served.outputs),
            }
        )

    async def model_ready(self, request: Request) -> Response:
        """Whether a model answers."""
        served = self._served(request)
        return JSONResponse({"name": served.name, "ready": served.ready}, 200 if served.ready else NOT_NOW)

    async def model_statistics(self, request: Request) -> Response:
        """What became of a model's requests."""
        return JSONResponse({"model_stats": [self._served(request).described_statistics()]})

    async def model_config(self, request: Request) -> Response:
        """A model's configuration, as Triton has it."""
        return JSONResponse(triton.config(self._served(request)))

    async def all_statistics(self, request: Request) -> Response:
        """The same of all models."""
        return JSONResponse({"model_stats": [served.described_statistics() for served in self.models.served]})

    async def text_metrics(self, request: Request) -> Response:
        """The metrics, for Prometheus."""
        text = await self._front.tell("metrics", self.metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def page(self, request: Request) -> Response:
        """The live page, for a browser."""
        return HTMLResponse(pages.LIVE, headers=pages.SAFE)

    async def live_figures(self, request: Request) -> Response:
        """What the page shows."""
        since = pages.since(request.query_params.get("since", ""))
        content = await self._front.tell(("live", since), lambda: pages.live(self.models, since))
        return Response(content, media_type="application/json")

    async def docs(self, request: Request) -> Response:
        """How to call it."""
        page = await self._front.tell("docs", lambda: pages.docs(self.models.served))
        return HTMLResponse(page, headers=pages.SAFE)

    async def openapi(self, request: Request) -> Response:
        """The same for programs."""
        content = await self._front.tell("openapi", lambda: pages.openapi(self.models.served))
        return Response(content, media_type="application/json")

    # --- inference ----------------------------------------------------------------------------------------------

    async def classify(self, request: Request) -> Response:
        """Name what is in one image or recording, by the preprocessing that the artifact carries."""
        from corewise.serving import images

        served = self._served(request)
        top = images.how_many(request.query_params.get("top"))
        images.check_classes(served)
        async with self._file_answered(request, served) as (served, answer, _, note):
            content = {"model_name": served.name, "classes": images.classes(answer.outputs[0][0], served, top)}
        return _Noted(content, note)

    async def detect(self, request: Request) -> Response:
        """Find the objects in one image, with boxes in its own pixels."""
        from corewise.serving import images

        served, query = self._served(request), request.query_params
        asked = images.thresholds(query.get("score_threshold"), query.get("iou_threshold"), served)
        async with self._file_answered(request, served) as (served, answer, (width, height), note):
            # Thousands of boxes take milliseconds, in which the event loop answers others.
            found = await self._front.compute(
                lambda: images.objects(answer.outputs, served, (width, height), asked),
                1,
                kind="boxes",
                deadline_s=AT_ONCE,
            )
        content = {"model_name": served.name, "width": width, "height": height, "objects": found}
        return _Noted(content, note)

    @asynccontextmanager
    async def _file_answered(
        self, request: Request, served: Served
    ) -> AsyncIterator[tuple[Served, Answer, tuple[int, int], Callable[[], None]]]:
        """The model's outputs for the image or recording of a request, in any form, and an image's width and height.

        Also what to call before the answer is sent. What the request holds is booked until the ``async with``
        ends.
        """
        from corewise.serving import files

        key = "image" if served.audio is None else "audio"
        kind = request.headers.get("content-type", "")
        client = client_of(request.scope)
        size = (0, 0)

        def check(size_bytes: int, deadline_s: float) -> None:
            self._front.check_file(size_bytes, served, deadline_s)

        async def read(body: bytes, deadline_s: float) -> InferRequest:
            nonlocal size
            if files.wrapped(body, kind):
                body = await self._front.read(lambda: files.content(body, kind, key), len(body), deadline_s=deadline_s)
            asked, size = await self._front.file(body, served, client=client, deadline_s=deadline_s)
            return asked

        async with self._answered(request, served, read, check) as (answering, answer, asked_s):
            yield answering, answer, size, lambda: self._front.note_sent(answer, asked_s)

    @asynccontextmanager
    async def _answered(
        self,
        request: Request,
        served: Served,
        read: Callable[[bytes, float], Awaitable[InferRequest]],
        check: Callable[[int, float], None],
    ) -> AsyncIterator[tuple[Served, Answer, float]]:
        """Read a request and wait for its answer, unless the client goes before. Its time counts from its arrival.

        ``check`` may refuse it by its size, before its body is read. Yields which model answered, its answer, and when
        the request joined the model's queue; until the ``async with`` ends, the answer is booked as the request was.
        """
        scope, client = request.scope, client_of(request.scope)
        name, arrived_s = scope.get("request_id", ""), scope.get(ARRIVED)
        with (
            self.metrics.request(served, "http", request.headers, name, arrived_s) as note,
            self._front.booking(client) as booking,
        ):
            deadline_s = self._deadline_s(request)
            with self._front.place(client, served):
                if size_bytes := unread_bytes(dict(scope["headers"])):
                    check(size_bytes, deadline_s)
                body = await bodies.read(request, self._limits, booking)
                await self._front.turn(deadline_s, served, scope.get(GONE))
                asked = await read(body, deadline_s)
            booking.cover(asked.inputs)
            asked_s = time.monotonic()
            served, answer = await self._front.ask(self.models, served, asked, deadline_s, scope.get(GONE))
            booking.cover(answer.outputs)
            note(answer)
            yield served, answer, asked_s

    def _deadline_s(self, request: Request) -> float:
        """When a request's answer is due by its header, or by the server's own limit."""
        header_s = timeout_s(dict(request.scope["headers"]).get(TIMEOUT))
        arrived_s: float = request.scope.get(ARRIVED) or time.monotonic()
        return arrived_s + (self._limits.timeout_s if header_s == inf else header_s)

    def _served(self, request: Request) -> Served:
        return self.models.find(request.path_params["name"], request.path_params.get("version"))

    # --- errors -------------------------------------------------------------------------------------------------

    async def _told(self, request: Request, error: CorewiseError) -> Response:
        if isinstance(error, ProtocolError) and error.status == 404:
            self.metrics.turned_away("http", "unknown model")
        told = refusals.told(error)
        return await self._broken(request, error) if told is None else _Plain(*told)

    async def _left(self, request: Request, error: Exception) -> Response:
        return Response(status_code=CLOSED_REQUEST)

    async def _absent(self, request: Request, error: Any) -> Response:
        path = request.scope["path"]
        if error.status_code == 404 and path.endswith("/") and not path.startswith(("//", "/\\")):
            query = request.scope["query_string"].decode("latin-1")
            return RedirectResponse(path.rstrip("/") + (f"?{query}" if query else ""))
        self.metrics.turned_away("http", "unknown path" if error.status_code == 404 else "unknown method")
        what = "there is nothing at this path" if error.status_code == 404 else "this path has another method"
        content = error_body(path, f"{what}; see /docs", error.status_code)
        return JSONResponse(content, error.status_code, headers=error.headers)

    async def _broken(self, request: Request, error: Exception) -> Response:
        return _Plain(*broken(error, request.scope))


class _Plain(Response):
    """A response as it is."""

    def __init__(self, status: int, headers: refusals.Headers, body: bytes) -> None:
        super().__init__(body, status)
        self.raw_headers = list(headers)


class _Noted(JSONResponse):
    """A response of which something is noted before it is sent."""

    def __init__(self, content: Any, note: Callable[[], None]) -> None:
        super().__init__(content)
        self._note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        self._note()  # not when it is read: slow readers are no reason to refuse others
        await super().__call__(scope, receive, send)


class _Guard:
    """Lets in who has a token, and everybody to the health checks. Requests that run a model go past the router."""

    def __init__(
        self, app: ASGIApp, infer: ASGIApp, texts: Mapping[str, ASGIApp], tokens: Tokens, metrics: Metrics
    ) -> None:
        """``texts`` answers POST, by path."""
        self._app, self._infer, self._texts, self._tokens, self._metrics = app, infer, texts, tokens, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if self._tokens.are_needed and scope["path"] not in OPEN_TO_ALL:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not self._tokens.admit(given):
                await self._turn_away(scope, receive, send)
                return
        if scope["method"] == "POST" and (answer := self._texts.get(scope["path"])) is not None:
            await answer(scope, receive, send)
        elif (model := target(scope)) is not None:
            scope["path_params"] = model
            await self._infer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.turned_away("http", "unauthenticated")
        response = JSONResponse(
            error_body(scope["path"], "a token is missing or wrong; send Authorization: Bearer TOKEN", 401),
            401,
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)


class RequestLog:
    """Gives each request an id, or keeps its own, and writes a line when it has its answer.

    While the server stops, each answer ends its connection: the client's next request goes elsewhere. A large answer is
    booked until its client has read it.
    """

    def __init__(self, app: ASGIApp, models: Models, ids: RequestIds, front: Front) -> None:
        self._app, self._models, self._ids, self._front = app, models, ids, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        name = scope["request_id"] = self._ids.of(scope["headers"])
        started_s, status = time.monotonic(), 0
        start: Any = None
        # Clients of HTTP/1.0 expect the server to confirm that the connection stays open.
        is_kept = (
            scope["http_version"] == "1.0" and b"keep-alive" in dict(scope["headers"]).get(b"connection", b"").lower()
        )

        async def told(message: Any) -> None:
            nonlocal start, status
            if message["type"] == "http.response.start":
                status, start = message["status"], message
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, name.encode("latin-1"))]
                if self._models.stopping:
                    message["headers"].append((b"connection", b"close"))
                elif is_kept:
                    message["headers"].append((b"connection", b"keep-alive"))
            elif len(message.get("body", b"")) > LARGE_ANSWER_BYTES:
                status = await self._send_large(client_of(scope), start, message["body"], send)
            else:
                await send(start)
                await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            if log.isEnabledFor(logging.DEBUG):
                took_ms = round((time.monotonic() - started_s) * 1e3, 3)
                line = {"id": name, "method": scope["method"], "path": scope["path"], "status": status, "ms": took_ms}
                log.debug("%s", json.dumps(line))

    async def _send_large(self, client: str, start: Any, body: bytes, send: Send) -> int:
        """Send an answer, booked until its client has read nearly all of it, if there is room; the status sent."""
        with self._front.booking(client) as booking:
            try:
                booking.add(answer_bytes(len(body)))
            except NoRoom as error:
                status, headers, why = refusals.plain(error.status, str(error))
                kept = [each for each in start["headers"] if each[0] in (REQUEST_ID, b"connection")]
                await send({**start, "status": status, "headers": [*headers, *kept]})
                await send({"type": "http.response.body", "body": why})
                return status
            await send(start)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            # uvicorn takes the next part when the client has read nearly all of this one.
            await send({"type": "http.response.body", "body": b""})
            return int(start["status"])
