"""An engine that declares its time and its error, to test everything around engines in seconds."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path

import numpy as np

from corewise.engines.base import BuildInputs, Session
from corewise.records.build import Build, Plan, Receipt, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json

MODEL = "fake.json"
SEED, NOISE_SEED = 0, 1


class Fake:
    """Outputs are a fixed random projection of the inputs; the build's options say the rest.

    ``seconds_per_call`` and ``seconds_per_item`` (0): what a run takes, the items' time divided among the threads
    but for the share ``serial`` (0; Amdahl's law). ``noise`` (0): the error relative to the output, so that the
    SQNR is about -20 log10(noise). ``fails_above`` and ``dies_above``: an input value that makes a call raise, or end
    its process. Never offers itself.
    """

    def unavailable(self, opening: bool = False) -> str:
        """Needs nothing."""
        return ""

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """None: only tests ask for it."""
        del cpu, operators
        return ()

    def needs(self, build: Build) -> tuple[str, ...]:
        """No extension."""
        del build
        return ()

    def build(self, build_inputs: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Write down the outputs' specs."""
        del build
        (folder / MODEL).write_text(
            json.dumps({"inputs": len(build_inputs.inputs), "outputs": to_json(build_inputs.outputs)})
        )
        return ()

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        """Open the specs."""
        data = json.loads((folder / MODEL).read_text())
        return FakeSession(
            inputs=data["inputs"],
            outputs=tuple(from_json(TensorSpec, spec) for spec in data["outputs"]),
            noise=float(build.option("noise", 0.0)),
            seconds_per_call=float(build.option("seconds_per_call", 0.0)),
            seconds_per_item=_seconds_per_item(build, plan),
            fails_above=float(build.option("fails_above", inf)),
            dies_above=float(build.option("dies_above", inf)),
        )

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """None: it has no layers."""
        del folder, build, plan, inputs
        return None


@dataclass(frozen=True, kw_only=True)
class FakeSession:
    """Sleeps, and projects the inputs."""

    inputs: int
    outputs: tuple[TensorSpec, ...]
    noise: float
    seconds_per_call: float
    seconds_per_item: float
    fails_above: float
    dies_above: float

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one batch; dynamic dimensions of outputs are 1."""
        if len(inputs) != self.inputs:
            raise ValueError(f"{len(inputs)} inputs instead of {self.inputs}")
        batch = len(inputs[0])
        time.sleep(self.seconds_per_call + self.seconds_per_item * batch)
        flat = np.concatenate([array.reshape(batch, -1).astype(np.float32) for array in inputs], axis=1)
        if (flat > self.dies_above).any():
            os.abort()
        if (flat > self.fails_above).any():
            raise ValueError(f"an input is above {self.fails_above:g}")
        return [self._project(flat, spec) for spec in self.outputs]

    def close(self) -> None:
        """Holds nothing."""

    def _project(self, flat: np.ndarray, spec: TensorSpec) -> np.ndarray:
        shape = [1 if size is None else size for size in spec.shape[1:]]
        size = (flat.shape[1], prod(shape))
        exact, error = (np.random.default_rng(seed).standard_normal(size) for seed in (SEED, NOISE_SEED))
        output: np.ndarray = flat @ (exact + self.noise * error) / np.sqrt(size[0])
        return output.reshape(-1, *shape).astype(spec.dtype)


def _seconds_per_item(build: Build, plan: Plan) -> float:
    serial = float(build.option("serial", 0.0))
    return float(build.option("seconds_per_item", 0.0)) * (serial + (1 - serial) / plan.threads_per_instance)
