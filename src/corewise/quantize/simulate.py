"""A graph run in fp32 as int8 kernels would run it: values read through Q/DQ pairs are rounded to their grids."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.quantize.graph import compute, execute
from corewise.quantize.observers import QParams, fake_quantize

WORTH_DB = 0.1
"""What a correction must win at the simulated outputs to be kept."""
Batch = tuple[Tensor, ...]
See = Callable[[Node, Any], Any]
Edges = Iterable[tuple[str, str]]


class Simulation:
    """Rounds what the consumer of each of ``edges`` reads; weights are as the module has them."""

    def __init__(self, module: GraphModule, edges: Edges, ranges: Mapping[str, QParams]) -> None:
        self.module = module
        self.ranges = ranges
        self.edges = set(edges)

    def run(self, inputs: Batch, see: See = lambda node, value: value) -> tuple[Any, ...]:
        """The outputs for one batch; ``see(node, value)`` gets each value and returns what takes its place."""
        with torch.no_grad():
            return execute(self.module, inputs, lambda *call: see(call[0], self.step(*call)))

    def step(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one node on rounded values."""
        if node.op != "placeholder":
            args = tuple(self.read(node, given, value) for given, value in zip(node.args, args, strict=True))
        return compute(node, args, kwargs)

    def read(self, node: Node, given: Any, value: Any) -> Any:
        """``value`` of the argument ``given`` as ``node`` sees it."""
        if isinstance(given, list | tuple):
            return [self.read(node, g, v) for g, v in zip(given, value, strict=True)]
        if isinstance(given, Node) and (given.name, node.name) in self.edges:
            return fake_quantize(value, self.ranges[given.name])
        return value


def sqnr_db(references: Sequence[tuple[Any, ...]], outputs: Sequence[tuple[Any, ...]]) -> float:
    """10 log10(signal power / error power) over all floating outputs of all batches; 200 for equal ones.

    Counted where the reference is finite (masked scores are -inf); -200 where it is and what was outputs is not.
    """
    signal = error = 0.0
    for expected, got in zip(references, outputs, strict=True):
        for a, b in zip(expected, got, strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                signal += power(a, a)
                error += power(a, a - b)
    if error == 0:
        return 200.0
    if not error < float("inf"):
        return -200.0
    return float(10 * torch.log10(torch.tensor(max(signal, 1e-300) / error, dtype=torch.float64)))


def power(reference: Tensor, value: Tensor) -> float:
    """The sum of squares of ``value`` where ``reference`` is finite."""
    return float(value.double().square().masked_fill(~reference.isfinite(), 0.0).sum())
