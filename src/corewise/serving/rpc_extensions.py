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
from corewise.serving.methods import Method
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

MOST_IN_STREAM = 16
"""Requests of one stream in progress; the next is read when the first of them is answered."""
REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""Both have the same messages."""
CODES = {
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}

Infer = Callable[[Any, Any], Awaitable[Any]]
"""Answers a ``ModelInferRequest``, given the call's context; raises ``CorewiseError``."""


def list_methods(models: Models, infer: Infer) -> list[Method]:
    """All methods that are here."""
    return [*health.list_methods(models), *_extensions(models, infer), *_reflection()]


def _extensions(models: Models, infer: Infer) -> list[Method]:
    async def model_config(request: Any, context: Any) -> Any:
        served = models.find(request.name, request.version or None)
        return oip.message("ModelConfigResponse")(config=triton.config(served))

    async def repository(request: Any, context: Any) -> Any:
        raise ProtocolError("the model repository is at the server's --admin-grpc", status=501)

    def model_stream_infer(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        return stream(requests, context, infer)

    calls: dict[str, Any] = {
        "ModelConfig": {"unary": model_config},
        "ModelStreamInfer": {"streaming": model_stream_infer},
        **{name: {"unary": repository} for name in oip.REPOSITORY},
    }
    return [
        Method(path=f"/{oip.SERVICE}/{name}", request=request, response=response, **calls[name])
        for name, (request, response) in oip.EXTENSIONS.items()
    ]


async def stream(requests: AsyncIterator[Any], context: Any, infer: Infer) -> AsyncIterator[Any]:
    """Answer a stream's requests in their order, several at a time. An error is the answer to one request only."""
    answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(MOST_IN_STREAM)

    async def read() -> None:
        async for request in requests:
            await answers.put(asyncio.ensure_future(_streamed(request, context, infer)))
        await answers.put(None)

    reader = asyncio.ensure_future(read())
    try:
        while (answer := await answers.get()) is not None:
            yield await answer
    finally:
        reader.cancel()
        while not answers.empty():
            if (left := answers.get_nowait()) is not None:
                left.cancel()


async def _streamed(request: Any, context: Any, infer: Infer) -> Any:
    try:
        return oip.message("ModelStreamInferResponse")(infer_response=await infer(request, context))
    except (ProtocolError, NotServed) as error:
        why = str(error)
    except CorewiseError as error:
        log.error("a request of a gRPC stream failed: %r", error)
        why = "the call failed; the server's log says why"
    except Exception:  # the request boundary: the other requests of the stream go on
        log.exception("a request of a gRPC stream failed")
        why = "the server failed; its log says why"
    about = {"model_name": request.model_name, "model_version": request.model_version, "id": request.id}
    return oip.message("ModelStreamInferResponse")(error_message=why, infer_response=about)


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
        yield messages.decoded(data, message)


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Methods as handlers for ``add_generic_rpc_handlers``, the last one there: it counts unknown methods."""

    def __init__(self, methods: Sequence[Method], metrics: Metrics, tokens: Tokens) -> None:
        self._metrics, self._tokens = metrics, tokens
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
                return await unary(messages.decoded(await anext(requests), method.request), context)
            except ProtocolError as error:
                await context.abort(CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), str(error))
            except Exception:  # the request boundary: gRPC would tell the client what was raised
                log.exception("a gRPC call of %s failed", method.path)
                await context.abort(grpc.StatusCode.INTERNAL, "the server failed; its log says why")

        async def stream_call(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            assert streaming is not None
            await self._check(method, context)
            try:
                async for response in streaming(_decoded(requests, method.request), context):
                    yield response
            except ProtocolError as error:
                await context.abort(CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), str(error))

        serializer = method.response.SerializeToString
        if unary is not None:
            return grpc.stream_unary_rpc_method_handler(call, response_serializer=serializer)
        return grpc.stream_stream_rpc_method_handler(stream_call, response_serializer=serializer)

    async def _check(self, method: Method, context: Any) -> None:
        """Abort a call without a token."""
        if not method.is_open_to_all and not self._tokens.admit(messages.authorization(context.invocation_metadata())):
            self._metrics.turned_away("grpc", "unauthenticated")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is missing or wrong; send authorization")
