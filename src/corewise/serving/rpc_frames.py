"""gRPC infer messages of which all but the tensors was seen before: neither decoded nor encoded again. Pure.

As ``frames`` for HTTP. A message is its fields one after the other, and a client's next one differs from its last in
``raw_input_contents`` only (https://protobuf.dev/programming-guides/encoding).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from corewise.serving import messages, oip, protocol
from corewise.serving.frames import LONGEST_BYTES, MOST_FRAMES, Place
from corewise.serving.protocol import Asked, InferRequest
from corewise.serving.served import Served

RAW_OUTPUT_CONTENTS = 6
"""The number of the field of a ``ModelInferResponse``."""
MOST_ALIKE = 8
"""Messages of one length that are remembered."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A message but for the bytes of its tensors."""

    fixed: tuple[tuple[int, bytes], ...]
    """Where what lies."""
    places: tuple[Place, ...]
    """In the model's order."""
    name: str
    version: str
    of: object
    """The frames of the model that it was understood for: a model that was opened again may take other tensors."""
    outputs: tuple[Asked, ...]
    timeout_s: float | None
    priority: int


class Known(NamedTuple):
    """A message that is known."""

    name: str
    version: str
    of: object
    asked: InferRequest


class RpcFrames:
    """Remembers messages of all models. Used from one event loop."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[_Frame]] = {}
        self._answers: dict[Any, bytes] = {}

    def known(self, data: bytes) -> Known | None:
        """The request in a message if another like it was seen before; the model's frames must still be ``of``."""
        for frame in self._by_length.get(len(data), ()):
            if all(data.startswith(part, start) for start, part in frame.fixed):
                arrays = [
                    np.frombuffer(data, dtype, values, at).reshape(shape) for dtype, shape, values, at in frame.places
                ]
                asked = InferRequest(
                    inputs=tuple(arrays), outputs=frame.outputs, timeout_s=frame.timeout_s, priority=frame.priority
                )
                return Known(frame.name, frame.version, frame.of, asked)
        return None

    def remember(self, data: bytes, request: Any, served: Served, asked: InferRequest) -> None:
        """Remember a message that is that request, if one like it may come again."""
        raws = messages.raw_places(data)
        names = [one.name for one in request.inputs]
        if asked.id is not None or len(raws) != len(names) or len(data) - sum(size for _, size in raws) > LONGEST_BYTES:
            return
        starts = {name: start for name, (start, _) in zip(names, raws, strict=True)}
        places = []
        specs = protocol.chosen_inputs(names, served.inputs, served.instead)
        for spec, array in zip(specs, asked.inputs, strict=True):
            if spec.dtype in ("object", "bool") or spec.name not in starts:
                return
            places.append(Place(array.dtype, array.shape, array.size, starts[spec.name]))
        fixed, end = [], 0
        for start, size in [*sorted(raws), (len(data), 0)]:
            fixed.append((end, data[end:start]))
            end = start + size
        if len(self._by_length) >= MOST_FRAMES:
            self._by_length.clear()
        alike = self._by_length.setdefault(len(data), [])
        alike[:] = [one for one in alike[-MOST_ALIKE + 1 :] if one.fixed != tuple(fixed)]
        alike.append(
            _Frame(
                fixed=tuple(fixed),
                places=tuple(places),
                name=request.model_name,
                version=request.model_version,
                of=served.frames,
                outputs=asked.outputs,
                timeout_s=asked.timeout_s,
                priority=asked.priority,
            )
        )

    def render(self, served: Served, asked: InferRequest, outputs: Sequence[np.ndarray]) -> bytes | None:
        """The ``ModelInferResponse`` as bytes; ``None`` where classes are asked for."""
        if any(one.classes for one in asked.outputs):
            return None
        key = (served.frames, asked.outputs, tuple([(array.dtype, array.shape) for array in outputs]))
        named = {spec.name: array for spec, array in zip(served.outputs, outputs, strict=True)}
        chosen = [named[one.name] for one in asked.outputs]
        head = self._answers.get(key)
        if head is None:
            described = [
                {"name": one.name, "datatype": protocol.datatype(array), "shape": array.shape}
                for one, array in zip(asked.outputs, chosen, strict=True)
            ]
            message = oip.message("ModelInferResponse")
            head = message(model_name=served.name, model_version=served.version, outputs=described).SerializeToString()
            if len(self._answers) >= MOST_FRAMES:
                self._answers.clear()
            self._answers[key] = head
        parts = [head]
        for array in chosen:
            raw = protocol.to_bytes(array)
            parts += [bytes((RAW_OUTPUT_CONTENTS << 3 | 2,)), _varint(len(raw)), raw]
        return b"".join(parts)


def _varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)
