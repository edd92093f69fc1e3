"""An artifact's elastic plan and each of its two layouts alone: three ways to run one payload, measured here.

What the benchmarks of elastic plans start from; ``elastic_loads`` puts load on the ways.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.harness import TIMEOUT_S, say
from corewise.artifact import PAYLOAD, Artifact, read, tuned
from corewise.artifact.open import golden_samples
from corewise.batching import ElasticTables, LatencyTable
from corewise.batching.simulate import Service, Wide, capacity_per_s
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import ElasticPlan, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Requirements
from corewise.records.jsonable import to_json
from corewise.records.measurement import Measurement
from corewise.records.tuned import Machine, Tuned
from corewise.runtime.client import Worker
from corewise.search.elastic import FEW_BATCHES, elastic_plan, elasticity, plans_to_measure

ELASTIC, FIXED = "elastic", ("wide", "narrow")
WAYS = (ELASTIC, *FIXED)
MEASURE_S = 0.5
"""Of each batch of each layout."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How requests are answered: by the instances of ``plan`` and, if it is elastic, by one on all cores."""

    plan: Plan
    wide: Plan | None
    table: LatencyTable
    """The p99 of the instances' calls, by which requests are admitted."""
    tables: ElasticTables | None
    service: Service
    """What calls of the instances take in a simulation: their p50."""
    wide_service: Service | None

    @property
    def simulated(self) -> Wide | None:
        """What a simulation takes for the call on all cores."""
        return None if self.tables is None or self.wide_service is None else Wide(self.tables, self.wide_service)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An artifact with its elastic plan, and what calls of both layouts take here."""

    artifact: Artifact
    cpu: Cpu
    plan: Plan
    """What would run if it were not elastic."""
    elastic: ElasticPlan
    is_opened: bool
    """Whether corewise itself opens the elastic plan here."""
    measured: tuple[Measurement, ...]

    @property
    def name(self) -> str:
        """The artifact's, in the results."""
        return self.artifact.folder.resolve().name.removesuffix(".cw")

    @property
    def payload(self) -> Path:
        """The engine's files."""
        return (self.artifact.folder / PAYLOAD).resolve()

    @property
    def crowd(self) -> int:
        """So many clients that a full call for each instance always waits."""
        return 2 * self.elastic.narrow.instances * self.elastic.narrow.batch

    @property
    def ways(self) -> dict[str, Way]:
        """The three, by ``WAYS``."""
        return {
            name: self._way(plan, name == ELASTIC)
            for name, plan in zip(WAYS, (self.elastic.narrow, self.elastic.wide, self.elastic.narrow), strict=True)
        }

    @property
    def simulated_per_s(self) -> float:
        """Requests per second of the better layout if all its calls are full and take their p50."""
        return max(
            capacity_per_s(way.service, instances=way.plan.instances, max_batch=way.plan.batch)
            for way in (self.ways[name] for name in FIXED)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of it: the plans, the calls, and the curve that a search simulates from them."""
        curve = elasticity(self.plan, self.elastic, self.measured, self.requirements)
        calls = [{"plan": m.plan.label, "p50_ms": m.p50_ms, "p99_ms": m.p99_ms} for m in self.measured]
        return {
            "build": self.artifact.manifest.build.label,
            "elastic": self.elastic.label,
            "layouts": {name: getattr(self.elastic, name).layout_label for name in FIXED},
            "opened": self.is_opened,
            "calls": calls,
            "elasticity": to_json(curve),
        }

    @property
    def requirements(self) -> Requirements:
        """What the artifact was made for."""
        return self.artifact.report.requirements

    def table(self, plan: Plan) -> list[Measurement]:
        """The measurements of a plan's layout, up to its batch."""
        layout = ThreadLayout.of(plan)
        return [m for m in self.measured if ThreadLayout.of(m.plan) == layout and m.plan.batch <= plan.batch]

    def way(self, name: str, batch: int) -> Way:
        """One of ``WAYS`` whose instances take at most so many rows a call."""
        plan = replace(self.elastic.wide if name == "wide" else self.elastic.narrow, batch=batch)
        return self._way(plan, name == ELASTIC)

    def _way(self, plan: Plan, is_elastic: bool) -> Way:
        elastic = replace(self.elastic, narrow=plan) if is_elastic else None
        return Way(
            plan=plan,
            wide=elastic and elastic.wide,
            table=LatencyTable.of(self.table(plan)),
            tables=elastic and tuned.elastic_tables(elastic, self.measured),
            service=exactly(LatencyTable.of(self.table(plan), "p50_ms")),
            wide_service=elastic and exactly(LatencyTable.of(self.table(elastic.wide), "p50_ms")),
        )


def exactly(table: LatencyTable) -> Service:
    """Calls that take just what the table says."""
    return lambda rows, rng: table.latency_ms(rows) / 1e3


def subject_of(folder: Path) -> Subject:
    """Read an artifact, and measure both layouts of the elastic plan that it has here or might have."""
    cpu = inspect_cpu()
    artifact = read(folder, cpu=cpu)
    fit, build = tuned.fit(artifact, cpu), artifact.manifest.build
    elastic = fit.elastic or elastic_plan(fit.plan, tuned.measured(artifact, fit), build.fixed_batch)
    if elastic is None:
        sys.exit(f"{folder} runs {fit.plan.label} here: one thread has no cores to divide")
    wanted = plans_to_measure(elastic, (), FEW_BATCHES if build.fixed_batch is None else (1,))
    say(f"\n{folder}: measuring {elastic.label}")
    measured = []
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as name:
        golden_samples(artifact).save(samples := Path(name) / "golden.safetensors")
        with Worker(cpu=cpu, log=Path(name) / "log", timeout_s=TIMEOUT_S) as worker:
            for layout in (elastic.wide, elastic.narrow):
                worker.open((artifact.folder / PAYLOAD).resolve(), build, layout)
                measured += [
                    worker.measure(samples, plan, MEASURE_S)
                    for plan in wanted
                    if ThreadLayout.of(plan) == ThreadLayout.of(layout)
                ]
    return Subject(
        artifact=artifact,
        cpu=cpu,
        plan=fit.plan,
        elastic=elastic,
        is_opened=fit.elastic is not None,
        measured=tuple(measured),
    )


@contextmanager
def copies(subject: Subject) -> Iterator[dict[str, Path]]:
    """The artifact three times: whoever opens one of ``WAYS`` runs that way."""
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as place:
        folders = {}
        for name, way in subject.ways.items():
            folders[name] = Path(place) / f"{name}.cw"
            shutil.copytree(subject.artifact.folder, folders[name])
            tune(folders[name], subject, way.plan, subject.measured, subject.elastic if name == ELASTIC else None)
        yield folders


def tune(
    folder: Path,
    subject: Subject,
    plan: Plan,
    measured: tuple[Measurement, ...],
    elastic: ElasticPlan | None = None,
) -> None:
    """Have an artifact run a plan on this machine."""
    entry = Tuned(
        machine=Machine.of(subject.cpu),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        goal=subject.requirements.goal.name,
        plan=plan,
        measurements=measured,
        elastic=elastic,
    )
    tuned.write(folder, entry)


def add_artifacts(
    parser: argparse.ArgumentParser, *, rounds: int, seconds: float | None = None, nargs: str = "+"
) -> None:
    """The options of a benchmark that puts loads on artifacts in rounds."""
    parser.add_argument("artifacts", nargs=nargs, type=Path, metavar="ARTIFACT")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"(default: {rounds})")
    if seconds is not None:
        words = f"of each load in each round (default: {seconds:g})"
        parser.add_argument("--seconds", type=float, default=seconds, help=words)
