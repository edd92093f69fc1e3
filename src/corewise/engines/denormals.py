"""Denormals: floats below 1.2e-38 (float32), on which x86 takes a hundred times as long, as zeros (FTZ and DAZ).

The mode is each thread's own and handed on to those it starts (Intel SDM volume 1, 10.2.3; Arm ARM, FPCR.FZ), so a
thread sets it before an engine starts its team: ``torch.set_flush_denormal`` after that reaches one of the threads.
"""

import ctypes
import platform

import numpy as np

# Which 32-bit word of glibc's fenv_t holds the mode, and its bits: MXCSR's FZ and DAZ, FPCR's FZ (<fenv.h>).
_MODE = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}
_FENV_WORDS = 8


def flush() -> bool:
    """Have the calling thread, and those it starts from now on, treat denormals as zeros; whether it does."""
    libm, mode = ctypes.CDLL(None), _MODE.get(platform.machine())
    environment = (ctypes.c_uint32 * _FENV_WORDS)()
    if mode and platform.libc_ver()[0] == "glibc" and libm.fegetenv(environment) == 0:
        word, bits = mode
        environment[word] |= bits
        libm.fesetenv(environment)
    return flushed()


def flushed() -> bool:
    """Whether the calling thread treats denormals as zeros."""
    return float(np.float32(1e-38) * np.float32(1e-2)) == 0.0
