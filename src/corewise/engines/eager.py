"""torch eager: the baseline, at its best memory format."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corewise.engines.base import Material, Session, missing
from corewise.values import Build, Cpu, Plan

if TYPE_CHECKING:
    import torch

FORMATS = ("contiguous", "channels_last")
PROGRAM = "program.pt2"
SETTINGS = "eager.json"
TRIAL_BATCH = 4
TRIAL_RUNS = 3


class Eager:
    """The user's program as PyTorch runs it, in fp32 or bf16.

    The baseline is eager at its best: where the program has 4-d inputs, both memory formats are
    timed while building and the faster is kept.
    """

    def unavailable(self) -> str:
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

    def build(self, material: Material, build: Build, folder: Path) -> tuple[str, ...]:
        """Copy the program and note the faster memory format."""
        shutil.copyfile(material.program, folder / PROGRAM)
        images = any(len(spec.shape) == 4 for spec in material.inputs)
        if not images:
            (folder / SETTINGS).write_text(json.dumps({"memory_format": "contiguous"}))
            return ()
        _, batch = next(material.calibration.batches(TRIAL_BATCH))
        times: dict[str, float] = {}
        plan = Plan(threads_per_instance=material.cpu.usable_cores, batch=TRIAL_BATCH)
        for memory_format in FORMATS:
            (folder / SETTINGS).write_text(json.dumps({"memory_format": memory_format}))
            times[memory_format] = _fastest_s(self.open(folder, build, plan), batch)
        best = min(times, key=lambda name: times[name])
        (folder / SETTINGS).write_text(json.dumps({"memory_format": best}))
        told = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
        return (f"memory format {best} ({told} at batch {len(batch[0])})",)

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the program."""
        settings = json.loads((folder / SETTINGS).read_text())
        return EagerSession(folder / PROGRAM, build, plan, settings["memory_format"])


class EagerSession:
    """A program run by torch eager."""

    def __init__(self, program: Path, build: Build, plan: Plan, memory_format: str) -> None:
        import torch

        from corewise.source import load_module

        self._threads = plan.threads_per_instance
        self._dtype = torch.bfloat16 if build.precision == "bf16" else torch.float32
        self._format = getattr(torch, f"{memory_format}_format" if memory_format == "contiguous" else memory_format)
        self._module = load_module(program).to(self._dtype)
        if memory_format != "contiguous":
            for tensor in (*self._module.parameters(), *self._module.buffers()):
                if tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=self._format)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch; bf16 outputs come back as float32."""
        import torch

        from corewise.engines.torch_tools import threads, to_numpy

        with threads(self._threads), torch.inference_mode():
            return to_numpy(self._module(*(self._tensor(array) for array in inputs)))

    def _tensor(self, array: np.ndarray) -> "torch.Tensor":
        from corewise.engines.torch_tools import from_numpy

        tensor = from_numpy(array)
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.contiguous(memory_format=self._format) if tensor.dim() == 4 else tensor

    def close(self) -> None:
        """Drop the module."""
        del self._module


def _fastest_s(session: Session, batch: Sequence[np.ndarray]) -> float:
    session.run(batch)
    seconds = []
    for _ in range(TRIAL_RUNS):
        start = time.perf_counter()
        session.run(batch)
        seconds.append(time.perf_counter() - start)
    session.close()
    return min(seconds)
