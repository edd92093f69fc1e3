"""Which hardware threads each instance of a plan computes on, and which plans are worth trying. Pure.

Physical cores come before their SMT siblings, for two threads on one core share its arithmetic units; an instance
stays within a NUMA node where it fits, for the memory of other nodes is slower (Linux kernel's documentation,
``admin-guide/mm/numaperf.rst``).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from corewise.records.cpu import Cpu, LogicalCpu

SIBLINGS = 2
"""So many threads a physical core are tried at most."""


def assign(cpu: Cpu, threads_per_instance: int, instances: int) -> tuple[tuple[int, ...], ...]:
    """The hardware threads of each instance, by their numbers; rising.

    Physical cores first, SMT siblings when those are used up; instances spread over the NUMA nodes, each within one
    where it fits. They share hardware threads only where there are more threads than ``most_threads`` (``warning``
    tells). Under a quota of less than the cores, instances get all hardware threads of their node: a quota says how
    much time there is and not where, and all containers of a machine would choose the same cores. An instance gets
    none, and should not be pinned, where the affinity is unknown.
    """
    ranked = _ranked(cpu)
    slots, wanted = ranked[: most_threads(cpu)], threads_per_instance * instances
    if not slots:
        return ((),) * instances
    if wanted > len(slots):
        # By node and core, so that each instance's are near each other, and round and round.
        near = sorted(slots, key=_place)
        starts = range(0, wanted, threads_per_instance)
        given = [[near[k % len(near)] for k in range(start, start + threads_per_instance)] for start in starts]
    else:
        given = _packed(slots[: max(cpu.usable_cores, wanted)], threads_per_instance, instances)
    if limited_by_quota(cpu):
        given = [_nodes_of(chosen, ranked) for chosen in given]
    return tuple(tuple(sorted({one.cpu for one in chosen})) for chosen in given)


def thread_plans(cpu: Cpu) -> tuple[tuple[int, int], ...]:
    """(threads per instance, instances) worth trying, those that use all physical cores first.

    Then those that use the SMT siblings too, nearly all cores, and one instance on part of them. Never more threads
    than the affinity and the quota allow, nor two instances where one of them would straddle NUMA nodes without need.
    """
    cores, most = cpu.usable_cores, most_threads(cpu)
    full = [(threads, total // threads) for total in (cores, most) for threads in reversed(_divisors(total))]
    # Of 7 cores, 6 as three times two: some are left over.
    nearly = [(threads, cores // threads) for threads in _powers(cores) if cores // threads > 1]
    alone = [(threads, 1) for threads in sorted({*_divisors(cores), *_powers(cores)}, reverse=True)]
    return tuple(plan for plan in dict.fromkeys(full + nearly + alone) if not _straddles(cpu, *plan))


def most_threads(cpu: Cpu) -> int:
    """How many threads may compute at once: hardware threads, two a physical core at most, within the quota."""
    most = min(len(_ranked(cpu)), SIBLINGS * cpu.usable_cores)
    return max(1, most if cpu.quota_cores is None else min(most, int(cpu.quota_cores)))


def limited_by_quota(cpu: Cpu) -> bool:
    """Whether the quota allows less than the cores that this process may run on, and so pinning is no good."""
    return cpu.quota_cores is not None and cpu.usable_cores < replace(cpu, quota_cores=None).usable_cores


def warning(cpu: Cpu, threads_per_instance: int, instances: int) -> str:
    """That a plan has more threads than can compute at once, in words; empty where it has not."""
    wanted, most = threads_per_instance * instances, most_threads(cpu)
    if wanted <= most:
        return ""
    quota = f" under the cgroup's quota of {cpu.quota_cores:g} cores" if limited_by_quota(cpu) else ""
    return f"{wanted} threads take turns where {most} can compute at once{quota}"


def _ranked(cpu: Cpu) -> list[LogicalCpu]:
    """The allowed hardware threads: one of each physical core, then a second of each, ...; each time node by node."""
    allowed = set(cpu.affinity)
    known = sorted((one for one in cpu.cpus if one.cpu in allowed), key=lambda one: one.cpu)
    # A sandbox may tell what is allowed and not what that is.
    known = known or [LogicalCpu(cpu=number, core=number, socket=0, node=0) for number in sorted(allowed)]
    seen: Counter[tuple[int, int]] = Counter()
    ranks = {}
    for one in known:
        ranks[one.cpu] = seen[one.socket, one.core]
        seen[one.socket, one.core] += 1
    return sorted(known, key=lambda one: (ranks[one.cpu], one.node, one.cpu))


def _packed(slots: Sequence[LogicalCpu], threads: int, instances: int) -> list[list[LogicalCpu]]:
    """Each instance in the node with most room where that is enough, siblings side by side."""
    free: dict[int, list[LogicalCpu]] = defaultdict(list)
    for one in sorted(slots, key=_place):
        free[one.node].append(one)
    given = []
    for _ in range(instances):
        roomiest = max(free, key=lambda node: (len(free[node]), -node))
        nodes = [roomiest] if len(free[roomiest]) >= threads else sorted(free)
        chosen = [one for node in nodes for one in free[node]][:threads]
        for one in chosen:
            free[one.node].remove(one)
        given.append(chosen)
    return given


def _nodes_of(chosen: Sequence[LogicalCpu], ranked: Sequence[LogicalCpu]) -> list[LogicalCpu]:
    nodes = {one.node for one in chosen}
    return [one for one in ranked if one.node in nodes]


def _place(one: LogicalCpu) -> tuple[int, int, int, int]:
    return one.node, one.socket, one.core, one.cpu


def _straddles(cpu: Cpu, threads: int, instances: int) -> bool:
    """Whether an instance that would fit into each node got parts of several."""
    nodes = {one.cpu: one.node for one in cpu.cpus}
    rooms = Counter(nodes[number] for number in cpu.affinity if number in nodes)
    spans = (len({nodes.get(number) for number in given}) for given in assign(cpu, threads, instances))
    return instances > 1 and bool(rooms) and threads <= min(rooms.values()) and max(spans) > 1


def _powers(number: int) -> list[int]:
    """The powers of two below a number, falling."""
    return [2**k for k in reversed(range(number.bit_length())) if 2**k < number]


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
