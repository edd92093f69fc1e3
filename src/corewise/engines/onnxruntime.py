"""ONNX Runtime: fp32, and int8 by its own static (QDQ) and dynamic quantization."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from corewise.engines.base import Material, Session, missing
from corewise.engines.quiet import quiet
from corewise.errors import EngineError
from corewise.samples import Samples
from corewise.values import Build, Cpu, Plan

MODEL = "model.onnx"
PROTOBUF_LIMIT_BYTES = 2**31 - 1
ERRORS_ONLY = 3
LINEAR = r"aten\.(linear|addmm|matmul|mm|bmm)\b"
CONVOLUTION = r"aten\.\w*conv\w*"


class OnnxRuntime:
    """ONNX Runtime's CPU provider.

    The payload is one ``model.onnx`` with a dynamic batch; opening it needs no torch. int8 has u8 activations and
    s8 weights per channel between Q/DQ pairs; int8-dynamic quantizes only matrix products, activations as they
    come. The option ``reduce_range`` quantizes weights to 7 bits, for CPUs that add int8 products in 16 bits
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """

    def unavailable(self) -> str:
        """Needs onnxruntime and, to build, onnx and onnxscript."""
        return missing(("onnxruntime", "onnx", "onnxscript"), "onnxruntime")

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """int8, int8-dynamic for models of linear layers rather than convolutions, fp32."""
        options = () if cpu.int8_dot else (("reduce_range", True),)
        int8 = Build(engine="onnxruntime", precision="int8", options=options)
        dynamic = Build(engine="onnxruntime", precision="int8-dynamic", options=options)
        fp32 = Build(engine="onnxruntime", precision="fp32")
        linears, convolutions = (
            sum(n for name, n in operators.items() if re.search(pattern, name)) for pattern in (LINEAR, CONVOLUTION)
        )
        return (int8, dynamic, fp32) if linears >= max(1, convolutions) else (int8, fp32)

    def needs(self, build: Build) -> tuple[str, ...]:
        """32-bit sums of int8 products for int8 in full range."""
        return () if build.precision == "fp32" or build.option("reduce_range", False) else ("int8_dot",)

    def build(self, material: Material, build: Build, folder: Path) -> tuple[str, ...]:
        """Export the program, once for all builds, and quantize it.

        Raises ``EngineError`` for a model over 2 GB, which one ONNX file cannot hold.
        """
        exported, payload = _exported(material), folder / MODEL
        if build.precision == "fp32":
            shutil.copyfile(exported, payload)
            return ()
        with quiet():
            if build.precision == "int8":
                _quantize_static(exported, payload, material.calibration, bool(build.option("reduce_range", False)))
            else:
                _quantize_dynamic(exported, payload, bool(build.option("reduce_range", False)))
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the model."""
        del build
        return OnnxRuntimeSession(folder / MODEL, plan.threads_per_instance)


class OnnxRuntimeSession:
    """An ONNX model run by ONNX Runtime."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = ERRORS_ONLY
        self._session: Any = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch."""
        outputs: list[np.ndarray] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return outputs

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _exported(material: Material) -> Path:
    """The program as ONNX in the cache, exported by whichever build comes first."""
    path = material.cache / MODEL
    if path.exists():
        return path
    if material.program.stat().st_size > PROTOBUF_LIMIT_BYTES:
        raise EngineError("the model is over 2 GB, more than one ONNX file can hold", "use another engine")
    import torch

    from corewise.source import load_program

    with TemporaryDirectory(dir=material.cache) as folder, quiet():
        made = Path(folder) / MODEL
        torch.onnx.export(
            load_program(material.program),
            f=made,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        made.replace(path)
    return path


def _quantize_static(exported: Path, payload: Path, calibration: Samples, reduce_range: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / MODEL
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            payload,
            _reader(prepared, calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def _quantize_dynamic(exported: Path, payload: Path, reduce_range: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        exported,
        payload,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
    )


def _reader(model: Path, calibration: Samples) -> Any:
    """The calibration samples one by one, as ONNX Runtime's quantizer asks for them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [value.name for value in onnx.load(model).graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, np.ndarray]] = (
                {name: array[None] for name, array in zip(names, row, strict=True)} for row in calibration.rows
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    return Reader()
