"""Parts of torch that moved or will go, looked for in the installed files: importing torch would take seconds."""

import importlib.util
from pathlib import Path
from typing import Literal

INT8_PASSES = "_register_quantization_weight_pack_pass"
"""The function that registers inductor's int8 fusions: in torch up to 2.13, in torchao for torch 2.14 and newer."""


def int8_passes() -> Literal["torch", "torchao", ""]:
    """Which package has inductor's int8 fusions; empty if none has."""
    if _defines("torch", "_inductor/fx_passes/quantization.py", INT8_PASSES):
        return "torch"
    if _defines("torchao", "quantization/pt2e/inductor_passes/x86.py", INT8_PASSES):
        return "torchao"
    return ""


def has_fx_quantization() -> bool:
    """Whether torch still has FX graph mode quantization, which it has deprecated."""
    return _defines("torch", "ao/quantization/quantize_fx.py", "convert_fx")


def _defines(package: str, file: str, function: str) -> bool:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    path = Path(spec.origin).parent / file
    return path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8")
