"""The messages of gRPC requests, within limits: how many are received at a time, and that they can be read."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from corewise.serving import addresses
from corewise.serving.protocol import Limits, NoRoom, ProtocolError
from corewise.serving.tokens import Tokens

SLOW_S = 2.0
"""How long a message may take to arrive while others wait for its place."""
MOST_OF_CLIENT, MOST = 1024, 4096
"""Calls that wait for a place."""
PROBES = 2
"""Messages of calls without tensors that are received at a time, apart from the others: a crowd must not keep probes
out."""
FREE_BYTES = 64 * 1024
"""Messages up to this size are decoded as they are; those of calls without tensors are no longer."""
RAW_CONTENTS = 7
"""The number of the field ``raw_input_contents`` of a ``ModelInferRequest``."""
MOST_FIELDS = 4096
DECODED_BYTES = 16
"""How many bytes of protobuf are decoded in the time that one of JSON takes, or more."""
CODES = {
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}


def status_code(error: ProtocolError) -> Any:
    """gRPC's code for an error's HTTP status; other statuses are the client's fault."""
    return CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)


class Receiver:
    """Receives messages, no more at a time than there is room for: nobody knows how long one is before it is there.

    One address has half of the places at most. Used from one event loop.
    """

    def __init__(self, limits: Limits, places: int | None = None) -> None:
        self._body_s = limits.body_s
        self._size = places or limits.receiving
        self._share = max(1, self._size // 2)
        self._taken = 0
        self._of_clients: Counter[str] = Counter()
        """Places that each address has."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Calls that wait for a place, by address."""
        self._waiting_count = 0
        self._receiving: dict[asyncio.Timeout, float] = {}
        """When each of them may end at the earliest to give its place to another."""

    async def receive(self, messages: AsyncIterator[bytes], client: str = "") -> bytes:
        """The next message. Raises ``ProtocolError`` where none arrives in time."""
        is_crowded = not self._is_free(client)
        if is_crowded:
            await self._turn(client)
        else:
            self._take(client)
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
        finally:
            self._give_back(client)

    def _is_free(self, client: str) -> bool:
        return self._taken < self._size and self._of_clients[client] < self._share

    def _take(self, client: str) -> None:
        self._taken += 1
        self._of_clients[client] += 1

    def _give_back(self, client: str) -> None:
        """Give a place to the next call that may have it; addresses take turns."""
        self._taken -= 1
        self._of_clients[client] -= 1
        if not self._of_clients[client]:
            del self._of_clients[client]
        for other, queue in list(self._waiting.items()):
            while queue and self._is_free(other):
                turn = queue.popleft()
                self._waiting_count -= 1
                if not turn.done():
                    self._take(other)
                    turn.set_result(None)
            del self._waiting[other]
            if queue:
                self._waiting[other] = queue

    async def _turn(self, client: str) -> None:
        """Wait for a place, and have those end soon that have one and send nothing."""
        queue = self._waiting.setdefault(client, deque())
        if len(queue) >= MOST_OF_CLIENT or self._waiting_count >= MOST:
            raise NoRoom("too many calls have not sent their message yet")
        now_s = asyncio.get_running_loop().time()
        for other, slow_s in self._receiving.items():
            if not other.expired():  # it may be about to end
                other.reschedule(max(now_s, slow_s))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        self._waiting_count += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had got the place
                self._give_back(client)
            raise


class Streams:
    """Calls that send one message after the other: each may have one on its way at any time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place for one of them. Raises ``NoRoom`` where all are taken, or half of them by one address."""
        if self._of_clients[client] >= max(1, self._most // 2) or self._of_clients.total() >= self._most:
            raise NoRoom(f"there are {self._most} streams already, or half as many from your address")
        self._of_clients[client] += 1
        try:
            yield
        finally:
            self._of_clients[client] -= 1
            if not self._of_clients[client]:
                del self._of_clients[client]


def decoded(data: bytes, message: Any) -> Any:
    """The message in those bytes. Raises ``ProtocolError``."""
    try:
        return message.FromString(data)
    except DecodeError as error:
        raise ProtocolError("the message is not a valid protobuf message of this call") from error


def check_small(data: bytes) -> None:
    """Raise ``ProtocolError`` for a message of a call without tensors that is too long."""
    if len(data) > FREE_BYTES:
        raise ProtocolError(f"the message of this call has more than {FREE_BYTES} bytes", "send names only", 413)


def check_infer(data: bytes, limits: Limits) -> None:
    """Raise ``ProtocolError`` for a ``ModelInferRequest`` that would take many times its bytes when it is decoded.

    Raw tensors stay as they are. All else may be lists of tiny messages or numbers, each of which becomes 8 to 100
    bytes.
    """
    if len(data) > FREE_BYTES and len(data) - _raw_bytes(data) > limits.typed_bytes:
        raise ProtocolError(
            f"the request has more than {limits.typed_bytes} bytes beside its raw tensors", "send tensors raw", 413
        )


def _raw_bytes(data: bytes) -> int:
    """The bytes of raw tensors, as far as it is a message and has not too many fields: what follows is not counted."""
    return sum(size for _, size in raw_places(data))


def raw_places(data: bytes) -> list[tuple[int, int]]:
    """Start and size of each raw tensor of a ``ModelInferRequest``, by the message's outermost fields.

    Stops where it is no longer a message, or has too many fields (https://protobuf.dev/programming-guides/encoding).
    """
    places, start = [], 0
    for _ in range(MOST_FIELDS):
        tag, start = _varint(data, start)
        size, start = _varint(data, start)
        if tag & 7 != 2 or start + size > len(data):  # all fields of the message are length-delimited
            break
        if tag >> 3 == RAW_CONTENTS:
            places.append((start, size))
        start += size
        if start == len(data):
            break
    return places


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = 0
    for k, byte in enumerate(data[start : start + 10]):
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value, start + k + 1
    return 0, len(data)


def sizes(request: Any) -> tuple[int, int]:
    """Bytes of a ``ModelInferRequest`` without its raw tensors, and of these."""
    raw_bytes = sum(map(len, request.raw_input_contents))
    return request.ByteSize() - raw_bytes, raw_bytes


def client_of(context: Any) -> str:
    """The client, as HTTP has it; empty for a unix socket."""
    return _client_at(context.peer())


@lru_cache(4096)
def _client_at(peer: str) -> str:
    kind, _, address = unquote(peer).partition(":")
    if kind == "unix-abstract":  # an ``RpcPort`` passes its connection on
        return address.rpartition("/")[2]
    return addresses.client_of(address.rpartition(":")[0].strip("[]")) if kind in ("ipv4", "ipv6") else ""


def is_admitted(context: Any, tokens: Tokens) -> bool:
    """Whether a call has a token, or needs none."""
    if not tokens.are_needed:
        return True
    given = dict(context.invocation_metadata()).get("authorization", "")
    return tokens.admit(given if isinstance(given, bytes) else given.encode("latin-1", "replace"))
