"""The messages of gRPC requests, within limits: how many are received at a time, and that they can be read."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

from google.protobuf.message import DecodeError

from corewise.serving.protocol import Limits, NoRoom, ProtocolError

SLOW_S = 2.0
"""How long a message may take to arrive while others wait for its place."""
MOST_TYPED_BYTES = 16 * 2**20
"""Typed contents take many times their bytes; tensors that are larger are sent raw."""


class Receiver:
    """Receives messages, no more at a time than there is room for: nobody knows how long one is before it is there."""

    def __init__(self, limits: Limits) -> None:
        self._body_s = limits.body_s
        self._places = asyncio.Semaphore(max(2, limits.bodies_bytes // limits.body_bytes))
        self._receiving: dict[asyncio.Timeout, float] = {}
        """When each of them may end at the earliest to give its place to another."""

    async def receive(self, messages: AsyncIterator[bytes]) -> bytes:
        """The next message. Raises ``ProtocolError`` where none arrives in time."""
        now_s = asyncio.get_running_loop().time()
        is_crowded = self._places.locked()
        if is_crowded:
            for other, slow_s in self._receiving.items():
                other.reschedule(max(now_s, slow_s))
        async with self._places:
            try:
                async with asyncio.timeout(SLOW_S if is_crowded else self._body_s) as limit:
                    self._receiving[limit] = asyncio.get_running_loop().time() + SLOW_S
                    try:
                        return await anext(messages)
                    finally:
                        del self._receiving[limit]
            except TimeoutError as error:
                raise NoRoom("the message did not arrive in time, and others wait") from error
            except StopAsyncIteration as error:
                raise ProtocolError("the call has no message") from error


def decoded(data: bytes, message: Any) -> Any:
    """The message in those bytes. Raises ``ProtocolError``."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise ProtocolError("the message is not a valid protobuf message of this call") from error


def sizes(request: Any) -> tuple[int, int]:
    """Bytes of a ``ModelInferRequest`` without its raw tensors, and of these. Raises ``ProtocolError``."""
    raw_bytes = sum(map(len, request.raw_input_contents))
    typed_bytes = request.ByteSize() - raw_bytes
    if typed_bytes > MOST_TYPED_BYTES:
        raise ProtocolError(
            f"the request has more than {MOST_TYPED_BYTES} bytes beside its raw tensors", "send tensors raw"
        )
    return typed_bytes, raw_bytes


def client_of(context: Any) -> str:
    """The client's address, as HTTP has it."""
    address = unquote(context.peer()).partition(":")[2].rpartition(":")[0]
    return address.strip("[]")


def authorization(metadata: Any) -> bytes:
    """The header of that name."""
    given = dict(metadata).get("authorization", "")
    return given if isinstance(given, bytes) else given.encode("latin-1", "replace")
