"""The server's gRPC side: the same protocol in protobuf, raw tensors or typed ones."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from math import inf, prod
from typing import Any, NamedTuple

import grpc
import numpy as np

from corewise._version import __version__
from corewise.batching import Answer, NotServed
from corewise.common.errors import CorewiseError
from corewise.records.build import TensorSpec
from corewise.serving import messages, oip, protocol, triton
from corewise.serving.front import SMALL_TENSOR_BYTES, Front
from corewise.serving.memory_limit import answer_bytes
from corewise.serving.messages import Receiver
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.pool import AT_ONCE
from corewise.serving.protocol import MOST_ID, MOST_TENSORS, Asked, InferRequest, Limits, NoRoom, ProtocolError
from corewise.serving.rpc_frames import RpcFrames
from corewise.serving.served import Served
from corewise.serving.tokens import Tokens

log = logging.getLogger("corewise.serve")

CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where each datatype's values lie, where they are not raw; FP16 has no place."""
REASONS = {
    "too large": grpc.StatusCode.INVALID_ARGUMENT,
    "expired": grpc.StatusCode.DEADLINE_EXCEEDED,
    "no instance": grpc.StatusCode.UNAVAILABLE,
    "draining": grpc.StatusCode.UNAVAILABLE,
}
"""All other refusals are RESOURCE_EXHAUSTED."""
MOST_DIMENSIONS = 64
"""Dimensions of a tensor that are read: a message of 16 MiB may claim 16 million, and no model has that many."""
PIECE = 2**14
"""Typed values that are converted at once, before other threads run."""
OPEN_TO_ALL = ("ServerLive", "ServerReady")

Call = Callable[[Any, Any], Awaitable[Any]]


class _Ran(NamedTuple):
    """A request that was answered."""

    meant: Served
    """The model that it was parsed for."""
    served: Served
    """The model that ran it: another may have taken the place of ``meant``."""
    asked: InferRequest
    answer: Answer
    asked_s: float
    """When it joined the model's queue."""


class Service:
    """The calls of ``GRPCInferenceService``."""

    def __init__(self, models: Models, metrics: Metrics, limits: Limits, tokens: Tokens, front: Front) -> None:
        self.models, self.metrics = models, metrics
        self._limits, self._tokens, self._front = limits, tokens, front
        self.receiver = Receiver(limits)
        self._frames = RpcFrames()
        calls: dict[str, Call] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ModelStatistics": self.model_statistics,
        }
        self.handler = grpc.method_handlers_generic_handler(
            oip.SERVICE,
            {
                # To gRPC a stream of requests, of which one is read: what is refused before that is never received.
                name: grpc.stream_unary_rpc_method_handler(
                    self._guarded(name, asked, calls[name]), response_serializer=_serializer(answered)
                )
                for name, (asked, answered) in oip.METHODS.items()
            },
        )

    async def server_live(self, request: Any, context: Any) -> Any:
        """The process answers."""
        return oip.message("ServerLiveResponse")(live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        """Every model answers."""
        return oip.message("ServerReadyResponse")(ready=self.models.ready)

    async def model_ready(self, request: Any, context: Any) -> Any:
        """A model answers."""
        return oip.message("ModelReadyResponse")(ready=self._served(request.name, request.version).ready)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        """Who this is."""
        return oip.message("ServerMetadataResponse")(
            name="corewise", version=__version__, extensions=protocol.EXTENSIONS
        )

    async def model_metadata(self, request: Any, context: Any) -> Any:
        """A model's inputs and outputs."""
        served = self._served(request.name, request.version)
        return oip.message("ModelMetadataResponse")(
            name=served.name,
            versions=self.models.versions(served.name),
            platform=f"corewise_{served.manifest.build.engine}",
            inputs=[_with_parameters(described) for described in served.described_inputs()],
            outputs=protocol.described(served.outputs),
        )

    async def model_statistics(self, request: Any, context: Any) -> Any:
        """What became of the requests, of one model or of all."""
        chosen = [self._served(request.name, request.version)] if request.name else self.models.served
        return oip.message("ModelStatisticsResponse")(model_stats=[served.described_statistics() for served in chosen])

    async def model_infer(self, request: Any, context: Any) -> Any:
        """Run a model on tensors. The time counts from the call's start by gRPC's deadline, or from its message."""
        ran = await self._run(self._served(request.model_name, request.model_version), request, None, context)
        return await self._rendered(ran, as_bytes=False)

    async def _infer(self, data: bytes, context: Any) -> Any:
        """The same, from a message's bytes to the answer's, which are neither decoded nor encoded if they are known."""
        known = self._frames.known(data)
        if known is not None:
            served = self._served(known.name, known.version)
            if served.frames is known.of:
                ran = await self._run(served, None, known.asked, context)
                is_small = ran.answer.size_bytes <= SMALL_TENSOR_BYTES
                if is_small and (found := self._frames.render(ran.served, ran.asked, ran.answer.outputs)) is not None:
                    self._front.note_sent(ran.answer, ran.asked_s)
                    return found
                return await self._rendered(ran, as_bytes=True)
        messages.check_infer(data, self._limits)
        message = oip.message("ModelInferRequest")
        request = await self._front.read(
            lambda: messages.decoded(data, message),
            len(data) // messages.DECODED_BYTES,
            deadline_s=self._deadline_s(context),
        )
        ran = await self._run(self._served(request.model_name, request.model_version), request, None, context)
        self._frames.remember(data, request, ran.meant, ran.asked)
        return await self._rendered(ran, as_bytes=True)

    async def _rendered(self, ran: "_Ran", *, as_bytes: bool) -> Any:
        """The ``ModelInferResponse``, or its bytes; a large one is put together beside the event loop."""
        served, asked, answer = ran.served, ran.asked, ran.answer
        named = {spec.name: array for spec, array in zip(served.outputs, answer.outputs, strict=True)}
        classes = asked.class_counts

        def rendered() -> Any:
            message = render(served, asked, triton.classified(classes, named, served.manifest.labels))
            return message.SerializeToString() if as_bytes else message

        text_bytes = triton.class_bytes(classes, named)
        found = await self._front.read(rendered, text_bytes, answer.size_bytes, deadline_s=AT_ONCE)
        self._front.note_sent(answer, ran.asked_s)
        return found

    async def _run(self, served: Served, request: Any, asked: InferRequest | None, context: Any) -> "_Ran":
        """The answer to a request, which is parsed if it is not."""
        received_s = time.monotonic()
        meant, client = served, messages.client_of(context)
        headers = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        request_id = headers.get("x-request-id", request.id if request is not None else "")
        with self.metrics.request(served, "grpc", headers, request_id) as note, self._front.booking(client) as booking:
            left_s = context.time_remaining()
            deadline_s = received_s + (self._limits.timeout_s if left_s is None else left_s)
            with self._front.place(client, served):
                await self._front.turn(deadline_s, served)
                booked_bytes = 0
                if asked is None:
                    typed_bytes, raw_bytes = messages.sizes(request)
                    booked_bytes = typed_bytes + raw_bytes
                    asked = await self._front.read(
                        lambda: parse(request, served.inputs, served.outputs, served.instead),
                        typed_bytes,
                        raw_bytes,
                        deadline_s=deadline_s,
                    )
                prepared = await self._front.prepare(asked, served, client=client, deadline_s=deadline_s)
            if booked_bytes:
                booking.add(max(0, sum(array.nbytes for array in prepared.inputs) - booked_bytes))
            if asked.timeout_s is not None:
                deadline_s = received_s + min(inf if left_s is None else left_s, asked.timeout_s)
            asked_s = time.monotonic()
            ran, answer = await self._front.ask(self.models, served, prepared, deadline_s)
            note(answer)
        return _Ran(meant, ran, asked, answer, asked_s)

    def _deadline_s(self, context: Any) -> float:
        """When a call's answer is due by gRPC's deadline, or by the server's own limit."""
        left_s = context.time_remaining()
        return time.monotonic() + (self._limits.timeout_s if left_s is None else float(left_s))

    def _served(self, name: str, version: str) -> Served:
        return self.models.find(name, version or None)

    def _guarded(self, name: str, message: Any, call: Call) -> Call:
        """The call, for those who may, with errors as gRPC tells them."""

        async def guarded(requests: AsyncIterator[bytes], context: Any) -> Any:
            if name in OPEN_TO_ALL:  # answered without reading the request
                return await call(None, context)
            if not messages.is_admitted(context, self._tokens):
                self.metrics.turned_away("grpc", "unauthenticated")
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is missing or wrong; send authorization")
            try:
                return await self._answered(name, message, call, requests, context)
            except Exception as error:  # noqa: BLE001 - the request boundary: gRPC would tell the client what was raised
                code, why = self._told(name, error, context)
            # What aborting raises stays for a while, with this frame: the error holds all of the request, and the
            # iterator its last message.
            del requests
            return await context.abort(code, why)

        return guarded

    async def _answered(self, name: str, message: Any, call: Call, requests: AsyncIterator[bytes], context: Any) -> Any:
        """Receive a call's message and answer it."""
        client = messages.client_of(context)
        if name == "ModelInfer" and self._front.is_crowded(client):
            self._refuse_unread(client, context)
        with self._front.booking(client) as booking:
            data = await self.receiver.receive(requests, client)
            booking.add(len(data))
            if name == "ModelInfer":
                answer = await self._infer(data, context)
                self._hold(len(answer), client, context)
                return answer
            messages.check_small(data)
            request = await self._front.read(
                lambda: messages.decoded(data, message), len(data) // messages.DECODED_BYTES
            )
            return await call(request, context)

    def _hold(self, size_bytes: int, client: str, context: Any) -> None:
        """Book an answer of that size, if it is large, until its client has read it. Raises ``NoRoom``."""
        if held_bytes := answer_bytes(size_bytes):
            booking = self._front.booking(client)
            booking.add(held_bytes)
            context.add_done_callback(lambda _: booking.__exit__())

    def _refuse_unread(self, client: str, context: Any) -> None:
        """Raise ``NotServed`` for a call, not yet received, that has no place or would have its turn too late."""
        if (refused := self._front.refusal(client, self._deadline_s(context))) is not None:
            with self.metrics.unnamed_request("grpc"):
                raise refused

    def _told(self, name: str, error: Exception, context: Any) -> tuple[Any, str]:
        """The status code and the text of an error."""
        if isinstance(error, NoRoom):
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        if isinstance(error, ProtocolError):
            if error.status == 404:
                self.metrics.turned_away("grpc", "unknown model")
            return messages.status_code(error), str(error)
        if isinstance(error, NotServed):
            if error.retry_after_s is not None:
                context.set_trailing_metadata((("retry-after-s", f"{error.retry_after_s:.3f}"),))
            return REASONS.get(error.reason, grpc.StatusCode.RESOURCE_EXHAUSTED), str(error)
        if isinstance(error, CorewiseError):
            log.error("a gRPC call of %s failed: %r", name, error)
            return grpc.StatusCode.INTERNAL, "the call failed; the server's log says why"
        log.error("a gRPC call of %s failed", name, exc_info=error)
        return grpc.StatusCode.INTERNAL, "the server failed; its log says why"


def _serializer(message: Any) -> Callable[[Any], bytes]:
    """What makes bytes of answers, some of which are bytes already."""

    def serialize(answer: Any) -> bytes:
        return answer if isinstance(answer, bytes) else message.SerializeToString(answer)

    return serialize


def parse(
    request: Any,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    instead: Sequence[Sequence[TensorSpec]] = (),
) -> InferRequest:
    """A ``ModelInferRequest`` as the model takes it (``protocol.parse``). Raises ``ProtocolError``."""
    if max(len(request.inputs), len(request.outputs)) > MOST_TENSORS:
        raise ProtocolError(f"the request has more than {MOST_TENSORS} inputs or outputs", "give each once", 413)
    if len(request.id) > MOST_ID:
        raise ProtocolError(f"the request's id has more than {MOST_ID} characters", "give a shorter one")
    inputs = protocol.chosen_inputs([one.name for one in request.inputs], inputs, instead)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise ProtocolError(f"there are {len(raw)} raw contents for {len(request.inputs)} inputs", "give one for each")
    by_name = {spec.name: spec for spec in inputs}
    found: dict[str, np.ndarray] = {}
    for k, one in enumerate(request.inputs):
        spec = by_name.get(one.name)
        if spec is None or spec.name in found:
            raise ProtocolError(f"the input {one.name[:80]!r} is {'given twice' if spec else 'not one of the model'}")
        shape = list(one.shape[:MOST_DIMENSIONS])
        protocol.check_shape(spec, one.datatype, shape)
        if raw:
            if one.HasField("contents"):
                raise ProtocolError(f"the input {spec.name} has raw and typed contents")
            found[spec.name] = protocol.from_bytes(memoryview(raw[k]), spec, shape)
        else:
            found[spec.name] = _typed(one.contents, spec, shape)
    names = [one.name for one in request.outputs] or [spec.name for spec in outputs]
    protocol.asked_outputs(names, outputs)
    parameters = _parameters(request)
    classes = {one.name: protocol.class_count(_parameters(one).get("classification", 0)) for one in request.outputs}
    timeout = parameters.get("timeout")
    return InferRequest(
        inputs=protocol.ordered(found, inputs),
        outputs=tuple(Asked(name=name, binary=True, classes=classes.get(name, 0)) for name in names),
        id=request.id or None,
        timeout_s=None if timeout is None else protocol.microseconds(timeout),
        priority=protocol.priority(parameters.get("priority", 0)),
    )


def _parameters(holder: Any) -> dict[str, Any]:
    """The parameters of a request or of one of its outputs."""
    return {
        key: getattr(value, value.WhichOneof("parameter_choice") or "", None)
        for key, value in holder.parameters.items()
    }


def _with_parameters(described: Mapping[str, Any]) -> dict[str, Any]:
    """An input's description with its parameters, which are whole numbers or bools, as protobuf has them."""
    parameters = {
        name: {"bool_param" if isinstance(value, bool) else "int64_param": value}
        for name, value in described.get("parameters", {}).items()
    }
    return {**described, "parameters": parameters}


def render(served: Served, request: InferRequest, outputs: Mapping[str, np.ndarray]) -> Any:
    """The ``ModelInferResponse``; tensors are raw."""
    chosen = [(asked.name, outputs[asked.name]) for asked in request.outputs]
    return oip.message("ModelInferResponse")(
        model_name=served.name,
        model_version=served.version,
        id=request.id or "",
        outputs=[
            {"name": name, "datatype": protocol.DATATYPES[array.dtype.name], "shape": array.shape}
            for name, array in chosen
        ],
        raw_output_contents=[protocol.to_bytes(array) for _, array in chosen],
    )


def _typed(contents: Any, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    datatype = protocol.DATATYPES[spec.dtype]
    if datatype not in CONTENTS:
        raise ProtocolError(f"the input {spec.name} is {datatype}, which has no typed contents", "send it raw")
    values = getattr(contents, CONTENTS[datatype])
    if len(values) != prod(shape):
        raise ProtocolError(f"the input {spec.name} has {len(values)} values, where its shape asks for {prod(shape)}")
    if spec.dtype == "object":
        return protocol.objects(list(values), shape)
    dtype = np.dtype(spec.dtype)
    numbers: np.ndarray = np.empty(
        len(values), {"f": np.float64, "b": np.bool_, "u": np.uint64}.get(dtype.kind, np.int64)
    )
    for start in range(0, len(values), PIECE):
        numbers[start : start + PIECE] = values[start : start + PIECE]
    if dtype.kind in "iu" and len(numbers):
        limits = np.iinfo(dtype)
        if numbers.min() < limits.min or numbers.max() > limits.max:
            raise ProtocolError(f"the data of the input {spec.name} are not {datatype}")
    return numbers.astype(dtype).reshape(shape)
