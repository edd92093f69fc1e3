"""thread_plan: instances on machines of any shape, under any affinity and quota."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import machine, machines

from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import assign, most_threads, thread_layouts, warning


def placed(cpu, threads, instances):
    """The instances' hardware threads, as values."""
    known = {one.cpu: one for one in cpu.cpus}
    return [[known[number] for number in given] for given in assign(cpu, threads, instances)]


def cores_of(hardware):
    return {(one.socket, one.core) for one in hardware}


def allowed(cpu):
    return [one for one in cpu.cpus if one.cpu in cpu.affinity]


def bound(cpu):
    return cpu.quota_cores is not None and int(cpu.quota_cores) < len(cores_of(allowed(cpu)))


@given(machines(), st.integers(1, 20), st.integers(1, 20))
def test_every_instance_gets_what_it_may_have(cpu, threads, instances):
    given_ = assign(cpu, threads, instances)
    assert len(given_) == instances
    assert all(given_)
    assert {number for one in given_ for number in one} <= set(cpu.affinity)
    if not bound(cpu):
        assert all(len(one) <= threads for one in given_)
    assert assign(cpu, threads, instances) == given_


@given(machines(), st.data())
def test_instances_that_fit_share_nothing_and_fill_cores_first(cpu, data):
    if bound(cpu):
        return
    threads = data.draw(st.integers(1, most_threads(cpu)))
    instances = data.draw(st.integers(1, most_threads(cpu) // threads))
    given_ = placed(cpu, threads, instances)
    numbers = [one.cpu for hardware in given_ for one in hardware]
    assert [len(hardware) for hardware in given_] == [threads] * instances
    assert len(set(numbers)) == len(numbers)
    used = cores_of(one for hardware in given_ for one in hardware)
    assert len(used) == min(threads * instances, cpu.usable_cores)
    assert not warning(cpu, threads, instances)


@given(machines(), st.data())
def test_one_instance_stays_within_a_node_where_it_fits(cpu, data):
    cores_by_node = {}
    for one in allowed(cpu):
        cores_by_node.setdefault(one.node, set()).add((one.socket, one.core))
    threads = data.draw(st.integers(1, max(map(len, cores_by_node.values()))))
    if not bound(cpu):
        (hardware,) = placed(cpu, threads, 1)
        assert len({one.node for one in hardware}) == 1


@given(machines())
def test_plans_stay_within_cores_and_quota(cpu):
    plans = thread_layouts(cpu)
    assert len(set(plans)) == len(plans) > 0
    assert (cpu.usable_cores, 1) in plans
    for threads, instances in plans:
        assert 1 <= threads * instances <= most_threads(cpu) <= 2 * cpu.usable_cores
        assert not warning(cpu, threads, instances)
        if cpu.quota_cores is not None:
            assert threads * instances <= max(1, cpu.quota_cores)


@given(machines(), st.integers(1, 40), st.integers(1, 40))
def test_more_threads_than_can_compute_are_told(cpu, threads, instances):
    assert bool(warning(cpu, threads, instances)) == (threads * instances > most_threads(cpu))


def test_cores_then_siblings():
    cpu = machine(cores=2, threads=2)
    assert assign(cpu, 1, 2) == ((0,), (1,))
    assert assign(cpu, 2, 1) == ((0, 1),)
    # An instance has both siblings of a core rather than one of each.
    assert assign(cpu, 2, 2) == ((0, 2), (1, 3))
    assert assign(cpu, 3, 1) == ((0, 1, 2),)
    assert assign(cpu, 1, 6) == ((0,), (2,), (1,), (3,), (0,), (2,))
    assert warning(cpu, 1, 6) == "6 threads take turns because only 4 can compute at once"
    assert thread_layouts(cpu) == ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (1, 1))


@pytest.mark.parametrize(
    ("cores", "plans"),
    [(3, ((3, 1), (1, 3), (2, 1), (1, 1))), (7, ((7, 1), (1, 7), (2, 3), (4, 1), (2, 1), (1, 1)))],
)
def test_a_number_of_cores_that_does_not_divide_leaves_some_over(cores, plans):
    assert thread_layouts(machine(sockets=1, cores=cores)) == plans


def test_nodes_are_kept_apart():
    cpu = machine(sockets=2, cores=4)
    assert assign(cpu, 4, 2) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert assign(cpu, 2, 2) == ((0, 1), (4, 5))
    assert assign(cpu, 8, 1) == (tuple(range(8)),)
    # Of three pairs of cores in nodes of three one would lie in both.
    odd = machine(sockets=2, cores=3)
    assert thread_layouts(odd) == ((6, 1), (3, 2), (1, 6), (4, 1), (3, 1), (2, 1), (1, 1))


def test_sixty_four_cores_in_two_nodes_have_few_plans():
    plans = thread_layouts(machine(sockets=2, cores=32, threads=2))
    assert plans[:2] == ((64, 1), (32, 2))
    assert {(1, 64), (2, 64), (128, 1)} <= set(plans)
    assert len(plans) < 30


def test_a_quota_says_how_much_and_not_where():
    cpu = machine(cores=64, threads=2, quota=1.5)
    assert thread_layouts(cpu) == ((1, 1),)
    assert assign(cpu, 1, 1) == (tuple(range(128)),)
    assert (
        warning(cpu, 2, 1)
        == "2 threads take turns because only 1 can compute at once under the cgroup's quota of 1.5 cores"
    )
    two_sockets = machine(sockets=2, cores=4, quota=2)
    assert assign(two_sockets, 1, 2) == ((0, 1, 2, 3),) * 2


def test_holes_in_the_affinity():
    # Core 1 is left with its sibling only.
    cpu = machine(cores=4, threads=2, affinity=(0, 3, 4, 5))
    assert cpu.usable_cores == 3
    assert assign(cpu, 1, 3) == ((0,), (5,), (3,))
    assert assign(cpu, 4, 1) == ((0, 3, 4, 5),)


def test_a_sandbox_that_tells_no_topology():
    cpu = machine(cores=1, affinity=(3, 5))
    assert assign(cpu, 1, 2) == ((3,), (5,))
    unknown = machine(cores=1, affinity=())
    assert assign(unknown, 1, 2) == ((), ())
    assert thread_layouts(unknown) == ((1, 1),)


V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"


@pytest.mark.parametrize(
    ("files", "plans"),
    [
        ({"sys/fs/cgroup/pod/cpu.max": "100000 100000"}, ((1, 1),)),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, ((1, 1),)),
        ({"sys/fs/cgroup/pod/cpu.max": "200000 100000"}, ((2, 1), (1, 2), (1, 1))),
        ({"sys/fs/cgroup/pod/cpuset.cpus.effective": "5"}, ((1, 1),)),
        ({"sys/fs/cgroup/pod/cpuset.cpus.effective": "2,10"}, ((1, 1), (2, 1), (1, 2))),
    ],
)
def test_a_container_on_a_large_machine_uses_its_share(tmp_path: Path, files, plans):
    """16 hardware threads, of which 8 to 15 are the siblings of 0 to 7, as a tree of /proc and /sys."""
    tree = {
        "proc/cpuinfo": "\n\n".join(f"processor\t: {k}\nflags\t\t: avx2 fma" for k in range(16)) + "\n",
        "proc/self/status": "Cpus_allowed_list:\t0-15",
        "proc/self/cgroup": "0::/pod",
        "proc/self/mountinfo": V2,
        "sys/devices/system/cpu/online": "0-15",
        "sys/devices/system/node/node0/cpulist": "0-15",
    }
    for k in range(16):
        tree[f"sys/devices/system/cpu/cpu{k}/topology/core_id"] = str(k % 8)
        tree[f"sys/devices/system/cpu/cpu{k}/topology/physical_package_id"] = "0"
    for name, text in {**tree, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    found = inspect_cpu(tmp_path)
    assert len(found.cpus) == 16
    assert thread_layouts(found) == plans
