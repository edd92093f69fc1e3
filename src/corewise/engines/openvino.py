"""OpenVINO: fp32, bf16, int8 by corewise's quantizer or by NNCF's, and int8 weights with dynamic activations."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from corewise.engines import qdq
from corewise.engines.base import BuildInputs, PixelScale, Session, is_mostly_linear, missing
from corewise.engines.libraries import import_nncf, import_openvino, quiet
from corewise.engines.onnx_export import export_onnx
from corewise.engines.openvino_receipt import logged_receipt, runtime_receipt
from corewise.engines.openvino_rounding import restore_coarse_layers
from corewise.engines.openvino_session import (
    DYNAMIC,
    MODEL,
    PIXELS,
    OpenVinoSession,
    explained,
    in_bf16,
    reshape_batch,
    rest_that_compiles,
)
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json

ATTENTION = "scaled_dot_product|softmax"
LOOKED_AT = 16
"""Samples that say how coarsely a transformer's layers round."""


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
        int8 and of int8-dynamic on ViT-S (Zen 4). int8-dynamic is for linear layers on CPUs that multiply int8:
        on others OpenVINO only unpacks the weights. Where AMX multiplies bf16 it does so too unless the rest is in
        fp32, which is for short calls: linear layers of MiniLM's size took half of bf16's time with 16 rows, and 1.5
        times as long with 2,048 (two cores of a Xeon with AMX).

        For nets with residual adds also our other placement: without AVX-512 OpenVINO adds an operand within a
        convolution's kernel only where both are int8 (ResNet-50, Zen 3: its 16 adds alone took 8 % of the time), and
        with it that placement is faster too (ResNet-50 1.16 times, MobileNetV2 1.05; Zen 4).
        """
        options = () if cpu.int8_dot else (("reduce_range", True),)
        int8 = Build(engine="openvino", precision="int8", options=options)
        bf16 = Build(engine="openvino", precision="bf16")
        fp32 = Build(engine="openvino", precision="fp32")
        ours = qdq.int8("openvino", cpu)
        everywhere = ours.with_quantization(replace(ours.quantization, placement="everywhere"))
        residual = any("conv" in name for name in operators) and "aten.add.Tensor" in operators
        quantized = (ours, everywhere, int8) if residual else (ours, int8)
        dynamic = Build(engine="openvino", precision="int8-dynamic")
        dynamics = (dynamic,) if cpu.int8_dot and is_mostly_linear(operators) else ()
        if not cpu.bf16:
            return (*quantized, *dynamics, fp32)
        unpacks = cpu.has("amx_bf16")
        combined = (ours, int8) if unpacks else (ours, int8, *dynamics)
        mixed = (build.with_quantization(replace(build.quantization, rest="bf16")) for build in combined)
        return (*mixed, *quantized, *(dynamics if unpacks else ()), bf16, fp32)

    def needs(self, build: Build) -> tuple[str, ...]:
        """bf16 hardware for bf16, 32-bit sums of int8 products for int8 in full range."""
        full_range = build.precision.startswith("int8") and not build.quantization.reduce_range
        return (*(("int8_dot",) if full_range else ()), *(("bf16",) if in_bf16(build) else ()))

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Convert the program and, for int8, quantize it with the calibration samples.

        Raises ``EngineError`` if OpenVINO cannot convert the program, or nothing can be quantized.
        """
        from corewise.source import load_program

        notes: tuple[str, ...] = ()
        if qdq.uses_corewise_quantizer(build):
            exported, notes = qdq.onnx_model(build_inputs, build, build.quantization.placement)
            _save(_converted(exported), folder)
        elif build.precision == "int8":
            shutil.copytree(_nncf(build_inputs, build.quantization.reduce_range), folder, dirs_exist_ok=True)
        else:
            model = _converted(load_program(build_inputs.program))
            if build.precision == "int8-dynamic":
                nncf = import_nncf()
                with quiet():
                    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            _save(model, folder)
        plan = Plan(threads_per_instance=build_inputs.cpu.usable_cores)
        return (*notes, *rest_that_compiles(folder / MODEL, build, plan))

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the IR, compiled for the plan's batch, with a stream for each instance.

        Raises ``EngineError`` if OpenVINO makes fewer streams: it has at most one for each core.
        """
        return OpenVinoSession(folder / MODEL, build, plan)

    def take_pixels(self, folder: Path, scale: PixelScale) -> Path:
        """Their normalization and layout become the first steps of the model when it is compiled for pixels."""
        path = folder / PIXELS
        path.write_text(json.dumps(to_json(scale)))
        return path

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """From the runtime model: what was compiled for the plan's batch, after all fusions, with its precisions.

        For int8-dynamic the runtime model does not say it, and oneDNN's log of one run does.
        """
        if build.precision == "int8-dynamic":
            return logged_receipt(folder, build, plan, inputs)
        if build.precision != "int8":
            return None
        session = OpenVinoSession(folder / MODEL, build, plan)
        try:
            session.run(inputs)
            return runtime_receipt(*session.models(len(inputs[0])))
        finally:
            session.close()


def _nncf(build_inputs: BuildInputs, reduce_range: bool) -> Path:
    """The folder of NNCF's int8 in the cache, made by whichever build comes first."""
    from corewise.source import load_program

    folder = build_inputs.cache / ("nncf-7-bits" if reduce_range else "nncf")
    if not folder.exists():
        # If this is interrupted, nothing is left that looks whole.
        with TemporaryDirectory(dir=build_inputs.cache) as name:
            part = Path(name) / folder.name
            part.mkdir()
            with quiet():
                model = _quantized(_converted(load_program(build_inputs.program)), build_inputs, reduce_range)
            _save(model, part)
            part.rename(folder)
    return folder


def _converted(program: Any) -> Any:
    """OpenVINO's model of an exported program or an ONNX file. Raises ``EngineError`` if it has none."""
    openvino = import_openvino()
    with quiet(), explained("convert this program"), _convertible(program) as given:
        return openvino.convert_model(given)


@contextmanager
def _convertible(program: Any) -> Iterator[Any]:
    """The program, or an ONNX file of one with recurrent layers: OpenVINO itself would take them apart into steps."""
    from corewise.source import has_recurrent_layers, operators

    if isinstance(program, Path) or not has_recurrent_layers(operators(program)):
        yield program
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        export_onnx(program, path)
        yield path


def _save(model: Any, folder: Path) -> None:
    import_openvino().save_model(model, str(folder / MODEL), compress_to_fp16=False)


def _quantized(model: Any, build_inputs: BuildInputs, reduce_range: bool) -> Any:
    """The model with NNCF's FakeQuantize operations, except in a transformer's layers that would round too coarsely.

    Quantized with a batch of one, then with a dynamic one again: with a dynamic batch NNCF leaves depthwise
    convolutions in fp32.
    """
    nncf = import_nncf()
    advanced = nncf.quantization.advanced_parameters
    reshape_batch(model, 1)
    rows, is_transformer = build_inputs.calibration.rows, build_inputs.count(ATTENTION) > 0
    quantized = nncf.quantize(
        model.clone(),
        nncf.Dataset(rows, _batch_of_one),
        subset_size=len(rows),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        advanced_parameters=advanced.AdvancedQuantizationParameters(
            overflow_fix=advanced.OverflowFix.ENABLE if reduce_range else advanced.OverflowFix.DISABLE
        ),
    )
    if is_transformer:
        restore_coarse_layers(quantized, model, [_batch_of_one(row) for row in rows[:LOOKED_AT]])
    reshape_batch(quantized, DYNAMIC)
    return quantized


def _batch_of_one(row: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [array[None] for array in row]
