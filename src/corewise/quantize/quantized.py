"""What quantization makes of a program, and the program with Q/DQ pairs that engines read."""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from corewise.common.errors import EngineError
from corewise.quantize.convert import with_qdq
from corewise.quantize.graph import bias, layers, products, split_attention, weight
from corewise.quantize.observers import LEVELS, QParams
from corewise.quantize.placement import Placement, Target, place
from corewise.quantize.simulate import Batch
from corewise.records.build import TensorSpec
from corewise.records.jsonable import to_json
from corewise.samples import Samples

CALIBRATION_BATCH = 8
CORRECTIONS = ("equalize", "smooth", "rounding", "bias", "streams")
SHARES = QParams(scale=1 / LEVELS, zero_point=0)
"""The grid of a softmax's output."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize."""

    weight_bits: int = 8
    """7 for CPUs that add int8 products in 16 bits (``Cpu.int8_dot``)."""
    observers: tuple[str, ...] = ("mse", "minmax")
    """Names in ``observers.OBSERVERS``; the one with the best outputs is kept."""
    corrections: tuple[str, ...] = CORRECTIONS
    """Those to try; each is kept if it pays."""

    @property
    def key(self) -> str:
        """A short name for files."""
        return short_hash(to_json(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """A calibrated and corrected graph."""

    module: GraphModule
    """fp32 weights on their int8 grids."""
    plain: GraphModule
    """The same graph with weights that are not rounded, for layers that stay in floating point."""
    reference: GraphModule
    """The graph before any change."""
    ranges: dict[Target, dict[str, QParams]]
    scales: dict[str, Tensor]
    """The weights' scales by the layer's node: one for each output channel."""
    smoothed: tuple[str, ...]
    """Values behind which ``corrections.divide`` put a product."""
    recipe: Recipe
    sqnr_db: float
    """SQNR of the simulated outputs for the judging samples, target ``fused``."""
    warnings: tuple[str, ...]
    """Doubts about the samples or the model, in words."""
    notes: tuple[str, ...]
    """What was decided, in words."""

    def placed(
        self, target: Target, ignored: Sequence[str] = (), attention: bool = False
    ) -> tuple[GraphModule, Placement, dict[str, QParams]]:
        """A copy of the graph, where its pairs stand, and the grids of the values that go through them.

        The ``ignored`` layers have their own weights again. With ``attention`` the products in attentions are in the
        graph and placed. Raises as ``placement.place`` does.
        """
        module = copy.deepcopy(self.module)
        operands = split_attention(module) if attention else {}
        placement = place(module, target, ignored, attention)
        ranges = dict(self.ranges[target])
        for name, same in operands.items():
            if same is None or same in ranges:
                ranges[name] = SHARES if same is None else ranges[same]
        rounded = {layer.node for layer in placement.layers}
        twins = {node.name: node for node in layers(self.plain)}
        with torch.no_grad():
            for node in layers(module):
                if node.name not in rounded:
                    weight(module, node).copy_(weight(self.plain, twins[node.name]))
                    bias(module, node).copy_(bias(self.plain, twins[node.name]))
        return module, placement, ranges


def lower(
    quantized: Quantized,
    target: Target,
    inputs: Sequence[TensorSpec],
    example: Batch,
    ignored: Sequence[str] = (),
    attention: bool = False,
) -> ExportedProgram:
    """The program with Q/DQ pairs where engines of the kind ``target`` want them; dynamic batch.

    The ``ignored`` layers stay in floating point: names or regular expressions; with ``attention`` products of two
    activations are quantized too (``placement.place``). Raises ``EngineError`` if no layer is left to quantize, or
    one of ``ignored`` matches nothing.
    """
    module, placement, ranges = quantized.placed(target, ignored, attention)
    if not placement.layers:
        raise EngineError("every convolution and linear layer is ignored", "ignore less, or use another precision")
    if attention and not products(module):
        raise EngineError("there is no attention whose products can be int8", "leave the option attention out")
    return with_qdq(module, placement, ranges, quantized.scales, quantized.recipe.weight_bits, inputs, example)


def batches(samples: Samples, size: int = CALIBRATION_BATCH) -> Iterable[Batch]:
    """The samples as tensors, for calls of at most ``size`` rows, or of ``samples.call_rows``."""
    for _, arrays in samples.batches(samples.call_rows or size):
        yield tuple(torch.from_numpy(_filled(array, samples.call_rows)) for array in arrays)


def _filled(array: NDArray[Any], rows: int | None) -> NDArray[Any]:
    """A copy, with its rows repeated up to ``rows``."""
    return array.copy() if rows is None else np.resize(array, (rows, *array.shape[1:]))


def short_hash(value: object) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value in the name of a file."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
