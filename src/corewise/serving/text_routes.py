"""The paths for texts: OpenAI's, Text Embeddings Inference's, and ``/v1/rerank``.

A path exists if a served model's pipeline fits it. Which model: the request's ``model``, else the only one that fits.
Requests go past Starlette's router and its middleware, as those for inference do: both cost as much as a short text.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corewise._version import __version__
from corewise.common.errors import CorewiseError
from corewise.records.pipeline import Activation, TextTask
from corewise.serving import bodies, openai, rerank, tei, texts
from corewise.serving.budget import Booking
from corewise.serving.deliveries import Waiters
from corewise.serving.front import Front
from corewise.serving.infer import ARRIVED, CLOSED_REQUEST, GONE, WHOLE, broken, client_of
from corewise.serving.memory_limit import COPIES
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import VALUE_BYTES, Limits
from corewise.serving.served import Served
from corewise.serving.text import TextInput
from corewise.serving.text_calls import CALL_TOKENS, TextAnswer, TextCalls
from corewise.serving.text_models import ANY, CLASSIFY, TextModels, check_token_vectors, check_vectors, task_of
from corewise.serving.texts import FieldError, TextRequest

RESULT_BYTES = 64
"""About what one text's score or class takes in JSON."""
PIECE_BYTES = 600
"""What a token takes while it is described, with its text and its JSON; each byte of a text may be one."""
OPENAI_PATHS = ("/v1/embeddings", "/embeddings")
RERANK_PATHS = ("/v1/rerank", "/v2/rerank")
TEI_PATHS = ("/embed", "/embed_all", "/similarity", "/rerank", "/predict", "/tokenize", "/decode", "/info")

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
Shape = Callable[[str, int, str | None], dict[str, Any]]
"""An API's error body, of a message, a status, and the field that is wrong."""
Told = Callable[[Request, CorewiseError], Awaitable[Response]]


class Asked(Protocol):
    """What the requests of all APIs have."""

    @property
    def model(self) -> str | None:
        """The model that is named."""

    @property
    def texts(self) -> TextRequest:
        """What is asked about."""


A = TypeVar("A", bound=Asked)


class TextRoutes:
    """The routes, and what they answer."""

    def __init__(
        self,
        models: Models,
        metrics: Metrics,
        limits: Limits,
        front: Front,
        *,
        told: Told,
        deadline_s: Callable[[Request], float],
    ) -> None:
        """``told`` makes the response to an error on all other paths; each API here gives it a shape of its own.

        ``deadline_s`` is when a request's answer is due, on the monotonic clock.
        """
        self._models, self._metrics, self._front = TextModels(models), metrics, front
        self._limits = replace(limits, body_bytes=min(limits.body_bytes, texts.BODY_BYTES))
        self._told, self._deadline_s = told, deadline_s
        self._calls = TextCalls(models, front)

        by_shape: dict[Shape, dict[str, Handler]] = {
            _openai_error: dict.fromkeys(OPENAI_PATHS, self.embeddings),
            _rerank_error: dict.fromkeys(RERANK_PATHS, self.rerank),
            _tei_error: {
                "/": self.root,
                "/embed": self.embed,
                "/embed_all": self.embed_all,
                "/similarity": self.similarity,
                "/rerank": self.rank,
                "/predict": self.predict,
                "/tokenize": self.tokenize,
                "/decode": self.decode,
            },
        }
        self.posts: dict[str, ASGIApp] = {
            path: _Shaped(handler, shape, told)
            for shape, handlers in by_shape.items()
            for path, handler in handlers.items()
        }
        """What answers POST, by path."""

    @property
    def routes(self) -> list[Route]:
        """For the server's app, which knows by them what else there is at these paths."""
        gets: list[tuple[str, Handler, Shape]] = [
            ("/v1/models", self.list_models, _openai_error),
            ("/v1/models/{name}", self.describe_model, _openai_error),
            ("/info", self.info, _tei_error),
        ]
        return [
            *(Route(path, answer, methods=["POST"]) for path, answer in self.posts.items()),
            *(Route(path, _Shaped(handler, shape, self._told), methods=["GET"]) for path, handler, shape in gets),
        ]

    # --- OpenAI -------------------------------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        """Texts or token ids to vectors."""

        def parse(body: bytes) -> openai.EmbeddingsRequest:
            asked = openai.parse(body)
            check_vectors(self._models.chosen(asked.model, "vectors"), asked.dimensions)
            return asked

        async with self._answered(request, parse, "vectors") as (served, asked, answer):

            def render() -> bytes:
                vectors = _vectors(answer, asked.dimensions)
                return openai.render(asked, asked.model or served.name, vectors, answer.tokens)

            return await self._rendered(render, _values(answer) * VALUE_BYTES)

    async def list_models(self, request: Request) -> Response:
        """All models, by name."""
        return JSONResponse({"object": "list", "data": [_entry(served) for served in self._models.newest()]})

    async def describe_model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(_entry(self._models.named(request.path_params["name"])))

    # --- Cohere and Jina ----------------------------------------------------------------------------------------

    async def rerank(self, request: Request) -> Response:
        """Documents in the order in which they answer a query."""
        name = _request_id(request)
        answered = self._answered(request, rerank.parse, "scores", activation="sigmoid")
        async with answered as (served, asked, answer):

            def render() -> bytes:
                return rerank.render(asked, asked.model or served.name, name, np.array(answer.answers), answer.tokens)

            return await self._rendered(render, len(asked.texts) * RESULT_BYTES)

    # --- Text Embeddings Inference ------------------------------------------------------------------------------

    async def root(self, request: Request) -> Response:
        """What the only model does, as Hugging Face's endpoints have it."""
        served = self._models.chosen(None, *ANY)
        assert served.text is not None
        task = task_of(served.text)
        if task == "vectors":
            has_vectors = len(served.outputs[0].shape) == 2
            return await (self._embedded(request, tei.embed_or_compare) if has_vectors else self.embed_all(request))
        return await (self.rank(request) if task == "scores" else self.predict(request))

    async def embed(self, request: Request) -> Response:
        """Texts to vectors."""
        return await self._embedded(request, tei.embed)

    async def similarity(self, request: Request) -> Response:
        """Cosines of a sentence with others."""
        return await self._embedded(request, tei.similarity)

    async def _embedded(self, request: Request, read: Callable[[bytes], tei.EmbedRequest]) -> Response:
        def parse(body: bytes) -> tei.EmbedRequest:
            asked = read(body)
            served = self._models.chosen(asked.model, "vectors")
            check_vectors(served, asked.dimensions)
            if not asked.normalize and served.text is not None and served.text.pipeline.normalize:
                raise FieldError("normalize", f"the model {served.name} normalizes its vectors itself", "give true")
            return asked

        async with self._answered(request, parse, "vectors") as (_, asked, answer):

            def render() -> bytes:
                vectors = _vectors(answer, asked.dimensions)
                if asked.is_similarity:
                    return tei.render_similarities(vectors)
                return tei.render_vectors(texts.normalized(vectors) if asked.normalize else vectors)

            return await self._rendered(render, _values(answer) * VALUE_BYTES)

    async def embed_all(self, request: Request) -> Response:
        """Texts to a vector for each token."""

        def parse(body: bytes) -> tei.EmbedRequest:
            asked = tei.embed(body)
            check_token_vectors(self._models.chosen(asked.model, "vectors"), asked.dimensions)
            return asked

        async with self._answered(request, parse, "vectors") as (_, _, answer):
            return await self._rendered(lambda: tei.render_token_vectors(answer.answers), _values(answer) * VALUE_BYTES)

    async def rank(self, request: Request) -> Response:
        """Texts in the order in which they answer a query."""

        def activation(asked: tei.RankRequest) -> Activation:
            return "none" if asked.raw_scores else "sigmoid"

        async with self._answered(request, tei.rank, "scores", activation=activation) as (_, asked, answer):
            return await self._rendered(
                lambda: tei.render_ranks(asked, np.array(answer.answers)), len(asked.texts) * RESULT_BYTES
            )

    async def predict(self, request: Request) -> Response:
        """Texts to classes or entities."""

        def parse(body: bytes) -> tei.PredictRequest:
            return tei.predict(body, pairs=lambda model: self._models.pairs(model, *CLASSIFY))

        def activation(asked: tei.PredictRequest) -> Activation | None:
            return asked.activation

        async with self._answered(request, parse, *CLASSIFY, activation=activation) as (served, asked, answer):
            labels = () if served.text is None else served.text.pipeline.labels
            return await self._rendered(
                lambda: tei.render_predictions(asked, answer.answers, labels),
                len(asked.texts) * max(1, len(labels)) * RESULT_BYTES,
            )

    async def tokenize(self, request: Request) -> Response:
        """Texts to tokens."""

        def render(asked: tei.TokenizeRequest, text: TextInput) -> bytes:
            return tei.render_tokens(text.described(asked.items, asked.add_special_tokens, asked.prompt))

        return await self._by_tokenizer(request, tei.tokenize, render)

    async def decode(self, request: Request) -> Response:
        """Token ids to texts."""

        def render(asked: tei.DecodeRequest, text: TextInput) -> bytes:
            return msgspec.json.encode(text.decoded(asked.ids, asked.skip_special_tokens))

        return await self._by_tokenizer(request, tei.decode_ids, render)

    async def _by_tokenizer(
        self, request: Request, parse: Callable[[bytes], Any], render: Callable[[Any, TextInput], bytes]
    ) -> Response:
        """What the tokenizer alone answers, without the model."""
        name, deadline_s = _request_id(request), self._deadline_s(request)
        with self._front.booking(client_of(request.scope)) as booking:
            with self._metrics.unnamed_request("http", name):
                body = await self._body(request, texts.TOKENIZED_BYTES, booking, deadline_s)
                asked = await self._front.read(lambda: parse(body), len(body), deadline_s=deadline_s)
                served = self._models.chosen(asked.model, *ANY)
            text = served.text
            assert text is not None
            with self._metrics.tokenizer_request(served, name):
                booking.add(PIECE_BYTES * len(body) // COPIES)
                content = await self._front.compute(
                    lambda: render(asked, text), len(body), deadline_s=deadline_s, kind="pieces"
                )
        return Response(content, media_type="application/json")

    async def info(self, request: Request) -> Response:
        """What the only model is."""
        served = self._models.chosen(request.query_params.get("model"), *ANY)
        assert served.text is not None
        return JSONResponse(
            tei.info(
                served.name,
                served.manifest.model,
                served.manifest.build.precision,
                served.text.pipeline,
                version=__version__,
                batch=served.plan.batch,
                tokens=CALL_TOKENS,
                requests=self._front.most_requests,
                tokenizers=self._front.threads,
            )
        )

    # --- from a request to its answer -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _answered(
        self,
        request: Request,
        parse: Callable[[bytes], A],
        *tasks: TextTask,
        activation: Activation | Callable[[A], Activation | None] | None = None,
    ) -> AsyncIterator[tuple[Served, A, TextAnswer]]:
        """Read a request and wait for its answer, unless the client goes before; booked until the ``with`` ends."""
        deadline_s = self._deadline_s(request)
        client = client_of(request.scope)
        with self._front.booking(client) as booking, ExitStack() as place:
            # Which model is asked is in the body, so the place is none of a certain model.
            name = _request_id(request)
            with self._metrics.unnamed_request("http", name):
                place.enter_context(self._front.place(client))
                body = await _read(request, self._limits, booking)
                await self._front.turn(deadline_s, gone=request.scope.get(GONE))
                asked = await self._front.read(lambda: parse(body), len(body), deadline_s=deadline_s)
                served = self._models.chosen(asked.model, *tasks)
            headers = request.headers if self._metrics.is_traced else {}
            with self._metrics.request(served, "http", headers, name, request.scope.get(ARRIVED)) as note:
                chosen = activation(asked) if callable(activation) else activation
                work = self._calls.run(
                    served,
                    asked.texts,
                    booking,
                    deadline_s=deadline_s,
                    activation=chosen,
                    on_tokenized=place.close,
                )
                answer = await _unless_gone(request, work)
                note(answer.calls)
            yield served, asked, answer

    async def _body(self, request: Request, most_bytes: int, booking: Booking, deadline_s: float) -> bytes:
        limits = replace(self._limits, body_bytes=min(self._limits.body_bytes, most_bytes))
        with self._front.place(client_of(request.scope)):
            body = await _read(request, limits, booking)
            await self._front.turn(deadline_s, gone=request.scope.get(GONE))
        return body

    async def _rendered(self, render: Callable[[], bytes], size_bytes: int) -> Response:
        return Response(await self._front.read(render, size_bytes, deadline_s=AT_ONCE), media_type="application/json")


class _Shaped:
    """What answers at one path, with errors as its API has them; as ASGI has it."""

    def __init__(self, handler: Handler, shape: Shape, told: Told) -> None:
        self._handler, self._shape, self._told = handler, shape, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        request = Request(scope, receive)
        try:
            response = await self._handler(request)
        except ClientDisconnect:
            response = Response(status_code=CLOSED_REQUEST)
        except CorewiseError as error:
            told = await self._told(request, error)
            headers = {"retry-after": told.headers["retry-after"]} if "retry-after" in told.headers else {}
            field = error.field if isinstance(error, FieldError) else None
            response = self._error(bytes(told.body), told.status_code, field, headers)
        except Exception as error:  # noqa: BLE001 - the request boundary: the log says what it was
            status, _, body = broken(error, scope)
            response = self._error(body, status, None, {})
        await response(scope, receive, send)

    def _error(self, body: bytes, status: int, field: str | None, headers: Mapping[str, str]) -> Response:
        return JSONResponse(self._shape(json.loads(body)["error"], status, field), status, headers)


def error_body(path: str, message: str, status: int) -> dict[str, Any]:
    """An error's body as the API of that path has it, for errors that come before its handler."""
    if path in RERANK_PATHS:
        return rerank.error(message)
    if path in TEI_PATHS:
        return tei.error(message, status)
    return openai.error(message, status) if path.startswith("/v1/") or path in OPENAI_PATHS else {"error": message}


async def _read(request: Request, limits: Limits, booking: Booking) -> bytes:
    """The body; without a timeout or an unpacker if it is there as it is."""
    if not request.scope.get(WHOLE) or b"content-encoding" in dict(request.scope["headers"]):
        return await bodies.read(request, limits, booking)
    return await bodies.whole(request.receive, limits, booking)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; if the client goes before, it is cancelled, and ``ClientDisconnect`` raised.

    The server's own connections say by ``Waiters`` that the client is gone. Elsewhere, as under Ray Serve, another task
    waits for the message.
    """
    waiters: Waiters | None = request.scope.get(GONE)
    if waiters is None:
        return await _unless_disconnected(request, work)
    task, gone = asyncio.current_task(), asyncio.get_running_loop().create_future()
    assert task is not None
    is_over = False

    def leave(_: "asyncio.Future[None]") -> None:
        gone.exception()  # it is seen
        if not is_over:
            task.cancel()

    gone.add_done_callback(leave)
    waiters.add(gone)
    try:
        return await work
    except asyncio.CancelledError:
        if gone.done():
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        waiters.discard(gone)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    gone.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        task.cancel()
        if gone.done() and not gone.cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _vectors(answer: TextAnswer, dimensions: int | None = None) -> NDArray[np.float32]:
    """The vectors, (N, D)."""
    vectors = answer.answers[0][None] if len(answer.answers) == 1 else np.stack(answer.answers)
    return texts.shortened(vectors.astype(np.float32, copy=False), dimensions)


def _request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))


def _values(answer: TextAnswer) -> int:
    return sum(int(each.size) for each in answer.answers)


def _entry(served: Served) -> dict[str, Any]:
    return openai.model_entry(served.name, served.manifest.created)


def _openai_error(message: str, status: int, field: str | None) -> dict[str, Any]:
    return openai.error(message, status, field)


def _tei_error(message: str, status: int, field: str | None) -> dict[str, Any]:
    return tei.error(message, status)


def _rerank_error(message: str, status: int, field: str | None) -> dict[str, Any]:
    return rerank.error(message)
