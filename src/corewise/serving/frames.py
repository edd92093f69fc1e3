"""The JSON around binary tensors, understood once: clients send the same bytes again and again. Pure.

A request with binary tensors is a JSON head that names, types and shapes them, and their bytes. The head of a client's
next request is nearly always that of its last, and so is the head of the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from corewise.records.build import TensorSpec
from corewise.serving import json_body, protocol
from corewise.serving.protocol import Asked, InferRequest

MOST_FRAMES = 256
"""Frames of each kind that are remembered; then all are forgotten together."""
LONGEST_BYTES = 1024

Headers = list[tuple[bytes, bytes]]


class Place(NamedTuple):
    """Where a tensor lies in a body or a message."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    values: int
    start: int


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A request but for its bytes."""

    body_bytes: int
    places: tuple[Place, ...]
    """In the model's order."""
    outputs: tuple[Asked, ...]
    timeout_s: float | None
    priority: int


class Frames:
    """Reads and writes requests and answers of one model. Used from one event loop."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        instead: Sequence[Sequence[TensorSpec]] = (),
    ) -> None:
        self._inputs, self._outputs, self._instead = inputs, outputs, instead
        self._requests: dict[bytes, _Frame] = {}
        self._answers: dict[Any, tuple[bytes, Headers]] = {}

    def known(self, body: bytes, length: int | None) -> InferRequest | None:
        """The request in a body whose first ``length`` bytes are a head that was seen before; otherwise ``None``."""
        if length is None or not 0 < length <= LONGEST_BYTES:
            return None
        frame = self._requests.get(body[:length])
        if frame is None or frame.body_bytes != len(body):
            return None
        return InferRequest(
            inputs=tuple(
                [np.frombuffer(body, dtype, values, at).reshape(shape) for dtype, shape, values, at in frame.places]
            ),
            outputs=frame.outputs,
            timeout_s=frame.timeout_s,
            priority=frame.priority,
        )

    def remember(self, body: bytes, length: int | None, asked: InferRequest) -> None:
        """Remember the head of a body that is that request, if it is one that may come again."""
        if length is None or not 0 < length <= LONGEST_BYTES or asked.id is not None:
            return
        head = body[:length]
        sizes: dict[str, tuple[int, int]] = {}
        start = length
        for tensor in json_body.frame(head).inputs:
            size = tensor.parameters.get("binary_data_size")
            if size is None:
                return
            sizes[tensor.name] = (start, size)
            start += size
        specs = protocol.chosen_inputs(list(sizes), self._inputs, self._instead)
        if set(sizes) != {spec.name for spec in specs}:
            return
        places = []
        for spec, array in zip(specs, asked.inputs, strict=True):
            if spec.dtype in ("object", "bool"):
                return
            places.append(Place(array.dtype, array.shape, prod(array.shape), sizes[spec.name][0]))
        _make_room(self._requests)
        self._requests[head] = _Frame(
            body_bytes=len(body),
            places=tuple(places),
            outputs=asked.outputs,
            timeout_s=asked.timeout_s,
            priority=asked.priority,
        )

    def render(
        self, name: str, version: str, asked: InferRequest, outputs: Sequence[np.ndarray]
    ) -> tuple[bytes, Headers] | None:
        """The answer's body and headers if all of it is binary, by the model's outputs in its order; else ``None``."""
        if asked.id is not None or any(not one.binary or one.classes for one in asked.outputs):
            return None
        key = (version, asked.outputs, tuple([(array.dtype, array.shape) for array in outputs]))
        named = {spec.name: array for spec, array in zip(self._outputs, outputs, strict=True)}
        tensors = [named[one.name] for one in asked.outputs]
        data = b"".join([protocol.to_bytes(array) for array in tensors])
        found = self._answers.get(key)
        if found is None:
            parts, length = json_body.render(name, version, asked, named)
            head = b"".join(parts)[:length]
            _make_room(self._answers)
            found = self._answers[key] = (head, _headers(len(head) + len(data), length))
            if any(array.dtype == object for array in tensors):  # their bytes differ from answer to answer
                del self._answers[key]
        head, headers = found
        return head + data, headers


def _headers(body_bytes: int, length: int | None) -> Headers:
    return [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"%d" % body_bytes),
        (b"inference-header-content-length", b"%d" % (length or 0)),
    ]


def _make_room(frames: dict[Any, Any]) -> None:
    if len(frames) >= MOST_FRAMES:
        frames.clear()
