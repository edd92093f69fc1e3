"""What this CPU can do and what this process may use of it, read from /proc and /sys.

``inspect`` reads a file system root, so that any machine can be described by a folder; the ``parse_*`` functions are
pure. Unreadable files are left out and never an error: a sandbox shows little more than ``/proc/cpuinfo``.

Formats: proc(5), and in the Linux kernel's documentation ``admin-guide/cputopology.rst``,
``ABI/testing/sysfs-devices-system-cpu``, ``admin-guide/cgroup-v2.rst``, ``admin-guide/cgroup-v1``,
``arch/arm64/elf_hwcaps.rst``.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Literal

from corewise.records.cpu import Cache, Cpu, LogicalCpu

ROOT = Path("/")

EXTENSIONS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "x86_64": {
        "avx2": frozenset({"avx2"}),
        "fma": frozenset({"fma"}),
        "f16c": frozenset({"f16c"}),
        "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        "avx512_vnni": frozenset({"avx512_vnni"}),
        "avx_vnni": frozenset({"avx_vnni"}),
        "avx512_bf16": frozenset({"avx512_bf16"}),
        "amx_int8": frozenset({"amx_tile", "amx_int8"}),
        "amx_bf16": frozenset({"amx_tile", "amx_bf16"}),
        "amx_fp16": frozenset({"amx_tile", "amx_fp16"}),
        "avx512_fp16": frozenset({"avx512_fp16"}),
    },
    "aarch64": {
        "neon": frozenset({"asimd"}),
        "dotprod": frozenset({"asimddp"}),
        "i8mm": frozenset({"i8mm"}),
        "bf16": frozenset({"bf16"}),
        "sve": frozenset({"sve"}),
        "sve2": frozenset({"sve2"}),
    },
}
"""By architecture: each extension that matters for inference, and the kernel's flags that make it up.

The kernel does not print ``amx_fp16`` in /proc/cpuinfo (as of 6.18); sandboxes that write their own do.
"""

_CACHE_KINDS: Mapping[str, Literal["data", "instruction", "unified"]] = {
    "Data": "data",
    "Instruction": "instruction",
    "Unified": "unified",
}

# Root of the mount within its file system, mount point, type, and the file system's options.
_CGROUP_MOUNT = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .* - (cgroup2?) \S* (\S+)$", re.MULTILINE)

# /proc/cpuinfo of ARM holds numbers, not names: MIDR_EL1, as in lscpu's tables.
_ARM_VENDORS = {0x41: "ARM", 0x46: "Fujitsu", 0x48: "HiSilicon", 0x4E: "NVIDIA", 0x61: "Apple", 0xC0: "Ampere"}
_ARM_PARTS = {
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD8E): "Neoverse-N3",
    (0xC0, 0xAC3): "Ampere-1",
}


@dataclass(frozen=True, kw_only=True)
class CgroupMount:
    """A mounted cgroup hierarchy of version 1 or 2, which shows the group ``cgroup`` at ``point``.

    ``options`` are the mount's own; in v1 the controllers are among them.
    """

    version: int
    options: frozenset[str]
    cgroup: PurePosixPath
    point: PurePosixPath


def inspect_cpu(root: Path = ROOT) -> Cpu:
    """The CPU, the limits on this process and the memory, read from the file system below ``root``.

    The limits of every cgroup from this process's own up to the hierarchy's root count, and the tightest
    wins. Unknown facts are ``"unknown"``, empty, 0 or ``None``.
    """
    processors = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    first = processors[0] if processors else {}
    architecture = _architecture(first)
    vendor, model = _names(first)
    cpus = _cpus(root, processors)
    memory_bytes = parse_meminfo(_read(root / "proc/meminfo"))
    return Cpu(
        architecture=architecture,
        vendor=vendor,
        model=model,
        isa=parse_isa(architecture, first.get("flags") or first.get("Features", "")),
        cpus=cpus,
        caches=_caches(root, cpus[0].cpu) if cpus else (),
        affinity=_affinity(root, cpus),
        quota_cores=_quota_cores(root),
        memory_bytes=memory_bytes,
        memory_limit_bytes=_memory_limit_bytes(root, memory_bytes),
    )


def throttled_count(root: Path = ROOT) -> int:
    """How often the cgroup's quota has stopped this process so far (``nr_throttled``); 0 without a quota.

    Its growth while something is measured says how far to trust the figures.
    """
    stats = (_read(directory / "cpu.stat") for directory in _cgroups(root, "cpu"))
    return sum(int(line.split()[1]) for stat in stats for line in stat.splitlines() if line.startswith("nr_throttled "))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format: ``"0-2,8"`` is ``(0, 1, 2, 8)``, an empty text ``()``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def cpu_list(cpus: Sequence[int]) -> str:
    """The kernel's list format of rising numbers: ``(0, 1, 2, 8)`` is ``"0-2,8"``."""
    runs = [[cpu for _, cpu in run] for _, run in groupby(enumerate(cpus), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """/proc/cpuinfo as one name -> value dict per processor."""
    blocks = []
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        blocks.append({name.strip(): value.strip() for name, _, value in pairs})
    return [block for block in blocks if block.get("processor", "").isdigit()]


def parse_isa(architecture: str, flags: str) -> tuple[str, ...]:
    """The names of ``EXTENSIONS`` whose kernel flags are all among ``flags``, in the table's order."""
    present = set(flags.split())
    return tuple(name for name, needed in EXTENSIONS.get(architecture, {}).items() if needed <= present)


def parse_size(text: str) -> int:
    """A cache size as sysfs prints it, in bytes: ``"512K"`` is 524288; 0 if it is no size."""
    number, unit = text.strip()[:-1], text.strip()[-1:]
    return int(number) * {"K": 2**10, "M": 2**20}.get(unit, 0) if number.isdigit() else 0


def parse_meminfo(text: str) -> int:
    """The machine's memory in bytes by /proc/meminfo; 0 if it is not listed."""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemTotal:")), 0)


def parse_quota(text: str) -> float | None:
    """``"<quota us> <period us>"`` in cores; ``None`` for no limit (``max`` in cgroup v2, -1 in v1) or no text."""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def parse_cgroup(text: str) -> dict[str, PurePosixPath]:
    """/proc/self/cgroup as controller -> this process's group; v2's controller is ``""``."""
    lines = (line.split(":", 2) for line in text.splitlines() if line)
    return {name: PurePosixPath(path) for _, controllers, path in lines for name in controllers.split(",")}


def parse_mountinfo(text: str) -> list[CgroupMount]:
    """The cgroup hierarchies among the mounts of /proc/self/mountinfo."""
    return [
        CgroupMount(
            version=2 if kind == "cgroup2" else 1,
            options=frozenset(options.split(",")),
            cgroup=PurePosixPath(cgroup),
            point=PurePosixPath(point),
        )
        for cgroup, point, kind, options in _CGROUP_MOUNT.findall(text)
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _architecture(processor: Mapping[str, str]) -> str:
    if "flags" in processor:
        return "x86_64"
    return "aarch64" if "Features" in processor else os.uname().machine


def _names(processor: Mapping[str, str]) -> tuple[str, str]:
    """Vendor and model."""
    if "CPU implementer" not in processor:
        return processor.get("vendor_id", "unknown"), processor.get("model name", "unknown")
    vendor, part = int(processor["CPU implementer"], 0), int(processor.get("CPU part", "0"), 0)
    return _ARM_VENDORS.get(vendor, f"implementer {vendor:#x}"), _ARM_PARTS.get((vendor, part), f"part {part:#x}")


def _cpus(root: Path, processors: list[dict[str, str]]) -> tuple[LogicalCpu, ...]:
    """Every online hardware thread; without sysfs, what /proc/cpuinfo knows of it."""
    system = root / "sys/devices/system"
    known = {int(processor["processor"]): processor for processor in processors}
    node_of = {
        cpu: int(node.name.removeprefix("node"))
        for node in (system / "node").glob("node[0-9]*")
        for cpu in parse_cpu_list(_read(node / "cpulist"))
    }
    cpus = []
    for cpu in parse_cpu_list(_read(system / "cpu/online")) or tuple(known):
        topology = system / f"cpu/cpu{cpu}/topology"
        core, socket = _core(topology), _number(topology / "physical_package_id")
        info = known.get(cpu, {})
        cpus.append(
            LogicalCpu(
                cpu=cpu,
                core=core if core is not None else int(info.get("core id", cpu)),
                socket=socket if socket is not None else int(info.get("physical id", 0)),
                node=node_of.get(cpu, 0),
            )
        )
    return tuple(cpus)


def _core(topology: Path) -> int | None:
    """The first hardware thread of the core: ``core_id`` is not unique where sockets have dies or clusters."""
    siblings = parse_cpu_list(_read(topology / "thread_siblings_list"))
    return siblings[0] if siblings else _number(topology / "core_id")


def _caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """The caches that one hardware thread sees, from the nearest to the farthest."""
    caches = []
    for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
        level, size_bytes = _number(index / "level"), parse_size(_read(index / "size"))
        kind = _CACHE_KINDS.get(_read(index / "type").strip())
        if level and size_bytes and kind:
            shared_by = len(parse_cpu_list(_read(index / "shared_cpu_list")))
            caches.append(Cache(level=level, kind=kind, size_bytes=size_bytes, shared_by=max(1, shared_by)))
    return tuple(sorted(caches, key=lambda cache: (cache.level, cache.kind)))


def _affinity(root: Path, cpus: tuple[LogicalCpu, ...]) -> tuple[int, ...]:
    online = {cpu.cpu for cpu in cpus}
    if root == ROOT:
        allowed = os.sched_getaffinity(0)
    else:
        status = _read(root / "proc/self/status").splitlines()
        lists = (line.partition(":")[2] for line in status if line.startswith("Cpus_allowed_list:"))
        allowed = set(parse_cpu_list(next(lists, ""))) or online
    # A list without any CPU of the affinity numbers CPUs in another way (lxcfs), so it is ignored.
    for limit in (online, _cpuset(root)):
        allowed = allowed & limit or allowed
    return tuple(sorted(allowed))


def _cpuset(root: Path) -> set[int]:
    """The hardware threads of the nearest cgroup that names some; empty without a cpuset."""
    for directory in _cgroups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if cpus := parse_cpu_list(_read(directory / name)):
                return set(cpus)
    return set()


def _quota_cores(root: Path) -> float | None:
    quotas = []
    for directory in _cgroups(root, "cpu"):
        v1 = f"{_read(directory / 'cpu.cfs_quota_us').strip()} {_read(directory / 'cpu.cfs_period_us').strip()}"
        quotas += [parse_quota(_read(directory / "cpu.max")), parse_quota(v1)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _memory_limit_bytes(root: Path, memory_bytes: int) -> int | None:
    """The tightest limit; ``None`` unless it is below the machine's memory (v1's unlimited is 2^63)."""
    limits = [
        limit
        for directory in _cgroups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(directory / name)) is not None
    ]
    limit = min(limits, default=None)
    return limit if limit is not None and limit < (memory_bytes or 2**62) else None


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and its ancestors, the nearest first, in v1 and v2."""
    groups = parse_cgroup(_read(root / "proc/self/cgroup"))
    for mount in parse_mountinfo(_read(root / "proc/self/mountinfo")):
        group = groups.get("" if mount.version == 2 else controller)
        if group is None or (mount.version == 1 and controller not in mount.options):
            continue
        # A container may see only its own part of the hierarchy, under a path that is not in its namespace.
        inside = group.relative_to(mount.cgroup) if group.is_relative_to(mount.cgroup) else PurePosixPath()
        if ".." in inside.parts:
            inside = PurePosixPath()
        point = root / mount.point.relative_to("/")
        yield from (point / folder for folder in (inside, *inside.parents))
