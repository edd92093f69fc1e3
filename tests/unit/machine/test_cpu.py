"""Machines as folders: a few files of /proc and /sys stand for any machine."""

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import machine

from corewise.machine.inspect import (
    CgroupMount,
    cpu_list,
    inspect_cpu,
    parse_cgroup,
    parse_cpu_list,
    parse_isa,
    parse_mountinfo,
    parse_quota,
    parse_size,
    throttled_count,
)
from corewise.records.cpu import Cache, Cpu, LogicalCpu
from corewise.records.jsonable import from_json, to_json

DATA = Path(__file__).parent / "data"
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"


def cpuinfo(name: str) -> str:
    return (DATA / f"{name}.cpuinfo").read_text()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def topology(root: Path, *, sockets: int = 1, cores: int, threads: int = 1) -> Path:
    """sysfs as Linux numbers it: first one thread of every core, then their siblings; a NUMA node per socket."""
    system, stride = "sys/devices/system", sockets * cores
    files = {f"{system}/cpu/online": f"0-{stride * threads - 1}"}
    for socket in range(sockets):
        nodes = []
        for core in range(cores):
            siblings = [thread * stride + socket * cores + core for thread in range(threads)]
            nodes += siblings
            for cpu in siblings:
                files[f"{system}/cpu/cpu{cpu}/topology/core_id"] = str(core)
                files[f"{system}/cpu/cpu{cpu}/topology/physical_package_id"] = str(socket)
                files[f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list"] = ",".join(map(str, siblings))
        files[f"{system}/node/node{socket}/cpulist"] = ",".join(map(str, nodes))
    return write(root, files)


def cache(index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu0/cache/index{index}"
    return {
        f"{folder}/level": str(level),
        f"{folder}/type": kind,
        f"{folder}/size": size,
        f"{folder}/shared_cpu_list": shared,
    }


class TestMachines:
    def test_intel_with_amx_two_sockets_and_smt(self, tmp_path: Path) -> None:
        topology(tmp_path, sockets=2, cores=4, threads=2)
        write(tmp_path, {"proc/cpuinfo": cpuinfo("sapphire-rapids"), "proc/meminfo": "MemTotal:       1024 kB"})
        cpu = inspect_cpu(tmp_path)
        assert (cpu.architecture, cpu.vendor) == ("x86_64", "GenuineIntel")
        assert cpu.model == "Intel(R) Xeon(R) Platinum 8488C"
        assert " ".join(cpu.isa) == (
            "avx2 fma f16c avx512 avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16 avx512_fp16"
        )
        assert cpu.int8_dot
        assert cpu.bf16
        assert cpu.cpus[4] == LogicalCpu(cpu=4, core=4, socket=1, node=1)
        assert cpu.cpus[12] == LogicalCpu(cpu=12, core=4, socket=1, node=1)
        assert cpu.affinity == tuple(range(16))
        assert cpu.usable_cpus == tuple(range(8)), "one hardware thread of each core"
        assert cpu.memory_bytes == 2**20

    def test_zen3_has_no_int8_dot_product_and_no_bf16(self, tmp_path: Path) -> None:
        topology(tmp_path, cores=2)
        write(
            tmp_path,
            {"proc/cpuinfo": cpuinfo("zen3")}
            | cache(0, 1, "Data", "32K", "0")
            | cache(1, 1, "Instruction", "32K", "0")
            | cache(2, 2, "Unified", "512K", "0")
            | cache(3, 3, "Unified", "32M", "0-1"),
        )
        cpu = inspect_cpu(tmp_path)
        assert (cpu.vendor, cpu.model) == ("AuthenticAMD", "AMD EPYC")
        assert cpu.isa == ("avx2", "fma", "f16c")
        assert not cpu.int8_dot
        assert not cpu.bf16
        assert cpu.usable_cpus == (0, 1)
        assert cpu.caches == (
            Cache(level=1, kind="data", size_bytes=2**15, shared_by=1),
            Cache(level=1, kind="instruction", size_bytes=2**15, shared_by=1),
            Cache(level=2, kind="unified", size_bytes=2**19, shared_by=1),
            Cache(level=3, kind="unified", size_bytes=2**25, shared_by=2),
        )

    def test_neoverse(self, tmp_path: Path) -> None:
        cpu = inspect_cpu(write(topology(tmp_path, cores=2), {"proc/cpuinfo": cpuinfo("neoverse-v1")}))
        assert (cpu.architecture, cpu.vendor, cpu.model) == ("aarch64", "ARM", "Neoverse-V1")
        assert cpu.isa == ("neon", "dotprod", "i8mm", "bf16", "sve")
        assert cpu.int8_dot
        assert cpu.bf16

    def test_unknown_arm_part_is_named_by_its_number(self, tmp_path: Path) -> None:
        info = cpuinfo("neoverse-v1").replace("0xd40", "0xfff").replace("0x41", "0x99")
        cpu = inspect_cpu(write(tmp_path, {"proc/cpuinfo": info}))
        assert (cpu.vendor, cpu.model) == ("implementer 0x99", "part 0xfff")

    def test_clusters_that_repeat_core_ids_are_told_apart(self, tmp_path: Path) -> None:
        """ARM since Linux 5.19: core_id counts within the cluster, the package is the whole chip."""
        topology(tmp_path, cores=4)
        for cpu in range(4):
            write(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/topology/core_id": str(cpu % 2)})
        assert inspect_cpu(tmp_path).usable_cores == 4

    def test_sandbox_without_sysfs_is_read_from_cpuinfo(self, tmp_path: Path) -> None:
        block = cpuinfo("sapphire-rapids").strip()
        blocks = [
            block.replace("processor\t: 0", f"processor\t: {cpu}").replace("core id\t\t: 0", f"core id\t\t: {cpu % 2}")
            for cpu in range(4)
        ]
        cpu = inspect_cpu(write(tmp_path, {"proc/cpuinfo": "\n\n".join(blocks)}))
        assert [logical.core for logical in cpu.cpus] == [0, 1, 0, 1]
        assert cpu.usable_cpus == (0, 1)
        assert cpu.caches == ()
        assert cpu.quota_cores is None

    def test_empty_root_is_a_machine_of_one_core(self, tmp_path: Path) -> None:
        cpu = inspect_cpu(tmp_path)
        assert (cpu.vendor, cpu.model, cpu.isa, cpu.cpus, cpu.affinity) == ("unknown", "unknown", (), (), ())
        assert (cpu.memory_bytes, cpu.memory_limit_bytes) == (0, None)
        assert cpu.usable_cores == 1
        assert throttled_count(tmp_path) == 0

    def test_this_machine(self) -> None:
        cpu = inspect_cpu()
        assert set(cpu.affinity) == os.sched_getaffinity(0)
        assert {logical.cpu for logical in cpu.cpus} >= set(cpu.affinity)
        assert cpu.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 1 <= cpu.usable_cores <= len(cpu.affinity)
        assert from_json(Cpu, to_json(cpu)) == cpu


class TestLimits:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return write(topology(tmp_path, cores=64), {"proc/meminfo": f"MemTotal: {64 * 2**20} kB"})

    def test_affinity_of_the_process(self, root: Path) -> None:
        write(root, {"proc/self/status": "Name:\tpython\nCpus_allowed:\tc\nCpus_allowed_list:\t2-3,500"})
        assert inspect_cpu(root).affinity == (2, 3)

    def test_smt_siblings_count_once_and_the_lower_one_works(self, tmp_path: Path) -> None:
        topology(tmp_path, cores=4, threads=2)
        cpu = inspect_cpu(write(tmp_path, {"proc/self/status": "Cpus_allowed_list:\t1,5,6"}))
        assert cpu.affinity == (1, 5, 6)
        assert cpu.usable_cpus == (1, 6)

    def test_v2_quota_of_the_container(self, root: Path) -> None:
        write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2_MOUNT})
        write(root, {"sys/fs/cgroup/cpu.max": "150000 100000", "sys/fs/cgroup/memory.max": str(2**30)})
        write(root, {"sys/fs/cgroup/cpu.stat": "usage_usec 7\nnr_periods 9\nnr_throttled 4\nthrottled_usec 5"})
        cpu = inspect_cpu(root)
        assert cpu.quota_cores == 1.5
        assert cpu.usable_cpus == (0,)
        assert cpu.memory_limit_bytes == 2**30
        assert throttled_count(root) == 4

    def test_v2_the_tightest_ancestor_wins(self, root: Path) -> None:
        slice_, own = "sys/fs/cgroup/user.slice", "sys/fs/cgroup/user.slice/app.scope"
        write(root, {"proc/self/cgroup": "0::/user.slice/app.scope", "proc/self/mountinfo": V2_MOUNT})
        write(root, {f"{own}/cpu.max": "max 100000", f"{slice_}/cpu.max": "200000 50000"})
        write(root, {f"{own}/memory.max": "max", f"{slice_}/memory.max": str(2**31)})
        write(root, {f"{slice_}/cpu.stat": "nr_throttled 3", f"{own}/cpu.stat": "nr_throttled 2"})
        write(root, {"sys/fs/cgroup/elsewhere/cpu.max": "1000 100000"})
        cpu = inspect_cpu(root)
        assert cpu.quota_cores == 4
        assert cpu.memory_limit_bytes == 2**31
        assert throttled_count(root) == 5

    def test_v2_cpuset_is_the_nearest_one(self, root: Path) -> None:
        write(root, {"proc/self/cgroup": "0::/pod/app", "proc/self/mountinfo": V2_MOUNT})
        write(root, {"sys/fs/cgroup/cpuset.cpus.effective": "0-63", "sys/fs/cgroup/pod/cpuset.cpus.effective": "8-9"})
        cpu = inspect_cpu(root)
        assert cpu.affinity == cpu.usable_cpus == (8, 9)

    @pytest.mark.parametrize("group", ["/docker/0a1b", "/docker/0a1b/worker"])
    def test_v1_container_that_sees_the_hosts_paths(self, root: Path, group: str) -> None:
        mounts = "".join(
            f"{n} 23 0:28 /docker/0a1b /sys/fs/cgroup/{name} ro master:9 - cgroup cgroup rw,{name}\n"
            for n, name in enumerate(("cpu,cpuacct", "cpuset", "memory"))
        )
        groups = f"9:name=systemd:{group}\n5:cpu,cpuacct:{group}\n4:cpuset:{group}\n3:memory:{group}"
        own = f"sys/fs/cgroup/cpu,cpuacct/{group.removeprefix('/docker/0a1b')}"
        write(root, {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups})
        write(root, {f"{own}/cpu.cfs_quota_us": "250000", f"{own}/cpu.cfs_period_us": "100000"})
        write(root, {f"{own}/cpu.stat": "nr_periods 1\nnr_throttled 6\nthrottled_time 0"})
        write(root, {"sys/fs/cgroup/cpuset/cpuset.cpus": "4-7"})
        write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**30)})
        cpu = inspect_cpu(root)
        assert cpu.quota_cores == 2.5
        assert cpu.affinity == (4, 5, 6, 7)
        assert cpu.usable_cpus == (4, 5)
        assert cpu.memory_limit_bytes == 2**30
        assert throttled_count(root) == 6

    def test_v1_unlimited(self, root: Path) -> None:
        mounts = (
            "1 2 0:1 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n2 2 0:1 / /m rw - cgroup cgroup rw,memory\n"
            "3 2 0:1 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        )
        write(root, {"proc/self/mountinfo": mounts, "proc/self/cgroup": "2:memory:/\n1:cpu:/\n0::/"})
        write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
        write(root, {"m/memory.limit_in_bytes": "9223372036854771712"})
        cpu = inspect_cpu(root)
        assert cpu.quota_cores is None
        assert cpu.memory_limit_bytes is None
        assert cpu.usable_cores == 64

    def test_group_outside_the_namespace_is_read_at_the_mount(self, root: Path) -> None:
        """A path of ``/../..`` must not lead out of the mounted hierarchy."""
        write(root, {"proc/self/cgroup": "0::/../../other", "proc/self/mountinfo": V2_MOUNT})
        write(root, {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/other/cpu.max": "100000 100000"})
        assert inspect_cpu(root).quota_cores == 3

    def test_quota_below_one_core_still_gives_one(self, root: Path) -> None:
        write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2_MOUNT})
        cpu = inspect_cpu(write(root, {"sys/fs/cgroup/cpu.max": "50000 100000"}))
        assert (cpu.quota_cores, cpu.usable_cores) == (0.5, 1)

    def test_cpuset_that_numbers_cpus_otherwise_is_ignored(self, root: Path) -> None:
        write(root, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": V2_MOUNT})
        cpu = inspect_cpu(write(root, {"sys/fs/cgroup/cpuset.cpus.effective": "100-101"}))
        assert len(cpu.affinity) == 64

    @given(data=st.data())
    def test_usable_cores_never_exceed_any_limit(self, data: st.DataObject) -> None:
        threads = data.draw(st.integers(1, 2))
        cores = data.draw(st.integers(1, 8))
        affinity = data.draw(st.sets(st.integers(0, cores * threads - 1), min_size=1))
        quota = data.draw(st.none() | st.floats(0.1, 16))
        cpu = machine(cores=cores, threads=threads, affinity=sorted(affinity), quota=quota)
        assert set(cpu.usable_cpus) <= affinity
        assert len({n % cores for n in cpu.usable_cpus}) == cpu.usable_cores
        expected = min(len({n % cores for n in affinity}), int(quota) if quota is not None else cores)
        assert cpu.usable_cores == max(1, expected)


class TestParsers:
    @pytest.mark.parametrize(
        ("text", "cpus"), [("", ()), ("\n", ()), ("0\n", (0,)), ("0-2,8", (0, 1, 2, 8)), ("3,5-6", (3, 5, 6))]
    )
    def test_cpu_list(self, text: str, cpus: tuple[int, ...]) -> None:
        assert parse_cpu_list(text) == cpus

    @given(st.sets(st.integers(0, 1000)))
    def test_cpu_list_of_single_numbers(self, cpus: set[int]) -> None:
        assert parse_cpu_list(",".join(map(str, sorted(cpus)))) == tuple(sorted(cpus))

    @given(st.sets(st.integers(0, 1000)))
    def test_cpu_list_is_what_it_was_written_of(self, cpus: set[int]) -> None:
        assert parse_cpu_list(cpu_list(sorted(cpus))) == tuple(sorted(cpus))

    def test_cpus_beside_each_other_are_written_as_a_range(self) -> None:
        assert cpu_list((0, 1, 2, 8, 10, 11)) == "0-2,8,10-11"

    @pytest.mark.parametrize(
        ("text", "cores"),
        [("max 100000", None), ("-1 100000", None), ("", None), (" ", None), ("150000 100000\n", 1.5), ("1 4", 0.25)],
    )
    def test_quota(self, text: str, cores: float | None) -> None:
        assert parse_quota(text) == cores

    @pytest.mark.parametrize(("text", "size"), [("48K\n", 49152), ("32M", 2**25), ("", 0), ("512", 0), ("xK", 0)])
    def test_size(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    def test_avx512_needs_all_four_parts_and_amx_its_tiles(self) -> None:
        assert parse_isa("x86_64", "avx512f avx512bw avx512dq amx_int8") == ()
        assert parse_isa("x86_64", "amx_int8 avx512vl avx512f avx512bw avx512dq amx_tile") == ("avx512", "amx_int8")
        assert parse_isa("riscv64", "avx2") == ()

    def test_cgroup_path_may_hold_colons(self) -> None:
        groups = parse_cgroup("7:cpu,cpuacct:/a:b\n1:name=systemd:/init\n0::/v2\n")
        assert groups["cpu"] == groups["cpuacct"] == PurePosixPath("/a:b")
        assert groups[""] == PurePosixPath("/v2")

    def test_mountinfo_keeps_only_cgroups(self) -> None:
        text = "30 23 0:27 / /sys rw shared:1 master:2 - sysfs  rw\n" + V2_MOUNT
        assert parse_mountinfo(text) == [
            CgroupMount(
                version=2,
                options=frozenset({"rw", "nsdelegate"}),
                cgroup=PurePosixPath("/"),
                point=PurePosixPath("/sys/fs/cgroup"),
            )
        ]
