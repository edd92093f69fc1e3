"""Biases shifted so that each layer's outputs are right on average."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.quantize.graph import (
    along,
    aten,
    bias,
    channel_axis,
    compute,
    execute,
    parameter,
)
from corewise.quantize.observers import QParams
from corewise.quantize.placement import Placement, limits
from corewise.quantize.simulate import Batch, Simulation

OUTLIER = 1.0
FEWEST_ACTIVE = 300
PLACES = 1 << 14


def correct_bias(
    module: GraphModule,
    reference: GraphModule,
    placement: Placement,
    ranges: Mapping[str, QParams],
    batch: Batch,
) -> int:
    """Shift biases so that each quantized layer's outputs are right on average; returns how many layers were shifted.

    As Nagel et al. 2019 (arXiv:1906.04721, section 4.2), layer after layer, on the outputs of ``reference``, the same
    graph in fp32. Only places where the activation that follows lets the value through are counted, and outliers are
    cut: the plain mean is moved by rare places of great error that a ReLU hides (ResNet-50: 26 dB became 11).
    """
    placed = {layer.node for layer in placement.layers}
    simulation = Simulation(module, placement.edges, ranges)
    twins = {node.name: node for node in reference.graph.nodes}
    pending: dict[str, Node] = {}
    shifted = 0

    def step(node: Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Computes (fp32, simulated) pairs side by side."""
        nonlocal shifted
        firsts, seconds = _unzip(args)
        keys, others = _unzip(tuple(kwargs.values()))
        firsts = _with_parameters(reference, twins[node.name], firsts)
        expected = compute(node, firsts, dict(zip(kwargs, keys, strict=True)))
        layer = pending.pop(node.name, None)
        if layer is not None and isinstance(firsts[0], Tensor) and isinstance(seconds[0], Tensor):
            change = _shift(firsts[0], seconds[0], layer, expected)
            bias(module, layer).add_(change)
            shaped = along(change, seconds[0], channel_axis(seconds[0], layer))
            seconds = (seconds[0] + shaped, *seconds[1:])
            shifted += 1
        simulated = simulation.step(node, seconds, dict(zip(kwargs, others, strict=True)))
        if node.name in placed:
            gate = _gate(node)
            if gate is None:
                change = _shift(expected, simulated, node, None)
                bias(module, node).add_(change)
                simulated = simulated + along(change, simulated, channel_axis(simulated, node))
                shifted += 1
            else:
                pending[gate.name] = node
        return _Pair(expected, simulated)

    with torch.no_grad():
        execute(module, batch, step)
    return shifted


def _with_parameters(module: GraphModule, node: Node, values: tuple[object, ...]) -> tuple[object, ...]:
    """The values of a node's arguments, with the parameters that ``module`` has."""
    if node.op == "placeholder":
        return values
    own = [parameter(module, given) for given in node.args] + [None] * (len(values) - len(node.args))
    return tuple(value if tensor is None else tensor for value, tensor in zip(values, own, strict=True))


class _Pair(tuple[object, object]):
    """A value in fp32 and as simulated."""

    __slots__ = ()

    def __new__(cls, first: object, second: object) -> "_Pair":
        return super().__new__(cls, (first, second))


def _unzip(args: Sequence[object]) -> tuple[tuple[object, ...], tuple[object, ...]]:
    firsts, seconds = [], []
    for arg in args:
        if isinstance(arg, _Pair):
            firsts.append(arg[0])
            seconds.append(arg[1])
        elif isinstance(arg, list | tuple):
            a, b = _unzip(arg)
            firsts.append(list(a))
            seconds.append(list(b))
        else:
            firsts.append(arg)
            seconds.append(arg)
    return tuple(firsts), tuple(seconds)


def _gate(layer: Node) -> Node | None:
    """The activation behind a layer, with at most one add between; ``None`` where something else reads the value."""
    node = layer
    for _ in range(2):
        users = list(node.users)
        if len(users) != 1:
            return None
        if limits(users[0]) is not None:
            return users[0]
        if users[0].target is not aten.add.Tensor:
            return None
        node = users[0]
    return None


def _shift(expected: Tensor, simulated: Tensor, layer: Node, activated: object) -> Tensor:
    """How much each channel of ``simulated`` is too low, over the places that the activation lets through."""
    axis = channel_axis(simulated, layer)
    some = _some_places(simulated, axis)
    error = (expected - simulated).movedim(axis, 0).flatten(1)[:, some]
    if isinstance(activated, Tensor):
        gate = _gate(layer)
        low, high = (limits(gate) if gate is not None else None) or (-float("inf"), float("inf"))
        activated = activated.movedim(axis, 0).flatten(1)[:, some]
        open_ = (activated > low) & (activated < high)
    else:
        open_ = torch.ones_like(error, dtype=torch.bool)
    count = open_.sum(1)
    spread = (error.abs() * open_).sum(1) / count.clamp(min=1) * OUTLIER
    trimmed = torch.minimum(torch.maximum(error, -spread[:, None]), spread[:, None])
    enough = count > min(FEWEST_ACTIVE, error.shape[1] // 2)
    return (trimmed * open_).sum(1) / count.clamp(min=1) * enough


def _some_places(value: Tensor, axis: int) -> slice:
    """Evenly spaced places of each channel, up to ``PLACES``."""
    return slice(None, None, max(1, value.numel() // value.shape[axis] // PLACES))
