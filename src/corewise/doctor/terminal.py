"""How a diagnosis looks on a terminal."""

from typing import TYPE_CHECKING

from corewise.doctor.diagnosis import Diagnosis, Severity, cores
from corewise.machine.inspect import EXTENSIONS
from corewise.records.cpu import Cpu
from corewise.report.numbers import counted, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def render(diagnosis: Diagnosis) -> "RenderableType":
    """The diagnosis for a terminal of 80 columns or more; give it to ``rich.console.Console.print``."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_facts_table(diagnosis), Text(), _engines_table(diagnosis)]
    if diagnosis.findings:
        parts += [Text(), _findings_table(diagnosis)]
    return Group(*parts)


def _facts_table(diagnosis: Diagnosis) -> "Table":
    from rich.text import Text

    cpu = diagnosis.cpu
    table = _grid()
    table.add_row(Text("CPU", "bold"), Text(f"{cpu.model} ({cpu.vendor}, {cpu.architecture})"))
    table.add_row(Text("ISA", "bold"), _isa_marks(cpu))
    table.add_row(Text("Cores", "bold"), Text(_topology(cpu)))
    table.add_row(Text("Caches", "bold"), Text(_caches(cpu)))
    table.add_row(Text("Usable", "bold"), Text(_usable(diagnosis)))
    table.add_row(Text("Memory", "bold"), Text(_memory(cpu)))
    table.add_row(Text("Compiler", "bold"), Text(diagnosis.compiler or "none on PATH"))
    if facts := diagnosis.torch:
        libraries = (
            facts.mkl and f"MKL {facts.mkl}",
            facts.onednn and f"oneDNN {facts.onednn}",
            facts.parallel_backend,
        )
        built = ", ".join(library for library in libraries if library)
        backends = ", ".join(facts.quantized_backends)
        table.add_row(Text("torch", "bold"), Text(f"{facts.version}, {facts.cpu_capability} kernels, {built}"))
        table.add_row("", Text(f"{facts.threads} threads; int8 backends {backends}"))
    return table


def _engines_table(diagnosis: Diagnosis) -> "Table":
    from rich.text import Text

    table = _grid()
    for engine in diagnosis.engines:
        name = Text.assemble(_mark(engine.available), " ", engine.name)
        table.add_row(name, Text(engine.reason or engine.version or ""))
    return table


def _findings_table(diagnosis: Diagnosis) -> "Table":
    from rich.text import Text

    styles: dict[Severity, str] = {"problem": "bold red", "warning": "yellow", "info": "cyan"}
    table = _grid()
    for finding in diagnosis.findings:
        table.add_row(
            Text(finding.severity, styles[finding.severity]),
            Text.assemble(finding.what, "\n", (f"→ {finding.fix}", "dim")),
        )
    return table


def _grid() -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=11)
    table.add_column(overflow="fold")
    return table


def _mark(present: bool) -> tuple[str, str]:
    return ("✓", "green") if present else ("✗", "red")


def _isa_marks(cpu: Cpu) -> "RenderableType":
    from rich.columns import Columns
    from rich.text import Text

    known = EXTENSIONS.get(cpu.architecture)
    if known is None:
        return Text("unknown")
    return Columns([Text.assemble(_mark(cpu.has(name)), f" {name}") for name in known])


def _topology(cpu: Cpu) -> str:
    if not cpu.cpus:
        return "unknown"
    sockets = len({logical.socket for logical in cpu.cpus})
    nodes = len({logical.node for logical in cpu.cpus})
    return ", ".join(
        (
            counted(cores(cpu), "core"),
            counted(len(cpu.cpus), "hardware thread"),
            counted(sockets, "socket"),
            counted(nodes, "NUMA node"),
        )
    )


def _caches(cpu: Cpu) -> str:
    letter = {"data": "d", "instruction": "i", "unified": ""}
    caches = [
        f"L{cache.level}{letter[cache.kind]} {size(cache.size_bytes)}"
        + (f" shared by {cache.shared_by} threads" if cache.shared_by > 1 else "")
        for cache in cpu.caches
    ]
    return ", ".join(caches) or "unknown"


def _usable(diagnosis: Diagnosis) -> str:
    cpu = diagnosis.cpu
    why = {
        "machine": "all of them",
        "affinity": f"affinity or cpuset allows {counted(len(cpu.affinity), 'hardware thread')}",
        "quota": f"limited by the cgroup's quota of {cpu.quota_cores or 0:g} core{'' if cpu.quota_cores == 1 else 's'}",
    }
    return f"{counted(diagnosis.usable_cores, 'core')}: {why[diagnosis.limited_by]}"


def _memory(cpu: Cpu) -> str:
    limit = "no limit" if cpu.memory_limit_bytes is None else f"{size(cpu.memory_limit_bytes)} allowed by the cgroup"
    return f"{size(cpu.memory_bytes) if cpu.memory_bytes else 'unknown'}, {limit}"
