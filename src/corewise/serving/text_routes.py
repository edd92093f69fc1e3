"""The paths for texts: OpenAI's, Text Embeddings Inference's, and ``/v1/rerank``.

A path exists if a served model's pipeline fits it. Which model: the request's ``model``, else the only one that fits.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from corewise._version import __version__
from corewise.common.errors import CorewiseError
from corewise.records.pipeline import Activation, TextTask
from corewise.serving import bodies, openai, rerank, tei, texts
from corewise.serving.budget import Booking
from corewise.serving.front import Front
from corewise.serving.infer import ARRIVED, GONE, client_of
from corewise.serving.memory_limit import COPIES
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import VALUE_BYTES, Limits
from corewise.serving.served import Served
from corewise.serving.text import TextInput
from corewise.serving.text_calls import TextAnswer, TextCalls
from corewise.serving.text_models import ANY, CLASSIFY, TextModels, check_vectors, task_of
from corewise.serving.texts import FieldError, TextRequest

RESULT_BYTES = 64
"""About what one text's score or class takes in JSON."""
PIECE_BYTES = 600
"""What a token takes while it is described, with its text and its JSON; each byte of a text may be one."""
RERANK_PATHS = ("/v1/rerank", "/v2/rerank")

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

    @property
    def routes(self) -> list[Route]:
        """The routes of these APIs, for the server's app."""
        by_shape: dict[Shape, dict[str, Handler]] = {
            _openai_error: {"/v1/embeddings": self.embeddings},
            _rerank_error: dict.fromkeys(RERANK_PATHS, self.rerank),
            _tei_error: {
                "/": self.root,
                "/embed": self.embed,
                "/similarity": self.similarity,
                "/rerank": self.rank,
                "/predict": self.predict,
                "/tokenize": self.tokenize,
                "/decode": self.decode,
            },
        }
        posts = [
            Route(path, self._shaped(handler, shape), methods=["POST"])
            for shape, handlers in by_shape.items()
            for path, handler in handlers.items()
        ]
        return [
            *posts,
            Route("/v1/models", self._shaped(self.list_models, _openai_error)),
            Route("/v1/models/{name}", self._shaped(self.describe_model, _openai_error)),
            Route("/info", self._shaped(self.info, _tei_error)),
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
        handlers = {"vectors": self.embed, "scores": self.rank}
        return await handlers.get(task_of(served.text), self.predict)(request)

    async def embed(self, request: Request) -> Response:
        """Texts to vectors."""

        def parse(body: bytes) -> tei.EmbedRequest:
            asked = tei.embed(body)
            served = self._models.chosen(asked.model, "vectors")
            check_vectors(served, asked.dimensions)
            if not asked.normalize and served.text is not None and served.text.pipeline.normalize:
                raise FieldError("normalize", f"the model {served.name} normalizes its vectors itself", "give true")
            return asked

        async with self._answered(request, parse, "vectors") as (_, asked, answer):

            def render() -> bytes:
                vectors = _vectors(answer, asked.dimensions)
                return tei.render_vectors(texts.normalized(vectors) if asked.normalize else vectors)

            return await self._rendered(render, _values(answer) * VALUE_BYTES)

    async def similarity(self, request: Request) -> Response:
        """Cosines of a sentence with others."""

        def parse(body: bytes) -> tei.EmbedRequest:
            asked = tei.similarity(body)
            check_vectors(self._models.chosen(asked.model, "vectors"))
            return asked

        async with self._answered(request, parse, "vectors") as (_, _, answer):
            return await self._rendered(
                lambda: tei.render_similarities(_vectors(answer)), len(answer.answers) * VALUE_BYTES
            )

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
                body = await bodies.read(request, self._limits, booking)
                await self._front.turn(deadline_s, gone=request.scope.get(GONE))
                asked = await self._front.read(lambda: parse(body), len(body), deadline_s=deadline_s)
                served = self._models.chosen(asked.model, *tasks)
            arrived_s = request.scope.get(ARRIVED)
            with self._metrics.request(served, "http", request.headers, name, arrived_s) as note:
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
            body = await bodies.read(request, limits, booking)
            await self._front.turn(deadline_s, gone=request.scope.get(GONE))
        return body

    async def _rendered(self, render: Callable[[], bytes], size_bytes: int) -> Response:
        return Response(await self._front.read(render, size_bytes, deadline_s=AT_ONCE), media_type="application/json")

    # --- errors -------------------------------------------------------------------------------------------------

    def _shaped(self, handler: Handler, shape: Shape) -> Handler:
        """The handler, with errors as its API has them."""

        async def shaped(request: Request) -> Response:
            try:
                return await handler(request)
            except CorewiseError as error:
                told = await self._told(request, error)
                message = json.loads(bytes(told.body))["error"]
                field = error.field if isinstance(error, FieldError) else None
                headers = {"retry-after": told.headers["retry-after"]} if "retry-after" in told.headers else None
                return JSONResponse(shape(message, told.status_code, field), told.status_code, headers)

        return shaped


def error_body(path: str, message: str, status: int) -> dict[str, Any]:
    """An error's body as the API of that path has it, for errors that come before its handler."""
    if path in RERANK_PATHS:
        return rerank.error(message)
    return openai.error(message, status) if path.startswith("/v1/") else {"error": message}


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; if the client goes before, it is cancelled."""
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
    return texts.shortened(np.stack(answer.answers).astype(np.float32, copy=False), dimensions)


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
