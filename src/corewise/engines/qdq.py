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
    from corewise.quantize.quantized import Recipe

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


def first_rung(build: Build) -> Build:
    """The build by corewise's quantizer at its quickest: ranges of a few samples and nothing corrected.

    Takes about as long as an engine's own int8. ``climbed`` goes on from there.
    """
    return build.with_quantization(replace(build.quantization, rung=0))


def climbed(build: Build, cache: Path) -> Build | None:
    """The build that is one correction further than ``build``; ``None`` if it is at the top already.

    ``cache`` is the folder that ``build`` was built with (``BuildInputs.cache``). Rungs that changed nothing are left
    out, and what was done for ``build`` is not done again.
    """
    from corewise.quantize.ptq import TOP
    from corewise.quantize.state import rung_reached

    options = build.quantization
    if options.rung is None:
        return None
    reached = rung_reached(cache, _recipe(build), options.rung)
    rung = (options.rung if reached is None else reached) + 1
    if rung > TOP:
        return None
    return build.with_quantization(replace(options, rung=None if rung == TOP else rung))


def quantized(build_inputs: BuildInputs, build: Build, target: "Target") -> tuple[Path, tuple[str, ...]]:
    """The quantized program (``state.load_quantized``), and notes; made once for all engines.

    Raises ``EngineError`` if a package is missing or nothing can be quantized.
    """
    if why := missing(PACKAGES, "optimize"):
        raise EngineError(f"corewise's quantizer {why}")
    from corewise.engines.torch_tools import keep_freed_memory
    from corewise.quantize.ptq import TOP
    from corewise.quantize.state import quantized_program

    options, recipe, build_inputs = build.quantization, _recipe(build), _in_calls(build_inputs, build)
    rung = TOP if options.rung is None else options.rung
    keep_freed_memory()  # calibration runs in eager PyTorch
    with quiet():
        order = _reverting_order(build_inputs, recipe, rung) if options.reverted_layers else ()
        reverted = order[: options.reverted_layers]
        path, decided = quantized_program(
            build_inputs.program,
            build_inputs.calibration,
            build_inputs.inputs,
            build_inputs.cache,
            recipe,
            target,
            (*options.ignored_layers, *reverted),
            attention=options.attention,
            rung=rung,
        )
    # What was decided is one line in a report, and the same for all engines.
    notes = (*(f"warning: {doubt}" for doubt in decided.warnings), "; ".join(decided.notes))
    return path, (*notes, f"back in floating point: {', '.join(reverted)}") if reverted else notes


def _in_calls(build_inputs: BuildInputs, build: Build) -> BuildInputs:
    """The inputs with the batch of the build, if that is fixed."""
    rows = build.fixed_batch
    if rows is None:
        return build_inputs
    return replace(
        build_inputs,
        calibration=replace(build_inputs.calibration, call_rows=rows),
        inputs=tuple(replace(spec, shape=(rows, *spec.shape[1:])) for spec in build_inputs.inputs),
    )


def _recipe(build: Build) -> "Recipe":
    from corewise.quantize.quantized import Recipe

    return Recipe(weight_bits=7 if build.quantization.reduce_range else 8)


def _reverting_order(build_inputs: BuildInputs, recipe: "Recipe", rung: int) -> tuple[str, ...]:
    """The layers in the order in which they go back to floating point; found once for all engines."""
    from corewise.quantize.quantized import batches
    from corewise.quantize.sensitivity import measure_sensitivity, order_of_return
    from corewise.quantize.state import calibrated

    path = build_inputs.cache / f"order-{recipe.key}-{rung}.json"
    if not path.exists():
        made = calibrated(build_inputs.program, build_inputs.calibration, build_inputs.cache, recipe, rung)
        count = len(build_inputs.calibration)
        judging = build_inputs.calibration.take(range(max(0, count - JUDGED), count))
        rows = measure_sensitivity(made, batches(judging, ROWS))
        rows, _ = timed(made, rows, build_inputs.inputs, build_inputs.calibration, build_inputs.cpu.usable_cores)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(order_of_return(rows)))
        part.replace(path)
    return tuple(json.loads(path.read_text()))


def onnx_model(
    build_inputs: BuildInputs, build: Build, target: "Target", *, int32_biases: bool = False
) -> tuple[Path, tuple[str, ...]]:
    """``quantized`` as ONNX with a dynamic batch, made once for all engines."""
    program, notes = quantized(build_inputs, build, target)
    from corewise.quantize.state import load_quantized

    path = program.with_suffix(".onnx")
    if not path.exists():
        export_onnx(load_quantized(program), path)
    if not int32_biases:
        return path, notes
    other = program.with_suffix(".int32-biases.onnx")
    if not other.exists():
        with TemporaryDirectory(dir=build_inputs.cache) as folder:
            made = Path(shutil.copy(path, folder))
            quantize_biases(made)
            made.replace(other)
    return other, notes
