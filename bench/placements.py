"""How fast our Q/DQ graph is beside the engine's own quantizer's, and with a dynamic batch beside a fixed one.

    python bench/placements.py [--rounds N] [MODEL ...]

For each model three alternating runs, each with fresh processes: every int8 build that OpenVINO and ONNX Runtime are
offered, by our quantizer (in both placements for nets with residual adds, with an attention's products for ONNX
Runtime) and by the engine's own, where the CPU has bf16 also with the rest in bf16; and our graph where the batch is
dynamic (OpenVINO; our payload compiles a fixed one) or fixed (ONNX Runtime; our payload's is dynamic). Same samples,
same batch, all usable cores; each ratio is of two builds with the same rest, with 95 % intervals over the rounds. The
receipts and the machine's facts go to results/placements.json too.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import SUBJECTS, prepare, starter  # noqa: E402

from corewise.common.stats import ratio_interval  # noqa: E402
from corewise.engines import engine, qdq  # noqa: E402
from corewise.engines import onnxruntime as ort  # noqa: E402
from corewise.engines import openvino as ov  # noqa: E402
from corewise.engines.base import Session  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Build, Plan  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.race import Contender, race  # noqa: E402
from corewise.runtime.worker import HOLDOUT  # noqa: E402

DEFAULT = ("resnet50", "mobilenet_v2", "minilm")
BATCH = 16
RESTARTS = 3
"""Processes of one payload differ by some per cent for as long as they live, by how their memory happens to lie."""
REST = ", rest in bf16"
TIMEOUT_S = 1800.0
RESULTS = HERE / "results" / "placements.json"


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


def run(model: str, rounds: int) -> dict[str, Any]:
    """Build the two engines' payloads both ways, and race them."""
    cpu = inspect_cpu()
    with tempfile.TemporaryDirectory(prefix="corewise-placements-") as folder:
        work = Path(folder)
        operators = prepare(work, SUBJECTS[model], cpu).operators
        start = starter(work, TIMEOUT_S)
        plan = Plan(threads_per_instance=cpu.usable_cores, batch=BATCH)
        contenders, receipts = {}, {}
        for name in ("openvino", "onnxruntime"):
            for build in engine(name).candidates(cpu, operators):
                if build.precision != "int8":
                    continue
                tag = tag_of(build)
                payload = work / f"{name}-{tag}"
                payload.mkdir()
                arguments = {"build": to_json(build), "folder": str(payload)}
                with start(build) as worker:
                    worker.call("build", "building", material=str(work), **arguments)
                    answer = worker.call(
                        "receipt", "counting", plan=to_json(plan), samples=str(work / HOLDOUT), **arguments
                    )
                receipts[f"{name} {tag}"] = answer["receipt"]
                contenders[f"{name} {tag}"] = Contender(build=build, plan=plan, payload=payload)
        for name, kind, tag in (
            ("openvino", "DynamicOpenVino", "ours, dynamic batch"),
            ("onnxruntime", "FixedOnnxRuntime", "ours, fixed batch"),
        ):
            one = contenders[f"{name} ours"]
            build = Build(engine=f"placements:{kind}", precision="int8", options=one.build.options)
            contenders[f"{name} {tag}"] = Contender(build=build, plan=plan, payload=one.payload)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(RESTARTS):
            done = race(
                tuple(contenders.values()), samples=str(work / HOLDOUT), start=start, rounds=rounds, round_s=1.0
            )
            for name, one in zip(contenders, done.rates, strict=True):
                rates[name] += one.per_s
    pairs = {
        "openvino: ours dynamic / fixed": ("openvino ours, dynamic batch", "openvino ours"),
        "onnxruntime: ours dynamic / fixed": ("onnxruntime ours", "onnxruntime ours, fixed batch"),
    }
    for name, one in contenders.items():
        if qdq.uses_corewise_quantizer(one.build) and "batch" not in name:
            engine_name = one.build.engine
            own_name = f"{engine_name} own{REST if one.build.quantization.rest == 'bf16' else ''}"
            pairs[f"{engine_name}: {name.removeprefix(engine_name + ' ')} / own"] = (name, own_name)
    ratios = {name: ratio_interval(rates[a], rates[b])._asdict() for name, (a, b) in pairs.items()}
    return {"rates_per_s": to_json(rates), "ratios": ratios, "receipts": receipts, "cpu": to_json(cpu)}


def tag_of(build: Build) -> str:
    """Whose quantizer, and what sets the build apart from the quantizer's others."""
    options = (
        (", everywhere", build.quantization.placement == "everywhere"),
        (", attention", build.quantization.attention),
        (REST, build.quantization.rest == "bf16"),
    )
    return ("ours" if qdq.uses_corewise_quantizer(build) else "own") + "".join(tag for tag, is_set in options if is_set)


def main() -> None:
    """Run the models named on the command line; rows of others in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=8, help="of each run")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.models:
        found[model] = run(model, options.rounds)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{model}, batch {BATCH}")
        for name, per_s in found[model]["rates_per_s"].items():
            print(f"  {name:36s} {median(per_s):8.1f}/s")
        for name, ratio in found[model]["ratios"].items():
            print(f"  {name:36s} {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]", flush=True)


if __name__ == "__main__":
    main()
