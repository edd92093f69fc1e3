"""Calibration: what the values of a graph were on the samples, and the grids that follow from it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.common.errors import SamplesError
from corewise.quantize import streams
from corewise.quantize.graph import attentions, channel_axis, compute, execute, layer_name, layers, products
from corewise.quantize.observers import OBSERVERS, Observed, QParams, qparams
from corewise.quantize.placement import TARGETS, place, source
from corewise.quantize.simulate import Batch
from corewise.samples import Samples

T = TypeVar("T")


def quantized_values(module: GraphModule) -> tuple[str, ...]:
    """The nodes whose values are rounded in one placement or the other."""
    # The mask of an attention, which may be infinite, is none of them.
    operands = (n for node in (*attentions(module), *products(module)) for n in node.args[:3])
    multiplied = (n.name for n in operands if isinstance(n, Node))
    places = (name for target in TARGETS for name in place(module, target).tensors)
    return tuple(dict.fromkeys((*places, *multiplied)))


class NotFinite(SamplesError):
    """A sample makes a value of the graph NaN or infinite."""

    def __init__(self, node: Node, sample: str = "a calibration sample") -> None:
        what = f"{sample} makes the value of {layer_name(node)} NaN or infinite"
        super().__init__(what, "remove such samples, or repair the model")
        self.node = node


def naming_samples(samples: Samples, look: Callable[[Samples], T]) -> T:
    """What ``look`` makes of the samples; an error about a value that is not finite names the user's own sample."""
    try:
        return look(samples)
    except NotFinite as error:
        for row in range(len(samples)):
            try:
                look(samples.take([row]))
            except NotFinite:
                raise NotFinite(error.node, samples.describe(row)) from error
        raise


def observe(module: GraphModule, names: Sequence[str], samples: Iterable[Batch]) -> dict[str, Observed]:
    """One pass of the samples through the fp32 graph, watching the values ``names``.

    Raises ``SamplesError`` if one of them is NaN or infinite.
    """
    watched = set(names)
    nodes = {node.name: node for node in module.graph.nodes}
    readers = {name: [user for user in nodes[name].users if user in set(layers(module))] for name in watched}
    sums = streams.cut_off(module)
    operands = {operand for pair in sums.values() for operand in pair}
    observed: dict[str, Observed] = {}

    def see(node: Node, value: object) -> None:
        if node.name not in watched or not isinstance(value, Tensor):
            return
        if node.name not in observed:
            axis = channel_axis(value, readers[node.name][0]) if readers[node.name] else min(1, value.dim() - 1)
            observed[node.name] = Observed(axis)
        if not observed[node.name].see(value):
            raise NotFinite(node)

    def step(node: Node, args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
        for operand, own, other in zip(node.args[:2], args[:2], args[1::-1], strict=True) if node in sums else ():
            if isinstance(operand, Node) and operand in sums[node] and operand.name in watched:
                see(operand, streams.felt(own, other))
        value = compute(node, args, kwargs)
        if node not in operands:
            see(node, value)
        return value

    with torch.no_grad():
        for batch in samples:
            execute(module, batch, step)
    return observed


def grids(
    module: GraphModule, names: Sequence[str], observed: Mapping[str, Observed], observer: str
) -> dict[str, QParams]:
    """Each value's grid; values behind a max pooling or reshape have that of the one before it."""
    nodes = {node.name: node for node in module.graph.nodes}
    own = {name: qparams(*OBSERVERS[observer](observed[name])) for name in names}
    return {name: own.get(source(nodes[name]).name, own[name]) for name in names}


def never_varied(module: GraphModule, observed: Mapping[str, Observed]) -> Iterable[str]:
    """A sentence for each value that was the same on all samples, so that its range is a guess."""
    nodes = {node.name: node for node in module.graph.nodes}
    partly_seen = {operand.name for pair in streams.cut_off(module).values() for operand in pair}
    for name, seen in observed.items():
        if seen.low == seen.high and name not in partly_seen:
            value = f"input {name}" if nodes[name].op == "placeholder" else f"the value of {layer_name(nodes[name])}"
            yield f"calibration saw nothing but {seen.low:g} in {value}: its range is a guess"
