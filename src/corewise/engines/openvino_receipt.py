"""Which layers OpenVINO runs in int8: read from its runtime model, or from oneDNN's log of the kernels it makes."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines.openvino_session import MODEL, OpenVinoSession, runtime_info
from corewise.records.build import Build, Plan, Receipt
from corewise.records.jsonable import from_json, to_json

MADE_LINEAR = re.compile(
    r"primitive,create:\w+,cpu,inner_product,(?P<kernel>[^,\n]+),.*?wei:(?P<weights>\w+)(?P<about>.*)"
    r",(?P<shape>[^,\n]+),[^,\n]+$",
    re.MULTILINE,
)
ROUNDED = r"src_dyn_quant_group_size:[1-9]"
INT8 = ("i8", "u8")
RUN_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""Layers by the names of the CPU plugin; its ``MatMul`` takes what ``FullyConnected`` does not."""
LAYERS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
    "MatMul",
)
PASS_ON = ("Convert", "Gather", "MaxPool", "Multiply", "Reshape", "Squeeze", "Subtract", "Transpose", "Unsqueeze")
"""What stands between a layer and the int8 values it reads: dequantization, and what only moves values."""


def runtime_receipt(model: Any, runtime: Any) -> Receipt:
    """Count the layers of the runtime model.

    The runtime information of an operation names its kind and its kernel. A kernel's name ends with the precision of
    its activations (``jit_avx2_I8``, ``brgemm_avx2_f32``). ``runtimePrecision`` does not say it: it is int8 also if
    only the weights are and an fp32 kernel unpacks them. With AVX-512 the two products and the softmax of an attention
    are one kernel, whose name says nothing about the products: they are not counted there.
    """
    quantized = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in LAYERS and _reads_int8(op)]
    ran: list[tuple[str, bool]] = []
    fell_back: list[str] = []
    for op in runtime.get_ordered_ops():
        kind, kernel, names = (runtime_info(op, key) for key in ("layerType", "primitiveType", "originalLayersNames"))
        if kind not in RUN_LAYERS:
            continue
        suffix = kernel.rpartition("_")[2]
        precision = "u8" if suffix == "I8" else suffix
        int8 = precision in INT8
        weights = op.input_value(1).get_node()
        lost = [] if int8 else list(_made_into(quantized, names.split(",")))
        if not int8 and not lost and runtime_info(weights, "runtimePrecision") in INT8:
            lost = [op.get_friendly_name()]
        fell_back += lost
        if int8 or lost or kind != "MatMul" or runtime_info(weights, "layerType") == "Const":
            ran.append((f"{kind}/{precision}", int8))
    return Receipt.tally(ran, fell_back)


def logged_receipt(folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
    """Count the linears of one run by the kernels that oneDNN logs as it makes them; ``None`` if it logs none.

    A kernel that multiplies int8 (VNNI, AMX) and names the group by which it rounds activations does so. Any other
    kernel unpacks the weights or gets them unpacked. The log of kernels as they run would be more direct, but it makes
    2026.4 stop now and then at "could not execute a primitive" (https://github.com/openvinotoolkit/oneDNN/pull/323).
    """
    with TemporaryDirectory() as name:
        arrays = Path(name) / "inputs.npz"
        np.savez(arrays, *inputs)
        code = f"import sys; from {__name__} import run_once; run_once(*sys.argv[1:])"
        described = [json.dumps(to_json(build)), json.dumps(to_json(plan))]
        # oneDNN reads the variable when it is loaded.
        command = [
            *("env", "ONEDNN_VERBOSE=profile_create", sys.executable, "-c", code),
            *(str(folder), str(arrays), *described),
        ]
        child = subprocess.run(command, check=False, capture_output=True, text=True)
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise EngineError(f"the process that logs OpenVINO's kernels ended with {child.returncode}: {last}")
    ran: list[tuple[str, bool]] = []
    fell_back: list[str] = []
    for line in MADE_LINEAR.finditer(child.stdout):
        compressed = line["weights"] in ("u8", "s8")
        int8 = compressed and bool(re.search("vnni|amx", line["kernel"]) and re.search(ROUNDED, line["about"]))
        ran.append((f"inner_product/{line['kernel']}", int8))
        if not int8:
            fell_back.append(f"a linear of {line['shape']}")
    return Receipt.tally(ran, fell_back) if ran else None


def run_once(folder: str, inputs: str, build: str, plan: str) -> None:
    """Run the arrays of an ``.npz`` file on a payload, each layer by a kernel of its own; build and plan are JSON."""
    session = OpenVinoSession(
        Path(folder) / MODEL,
        from_json(Build, json.loads(build)),
        from_json(Plan, json.loads(plan)),
        # With a cache, layers of one shape share a kernel, which is made and logged once.
        {"CPU_RUNTIME_CACHE_CAPACITY": 0},
    )
    with np.load(inputs) as arrays:
        session.run([arrays[name] for name in arrays.files])
    session.close()


def _reads_int8(op: Any) -> bool:
    """Whether both operands of a layer come from int8 values."""
    return all(_is_int8(op.input_value(index).get_node()) for index in (0, 1))


def _is_int8(op: Any) -> bool:
    """Whether an operation's values, apart from a scale and their order, are int8."""
    while op.get_type_name() in PASS_ON:
        op = op.input_value(0).get_node()
    return op.get_type_name() == "FakeQuantize" or op.get_output_element_type(0).get_type_name() in INT8


def _made_into(layers: list[str], names: list[str]) -> Iterator[str]:
    """Those layers from which the operations ``names`` were made: OpenVINO keeps a layer's name or adds to its path."""
    for layer in layers:
        if any(name == layer or name.startswith(f"{layer}/") for name in names):
            yield layer
