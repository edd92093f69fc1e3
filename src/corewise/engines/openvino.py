"""OpenVINO: fp32, bf16, int8 by our quantizer or by NNCF's, and int8 weights with activations rounded as they come."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines import denormals, qdq
from corewise.engines.base import BuildInputs, Session, chunks, is_mostly_linear, missing, run_cut
from corewise.engines.quiet import quiet
from corewise.machine.inspect import inspect
from corewise.machine.layouts import limited_by_quota
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json

MODEL = "model.xml"
PLACEMENT = "placement"
"""The option that says where our quantizer puts Q/DQ pairs: ``everywhere``; ``fused`` without it."""
REST = "rest"
"""The option that says in which precision an int8 build runs what is not int8."""
DYNAMIC = -1
GROUP = 128
"""int8-dynamic rounds each row's activations as they come, so many columns by one scale: at 32 columns MiniLM's outputs
came a little nearer to fp32's (cosine 0.9985, not 0.9973), and it ran at 0.83 of the speed (Zen 4). Layers of fewer
columns stay in floating point."""
MADE_LINEAR = re.compile(
    r"primitive,create:\w+,cpu,inner_product,(?P<kernel>[^,\n]+),.*?wei:(?P<weights>\w+)(?P<about>.*)"
    r",(?P<shape>[^,\n]+),[^,\n]+$",
    re.MULTILINE,
)
ROUNDED = r"src_dyn_quant_group_size:[1-9]"
ATTENTION = "scaled_dot_product|softmax"
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
FEWEST_RUNS, MOST_RUNS = 7, 40
PROFILED_S = 3.0


class OpenVino:
    """OpenVINO's CPU plugin.

    The payload is OpenVINO's IR (``model.xml``, ``model.bin``) with a dynamic batch; opening it needs no torch.
    With the option ``quantizer=corewise`` int8 comes from ``corewise.quantize``, else from NNCF. int8-dynamic has int8
    weights, needs no calibration, and rounds activations as they come (https://docs.openvino.ai: "Dynamic
    quantization").
    The option ``reduce_range`` quantizes weights to 7 bits, for CPUs that add int8 products in 16 bits (NNCF's
    overflow fix, https://docs.openvino.ai: "Quantizing models post-training", ``OverflowFix``).
    """

    def unavailable(self, opening: bool = False) -> str:
        """Needs openvino and, to quantize, nncf."""
        return missing(("openvino",) if opening else ("openvino", "nncf"), "openvino")

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """int8 by our quantizer and by NNCF, fp32; where the CPU has bf16 also that, and int8 with the rest in it.

        The rest in bf16 is what OpenVINO takes by itself there, and worth it: 1.1 and 1.2 times the speed of NNCF's
        int8 and of int8-dynamic on ViT-S (Zen 4). int8-dynamic is for linear layers, where the CPU multiplies int8:
        else OpenVINO only unpacks the weights.

        For nets with residual adds also our other placement: without AVX-512 OpenVINO adds an operand within a
        convolution's kernel only where both are int8 (ResNet-50, Zen 3: its 16 adds alone took 8 % of the time), and
        with it that placement is faster too (ResNet-50 1.16 times, MobileNetV2 1.05; Zen 4).
        """
        options = () if cpu.int8_dot else (("reduce_range", True),)
        int8 = Build(engine="openvino", precision="int8", options=options)
        bf16 = Build(engine="openvino", precision="bf16")
        fp32 = Build(engine="openvino", precision="fp32")
        ours = qdq.int8("openvino", cpu)
        everywhere = ours.with_option(PLACEMENT, "everywhere")
        residual = any("conv" in name for name in operators) and "aten.add.Tensor" in operators
        quantized = (ours, everywhere, int8) if residual else (ours, int8)
        dynamic = Build(engine="openvino", precision="int8-dynamic")
        dynamics = (dynamic,) if cpu.int8_dot and is_mostly_linear(operators) else ()
        if not cpu.bf16:
            return (*quantized, *dynamics, fp32)
        mixed = (one.with_option(REST, "bf16") for one in (ours, int8, *dynamics))
        return (*mixed, *quantized, bf16, fp32)

    def needs(self, build: Build) -> tuple[str, ...]:
        """bf16 hardware for bf16, 32-bit sums of int8 products for int8 in full range."""
        full_range = build.precision.startswith("int8") and not build.option("reduce_range", False)
        return (*(("int8_dot",) if full_range else ()), *(("bf16",) if _in_bf16(build) else ()))

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Convert the program and, for int8, quantize it with the calibration samples.

        Raises ``EngineError`` where nothing can be quantized.
        """
        import openvino as ov

        from corewise.source import load_program

        if qdq.uses_corewise_quantizer(build):
            everywhere = build.option(PLACEMENT, "fused") == "everywhere"
            exported, notes = qdq.onnx_model(material, build, "everywhere" if everywhere else "fused")
            with quiet():
                ov.save_model(ov.convert_model(exported), str(folder / MODEL), compress_to_fp16=False)
            return notes
        if build.precision == "int8":
            shutil.copytree(_nncf(material, bool(build.option("reduce_range", False))), folder, dirs_exist_ok=True)
            return ()
        with quiet():
            model = ov.convert_model(load_program(material.program))
            if build.precision == "int8-dynamic":
                import nncf

                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            ov.save_model(model, str(folder / MODEL), compress_to_fp16=False)
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the IR, compiled for the plan's batch, with a stream for each instance.

        Raises ``EngineError`` where OpenVINO makes fewer streams: it has no more than cores.
        """
        return OpenVinoSession(folder / MODEL, build, plan)

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """From the runtime model: what was compiled for the plan's batch, after all fusions, with its precisions.

        Of int8-dynamic, of which that tells nothing, from oneDNN's log of one run.
        """
        if build.precision == "int8-dynamic":
            return _logged(folder, build, plan, inputs)
        if build.precision != "int8":
            return None
        session = OpenVinoSession(folder / MODEL, build, plan)
        try:
            session.run(inputs)
            return _receipt(*session.models(len(inputs[0])))
        finally:
            session.close()


class OpenVinoSession:
    """An IR compiled for batches of 1, 2, 4, ... and the plan's, each when it is first needed.

    With a dynamic batch int8 ResNet-50 ran at 23 images/s where a static one ran at 37 (Zen 3, 2026.4). Where other
    dimensions are dynamic a static batch gained nothing (MiniLM), and one compiled model takes all.
    """

    def __init__(self, model: Path, build: Build, plan: Plan, config: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._shared = _Compiled(model, build, plan, config)
        self._sizes = self._shared.sizes
        self._requests: dict[int, Any] = {}
        self._for_batch(plan.batch)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run a batch of any size, cut and padded to compiled ones."""
        rows = len(inputs[0])
        return run_cut(self._call, inputs, chunks(rows, self._sizes or [rows]))

    def _call(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        request = self._for_batch(len(inputs[0]))
        # OpenVINO takes what it had before for an input that is missing.
        if len(inputs) != len(request.model_inputs):
            raise ValueError(f"{len(inputs)} inputs instead of {len(request.model_inputs)}")
        found = request.infer(inputs, share_inputs=True, share_outputs=False)
        return [found[index] for index in range(len(request.model_outputs))]

    def _for_batch(self, rows: int) -> Any:
        size = rows if self._sizes else DYNAMIC
        if size not in self._requests:
            self._requests[size] = self._shared.compiled(size).create_infer_request()
        return self._requests[size]

    def another(self) -> "OpenVinoSession":
        """Requests of its own to the same compiled models, which run as many of them at once as they have streams."""
        other = copy.copy(self)
        other._requests = {}
        return other

    def models(self, rows: int) -> tuple[Any, Any]:
        """The model as it was read, and the runtime model that takes ``rows`` rows."""
        return self._shared.model, self._for_batch(rows).get_compiled_model().get_runtime_model()

    def close(self) -> None:
        """Drop the requests, and the compiled models unless other instances use them."""
        self._requests.clear()
        self.__dict__.pop("_shared", None)


class _Compiled:
    """The compiled models of one IR, by their batch; several threads may ask for one.

    Threads: OpenVINO pins each stream to cores of its own, unless a quota says how much time there is and not where.
    Denormals: as the opening thread has it.
    """

    def __init__(self, model: Path, build: Build, plan: Plan, config: Mapping[str, Any]) -> None:
        import openvino as ov

        self._core: Any = ov.Core()
        self.model: Any = self._core.read_model(str(model))
        with _on_all_cpus():
            cpu = inspect()
        threads = plan.threads_per_instance * plan.instances
        self._instances = plan.instances
        self._config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": plan.instances,
            "INFERENCE_PRECISION_HINT": "bf16" if _in_bf16(build) else "f32",
            "ENABLE_CPU_PINNING": not limited_by_quota(cpu),
            "ENABLE_HYPER_THREADING": threads > cpu.usable_cores,
            "CPU_DENORMALS_OPTIMIZATION": denormals.flushed(),
            **config,
        }
        if build.precision == "int8-dynamic":
            self._config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
        free = any(dim.is_dynamic for port in self.model.inputs for dim in list(port.get_partial_shape())[1:])
        self.sizes = [] if free else [*(2**k for k in range((plan.batch - 1).bit_length())), plan.batch]
        self._models: dict[int, Any] = {}
        self._lock = threading.Lock()

    def compiled(self, size: int) -> Any:
        """The model for batches of ``size``, or ``DYNAMIC``. Raises ``EngineError`` where streams are missing."""
        with self._lock, _on_all_cpus():
            if size not in self._models:
                model = self.model.clone()
                _reshape_batch(model, size)
                self._models[size] = self._core.compile_model(model, "CPU", self._config)
                streams = self._models[size].get_property("NUM_STREAMS")
                if streams != self._instances:
                    raise EngineError(
                        f"OpenVINO has {streams} streams here, not one for each of {self._instances} instances",
                        f"use at most {streams} instances",
                    )
            return self._models[size]


@contextmanager
def _on_all_cpus() -> Iterator[None]:
    """Run on the hardware threads of the main thread.

    OpenVINO takes the affinity of the thread that first compiles for that of the process, for as long as that lives.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def layer_ms(model: Path, layers: Iterable[str], inputs: Sequence[np.ndarray], threads: int) -> dict[str, float]:
    """Milliseconds that each of the ``layers`` takes for the batch ``inputs``, the lower quartile of several runs.

    ``model`` is an ONNX file that ``qdq.export_onnx`` wrote, ``layers`` are names of its program's nodes. A layer's
    time holds what OpenVINO fused into its kernel (bias, activation, an add, quantization of its output); a layer that
    cannot be found in the runtime model is left out, as a depthwise convolution that runs in the kernel of the one
    before it. The quartile, because on a busy machine even most runs may wait
    for a thread at the same layer. From ``InferRequest.profiling_info``
    (https://docs.openvino.ai: "Optimization with performance counters"). Raises ``EngineError`` where OpenVINO cannot
    run the file.
    """
    import onnx
    import openvino as ov

    # OpenVINO knows operations by ONNX's names of nodes; the exporter gives the names of the program's to values.
    outputs = {node.name: node.output[0] for node in onnx.load(model, load_external_data=False).graph.node}
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    core = ov.Core()
    try:
        read = core.read_model(str(model))
        _reshape_batch(read, len(inputs[0]))
        compiled = core.compile_model(read, "CPU", config)
        request: Any = compiled.create_infer_request()
        totals: dict[str, float] = {}
        runs: dict[str, list[float]] = {}
        start = time.perf_counter()
        for run in range(1, MOST_RUNS + 1):
            request.infer(list(inputs))
            # What the CPU plugin tells is the mean of all runs so far, in whole microseconds (2026.4).
            for one in request.profiling_info:
                total = run * one.real_time.total_seconds() * 1e3
                runs.setdefault(one.node_name, []).append(total - totals.get(one.node_name, 0.0))
                totals[one.node_name] = total
            if run >= FEWEST_RUNS and time.perf_counter() - start > PROFILED_S:
                break
    except RuntimeError as error:
        raise EngineError(f"OpenVINO cannot run {model.name}: {error}") from error
    found: dict[str, float] = {}
    wanted = set(layers)
    for op in compiled.get_runtime_model().get_ordered_ops():
        # An operation that OpenVINO made of a layer has the layer's name, or adds to its path.
        names = {name.partition("/")[0] for name in _about(op, "originalLayersNames").split(",")}
        made_of = wanted & (names | {outputs.get(name, "") for name in names})
        for layer in made_of:
            spent = runs.get(op.get_friendly_name(), [0.0])
            quartile = float(np.percentile(spent[1:] or spent, 25))
            found[layer] = found.get(layer, 0.0) + quartile / len(made_of)
    return found


def _in_bf16(build: Build) -> bool:
    """Whether what is not int8 runs in bf16."""
    return build.precision == "bf16" or build.option(REST, "") == "bf16"


def _nncf(material: BuildInputs, reduce_range: bool) -> Path:
    """The folder of NNCF's int8 in the cache, made by whichever build comes first."""
    import openvino as ov

    from corewise.source import load_program

    folder = material.cache / ("nncf-7-bits" if reduce_range else "nncf")
    if not folder.exists():
        # What is ended half-way leaves nothing that looks whole.
        with TemporaryDirectory(dir=material.cache) as name, quiet():
            model = _quantized(ov.convert_model(load_program(material.program)), material, reduce_range)
            made = Path(name) / folder.name
            made.mkdir()
            ov.save_model(model, str(made / MODEL), compress_to_fp16=False)
            made.rename(folder)
    return folder


def _quantized(model: Any, material: BuildInputs, reduce_range: bool) -> Any:
    """The model with NNCF's FakeQuantize operations.

    Quantized with a batch of one, then with a dynamic one again: with a dynamic batch NNCF leaves depthwise
    convolutions in fp32.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    _reshape_batch(model, 1)
    dataset = nncf.Dataset(material.calibration.rows, lambda row: [array[None] for array in row])
    model = nncf.quantize(
        model,
        dataset,
        subset_size=len(material.calibration),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if material.count(ATTENTION) else None,
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.ENABLE if reduce_range else OverflowFix.DISABLE
        ),
    )
    _reshape_batch(model, DYNAMIC)
    return model


def _reshape_batch(model: Any, size: int) -> None:
    """Set dimension 0 of every input."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        shape[0] = size
        shapes[port] = shape
    model.reshape(shapes)


def _receipt(model: Any, runtime: Any) -> Receipt:
    """Count the layers of the runtime model.

    Its operations tell by their runtime information what they are and which kernel they got. A kernel's name ends
    with the precision of its activations (``jit_avx2_I8``, ``brgemm_avx2_f32``); ``runtimePrecision`` does not tell,
    for it is int8 also where only the weights are and an fp32 kernel unpacks them. With AVX-512 an attention's two
    products and its softmax are one kernel, which does not tell of the products: they are not counted there.
    """
    quantized = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() in LAYERS and _reads_int8(op)]
    ran, fell_back = [], []
    for op in runtime.get_ordered_ops():
        kind, kernel, names = (_about(op, key) for key in ("layerType", "primitiveType", "originalLayersNames"))
        if kind not in RUN_LAYERS:
            continue
        suffix = kernel.rpartition("_")[2]
        precision = "u8" if suffix == "I8" else suffix
        int8 = precision in INT8
        weights = op.input_value(1).get_node()
        lost = [] if int8 else list(_among(quantized, names.split(",")))
        if not int8 and not lost and _about(weights, "runtimePrecision") in INT8:
            lost = [op.get_friendly_name()]
        fell_back += lost
        if int8 or lost or kind != "MatMul" or _about(weights, "layerType") == "Const":
            ran.append((f"{kind}/{precision}", int8))
    return Receipt.tally(ran, fell_back)


def _logged(folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
    """Count the linears of one run by the kernels that oneDNN logs as it makes them; ``None`` where it logs none.

    A kernel that multiplies int8 (VNNI, AMX) and says by what group it rounds activations does so; any other one
    unpacks the weights. The log of the kernels as they run would be nearer, but with it 2026.4 stops now and then at
    "could not execute a primitive" (https://github.com/openvinotoolkit/oneDNN/pull/323).
    """
    with TemporaryDirectory() as name:
        given = Path(name) / "inputs.npz"
        np.savez(given, *inputs)
        code = f"import sys; from {__name__} import run_once; run_once(*sys.argv[1:])"
        about = [json.dumps(to_json(one)) for one in (build, plan)]
        # oneDNN reads the variable when it is loaded.
        command = ["env", "ONEDNN_VERBOSE=profile_create", sys.executable, "-c", code, str(folder), str(given), *about]
        child = subprocess.run(command, check=False, capture_output=True, text=True)
    if child.returncode:
        last = child.stderr.strip().rpartition("\n")[2]
        raise EngineError(f"the process that logs OpenVINO's kernels ended with {child.returncode}: {last}")
    ran, fell_back = [], []
    for line in MADE_LINEAR.finditer(child.stdout):
        compressed = line["weights"] in ("u8", "s8")
        int8 = compressed and bool(re.search("vnni|amx", line["kernel"]) and re.search(ROUNDED, line["about"]))
        ran.append((f"inner_product/{line['kernel']}", int8))
        if compressed and not int8:
            fell_back.append(f"a linear of {line['shape']}")
    return Receipt.tally(ran, fell_back) if ran else None


def run_once(folder: str, inputs: str, build: str, plan: str) -> None:
    """Run the arrays of an ``.npz`` file on a payload, each layer by a kernel of its own; build and plan are JSON."""
    session = OpenVinoSession(
        Path(folder) / MODEL,
        from_json(Build, json.loads(build)),
        from_json(Plan, json.loads(plan)),
        # Else layers of one shape share a kernel, which is made and logged once.
        {"CPU_RUNTIME_CACHE_CAPACITY": 0},
    )
    with np.load(inputs) as arrays:
        session.run([arrays[name] for name in arrays.files])
    session.close()


def _reads_int8(op: Any) -> bool:
    """Whether both operands of a layer come from int8 values."""
    return all(_is_int8(op.input_value(index).get_node()) for index in (0, 1))


def _is_int8(op: Any) -> bool:
    """Whether an operation's values, but for a scale and their order, are int8."""
    while op.get_type_name() in PASS_ON:
        op = op.input_value(0).get_node()
    return op.get_type_name() == "FakeQuantize" or op.get_output_element_type(0).get_type_name() in INT8


def _among(layers: list[str], names: list[str]) -> Iterator[str]:
    """Those layers from which the operations ``names`` were made: OpenVINO keeps a layer's name or adds to its path."""
    for layer in layers:
        if any(name == layer or name.startswith(f"{layer}/") for name in names):
            yield layer


def _about(op: Any, key: str) -> str:
    """What an operation of a runtime model tells of itself under ``key``."""
    return str(op.get_rt_info()[key].astype(str))
