"""How many architectures get an int8 build, on which engines, how accurate and how fast.

    python -m bench breadth [--only resnet18 ...] [--engines openvino,onnxruntime] [--quantizer corewise|engine]

Each architecture of ``bench.architectures`` is exported. Each engine builds int8 and the same engine's fp32 (for
torch-int8: eager's) in trial processes; the int8 outputs are compared with eager fp32 on samples that calibration did
not see, and both are timed in alternating rounds. What cannot be done has a reason in words. Writes breadth.json after
each architecture, and prints a table.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from bench.architectures import ARCHITECTURES, Architecture
from bench.harness import alternate, export_into, machine_facts, say, starter, temporary_workspace, write_results
from corewise.accuracy.closeness import energies
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import CorewiseError
from corewise.common.references import guard
from corewise.engines import engine, qdq
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.client import Worker, read_outputs
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples, from_python

ENGINES = ("openvino", "onnxruntime", "inductor", "torch-int8")
CALIBRATION_SAMPLES = 16
HOLDOUT_SAMPLES = 8
BATCH = 4
ROUNDS = 5
ROUND_S = 0.2
WARM_S = 0.5
TIMEOUT_S = 240.0
FLOOR_DB = 10.0
"""A build with a lower centred SQNR does not count as working: its outputs are another model's."""
REASON = 500


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One architecture on one engine; fields are ``None`` if a step before them failed."""

    engine: str
    build: dict[str, Any]
    reason: str = ""
    """Why there is no working int8 build; empty if there is one."""
    built: bool = False
    build_s: float | None = None
    peak_memory_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    receipt: dict[str, Any] | None = None
    """The kernels that ran, by precision."""
    int8_share: float | None = None
    sqnr_db: float | None = None
    """Over all outputs of the holdout, against eager fp32."""
    centred_sqnr_db: float | None = None
    """The same less fp32's mean over samples: the outputs of random nets are much alike for all inputs."""
    int8_per_s: float | None = None
    fp32_per_s: float | None = None
    speedup: float | None = None
    """int8 over the same engine's fp32, medians of alternating rounds."""
    fp32_reason: str = ""
    """Why the engine's fp32 could not be timed."""

    @property
    def works(self) -> bool:
        """Whether this is an int8 build that can be used."""
        return self.built and not self.reason


def samples(architecture: Architecture, count: int, seed: int) -> Samples:
    """Samples without labels."""
    arrays = architecture.inputs(count, seed)
    # A pair would be taken for (inputs, label).
    return from_python([(tuple(array[i] for array in arrays), None) for i in range(count)], source="noise")


def prepare(architecture: Architecture, cpu: Cpu, workspace: Workspace) -> tuple[Outputs, dict[str, int]]:
    """Export the model and write what its builds need; returns eager's fp32 outputs and the program's operators.

    Raises ``CorewiseError`` with the reason if there is no program.
    """
    import torch

    torch.set_num_threads(cpu.usable_cores)
    calibration = samples(architecture, CALIBRATION_SAMPLES, 1)
    holdout = samples(architecture, HOLDOUT_SAMPLES, 2)
    with guard(CorewiseError, "building the model"):
        model = architecture.build()
    exported, inputs = export_into(workspace, model, calibration, holdout, cpu)
    _, arrays = next(holdout.batches(len(holdout)))
    with torch.no_grad(), guard(CorewiseError, "running the model"):
        expected = exported.module(*map(torch.from_numpy, arrays))
    return Outputs(tuple(tensor.numpy() for tensor in expected)), inputs.operators


def int8_build(name: str, cpu: Cpu, quantizer: str) -> Build:
    """The int8 build to try; torch-int8 has only a quantizer of its own."""
    if quantizer == "corewise" and name != "torch-int8":
        return qdq.int8(name, cpu)
    return Build(engine=name, precision="int8", options=() if cpu.int8_dot else (("reduce_range", True),))


def fp32_build(name: str) -> Build:
    """What the int8 build is timed against."""
    return Build(engine="eager" if name == "torch-int8" else name, precision="fp32")


class Trials:
    """One architecture's workspace and the trial processes that work in it."""

    def __init__(self, workspace: Workspace, cpu: Cpu) -> None:
        self._workspace = workspace
        self.start = starter(workspace, cpu, TIMEOUT_S)
        self._plan = Plan(threads_per_instance=cpu.usable_cores, batch=BATCH)

    def build(self, worker: Worker, build: Build) -> list[str]:
        """Build; returns the engine's notes."""
        payload = self._workspace.payload(build)
        if payload.is_dir() and any(payload.iterdir()):  # eager's fp32 is timed for more than one engine
            return []
        return list(worker.build(self._workspace, build, self._workspace.empty_payload(build)).notes)

    def receipt(self, worker: Worker, build: Build) -> Receipt | None:
        """What the payload runs in int8."""
        return worker.observe_int8(self._workspace.payload(build), build, self._plan, self._workspace.holdout)

    def open(self, worker: Worker, build: Build) -> None:
        """Open the payload for batches of ``BATCH``."""
        worker.open(self._workspace.payload(build), build, self._plan)

    def outputs(self, worker: Worker, build: Build) -> Outputs:
        """The open payload's outputs for the holdout."""
        path = self._workspace.outputs(build)
        worker.run_samples(self._workspace.holdout, BATCH, path)
        return read_outputs(path)

    def race(self, **workers: Worker) -> dict[str, float]:
        """Items per second of each process's open payload: medians of alternating rounds."""
        for worker in workers.values():
            worker.warm_up(self._workspace.holdout, BATCH, WARM_S)

        def round_of(worker: Worker) -> float:
            return worker.run_round(ROUND_S).per_s

        rates = alternate(ROUNDS, {name: partial(round_of, worker) for name, worker in workers.items()})
        return {name: median(per_s) for name, per_s in rates.items()}


def sqnr_db(expected: Outputs, outputs: Outputs, *, centred: bool) -> float:
    """10 log10(signal power / error power); at most 200. Raises ``CorewiseError`` for other shapes or no numbers."""
    signal = error = 0.0
    for ours, theirs in zip(expected.leaves, outputs.leaves, strict=True):
        if ours.shape != theirs.shape:
            raise CorewiseError(f"the outputs have shape {theirs.shape} instead of {ours.shape}")
        if not np.isfinite(theirs).all():
            raise CorewiseError("the outputs have NaN or infinity")
        mean = ours.mean(0, keepdims=True) if centred else np.float32(0)
        sums = energies([ours - mean], [theirs - mean])
        signal, error = signal + float(sums.signal.sum()), error + float(sums.error.sum())
    return min(200.0, 10 * float(np.log10(signal / error))) if error and signal else 200.0


def offers(name: str, build: Build, cpu: Cpu, operators: dict[str, int]) -> bool:
    """Whether the engine knows the build's quantizer."""
    candidates = engine(name).candidates(cpu, operators)
    return not qdq.uses_corewise_quantizer(build) or any(map(qdq.uses_corewise_quantizer, candidates))


def attempt(
    name: str, expected: Outputs, operators: dict[str, int], trials: Trials, cpu: Cpu, quantizer: str
) -> Outcome:
    """Build, check and time int8 on one engine."""
    build = int8_build(name, cpu, quantizer)
    outcome = Outcome(engine=name, build=to_json(build))
    try:
        if why := engine(name).unavailable():
            return replace(outcome, reason=f"the engine is unavailable: {why}")
        if not offers(name, build, cpu, operators):
            # An engine ignores options that it does not know: it would be measured with its own quantizer.
            return replace(outcome, reason="the engine does not offer corewise's quantizer among its candidates")
        with ExitStack() as children:
            worker = children.enter_context(trials.start(build))
            start_s = time.monotonic()
            notes = trials.build(worker, build)
            outcome = replace(
                outcome,
                built=True,
                notes=notes,
                build_s=time.monotonic() - start_s,
                peak_memory_bytes=worker.peak_memory_bytes,
            )
            trials.open(worker, build)
            outputs = trials.outputs(worker, build)
            outcome = replace(
                outcome,
                sqnr_db=sqnr_db(expected, outputs, centred=False),
                centred_sqnr_db=sqnr_db(expected, outputs, centred=True),
            )
            outcome = with_receipt(outcome, trials, build)
            outcome = timed(outcome, worker, trials)
    except CorewiseError as error:
        return replace(outcome, reason=str(error)[:REASON])
    if outcome.int8_share == 0:
        return replace(outcome, reason="not one layer ran in int8")
    if outcome.centred_sqnr_db is not None and outcome.centred_sqnr_db < FLOOR_DB:
        return replace(outcome, reason=f"inaccurate: {outcome.centred_sqnr_db:.1f} dB centred, below {FLOOR_DB:g} dB")
    return outcome


def with_receipt(outcome: Outcome, trials: Trials, build: Build) -> Outcome:
    """The outcome with what ran in int8, observed in a process of its own: if that fails, nothing else is lost."""
    try:
        with trials.start(build) as worker:
            receipt = trials.receipt(worker, build)
    except CorewiseError as error:
        return replace(outcome, notes=[*outcome.notes, f"no receipt: {error}"[:REASON]])
    if receipt is None:
        return replace(outcome, notes=[*outcome.notes, "no receipt: the engine cannot say what ran in int8"])
    share = receipt.int8 / receipt.layers if receipt.layers else None
    return replace(outcome, receipt=to_json(receipt), int8_share=share)


def timed(outcome: Outcome, worker: Worker, trials: Trials) -> Outcome:
    """The outcome with the speed of int8 and of the engine's fp32."""
    baseline = fp32_build(outcome.engine)
    try:
        with trials.start(baseline) as other:
            trials.build(other, baseline)
            trials.open(other, baseline)
            rates = trials.race(int8=worker, fp32=other)
    except CorewiseError as error:
        int8_per_s = trials.race(int8=worker)["int8"]
        return replace(outcome, int8_per_s=int8_per_s, fp32_reason=str(error)[:REASON])
    int8_per_s, fp32_per_s = rates["int8"], rates["fp32"]
    return replace(outcome, int8_per_s=int8_per_s, fp32_per_s=fp32_per_s, speedup=int8_per_s / fp32_per_s)


def measure(name: str, engines: Sequence[str], cpu: Cpu, quantizer: str) -> dict[str, Any]:
    """One architecture on all engines."""
    architecture = ARCHITECTURES[name]
    start_s = time.monotonic()
    record: dict[str, Any] = {"architecture": name, "kind": architecture.kind, "exported": False, "engines": {}}
    with temporary_workspace() as workspace:
        try:
            expected, operators = prepare(architecture, cpu, workspace)
        except CorewiseError as error:
            return record | {"reason": str(error)[:REASON], "wall_s": time.monotonic() - start_s}
        record |= {"exported": True, "reason": "", "operators": operators, "export_s": time.monotonic() - start_s}
        trials = Trials(workspace, cpu)
        for engine_name in engines:
            outcome = attempt(engine_name, expected, operators, trials, cpu, quantizer)
            record["engines"][engine_name] = asdict(outcome) | {"works": outcome.works}
            say(f"  {name:16s} {words(record['engines'][engine_name])}")
    return record | {"wall_s": time.monotonic() - start_s}


def words(outcome: dict[str, Any]) -> str:
    """One line: engine, verdict and figures, the reason if it does not work."""

    def figure(key: str, form: str) -> str:
        return form.format(outcome[key]) if outcome[key] is not None else "-"

    figures = (
        f"{outcome['engine']:12s} {'int8' if outcome['works'] else '-':4s} "
        f"{figure('int8_share', '{:.0%}'):>5s} {figure('sqnr_db', '{:.1f}'):>6s} "
        f"{figure('centred_sqnr_db', '{:.1f}'):>6s} {figure('int8_per_s', '{:.4g}'):>8s} "
        f"{figure('fp32_per_s', '{:.4g}'):>8s} {figure('speedup', '{:.2f}'):>6s} {figure('build_s', '{:.1f}'):>6s}"
    )
    return f"{figures}  {outcome['reason'] or outcome['fp32_reason']}".rstrip()[:240]


def table(records: list[dict[str, Any]]) -> str:
    """All results and the counts."""
    head = f"{'':16s} {'engine':12s} {'':4s} {'share':>5s} {'dB':>6s} {'centr.':>6s} {'int8/s':>8s} {'fp32/s':>8s}"
    lines = [f"{head} {'speed':>6s} {'build':>6s}"]
    for record in records:
        lines += [f"{record['architecture']:16s} {words(outcome)}" for outcome in record["engines"].values()]
        if not record["exported"]:
            lines.append(f"{record['architecture']:16s} not exported: {record['reason']}")
    return "\n".join([*lines, "", *counts(records)])


def counts(records: list[dict[str, Any]]) -> list[str]:
    """How many architectures work on one engine, and whether every CNN does on all that were asked for."""
    outcomes = {record["architecture"]: list(record["engines"].values()) for record in records}
    working = sum(any(outcome["works"] for outcome in made) for made in outcomes.values())
    ran = sum(any(outcome["sqnr_db"] is not None for outcome in made) for made in outcomes.values())
    lines = [
        f"int8 on at least one engine: {working} of {len(records)} (at least {FLOOR_DB:g} dB centred)",
        f"built and ran on at least one engine, whatever its accuracy: {ran} of {len(records)}",
    ]
    missing = [
        f"{record['architecture']} on {outcome['engine']}"
        for record in records
        if record["kind"] == "cnn"
        for outcome in record["engines"].values()
        if not outcome["works"]
    ]
    missing += [record["architecture"] for record in records if record["kind"] == "cnn" and not record["exported"]]
    cnns = sum(record["kind"] == "cnn" for record in records)
    return [*lines, f"every CNN ({cnns}) on all engines: {'no: ' + ', '.join(missing) if missing else 'yes'}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME", default=list(ARCHITECTURES))
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--quantizer", choices=("corewise", "engine"), default="corewise")


def main(options: argparse.Namespace) -> None:
    """Measure the architectures."""
    cpu, facts = inspect_cpu(), machine_facts()
    records: list[dict[str, Any]] = []
    start_s = time.monotonic()
    for name in options.only:
        records.append(measure(name, options.engines.split(","), cpu, options.quantizer))
        result = {
            **facts,
            "quantizer": options.quantizer,
            "calibration_samples": CALIBRATION_SAMPLES,
            "holdout_samples": HOLDOUT_SAMPLES,
            "batch": BATCH,
            "floor_db": FLOOR_DB,
            "wall_s": time.monotonic() - start_s,
            "counts": counts(records),
            "architectures": records,
        }
        write_results(options.results / "breadth.json", result)
    say(f"\n{table(records)}\n{time.monotonic() - start_s:.0f} s")
