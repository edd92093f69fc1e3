"""The server's memory: given back to the system after large requests."""

import asyncio
import ctypes
from contextlib import suppress

MMAP_BYTES = 2**20
"""Allocations from this size on are returned to the system when they are freed."""
ARENAS = 4
"""Heaps of the C library; each keeps what it once needed."""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""mallopt(3)."""
LARGE_BYTES = 4 * 2**20
"""Requests from this size on are followed by a trim."""
PAUSE_S = 0.5
"""From such a request to the trim, and so between two trims."""


def tune() -> None:
    """Have the C library give memory back; only glibc keeps so much."""
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Give back what is free; takes milliseconds, so not in an event loop."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Trimmer:
    """Trims soon after bytes came that add up to much. Used from one event loop."""

    def __init__(self) -> None:
        self._noted_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, size_bytes: int) -> None:
        """A request of that size is being worked on."""
        self._noted_bytes += size_bytes
        if self._noted_bytes >= LARGE_BYTES and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._trim)

    def close(self) -> None:
        """Trim no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _trim(self) -> None:
        self._noted_bytes, self._timer = 0, None
        asyncio.get_running_loop().run_in_executor(None, trim)
