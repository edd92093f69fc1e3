"""Whether int8 of detectors, segmenters, speech models and the like is kept by the gate, and how near it is to fp32.

    python -m bench tasks [--only yolo_v8 ...] [--engines openvino,onnxruntime] [--append]

Each model of ``bench.task_models`` and ``bench.real_models`` is exported. Int8 is built by each engine's own quantizer
and by the first rung of corewise's, then by all of corewise's, with layers going back to floating point where that is
rejected, until a build passes the gate without a named metric: that would be shipped. Every build is recorded with its
verdict and the SQNR of its worst group of outputs. Timings are left out, because such small models say nothing about
them. Writes tasks.json after each model, and prints a table.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.architectures import Architecture
from bench.breadth import samples
from bench.harness import export_into, machine_facts, read_results, say, temporary_workspace, write_results
from bench.real_models import REAL
from bench.task_models import TASKS
from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import CorewiseError
from corewise.common.references import guard
from corewise.engines import engine, qdq
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Requirements
from corewise.report.reasons import sentence
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples
from corewise.search.candidates import with_reverted_layers

ENGINES = ("openvino", "onnxruntime")
CALIBRATION_SAMPLES = 16
HOLDOUT_SAMPLES = 24
BATCH = 8
MOST_REVERTED = 4
MODELS = {name: (task, model) for task, models in (TASKS | REAL).items() for name, model in models.items()}
REASON = 300


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says of one build; figures are ``None`` where there is nothing to compare."""

    build: str
    passed: bool
    reason: str
    metric: str = ""
    drop: float | None = None
    worst_group: str = ""
    sqnr_db: float | None = None
    """Of the worst group, centred on fp32's mean over samples."""
    below_floor: bool = False
    seconds: float = 0.0


class Judged:
    """One exported model, fp32's outputs, and the gate."""

    def __init__(self, workspace: Workspace, architecture: Architecture, cpu: Cpu) -> None:
        """Raises ``CorewiseError`` with the reason if there is no program."""
        self._workspace = workspace
        self._holdout = samples(architecture, HOLDOUT_SAMPLES, 2)
        with guard(CorewiseError, "building the model"):
            model = architecture.build()
        calibration = samples(architecture, CALIBRATION_SAMPLES, 1)
        self.exported, self.inputs = export_into(workspace, model, calibration, self._holdout, cpu)
        self._gate = AccuracyGate(None, self._holdout, self.exported.output_structure, Requirements(), 0)
        self._gate(self._outputs(Build(engine="eager", precision="fp32")))

    def verdict(self, build: Build) -> Verdict:
        """The build made, run on the holdout and judged, in this process."""
        start_s = time.monotonic()
        try:
            fidelity, verdict = self._gate(self._outputs(build))
        except CorewiseError as error:
            return Verdict(build=build.label, passed=False, reason=str(error)[:REASON])
        worst = fidelity.groups[0]
        return Verdict(
            build=build.label,
            passed=verdict.passed,
            reason=sentence(verdict.reason)[:REASON],
            metric=fidelity.metric,
            drop=fidelity.drop,
            worst_group=worst.name,
            sqnr_db=worst.sqnr_db,
            below_floor=bool(fidelity.below_floor),
            seconds=time.monotonic() - start_s,
        )

    def _outputs(self, build: Build) -> Outputs:
        rows = self.exported.fixed_batch
        build = build if rows is None else build.with_fixed_batch(rows)
        folder = self._workspace.empty_payload(build)
        with guard(CorewiseError, f"{build.label} fails"):
            made = engine(build.engine)
            made.build(self.inputs, build, folder)
            session = made.open(folder, build, Plan(threads_per_instance=1, batch=rows or BATCH))
            try:
                return Outputs(tuple(_in_order(self._holdout, session.run, rows or BATCH)))
            finally:
                session.close()


def _in_order(holdout: Samples, run: Any, batch: int) -> list[np.ndarray]:
    """The outputs of all samples, in the order of the samples."""
    parts = [(rows, run(list(arrays))) for rows, arrays in holdout.batches(batch)]
    order = np.concatenate([rows for rows, _ in parts]).argsort()
    return [np.concatenate(column)[order] for column in zip(*(outputs for _, outputs in parts), strict=True)]


def attempts(judged: Judged, engines: Sequence[str], cpu: Cpu) -> Iterator[Verdict]:
    """Int8 by each engine's quantizer and corewise's, what is made soonest first, until a build passes."""
    offered = [build for name in engines for build in engine(name).candidates(cpu, judged.inputs.operators)]
    int8 = [build for build in offered if build.precision == "int8" and not build.quantization.attention]
    ours = [build for build in int8 if qdq.uses_corewise_quantizer(build)]
    quick = [build if build not in ours else qdq.first_rung(build) for build in int8]
    for build in (*quick, *ours):
        verdict = judged.verdict(build)
        yield verdict
        count = 1
        while build in ours and not verdict.passed and count <= MOST_REVERTED:
            verdict = judged.verdict(with_reverted_layers(build, count))
            yield verdict
            count *= 2
        if verdict.passed:
            return


def measure(name: str, engines: Sequence[str], cpu: Cpu) -> dict[str, Any]:
    """One model's record."""
    task, architecture = MODELS[name]
    start_s = time.monotonic()
    record: dict[str, Any] = {"model": name, "task": task, "isa": list(cpu.isa), "exported": False, "reason": ""}
    record["fixed_batch"] = None
    tried: list[Verdict] = []
    with temporary_workspace() as workspace:
        try:
            judged = Judged(workspace, architecture, cpu)
            record |= {"exported": True, "fixed_batch": judged.exported.fixed_batch}
            for verdict in attempts(judged, engines, cpu):
                tried.append(verdict)
                say(f"  {name:12s} {words(asdict(verdict))}")
        except CorewiseError as error:
            record["reason"] = str(error)[:REASON]
    shipped = next((verdict for verdict in tried if verdict.passed), None)
    return record | {
        "shipped": asdict(shipped) if shipped else None,
        "tried": [asdict(verdict) for verdict in tried],
        "wall_s": time.monotonic() - start_s,
    }


def words(verdict: dict[str, Any]) -> str:
    """One build: its verdict and its worst group."""
    worst = "" if verdict["sqnr_db"] is None else f"{verdict['sqnr_db']:.1f} dB in {verdict['worst_group']}"
    passed = "passes" if verdict["passed"] else "rejected"
    why = "" if worst else verdict["reason"]
    return f"{passed:8s} {verdict['build']}  {worst}{why}"[:200]


def table(records: Sequence[dict[str, Any]]) -> str:
    """All models, and the counts."""
    lines = []
    for record in records:
        shipped = record["shipped"]
        why = record["reason"] or f"{len(record['tried'])} rejected"
        result = words(shipped) if shipped else f"no int8: {why}"
        lines.append(f"{record['task']:16s} {record['model']:12s} {result}")
    return "\n".join([*lines, "", *counts(records)])


def counts(records: Sequence[dict[str, Any]]) -> list[str]:
    """How many are exported, have int8 that would be shipped, and are below a floor then."""
    shipped = [record["shipped"] for record in records if record["shipped"]]
    refused = [verdict for record in records for verdict in record["tried"] if not verdict["passed"]]
    return [
        f"exported: {sum(record['exported'] for record in records)} of {len(records)}",
        f"int8 that passes the gate: {len(shipped)}",
        f"shipped below a floor: {sum(verdict['below_floor'] for verdict in shipped)}",
        f"builds refused: {len(refused)}",
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="NAME", default=list(MODELS))
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--append", action="store_true", help="keep what tasks.json has of other models")


def main(options: argparse.Namespace) -> None:
    """Judge the models."""
    cpu, facts = inspect_cpu(), machine_facts()
    path: Path = options.results / "tasks.json"
    known = {record["model"]: record for record in read_results(path).get("models", [])} if options.append else {}
    for name in options.only:
        known[name] = measure(name, options.engines.split(","), cpu)
        records = [known[model] for model in MODELS if model in known]
        result = {
            **facts,
            "calibration_samples": CALIBRATION_SAMPLES,
            "holdout_samples": HOLDOUT_SAMPLES,
            "counts": counts(records),
            "models": records,
        }
        write_results(path, result)
    say(f"\n{table(records)}")
