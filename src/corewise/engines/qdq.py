"""What the engines share that run corewise's own Q/DQ programs (``corewise.quantize.ptq``)."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corewise.engines.base import Material, missing
from corewise.engines.onnx_bias import quantize_biases
from corewise.engines.quiet import quiet
from corewise.errors import EngineError
from corewise.values import Build, Cpu

if TYPE_CHECKING:
    from corewise.quantize.placement import Target

OPTION = ("quantizer", "corewise")
PACKAGES = ("torch", "torchao", "onnx", "onnxscript")


def int8(engine: str, cpu: Cpu) -> Build:
    """The engine's int8 build of our quantizer; weights in 7 bits where the CPU adds int8 products in 16 bits."""
    return Build(
        engine=engine, precision="int8", options=(OPTION, *(() if cpu.int8_dot else (("reduce_range", True),)))
    )


def is_ours(build: Build) -> bool:
    """Whether the build asks for our quantizer rather than the engine's own."""
    return OPTION in build.options


def quantized(material: Material, build: Build, target: "Target") -> tuple[Path, tuple[str, ...]]:
    """The quantized program (``ptq.load_quantized``), and notes; made once for all engines.

    Raises ``EngineError`` where a package is missing or nothing can be quantized.
    """
    if why := missing(PACKAGES, "optimize"):
        raise EngineError(f"corewise's quantizer {why}")
    from corewise.quantize.ptq import Recipe, quantized_program

    recipe = Recipe(weight_bits=7 if build.option("reduce_range", False) else 8)
    ignored = tuple(filter(None, str(build.option("ignored", "")).split(",")))
    with quiet():
        return quantized_program(
            material.program, material.calibration, material.inputs, material.cache, recipe, target, ignored
        )


def onnx_model(material: Material, build: Build, target: "Target") -> tuple[Path, tuple[str, ...]]:
    """``quantized`` as ONNX with a dynamic batch, made once for all engines; ``everywhere`` has its biases in int32."""
    program, notes = quantized(material, build, target)
    from corewise.quantize.ptq import load_quantized

    path = program.with_suffix(".onnx")
    if not path.exists():
        with TemporaryDirectory(dir=material.cache) as folder:
            made = Path(folder) / path.name
            export_onnx(load_quantized(program), made)
            if target == "everywhere":
                quantize_biases(made)
            made.replace(path)
    return path, notes


def export_onnx(program: object, path: Path) -> None:
    """Write a ``torch.export.ExportedProgram`` as one ONNX file, whole or not at all."""
    import torch

    with TemporaryDirectory(dir=path.parent) as folder, quiet():
        made = Path(folder) / path.name
        torch.onnx.export(program, f=made, dynamo=True, external_data=False, verbose=False)  # type: ignore[arg-type]
        made.replace(path)
