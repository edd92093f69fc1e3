"""gRPC calls beside the protocol's own: Triton's extensions, health checks and server reflection."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from corewise.batching import NotServed
from corewise.common.errors import CorewiseError
from corewise.serving import health, messages, oip, triton
from corewise.serving.budget import Booking
from corewise.serving.front import Front
from corewise.serving.memory_limit import answer_bytes
from corewise.serving.messages import Receiver, Streams
from corewise.serving.methods import Method
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import MOST_ID, Limits, NoRoom, ProtocolError
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

MOST_IN_STREAM = 16
"""Requests of one stream in progress; the next is read when the first of them is answered."""
MOST_WATCHES = 1024
"""Calls that receive one message and send many."""
REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""Both have the same messages."""

Infer = Callable[[Any, Any], Awaitable[Any]]
"""Answers a ``ModelInferRequest``, given the call's context; raises ``CorewiseError``."""


def list_methods(models: Models, metrics: Metrics, infer: Infer, front: Front, limits: Limits) -> list[Method]:
    """All methods that are here."""
    return [*health.list_methods(models), *_extensions(models, metrics, infer, front, limits), *_reflection()]


def _extensions(models: Models, metrics: Metrics, infer: Infer, front: Front, limits: Limits) -> list[Method]:
    async def model_config(request: Any, context: Any) -> Any:
        try:
            served = models.find(request.name, request.version or None)
        except ProtocolError as error:
            _count_unknown(metrics, error)
            raise
        return oip.message("ModelConfigResponse")(config=triton.config(served))

    async def repository(request: Any, context: Any) -> Any:
        raise ProtocolError("the model repository is at the server's --admin-grpc", status=501)

    def model_stream_infer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        return Stream(metrics, infer, front, limits, context).answers(requests)

    calls: dict[str, Any] = {
        "ModelConfig": {"unary": model_config},
        "ModelStreamInfer": {"streaming": model_stream_infer, "takes": "bytes"},
        **{name: {"unary": repository} for name in oip.REPOSITORY},
    }
    return [
        Method(path=f"/{oip.SERVICE}/{name}", request=request, response=response, **calls[name])
        for name, (request, response) in oip.EXTENSIONS.items()
    ]


class Stream:
    """One stream's requests, answered in their order, several at a time. An error is the answer to one request only."""

    def __init__(self, metrics: Metrics, infer: Infer, front: Front, limits: Limits, context: Any) -> None:
        self._metrics, self._infer, self._front, self._limits, self._context = metrics, infer, front, limits, context
        self._client = messages.client_of(context)
        self._answers: asyncio.Queue[asyncio.Task[tuple[Any, Booking]] | None] = asyncio.Queue(MOST_IN_STREAM)
        self._begun: set[asyncio.Task[tuple[Any, Booking]]] = set()
        """Requests whose answers are not sent yet."""

    async def answers(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        """A ``ModelStreamInferResponse`` for each message."""
        reader = asyncio.ensure_future(self._read(requests))
        try:
            while (answer := await self._answers.get()) is not None:
                response, unread = await answer
                self._begun.discard(answer)
                with unread:
                    yield response
        finally:
            reader.cancel()
            while not self._answers.empty():  # so that the reader's last word has a place
                self._answers.get_nowait()
            for left in self._begun:
                left.cancel()
                left.add_done_callback(_give_back)

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        try:
            async for data in requests:
                answer = asyncio.ensure_future(self._answer(data))
                self._begun.add(answer)
                await self._answers.put(answer)
        finally:
            await self._answers.put(None)

    async def _answer(self, data: bytes) -> tuple[Any, Booking]:
        """The answer to one message, whose bytes are booked until then, and what it books until it is read."""
        about: dict[str, str] = {}
        unread = self._front.booking(self._client)
        try:
            with self._front.booking(self._client) as booking:
                booking.add(len(data))
                messages.check_infer(data, self._limits)
                request = await self._front.read(
                    lambda: messages.decoded(data, oip.message("ModelInferRequest")),
                    len(data) // messages.DECODED_BYTES,
                )
                # Error messages are not booked, so these texts are cut.
                about = {name: getattr(request, name)[:MOST_ID] for name in ("model_name", "model_version", "id")}
                answer = await self._infer(request, self._context)
                unread.add(answer_bytes(answer.ByteSize()))
                return oip.message("ModelStreamInferResponse")(infer_response=answer), unread
        except (ProtocolError, NotServed) as error:
            _count_unknown(self._metrics, error)
            why = str(error)
        except CorewiseError as error:
            log.error("a request of a gRPC stream failed: %r", error)
            why = "the call failed; the server's log says why"
        except Exception:  # the request boundary: the other requests of the stream go on
            log.exception("a request of a gRPC stream failed")
            why = "the server failed; its log says why"
        return oip.message("ModelStreamInferResponse")(error_message=why, infer_response=about), unread


def _give_back(answer: "asyncio.Task[tuple[Any, Booking]]") -> None:
    """Nobody will read this answer."""
    if not answer.cancelled():
        answer.result()[1].__exit__()


def _reflection() -> list[Method]:
    """Server reflection over the services here, from a pool of its own (see ``oip``)."""
    pool = descriptor_pool.DescriptorPool()
    for file in (*oip.files(), health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb):
        pool.AddSerializedFile(file)
    servicer = reflection.aio.ReflectionServicer((oip.SERVICE, health.SERVICE, REFLECTION[0]), pool=pool)
    return [
        Method(
            path=f"/{name}/ServerReflectionInfo",
            request=reflection_pb2.ServerReflectionRequest,
            response=reflection_pb2.ServerReflectionResponse,
            streaming=servicer.ServerReflectionInfo,
        )
        for name in REFLECTION
    ]


async def _decoded(requests: AsyncIterator[bytes], message: Any) -> AsyncIterator[Any]:
    async for data in requests:
        messages.check_small(data)
        yield messages.decoded(data, message)


def _count_unknown(metrics: Metrics, error: Exception) -> None:
    """Count a request for a model that there is not."""
    if isinstance(error, ProtocolError) and error.status == 404:
        metrics.turned_away("grpc", "unknown model")


def _told(method: Method, error: Exception) -> tuple[Any, str]:
    """The status code and the text of an error."""
    if isinstance(error, NoRoom):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, ProtocolError):
        return messages.status_code(error), str(error)
    log.error("a gRPC call of %s failed", method.path, exc_info=error)
    return grpc.StatusCode.INTERNAL, "the server failed; its log says why"


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods as handlers for ``add_generic_rpc_handlers``, the last one there: it counts unknown methods."""

    def __init__(self, methods: Sequence[Method], metrics: Metrics, tokens: Tokens, limits: Limits) -> None:
        self._metrics, self._tokens = metrics, tokens
        self._receiver, self._streams = Receiver(limits, messages.PROBES), Streams(limits.streams)
        self._watches = Streams(MOST_WATCHES)
        self._handlers = {method.path: self._handler(method) for method in methods}

    def service(self, details: Any) -> Any:
        """The handler of a method; gRPC answers UNIMPLEMENTED if there is none."""
        found = self._handlers.get(details.method)
        if found is None:
            self._metrics.turned_away("grpc", "unknown method")
        return found

    def _handler(self, method: Method) -> Any:
        unary, streaming = method.unary, method.streaming

        async def call(requests: AsyncIterator[bytes], context: Any) -> Any:
            assert unary is not None
            await self._check(method, context)
            try:
                data = await self._receiver.receive(requests, messages.client_of(context))
                messages.check_small(data)
                return await unary(messages.decoded(data, method.request), context)
            except Exception as error:  # noqa: BLE001 - the request boundary: gRPC would tell the client what was raised
                code, why = _told(method, error)
            del requests  # it holds the last message, and what aborting raises holds this frame
            return await context.abort(code, why)

        async def stream_call(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            assert streaming is not None
            await self._check(method, context)
            given = requests
            try:
                client = messages.client_of(context)
                given = requests if method.takes == "bytes" else _decoded(requests, method.request)
                if method.takes == "one":
                    given = _decoded(_one(await self._receiver.receive(requests, client)), method.request)
                places = self._watches if method.takes == "one" else self._streams
                with places.place(client):
                    async for response in streaming(given, context):
                        yield response
                return
            except Exception as error:  # noqa: BLE001 - the request boundary: gRPC would tell the client what was raised
                code, why = _told(method, error)
            del requests, given
            await context.abort(code, why)

        serializer = method.response.SerializeToString
        if unary is not None:
            return grpc.stream_unary_rpc_method_handler(call, response_serializer=serializer)
        return grpc.stream_stream_rpc_method_handler(stream_call, response_serializer=serializer)

    async def _check(self, method: Method, context: Any) -> None:
        """Abort a call without a token."""
        if not method.is_open_to_all and not messages.is_admitted(context, self._tokens):
            self._metrics.turned_away("grpc", "unauthenticated")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is missing or wrong; send authorization")
