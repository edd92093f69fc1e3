"""Residual streams: values that adds tie together, on grids that suit the adds.

Where both operands of an add are rounded and its sum is again, one scale for all three makes the last rounding exact
but for what the range cuts off: a sum of multiples is a multiple. And what a ReLU behind the add would cut off anyway
needs no place in a range.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.quantize.graph import aten, is_float, root
from corewise.quantize.observers import QParams
from corewise.quantize.placement import Placement, final, limits, source
from corewise.quantize.simulate import WORTH_DB

Ranges = Mapping[str, QParams]
NARROWER = (0.9, 0.8)
"""Shares of the ranges found by themselves. Narrower ones cut off more, but what sticks out of a residual stream is
often cut off by an activation behind it too."""
STEP, NARROWEST = 0.1, 0.7
Choice = tuple[bool, tuple[float, ...]]
"""Whether each stream has one scale, and which share of its range each has."""


class Tuned(NamedTuple):
    """What ``tune`` found."""

    ranges: dict[str, QParams]
    sqnr_db: float
    words: str
    """What was chosen; empty for ranges as they were."""


def cut_off(module: GraphModule) -> dict[Node, tuple[Node, ...]]:
    """The adds whose sums only an activation reads that cuts off below 0, and the operands that only the add reads."""
    return {
        node: tuple(operand for operand in node.all_input_nodes if len(operand.users) == 1)
        for node in module.graph.nodes
        if _is_sum(node) and (limits(final(node)) or (None,))[0] == 0.0
    }


def felt(value: Tensor, other: Tensor) -> Tensor:
    """``value`` as a ReLU behind ``value + other`` feels it: where the sum is negative, the highest that would do too.

    Never above 0, because no range starts higher.
    """
    if value.shape != other.shape:
        return value
    return torch.maximum(value, other.clamp(min=0).neg_())


def residual_streams(module: GraphModule, placement: Placement) -> tuple[tuple[str, ...], ...]:
    """The quantized values that adds tie together, the last stream of the graph first.

    A value behind a max pooling or reshape counts as the one before it.
    """
    parents: dict[str, str] = {}
    edges = set(placement.edges)
    nodes = {node.name: node for node in module.graph.nodes}
    for node in module.graph.nodes:
        if _is_sum(node) and all((operand.name, node.name) in edges for operand in node.all_input_nodes):
            for operand in node.all_input_nodes:
                parents[root(parents, source(operand).name)] = root(parents, final(node).name)
    tied: dict[str, list[str]] = {}
    for name in placement.tensors:
        if (origin := source(nodes[name]).name) in parents:
            tied.setdefault(root(parents, origin), []).append(name)
    return tuple(tuple(names) for names in reversed(tied.values()))


def regrid(ranges: Ranges, stream: Sequence[str], shared: bool, share: float) -> dict[str, QParams]:
    """The values of a stream with ``share`` of their ranges; ``shared``: of the widest one, at one scale."""
    widest = max(ranges[name].scale for name in stream)
    made = {}
    for name in stream:
        own = ranges[name]
        scale = (widest if shared else own.scale) * share
        # A range that is wider than needed starts where it did; one that is narrower loses as much at either end.
        made[name] = QParams(scale=scale, zero_point=round(own.zero_point * min(1.0, own.scale / scale)))
    return made


def tune(
    ranges: Ranges,
    tied: Sequence[Sequence[str]],
    choose: Callable[[Ranges], float],
    judge: Callable[[Ranges], float],
    before_db: float,
    shared: bool,
) -> Tuned:
    """The ranges with which ``choose`` gives the most dB, if they win ``WORTH_DB`` by ``judge`` too.

    Among many choices the best is partly lucky, so that other samples should judge than those that choose; by them
    ``ranges`` themselves have ``before_db``. All streams are tried alike first, where ``shared`` also at one scale
    each; if that is better than ``ranges``, each is then tried a step wider and narrower.
    """

    def made(choice: Choice) -> dict[str, QParams]:
        one_scale, shares = choice
        changed = dict(ranges)
        for stream, share in zip(tied, shares, strict=True):
            changed |= regrid(ranges, stream, one_scale, share)
        return changed

    def score(choice: Choice) -> float:
        if choice not in tried:
            tried[choice] = choose(made(choice))
        return tried[choice]

    def alike(one_scale: bool, share: float) -> Choice:
        return one_scale, (share,) * len(tied)

    if not tied:
        return Tuned(dict(ranges), before_db, "")
    tried: dict[Choice, float] = {}
    best = before = alike(False, 1.0)
    if shared:
        best = max(before, alike(True, 1.0), key=score)
    for share in NARROWER:
        narrower = alike(best[0], share)
        if score(narrower) <= score(best):
            break
        best = narrower
    if best == before:
        return Tuned(dict(ranges), before_db, "")
    for index, share in enumerate(best[1]):
        steps = [round(share + step, 1) for step in (STEP, -STEP)]
        others = ((best[0], (*best[1][:index], step, *best[1][index + 1 :])) for step in steps)
        best = max((best, *(other for other in others if NARROWEST <= other[1][index] <= 1.0)), key=score)
    if (after_db := judge(made(best))) < before_db + WORTH_DB:
        return Tuned(dict(ranges), before_db, "")
    words = ["at one scale each"] if best[0] else []
    if (narrowest := min(best[1])) < 1.0:
        words.append(" to ".join(f"{share:g}" for share in sorted({narrowest, max(best[1])})) + " of their ranges")
    return Tuned(made(best), after_db, ", ".join(words))


def _is_sum(node: Node) -> bool:
    """Whether the node adds two floating-point tensors, of which one may be a parameter."""
    return (
        node.op == "call_function"
        and node.target is aten.add.Tensor
        and not node.kwargs
        and len(node.all_input_nodes) == 2
        and all(map(is_float, node.all_input_nodes))
    )
