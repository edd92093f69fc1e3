"""Which hardware threads a process computes on, where another program said only how many it may use."""

import os
from contextlib import suppress
from dataclasses import replace

from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import assign
from corewise.records.cpu import Cpu


def chosen_cores(cpu: Cpu, count: int) -> tuple[int, ...]:
    """The ``count`` hardware threads for a process that may use more: physical cores first, node by node. Pure.

    Empty if it may use no more than that, and need not be pinned.
    """
    quota = len(cpu.affinity) if cpu.quota_cores is None else cpu.quota_cores
    if count >= min(len(cpu.affinity), quota):
        return ()
    (chosen,) = assign(replace(cpu, quota_cores=None), count, 1)
    return chosen


def compute_on(count: int) -> Cpu:
    """Have this process compute on ``count`` hardware threads, with all its threads and its children.

    OpenMP's own number of threads, which schedulers set to what they gave, becomes that of the cores; the threads of a
    plan are set by its engine. It must be called before an engine is imported.

    Returns:
        The CPU as this process sees it from now on.
    """
    chosen = chosen_cores(inspect_cpu(), count)
    for thread in os.listdir("/proc/self/task") if chosen else ():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), chosen)
    cpu = inspect_cpu()
    os.environ["OMP_NUM_THREADS"] = str(cpu.usable_cores)
    return cpu
