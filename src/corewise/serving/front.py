"""What requests go through on their way to a model, over HTTP and gRPC alike: room, a place, and threads."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import inf
from typing import TypeVar

from corewise.batching import NotServed
from corewise.serving import images
from corewise.serving.budget import Booking, Budget
from corewise.serving.memory_limit import COPIES, PIXEL_BYTES
from corewise.serving.pool import Pool
from corewise.serving.protocol import InferRequest, Limits
from corewise.serving.served import Served

T = TypeVar("T")

SMALL_BYTES = 4096
"""What is parsed in the event loop: a hop to a thread would take longer."""
SMALL_TENSOR_BYTES = 2**20
"""Binary tensors are not parsed, but looked through."""
LARGE_PIXELS = 8_000_000
"""Larger images are decoded one at a time: they take hundreds of megabytes."""
MOST_THREADS = 8
LEAST_PLACES = 16
"""However few requests may wait for a model."""


class Front:
    """One server's. Used from its event loop."""

    def __init__(self, limits: Limits, max_requests: int) -> None:
        """``max_requests`` may be between their first byte and a model's queue."""
        self.budget, self._limits = Budget(limits), limits
        self._max_requests = max(LEAST_PLACES, max_requests)
        self._max_of_client = int(self._max_requests * limits.client_share)
        self._of_clients: Counter[str] = Counter()
        threads = min(MOST_THREADS, max(2, len(os.sched_getaffinity(0))))
        self._readers, self._decoders = Pool("read", 2), Pool("decode", threads)
        self._large_decoder = Pool("decode-large", 1)

    def booking(self, client: str) -> AbstractContextManager[Booking]:
        """The bytes that a request of the client at that address holds until its answer."""
        return self.budget.booking(client)

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """A place among the requests that are on their way to a model. Raises ``NotServed`` where all are taken."""
        if self._of_clients[client] >= self._max_of_client or self._of_clients.total() >= self._max_requests:
            raise NotServed("queue full", 1.0)
        self._of_clients[client] += 1
        try:
            yield
        finally:
            self._of_clients[client] -= 1
            if not self._of_clients[client]:
                del self._of_clients[client]

    async def read(
        self, work: Callable[[], T], text_bytes: int, tensor_bytes: int = 0, *, deadline_s: float = inf
    ) -> T:
        """Read or write a body of that much text, or protobuf, and that much binary data."""
        if text_bytes <= SMALL_BYTES and tensor_bytes <= SMALL_TENSOR_BYTES:
            return work()
        size = text_bytes + tensor_bytes / 100
        return await self._readers.run(work, kind="bytes", size=size, deadline_s=deadline_s)

    async def prepare(self, asked: InferRequest, served: Served, *, deadline_s: float) -> InferRequest:
        """The request as its model takes it. Raises ``ProtocolError``."""
        text_bytes = served.text_bytes(asked)
        if not text_bytes:
            array_bytes = sum(array.nbytes for array in asked.inputs)
            return await self.read(lambda: served.prepared(asked), 0, array_bytes, deadline_s=deadline_s)
        return await self.tokenize(lambda: served.prepared(asked), text_bytes, deadline_s=deadline_s)

    async def tokenize(
        self, work: Callable[[], T], characters: int, *, deadline_s: float, kind: str = "characters"
    ) -> T:
        """Tokenize texts of so many characters together; work of other ``kind`` has costs of its own."""
        return await self._decoders.run(work, kind=kind, size=characters, deadline_s=deadline_s)

    async def image(self, body: bytes, served: Served, *, client: str, deadline_s: float) -> InferRequest:
        """One image as the model takes it; its pixels are booked while it is decoded. Raises ``ProtocolError``."""
        pixels = await self._readers.run(
            lambda: images.pixels(body, served, self._limits.pixels), kind="headers", size=1, deadline_s=deadline_s
        )

        def decode() -> InferRequest:
            with self.booking(client) as booking:
                booking.add(pixels * PIXEL_BYTES // COPIES)
                return images.image(body, served)

        decoder = self._large_decoder if pixels > LARGE_PIXELS else self._decoders
        return await decoder.run(decode, kind="pixels", size=pixels, deadline_s=deadline_s)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._readers, self._decoders, self._large_decoder):
            pool.close()
