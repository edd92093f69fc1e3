"""What each quantized layer costs in accuracy, and the order in which layers go back to floating point."""

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from corewise.quantize.balance import Balance
from corewise.quantize.convert import with_qdq
from corewise.quantize.graph import (
    LAYERS,
    TRANSPOSED,
    arguments,
    compute,
    execute,
    layer_name,
    layers,
    parameter,
    weight,
)
from corewise.quantize.placement import Layer, Placement, Target, place
from corewise.quantize.quantized import Quantized
from corewise.quantize.simulate import Batch, Simulation, power
from corewise.records.build import TensorSpec

EQUAL_DB = 200.0
LEAST_COST = 0.1
"""Share of the mean cost of a layer: below it, times are noise, and a ratio to them says nothing."""


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What one quantized layer costs and saves.

    Errors are error power over signal power, summed over all floating-point outputs, of which every group of channels
    counts alike (``balance.Balance``); ``*_db`` is the same as signal over error in decibels.
    """

    name: str
    """The user's name of the module; one that runs several times is one layer, as ``placement.place`` takes it."""
    kind: Literal["convolution", "linear"]
    alone: float
    """The error when this layer alone is quantized."""
    without: float
    """The error when every layer but this one is quantized."""
    everything: float
    """The error when every layer is quantized: the same for all layers of a model."""
    multiply_adds: int
    """How many the layer has for one item."""
    saves_ms: float | None = None
    """Time of the layer in fp32 less that in int8, for a batch; ``None`` where it was not measured."""

    @property
    def won_back(self) -> float:
        """The error that goes away when the layer returns to floating point; below 0 where it grows."""
        return self.everything - self.without

    @property
    def alone_db(self) -> float:
        """``alone`` in decibels."""
        return decibels(self.alone)

    @property
    def without_db(self) -> float:
        """``without`` in decibels."""
        return decibels(self.without)

    @property
    def everything_db(self) -> float:
        """``everything`` in decibels."""
        return decibels(self.everything)


def decibels(error: float) -> float:
    """An error relative to the signal as signal over error in dB, as ``simulate.sqnr_db`` has it.

    200 for none, and -200 for one that is infinite or NaN.
    """
    if error == 0:
        return EQUAL_DB
    return -10 * math.log10(error) if error < math.inf else -EQUAL_DB


def measure_sensitivity(
    quantized: Quantized, batches: Iterable[Batch], target: Target = "fused"
) -> tuple[LayerSensitivity, ...]:
    """The errors that each quantized layer, alone and all but it, adds to the outputs of the program before any change.

    Layers come in the order they run; ``saves_ms`` stays ``None``. "Quantized" is what ``Quantized.placed`` builds: the
    corrected and rounded weights, the values that the layer reads rounded, and a residual add's operand where it is
    then shared; a layer that is not has its own weights. What ``place`` keeps in floating point is so in all cases.

    One pass: of each batch every value is kept once in floating point and once quantized, and for each layer only
    the nodes behind it run again, twice. With n layers that is about n times the work of the fp32 program (half of n
    for each of the two errors), linear in samples. Memory holds all values of one batch twice, however many there are.
    """
    trials = _trials(quantized, target)
    signal = 0.0
    errors: dict[tuple[str, str], float] = {}
    counts: dict[str, int] = {}
    items = 0
    with torch.no_grad():
        given = list(batches)
        balance = Balance([execute(quantized.reference, batch, compute) for batch in given])
        for batch in given:
            items += len(batch[0])
            expected = balance(execute(quantized.reference, batch, compute))
            signal += _power(expected)
            stored: dict[str, dict[Node, Any]] = {"alone": {}, "without": {}}
            for key, trial in trials.items():
                outputs = balance(trial.run(batch, stored[key[0]]))
                errors[key] = errors.get(key, 0.0) + _power(expected, outputs)
            for name, count in _multiply_adds(quantized.module, stored["without"]).items():
                counts[name] = counts.get(name, 0) + count
    signal = max(signal, 1e-300)
    return tuple(
        LayerSensitivity(
            name=name,
            kind=members[0].kind,
            alone=errors["alone", name] / signal,
            without=errors["without", name] / signal,
            everything=errors["without", ""] / signal,
            multiply_adds=round(sum(counts[layer.node] for layer in members) / max(1, items)),
        )
        for name, members in _by_name(place(quantized.module, target)).items()
    )


def saving(
    layers: Sequence[LayerSensitivity], before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[LayerSensitivity, ...]:
    """The layers, in the order they run, with ``saves_ms`` from their times in fp32 and in int8.

    A layer that lacks one of the two ran in the kernel of the layer before it: what both save is shared by their
    multiply-adds.
    """
    groups: list[list[LayerSensitivity]] = []
    for layer in layers:
        if not groups or (layer.name in before and layer.name in after):
            groups.append([])
        groups[-1].append(layer)
    timed = []
    for group in groups:
        saved = sum(before.get(layer.name, 0.0) - after.get(layer.name, 0.0) for layer in group)
        known = any(layer.name in before and layer.name in after for layer in group)
        whole = max(1, sum(layer.multiply_adds for layer in group))
        timed += [replace(layer, saves_ms=saved * layer.multiply_adds / whole if known else None) for layer in group]
    return tuple(timed)


def order_of_return(rows: Sequence[LayerSensitivity]) -> tuple[str, ...]:
    """The layers' names in the order in which they should go back to floating point.

    By error won back over milliseconds lost (``saves_ms``; where any layer's was not measured, over multiply-adds). A
    layer that saves next to nothing counts as a tenth of the mean: it comes early, but not for noise alone. Layers
    that win nothing back come last, those that harm least first.
    """
    if any(row.saves_ms is None for row in rows):
        costs = [float(row.multiply_adds) for row in rows]
    else:
        costs = [max(0.0, row.saves_ms or 0.0) for row in rows]
    least = LEAST_COST * sum(costs) / max(1, len(costs)) or 1.0
    worth = {
        row.name: row.won_back / max(cost, least) if row.won_back > 0 else row.won_back
        for row, cost in zip(rows, costs, strict=True)
    }
    return tuple(sorted(worth, key=lambda name: -worth[name]))


def floating(quantized: Quantized, inputs: Sequence[TensorSpec], example: Batch) -> ExportedProgram:
    """The program before any change, exported as ``lower`` exports the quantized one, to compare their times."""
    nothing = Placement(layers=(), edges=(), kept=())
    return with_qdq(copy.deepcopy(quantized.reference), nothing, {}, {}, quantized.recipe.weight_bits, inputs, example)


def nodes_by_layer(quantized: Quantized, program: ExportedProgram) -> dict[str, str]:
    """The user's names of the layers by the names that the ONNX export of ``program`` gives their outputs.

    ``program`` is an export of ``quantized`` (``floating``, ``lower``). Empty where a layer was lost on the way.
    Exporting numbers nodes again and keeps their order. The ONNX exporter keeps their names, except of transposed
    convolutions, which it decomposes to ``convolution``, ``convolution_1`` and so on.
    """
    ours = [layer_name(node) for node in quantized.module.graph.nodes if node.target in LAYERS]
    theirs = [node for node in program.graph.nodes if node.target in LAYERS]
    if len(ours) != len(theirs):
        return {}
    transposed = [node for node in theirs if node.target in TRANSPOSED]
    renamed = {node: f"convolution_{k}" if k else "convolution" for k, node in enumerate(transposed)}
    return {renamed.get(node, node.name): name for node, name in zip(theirs, ours, strict=True)}


class _Trial:
    """The graph with some layers quantized, run from the values of a whole run on.

    The first run (``base`` is ``None``) fills the store; others compute only what lies behind what they change.
    """

    def __init__(
        self, quantized: Quantized, target: Target, placement: Placement, base: "_Trial | None" = None
    ) -> None:
        module = quantized.module
        self._rounded = {layer.node for layer in placement.layers}
        self._simulation = Simulation(module, placement.edges, quantized.ranges[target])
        self._plain = _parameters(quantized.plain)
        self._changed: set[Node] | None = None
        if base is not None:
            edges = self._simulation.edges ^ base._simulation.edges
            seeds = {consumer for _, consumer in edges} | (self._rounded ^ base._rounded)
            self._changed = _behind(module, seeds)

    def run(self, batch: Batch, stored: dict[Node, Any]) -> tuple[Any, ...]:
        """The outputs for one batch."""

        def step(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._changed is not None and node not in self._changed:
                return stored[node]
            if node.name in self._plain and node.name not in self._rounded:
                args = (args[0], *self._plain[node.name][: len(args) - 1], *args[3:])
            value = self._simulation.step(node, args, kwargs)
            if self._changed is None:
                stored[node] = value
            return value

        return execute(self._simulation.module, batch, step)


def _trials(quantized: Quantized, target: Target) -> dict[tuple[str, str], _Trial]:
    """By the name of what is measured and of the layer; the whole runs, whose values the others use, have none."""
    module = quantized.module
    full = place(module, target)
    # Kept layers are in ``full.kept`` for another reason than being ignored; naming them again changes nothing.
    names = list(dict.fromkeys(layer_name(node) for node in layers(module)))
    nothing = _Trial(quantized, target, Placement(layers=(), edges=(), kept=()))
    everything = _Trial(quantized, target, full)
    trials = {("alone", ""): nothing, ("without", ""): everything}
    for name in _by_name(full):
        others = [re.escape(other) for other in names if other != name]
        trials["alone", name] = _Trial(quantized, target, place(module, target, others), nothing)
        trials["without", name] = _Trial(quantized, target, place(module, target, [re.escape(name)]), everything)
    return trials


def _by_name(placement: Placement) -> dict[str, list[Layer]]:
    members: dict[str, list[Layer]] = {}
    for layer in placement.layers:
        members.setdefault(layer.name, []).append(layer)
    return members


def _parameters(module: GraphModule) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of each layer by its node's name."""
    return {node.name: (weight(module, node), parameter(module, arguments(node)["bias"])) for node in layers(module)}


def _behind(module: GraphModule, seeds: set[str]) -> set[Node]:
    """The nodes named in ``seeds`` and all whose values depend on theirs."""
    behind: set[Node] = set()
    for node in module.graph.nodes:
        if node.name in seeds or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    return behind


def _power(expected: Sequence[Any], outputs: Sequence[Any] | None = None) -> float:
    """The sum of squares of the floating-point outputs, or of their differences."""
    total = 0.0
    for index, value in enumerate(expected):
        if isinstance(value, Tensor) and value.is_floating_point():
            total += power(value, value if outputs is None else value - outputs[index])
    return total


def _multiply_adds(module: GraphModule, values: Mapping[Node, Any]) -> dict[str, int]:
    """Products that each layer sums for the batch whose values are given, by its node's name."""
    counts = {}
    for node in layers(module):
        # Every output of a convolution sums one filter; every input of a transposed one meets one.
        over = values[node.all_input_nodes[0]] if node.target in TRANSPOSED else values[node]
        counts[node.name] = over.numel() * weight(module, node)[0].numel()
    return counts
