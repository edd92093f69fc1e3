"""The Open Inference Protocol v2: its datatypes, its limits, and arrays from bytes. Pure.

The protocol is https://github.com/kserve/open-inference-protocol, with Triton's extensions for binary tensors
(``extension_binary_data.md``) and for parameters (``timeout`` in microseconds, ``priority`` from 1, the most urgent).
``json_body`` reads and writes requests and answers in JSON. A claim of a request is compared with the bytes that
arrived before anything is allocated.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec
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

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "classify",
    "detect",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
HALF_PAIR = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]|\\(?!u[dD][89a-fA-F]).)*+\\u[dD][89a-fA-F]", re.DOTALL
)
"""JSON up to half of a surrogate pair; msgspec says of some that the text is malformed or ends too early."""
HALF_PAIR_BYTES = 2**18
"""How far it is looked for: 6 ms at most."""
VALUE_BYTES = 8
"""About what a number takes in JSON."""
MOST_TENSORS = 64
"""Inputs, or outputs, of a request."""
MOST_ID = 256
"""Characters of a request's id."""
MOST_STRINGS = 8192
"""Strings in an input. Reading this many from bytes takes the event loop a few milliseconds."""
MOST_TIMEOUT = 2**63
"""The parameter ``timeout`` is below it; larger numbers of JSON may be no float."""
PRIORITY_LEVELS, DEFAULT_LEVEL = 100, 50
"""The levels of the parameter ``priority``, 1 the most urgent; a request without one, or with 0, has the default."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may be, before anything is kept of it."""

    body_bytes: int = 64 * 2**20
    bodies_bytes: int = 512 * 2**20
    """Bodies of all requests together, over HTTP and gRPC: what arrived and was unpacked, until its answer."""
    message_bytes: int = 64 * 2**20
    """The longest gRPC message: its length is not known before all of it is there."""
    receiving: int = 8
    """gRPC messages that are received at a time."""
    streams: int = 32
    """gRPC calls that may send a stream of messages, each of which is received at any time."""
    typed_bytes: int = 16 * 2**20
    """What a gRPC message may have beside its raw tensors: decoded, it takes many times its bytes."""
    pixels: int = 50_000_000
    """Pixels of an image."""
    samples: int = 100_000_000
    """Values of a recording, all channels together: 19 minutes of stereo at 44,100 Hz, more than a body of WAV has."""
    connections: int = 4096
    """Connections on each port; fewer if the process may not have that many open files."""
    client_share: float = 0.5
    """Share of the connections, and of the places for requests, that one address may have."""
    body_s: float = 30.0
    """How long a body may take to come."""
    timeout_s: float = 60.0
    """The time limit of requests that name none."""


class ProtocolError(CorewiseError):
    """A request that is none; ``status`` is HTTP's."""

    def __init__(self, what: str, fix: str = "", status: int = 400) -> None:
        super().__init__(what, fix)
        self.status = status


class NoRoom(ProtocolError):
    """A request that cannot be held now, and may be sent again."""

    def __init__(self, what: str) -> None:
        super().__init__(what, "try again later", 503)


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


_DATATYPES = {np.dtype(name): datatype for name, datatype in DATATYPES.items()}


def datatype(array: np.ndarray) -> str:
    """The protocol's name of the array's dtype."""
    return _DATATYPES[array.dtype]


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
        raise ProtocolError(f"the input {spec.name} has {len(data)} bytes, but its shape needs {wanted}")
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
    if spec.dtype == "object" and prod(shape) > MOST_STRINGS:
        raise ProtocolError(
            f"the input {spec.name} has {prod(shape)} strings", f"send at most {MOST_STRINGS} in a request", 413
        )


def chosen_inputs(
    names: Sequence[str], inputs: Sequence[TensorSpec], instead: Sequence[Sequence[TensorSpec]]
) -> Sequence[TensorSpec]:
    """The inputs that a request with tensors of these names means: the model's own, or those in place of all of them.

    With a name of another set these are meant, whatever else is wrong with the request.

    Example:
        >>> ids, text = (TensorSpec(name=name, dtype="object", shape=(None,)) for name in ("ids", "text"))
        >>> chosen_inputs(["text"], [ids], [[text]])[0].name
        'text'
    """
    own = {spec.name for spec in inputs}
    return next((specs for specs in instead if {spec.name for spec in specs} & set(names) - own), inputs)


def ordered(found: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> tuple[np.ndarray, ...]:
    """A request's tensors in the model's order. Raises ``ProtocolError`` where one is missing or rows differ."""
    if missing := [spec.name for spec in specs if spec.name not in found]:
        raise ProtocolError(f"the input {missing[0]} is missing")
    arrays = tuple(found[spec.name] for spec in specs)
    if len({len(array) for array in arrays}) > 1:
        counts = ", ".join(str(len(array)) for array in arrays)
        raise ProtocolError(f"the inputs have {counts} rows: give each the same number")
    return arrays


def asked_outputs(asked: Sequence[str], outputs: Sequence[TensorSpec]) -> None:
    """Raise ``ProtocolError`` for an output that the model has not, or that is asked for twice."""
    for name in asked:
        if name not in {spec.name for spec in outputs}:
            raise ProtocolError(f"there is no output {name[:80]!a}", f"the model has {names(outputs)}")
    if len(set(asked)) != len(asked):
        raise ProtocolError("an output is asked for twice")


def microseconds(value: Any) -> float:
    """A parameter ``timeout`` in seconds. Raises ``ProtocolError``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_TIMEOUT:
        raise ProtocolError("the parameter timeout is not a number of microseconds above 0 and below 2^63")
    return float(value) / 1e6


def priority(value: Any) -> int:
    """A parameter ``priority`` as the batcher has it: the higher, the more urgent. Raises ``ProtocolError``.

    Triton's levels count the other way (``extension_schedule_policy.md``).

    Example:
        >>> [priority(level) for level in (1, 0, 50, 100)]
        [49, 0, 0, -50]
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= PRIORITY_LEVELS:
        raise ProtocolError(
            f"the parameter priority is not a whole number from 0 to {PRIORITY_LEVELS}",
            f"give 1 for the most urgent to {PRIORITY_LEVELS} for the least; 0 stands for {DEFAULT_LEVEL}",
        )
    return DEFAULT_LEVEL - value if value else 0


def class_count(value: Any) -> int:
    """An output's parameter ``classification``. Raises ``ProtocolError``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ProtocolError("the parameter classification is not a whole number of classes")
    return value


def checked_integers(numbers: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """64-bit integers as the input's dtype. Raises ``ProtocolError`` where one does not fit."""
    limits = np.iinfo(spec.dtype)
    if len(numbers) and not (limits.min <= int(numbers.min()) and int(numbers.max()) <= limits.max):
        raise ProtocolError(
            f"the data of the input {spec.name} are not {DATATYPES[spec.dtype]}",
            f"give whole numbers from {limits.min} to {limits.max}",
        )
    return numbers.astype(spec.dtype, copy=False)


def objects(items: Sequence[bytes], shape: Sequence[int]) -> np.ndarray:
    """An array of bytes, of any lengths."""
    found = np.empty(len(items), object)
    found[:] = items
    return found.reshape(shape)


def _strings(data: memoryview, spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    items: list[bytes] = []
    count, start = prod(shape), 0
    while start < len(data) and len(items) <= count:
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if end > len(data) or start + 4 > len(data):
            raise ProtocolError(f"a string of the input {spec.name} ends after its data")
        items.append(bytes(data[start + 4 : end]))
        start = end
    if len(items) != count:
        more = "more than " if len(items) > count else ""
        raise ProtocolError(
            f"the input {spec.name} has {more}{min(len(items), count)} strings, but its shape needs {count}"
        )
    return objects(items, shape)


def not_json(error: Exception, text: bytes | memoryview) -> str:
    """Why a text is not JSON, or not the JSON that is wanted, in one line."""
    is_malformed = isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError)
    if is_malformed and HALF_PAIR.match(text, 0, HALF_PAIR_BYTES):
        return "it has half of a surrogate pair"
    return " ".join(str(error).split())[:200]


def names(specs: Sequence[TensorSpec]) -> str:
    """Tensors' names, for messages."""
    return ", ".join(spec.name for spec in specs)
