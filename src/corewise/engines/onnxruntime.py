"""ONNX Runtime: fp32, int8 by our quantizer or its own static one (QDQ), and its dynamic int8."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from corewise.common.errors import EngineError
from corewise.common.references import guard
from corewise.engines import denormals, qdq
from corewise.engines.base import MIXED_ROWS, BuildInputs, PixelScale, Session, is_mostly_linear, missing
from corewise.engines.libraries import import_onnxruntime, import_onnxruntime_quantization, quiet
from corewise.engines.onnx_export import export_onnx
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.samples import Samples

MODEL = "model.onnx"
PIXELS = "pixels.onnx"
"""The model for pixels, if the payload takes them."""
PROTOBUF_LIMIT_BYTES = 2**31 - 1
ERRORS_ONLY = 3
INT8_KERNEL = r"QLinearConv|ConvInteger|QLinearMatMul|QGemm|DynamicQuantizeMatMul|MatMulInteger(ToFloat)?|QAttention"
FLOAT_KERNEL = r"(Nhwc)?(Fused)?Conv(Transpose)?|(Fused|Transpose)?MatMul|(Fused)?Gemm|Attention"
DEQUANTIZE = "DequantizeLinear"
MOVES = ("Cast", "Identity", "Reshape", "Transpose")


class OnnxRuntime:
    """ONNX Runtime's CPU provider.

    The payload is one ``model.onnx`` with a dynamic batch; opening it needs no torch. int8 has u8 activations and
    s8 weights per channel between Q/DQ pairs; int8-dynamic quantizes only matrix products, activations as they
    come. The option ``attention`` quantizes products of two activations too. ``reduce_range`` quantizes weights to 7
    bits, for CPUs that add int8 products in 16 bits
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """

    MIXING = ("int8-dynamic",)
    """ONNX Runtime's dynamic quantization has one scale for all rows (DynamicQuantizeLinear). Its MatMulNBits with 8
    bits rounds each row by itself, but MiniLM then ran slower than in fp32 (Zen 3, 1.32)."""

    def unavailable(self, opening: bool = False) -> str:
        """Needs onnxruntime and, to build, onnx and onnxscript."""
        return missing(("onnxruntime",) if opening else ("onnxruntime", "onnx", "onnxscript"), "onnxruntime")

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """int8 by our quantizer, attention in int8 too or not, and by its own; int8-dynamic for linear layers; fp32."""
        options = () if cpu.int8_dot else (("reduce_range", True),)
        int8 = Build(engine="onnxruntime", precision="int8", options=options)
        dynamic = Build(engine="onnxruntime", precision="int8-dynamic", options=options)
        fp32 = Build(engine="onnxruntime", precision="fp32")
        ours = (qdq.int8("onnxruntime", cpu), *qdq.int8_attention("onnxruntime", cpu, operators))
        return (*ours, int8, *((dynamic,) if is_mostly_linear(operators) else ()), fp32)

    def needs(self, build: Build) -> tuple[str, ...]:
        """32-bit sums of int8 products for int8 in full range."""
        return () if build.precision == "fp32" or build.quantization.reduce_range else ("int8_dot",)

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Export the program, once for all builds, and quantize it.

        Raises ``EngineError`` for a model over 2 GB, which one ONNX file cannot hold.
        """
        payload = folder / MODEL
        if qdq.uses_corewise_quantizer(build):
            quantized, notes = qdq.onnx_model(build_inputs, build, "everywhere", int32_biases=True)
            shutil.copyfile(quantized, payload)
            return notes
        exported = _exported(build_inputs)
        if build.precision == "fp32":
            shutil.copyfile(exported, payload)
            return ()
        with quiet():
            if build.precision == "int8":
                _quantize_static(exported, payload, build_inputs.calibration, build.quantization.reduce_range)
            else:
                _quantize_dynamic(exported, payload, build.quantization.reduce_range)
        return (MIXED_ROWS,) if build.precision in self.MIXING else ()

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the model; for several instances, what ONNX Runtime makes of it, from a file whose weights they map."""
        del build
        session = _opened(folder / MODEL, plan)
        return PixelSession(session, _opened(folder / PIXELS, plan)) if (folder / PIXELS).exists() else session

    def take_pixels(self, folder: Path, scale: PixelScale) -> Path:
        """A second model beside the first, with the normalization and the layout as nodes before it."""
        import onnx
        from onnx import helper, numpy_helper

        model = onnx.load(folder / MODEL)
        graph, (floats,) = model.graph, model.graph.input
        rows, channels, height, width = floats.type.tensor_type.shape.dim
        shape = [one.dim_param or one.dim_value for one in (rows, height, width, channels)]
        for name, values in (("mean", scale.mean), ("std", scale.std)):
            graph.initializer.append(
                numpy_helper.from_array(np.array(values, np.float32)[:, None, None], f"pixels.{name}")
            )
        first = (
            helper.make_node("Transpose", ["pixels"], ["pixels.planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["pixels.planes"], ["pixels.floats"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Sub", ["pixels.floats", "pixels.mean"], ["pixels.centred"]),
            helper.make_node("Div", ["pixels.centred", "pixels.std"], [floats.name]),
        )
        for node in reversed(first):
            graph.node.insert(0, node)
        floats.CopyFrom(helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, shape))
        path = folder / PIXELS
        onnx.save(model, path)
        return path

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """From the graph that a session runs after all of ONNX Runtime's optimizations, which it can write down."""
        del inputs
        if build.precision == "fp32":
            return None
        import onnx

        with TemporaryDirectory() as optimized:
            path = Path(optimized) / MODEL
            OnnxRuntimeSession(folder / MODEL, plan.threads_per_instance, optimized=path).close()
            return _receipt(onnx.load(path).graph)


def _opened(model: Path, plan: Plan) -> "OnnxRuntimeSession":
    if plan.instances > 1:
        return SharedSession(model, plan)
    return OnnxRuntimeSession(model, plan.threads_per_instance)


class OnnxRuntimeSession:
    """An ONNX model run by ONNX Runtime, which writes the graph that it made of it to ``optimized``.

    Its threads have the affinity of the one that opens it, and do as that with denormals. With ``weights`` the
    optimized graph's are in a file of that name, packed for its kernels; ``as_it_is`` opens such a graph.
    """

    def __init__(
        self, model: Path, threads: int, optimized: Path | None = None, weights: str = "", as_it_is: bool = False
    ) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = ERRORS_ONLY
        # By default ONNX Runtime's threads keep denormals, and so does the thread that opens its first session.
        options.add_session_config_entry("session.set_denormal_as_zero", "1" if denormals.flushed() else "0")
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if weights:
            # onnxruntime_session_options_config_keys.h
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
            options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        if as_it_is:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session: Any = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch."""
        outputs: list[np.ndarray] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return outputs

    def close(self) -> None:
        """Drop the session."""
        self._session = None


class SharedSession(OnnxRuntimeSession):
    """The first of several instances: all map the same file of optimized weights.

    ONNX Runtime shares packed weights between sessions by its C API only; a second session of ResNet-50 took 147 MB
    of memory, and mapped so 0.02 MB (1.32). The file goes when all instances are open; maps outlive it.
    """

    def __init__(self, model: Path, plan: Plan) -> None:
        self._model, self._threads, self._left = model, plan.threads_per_instance, plan.instances - 1
        what = f"{model.name} cannot be opened for several instances, which share its weights through temporary files"
        with guard(EngineError, what, "set TMPDIR to a folder with space for the model"), ExitStack() as undo:
            self._folder = TemporaryDirectory(prefix="corewise-")
            undo.callback(self._folder.cleanup)
            OnnxRuntimeSession(model, self._threads, optimized=self._optimized, weights="weights").close()
            super().__init__(self._optimized, self._threads, as_it_is=True)
            undo.pop_all()

    @property
    def _optimized(self) -> Path:
        return Path(self._folder.name) / MODEL

    def another(self) -> OnnxRuntimeSession:
        """One more on the same weights; beyond the plan's number one with its own."""
        if not self._left:
            return OnnxRuntimeSession(self._model, self._threads)
        other = OnnxRuntimeSession(self._optimized, self._threads, as_it_is=True)
        self._left -= 1
        if not self._left:
            self._folder.cleanup()
        return other

    def close(self) -> None:
        """Drop the session; the others stay."""
        super().close()
        self._left = 0
        self._folder.cleanup()


class PixelSession:
    """A model in two forms, of which one takes pixels."""

    def __init__(self, floats: OnnxRuntimeSession, pixels: OnnxRuntimeSession) -> None:
        self._floats, self._pixels = floats, pixels

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch of either."""
        return (self._pixels if inputs[0].dtype == np.uint8 else self._floats).run(inputs)

    def another(self) -> "PixelSession":
        """One more of each, of the instances that the plan counts."""
        assert isinstance(self._floats, SharedSession)
        assert isinstance(self._pixels, SharedSession)
        return PixelSession(self._floats.another(), self._pixels.another())

    def close(self) -> None:
        """Drop both."""
        self._floats.close()
        self._pixels.close()


def _receipt(graph: Any) -> Receipt:
    """Count the layers of an optimized graph.

    A layer whose operands both come from DequantizeLinear was quantized, and ONNX Runtime found no kernel for it.
    """
    made = {name: node for node in graph.node for name in node.output}
    constants = {value.name for value in graph.initializer}

    def source(name: str, passing: Sequence[str]) -> str:
        while name in made and made[name].op_type in passing:
            name = made[name].input[0]
        return name

    def dequantized(name: str) -> bool:
        origin = source(name, MOVES)
        return origin in made and made[origin].op_type == DEQUANTIZE

    ran, fell_back = [], []
    for node in graph.node:
        operands = node.input[:2]
        if re.fullmatch(INT8_KERNEL, node.op_type):
            ran.append((node.op_type, True))
        elif re.fullmatch(FLOAT_KERNEL, node.op_type):
            lost = all(map(dequantized, operands))
            fell_back += [node.name] if lost else []
            if lost or any(source(name, (*MOVES, DEQUANTIZE)) in constants for name in operands):
                ran.append((node.op_type, False))
    return Receipt.tally(ran, fell_back)


def _exported(build_inputs: BuildInputs) -> Path:
    """The program as ONNX in the cache, exported by whichever build comes first."""
    path = build_inputs.cache / MODEL
    if path.exists():
        return path
    if build_inputs.program.stat().st_size > PROTOBUF_LIMIT_BYTES:
        raise EngineError("the model is over 2 GB, more than one ONNX file can hold", "use another engine")
    from corewise.source import load_program

    export_onnx(load_program(build_inputs.program), path)
    return path


def _quantize_static(exported: Path, payload: Path, calibration: Samples, reduce_range: bool) -> None:
    tools = import_onnxruntime_quantization()
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / MODEL
        tools.quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        tools.quantize_static(
            prepared,
            payload,
            _reader(prepared, calibration),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            calibrate_method=tools.CalibrationMethod.MinMax,
        )


def _quantize_dynamic(exported: Path, payload: Path, reduce_range: bool) -> None:
    tools = import_onnxruntime_quantization()
    tools.quantize_dynamic(
        exported,
        payload,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=tools.QuantType.QInt8,
    )


def _reader(model: Path, calibration: Samples) -> Any:
    """The calibration samples one by one, as ONNX Runtime's quantizer asks for them."""
    import onnx

    base = import_onnxruntime_quantization().CalibrationDataReader
    names = [value.name for value in onnx.load(model).graph.input]

    class Reader(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, np.ndarray]] = (
                {name: array[None] for name, array in zip(names, row, strict=True)} for row in calibration.rows
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    return Reader()
