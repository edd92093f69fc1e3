"""What corewise finds on this machine: the CPU, its limits, the engines, and each pitfall with its fix.

``diagnose`` imports no engine, so it is fast; torch is imported only if its facts are requested.
"""

import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from types import MappingProxyType
from typing import Literal

import corewise
from corewise.machine.torch_features import has_fx_quantization, int8_passes
from corewise.records.cpu import Cpu
from corewise.report.numbers import size

Severity = Literal["info", "warning", "problem"]
Limit = Literal["machine", "affinity", "quota"]

ENGINE_PACKAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "eager": ("optimize", ("torch",)),
    "torch-int8": ("optimize", ("torch",)),
    "openvino": ("openvino", ("openvino", "nncf")),
    "onnxruntime": ("onnxruntime", ("onnxruntime", "onnx", "onnxscript")),
}
"""By engine: the extra that installs it, and the packages it needs to build; the first one gives its version."""

COMPILER = "g++"
LOW_MEMORY_BYTES = 2 * 2**30
"""Below this, building a model the size of ResNet-50 or BERT-base is likely to be killed."""

_THREADS: tuple[Severity, str] = ("info", "corewise sets the threads of every plan itself, so nothing needs to change")
_PINNING: tuple[Severity, str] = (
    "warning",
    "unset it: corewise pins the instances of a plan itself, and this setting conflicts with that",
)
_ISA_CAP: tuple[Severity, str] = (
    "warning",
    "unset it unless this is a test: it may stop kernels from using extensions of this CPU",
)
ENVIRONMENT_PITFALLS: Mapping[str, tuple[Severity, str]] = {
    "OMP_NUM_THREADS": _THREADS,
    "MKL_NUM_THREADS": _THREADS,
    "OMP_PROC_BIND": _PINNING,
    "GOMP_CPU_AFFINITY": _PINNING,
    "KMP_AFFINITY": _PINNING,
    "ATEN_CPU_CAPABILITY": _ISA_CAP,
    "ONEDNN_MAX_CPU_ISA": _ISA_CAP,
}
"""The severity of each environment variable if it is set, and its fix."""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """Whether an engine's packages are installed; ``reason`` says what is missing and how to get it."""

    name: str
    available: bool
    version: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """How the installed torch was built and what it uses of this CPU; ``None`` for a library that it lacks."""

    version: str
    mkl: str | None
    onednn: str | None
    parallel_backend: str | None
    cpu_capability: str
    """The instruction set of torch's own kernels: ``DEFAULT``, ``AVX2``, ``AVX512``, ``SVE256``."""
    quantized_backends: tuple[str, ...]
    threads: int
    """Threads that one operation uses by default."""
    amx: bool
    """Whether the kernel granted this process the AMX tile registers."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One pitfall of this machine: what it is, what it costs, and what to do about it."""

    severity: Severity
    what: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that ``doctor`` found."""

    cpu: Cpu
    usable_cores: int
    limited_by: Limit
    """The limit that determines ``usable_cores``; ``affinity`` includes the cpuset."""
    compiler: str | None
    """Path of the C++ compiler that inductor needs, g++; ``None`` if it is not on PATH."""
    engines: tuple[EngineStatus, ...]
    packages: dict[str, str]
    """Versions of Python, of corewise and of the engines' packages that are installed."""
    torch: TorchFacts | None
    findings: tuple[Finding, ...]
    """The worst first."""


def diagnose(cpu: Cpu, *, torch: bool = False, environment: Mapping[str, str] = MappingProxyType({})) -> Diagnosis:
    """Look at the machine; ``torch`` also imports torch for its facts, which takes seconds.

    ``environment`` is the process's: its PATH is searched for a compiler, and its pitfalls are reported.
    A torch that does not import is a finding, not an error.
    """
    packages = _packages()
    engines = tuple(_engine_status(name, packages) for name in ENGINE_PACKAGES)
    compiler = shutil.which(COMPILER, path=environment.get("PATH"))
    findings = [*_cpu_findings(cpu), *_limit_findings(cpu), *_software_findings(engines, compiler, environment)]
    if "torch" in packages:
        findings += moved_parts(packages["torch"], int8_passes(), has_fx_quantization())
    facts = None
    if torch and "torch" in packages:
        try:
            facts = _torch_facts()
        except (ImportError, OSError) as error:
            first_line = str(error).partition("\n")[0]
            findings.append(
                Finding(
                    severity="problem",
                    what=f"torch {packages['torch']} is installed but does not import: {first_line}",
                    fix="pip install --force-reinstall 'corewise[optimize]'",
                )
            )
        else:
            findings += torch_findings(cpu, facts)
    order: tuple[Severity, ...] = ("problem", "warning", "info")
    return Diagnosis(
        cpu=cpu,
        usable_cores=cpu.usable_cores,
        limited_by=limited_by(cpu),
        compiler=compiler,
        engines=engines,
        packages=packages,
        torch=facts,
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
    )


def limited_by(cpu: Cpu) -> Limit:
    """The limit that determines ``cpu.usable_cores``: the quota, the affinity (or cpuset), or the machine's size."""
    allowed = _allowed_cores(cpu)
    if cpu.quota_cores is not None and cpu.quota_cores < allowed:
        return "quota"
    return "affinity" if allowed < cores(cpu) else "machine"


def parse_torch_build(text: str) -> dict[str, str]:
    """``torch.__config__.show()`` and ``parallel_info()`` as ``mkl``, ``onednn``, ``parallel_backend``, if built in."""
    patterns = {
        "mkl": r"Math Kernel Library Version (\S+?)-",
        "onednn": r"MKL-DNN v(\S+)",
        "parallel_backend": r"ATen parallel backend: (.+)",
    }
    matches = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in matches.items() if match}


def torch_findings(cpu: Cpu, facts: TorchFacts) -> Iterator[Finding]:
    """The features of this CPU that torch does not use."""
    best = "AVX512" if cpu.has("avx512") else "AVX2" if cpu.has("avx2") else None
    if best and facts.cpu_capability != best:
        yield Finding(
            severity="warning",
            what=f"torch uses {facts.cpu_capability} kernels although the CPU has {best}: eager fp32 is slower",
            fix="unset ATEN_CPU_CAPABILITY, or install torch from https://download.pytorch.org/whl/cpu",
        )
    if cpu.has("amx_int8") and not facts.amx:
        yield Finding(
            severity="warning",
            what="the CPU has AMX but the kernel did not grant its tile registers: int8 and bf16 run without it",
            fix="use Linux 5.16 or newer and a sandbox that allows arch_prctl(ARCH_REQ_XCOMP_PERM)",
        )
    if facts.onednn is None:
        yield Finding(
            severity="warning",
            what="torch was built without oneDNN: convolutions are slow and most int8 backends are missing",
            fix="install torch from https://download.pytorch.org/whl/cpu",
        )


def moved_parts(version: str, int8_passes_in: str, fx_quantization: bool) -> Iterator[Finding]:
    """What this torch has no longer, or has elsewhere.

    ``int8_passes_in`` is the package that has inductor's int8 fusions, empty if none has.
    """
    if not int8_passes_in:
        yield Finding(
            severity="info",
            what=f"int8 of inductor is skipped: torch {version} has no int8 fusions, and no torchao with them is found",
            fix=_pip("optimize"),
        )
    elif int8_passes_in != "torch":
        yield Finding(
            severity="info",
            what=f"torch {version} leaves inductor's int8 fusions to {int8_passes_in}, which has them",
            fix=f"nothing to do, as long as {int8_passes_in} stays installed",
        )
    if not fx_quantization:
        yield Finding(
            severity="info",
            what=f"torch-int8 is skipped: torch {version} no longer has FX quantization",
            fix="pip install 'torch<2.16' if its int8 is wanted; the other engines' int8 does not need it",
        )


def _packages() -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "corewise": corewise.__version__}
    for name in dict.fromkeys(package for _, packages in ENGINE_PACKAGES.values() for package in packages):
        spec = importlib.util.find_spec(name)
        # A folder of that name without code is found too, as a namespace without origin.
        if spec is not None and spec.origin is not None:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "unknown"
    return versions


def _engine_status(name: str, installed: Mapping[str, str]) -> EngineStatus:
    extra, packages = ENGINE_PACKAGES[name]
    missing = [package for package in packages if package not in installed]
    what = "needs" if packages[0] in missing else "opens artifacts; to build it needs"
    reason = f"{what} {', '.join(missing)}: {_pip(extra)}" if missing else ""
    return EngineStatus(name=name, available=not missing, version=installed.get(packages[0]), reason=reason)


def _torch_facts() -> TorchFacts:
    import torch

    build = parse_torch_build(torch.__config__.show() + torch.__config__.parallel_info())
    return TorchFacts(
        version=torch.__version__,
        mkl=build.get("mkl"),
        onednn=build.get("onednn"),
        parallel_backend=build.get("parallel_backend"),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        quantized_backends=tuple(torch.backends.quantized.supported_engines),
        threads=torch.get_num_threads(),
        amx=torch.cpu._init_amx(),
    )


def _cpu_findings(cpu: Cpu) -> Iterator[Finding]:
    if not cpu.isa:
        yield Finding(
            severity="warning",
            what=f"/proc/cpuinfo names no extension that corewise knows for {cpu.architecture}",
            fix="mount /proc where corewise runs, or report the output of doctor --json",
        )
    elif not cpu.int8_dot and cpu.architecture == "x86_64":
        yield Finding(
            severity="warning",
            what="no int8 dot product (VNNI): int8 sums saturate in 16 bits, so corewise rounds weights to 7 bits,"
            " and int8 gains about half as much",
            fix="run on an Intel Xeon since Cascade Lake, a Core since Ice Lake, or an AMD CPU since Zen 4; a guest"
            " needs -cpu host to see the extension",
        )
    elif not cpu.int8_dot:
        yield Finding(
            severity="warning",
            what="no int8 dot product (DotProd): int8 gains about half as much",
            fix="run on ARMv8.2 with DotProd or newer, such as Neoverse-N1",
        )
    if tiles := [kind for kind in ("int8", "bf16") if cpu.has(f"amx_{kind}")]:
        close = ": bf16 may be nearly as fast as int8" if "bf16" in tiles else ""
        yield Finding(
            severity="info",
            what=f"AMX multiplies matrices of {' and '.join(tiles)}{close}",
            fix="nothing to do; doctor --torch says whether this process may use it",
        )
    if cpu.isa and not cpu.bf16:
        yield Finding(
            severity="info",
            what="no bf16 hardware: bf16 builds are skipped",
            fix="nothing to do; Intel Cooper Lake, AMD Zen 4 and Neoverse-V1 have it",
        )


def _limit_findings(cpu: Cpu) -> Iterator[Finding]:
    allowed = _allowed_cores(cpu)
    if cpu.quota_cores is not None and cpu.quota_cores < allowed:
        yield Finding(
            severity="warning",
            what=f"the cgroup allows {cpu.quota_cores:g} of {allowed} cores: thread pools sized to the machine are"
            f" stopped most of the time; corewise uses {cpu.usable_cores}",
            fix=f"start other programs with OMP_NUM_THREADS={cpu.usable_cores}"
            if cpu.quota_cores.is_integer()
            else "give the container a whole number of cores (docker --cpus, Kubernetes limits.cpu)",
        )
    if cpu.cpus and len(cpu.affinity) < len(cpu.cpus):
        yield Finding(
            severity="info",
            what=f"affinity or cpuset allows {len(cpu.affinity)} of {len(cpu.cpus)} hardware threads",
            fix="widen it (taskset, docker --cpuset-cpus) if corewise may use more of the machine",
        )
    usable = [logical for logical in cpu.cpus if logical.cpu in cpu.affinity]
    if len(usable) > len({(logical.socket, logical.core) for logical in usable}):
        yield Finding(
            severity="info",
            what="cores run several hardware threads each (SMT), which share the core's multipliers:"
            " corewise uses one per core",
            fix="nothing to do; give other tools as many threads as there are cores",
        )
    if (nodes := len({logical.node for logical in usable})) > 1:
        yield Finding(
            severity="info",
            what=f"{nodes} NUMA nodes: an instance that spans them waits for remote memory",
            fix="run one instance per node: numactl --cpunodebind=0 --membind=0 ...",
        )
    if 0 < (memory := cpu.memory_limit_bytes or cpu.memory_bytes) < LOW_MEMORY_BYTES:
        yield Finding(
            severity="warning",
            what=f"only {size(memory)} of memory: builds may be killed while they are made",
            fix="raise the limit (docker --memory, Kubernetes limits.memory) to 2 GiB or more",
        )


def _software_findings(
    engines: tuple[EngineStatus, ...], compiler: str | None, environment: Mapping[str, str]
) -> Iterator[Finding]:
    missing = {engine.name: engine.reason for engine in engines if not engine.available}
    if "eager" in missing:
        yield Finding(
            severity="problem",
            what="torch is not installed: artifacts can be served, models cannot be optimized",
            fix=_pip("optimize"),
        )
    elif {"openvino", "onnxruntime"} <= missing.keys():
        yield Finding(
            severity="warning",
            what="no engine beyond torch is installed: the fastest builds are skipped",
            fix=_pip("openvino,onnxruntime"),
        )
    else:
        for name, reason in missing.items():
            yield Finding(severity="info", what=f"candidates of {name} are skipped", fix=reason)
    if compiler is None:
        yield Finding(
            severity="info",
            what=f"no {COMPILER} on PATH: inductor does not work; the other engines do",
            fix=f"install it (apt-get install {COMPILER}) if inductor is wanted",
        )
    for variable, (severity, fix) in ENVIRONMENT_PITFALLS.items():
        if value := environment.get(variable):
            yield Finding(severity=severity, what=f"{variable}={value} is set", fix=fix)


def _pip(extra: str) -> str:
    return f"pip install 'corewise[{extra}]'"


def cores(cpu: Cpu) -> int:
    """Physical cores of the machine."""
    return len({(logical.socket, logical.core) for logical in cpu.cpus})


def _allowed_cores(cpu: Cpu) -> int:
    """Physical cores within the affinity, whatever the quota."""
    return replace(cpu, quota_cores=None).usable_cores
