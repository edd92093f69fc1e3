"""What our quantizer costs: time and memory of calibrating and of building every placement, over the samples.

    python bench/build_cost.py [MODEL ...] [--samples 50,100,200]

One child calibrates and builds our int8 for OpenVINO (both placements) and ONNX Runtime, sharing the calibration as
the trials of ``optimize`` do; a fresh child for each number of samples. Writes bench/results/build_cost.json: seconds
of each step and the most memory that child had resident.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import SUBJECTS, prepare, starter  # noqa: E402

from corewise.engines import engine, qdq  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.worker import CALIBRATION  # noqa: E402

ENGINES = ("openvino", "onnxruntime")
RESULTS = HERE / "results" / "build_cost.json"


def run(model: str, counts: list[int]) -> list[dict[str, Any]]:
    """A row for each number of calibration samples."""
    cpu = inspect_cpu()
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="corewise-cost-") as name:
            work = Path(name)
            material = prepare(work, SUBJECTS[model], cpu)
            if count > len(material.calibration):
                sys.exit(f"{model} has {len(material.calibration)} samples to calibrate on")
            material.calibration.take(range(count)).save(work / CALIBRATION)
            builds = [
                build
                for name in ENGINES
                for build in engine(name).candidates(cpu, material.operators)
                if qdq.uses_corewise_quantizer(build) and build.precision == "int8"
            ]
            seconds = {}
            with starter(work)(builds[0]) as worker:
                for build in builds:
                    payload = work / build.label.replace("/", "_")
                    payload.mkdir()
                    started_s = time.monotonic()
                    worker.call("build", "building", material=str(work), build=to_json(build), folder=str(payload))
                    seconds[build.label] = time.monotonic() - started_s
                peak = worker.peak_memory_bytes
        rows.append({"samples": count, "seconds": seconds, "total_s": sum(seconds.values()), "peak_memory_bytes": peak})
        print(f"{model}, {count} samples: {rows[-1]['total_s']:.1f} s, {peak / 2**30:.2f} GiB", flush=True)
        for label, spent_s in seconds.items():
            print(f"  {spent_s:6.1f} s  {label}", flush=True)
    return rows


def main() -> None:
    """Run the models named on the command line; rows of others in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"], help=", ".join(SUBJECTS))
    parser.add_argument("--samples", default="50,100,200")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.models:
        counts = [int(part) for part in options.samples.split(",")]
        found[model] = {"cpu": to_json(inspect_cpu()), "rows": run(model, counts)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
