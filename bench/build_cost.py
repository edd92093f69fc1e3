"""What our quantizer costs: time and memory of calibrating and of building every placement, over the samples.

    python -m bench build_cost [MODEL ...] [--samples 50,100,200]

One trial process calibrates and builds our int8 for OpenVINO (both placements) and ONNX Runtime. The builds share the
calibration as the trials of ``optimize`` do; each number of samples gets a new process. Writes build_cost.json: the
seconds of each step and the peak memory of the process.
"""

import argparse
import sys
import time
from typing import Any

from bench.harness import add_results, say, starter, temporary_workspace
from bench.subjects import SUBJECTS, add_models, prepare
from corewise.engines import engine, qdq
from corewise.machine.inspect import inspect_cpu

ENGINES = ("openvino", "onnxruntime")


def measure(model: str, count: int) -> dict[str, Any]:
    """The row for ``count`` calibration samples."""
    cpu = inspect_cpu()
    with temporary_workspace() as workspace:
        inputs = prepare(workspace, SUBJECTS[model], cpu)
        if count > len(inputs.calibration):
            sys.exit(f"{model} has {len(inputs.calibration)} samples to calibrate on")
        inputs.calibration.take(range(count)).save(workspace.calibration)
        builds = [
            build
            for name in ENGINES
            for build in engine(name).candidates(cpu, inputs.operators)
            if qdq.uses_corewise_quantizer(build) and build.precision == "int8"
        ]
        seconds = {}
        with starter(workspace, cpu)(builds[0]) as worker:
            for build in builds:
                start_s = time.monotonic()
                worker.build(workspace, build, workspace.empty_payload(build))
                seconds[build.label] = time.monotonic() - start_s
            peak_memory_bytes = worker.peak_memory_bytes
    return {
        "samples": count,
        "seconds": seconds,
        "total_s": sum(seconds.values()),
        "peak_memory_bytes": peak_memory_bytes,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, ("resnet50",))
    parser.add_argument("--samples", default="50,100,200", help="numbers of calibration samples, comma-separated")


def main(options: argparse.Namespace) -> None:
    """Measure the models; the results of others in the file stay."""
    for model in options.models:
        rows = []
        for count in map(int, options.samples.split(",")):
            row = measure(model, count)
            rows.append(row)
            say(f"{model}, {count} samples: {row['total_s']:.1f} s, {row['peak_memory_bytes'] / 2**30:.2f} GiB")
            for label, build_s in row["seconds"].items():
                say(f"  {build_s:6.1f} s  {label}")
        add_results(options.results / "build_cost.json", model, {"rows": rows})
