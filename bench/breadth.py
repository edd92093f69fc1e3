"""How many architectures get an int8 build, on which engines, how accurate and how fast.

    python bench/breadth.py [--only resnet18 ...] [--engines openvino,onnxruntime] [--quantizer corewise|engine]

For each architecture of ``architectures.py``: export it; then for each engine build int8 and the same engine's fp32
(for torch-int8: eager's) in trial children, compare the int8 outputs with eager fp32 on samples that calibration never
saw, and time both in alternating rounds. Whatever cannot be done has a reason in words. Writes
bench/results/breadth.json after each architecture, and prints a table.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from architectures import ARCHITECTURES, Architecture  # noqa: E402

from corewise import source  # noqa: E402
from corewise.accuracy.closeness import energies  # noqa: E402
from corewise.accuracy.fidelity import Outputs  # noqa: E402
from corewise.common.errors import CorewiseError  # noqa: E402
from corewise.common.references import guard  # noqa: E402
from corewise.engines import BuildInputs, engine  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Build, Plan  # noqa: E402
from corewise.records.cpu import Cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.client import Worker, read_outputs  # noqa: E402
from corewise.runtime.worker import CALIBRATION, HOLDOUT, PROGRAM, write_build_inputs  # noqa: E402
from corewise.samples import Samples, from_python  # noqa: E402

ENGINES = ("openvino", "onnxruntime", "inductor", "torch-int8")
PACKAGES = ("torch", "torchao", "openvino", "nncf", "onnxruntime", "onnx", "transformers", "numpy")
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
    """What became of one architecture on one engine; fields are ``None`` where it got not so far."""

    engine: str
    build: dict[str, Any]
    reason: str = ""
    """Why there is no working int8 build; empty where there is one."""
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
    """The same with the signal less fp32's mean over samples: what random nets answer is much alike for all inputs."""
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


def prepare(architecture: Architecture, cpu: Cpu, folder: Path) -> tuple[Outputs, dict[str, int]]:
    """Export the model and write what its builds need; returns eager's fp32 outputs and the program's operators.

    Raises ``CorewiseError`` with the reason where there is no program.
    """
    import torch

    torch.set_num_threads(cpu.usable_cores)
    calibration = samples(architecture, CALIBRATION_SAMPLES, 1)
    holdout = samples(architecture, HOLDOUT_SAMPLES, 2)
    with guard(CorewiseError, "building the model"):
        model = architecture.build()
    exported = source.export(model, calibration)
    if exported.program is None:
        raise CorewiseError(exported.why_not)
    operators = source.operators(exported.program)
    source.save_program(exported.program, folder / PROGRAM)
    calibration.save(folder / CALIBRATION)
    holdout.save(folder / HOLDOUT)
    material = BuildInputs(
        program=folder / PROGRAM,
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators,
        calibration=calibration,
        cpu=cpu,
        cache=folder / "cache",
    )
    write_build_inputs(folder, material)
    _, arrays = next(holdout.batches(len(holdout)))
    with torch.no_grad(), guard(CorewiseError, "running the model"):
        expected = exported.module(*map(torch.from_numpy, arrays))
    return Outputs(tuple(tensor.numpy() for tensor in expected)), operators


def int8_build(name: str, cpu: Cpu, quantizer: str) -> Build:
    """The int8 build to try; torch-int8 has a quantizer of its own only."""
    options = []
    if quantizer == "corewise" and name != "torch-int8":
        options.append(("quantizer", "corewise"))
    if not cpu.int8_dot:
        options.append(("reduce_range", True))
    return Build(engine=name, precision="int8", options=tuple(options))


def fp32_build(name: str) -> Build:
    """What the int8 build is timed against."""
    return Build(engine="eager" if name == "torch-int8" else name, precision="fp32")


class Bench:
    """One architecture's folder and the children that work in it."""

    def __init__(self, folder: Path, cpu: Cpu) -> None:
        self._folder = folder
        self._cpu = cpu
        self._plan = Plan(threads_per_instance=cpu.usable_cores, batch=BATCH)

    def start(self, build: Build) -> Worker:
        """A child for the build."""
        log = self._folder / f"{self._name(build)}.log"
        return Worker(cpu=self._cpu, log=log, timeout_s=TIMEOUT_S)

    def build(self, worker: Worker, build: Build) -> list[str]:
        """Build; returns the engine's notes."""
        payload = self._folder / self._name(build)
        payload.mkdir(exist_ok=True)
        if any(payload.iterdir()):  # fp32 of eager, say, is timed for more than one engine
            return []
        arguments = {"material": str(self._folder), "build": to_json(build), "folder": str(payload)}
        return list(worker.call("build", "building", **arguments)["notes"])

    def receipt(self, worker: Worker, build: Build) -> dict[str, Any]:
        """The kernels that the payload ran, by precision."""
        arguments = {"folder": str(self._folder / self._name(build)), "samples": str(self._folder / HOLDOUT)}
        answer = worker.call("receipt", "counting kernels", build=to_json(build), plan=to_json(self._plan), **arguments)
        return dict(answer["receipt"])

    def open(self, worker: Worker, build: Build) -> None:
        """Open the payload for batches of ``BATCH``."""
        payload = str(self._folder / self._name(build))
        worker.call("open", "opening", folder=payload, build=to_json(build), plan=to_json(self._plan))

    def outputs(self, worker: Worker) -> Outputs:
        """The open payload's outputs for the holdout."""
        path = self._folder / "outputs.safetensors"
        worker.call("outputs", "running", samples=str(self._folder / HOLDOUT), batch=BATCH, path=str(path))
        return read_outputs(path)

    def race(self, workers: tuple[Worker, ...]) -> list[float]:
        """Items per second of each child's open payload: medians of alternating rounds."""
        for worker in workers:
            holdout = str(self._folder / HOLDOUT)
            worker.call("enter_race", "warming up", samples=holdout, batch=BATCH, budget_s=WARM_S)
        rounds = [
            [worker.call("round", "timing", budget_s=ROUND_S)["per_s"] for worker in workers] for _ in range(ROUNDS)
        ]
        return [median(per_s) for per_s in zip(*rounds, strict=True)]

    @staticmethod
    def _name(build: Build) -> str:
        return build.label.replace("/", "_")


def sqnr_db(expected: Outputs, found: Outputs, *, centred: bool) -> float:
    """10 log10(signal power / error power); at most 200. Raises ``CorewiseError`` for other shapes or no numbers."""
    signal = error = 0.0
    for ours, theirs in zip(expected.leaves, found.leaves, strict=True):
        if ours.shape != theirs.shape:
            raise CorewiseError(f"the outputs have shape {theirs.shape} instead of {ours.shape}")
        if not np.isfinite(theirs).all():
            raise CorewiseError("the outputs have NaN or infinity")
        mean = ours.mean(0, keepdims=True) if centred else np.float32(0)
        sums = energies([ours - mean], [theirs - mean])
        signal, error = signal + float(sums.signal.sum()), error + float(sums.error.sum())
    return min(200.0, 10 * float(np.log10(signal / error))) if error and signal else 200.0


def share(receipt: dict[str, Any]) -> float | None:
    """The share of convolutions and matrix products that ran in int8, if the receipt tells."""
    return receipt["int8"] / receipt["layers"] if receipt["layers"] else None


def offers(name: str, build: Build, cpu: Cpu, operators: dict[str, int]) -> bool:
    """Whether the engine knows the build's quantizer."""
    wanted = build.quantization.quantizer
    known = [one.quantization.quantizer for one in engine(name).candidates(cpu, operators)]
    return wanted == "engine" or wanted in known


def attempt(name: str, expected: Outputs, operators: dict[str, int], bench: Bench, cpu: Cpu, quantizer: str) -> Outcome:
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
            worker = children.enter_context(bench.start(build))
            start = time.monotonic()
            notes = bench.build(worker, build)
            outcome = replace(
                outcome,
                built=True,
                notes=notes,
                build_s=time.monotonic() - start,
                peak_memory_bytes=worker.peak_memory_bytes,
            )
            bench.open(worker, build)
            found = bench.outputs(worker)
            outcome = replace(
                outcome,
                sqnr_db=sqnr_db(expected, found, centred=False),
                centred_sqnr_db=sqnr_db(expected, found, centred=True),
            )
            outcome = with_receipt(outcome, bench, build)
            outcome = timed(outcome, worker, bench)
    except CorewiseError as error:
        return replace(outcome, reason=str(error)[:REASON])
    if outcome.int8_share == 0:
        return replace(outcome, reason="not one layer ran in int8")
    if outcome.centred_sqnr_db is not None and outcome.centred_sqnr_db < FLOOR_DB:
        return replace(outcome, reason=f"inaccurate: {outcome.centred_sqnr_db:.1f} dB centred, below {FLOOR_DB:g} dB")
    return outcome


def with_receipt(outcome: Outcome, bench: Bench, build: Build) -> Outcome:
    """The outcome with the kernels that ran, counted in a child of its own: a count that fails costs nothing else."""
    try:
        with bench.start(build) as worker:
            receipt = bench.receipt(worker, build)
    except CorewiseError as error:
        return replace(outcome, notes=[*outcome.notes, f"no receipt: {error}"[:REASON]])
    return replace(outcome, receipt=receipt, int8_share=share(receipt))


def timed(outcome: Outcome, worker: Worker, bench: Bench) -> Outcome:
    """The outcome with the speed of int8 and of the engine's fp32."""
    baseline = fp32_build(outcome.engine)
    try:
        with bench.start(baseline) as other:
            bench.build(other, baseline)
            bench.open(other, baseline)
            int8, fp32 = bench.race((worker, other))
    except CorewiseError as error:
        (int8,) = bench.race((worker,))
        return replace(outcome, int8_per_s=int8, fp32_reason=str(error)[:REASON])
    return replace(outcome, int8_per_s=int8, fp32_per_s=fp32, speedup=int8 / fp32)


def run(name: str, engines: tuple[str, ...], cpu: Cpu, quantizer: str) -> dict[str, Any]:
    """One architecture on all engines."""
    architecture = ARCHITECTURES[name]
    start = time.monotonic()
    record: dict[str, Any] = {"architecture": name, "kind": architecture.kind, "exported": False, "engines": {}}
    with tempfile.TemporaryDirectory(prefix="corewise-breadth-") as folder:
        try:
            expected, operators = prepare(architecture, cpu, Path(folder))
        except CorewiseError as error:
            return record | {"reason": str(error)[:REASON], "wall_s": time.monotonic() - start}
        record |= {"exported": True, "reason": "", "operators": operators, "export_s": time.monotonic() - start}
        bench = Bench(Path(folder), cpu)
        for engine_name in engines:
            outcome = attempt(engine_name, expected, operators, bench, cpu, quantizer)
            record["engines"][engine_name] = asdict(outcome) | {"works": outcome.works}
            print(f"  {name:16s} {told(record['engines'][engine_name])}", flush=True)
    return record | {"wall_s": time.monotonic() - start}


def told(outcome: dict[str, Any]) -> str:
    """One line: engine, verdict and figures, the reason where it does not work."""

    def figure(key: str, form: str) -> str:
        return form.format(outcome[key]) if outcome[key] is not None else "-"

    told = (
        f"{outcome['engine']:12s} {'int8' if outcome['works'] else '-':4s} "
        f"{figure('int8_share', '{:.0%}'):>5s} {figure('sqnr_db', '{:.1f}'):>6s} "
        f"{figure('centred_sqnr_db', '{:.1f}'):>6s} {figure('int8_per_s', '{:.4g}'):>8s} "
        f"{figure('fp32_per_s', '{:.4g}'):>8s} {figure('speedup', '{:.2f}'):>6s} {figure('build_s', '{:.1f}'):>6s}"
    )
    return f"{told}  {outcome['reason'] or outcome['fp32_reason']}".rstrip()[:240]


def table(records: list[dict[str, Any]]) -> str:
    """All results and the counts."""
    head = f"{'':16s} {'engine':12s} {'':4s} {'share':>5s} {'dB':>6s} {'centr.':>6s} {'int8/s':>8s} {'fp32/s':>8s}"
    lines = [f"{head} {'speed':>6s} {'build':>6s}"]
    for record in records:
        lines += [f"{record['architecture']:16s} {told(outcome)}" for outcome in record["engines"].values()]
        if not record["exported"]:
            lines.append(f"{record['architecture']:16s} not exported: {record['reason']}")
    return "\n".join([*lines, "", *counts(records)])


def counts(records: list[dict[str, Any]]) -> list[str]:
    """How many architectures work on one engine, and whether every CNN does on all that were asked for."""
    somewhere = [r["architecture"] for r in records if any(o["works"] for o in r["engines"].values())]
    ran = [r["architecture"] for r in records if any(o["sqnr_db"] is not None for o in r["engines"].values())]
    lines = [
        f"int8 on at least one engine: {len(somewhere)} of {len(records)} (at least {FLOOR_DB:g} dB centred)",
        f"built and ran on at least one engine, whatever its accuracy: {len(ran)} of {len(records)}",
    ]
    missing = [
        f"{record['architecture']} on {outcome['engine']}"
        for record in records
        if record["kind"] == "cnn"
        for outcome in record["engines"].values()
        if not outcome["works"]
    ]
    missing += [r["architecture"] for r in records if r["kind"] == "cnn" and not r["exported"]]
    cnns = sum(record["kind"] == "cnn" for record in records)
    return [*lines, f"every CNN ({cnns}) on all engines: {'no: ' + ', '.join(missing) if missing else 'yes'}"]


def main() -> None:
    """Run the architectures named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME", default=list(ARCHITECTURES))
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--quantizer", choices=("corewise", "engine"), default="corewise")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "breadth.json")
    options = parser.parse_args()
    cpu = inspect_cpu()
    records: list[dict[str, Any]] = []
    start = time.monotonic()
    for name in options.only:
        records.append(run(name, tuple(options.engines.split(",")), cpu, options.quantizer))
        result = {
            "cpu": to_json(cpu),
            "versions": {package: version(package) for package in PACKAGES},
            "quantizer": options.quantizer,
            "calibration_samples": CALIBRATION_SAMPLES,
            "holdout_samples": HOLDOUT_SAMPLES,
            "batch": BATCH,
            "floor_db": FLOOR_DB,
            "wall_s": time.monotonic() - start,
            "counts": counts(records),
            "architectures": records,
        }
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(records)}\n{time.monotonic() - start:.0f} s, written to {options.output}")


if __name__ == "__main__":
    main()
