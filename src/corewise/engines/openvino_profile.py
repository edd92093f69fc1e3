"""The time of each layer, by OpenVINO's own profile."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corewise.engines.libraries import import_openvino
from corewise.engines.openvino_session import explained, reshape_batch, runtime_info

FEWEST_RUNS, MOST_RUNS = 7, 40
PROFILED_S = 3.0
QUARTILE = 25


def layer_ms(model: Path, layers: Iterable[str], inputs: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Milliseconds that each of the ``layers`` takes for the batch ``inputs``, the lower quartile of several runs.

    ``model`` is an ONNX file that ``onnx_export.export_onnx`` wrote, ``layers`` are names of its program's nodes. A
    layer's time includes what OpenVINO fused into its kernel (bias, activation, an add, quantization of its output). A
    layer that is not in the runtime model is left out, for example a depthwise convolution that runs in the kernel of
    the layer before it. The quartile is used because on a busy machine even most runs may wait for a thread at the same
    layer. From ``InferRequest.profiling_info`` (https://docs.openvino.ai: "Optimization with performance counters").
    Raises ``EngineError`` if OpenVINO cannot run the file.
    """
    import onnx

    ov = import_openvino()
    # OpenVINO names operations as ONNX names nodes; the exporter gives the names of the program's nodes to values.
    outputs = {node.name: node.output[0] for node in onnx.load(model, load_external_data=False).graph.node}
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    with explained(f"run {model.name}"):
        read = core.read_model(str(model))
        reshape_batch(read, len(inputs[0]))
        compiled = core.compile_model(read, "CPU", config)
        runs = _profiled(compiled.create_infer_request(), inputs)
    return _by_layer(compiled.get_runtime_model(), set(layers), outputs, runs)


def _profiled(request: Any, inputs: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Milliseconds of each run by the operation's name."""
    totals: dict[str, float] = {}
    runs: dict[str, list[float]] = {}
    start = time.perf_counter()
    for run in range(1, MOST_RUNS + 1):
        request.infer(list(inputs))
        # The CPU plugin reports the mean of all runs so far, in whole microseconds (2026.4).
        for operation in request.profiling_info:
            total = run * operation.real_time.total_seconds() * 1e3
            runs.setdefault(operation.node_name, []).append(total - totals.get(operation.node_name, 0.0))
            totals[operation.node_name] = total
        if run >= FEWEST_RUNS and time.perf_counter() - start > PROFILED_S:
            break
    return runs


def _by_layer(
    runtime: Any, layers: set[str], outputs: Mapping[str, str], runs: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """The time of each layer from that of the operations that were made of it; layers in one operation share it."""
    milliseconds: dict[str, float] = {}
    for op in runtime.get_ordered_ops():
        # An operation that OpenVINO made of a layer has the layer's name, or adds to its path.
        names = {name.partition("/")[0] for name in runtime_info(op, "originalLayersNames").split(",")}
        made_of = layers & (names | {outputs.get(name, "") for name in names})
        for layer in made_of:
            spent = runs.get(op.get_friendly_name(), [0.0])
            quartile = float(np.percentile(spent[1:] or spent, QUARTILE))
            milliseconds[layer] = milliseconds.get(layer, 0.0) + quartile / len(made_of)
    return milliseconds
