"""An engine of one's own: small multilayer perceptrons in NumPy, without PyTorch where they run.

    PYTHONPATH=examples corewise optimize model.py:build --samples data.py:samples \
        --engine custom_engine:NumpyMlp -o mlp.cw

corewise finds the class by ``module:class``, so its module must be on Python's path.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from corewise.common.errors import EngineError
from corewise.engines.base import BuildInputs
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu

NAME = "custom_engine:NumpyMlp"
LINEAR, RELU = "aten.linear.default", "aten.relu.default"
WEIGHTS = "mlp.safetensors"


class NumpyMlp:
    """Linear layers and ReLUs in a row, in fp32."""

    def unavailable(self, opening: bool = False) -> str:
        """Why it cannot be used here: NumPy is always there."""
        return ""

    def candidates(self, cpu: Cpu, operators: dict[str, int]) -> tuple[Build, ...]:
        """One build, for programs that have no other operators."""
        return (Build(engine=NAME, precision="fp32"),) if set(operators) == {LINEAR, RELU} else ()

    def needs(self, build: Build) -> tuple[str, ...]:
        """Extensions that the CPU must have: none."""
        return ()

    def build(self, material: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
        """Write the layers' weights, in order; ``k.relu`` marks the layers that a ReLU follows."""
        from corewise.source import load_program

        program = load_program(material.program)
        names = program.graph_signature.inputs_to_parameters
        layers: dict[str, np.ndarray] = {}
        count, last = 0, None
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if last is not None and node.args[0] is not last:
                raise EngineError("the layers do not follow each other", "leave this engine out")
            if str(node.target) == LINEAR:
                for key, argument in zip(("weight", "bias"), node.args[1:], strict=False):
                    layers[f"{count}.{key}"] = program.state_dict[names[argument.name]].numpy()
                count += 1
            else:
                layers[f"{count - 1}.relu"] = np.ones((), bool)
            last = node
        save_file(layers, folder / WEIGHTS)
        return (f"{count} layers in NumPy",)

    def open(self, folder: Path, build: Build, plan: Plan) -> "NumpySession":
        """Read the weights."""
        return NumpySession(load_file(folder / WEIGHTS))

    def receipt(self, folder: Path, build: Build, plan: Plan, inputs: Sequence[np.ndarray]) -> Receipt | None:
        """Nothing runs in int8."""
        return None


class NumpySession:
    """The layers, ready to run."""

    def __init__(self, layers: dict[str, np.ndarray]) -> None:
        self._layers = layers

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float32 (N, features) -> float32 (N, outputs)."""
        (values,) = inputs
        count = 0
        while (weight := self._layers.get(f"{count}.weight")) is not None:
            values = values @ weight.T + self._layers.get(f"{count}.bias", np.float32(0))
            if f"{count}.relu" in self._layers:
                values = np.maximum(values, 0)
            count += 1
        return [values]

    def close(self) -> None:
        """Free the weights."""
        self._layers = {}
