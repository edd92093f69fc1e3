"""Channels given similar ranges: equalization between layers, and SmoothQuant where nothing absorbs a factor."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.quantize.graph import (
    LINEARS,
    TRANSPOSED,
    along,
    arguments,
    aten,
    bias,
    group_count,
    layers,
    parameter,
    root,
    weight,
)
from corewise.quantize.observers import LEVELS, Channels
from corewise.quantize.placement import Placement, limits

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CAP_MARGIN = 1.6
EQUALIZING_WORTH = 0.02
SMOOTHING_WORTH = 0.2
HOMOGENEOUS = (
    *(aten.relu.default, aten.max_pool2d.default, aten.avg_pool2d.default),
    *(aten.adaptive_avg_pool2d.default, aten.mean.dim, aten.flatten.using_ints),
)
CAPPED = (aten.hardtanh.default, aten.relu6.default)


def equalize(module: GraphModule, placement: Placement, observed: Mapping[str, Channels], bits: int) -> int:
    """Give the channels of quantized values similar ranges; returns how many groups of layers were rescaled.

    A channel is divided by a factor in the layers that make it and multiplied back in those that read it: cross-layer
    equalization (Nagel et al. 2019, arXiv:1906.04721) through ReLUs, poolings and residual adds, with SmoothQuant's
    split between values and weights (Xiao et al. 2022, arXiv:2211.10438), whose strength is the one of least expected
    error. A ReLU6 keeps its bound by scaling channels up only, as far as calibration saw them stay below it.
    """
    changed = 0
    names = set(placement.tensors)
    for group in _groups(module, names):
        factors = _factors(module, group, observed, bits)
        if factors is None:
            continue
        changed += 1
        for node in group.makers:
            _scale_outputs(module, node, 1 / factors)
        for node in group.readers:
            _scale_inputs(module, node, factors)
    return changed


class _Group:
    """Values whose channels share their factors, the layers that make them and those that read them."""

    def __init__(self, values: list[Node], makers: list[Node], readers: list[Node], capped: bool) -> None:
        self.values, self.makers, self.readers, self.capped = values, makers, readers, capped


def _groups(module: GraphModule, names: set[str]) -> Iterator[_Group]:
    parents: dict[Node, Node] = {}
    own = set(layers(module))
    fixed: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            fixed.add(node)
        elif node.op == "output":
            fixed.update(node.all_input_nodes)
        elif node.op == "call_function" and node not in own:
            if node.target in (*HOMOGENEOUS, *CAPPED) and _per_channel(node):
                parents[root(parents, node)] = root(parents, node.all_input_nodes[0])
            elif node.target is aten.add.Tensor and _same_shape(node):
                for operand in node.all_input_nodes:
                    parents[root(parents, operand)] = root(parents, node)
            elif node.target is aten.layer_norm.default and _normalizes_last(module, node):
                fixed.update(node.all_input_nodes)
            else:
                fixed.update((node, *node.all_input_nodes))
    members: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            members.setdefault(root(parents, node), []).append(node)
    stuck = {root(parents, node) for node in fixed}
    for head, nodes in members.items():
        inside = set(nodes)
        makers = [n for n in nodes if n in own or n.target is aten.layer_norm.default]
        readers = [n for n in own if n.args[0] in inside]
        values = [n for n in nodes if n.name in names]
        plain = not any(n.target in TRANSPOSED or not _plain_or_depthwise(module, n) for n in readers)
        sources = not any(n.target in TRANSPOSED for n in makers)
        if head not in stuck and makers and readers and values and plain and sources and _one_axis(makers, readers):
            yield _Group(values, makers, readers, any(n.target in CAPPED for n in nodes))


def _plain_or_depthwise(module: GraphModule, node: Node) -> bool:
    own = weight(module, node)
    return group_count(node) == 1 or (own.shape[1] == 1 and group_count(node) == own.shape[0])


def _one_axis(makers: Sequence[Node], readers: Sequence[Node]) -> bool:
    """Whether all count channels along one axis: linears and layer norms the last one, convolutions the second."""
    ends = [(node, node.meta.get("val")) for node in makers] + [
        (node, node.all_input_nodes[0].meta.get("val")) for node in readers
    ]
    lasts = [
        node.target in LINEARS or node.target is aten.layer_norm.default
        for node, value in ends
        if not (isinstance(value, Tensor) and value.dim() == 2)
    ]
    return len(set(lasts)) <= 1


def _per_channel(node: Node) -> bool:
    """Whether the node leaves channels, axis 1, alone."""
    value, out = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(out, Tensor):
        return False
    if node.target is aten.flatten.using_ints:
        return value.dim() == 4 and tuple(value.shape[2:]) == (1, 1) and out.dim() == 2
    if node.target is aten.mean.dim:
        return value.dim() == 4 and {dim % 4 for dim in arguments(node)["dim"] or ()} == {2, 3}
    if node.target in CAPPED and limits(node) != (0.0, 6.0):
        return False
    return value.dim() == 4


def _same_shape(node: Node) -> bool:
    tensors = [n.meta.get("val") for n in node.args[:2] if isinstance(n, Node)]
    shapes = [tuple(map(str, value.shape)) for value in tensors if isinstance(value, Tensor)]
    return len(shapes) == 2 and shapes[0] == shapes[1] and arguments(node).get("alpha", 1) == 1 and len(shapes[0]) == 4


def _normalizes_last(module: GraphModule, node: Node) -> bool:
    args = arguments(node)
    own = [args["weight"], args["bias"]]
    return all(
        (tensor := parameter(module, read)) is not None
        and tensor.dim() == 1
        and sum(str(other.target) == str(read.target) for other in module.graph.nodes if other.op == "get_attr") == 1
        and len(read.users) == 1
        for read in own
    )


def _factors(
    module: GraphModule, group: _Group, observed: Mapping[str, Channels], bits: int, worth: float = EQUALIZING_WORTH
) -> Tensor | None:
    """The factors of least expected error; ``None`` where they win less than the share ``worth`` of it."""
    seen = [observed[node.name] for node in group.values if node.name in observed]
    widths = {len(channels.high) for channels in seen}
    if len(widths) != 1 or not widths.pop() > 1:
        return None
    largest = torch.stack([torch.maximum(channels.high, -channels.low) for channels in seen]).amax(0)
    if not float(largest.max()) > 0:
        return None
    largest = largest.clamp(min=1e-4 * float(largest.max()))
    columns = torch.stack([_columns(module, node) for node in group.readers]).amax(0).clamp(min=1e-8)
    if len(columns) != len(largest):
        return None

    def cost(factors: Tensor) -> float:
        return sum(_expected_error(module, node, observed, factors, bits) for node in group.readers)

    candidates = []
    for strength in STRENGTHS if group.makers else STRENGTHS[:-1]:
        for balance in (0.0, 0.25, 0.5):
            factors = largest**strength / columns**balance
            if group.capped:
                factors = torch.maximum(factors / factors.max(), largest * CAP_MARGIN / 6).clamp(max=1.0)
            else:
                factors = factors / factors.log().mean().exp()
            candidates.append((cost(factors), factors))
    best, factors = min(candidates, key=lambda pair: pair[0])
    return factors if best < (1 - worth) * cost(torch.ones_like(largest)) else None


def _columns(module: GraphModule, reader: Node) -> Tensor:
    """The largest weight on each input channel."""
    own = weight(module, reader).abs()
    return (
        own.flatten(1).amax(1)
        if group_count(reader) > 1
        else own.amax(0).flatten(1).amax(1)
        if own.dim() > 2
        else own.amax(0)
    )


def _expected_error(
    module: GraphModule, reader: Node, observed: Mapping[str, Channels], factors: Tensor, bits: int
) -> float:
    """The reader's expected output error over its output power, for uniform rounding noise of step / sqrt(12)."""
    assert isinstance(reader.args[0], Node)
    seen = observed.get(reader.args[0].name)
    if seen is None:
        return 0.0
    top = 2 ** (bits - 1) - 1
    step = float((seen.high / factors).max().clamp(min=0) - (seen.low / factors).min().clamp(max=0)) / LEVELS
    power = seen.mean_square / factors.square()
    own = weight(module, reader).flatten(2) if weight(module, reader).dim() > 2 else weight(module, reader).unsqueeze(2)
    if group_count(reader) > 1:
        scaled = own[:, 0] * factors[:, None]
        noise = (
            step**2 / 12 * scaled.square().sum()
            + ((scaled.abs().amax(1) / top).square() / 12 * power).sum() * own.shape[2]
        )
        return float(noise / (scaled.square().sum(1) * power).sum().clamp(min=1e-30))
    scaled = own * factors[:, None]
    steps = scaled.abs().amax((1, 2)) / top
    noise = step**2 / 12 * scaled.square().sum() + steps.square().sum() / 12 * power.sum() * own.shape[2]
    return float(noise / (scaled.square().sum((0, 2)) @ power).clamp(min=1e-30))


def smooth(module: GraphModule, placement: Placement, observed: Mapping[str, Channels], bits: int) -> tuple[str, ...]:
    """Divide outlier channels where nothing can absorb the factor; returns the names of the values that were divided.

    SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) for linears whose input also goes elsewhere or comes from a GELU:
    behind the value stands a product with one factor a channel (``divide``), which engines run inside the operator
    before it. As it is not free, it must lower the expected error of the linears by a fifth.
    """
    names = {layer.node for layer in placement.layers}
    divided = []
    for node in list(module.graph.nodes):
        readers = _linear_readers(module, node)
        if node.name not in observed or not any(reader.name in names for reader in readers):
            continue
        factors = _factors(module, _Group([node], [], readers, False), observed, bits, worth=SMOOTHING_WORTH)
        if factors is not None:
            divide(module, node, factors)
            for reader in readers:
                _scale_inputs(module, reader, factors)
            divided.append(node.name)
    return tuple(divided)


def divide(module: GraphModule, value: Node, factors: Tensor) -> None:
    """Let the linears that read ``value`` read it divided by ``factors``, one for each channel, the last axis."""
    readers = _linear_readers(module, value)
    name = f"{value.name}_smooth"
    module.register_parameter(name, torch.nn.Parameter(1 / factors, requires_grad=False))
    with module.graph.inserting_after(value):
        read = module.graph.get_attr(name)
    with module.graph.inserting_after(read):
        product = module.graph.call_function(aten.mul.Tensor, (value, read))
    product.name = f"{value.name}_smoothed"
    product.meta = {key: value.meta[key] for key in ("val", "nn_module_stack") if key in value.meta}
    for reader in readers:
        reader.replace_input_with(value, product)
    module.recompile()


def _linear_readers(module: GraphModule, value: Node) -> list[Node]:
    return [user for user in value.users if user.target in LINEARS and parameter(module, user.args[1]) is not None]


def _scale_outputs(module: GraphModule, node: Node, factors: Tensor) -> None:
    if node.target is aten.layer_norm.default:
        for name in ("weight", "bias"):
            own = parameter(module, arguments(node)[name])
            assert own is not None
            own.mul_(factors)
        return
    own = weight(module, node)
    own.mul_(along(factors, own, 0))
    bias(module, node).mul_(factors)


def _scale_inputs(module: GraphModule, node: Node, factors: Tensor) -> None:
    own = weight(module, node)
    axis = 0 if group_count(node) > 1 else 1
    own.mul_(along(factors, own, axis))
