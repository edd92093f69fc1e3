"""PyTorch's own int8: static and dynamic quantization on its quantized backends."""

import json
import platform
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corewise.engines.base import Material, Session, missing
from corewise.engines.quiet import quiet
from corewise.errors import EngineError
from corewise.imports import guard
from corewise.values import Build, Cpu, Plan

if TYPE_CHECKING:
    from torch.fx import GraphModule

MODEL = "model.pt"
SETTINGS = "torch_int8.json"
CALIBRATION_BATCH = 8
TRIAL_BATCHES = (1, 8)
TRIAL_RUNS = 5
LINEAR = r"aten\.(linear|addmm|mm)\b"
CONVOLUTION = r"aten\.\w*conv\w*"


class TorchInt8:
    """int8 on the quantized backends of PyTorch (x86: onednn, x86, fbgemm; ARM: onednn, qnnpack).

    int8 is static: u8 activations with calibrated ranges, s8 weights per channel, batch norms and ReLUs fused.
    int8-dynamic quantizes linear layers only, activations as they come. The payload is TorchScript for the backend
    that was fastest while building. The option ``reduce_range`` quantizes weights to 7 bits, for CPUs that add int8
    products in 16 bits.
    """

    def unavailable(self) -> str:
        """Needs torch."""
        return missing(("torch",), "optimize")

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """int8, and int8-dynamic for models of linear layers rather than convolutions."""
        reduce = cpu.architecture == "x86_64" and not cpu.int8_dot
        options = (("reduce_range", True),) if reduce else ()
        int8 = Build(engine="torch-int8", precision="int8", options=options)
        dynamic = Build(engine="torch-int8", precision="int8-dynamic")
        linears, convolutions = (
            sum(n for name, n in operators.items() if re.search(pattern, name)) for pattern in (LINEAR, CONVOLUTION)
        )
        if not linears + convolutions:
            return ()
        return (int8, dynamic) if linears >= convolutions else (int8,)

    def needs(self, build: Build) -> tuple[str, ...]:
        """On x86, 32-bit sums of int8 products for static int8 in full range."""
        full = build.precision == "int8" and not build.option("reduce_range", False)
        return ("int8_dot",) if full and platform.machine() == "x86_64" else ()

    def build(self, material: Material, build: Build, folder: Path) -> tuple[str, ...]:
        """Quantize once, convert for each backend, keep the fastest.

        Raises ``EngineError`` where nothing can be quantized or no backend runs the result.
        """
        from corewise.quantize import fx
        from corewise.quantize.lift import lift
        from corewise.source import load_program

        with quiet(), guard(EngineError, "PyTorch cannot quantize this program", "use another engine"):
            lifted = lift(load_program(material.program))
            layers = fx.count_layers(lifted)
            if not layers[1] + (layers[0] if build.precision == "int8" else 0):
                raise EngineError("no layer has constant weights: there is nothing to quantize", "use another precision")
            module = self._quantized(material, build, lifted)
        ...


class TorchInt8Session:
    ...
