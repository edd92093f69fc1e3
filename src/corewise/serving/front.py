"""What requests go through on their way to a model, over HTTP and gRPC alike: room, a place, threads, and admission.

The model's batcher knows how long its own queue takes. Here is known, from the last requests, what comes before it
(decoding, tokenizing) and after it (rendering, and the wait for the event loop), so that a request that would be late
is refused before anything is done for it.
"""

import asyncio
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from math import inf
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from corewise.batching import Answer, NotServed
from corewise.serving import files, images, recordings
from corewise.serving.budget import Booking, Budget
from corewise.serving.costs import Costs, Tail
from corewise.serving.deliveries import Deliveries, Waiters
from corewise.serving.files import Batch, Media, Work
from corewise.serving.memory_limit import COPIES
from corewise.serving.models import Models
from corewise.serving.pool import Pool
from corewise.serving.protocol import InferRequest, Limits, ProtocolError
from corewise.serving.served import Served
from corewise.serving.turns import Turns

T = TypeVar("T")

SMALL_BYTES = 4096
"""What is parsed in the event loop: a hop to a thread would take longer."""
SMALL_TENSOR_BYTES = 2**20
"""Binary tensors are not parsed, but looked through."""
LONG_BYTES = 2**20
"""Recordings of more bytes may have headers that take long to read: those of FLAC 27 ms for each MB of empty blocks."""
LARGE_BYTES = 64_000_000
"""Files that take more memory are decoded one at a time, images of over 8 megapixels among them."""
MOST_THREADS = 8
DECODE_NICE = 5
"""Decoding takes all that it gets: the event loop, and the calls of what is decoded, come first."""
LEAST_PLACES = 16
"""Places for requests, however few may wait for a model."""
LOOK_EACH = 8
"""One in this many requests that would be refused unread is read."""
TICK_S = 0.02
"""How often the event loop shows that it is not held up."""
SLACK_S = 0.005
"""How late that may be, as timers are."""


class Front:
    """One server's. Used from its event loop."""

    def __init__(self, limits: Limits, max_requests: int) -> None:
        self.budget, self._limits = Budget(limits), limits
        self.most_requests = max(LEAST_PLACES, max_requests)
        """How many requests may be between their first byte and a model's queue."""
        self._max_of_client = int(self.most_requests * limits.client_share)
        self._of_clients: dict[Any, int] = {}
        self.threads = min(MOST_THREADS, max(2, len(os.sched_getaffinity(0))))
        """Threads that decode images and tokenize texts."""
        self._readers, self._headers = Pool("read", 2), Pool("header", 2)
        self._decoders = Pool("decode", self.threads, nice=DECODE_NICE)
        self._large_decoder = Pool("decode-large", 1, nice=DECODE_NICE)
        self._teller = Pool("tell", 1, nice=DECODE_NICE)
        self._told: dict[Hashable, asyncio.Task[Any]] = {}
        """What is being told, by what it is about."""
        self._places = 0
        self._on_way: dict[Any, int] = {}
        """Requests that have a place, by their model."""
        self._costs = Costs()
        self._tail = Tail()
        """From the end of a call to the answer on the wire."""
        self._deliveries = Deliveries()
        self._turns = Turns()
        self._looks = count()
        self._alive_s = inf
        """When the event loop was last seen not to be held up."""
        self._lag_s = self._arrived_s = 0.0
        self._ticker: asyncio.TimerHandle | None = None

    def watch_loop(self) -> None:
        """Note now and then that the event loop runs, so that ``arrived_s`` knows when it did not."""
        loop = asyncio.get_running_loop()

        def note() -> None:
            self._alive_s = monotonic()

        # Two rounds later: what lay in sockets while the loop was held up is read first, and is to know.
        loop.call_soon(loop.call_soon, note)
        self._ticker = loop.call_later(TICK_S, self.watch_loop)

    def arrived_s(self) -> float:
        """When bytes that are read now came, at the earliest, on the monotonic clock; never earlier than before.

        While the event loop is held up they lie in their sockets, and nobody sees since when.
        """
        now_s = monotonic()
        self._lag_s = max(0.0, now_s - self._alive_s - TICK_S - SLACK_S)
        self._arrived_s = max(self._arrived_s, now_s - self._lag_s)
        return self._arrived_s

    def booking(self, client: str) -> Booking:
        """The bytes that a request of the client at that address holds until its answer."""
        return self.budget.booking(client)

    def place(self, client: str, served: Served | None = None) -> "Place":
        """A place among the requests on their way to a model, as a context manager.

        Raises ``NotServed`` where all are taken.
        """
        return Place(self, client, served)

    def enter(self, client: str, served: Served | None) -> None:
        """Take a place."""
        if self._is_full(client):
            if served is not None:
                served.statistics.not_served()
            raise NotServed("queue full", 1.0)
        self._places += 1
        self._of_clients[client] = self._of_clients.get(client, 0) + 1
        self._on_way[served] = self._on_way.get(served, 0) + 1

    def leave(self, client: str, served: Served | None) -> None:
        """Give it back."""
        self._places -= 1
        for counts, key in ((self._of_clients, client), (self._on_way, served)):
            left = counts[key] - 1
            if left:
                counts[key] = left
            else:
                del counts[key]

    def _is_full(self, client: str) -> bool:
        return self._places >= self.most_requests or self._of_clients.get(client, 0) >= self._max_of_client

    def is_crowded(self, client: str) -> bool:
        """Whether a request that came now would find no place, or have to wait for its turn."""
        return self._turns.are_taken or self._is_full(client)

    def expect(self) -> None:
        """The headers of a request were read, which is let in."""
        self._turns.expect()

    def refusal(self, client: str, deadline_s: float) -> NotServed | None:
        """Why a request of which only the headers were read has no place, or would have its turn too late.

        ``None`` if it may be let in.
        """
        if self._is_full(client):
            return NotServed("queue full", 1.0)
        if (late_s := self._turns.late_s(deadline_s, self._tail.seconds(monotonic()))) > 0:
            return NotServed("overloaded", late_s)
        return None

    async def turn(self, deadline_s: float, served: Served | None = None, gone: Waiters | None = None) -> None:
        """Wait for a request's turn in the event loop (``Turns.turn``)."""
        try:
            await self._turns.turn(deadline_s, self._tail.seconds(monotonic()), gone)
        except NotServed:
            if served is not None:
                served.statistics.not_served()
            raise

    def check_file(self, size_bytes: int, served: Served, deadline_s: float) -> None:
        """Raise ``NotServed`` if a file of ``size_bytes``, of which none was read, would be answered too late.

        It is decoded behind those that are due before it; then it waits for the model, and so do they.
        """
        if not (self._decoders.is_busy or served.waiting_rows):
            return
        now_s = monotonic()
        decode_s = self._decoders.wait_s(deadline_s) + self._costs.expected_s(_media(served).NOUN, size_bytes)
        model_s = max(decode_s + served.expected_s(), served.expected_s(self._on_way.get(served, 0)))
        late_s = now_s + model_s + self._tail.seconds(now_s) - deadline_s
        if late_s > 0:
            served.statistics.not_served()
            raise NotServed("overloaded", late_s)

    def check_queue(self, served: Served, deadline_s: float) -> None:
        """Raise ``NotServed`` where a request of which the body was not read would wait too long for the model.

        Whether it is more urgent than those that wait stands in its body: a model that has had requests of different
        priorities reads them all, and the others one in ``LOOK_EACH``.
        """
        if not served.waiting_rows or served.has_priorities:
            return
        now_s = monotonic()
        late_s = now_s + served.expected_s(self._on_way.get(served, 0)) + self._tail.seconds(now_s) - deadline_s
        if late_s > 0 and next(self._looks) % LOOK_EACH:
            served.statistics.not_served()
            raise NotServed("overloaded", late_s)

    async def ask(
        self, models: Models, served: Served, asked: InferRequest, deadline_s: float, gone: Waiters | None = None
    ) -> tuple[Served, Answer]:
        """The model's answer in time, and which model it was: another may have taken the place of ``served``.

        The request gives up its place when it is cancelled, or when its client disconnects, of whose waiters it is one.
        Raises ``NotServed`` where it would be late, with what comes after the call.
        """
        served, waiter = self.call(models, served, asked.inputs, deadline_s, asked.priority)
        if gone is not None:
            gone.add(waiter)
        try:
            return served, await waiter
        finally:
            if gone is not None:
                gone.discard(waiter)
            del waiter  # it holds what was raised, which holds this frame, and so the request's data

    def call(
        self, models: Models, served: Served, inputs: Sequence[np.ndarray], deadline_s: float, priority: int = 0
    ) -> "tuple[Served, asyncio.Future[Answer]]":
        """Queue a call (``Models.submit``) with time for what comes after it; which model took it, and its future.

        If the future ends before the call has begun, the call gives up its place.
        """
        now_s = monotonic()
        served.keep_margin(self._tail.seconds(now_s))
        timeout_s = deadline_s - now_s
        try:
            ran, future = models.submit(
                served.name, served.version, inputs, timeout_s=timeout_s, priority=priority, meant=served
            )
        except NotServed as refused:
            if refused.reason == "too urgent" and self._lag_s > 0:  # its time is over because others are many
                raise NotServed("overloaded", self._lag_s) from None
            raise
        return ran, self._deliveries.wait(future)

    def note_sent(self, answer: Answer, asked_s: float) -> None:
        """An answer is sent now, to a request that joined the model's queue at that time."""
        now_s = monotonic()
        self._tail.note(max(0.0, now_s - asked_s - answer.waited_s - answer.ran_s), now_s)

    async def read(
        self, work: Callable[[], T], text_bytes: int, tensor_bytes: int = 0, *, deadline_s: float = inf
    ) -> T:
        """Read or write a body that has ``text_bytes`` of text or protobuf and ``tensor_bytes`` of binary data."""
        if text_bytes <= SMALL_BYTES and tensor_bytes <= SMALL_TENSOR_BYTES:
            return work()
        size = text_bytes + tensor_bytes / 100
        return await self._readers.run(work, kind="bytes", size=size, deadline_s=deadline_s)

    async def prepare(
        self, asked: InferRequest, served: Served, *, client: str = "", deadline_s: float
    ) -> InferRequest:
        """The request as its model takes it. Raises ``ProtocolError``."""
        if bodies := files.contents(asked, served, _media(served).NOUN):
            with _counting(served):
                batch = await self._decoded(bodies, served, client, deadline_s)
            return replace(asked, inputs=(batch.array,))
        text_bytes = served.text_bytes(asked)
        if not text_bytes:
            array_bytes = sum(array.nbytes for array in asked.inputs)
            return await self.read(lambda: served.prepared(asked), 0, array_bytes, deadline_s=deadline_s)
        return await self.tokenize(lambda: served.prepared(asked), text_bytes, served, deadline_s)

    async def tokenize(self, work: Callable[[], T], characters: int, served: Served, deadline_s: float) -> T:
        """Tokenize texts of that many characters for a model, beside the event loop."""
        with _counting(served):
            return await self.compute(work, characters, deadline_s=deadline_s, later_s=self.later_s(served))

    async def compute(
        self, work: Callable[[], T], size: int, *, deadline_s: float, kind: str = "characters", later_s: float = 0.0
    ) -> T:
        """Do work beside the event loop, by default tokenize ``size`` characters; each ``kind`` has its own costs."""
        return await self._decoders.run(work, kind=kind, size=size, deadline_s=deadline_s, later_s=later_s)

    async def tell(self, about: Hashable, work: Callable[[], T]) -> T:
        """What the server tells of itself, beside the event loop: one thing at a time, and once for all who ask for it.

        Raises ``NotServed`` where too much is asked.
        """
        task = self._told.get(about)
        if task is None:
            task = self._told[about] = asyncio.ensure_future(self._teller.run(work, kind="told", size=1))
            task.add_done_callback(lambda _: self._told.pop(about))
        told: T = await asyncio.shield(task)
        return told

    async def file(
        self, body: bytes, served: Served, *, client: str, deadline_s: float
    ) -> tuple[InferRequest, tuple[int, int]]:
        """An image or a recording as the model takes it; an image's width and height. Raises ``ProtocolError``."""
        with _counting(served):
            batch = await self._decoded([body], served, client, deadline_s)
        return files.request(batch.array, served), batch.sizes[0]

    async def _decoded(self, bodies: Sequence[bytes], served: Served, client: str, deadline_s: float) -> Batch:
        """Files as the model takes them; what they take is booked while they are decoded."""
        media = _media(served)

        def look() -> tuple[list[bytes], list[Work]]:
            found = [files.unpacked(body) for body in bodies]
            names = [files.file_name(media.NOUN, number, len(found)) for number in range(len(found))]
            return found, [media.work(*one, served, self._limits) for one in zip(found, names, strict=True)]

        is_long = media is recordings and sum(map(len, bodies)) > LONG_BYTES
        pool, kind = (self._decoders, "long headers") if is_long else (self._headers, "headers")
        unpacked, work = await pool.run(look, kind=kind, size=len(bodies), deadline_s=deadline_s)
        size = sum(one.size for one in work)
        if media is recordings and size > self._limits.samples:
            what = f"the recordings have {size:,} samples together, the server takes {self._limits.samples:,}"
            raise ProtocolError(what, "send fewer per request", 413)
        decoding_bytes = max(one.decoding_bytes for one in work)
        decoder = self._large_decoder if decoding_bytes > LARGE_BYTES else self._decoders
        took_s = 0.0

        def decode() -> Batch:
            nonlocal took_s
            started_s = monotonic()
            with self.booking(client) as booking:
                # One after the other: the largest, and what each becomes, apart and stacked.
                booking.add((decoding_bytes + 2 * sum(one.made_bytes for one in work)) // COPIES)
                batch = media.batch(unpacked, served)
            took_s = monotonic() - started_s
            return batch

        batch = await decoder.run(
            decode, kind=media.KIND, size=size, deadline_s=deadline_s, later_s=self.later_s(served)
        )
        self._costs.note(media.NOUN, sum(map(len, unpacked)) // len(unpacked), took_s / len(unpacked))
        return batch

    def later_s(self, served: Served) -> float:
        """What comes after the work on a request that is on its way: its call, and the rest."""
        return served.expected_s() + self._tail.seconds(monotonic())

    def close(self) -> None:
        """End the threads."""
        for pool in (self._readers, self._headers, self._decoders, self._large_decoder, self._teller):
            pool.close()
        if self._ticker is not None:
            self._ticker.cancel()


def _media(served: Served) -> Media:
    if served.audio is None:
        return images
    return recordings


@contextmanager
def _counting(served: Served) -> Iterator[None]:
    """Count a request that is refused here as one that the model did not serve."""
    try:
        yield
    except NotServed:
        served.statistics.not_served()
        raise


class Place:
    """A place that is taken while a ``with`` lasts."""

    __slots__ = ("_client", "_front", "_served")

    def __init__(self, front: Front, client: str, served: Served | None) -> None:
        self._front, self._client, self._served = front, client, served

    def __enter__(self) -> None:
        self._front.enter(self._client, self._served)

    def __exit__(self, *error: object) -> None:
        self._front.leave(self._client, self._served)
