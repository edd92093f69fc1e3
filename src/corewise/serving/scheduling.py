"""How soon the kernel lets a thread run while all cores are busy."""

import ctypes
import os
import platform

SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}.get(platform.machine())
"""The system call sched_setattr(2), for which not every C library has a function."""
NORMAL, RESET_ON_FORK = 0, 1
SLICE_NS = 100_000
"""The shortest; by default about 3 ms."""


class _Attributes(ctypes.Structure):
    """``struct sched_attr`` in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def take_short_turns() -> bool:
    """Have this thread, and none that it starts, run soon and for a short time where it would run late and for long.

    Its share of the time stays as it is. Whether the kernel was asked: Linux since 6.12 does it.
    """
    if SET_ATTRIBUTES is None:
        return False
    asked = _Attributes(
        size=ctypes.sizeof(_Attributes),
        policy=NORMAL,
        flags=RESET_ON_FORK,
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        runtime_ns=SLICE_NS,
    )
    return int(ctypes.CDLL(None, use_errno=True).syscall(SET_ATTRIBUTES, 0, ctypes.byref(asked), 0)) == 0
