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
from corewise.serving import health, oip, triton
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

MOST_IN_STREAM = 16
"""Requests of one stream in progress; the next is read when the first of them is answered."""
REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""Both have the same messages."""

Infer = Callable[[Any, Any], Awaitable[Any]]
"""Answers a ``ModelInferRequest``, given the call's context; raises ``CorewiseError``."""


def handlers(models: Models, metrics: Metrics, tokens: Tokens, infer: Infer) -> Sequence[Any]:
    """The services' handlers, for ``add_generic_rpc_handlers``. The last one counts calls of unknown methods."""
    guarded = _Guard(metrics, tokens)
    return (
        health.handler(models),
        _extensions(models, guarded, infer),
        *_reflection(guarded),
        _Unknown(metrics),
    )


class _Guard:
    """Refuses calls without a token."""

    def __init__(self, metrics: Metrics, tokens: Tokens) -> None:
        self._metrics, self._tokens = metrics, tokens

    async def check(self, context: Any) -> None:
        """Abort the call unless it may be made."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        token = given if isinstance(given, bytes) else given.encode("latin-1", "replace")
        if not self._tokens.admit(token):
            self._metrics.turned_away("grpc", "unauthenticated")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is missing or wrong; send authorization")


class _Unknown(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Counts calls of unknown methods, which gRPC answers with UNIMPLEMENTED."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def service(self, details: Any) -> None:
        """Handles nothing."""
        self._metrics.turned_away("grpc", "unknown method")


def _extensions(models: Models, guarded: _Guard, infer: Infer) -> Any:
    async def model_config(request: Any, context: Any) -> Any:
        await guarded.check(context)
        try:
            served = models.find(request.name, request.version or None)
        except ProtocolError as error:
            code = grpc.StatusCode.NOT_FOUND if error.status == 404 else grpc.StatusCode.UNAVAILABLE
            await context.abort(code, str(error))
        return oip.message("ModelConfigResponse")(config=triton.config(served))

    async def model_stream_infer(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await guarded.check(context)
        async for response in stream(requests, context, infer):
            yield response

    async def repository(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the model repository is at the server's --admin-grpc")

    calls: dict[str, Any] = {
        "ModelConfig": grpc.unary_unary_rpc_method_handler(model_config, **_messages("ModelConfig")),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(model_stream_infer, **_messages("ModelStreamInfer")),
        **{name: grpc.unary_unary_rpc_method_handler(repository, **_messages(name)) for name in oip.REPOSITORY},
    }
    return grpc.method_handlers_generic_handler(oip.SERVICE, calls)


def _messages(name: str) -> dict[str, Any]:
    request, response = oip.EXTENSIONS[name]
    return {"request_deserializer": request.FromString, "response_serializer": response.SerializeToString}


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


def _reflection(guarded: _Guard) -> list[Any]:
    """Server reflection over the services here, from a pool of its own (see ``oip``)."""
    pool = descriptor_pool.DescriptorPool()
    for file in (*oip.files(), health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb):
        pool.AddSerializedFile(file)
    servicer = reflection.aio.ReflectionServicer((oip.SERVICE, health.SERVICE, REFLECTION[0]), pool=pool)

    async def info(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await guarded.check(context)
        async for response in servicer.ServerReflectionInfo(requests, context):
            yield response

    method = grpc.stream_stream_rpc_method_handler(
        info,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in REFLECTION]
