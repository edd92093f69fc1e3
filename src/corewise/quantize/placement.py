"""Where Q/DQ pairs stand in a graph, for each kind of engine.

``fused`` follows oneDNN's fusions (OpenVINO, inductor): inputs of convolutions and linears are quantized, and the
convolution before a residual add stays unquantized, because its kernel adds the other operand itself. ``everywhere``
is what ONNX Runtime's QDQ fusions ask for: a pair after every convolution and on both inputs of an add, pooling or
concatenation, or else the convolution runs in fp32.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.fx import GraphModule, Node

from corewise.common.errors import EngineError
from corewise.quantize.graph import (
    CONVOLUTIONS,
    LAYERS,
    LINEARS,
    TRANSPOSED,
    arguments,
    aten,
    attentions,
    group_count,
    is_float,
    layer_name,
    layers,
    products,
)

Target = Literal["fused", "everywhere"]
TARGETS: tuple[Target, ...] = ("fused", "everywhere")

ACTIVATIONS = (aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default)
"""Run inside the kernel of the layer before them."""
SUMS = (aten.add.Tensor, aten.mul.Tensor)
GATES = (
    *(aten.sigmoid.default, aten.hardsigmoid.default, aten.silu.default, aten.hardswish.default),
    *(aten.gelu.default, aten.leaky_relu.default),
)
POOLS = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
JOINS = (aten.cat.default,)
MOVES = (
    *(aten.max_pool2d.default, aten.max_pool1d.default, aten.flatten.using_ints, aten.view.default),
    *(aten.reshape.default, aten.transpose.int, aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default),
    *(aten.slice.Tensor, aten.chunk.default, aten.split.Tensor, aten.clone.default, aten.contiguous.default),
)
"""Their outputs have no value that their input lacks: both sides share one range."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear whose weight and input are quantized."""

    node: str
    name: str
    """The user's name of the module."""
    kind: Literal["convolution", "linear"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which values are quantized, by names of the graph's nodes."""

    layers: tuple[Layer, ...]
    edges: tuple[tuple[str, str], ...]
    """(producer, consumer): the consumer reads the producer's value through a Q/DQ pair."""
    kept: tuple[tuple[str, str], ...]
    """(layer name, why) of those that stay in floating point."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The producers whose values are quantized."""
        return tuple(dict.fromkeys(producer for producer, _ in self.edges))


def place(module: GraphModule, target: Target, ignored: Sequence[str] = (), attention: bool = False) -> Placement:
    """The placement for engines of the kind ``target``; with ``attention`` for products of two activations too.

    ``ignored`` keeps layers in floating point: names as ``layer_name`` gives them, else regular expressions that match
    a whole name. Raises ``EngineError`` for one that matches nothing or is no expression.
    """
    weighted = layers(module)
    multiplied = products(module)
    left_out = _matching({layer_name(node) for node in (*weighted, *multiplied, *attentions(module))}, ignored)
    kept: dict[str, str] = {}
    chosen: list[Node] = []
    for node in weighted:
        why = "ignored" if layer_name(node) in left_out else _unquantizable(node)
        if why:
            kept[layer_name(node)] = why
        else:
            chosen.append(node)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in LAYERS and node not in weighted:
            kept[layer_name(node)] = "its weight is computed, not a parameter"
    edges: dict[tuple[Node, Node], None] = {}
    for node in chosen:
        _quantize_input(node, edges)
    if target == "everywhere":
        _surround(module, chosen, edges)
    else:
        _share_residuals(module, chosen, edges)
    for node in multiplied:
        if attention and layer_name(node) not in left_out:
            edges |= {(operand, node): None for operand in node.all_input_nodes}
    return Placement(
        layers=tuple(
            Layer(node=n.name, name=layer_name(n), kind="linear" if n.target in LINEARS else "convolution")
            for n in chosen
        ),
        edges=tuple((producer.name, consumer.name) for producer, consumer in edges),
        kept=tuple(kept.items()),
    )


def final(layer: Node) -> Node:
    """The node whose output leaves the layer's kernel: its activation, where that is its only user."""
    user = next(iter(layer.users), None)
    return user if user is not None and len(layer.users) == 1 and user.target in ACTIVATIONS else layer


def source(node: Node) -> Node:
    """The node whose range a value has: behind moves, the one that made it."""
    while node.target in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _matching(names: set[str], patterns: Iterable[str]) -> set[str]:
    matched = set()
    for pattern in patterns:
        try:
            named = {pattern} & names or {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise EngineError(
                f"ignored layer {pattern!r} is not a regular expression: {error}", "escape it, or name the layer"
            ) from error
        if not named:
            raise EngineError(
                f"ignored layer {pattern!r} matches no layer",
                f"use names as corewise explain lists them, e.g. {', '.join(sorted(names)[:3])}",
            )
        matched |= named
    return matched


def _unquantizable(node: Node) -> str:
    if node.target in TRANSPOSED and group_count(node) > 1:
        return "no engine has an int8 kernel for transposed convolutions in groups"
    if not isinstance(node.args[0], Node) or not is_float(node.args[0]):
        return "its input is not floating point"
    return ""


def _quantize_input(layer: Node, edges: dict[tuple[Node, Node], None]) -> None:
    """A pair on the layer's input; in front of a max pooling too, which then runs in int8."""
    consumer, producer = layer, layer.all_input_nodes[0]
    edges[producer, consumer] = None
    while producer.target is aten.max_pool2d.default:
        consumer, producer = producer, producer.all_input_nodes[0]
        edges[producer, consumer] = None


def _share_residuals(module: GraphModule, chosen: Sequence[Node], edges: dict[tuple[Node, Node], None]) -> None:
    """An add reads the operand that is quantized anyway from its int8 copy; the other stays in its kernel."""
    quantized = {producer for producer, _ in edges}
    fusable = {layer for layer in chosen if len(layer.users) == 1 and layer.target in CONVOLUTIONS}
    for node in module.graph.nodes:
        if node.target is not aten.add.Tensor or not fusable.intersection(node.all_input_nodes):
            continue
        for operand in node.all_input_nodes:
            if operand in quantized and operand not in fusable:
                edges[operand, node] = None


def _surround(module: GraphModule, chosen: Sequence[Node], edges: dict[tuple[Node, Node], None]) -> None:
    """Pairs after every convolution, and around what runs in int8 between them."""
    inside = dict.fromkeys(final(layer) for layer in chosen if layer.target in CONVOLUTIONS)
    for producer in list(inside):
        for user in producer.users:
            edges[producer, user] = None
    for node in module.graph.nodes:
        operands = [n for n in node.all_input_nodes if is_float(n)]
        follows = bool(operands) and all(operand in inside for operand in operands)
        if node.op != "call_function" or not follows or not _all_tensors(node):
            continue
        if node.target in (*SUMS, *JOINS, *POOLS, *GATES):
            for operand in operands:
                edges[operand, node] = None
            out = final(node) if node.target in SUMS else node
            inside[out] = None
            for user in out.users:
                edges[out, user] = None
        elif node.target in MOVES or node.target in ACTIVATIONS:
            inside[node] = None
            for user in node.users:
                edges[node, user] = None
    for producer, user in list(edges):
        if user.op == "output" or not is_float(producer):
            del edges[producer, user]


def _all_tensors(node: Node) -> bool:
    """Whether no operand of a sum is a constant number."""
    return node.target not in SUMS or all(isinstance(arg, Node) for arg in node.args[:2])


def limits(node: Node) -> tuple[float, float] | None:
    """The lower and upper bound of an activation's output; ``None`` for anything else."""
    if node.target is aten.relu.default:
        return 0.0, float("inf")
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        args = [value for value in list(arguments(node).values())[1:3] if not isinstance(value, Node)]
        low, high = [*args, None, None][:2]
        return (-float("inf") if low is None else float(low)), (float("inf") if high is None else float(high))
    return None
