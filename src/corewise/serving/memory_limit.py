"""What requests may take under a limit of the server's memory, so that it stays below whatever comes.

Half of the limit is for what is booked in the budget: a byte of a body may need ``COPIES`` bytes until its answer. An
eighth is for gRPC messages that are being received, which cannot be booked yet, and a sixteenth for connections. While
the server runs, ``Guard`` compares that with the memory that its processes really have.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

from corewise.serving import memory
from corewise.serving.budget import Budget
from corewise.serving.messages import PROBES
from corewise.serving.protocol import Limits

COPIES = 6
"""A body lies in the network's buffers, is joined from its parts, decoded, copied into an array, and from there into
the engine's shared memory; some of that is only free when it is collected."""
PIXEL_BYTES = 8
"""An image as it was stored and as RGB, of which Pillow keeps four bytes each."""
LARGE_ANSWER_BYTES = 2**16
"""Above it an answer may wait for its client to read it."""
ANSWER_COPIES = 2
"""Copies of an answer that exist until it is read."""
FRAME_BYTES = 8
"""A frame of a recording, of which one channel is kept in float32, and joined from parts."""
RECEIVED_SHARE, CONNECTIONS_SHARE = 1 / 8, 1 / 16
CONNECTION_BYTES = 48 * 1024
"""What a connection takes, including headers that have arrived; there are two ports."""
USABLE_SHARE = 0.92
"""Share of the limit that may be used; the rest is for the kernel's own memory, which a cgroup counts too."""
LEAST_BYTES = 4 * 2**20
"""What bodies may take, however little is left."""
STEP_BYTES = 4 * 2**20
"""Bytes booked between two looks at the memory."""
PERIOD_S = 0.5
GROWN_BYTES = 16 * 2**20
"""Memory is given back while the processes have this much more than without requests."""
PASSES = 4
"""Memory is given back in this many periods in a row: what is in use at the first may be free at the last."""
PASS_SHARE, LONG_S = 1 / 200, 2.0
"""What passes take of the event loop's time, if that is enough with pauses that long at most: a pass looks through all
objects, which takes 10 ms for 2,000 connections."""
SCARCE_SHARE = 1 / 4
"""Share of the limit: while requests take more than this, no pass is put off."""


def most_decoding_bytes(limits: Limits) -> int:
    """What decoding one file may take, for more of which there would never be room."""
    return int(limits.bodies_bytes * limits.client_share) * COPIES


def fit(limits: Limits, limit_bytes: int) -> Limits:
    """The limits, lowered to what a server with ``limit_bytes`` of memory can permit."""
    bodies_bytes = min(limits.bodies_bytes, limit_bytes // (2 * COPIES))
    body_bytes = min(limits.body_bytes, bodies_bytes // 4)
    received_bytes = int(limit_bytes * RECEIVED_SHARE)
    message_bytes = min(body_bytes, received_bytes // (2 * limits.receiving))
    decoding_bytes = most_decoding_bytes(replace(limits, bodies_bytes=bodies_bytes))
    return replace(
        limits,
        bodies_bytes=bodies_bytes,
        body_bytes=body_bytes,
        message_bytes=message_bytes,
        streams=max(2, min(limits.streams, received_bytes // 2 // message_bytes)),
        typed_bytes=min(limits.typed_bytes, max(2**20, message_bytes // 4)),
        pixels=min(limits.pixels, decoding_bytes // PIXEL_BYTES),
        samples=min(limits.samples, decoding_bytes // (2 * FRAME_BYTES)),
        connections=max(16, min(limits.connections, int(limit_bytes * CONNECTIONS_SHARE) // (2 * CONNECTION_BYTES))),
    )


def notes(wanted: Limits, limits: Limits) -> tuple[str, ...]:
    """What the operator should know of limits that are lower than wanted."""
    if limits.body_bytes == wanted.body_bytes and limits.message_bytes == wanted.message_bytes:
        return ()
    body_mib, message_mib = (size / 2**20 for size in (limits.body_bytes, limits.message_bytes))
    return (f"the memory limit leaves {body_mib:.3g} MiB for a body over HTTP and {message_mib:.3g} MiB over gRPC",)


def room_bytes(limits: Limits, limit_bytes: int, *, idle_bytes: int, resident_bytes: int, booked_bytes: int) -> int:
    """What may be booked in all, when the processes have ``resident_bytes`` and had ``idle_bytes`` without requests.

    Memory that no booking explains is taken from it.
    """
    received_bytes = (limits.receiving + limits.streams + PROBES) * limits.message_bytes
    others_bytes = max(idle_bytes, resident_bytes - COPIES * booked_bytes)
    left_bytes = int(USABLE_SHARE * limit_bytes) - received_bytes - others_bytes
    return max(LEAST_BYTES, min(limits.bodies_bytes, left_bytes // COPIES))


def resident_bytes(engines: Iterable[int]) -> int:
    """Memory of this process and of engine processes by their ids, without what files hold; shared memory once."""
    found = _status_bytes("self", ("RssAnon", "RssShmem"))
    return found + sum(_status_bytes(str(pid), ("RssAnon",)) for pid in engines)


def _status_bytes(pid: str, names: tuple[str, ...]) -> int:
    """The sum of these lines of /proc/PID/status, see proc(5); 0 for a process that ended."""
    with suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.startswith(names))
        return sum(int(value.split()[0]) * 1024 for value in fields.values())
    return 0


def answer_bytes(size_bytes: int) -> int:
    """What an answer books until its client has read it."""
    return ANSWER_COPIES * size_bytes // COPIES if size_bytes > LARGE_ANSWER_BYTES else 0


class Guard:
    """Keeps a budget as large as the memory allows, and gives memory back. Used from one event loop."""

    def __init__(self, limits: Limits, limit_bytes: int, budget: Budget, engines: Callable[[], Iterable[int]]) -> None:
        """``engines`` are the ids of the engine processes."""
        self._limits, self._limit_bytes, self._budget, self._engines = limits, limit_bytes, budget, engines
        self._idle_bytes = 0
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, when all models are open and no request has come yet."""
        memory.settle()
        self._idle_bytes = resident_bytes(self._engines())
        self._budget.watch(self._room, STEP_BYTES)
        self._keeper = asyncio.ensure_future(self._keep())

    @property
    def room_bytes(self) -> int:
        """What may be booked now."""
        return self._room(0)

    def close(self) -> None:
        """End."""
        if self._keeper is not None:
            self._keeper.cancel()

    def _room(self, booked_bytes: int) -> int:
        resident = resident_bytes(self._engines())
        return room_bytes(
            self._limits,
            self._limit_bytes,
            idle_bytes=self._idle_bytes,
            resident_bytes=resident,
            booked_bytes=booked_bytes,
        )

    async def _keep(self) -> None:
        """Give memory back while much is used, and some times afterwards."""
        seen_bytes, passes, collecting = 0, PASSES, Share(PASS_SHARE)
        while True:
            await asyncio.sleep(PERIOD_S)
            if self._budget.total_booked_bytes > seen_bytes + STEP_BYTES:
                seen_bytes, passes = self._budget.total_booked_bytes, 0
            if passes < PASSES:
                used_bytes = resident_bytes(self._engines())
                if collecting.is_due or used_bytes > self._idle_bytes + SCARCE_SHARE * self._limit_bytes:
                    passes += 1
                    if used_bytes > self._idle_bytes + GROWN_BYTES:
                        collecting.run(memory.collect)
                        await asyncio.to_thread(memory.trim)
            self._budget.look()


class Share:
    """Work that may take a share of the time only: the longer it took, the longer until it is due, up to ``LONG_S``."""

    def __init__(self, share: float, clock: Callable[[], float] = monotonic) -> None:
        self._share, self._clock = share, clock
        self._due_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it may run."""
        return self._clock() >= self._due_s

    def run(self, work: Callable[[], None]) -> None:
        """Run it."""
        started_s = self._clock()
        work()
        self._due_s = started_s + min(LONG_S, (self._clock() - started_s) / self._share)


def machine_bytes(limit_bytes: int | None, memory_bytes: int) -> int:
    """The limit where none is named: the cgroup's, or else the machine's memory."""
    return limit_bytes or memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
