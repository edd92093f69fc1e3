"""How fast our Q/DQ graph is beside the engine's own quantizer's, and with a dynamic batch beside a fixed one.

    python -m bench placements [MODEL ...] [--rounds N]

Each model gets three alternating runs with new processes. The contenders are all int8 builds that OpenVINO and ONNX
Runtime offer: by our quantizer (in both placements for nets with residual adds, with int8 attention for ONNX Runtime)
and by the engine's own, also with the rest in bf16 if the CPU has it; and our graph with a dynamic batch (OpenVINO,
whose payload compiles a fixed one) or a fixed batch (ONNX Runtime, whose payload is dynamic). All run the same samples
at the same batch on all usable cores. Each ratio compares two builds with the same rest, with 95 % intervals over the
rounds. Writes placements.json, with the receipts.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import add_results, ratio_data, ratio_words, say, starter, temporary_workspace
from bench.subjects import SUBJECTS, add_models, prepare
from corewise.common.stats import ratio_interval
from corewise.engines import engine, qdq
from corewise.engines import onnxruntime as ort
from corewise.engines import openvino as ov
from corewise.engines.base import Session
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.race import Contender, run_race
from corewise.runtime.workspace import Workspace

BATCH = 16
RESTARTS = 3
"""Processes of one payload differ by some percent for as long as they live, by where their memory happens to lie."""
REST = ", rest in bf16"
TIMEOUT_S = 1800.0
DYNAMIC, FIXED = "ours, dynamic batch", "ours, fixed batch"


class DynamicOpenVino(ov.OpenVino):
    """Our payload, compiled once for any batch."""

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        class Dynamic(ov.OpenVinoSession):
            def _for_batch(self, rows: int) -> Any:
                self._sizes = []
                return super()._for_batch(rows)

        return Dynamic(folder / ov.MODEL, build, plan)


class FixedOnnxRuntime(ort.OnnxRuntime):
    """Our payload with the batch of the plan written into it."""

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        import onnx

        model = onnx.load(folder / ort.MODEL)
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = plan.batch
        fixed = folder / "fixed.onnx"
        onnx.save(model, fixed)
        return ort.OnnxRuntimeSession(fixed, plan.threads_per_instance)


def build_contenders(
    workspace: Workspace, operators: dict[str, int], cpu: Cpu
) -> tuple[dict[str, Contender], dict[str, Any]]:
    """All int8 builds by their names here, and the receipt of each."""
    start = starter(workspace, cpu, TIMEOUT_S)
    plan = Plan(threads_per_instance=cpu.usable_cores, batch=BATCH)
    contenders, receipts = {}, {}
    for engine_name in ("openvino", "onnxruntime"):
        for build in engine(engine_name).candidates(cpu, operators):
            if build.precision != "int8":
                continue
            name, payload = f"{engine_name} {tag_of(build)}", workspace.empty_payload(build)
            with start(build) as worker:
                worker.build(workspace, build, payload)
                receipts[name] = to_json(worker.observe_int8(payload, build, plan, workspace.holdout))
            contenders[name] = Contender(build=build, plan=plan, payload=payload)
    for engine_name, variant, tag in (
        ("openvino", DynamicOpenVino, DYNAMIC),
        ("onnxruntime", FixedOnnxRuntime, FIXED),
    ):
        ours = contenders[f"{engine_name} ours"]
        build = Build(engine=f"{variant.__module__}:{variant.__name__}", precision="int8", options=ours.build.options)
        contenders[f"{engine_name} {tag}"] = Contender(build=build, plan=plan, payload=ours.payload)
    return contenders, receipts


def tag_of(build: Build) -> str:
    """Whose quantizer, and what sets the build apart from the quantizer's others."""
    options = (
        (", everywhere", build.quantization.placement == "everywhere"),
        (", attention", build.quantization.attention),
        (REST, build.quantization.rest == "bf16"),
    )
    return ("ours" if qdq.uses_corewise_quantizer(build) else "own") + "".join(tag for tag, is_set in options if is_set)


def pairs_of(contenders: dict[str, Contender]) -> dict[str, tuple[str, str]]:
    """Which contenders are compared, by the name of the ratio."""
    pairs = {
        "openvino: ours dynamic / fixed": (f"openvino {DYNAMIC}", "openvino ours"),
        "onnxruntime: ours dynamic / fixed": ("onnxruntime ours", f"onnxruntime {FIXED}"),
    }
    for name, contender in contenders.items():
        if qdq.uses_corewise_quantizer(contender.build) and "batch" not in name:
            engine_name = contender.build.engine
            own_name = f"{engine_name} own{REST if contender.build.quantization.rest == 'bf16' else ''}"
            pairs[f"{engine_name}: {name.removeprefix(engine_name + ' ')} / own"] = (name, own_name)
    return pairs


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Build the payloads of both engines, and race them."""
    cpu = inspect_cpu()
    with temporary_workspace() as workspace:
        operators = prepare(workspace, SUBJECTS[model], cpu).operators
        contenders, receipts = build_contenders(workspace, operators, cpu)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(RESTARTS):
            race = run_race(
                tuple(contenders.values()),
                samples=workspace.holdout,
                start=starter(workspace, cpu, TIMEOUT_S),
                rounds=rounds,
                round_s=1.0,
            )
            for per_s, contender_rates in zip(rates.values(), race.rates, strict=True):
                per_s += contender_rates.per_s
    ratios = {
        name: ratio_data(ratio_interval(rates[ours], rates[theirs]))
        for name, (ours, theirs) in pairs_of(contenders).items()
    }
    return {"rates_per_s": rates, "ratios": ratios, "receipts": receipts}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, ("resnet50", "mobilenet_v2", "minilm"))
    parser.add_argument("--rounds", type=int, default=8, help="of each run")


def main(options: argparse.Namespace) -> None:
    """Measure the models; the results of others in the file stay."""
    for model in options.models:
        record = measure(model, options.rounds)
        add_results(options.results / "placements.json", model, record)
        say(f"\n{model}, batch {BATCH}")
        for name, per_s in record["rates_per_s"].items():
            say(f"  {name:36s} {median(per_s):8.1f}/s")
        for name, ratio in record["ratios"].items():
            say(f"  {name:36s} {ratio_words(ratio)}")
