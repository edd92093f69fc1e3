"""Denormals: floats below 1.2e-38 (float32), on which x86 takes a hundred times as long, as zeros (FTZ and DAZ).

The mode is each thread's own and handed on to those it starts (Intel SDM volume 1, 10.2.3; Arm ARM, FPCR.FZ), so a
thread sets it before an engine starts its team: ``torch.set_flush_denormal`` after that reaches one of the threads.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

# Which 32-bit word of glibc's fenv_t holds the mode, and its bits: MXCSR's FZ and DAZ, FPCR's FZ (<fenv.h>).
_MODE = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}
_FENV_WORDS = 8


def flush() -> bool:
    """Have the calling thread, and those it starts from now on, treat denormals as zeros; whether it does."""
    _flush()
    return flushed()


@contextmanager
def flushing() -> Iterator[None]:
    """Have the calling thread treat denormals as zeros for a while, and those that it starts meanwhile for good.

    It stands around every call of a model, and takes a few microseconds.
    """
    before = _flush()
    try:
        yield
    finally:
        if before is not None:
            _libm().fesetenv(before)


def flushed() -> bool:
    """Whether the calling thread treats denormals as zeros."""
    return float(np.float32(1e-38) * np.float32(1e-2)) == 0.0


def _flush() -> bytes | None:
    """Flush, and return the thread's floating-point environment (``fenv_t``) before; ``None`` where it is not known."""
    place = _place()
    environment = (ctypes.c_uint32 * _FENV_WORDS)()
    if place is None or _libm().fegetenv(environment) != 0:
        return None
    before = bytes(environment)
    word, bits = place
    environment[word] |= bits
    _libm().fesetenv(environment)
    return before


@cache
def _place() -> tuple[int, int] | None:
    return _MODE.get(platform.machine()) if platform.libc_ver()[0] == "glibc" else None


@cache
def _libm() -> ctypes.PyDLL:
    # Not CDLL, which lets another Python thread go first at each call.
    return ctypes.PyDLL(None)
