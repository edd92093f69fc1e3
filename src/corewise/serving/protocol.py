"""Open Inference Protocol v2 over JSON, and arrays: pure.

The protocol is https://github.com/kserve/open-inference-protocol (REST), with Triton's extensions for binary tensors
(``extension_binary_data.md``) and for parameters (``timeout`` in microseconds, ``priority``). Nothing is allocated by
what a request claims: claims are compared with the bytes that came.
"""

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite, prod
from typing import Any

import numpy as np

from corewise.common.errors import CorewiseError
from corewise.records.build import TensorSpec

DATATYPES = {
    "bool": "BOOL",
    **{f"{kind}int{bits}": f"{kind.upper()}INT{bits}" for kind in ("u", "") for bits in (8, 16, 32, 64)},
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
}
"""The protocol's name of each numpy dtype; arrays of objects hold ``bytes``."""
DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "classify",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
MOST_DEPTH = 32
MOST_TENSORS = 64
MOST_ID = 256
MOST_PRIORITY = 100


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may be, before anything is kept of it."""

    body_bytes: int = 64 * 2**20
    bodies_bytes: int = 512 * 2**20
    """Of all bodies that are coming in together."""
    body_s: float = 30.0
    """How long a body may take to come."""
    timeout_s: float = 60.0
    """For requests that name no time of their own."""


class ProtocolError(CorewiseError):
    """A request that is none; ``status`` is HTTP's."""

    def __init__(self, what: str, fix: str = "", status: int = 400) -> None:
        super().__init__(what, fix)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An output that a request asks for, and how."""

    name: str
    binary: bool = False
    classes: int = 0
    """How many of its highest values are wanted, as classes; 0 for the output itself."""


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request as the model takes it."""

    inputs: tuple[np.ndarray, ...]
    """In the model's order; all with the same first dimension, of at least 1. BYTES are arrays of objects."""
    outputs: tuple[Asked, ...]
    id: str | None = None
    timeout_s: float | None = None
    priority: int = 0

    @property
    def class_counts(self) -> dict[str, int]:
        """How many classes are wanted of each output that is wanted as classes."""
        return {output.name: output.classes for output in self.outputs if output.classes}


def parse(
    body: bytes,
    header_length: int | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    instead: TensorSpec | None = None,
) -> InferRequest:
    """The request in a body; ``header_length`` is how much of it is JSON, the rest are binary tensors.

    It may have the one input ``instead`` in place of the model's own.

    A length of 0 is Triton's raw request: the body is the one input's data. Raises ``ProtocolError``.
    """
    if header_length == 0:
        return InferRequest(
            inputs=(_raw(body, inputs),), outputs=tuple(Asked(name=o.name, binary=True) for o in outputs)
        )
    if header_length is not None and not 0 < header_length <= len(body):
        raise ProtocolError(
            f"Inference-Header-Content-Length is {header_length}, of a body of {len(body)} bytes",
            "give the length of the JSON part",
        )
    header = _object(body[:header_length], "the request")
    parameters = _parameters(header, "the request")
    binary = memoryview(body)[header_length:] if header_length is not None else memoryview(b"")
    arrays = _inputs(header.get("inputs"), binary, inputs, instead)
    timeout = parameters.get("timeout")
    return InferRequest(
        inputs=arrays,
        outputs=_outputs(header.get("outputs"), outputs, parameters.get("binary_data_output", False)),
        id=_id(header.get("id")),
        timeout_s=None if timeout is None else microseconds(timeout),
        priority=priority(parameters.get("priority", 0)),
    )


def render(
    model: str, version: str | None, request: InferRequest, outputs: Mapping[str, np.ndarray]
) -> tuple[list[bytes], int | None]:
    """The response's body in parts, and how long the JSON is where binary tensors follow it; ``None`` where none do."""
    described: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for asked in request.outputs:
        found = outputs[asked.name]
        one: dict[str, Any] = {
            "name": asked.name,
            "datatype": DATATYPES[found.dtype.name],
            "shape": list(found.shape),
        }
        if asked.binary:
            tails.append(to_bytes(found))
            one["parameters"] = {"binary_data_size": len(tails[-1])}
        elif found.dtype == object:
            one["data"] = [item.decode("utf-8", "replace") for item in found.reshape(-1)]
        else:
            one["data"] = _numbers(found)
        described.append(one)
    answer: dict[str, Any] = {"model_name": model, "outputs": described}
    if version is not None:
        answer["model_version"] = version
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer, allow_nan=False).encode()
    return [head, *tails], len(head) if tails else None


def _numbers(array: np.ndarray) -> list[Any]:
    """A tensor's numbers for JSON, which has no word for NaN and infinities: they are null (binary keeps them)."""
    numbers: list[Any] = array.reshape(-1).tolist()
    finite = np.isfinite(array).reshape(-1) if array.dtype.kind == "f" else np.ones(0, bool)
    if finite.all():
        return numbers
    return [number if is_finite else None for number, is_finite in zip(numbers, finite.tolist(), strict=True)]


def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors as a model's metadata tells of them."""
    return [
        {
            "name": spec.name,
            "datatype": DATATYPES[spec.dtype],
            "shape": [-1 if size is None else size for size in spec.shape],
        }
        for spec in specs
    ]


def from_bytes(data: memoryview, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """A tensor from its little-endian bytes; BYTES are a 32-bit length and the bytes, each.

    Raises ``ProtocolError``.
    """
    if spec.dtype == "object":
        return _strings(data, spec, shape)
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    wanted = prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise ProtocolError(f"the input {spec.name} has {len(data)} bytes, where its shape asks for {wanted}")
    found = np.frombuffer(data, dtype)
    # Any byte but 0 and 1 is no bool to a compiled kernel.
    found = found.view(np.uint8) != 0 if spec.dtype == "bool" else found
    return found.reshape(shape)


def to_bytes(array: np.ndarray) -> bytes:
    """A tensor's little-endian bytes, in row-major order."""
    if array.dtype == object:
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.reshape(-1))
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def check_shape(spec: TensorSpec, datatype: str, shape: Sequence[int]) -> None:
    """Raise ``ProtocolError`` where a tensor is not what the model takes."""
    if datatype != DATATYPES[spec.dtype]:
        told = ascii(datatype[:20])[1:-1]
        raise ProtocolError(f"the input {spec.name} is {told}, the model takes {DATATYPES[spec.dtype]}")
    fits = len(shape) == len(spec.shape) and all(
        1 <= given < 2**40 and size in (None, given) for given, size in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = [-1 if size is None else size for size in spec.shape]
        given = "another shape" if any(abs(size) >= 2**40 for size in shape) else f"the shape {list(shape)[:16]}"
        raise ProtocolError(f"the input {spec.name} has {given}, the model takes {wanted}")


def ordered(found: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> tuple[np.ndarray, ...]:
    """A request's tensors in the model's order. Raises ``ProtocolError`` where one is missing or rows differ."""
    if missing := [spec.name for spec in specs if spec.name not in found]:
        raise ProtocolError(f"the input {missing[0]} is missing")
    arrays = tuple(found[spec.name] for spec in specs)
    if len({len(array) for array in arrays}) > 1:
        raise ProtocolError(f"the inputs have {', '.join(str(len(array)) for array in arrays)} rows: give as many each")
    return arrays


def asked_outputs(names: Sequence[str], outputs: Sequence[TensorSpec]) -> None:
    """Raise ``ProtocolError`` for an output that the model has not, or that is asked for twice."""
    for name in names:
        if name not in {spec.name for spec in outputs}:
            raise ProtocolError(f"there is no output {name[:80]!a}", f"the model has {_names(outputs)}")
    if len(set(names)) != len(names):
        raise ProtocolError("an output is asked for twice")


def microseconds(value: Any) -> float:
    """A parameter ``timeout`` in seconds. Raises ``ProtocolError``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise ProtocolError("the parameter timeout is no number of microseconds above 0")
    return float(value) / 1e6


def priority(value: Any) -> int:
    """A parameter ``priority``: the higher, the more urgent. Raises ``ProtocolError``."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MOST_PRIORITY:
        raise ProtocolError(f"the parameter priority is no whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}")
    return value


def class_count(value: Any) -> int:
    """An output's parameter ``classification``. Raises ``ProtocolError``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ProtocolError("the parameter classification is no whole number of classes")
    return value


def depth(text: bytes) -> int:
    """How deep arrays and objects of JSON text nest, without parsing it."""
    # Two passes that each look at a byte once; one pattern for a string with its escapes does not, where none ends.
    bare = np.frombuffer(re.sub(rb'"[^"]*"?', b"", re.sub(rb"\\.", b"", text, flags=re.DOTALL)), np.uint8)
    steps = np.isin(bare, np.frombuffer(b"[{", np.uint8)).astype(np.int8)
    steps -= np.isin(bare, np.frombuffer(b"]}", np.uint8))
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _object(text: bytes, what: str) -> dict[str, Any]:
    # Most requests have fewer brackets than may nest, which is quicker to tell.
    if text.count(b"[") + text.count(b"{") > MOST_DEPTH and depth(text) > MOST_DEPTH:
        raise ProtocolError(f"{what} nests deeper than {MOST_DEPTH} levels")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{what} is no JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"{what} is no JSON object")
    return found


def _parameters(holder: Mapping[str, Any], what: str) -> dict[str, Any]:
    found = holder.get("parameters", {})
    if not isinstance(found, dict):
        raise ProtocolError(f"the parameters of {what} are no object")
    return found


def _id(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MOST_ID:
        raise ProtocolError(f"the id is no string of at most {MOST_ID} characters")
    return value


def _list(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value) or len(value) > MOST_TENSORS:
        raise ProtocolError(f"{what} are no list of at most {MOST_TENSORS} objects")
    return value


def _inputs(
    described: Any, binary: memoryview, specs: Sequence[TensorSpec], instead: TensorSpec | None
) -> tuple[np.ndarray, ...]:
    listed = _list(described, "the inputs")
    if instead is not None and [one.get("name") for one in listed] == [instead.name]:
        specs = (instead,)
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, np.ndarray] = {}
    at = 0
    for one in listed:
        name = one.get("name")
        spec = by_name.get(name) if isinstance(name, str) else None
        if spec is None:
            raise ProtocolError(f"there is no input {str(name)[:80]!a}", f"the model has {_names(specs)}")
        if spec.name in found:
            raise ProtocolError(f"the input {spec.name} is there twice")
        shape, datatype = one.get("shape"), one.get("datatype")
        if not isinstance(shape, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in shape):
            raise ProtocolError(f"the shape of the input {spec.name} is no list of whole numbers")
        check_shape(spec, str(datatype), shape)
        size = _parameters(one, f"the input {spec.name}").get("binary_data_size")
        if size is None:
            found[spec.name] = _from_json(one.get("data"), spec, shape)
            continue
        if "data" in one:
            raise ProtocolError(f"the input {spec.name} has both data and binary_data_size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary) - at:
            raise ProtocolError(f"the input {spec.name} claims more bytes than there are after the JSON")
        found[spec.name] = from_bytes(binary[at : at + size], spec, shape)
        at += size
    if at != len(binary):
        raise ProtocolError(f"{len(binary) - at} bytes belong to no input")
    return ordered(found, specs)


def _outputs(described: Any, specs: Sequence[TensorSpec], binary: Any) -> tuple[Asked, ...]:
    if not isinstance(binary, bool):
        raise ProtocolError("the parameter binary_data_output is no bool")
    if described is None or described == []:
        return tuple(Asked(name=spec.name, binary=binary) for spec in specs)
    asked = []
    for one in _list(described, "the outputs"):
        wanted = _parameters(one, "an output").get("binary_data", binary)
        if not isinstance(one.get("name"), str) or not isinstance(wanted, bool):
            raise ProtocolError("an output has no name, or binary_data that is no bool")
        classes = class_count(_parameters(one, "an output").get("classification", 0))
        asked.append(Asked(name=one["name"], binary=wanted, classes=classes))
    asked_outputs([one.name for one in asked], specs)
    return tuple(asked)


def _from_json(data: Any, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """Flat or nested data. Numbers never go through strings: numpy would take those, at any length."""
    flat = _flat(data, spec, shape)
    if len(flat) != prod(shape):
        raise ProtocolError(f"the input {spec.name} has {len(flat)} values, where its shape asks for {prod(shape)}")
    dtype = np.dtype(spec.dtype)
    try:
        if dtype.kind == "O":
            return objects([item.encode() for item in flat], shape)
        if dtype.kind == "b":
            if not set(map(type, flat)) <= {bool}:
                raise TypeError("they are no bools")
            return np.array(flat, bool).reshape(shape)
        code = "d" if dtype.kind == "f" else "q" if dtype.kind == "i" else "Q"
        numbers = np.frombuffer(array(code, flat), code)
        if dtype.kind != "f" and len(numbers):
            limits = np.iinfo(dtype)
            if numbers.min() < limits.min or numbers.max() > limits.max:
                raise OverflowError(f"they are not from {limits.min} to {limits.max}")
        with np.errstate(over="ignore"):
            return numbers.astype(dtype).reshape(shape)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"the data of the input {spec.name} are no {DATATYPES[spec.dtype]}: {error}") from error


def _flat(data: Any, spec: TensorSpec, shape: Sequence[int]) -> list[Any]:
    if not isinstance(data, list):
        raise ProtocolError(f"the input {spec.name} has no data")
    level = data
    for size in shape[1:]:
        if not level or not isinstance(level[0], list):
            break
        if not all(isinstance(one, list) and len(one) == size for one in level):
            raise ProtocolError(f"the data of the input {spec.name} do not nest as its shape says")
        level = list(chain.from_iterable(level))
    return level


def objects(items: Sequence[bytes], shape: Sequence[int]) -> np.ndarray:
    """An array of bytes, of any lengths."""
    found = np.empty(len(items), object)
    found[:] = items
    return found.reshape(shape)


def _strings(data: memoryview, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    items: list[bytes] = []
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + size > len(data) or at + 4 > len(data):
            raise ProtocolError(f"a string of the input {spec.name} ends after the data do")
        items.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    if len(items) != prod(shape):
        raise ProtocolError(f"the input {spec.name} has {len(items)} strings, where its shape asks for {prod(shape)}")
    return objects(items, shape)


def _raw(body: bytes, inputs: Sequence[TensorSpec]) -> np.ndarray:
    """The one input of a request without JSON; its first dimension follows from the length."""
    spec = inputs[0]
    if len(inputs) != 1 or None in spec.shape[1:] or spec.dtype == "object":
        raise ProtocolError("a request without JSON needs a model of one input of known shape", "describe it in JSON")
    rest = [size for size in spec.shape[1:] if size is not None]
    row = prod(rest) * np.dtype(spec.dtype).itemsize
    rows = max(1, len(body) // max(1, row))
    check_shape(spec, DATATYPES[spec.dtype], [rows, *rest])
    return from_bytes(memoryview(body), spec, [rows, *rest])


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)
