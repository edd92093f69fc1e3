"""torch eager: the baseline, at its best memory format."""

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corewise.common.errors import EngineError
from corewise.engines.base import BuildInputs, fastest_s, missing
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMATS = ("contiguous", "channels_last")
PROGRAM = "program.pt2"
WEIGHTS = "weights.safetensors"
SETTINGS = "eager.json"
TRIAL_BATCH = 4


class Eager:
    """The user's program as PyTorch runs it, in fp32 or bf16.

    The baseline is eager at its best: where the program has 4-d inputs, both memory formats are
    timed while building and the faster is kept. ``module`` (flat tensors in and out) takes the program's place for
    a model that cannot be exported: the payload then holds its weights only.
    """

    def __init__(self, module: "nn.Module | None" = None) -> None:
        self._module = module

    def unavailable(self, opening: bool = False) -> str:
        """Needs torch."""
        return missing(("torch",), "optimize")

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """fp32, and bf16 where the CPU multiplies it."""
        del operators
        fp32 = Build(engine="eager", precision="fp32")
        return (fp32, Build(engine="eager", precision="bf16")) if cpu.bf16 else (fp32,)

    def needs(self, build: Build) -> tuple[str, ...]:
        """bf16 hardware for bf16."""
        return ("bf16",) if build.precision == "bf16" else ()

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Keep the program (or the weights), and the faster memory format."""
        if self._module is None:
            shutil.copyfile(build_inputs.program, folder / PROGRAM)
        else:
            from safetensors.torch import save_model

            save_model(self._module, str(folder / WEIGHTS))
        if not any(len(spec.shape) == 4 for spec in build_inputs.inputs):
            _write_format(folder, "contiguous")
            return ()
        rows = build.fixed_batch or TRIAL_BATCH
        _, batch = next(build_inputs.calibration.batches(rows))
        plan = Plan(threads_per_instance=build_inputs.cpu.usable_cores, batch=rows)
        _write_format(folder, FORMATS[0])
        session = self.open(folder, build, plan)
        times: dict[str, float] = {}
        for memory_format in FORMATS:  # in one session, because opening a program takes a second or two
            try:
                session.use_format(memory_format)
                times[memory_format] = fastest_s(session, batch)
            except RuntimeError:
                if memory_format == FORMATS[0]:
                    raise
                # A ``view`` that needs the values in the order of a contiguous tensor.
        best = min(times, key=lambda name: times[name])
        _write_format(folder, best)
        told = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
        return (f"memory format {best} ({told} at batch {len(batch[0])})",)

    def open(self, folder: Path, build: Build, plan: Plan) -> "EagerSession":
        """Open the program. Raises ``EngineError`` where the payload holds only weights and no module was given."""
        from corewise.source import load_module

        if (folder / PROGRAM).exists():
            module = load_module(folder / PROGRAM)
        elif self._module is None:
            raise EngineError(
                "this model could not be exported, so the artifact holds its weights but not its code",
                "give the module: corewise.load(path, model=...), or --model file.py:function",
            )
        else:
            from safetensors.torch import load_model

            module = copy.deepcopy(self._module)
            load_model(module, str(folder / WEIGHTS))
        return EagerSession(module, build, plan, json.loads((folder / SETTINGS).read_text())["memory_format"])

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """None: nothing is int8."""
        del folder, build, plan, inputs
        return None


class EagerSession:
    """A module run by torch eager; the module is the session's own, and so is the memory it frees."""

    def __init__(self, module: "nn.Module", build: Build, plan: Plan, memory_format: str) -> None:
        import torch
        from torch.fx import GraphModule

        from corewise.engines.torch_tools import keep_freed_memory, to_bf16

        keep_freed_memory()
        self._threads = plan.threads_per_instance
        # A model's own code may compute gradients, which inference mode does not let it.
        self._without_gradients = torch.inference_mode if isinstance(module, GraphModule) else torch.no_grad
        self._in_bf16 = build.precision == "bf16"
        self._module = to_bf16(module) if self._in_bf16 else module
        self.use_format(memory_format)

    def use_format(self, memory_format: str) -> None:
        """Convert the parameters, and from now on the inputs, to one of ``FORMATS``."""
        import torch

        self._format = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=self._format)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch; bf16 outputs come back as float32."""
        from corewise.engines.torch_tools import threads, to_numpy

        with threads(self._threads), self._without_gradients():
            return to_numpy(self._module(*(self._tensor(array) for array in inputs)))

    def _tensor(self, array: np.ndarray) -> "torch.Tensor":
        from corewise.engines.torch_tools import from_numpy

        tensor = from_numpy(array)
        if self._in_bf16 and array.dtype == np.float32:
            tensor = tensor.bfloat16()
        return tensor.contiguous(memory_format=self._format) if tensor.dim() == 4 else tensor

    def another(self) -> "EagerSession":
        """The same parameters in a module of its own: ``forward`` may keep things in a module, and in its buffers."""
        other = copy.copy(self)
        with warnings.catch_warnings():
            # Given by torch's own exported modules, 2.13.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            other._module = copy.deepcopy(self._module, {id(tensor): tensor for tensor in self._module.parameters()})
        return other

    def close(self) -> None:
        """Drop the module."""
        self.__dict__.pop("_module", None)


def _write_format(folder: Path, memory_format: str) -> None:
    (folder / SETTINGS).write_text(json.dumps({"memory_format": memory_format}))
