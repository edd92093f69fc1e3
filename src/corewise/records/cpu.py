"""The CPU of a machine, and what a process may use of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LogicalCpu:
    """One hardware thread: its number, and the core, socket and NUMA node it belongs to."""

    cpu: int
    core: int
    socket: int
    node: int


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One cache of the CPU; ``shared_by`` counts the hardware threads that use it."""

    level: int
    kind: Literal["data", "instruction", "unified"]
    size_bytes: int
    shared_by: int


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """This machine's CPU and what this process may use of it (see ``cpu.inspect``)."""

    architecture: str
    vendor: str
    model: str
    isa: tuple[str, ...]
    """The extensions that matter for inference, e.g. ``("avx2", "avx512", "avx512_vnni")``."""
    cpus: tuple[LogicalCpu, ...]
    caches: tuple[Cache, ...]
    affinity: tuple[int, ...]
    """Hardware threads that this process may run on (affinity and cpuset)."""
    quota_cores: float | None
    """CPU time per wall time that the cgroup allows, in cores; ``None`` is unlimited."""
    memory_bytes: int
    memory_limit_bytes: int | None

    @property
    def usable_cpus(self) -> tuple[int, ...]:
        """The hardware threads worth a compute thread: one per physical core, within affinity and quota."""
        allowed = set(self.affinity)
        first_of_core: dict[tuple[int, int], int] = {}
        for cpu in self.cpus:
            if cpu.cpu in allowed:
                first_of_core.setdefault((cpu.socket, cpu.core), cpu.cpu)
        cpus = sorted(first_of_core.values()) or sorted(allowed)
        if self.quota_cores is not None:
            cpus = cpus[: max(1, int(self.quota_cores))]
        return tuple(cpus)

    @property
    def usable_cores(self) -> int:
        """min(affinity, cpuset, quota) in physical cores; at least 1."""
        return max(1, len(self.usable_cpus))

    def has(self, extension: str) -> bool:
        """Whether the CPU has the ISA extension, by its name in ``isa``."""
        return extension in self.isa

    @property
    def int8_dot(self) -> bool:
        """Whether int8 products accumulate in 32 bits (VNNI, AVX-VNNI, AMX, DotProd, I8MM).

        Without it x86 adds pairs of u8 x s8 products in 16 bits, which saturates: weights are rounded to 7 bits then.
        """
        return any(self.has(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"))

    @property
    def bf16(self) -> bool:
        """Whether the CPU multiplies bf16 in hardware."""
        return any(self.has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
