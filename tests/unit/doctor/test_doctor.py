import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from places import ROOT
from rich.console import Console

from corewise.doctor import (
    ENGINE_PACKAGES,
    Diagnosis,
    TorchFacts,
    diagnose,
    limited_by,
    moved_parts,
    parse_torch_build,
    render,
    torch_findings,
)
from corewise.engines import engine
from corewise.machine.inspect import inspect_cpu, parse_isa
from corewise.records.cpu import Cache, Cpu, LogicalCpu
from corewise.records.jsonable import from_json, to_json

SOURCE = ROOT / "src"
SERVER = Cpu(
    architecture="x86_64",
    vendor="GenuineIntel",
    model="Intel(R) Xeon(R) Platinum 8488C",
    isa=("avx2", "fma", "f16c", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    cpus=tuple(LogicalCpu(cpu=n, core=n % 64, socket=n % 64 // 32, node=n % 64 // 32) for n in range(128)),
    caches=(Cache(level=3, kind="unified", size_bytes=105 * 2**20, shared_by=64),),
    affinity=tuple(range(128)),
    quota_cores=None,
    memory_bytes=256 * 2**30,
    memory_limit_bytes=None,
)
DESKTOP = replace(
    SERVER,
    isa=("avx2", "fma", "f16c", "avx512", "avx512_vnni", "avx512_bf16"),
    cpus=tuple(LogicalCpu(cpu=n, core=n, socket=0, node=0) for n in range(4)),
    affinity=(0, 1, 2, 3),
)
FACTS = TorchFacts(
    version="2.13.0+cpu",
    mkl="2024.2",
    onednn="3.12.0",
    parallel_backend="OpenMP",
    cpu_capability="AVX512",
    quantized_backends=("onednn", "x86"),
    threads=4,
    amx=True,
)


def whats(cpu: Cpu, **environment: str) -> str:
    return "\n".join(finding.what for finding in diagnose(cpu, environment=environment).findings)


def shown(diagnosis: Diagnosis, width: int = 80) -> str:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(render(diagnosis))
    return console.export_text()


def elsewhere(code: str, folder: Path, *flags: str) -> str:
    """What ``code`` prints in a fresh interpreter whose only packages are corewise's source and ``folder``'s."""
    paths = f"import sys; sys.path[:0] = [{str(SOURCE)!r}, {str(folder)!r}]\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", *flags, "-c", paths + code], check=True, capture_output=True, text=True
    ).stdout


def install(folder: Path, name: str, version: str, code: str = "") -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


class TestFindings:
    def test_a_good_machine_has_none(self) -> None:
        diagnosis = diagnose(DESKTOP)
        pitfalls = ("int8", "bf16", "cgroup", "affinity", "SMT", "NUMA", "memory", "is set")
        assert not any(pitfall in finding.what for finding in diagnosis.findings for pitfall in pitfalls)
        assert (diagnosis.usable_cores, diagnosis.limited_by) == (4, "machine")

    def test_no_int8_dot_product_and_no_bf16(self) -> None:
        cpu = replace(DESKTOP, isa=("avx2", "fma", "f16c"))
        assert "rounds weights to 7 bits" in whats(cpu)
        assert "no bf16 hardware: bf16 builds are skipped" in whats(cpu)

    def test_arm_without_dotprod_does_not_saturate(self) -> None:
        cpu = replace(DESKTOP, architecture="aarch64", isa=("neon",))
        assert "no int8 dot product (DotProd)" in whats(cpu)
        assert "saturate" not in whats(cpu)

    def test_unreadable_extensions(self) -> None:
        assert "names no extension that corewise knows for riscv64" in whats(
            replace(DESKTOP, architecture="riscv64", isa=())
        )

    def test_quota_below_cores(self) -> None:
        cpu = replace(SERVER, quota_cores=1.5)
        assert "the cgroup allows 1.5 of 64 cores" in whats(cpu)
        assert "corewise uses 1" in whats(cpu)
        assert limited_by(cpu) == "quota"
        assert "cgroup" not in whats(replace(SERVER, quota_cores=64.0))

    def test_affinity(self) -> None:
        cpu = replace(SERVER, affinity=(3, 4))
        assert "affinity or cpuset allows 2 of 128 hardware threads" in whats(cpu)
        assert "NUMA" not in whats(cpu), "both threads are on one node"
        assert limited_by(cpu) == "affinity"
        assert limited_by(replace(cpu, quota_cores=3.0)) == "affinity"

    def test_amx_is_explained(self) -> None:
        assert "AMX multiplies matrices of int8 and bf16: bf16 may be nearly as fast" in whats(SERVER)
        assert "nearly as fast" not in whats(replace(SERVER, isa=("avx512", "amx_int8")))
        assert "AMX" not in whats(replace(SERVER, isa=("avx512", "avx512_bf16")))

    def test_smt_and_numa(self) -> None:
        assert "(SMT)" in whats(SERVER)
        assert "2 NUMA nodes" in whats(SERVER)
        assert "(SMT)" not in whats(DESKTOP)
        assert "NUMA" not in whats(DESKTOP)

    def test_little_memory(self) -> None:
        assert "only 1.5 GiB of memory" in whats(replace(DESKTOP, memory_limit_bytes=3 * 2**29))
        assert "only 1.0 GiB of memory" in whats(replace(DESKTOP, memory_bytes=2**30))
        assert "GiB of memory" not in whats(replace(DESKTOP, memory_bytes=0)), "0 is unknown"

    def test_environment(self) -> None:
        text = whats(DESKTOP, OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY="avx2", HOME="/root", KMP_AFFINITY="")
        assert "OMP_NUM_THREADS=1 is set" in text
        assert "ATEN_CPU_CAPABILITY=avx2 is set" in text
        assert "HOME" not in text
        assert "KMP_AFFINITY" not in text

    def test_the_worst_come_first(self) -> None:
        findings = diagnose(replace(SERVER, quota_cores=1.0, isa=("avx2",))).findings
        severities = [finding.severity for finding in findings]
        assert severities == sorted(severities, key=["problem", "warning", "info"].index)
        assert {"warning", "info"} <= set(severities)
        assert all(finding.fix for finding in findings)

    def test_compiler_is_searched_on_the_path_given(self, tmp_path: Path) -> None:
        nothing = diagnose(DESKTOP, environment={"PATH": str(tmp_path)})
        assert nothing.compiler is None
        assert any("no g++ on PATH" in finding.what for finding in nothing.findings)
        (tmp_path / "clang++").touch(mode=0o755)  # inductor is told to use g++
        assert diagnose(DESKTOP, environment={"PATH": str(tmp_path)}).compiler is None
        (tmp_path / "g++").touch(mode=0o755)
        found = diagnose(DESKTOP, environment={"PATH": str(tmp_path)})
        assert found.compiler == str(tmp_path / "g++")
        assert not any("g++" in finding.what for finding in found.findings)


class TestEngines:
    DIAGNOSE = (
        "import json; from corewise.machine.inspect import inspect_cpu; from corewise.doctor import diagnose\n"
        "from corewise.records.jsonable import to_json; print(json.dumps(to_json(diagnose(inspect_cpu(), torch=True))))"
    )

    def found(self, folder: Path) -> Diagnosis:
        return from_json(Diagnosis, json.loads(elsewhere(self.DIAGNOSE, folder)))

    def test_without_any_package(self, tmp_path: Path) -> None:
        (tmp_path / "openvino").mkdir()  # a folder without code is no package
        diagnosis = self.found(tmp_path)
        assert [engine.available for engine in diagnosis.engines] == [False] * 4
        assert diagnosis.engines[2].reason == "needs openvino, nncf: pip install 'corewise[openvino]'"
        assert diagnosis.packages.keys() == {"python", "corewise"}
        assert diagnosis.torch is None
        assert diagnosis.findings[0].severity == "problem"
        assert diagnosis.findings[0].fix == "pip install 'corewise[optimize]'"

    def test_only_torch_which_is_broken(self, tmp_path: Path) -> None:
        install(tmp_path, "torch", "2.13.0", "raise OSError('libgomp.so.1: cannot open shared object file\\nhint')")
        diagnosis = self.found(tmp_path)
        assert {engine.name: engine.version for engine in diagnosis.engines if engine.available} == {
            "eager": "2.13.0",
            "torch-int8": "2.13.0",
        }
        assert diagnosis.torch is None
        assert diagnosis.findings[0].what == (
            "torch 2.13.0 is installed but does not import: libgomp.so.1: cannot open shared object file"
        )
        assert any("no engine beyond torch is installed" in finding.what for finding in diagnosis.findings)

    def test_partly_installed(self, tmp_path: Path) -> None:
        code = "raise SystemExit('the doctor must not import this')"
        for name, version in (("openvino", "2026.1"), ("nncf", "3.0"), ("onnxruntime", "1.22"), ("torch", "2.13.0")):
            install(tmp_path, name, version, "raise ImportError" if name == "torch" else code)
        (tmp_path / "onnx.py").touch()
        diagnosis = self.found(tmp_path)
        assert diagnosis.engines[2].available
        assert (
            diagnosis.engines[3].reason
            == "opens artifacts; to build it needs onnxscript: pip install 'corewise[onnxruntime]'"
        )
        assert diagnosis.packages["onnx"] == "unknown", "importable, but not installed by an installer"
        assert any("candidates of onnxruntime are skipped" in finding.what for finding in diagnosis.findings)

    def test_imports_no_engine(self) -> None:
        code = (
            "import sys\n"
            "from corewise.machine.inspect import inspect_cpu; from corewise.doctor import diagnose\n"
            "diagnose(inspect_cpu())\n"
            "print(*sorted({'torch', 'numpy', 'openvino', 'onnxruntime', 'nncf', 'rich',"
            " 'pydantic'} & sys.modules.keys()))"
        )
        imported = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        assert imported.split() == []


class TestTorch:
    def test_this_machine_as_torch_sees_it(self) -> None:
        import torch

        cpu = inspect_cpu()
        diagnosis = diagnose(cpu, torch=True)
        facts = diagnosis.torch
        assert facts is not None
        assert facts.version == diagnosis.packages["torch"] == torch.__version__
        assert facts.onednn is not None
        assert facts.onednn[0].isdigit()
        assert facts.parallel_backend == "OpenMP"
        assert "onednn" in facts.quantized_backends
        assert from_json(Diagnosis, json.loads(json.dumps(to_json(diagnosis)))) == diagnosis

    def test_torch_finds_the_same_extensions(self) -> None:
        """torch asks cpuinfo's CPUID reader, we ask the kernel."""
        import torch

        seen = torch.cpu.get_capabilities()
        theirs = {"fma": "fma3", "neon": "neon", "dotprod": "dot", "avx512": "avx512_f"}
        cpu = inspect_cpu()
        known = ("avx2", "fma", "f16c", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        arm = ("neon", "dotprod", "i8mm", "bf16", "sve", "sve2")
        names = arm if cpu.architecture == "aarch64" else known
        assert {name for name in names if seen.get(theirs.get(name, name))} == set(cpu.isa) & set(names)

    def test_build_without_libraries(self) -> None:
        assert parse_torch_build("PyTorch built with:\n  - GCC 13.3\nATen parallel backend: native thread pool\n") == {
            "parallel_backend": "native thread pool"
        }

    @pytest.mark.parametrize(
        ("facts", "isa", "expected"),
        [
            (FACTS, "avx2 avx512f avx512bw avx512dq avx512vl amx_tile amx_int8", []),
            (replace(FACTS, cpu_capability="AVX2", amx=False), "avx2", []),
            (replace(FACTS, cpu_capability="DEFAULT"), "avx2", ["torch uses DEFAULT kernels"]),
            (replace(FACTS, cpu_capability="AVX2"), "avx2 avx512f avx512bw avx512dq avx512vl", ["torch uses AVX2"]),
            (replace(FACTS, amx=False), "amx_tile amx_int8", ["the CPU has AMX"]),
            (replace(FACTS, onednn=None), "fma", ["torch was built without oneDNN"]),
        ],
    )
    def test_findings(self, facts: TorchFacts, isa: str, expected: list[str]) -> None:
        found = list(torch_findings(replace(DESKTOP, isa=parse_isa("x86_64", isa)), facts))
        assert len(found) == len(expected)
        assert all(finding.what.startswith(start) for finding, start in zip(found, expected, strict=True))


class TestRender:
    @pytest.mark.parametrize("width", [80, 120])
    def test_everything_is_readable(self, width: int) -> None:
        limited = replace(SERVER, quota_cores=1.5, memory_limit_bytes=2**30)
        diagnosis = replace(diagnose(limited), torch=FACTS, compiler=None)
        text = shown(diagnosis, width)
        assert max(map(len, text.splitlines())) <= width
        words = " ".join(text.split())
        for part in (
            "Intel(R) Xeon(R) Platinum 8488C (GenuineIntel, x86_64)",
            "✓ amx_int8",
            "✗ avx_vnni",
            "64 cores, 128 hardware threads, 2 sockets, 2 NUMA nodes",
            "L3 105.0 MiB shared by 64 threads",
            "1 core: limited by the cgroup's quota of 1.5 cores",
            "256.0 GiB, 1.0 GiB allowed by the cgroup",
            "none on PATH",
            "oneDNN 3.12.0",
            "int8 backends onednn, x86",
            "the cgroup allows 1.5 of 64 cores",
        ):
            assert part in words

    def test_the_install_command_keeps_its_brackets(self) -> None:
        diagnosis = diagnose(DESKTOP)
        reason = "needs nncf: pip install 'corewise[openvino]'"
        missing = replace(diagnosis.engines[2], available=False, reason=reason)
        text = shown(replace(diagnosis, engines=(missing,)))
        assert "✗ openvino" in text
        assert reason in text

    def test_a_machine_that_tells_nothing(self, tmp_path: Path) -> None:
        text = shown(diagnose(inspect_cpu(tmp_path)))
        assert "unknown (unknown" in text
        assert "1 core: all of them" in text


@pytest.mark.parametrize("name", sorted(ENGINE_PACKAGES))
@pytest.mark.parametrize("absent", ["torch", "openvino", "nncf", "onnxruntime", "onnx", "onnxscript"])
def test_the_doctor_and_the_engine_ask_for_the_same_packages(name, absent, monkeypatch):
    """The doctor keeps its own table, since asking the engines would cost it the import of numpy."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == absent else find(package))
    status = next(engine for engine in diagnose(inspect_cpu()).engines if engine.name == name)
    assert status.available == (not engine(name).unavailable())
    assert absent not in ENGINE_PACKAGES[name][1] or absent in status.reason


@pytest.mark.parametrize(
    ("passes", "fx", "expected"),
    [
        ("torch", True, []),
        ("torchao", True, ["torch 2.14.1 leaves inductor's int8 fusions to torchao"]),
        ("", True, ["int8 of inductor is skipped"]),
        ("torchao", False, ["leaves inductor's int8 fusions", "torch-int8 is skipped"]),
    ],
)
def test_what_moved_out_of_torch_is_told(passes: str, fx: bool, expected: list[str]) -> None:
    findings = list(moved_parts("2.14.1", passes, fx))
    assert len(findings) == len(expected)
    assert all(words in finding.what for words, finding in zip(expected, findings, strict=True))
    assert all(finding.fix for finding in findings)
