"""Requests and answers of the protocol in JSON, with binary tensors behind it. Pure.

A parser that builds Python objects needs up to 30 times the bytes of a hostile body, and holds the interpreter until it
is done. Here the frame of a request is parsed with types, and its ``data`` straight into arrays; a body over
``PIECE_BYTES`` in pieces (``large_json``), so that memory follows the tensor and other threads get their turn.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from math import prod
from typing import Annotated, Any

import msgspec
import numpy as np

from corewise.records.build import TensorSpec
from corewise.serving import large_json, protocol
from corewise.serving.protocol import (
    DATATYPES,
    MOST_ID,
    MOST_TENSORS,
    Asked,
    InferRequest,
    ProtocolError,
)

PIECE_BYTES = 128 * 1024
"""JSON that is parsed at once: under 2 ms."""
RENDERED_VALUES = 4096
"""Values that are rendered at once."""

Parameters = dict[str, Any]


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: msgspec.Raw = msgspec.Raw()
    """Empty where there is none."""


class _Output(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Input], msgspec.Meta(max_length=MOST_TENSORS)]
    outputs: Annotated[list[_Output], msgspec.Meta(max_length=MOST_TENSORS)] | None = None
    id: Annotated[str, msgspec.Meta(max_length=MOST_ID)] | None = None
    parameters: Parameters = {}


_decode_request = msgspec.json.Decoder(_Request).decode


def parse(
    body: bytes | bytearray,
    header_length: int | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    instead: Sequence[Sequence[TensorSpec]] = (),
) -> InferRequest:
    """The request in a body; its first ``header_length`` bytes are JSON, the rest binary tensors.

    It may have one set of the inputs ``instead`` in place of the model's own. A length of 0 is Triton's raw request:
    the body is the data of the only input. Raises ``ProtocolError``.
    """
    if header_length == 0:
        return InferRequest(
            inputs=(_raw(body, inputs),),
            outputs=_all_outputs(outputs, True),
        )
    if header_length is not None and not 0 < header_length <= len(body):
        raise ProtocolError(
            f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes",
            "give the length of the JSON part",
        )
    view = memoryview(body)
    text: bytes | memoryview = view[:header_length]
    regions: large_json.Regions = {}
    if len(text) > PIECE_BYTES:
        text, regions = large_json.frame(view[:header_length], PIECE_BYTES)
    request = frame(text)
    inputs = protocol.chosen_inputs([one.name for one in request.inputs], inputs, instead)
    binary = view[header_length:] if header_length is not None else view[:0]
    arrays = _inputs(request.inputs, binary, inputs, regions)
    parameters = request.parameters
    timeout = parameters.get("timeout")
    return InferRequest(
        inputs=arrays,
        outputs=_outputs(request.outputs, outputs, parameters.get("binary_data_output", False)),
        id=request.id,
        timeout_s=None if timeout is None else protocol.microseconds(timeout),
        priority=protocol.priority(parameters.get("priority", 0)),
    )


def render(
    model: str, version: str | None, request: InferRequest, outputs: Mapping[str, np.ndarray]
) -> tuple[list[bytes | memoryview], int | None]:
    """The answer's body in parts, and the length of its JSON where binary tensors follow; ``None`` where none do."""
    answer: dict[str, Any] = {"model_name": model}
    if version is not None:
        answer["model_version"] = version
    if request.id is not None:
        answer["id"] = request.id
    heads: list[bytes] = []
    tails: list[bytes | memoryview] = []
    for requested in request.outputs:
        array = outputs[requested.name]
        tensor: dict[str, Any] = {
            "name": requested.name,
            "datatype": protocol.datatype(array),
            "shape": list(array.shape),
        }
        if requested.binary:
            tails.append(protocol.to_bytes(array))
            tensor["parameters"] = {"binary_data_size": len(tails[-1])}
            heads.append(msgspec.json.encode(tensor))
        else:
            heads += [msgspec.json.encode(tensor)[:-1], b',"data":[', *_rendered(array.reshape(-1)), b"]}"]
        heads.append(b",")
    parts: list[bytes | memoryview] = [msgspec.json.encode(answer)[:-1], b',"outputs":[', *heads[:-1], b"]}"]
    if not tails:
        return parts, None
    return [*parts, *tails], sum(map(len, parts))


def _rendered(values: np.ndarray) -> Iterator[bytes]:
    """The values as JSON, in pieces; NaN and infinities, for which JSON has no word, as null."""
    for start in range(0, len(values), RENDERED_VALUES):
        piece = values[start : start + RENDERED_VALUES]
        if start:
            yield b","
        if piece.dtype == object:
            yield msgspec.json.encode([item.decode("utf-8", "replace") for item in piece])[1:-1]
        else:
            yield msgspec.json.encode(piece.tolist())[1:-1]


def frame(text: memoryview | bytes) -> _Request:
    """A request's JSON, without what its ``data`` hold. Raises ``ProtocolError``."""
    try:
        return _decode_request(text)
    except RecursionError as error:
        raise ProtocolError("the request nests too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the request cannot be read: {protocol.not_json(error, text)}") from error


def _inputs(
    tensors: Sequence[_Input],
    binary: memoryview,
    specs: Sequence[TensorSpec],
    regions: large_json.Regions,
) -> tuple[np.ndarray, ...]:
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for tensor in tensors:
        spec = next((spec for spec in specs if spec.name == tensor.name), None)
        if spec is None:
            raise ProtocolError(f"there is no input {tensor.name[:80]!a}", f"the model has {protocol.names(specs)}")
        if spec.name in arrays:
            raise ProtocolError(f"the input {spec.name} is given twice")
        protocol.check_shape(spec, tensor.datatype, tensor.shape)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[spec.name] = _from_json(tensor.data, spec, tensor.shape, regions)
            continue
        if len(memoryview(tensor.data)):
            raise ProtocolError(f"the input {spec.name} has both data and binary_data_size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - start:
            raise ProtocolError(f"the input {spec.name} claims more bytes than there are after the JSON")
        arrays[spec.name] = protocol.from_bytes(binary[start : start + size], spec, tensor.shape)
        start += size
    if start != len(binary):
        raise ProtocolError(f"{len(binary) - start} bytes belong to no input")
    return protocol.ordered(arrays, specs)


def _outputs(outputs: Sequence[_Output] | None, specs: Sequence[TensorSpec], binary: Any) -> tuple[Asked, ...]:
    if not isinstance(binary, bool):
        raise ProtocolError("the parameter binary_data_output is not a bool")
    if not outputs:
        return _all_outputs(specs, binary)
    requested = []
    for output in outputs:
        is_binary = output.parameters.get("binary_data", binary)
        if not isinstance(is_binary, bool):
            raise ProtocolError("the parameter binary_data of an output is not a bool")
        classes = protocol.class_count(output.parameters.get("classification", 0))
        requested.append(Asked(name=output.name, binary=is_binary, classes=classes))
    protocol.asked_outputs([output.name for output in requested], specs)
    return tuple(requested)


def _all_outputs(specs: Sequence[TensorSpec], binary: bool) -> tuple[Asked, ...]:
    return tuple(Asked(name=spec.name, binary=binary) for spec in specs)


def _from_json(
    data: msgspec.Raw,
    spec: TensorSpec,
    shape: Sequence[int],
    regions: large_json.Regions,
) -> np.ndarray:
    """Flat or nested data as an array."""
    raw = memoryview(data)
    text = regions.get(bytes(raw), raw) if len(raw) == large_json.PLACEHOLDER_BYTES else raw
    nesting = large_json.nesting(text)
    if not nesting:
        raise ProtocolError(f"the input {spec.name} has no data", "give a list of values")
    count = prod(shape)
    if nesting > len(shape) or 2 * count - 1 > len(text):
        raise _misfit(spec, shape)
    if spec.dtype == "object" or len(text) <= PIECE_BYTES:
        return _array(_flat(_decoded(text, spec, nesting), spec, shape, nesting), spec).reshape(shape)
    array, filled = np.empty(count, spec.dtype), 0
    for piece in large_json.pieces(text, shape, nesting, PIECE_BYTES):
        values = _decoded(piece, spec, nesting)
        for _ in range(nesting - 1):
            values = list(chain.from_iterable(values))
        if filled + len(values) > count:
            raise _misfit(spec, shape)
        array[filled : filled + len(values)] = _array(values, spec)
        filled += len(values)
    if filled != count:
        raise _misfit(spec, shape)
    return array.reshape(shape)


def _decoded(text: memoryview | bytes, spec: TensorSpec, nesting: int) -> list[Any]:
    """Lists of values, as deep as ``nesting``; every value has the input's kind."""
    try:
        values: list[Any] = _decoder(np.dtype(spec.dtype).kind, nesting)(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the data of the input {spec.name} are not {DATATYPES[spec.dtype]}: {protocol.not_json(error, text)}"
        ) from error
    return values


@cache
def _decoder(kind: str, nesting: int) -> Any:
    values: Any = {"f": float, "b": bool, "O": str}.get(kind, int)
    for _ in range(nesting):
        values = list[values]
    return msgspec.json.Decoder(values).decode


def _flat(values: list[Any], spec: TensorSpec, shape: Sequence[int], nesting: int) -> list[Any]:
    for size in shape[1:nesting]:
        if not all(len(row) == size for row in values):
            raise _misfit(spec, shape)
        values = list(chain.from_iterable(values))
    if len(values) != prod(shape):
        raise _misfit(spec, shape)
    return values


def _array(values: list[Any], spec: TensorSpec) -> np.ndarray:
    """Flat values as the input's dtype."""
    kind = np.dtype(spec.dtype).kind
    try:
        if kind == "O":
            return protocol.objects([item.encode() for item in values], [len(values)])
        if kind in "fb":
            with np.errstate(over="ignore"):
                found = np.array(values, spec.dtype)
            if not np.isfinite(found).all():
                number = values[int(np.isfinite(found).argmin())]
                raise OverflowError(f"{number} is out of its range")
            return found
        return protocol.checked_integers(np.array(values, "u8" if kind == "u" else "i8"), spec)
    except (OverflowError, UnicodeEncodeError) as error:
        raise ProtocolError(f"the data of the input {spec.name} are not {DATATYPES[spec.dtype]}: {error}") from error


def _misfit(spec: TensorSpec, shape: Sequence[int]) -> ProtocolError:
    return ProtocolError(
        f"the data of the input {spec.name} do not have the shape {list(shape)[:16]}",
        f"give {prod(shape)} values, flat or nested as the shape says",
    )


def _raw(body: bytes | bytearray, inputs: Sequence[TensorSpec]) -> np.ndarray:
    """The only input of a request without JSON; its first dimension follows from the length."""
    spec = inputs[0]
    if len(inputs) != 1 or None in spec.shape[1:] or spec.dtype == "object":
        raise ProtocolError("a request without JSON needs a model of one input of known shape", "describe it in JSON")
    rest = [size for size in spec.shape[1:] if size is not None]
    row_bytes = prod(rest) * np.dtype(spec.dtype).itemsize
    rows = max(1, len(body) // max(1, row_bytes))
    protocol.check_shape(spec, DATATYPES[spec.dtype], [rows, *rest])
    return protocol.from_bytes(memoryview(body), spec, [rows, *rest])
