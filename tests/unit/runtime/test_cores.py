"""runtime.cores: the hardware threads of a process that may use a number of them."""

from dataclasses import replace

from corewise.records.cpu import Cpu, LogicalCpu
from corewise.runtime.cores import chosen_cores


def cpu_of(cores: int, *, nodes: int = 1, quota: float | None = None) -> Cpu:
    """Cores with two hardware threads each: thread k + cores is the sibling of k."""
    logical = tuple(
        LogicalCpu(cpu=k, core=k % cores, socket=0, node=(k % cores) * nodes // cores) for k in range(2 * cores)
    )
    return Cpu(
        architecture="x86_64",
        vendor="",
        model="",
        isa=(),
        cpus=logical,
        caches=(),
        affinity=tuple(range(2 * cores)),
        quota_cores=quota,
        memory_bytes=0,
        memory_limit_bytes=None,
    )


def test_physical_cores_come_first_within_a_numa_node() -> None:
    assert chosen_cores(cpu_of(4), 3) == (0, 1, 2)
    assert chosen_cores(cpu_of(4, nodes=2), 2) in ((0, 1), (2, 3))
    assert len(chosen_cores(cpu_of(4), 7)) == 7


def test_who_may_use_all_is_not_pinned() -> None:
    assert chosen_cores(cpu_of(4), 8) == ()
    assert chosen_cores(cpu_of(4), 99) == ()
    assert chosen_cores(replace(cpu_of(4), affinity=(1, 2)), 2) == ()


def test_a_quota_that_allows_no_more_is_no_reason_to_pin() -> None:
    assert chosen_cores(cpu_of(4, quota=2.0), 2) == ()
    assert len(chosen_cores(cpu_of(4, quota=6.0), 2)) == 2
