"""What the engines share that run corewise's own Q/DQ programs (``corewise.quantize.ptq``)."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corewise.common.errors import EngineError
from corewise.engines.base import BuildInputs, missing
from corewise.engines.layer_times import timed
from corewise.engines.libraries import quiet
from corewise.engines.onnx_bias import quantize_biases
from corewise.engines.onnx_export import export_onnx
from corewise.records.build import Build, QuantizationOptions
from corewise.records.cpu import Cpu

if TYPE_CHECKING:
    from corewise.quantize.placement import Target
    from corewise.quantize.ptq import Recipe

JUDGED = 8
"""Calibration samples that layers are tried on one by one; ``ROWS`` at a time."""
ROWS = 4
PACKAGES = ("torch", "torchao", "onnx", "onnxscript")


def int8(engine: str, cpu: Cpu) -> Build:
    """The engine's int8 build of our quantizer; weights in 7 bits where the CPU adds int8 products in 16 bits."""
    options = QuantizationOptions(quantizer="corewise", reduce_range=not cpu.int8_dot)
    return Build(engine=engine, precision="int8").with_quantization(options)


def int8_attention(engine: str, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
    """``int8`` with int8 attention too, for models that have one by their ``operators``."""
    names = " ".join(operators)
    by_hand = "softmax" in names and re.search(r"\b(matmul|bmm)\b", names)
    if not by_hand and "scaled_dot_product_attention" not in names:
        return ()
    plain = int8(engine, cpu)
    attending = plain.with_quantization(replace(plain.quantization, attention=True))
    # Journals and folders of older versions know this build with its newest option last.
    return (replace(attending, options=tuple(sorted(attending.options, key=lambda pair: pair not in plain.options))),)


def uses_corewise_quantizer(build: Build) -> bool:
    """Whether the build asks for our quantizer rather than the engine's own."""
    return build.quantization.quantizer == "corewise"


def quantized(material: BuildInputs, build: Build, target: "Target") -> tuple[Path, tuple[str, ...]]:
    """The quantized program (``ptq.load_quantized``), and notes; made once for all engines.

    The build's option ``ignored`` names layers that stay in floating point, separated by spaces; ``returned`` says how
    many of them go back by ``sensitivity.order_of_return``; ``attention`` places products of two activations too.
    Raises ``EngineError`` where a package is missing or nothing can be quantized.
    """
    if why := missing(PACKAGES, "optimize"):
        raise EngineError(f"corewise's quantizer {why}")
    from corewise.engines.torch_tools import keep_freed_memory
    from corewise.quantize.ptq import Recipe, quantized_program

    options = build.quantization
    recipe = Recipe(weight_bits=7 if options.reduce_range else 8)
    keep_freed_memory()  # calibration runs in eager PyTorch
    with quiet():
        reverted = _order(material, recipe)[: options.reverted_layers] if options.reverted_layers else ()
        path, notes = quantized_program(
            material.program,
            material.calibration,
            material.inputs,
            material.cache,
            recipe,
            target,
            (*options.ignored_layers, *reverted),
            attention=options.attention,
        )
    # What was decided is one line in a report, and the same for all engines.
    decided = "; ".join(note for note in notes if not note.startswith("warning"))
    told = (*(note for note in notes if note.startswith("warning")), decided)
    return path, (*told, f"back in floating point: {', '.join(reverted)}") if reverted else told


def _order(material: BuildInputs, recipe: "Recipe") -> tuple[str, ...]:
    """The layers in the order in which they go back to floating point; found once for all engines."""
    from corewise.quantize import ptq
    from corewise.quantize.sensitivity import measure_sensitivity, order_of_return

    path = material.cache / f"order-{recipe.key}.json"
    if not path.exists():
        made = ptq.calibrated(material.program, material.calibration, material.cache, recipe)
        judging = material.calibration.take(
            range(max(0, len(material.calibration) - JUDGED), len(material.calibration))
        )
        rows = measure_sensitivity(made, ptq.batches(judging, ROWS))
        rows, _ = timed(made, rows, material.inputs, material.calibration, material.cpu.usable_cores)
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(order_of_return(rows)))
        whole.replace(path)
    return tuple(json.loads(path.read_text()))


def onnx_model(
    material: BuildInputs, build: Build, target: "Target", *, int32_biases: bool = False
) -> tuple[Path, tuple[str, ...]]:
    """``quantized`` as ONNX with a dynamic batch, made once for all engines."""
    program, notes = quantized(material, build, target)
    from corewise.quantize.ptq import load_quantized

    path = program.with_suffix(".onnx")
    if not path.exists():
        export_onnx(load_quantized(program), path)
    if not int32_biases:
        return path, notes
    other = program.with_suffix(".int32-biases.onnx")
    if not other.exists():
        with TemporaryDirectory(dir=material.cache) as folder:
            made = Path(shutil.copy(path, folder))
            quantize_biases(made)
            made.replace(other)
    return other, notes
