"""PyTorch's own int8: static and dynamic quantization on its quantized backends."""

import copy
import json
import platform
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corewise.common.errors import EngineError
from corewise.common.references import guard
from corewise.engines.base import CONVOLUTION, MIXED_ROWS, BuildInputs, Session, count, fastest_s, missing
from corewise.engines.libraries import quiet
from corewise.machine.torch_features import has_fx_quantization
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

MODEL = "model.pt"
SETTINGS = "torch_int8.json"
CALIBRATION_BATCH = 8
TRIAL_BATCH = 8
WRONG_DB = 10.0
"""A backend this much further from fp32 than another one computes something else: with AVX-512 oneDNN's transposed
convolutions gave -0.7 dB where the others gave over 20 (torch 2.13)."""
LINEAR = r"aten\.(linear|addmm|mm)\b"
INT8_KERNEL = r"quantized::(conv|linear)"
FLOAT_KERNEL = r"aten::(_?conv|linear$|addmm$|mm$|matmul$|bmm$)"


class TorchInt8:
    """int8 on the quantized backends of PyTorch (x86: onednn, x86, fbgemm; ARM: onednn, qnnpack).

    int8 is static: u8 activations with calibrated ranges, s8 weights per channel, batch norms and ReLUs fused.
    int8-dynamic quantizes linear layers only, activations as they come. The payload is TorchScript for the backend
    that was fastest while building. The option ``reduce_range`` quantizes weights to 7 bits, for CPUs that add int8
    products in 16 bits.
    """

    MIXING = ("int8-dynamic",)
    """``quantized::linear_dynamic`` has one scale for all rows, and no other way."""

    def unavailable(self, opening: bool = False) -> str:
        """Needs torch and, to build, its FX quantization."""
        if (reason := missing(("torch",), "optimize")) or opening or has_fx_quantization():
            return reason
        return "needs FX quantization, which this torch no longer has: pip install 'torch<2.16'"

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """int8, and int8-dynamic for models of linear layers rather than convolutions."""
        reduce = cpu.architecture == "x86_64" and not cpu.int8_dot
        options = (("reduce_range", True),) if reduce else ()
        int8 = Build(engine="torch-int8", precision="int8", options=options)
        dynamic = Build(engine="torch-int8", precision="int8-dynamic")
        linears, convolutions = count(operators, LINEAR), count(operators, CONVOLUTION)
        if not linears + convolutions:
            return ()
        return (int8, dynamic) if linears >= convolutions else (int8,)

    def needs(self, build: Build) -> tuple[str, ...]:
        """On x86, 32-bit sums of int8 products for static int8 in full range."""
        full = build.precision == "int8" and not build.quantization.reduce_range
        return ("int8_dot",) if full and platform.machine() == "x86_64" else ()

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Quantize once, convert for each backend, keep the fastest of those that are right.

        Raises ``EngineError`` where nothing can be quantized or no backend runs the result.
        """
        from corewise.quantize import fx

        with quiet(), guard(EngineError, "PyTorch cannot quantize this program", "use another engine"):
            module = _quantizable(build_inputs, build)
        _, batch = next(build_inputs.calibration.batches(build.fixed_batch or TRIAL_BATCH))
        expected = _outputs(build_inputs, batch)
        results: dict[str, _Result] = {}
        failures: list[str] = []
        for name in fx.backends():
            try:
                with quiet(), guard(EngineError, f"backend {name}", "use another engine"):
                    kernels = _convert(module, name, build, folder)
                    results[name] = _tried(folder, name, kernels, batch, expected, build_inputs)
            except EngineError as error:
                failures.append(error.what)
        if not results:
            raise EngineError(f"no quantized backend runs this program: {failures[0]}", "use another engine")
        nearest_db = max(result.sqnr_db for result in results.values())
        for name in [name for name, result in results.items() if result.sqnr_db < nearest_db - WRONG_DB]:
            wrong = results.pop(name)
            failures.append(f"backend {name} is wrong: {wrong.sqnr_db:.1f} dB to fp32, another one {nearest_db:.1f}")
        best = min(results, key=lambda name: sum(results[name].seconds_per_item))
        if not sum(results[best].kernels):
            raise EngineError("no layer has constant weights: there is nothing to quantize", "use another precision")
        (folder / f"{best}.pt").rename(folder / MODEL)
        for name in fx.backends():
            (folder / f"{name}.pt").unlink(missing_ok=True)
        (folder / SETTINGS).write_text(json.dumps({"backend": best}))
        mixed = (MIXED_ROWS,) if build.precision in self.MIXING else ()
        return (
            f"{_speeds(best, results, len(batch[0]))}, {_layers(results[best], build_inputs, build)}",
            *mixed,
            *failures,
        )

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Load the TorchScript. Raises ``EngineError`` where this torch lacks the backend."""
        del build
        name = json.loads((folder / SETTINGS).read_text())["backend"]
        return TorchInt8Session(folder / MODEL, name, plan)

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """From the TorchScript as it is loaded, whose operators name their kernels."""
        del inputs
        name = json.loads((folder / SETTINGS).read_text())["backend"]
        session = TorchInt8Session(folder / MODEL, name, plan)
        try:
            return _receipt(session)
        finally:
            session.close()


class TorchInt8Session:
    """TorchScript on one quantized backend; the process keeps the memory that it frees."""

    def __init__(self, model: Path, backend: str, plan: Plan) -> None:
        import torch

        from corewise.engines.torch_tools import keep_freed_memory
        from corewise.quantize import fx

        keep_freed_memory()
        if backend not in torch.backends.quantized.supported_engines:
            raise EngineError(f"this torch has no quantized backend {backend}", "optimize again on this machine")
        self._threads = plan.threads_per_instance
        with fx.backend(backend), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated")
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, .* are deprecated")
            # Given once a process: here it is a Python warning, while loading torch would print it.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            self._module = torch.jit.load(model, map_location="cpu")  # type: ignore[no-untyped-call]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch of any size."""
        import torch
        from torch.jit._fuser import optimized_execution

        from corewise.engines.torch_tools import from_numpy, threads, to_numpy

        # A frozen graph has nothing left to optimize: the profiling executor only makes the first runs slow.
        with threads(self._threads), torch.inference_mode(), optimized_execution(False):
            return to_numpy(self._module(*map(from_numpy, inputs)))

    def another(self) -> "TorchInt8Session":
        """The same TorchScript: a frozen one has no state, and each call its own interpreter."""
        return copy.copy(self)

    @property
    def operators(self) -> "Iterable[torch.Node]":
        """The operators of the frozen TorchScript."""
        operators: Iterable[torch.Node] = self._module.graph.nodes()
        return operators

    def close(self) -> None:
        """Drop the module."""
        self.__dict__.pop("_module", None)


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What became of the program on one backend."""

    kernels: tuple[int, int]
    """Convolutions and linear layers in int8."""
    seconds_per_item: tuple[float, float]
    """Alone, and in the trial's batch."""
    sqnr_db: float
    """SQNR of the outputs, against fp32's."""


def _receipt(session: TorchInt8Session) -> Receipt:
    """Count the layers among the operators; fp32 ones by their constant weights."""
    ran = []
    for node in session.operators:
        if re.match(INT8_KERNEL, node.kind()):
            ran.append((node.kind(), True))
        elif re.match(FLOAT_KERNEL, node.kind()) and any(map(_is_constant, list(node.inputs())[:3])):
            ran.append((node.kind(), False))
    return Receipt.tally(ran)


def _is_constant(value: "torch.Value") -> bool:
    return value.node().kind() == "prim::Constant" and value.type().kind() == "TensorType"


def _quantizable(build_inputs: BuildInputs, build: Build) -> "GraphModule":
    """The lifted program, calibrated for static int8."""
    from corewise.engines.torch_tools import from_numpy, threads
    from corewise.quantize import fx
    from corewise.quantize.lift import lift_program
    from corewise.source import load_program

    module = lift_program(load_program(build_inputs.program))
    if build.precision == "int8-dynamic":
        return module
    size = build.fixed_batch or CALIBRATION_BATCH
    calls = (arrays for _, arrays in build_inputs.calibration.batches(size))
    batches = (tuple(map(from_numpy, call)) for call in calls if len(call[0]) == size or build.fixed_batch is None)
    with threads(build_inputs.cpu.usable_cores):
        return fx.calibrate(module, batches, build.quantization.reduce_range)


def _convert(module: "GraphModule", backend: str, build: Build, folder: Path) -> tuple[int, int]:
    """Write ``<backend>.pt``; returns its int8 kernels."""
    from corewise.quantize import fx

    with fx.backend(backend):
        converted = fx.to_dynamic_int8(module) if build.precision == "int8-dynamic" else fx.to_int8(module)
        scripted = fx.script(converted)
        fx.save(scripted, folder / f"{backend}.pt")
    return fx.count_kernels(scripted)


def _tried(
    folder: Path,
    backend: str,
    kernels: tuple[int, int],
    batch: Sequence[np.ndarray],
    expected: "tuple[torch.Tensor, ...]",
    build_inputs: BuildInputs,
) -> _Result:
    """The backend's seconds per item, each the fastest of a few runs, and how near its outputs are to ``expected``."""
    from corewise.engines.torch_tools import from_numpy
    from corewise.quantize.simulate import sqnr_db

    plan = Plan(threads_per_instance=build_inputs.cpu.usable_cores, batch=len(batch[0]))
    session = TorchInt8Session(folder / f"{backend}.pt", backend, plan)
    alone, together = (fastest_s(session, [array[:size] for array in batch]) for size in (1, plan.batch))
    outputs = tuple(map(from_numpy, session.run(batch)))
    session.close()
    return _Result(
        kernels=kernels, seconds_per_item=(alone, together / plan.batch), sqnr_db=sqnr_db([expected], [outputs])
    )


def _outputs(build_inputs: BuildInputs, batch: Sequence[np.ndarray]) -> "tuple[torch.Tensor, ...]":
    """The program's outputs in fp32."""
    import torch

    from corewise.engines.torch_tools import from_numpy, threads
    from corewise.source import load_program

    with torch.no_grad(), threads(build_inputs.cpu.usable_cores):
        outputs = load_program(build_inputs.program).module()(*map(from_numpy, batch))
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _speeds(best: str, results: dict[str, _Result], size: int) -> str:
    """``backend onednn (41/s; x86 28/s, fbgemm 34/s at batch 8)``."""
    rates = {name: f"{1 / result.seconds_per_item[1]:.0f}/s" for name, result in results.items()}
    others = ", ".join(f"{name} {rate}" for name, rate in rates.items() if name != best)
    return f"backend {best} ({rates[best]}{f'; {others}' if others else ''} at batch {size})"


def _layers(result: _Result, build_inputs: BuildInputs, build: Build) -> str:
    """``53 convolutions and 1 linear layers in int8``, and how many of the program's layers are not."""
    convolutions, linears = result.kernels
    layers = build_inputs.count(LINEAR) + (build_inputs.count(CONVOLUTION) if build.precision == "int8" else 0)
    left = layers - convolutions - linears
    told = (
        f"{linears} linear layers in int8"
        if build.precision == "int8-dynamic"
        else (f"{convolutions} convolutions and {linears} linear layers in int8")
    )
    return f"{told}, {left} of {layers} layers stay in fp32" if left > 0 else told
