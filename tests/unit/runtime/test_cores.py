"""runtime.cores: the hardware threads of a process that may use a number of them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from machines import machine

from corewise.common.errors import OutputError
from corewise.machine.layouts import packed
from corewise.records.cpu import Cpu
from corewise.runtime.cores import MOST_NAMES, ClaimedCores, chosen_cores, own_folder


def cpu_of(cores: int, *, nodes: int = 1, quota: float | None = None) -> Cpu:
    """Cores with two hardware threads each: thread k + cores is the sibling of k."""
    return machine(cores=cores, threads=2, nodes=nodes, quota=quota)


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


def test_who_leaves_the_rest_to_others_takes_whole_cores_of_the_smallest_node_that_fits() -> None:
    assert packed(cpu_of(4), 2) == (0, 4)
    assert packed(cpu_of(4), 3) == (0, 4, 1)
    free = (0, 2, 3, 6, 7)  # of node 0 only one thread is left
    assert packed(replace(cpu_of(4, nodes=2), affinity=free), 1) == (0,)
    assert packed(replace(cpu_of(4, nodes=2), affinity=free), 2) == (2, 6)
    assert packed(replace(cpu_of(4, nodes=2), affinity=free), 5) == (0, 2, 6, 3, 7)


def test_processes_that_share_a_machine_get_different_cores(tmp_path: Path) -> None:
    claim = (
        "import os, sys; from pathlib import Path; from corewise.runtime.cores import ClaimedCores;"
        "claimed = ClaimedCores(1, Path(sys.argv[1]));"
        "print(*sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'], flush=True); input()"
    )
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core")
    alive, cores = [], []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", claim, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        alive.append(process)
        assert process.stdout is not None
        cores.append(process.stdout.readline().split())
    assert [threads for _, threads in cores] == ["1", "1"]
    assert len({core for core, _ in cores}) == 2
    alive[0].kill()
    alive[0].wait()
    again = ClaimedCores._free(own_folder(tmp_path), [int(cores[0][0]), int(cores[1][0])])
    assert [number for number, _ in again] == [int(cores[0][0])]  # what a process had is free when it is dead
    for process in alive:
        process.kill()
        process.communicate()


def test_claims_go_round_what_others_put_at_their_name(tmp_path: Path) -> None:
    name = own_folder(tmp_path).name
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / f"{name}-1").touch()
    (tmp_path / f"{name}-2").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / f"{name}-2", 65534, 65534)
    found = own_folder(tmp_path)
    assert found.name == (f"{name}-3" if os.getuid() == 0 else f"{name}-2")
    assert own_folder(tmp_path) == found
    assert list(found.iterdir()) == []


def test_claims_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, which nobody claims")
    name = own_folder(tmp_path).name
    (tmp_path / name).rmdir()
    for number in range(MOST_NAMES):
        (tmp_path / f"{name}{f'-{number}' if number else ''}").touch()
    for shared, why in ((tmp_path, f"others have taken the name {name}-8"), (tmp_path / "none", "No such file")):
        with pytest.raises(OutputError, match=f"cores cannot be claimed in {shared}: {why}"):
            ClaimedCores(1, shared)
