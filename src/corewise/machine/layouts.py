"""Which hardware threads each instance of a plan computes on, and which plans are worth trying. Pure.

Physical cores come before their SMT siblings, because two threads on one core share its arithmetic units. An instance
stays within a NUMA node if it fits, because the memory of other nodes is slower (Linux kernel's documentation,
``admin-guide/mm/numaperf.rst``).
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from corewise.records.build import Plan
from corewise.records.cpu import Cpu, LogicalCpu

SIBLINGS = 2
"""Most threads per physical core that are tried."""


class ThreadLayout(NamedTuple):
    """How a plan divides the cores: threads of each instance, and how many instances."""

    threads: int
    instances: int

    @classmethod
    def of(cls, plan: Plan) -> "ThreadLayout":
        """The plan's layout."""
        return cls(plan.threads_per_instance, plan.instances)

    def plan(self, batch: int) -> Plan:
        """The layout with calls of ``batch`` items."""
        return Plan(threads_per_instance=self.threads, instances=self.instances, batch=batch)


def assign(cpu: Cpu, threads_per_instance: int, instances: int) -> tuple[tuple[int, ...], ...]:
    """The hardware threads of each instance, by their numbers; rising.

    Physical cores come first, then SMT siblings; instances spread over the NUMA nodes, each within one node if it fits.
    They share hardware threads only if there are more threads than ``most_threads`` (see ``warning``). Under a CPU
    quota below the number of cores, instances get all hardware threads of their node: a quota limits time, not
    placement, and all containers of a machine would choose the same cores. If the affinity is unknown, an instance gets
    no hardware threads and should not be pinned.
    """
    ranked = _ranked(cpu)
    slots, needed = ranked[: most_threads(cpu)], threads_per_instance * instances
    if not slots:
        return ((),) * instances
    if needed > len(slots):
        # By node and core, so that the threads of an instance are near each other; reused when all are taken.
        near = sorted(slots, key=_place)
        starts = range(0, needed, threads_per_instance)
        given = [[near[k % len(near)] for k in range(start, start + threads_per_instance)] for start in starts]
    else:
        given = _packed(slots[: max(cpu.usable_cores, needed)], threads_per_instance, instances)
    if limited_by_quota(cpu):
        given = [_nodes_of(chosen, ranked) for chosen in given]
    return tuple(tuple(sorted({logical.cpu for logical in chosen})) for chosen in given)


def packed(cpu: Cpu, count: int) -> tuple[int, ...]:
    """The ``count`` hardware threads for a process that leaves the rest to others: whole cores, of one node if it fits.

    The smallest node that has enough is taken, so that larger ones stay whole.
    """
    near = sorted(_ranked(cpu), key=_place)
    rooms = Counter(logical.node for logical in near)
    fits = [node for node, room in rooms.items() if room >= count]
    node = min(fits, key=lambda node: (rooms[node], node), default=None)
    return tuple(logical.cpu for logical in near if node in (None, logical.node))[:count]


def thread_layouts(cpu: Cpu) -> tuple[ThreadLayout, ...]:
    """The layouts worth trying, those that use all physical cores first.

    Layouts that also use the SMT siblings follow, then nearly all cores, then one instance on part of them. No layout
    has more threads than the affinity and the quota allow, or an instance that straddles NUMA nodes without need.
    """
    cores, most = cpu.usable_cores, most_threads(cpu)
    full = [(threads, total // threads) for total in (cores, most) for threads in reversed(_divisors(total))]
    # For example 3 instances of 2 threads on 7 cores, which leave one core idle.
    nearly = [(threads, cores // threads) for threads in _powers(cores) if cores // threads > 1]
    alone = [(threads, 1) for threads in sorted({*_divisors(cores), *_powers(cores)}, reverse=True)]
    layouts = (ThreadLayout(threads, instances) for threads, instances in dict.fromkeys(full + nearly + alone))
    return tuple(layout for layout in layouts if not _straddles(cpu, layout))


def most_threads(cpu: Cpu) -> int:
    """How many threads may compute at once: hardware threads, at most two per physical core, within the quota."""
    most = min(len(_ranked(cpu)), SIBLINGS * cpu.usable_cores)
    return max(1, most if cpu.quota_cores is None else min(most, int(cpu.quota_cores)))


def limited_by_quota(cpu: Cpu) -> bool:
    """Whether the quota allows less than the cores that this process may run on, so that pinning does not help."""
    return cpu.quota_cores is not None and cpu.usable_cores < replace(cpu, quota_cores=None).usable_cores


def warning(cpu: Cpu, threads_per_instance: int, instances: int) -> str:
    """A warning if a plan has more threads than can compute at once; otherwise empty."""
    needed, most = threads_per_instance * instances, most_threads(cpu)
    if needed <= most:
        return ""
    quota = f" under the cgroup's quota of {cpu.quota_cores:g} cores" if limited_by_quota(cpu) else ""
    return f"{needed} threads take turns because only {most} can compute at once{quota}"


def _ranked(cpu: Cpu) -> list[LogicalCpu]:
    """The allowed hardware threads: one of each physical core, then a second of each, ...; each time node by node."""
    allowed = set(cpu.affinity)
    known = sorted((logical for logical in cpu.cpus if logical.cpu in allowed), key=lambda logical: logical.cpu)
    # A sandbox may show the affinity and hide the topology.
    known = known or [LogicalCpu(cpu=number, core=number, socket=0, node=0) for number in sorted(allowed)]
    seen: Counter[tuple[int, int]] = Counter()
    ranks = {}
    for logical in known:
        ranks[logical.cpu] = seen[logical.socket, logical.core]
        seen[logical.socket, logical.core] += 1
    return sorted(known, key=lambda logical: (ranks[logical.cpu], logical.node, logical.cpu))


def _packed(slots: Sequence[LogicalCpu], threads: int, instances: int) -> list[list[LogicalCpu]]:
    """Each instance in the node with the most free threads if it fits there, siblings side by side."""
    free: dict[int, list[LogicalCpu]] = defaultdict(list)
    for logical in sorted(slots, key=_place):
        free[logical.node].append(logical)
    given = []
    for _ in range(instances):
        roomiest = max(free, key=lambda node: (len(free[node]), -node))
        nodes = [roomiest] if len(free[roomiest]) >= threads else sorted(free)
        chosen = [logical for node in nodes for logical in free[node]][:threads]
        for logical in chosen:
            free[logical.node].remove(logical)
        given.append(chosen)
    return given


def _nodes_of(chosen: Sequence[LogicalCpu], ranked: Sequence[LogicalCpu]) -> list[LogicalCpu]:
    nodes = {logical.node for logical in chosen}
    return [logical for logical in ranked if logical.node in nodes]


def _place(logical: LogicalCpu) -> tuple[int, int, int, int]:
    return logical.node, logical.socket, logical.core, logical.cpu


def _straddles(cpu: Cpu, layout: ThreadLayout) -> bool:
    """Whether an instance that would fit into each node got parts of several."""
    nodes = {logical.cpu: logical.node for logical in cpu.cpus}
    rooms = Counter(nodes[number] for number in cpu.affinity if number in nodes)
    spans = (len({nodes.get(number) for number in given}) for given in assign(cpu, *layout))
    return layout.instances > 1 and bool(rooms) and layout.threads <= min(rooms.values()) and max(spans) > 1


def _powers(number: int) -> list[int]:
    """The powers of two below a number, falling."""
    return [2**k for k in reversed(range(number.bit_length())) if 2**k < number]


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
