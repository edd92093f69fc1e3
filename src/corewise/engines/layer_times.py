"""What int8 saves in each layer, measured by OpenVINO's profile of the same layers in fp32 and in int8."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines.base import missing
from corewise.engines.onnx_export import export_onnx
from corewise.engines.openvino_profile import layer_ms
from corewise.records.build import TensorSpec
from corewise.samples import Samples

if TYPE_CHECKING:
    from corewise.quantize.quantized import Quantized
    from corewise.quantize.sensitivity import LayerSensitivity

TIMED_BATCH = 16
PACKAGES = ("openvino", "torch", "torchao", "onnx", "onnxscript")


def timed(
    quantized: "Quantized",
    layers: "tuple[LayerSensitivity, ...]",
    inputs: tuple[TensorSpec, ...],
    samples: Samples,
    threads: int,
) -> "tuple[tuple[LayerSensitivity, ...], str]":
    """The layers with the milliseconds that int8 saves in each, and in words how they were measured or why not.

    By OpenVINO's profile for a batch of 16, the same layers in fp32 and in int8. ``layers`` come back unchanged if
    OpenVINO is not installed or cannot run the program.
    """
    if why := missing(PACKAGES, "optimize,openvino"):
        return layers, f"not measured: {why}"
    from corewise.quantize.quantized import batches, lower
    from corewise.quantize.sensitivity import floating, nodes_by_layer, saving

    # torch.export takes a batch of one as a constant.
    example = next(iter(batches(samples.take([0, 0]))))
    _, rows = next(samples.batches(TIMED_BATCH))
    batch = [np.resize(array, (TIMED_BATCH, *array.shape[1:])) for array in rows]
    times = []
    try:
        with TemporaryDirectory() as folder:
            for program in (floating(quantized, inputs, example), lower(quantized, "fused", inputs, example)):
                path = Path(folder) / "model.onnx"
                export_onnx(program, path)
                names = nodes_by_layer(quantized, program)
                milliseconds: dict[str, float] = {}
                for node, spent in layer_ms(path, names, batch, threads).items():
                    milliseconds[names[node]] = milliseconds.get(names[node], 0.0) + spent
                times.append(milliseconds)
    except (EngineError, RuntimeError) as error:  # torch's ONNX exporter raises the latter
        return layers, f"not measured: {' '.join(str(error).split())[:200]}"
    if not all(times):
        return layers, "not measured: the layers were not found in OpenVINO's profile"
    how = f"OpenVINO's profile of fp32 less that of int8, a batch of {TIMED_BATCH}, {threads} threads"
    return saving(layers, *times), how
