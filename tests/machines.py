"""Machines of any size, as Linux describes them."""

from hypothesis import strategies as st

from corewise.records.cpu import Cpu, LogicalCpu


def machine(sockets=1, cores=4, threads=1, nodes=1, affinity=None, quota=None):
    """As Linux numbers it: one thread of every core, then the siblings; ``nodes`` NUMA nodes a socket."""
    cpus = tuple(
        LogicalCpu(
            cpu=(thread * sockets + socket) * cores + core,
            core=core,
            socket=socket,
            node=socket * nodes + core * nodes // cores,
        )
        for thread in range(threads)
        for socket in range(sockets)
        for core in range(cores)
    )
    return Cpu(
        architecture="x86_64",
        vendor="",
        model="",
        isa=(),
        cpus=cpus,
        caches=(),
        affinity=tuple(range(len(cpus))) if affinity is None else tuple(affinity),
        quota_cores=quota,
        memory_bytes=0,
        memory_limit_bytes=None,
    )


@st.composite
def machines(draw):
    sockets, threads, nodes = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cores = draw(st.integers(nodes, 8))
    count = sockets * threads * cores
    holes = draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    quota = draw(st.none() | st.floats(0.1, 2.0 * count))
    return machine(sockets, cores, threads, nodes, sorted(set(range(count)) - holes), quota)
