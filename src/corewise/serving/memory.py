"""The C library's memory: given back to the system after large requests."""

import ctypes
import gc
from contextlib import suppress

MMAP_BYTES = 2**20
"""Allocations from this size on are returned to the system when they are freed."""
ARENAS = 4
"""Heaps of the C library; each keeps what it once needed."""
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""mallopt(3)."""


def tune() -> None:
    """Have the C library give memory back; only glibc keeps much of it."""
    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.mallopt(M_ARENA_MAX, ARENAS)


def settle() -> None:
    """Take all that is there for what stays, so that ``collect`` has less to look through."""
    gc.collect()
    gc.freeze()


def collect() -> None:
    """Free what holds itself, as errors do that hold the frames they passed, with bodies and arrays."""
    gc.collect()


def trim() -> None:
    """Give back what is free; takes milliseconds, so not in an event loop."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
