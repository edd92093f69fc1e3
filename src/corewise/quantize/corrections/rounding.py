"""Weights rounded so that the errors of a layer's outputs cancel (GPTQ)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from corewise.quantize.graph import (
    LINEARS,
    TRANSPOSED,
    arguments,
    execute,
    group_count,
    layers,
    output_axis,
    sizes_of,
    weight,
)
from corewise.quantize.observers import QParams, round_weight, weight_scales
from corewise.quantize.placement import Placement
from corewise.quantize.simulate import Batch, Simulation

DAMPING = 0.01
ROWS_PER_COLUMN = 4
FEWEST_ROWS = 2048
BLOCK = 128
WIDE = 512
"""Columns of a matrix that is symmetric or triangular which are computed at once; by blocks half the work is left."""
WIDEST = 6144
"""Columns of the widest layer that GPTQ rounds: its moments are as many squared. ResNet-50's has 4,608."""


def round_weights(
    module: GraphModule,
    placement: Placement,
    ranges: Mapping[str, QParams],
    batches: Sequence[Batch],
    bits: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Round each quantized layer's weights so that the errors of its outputs cancel; returns the scales by node.

    GPTQ (Frantar et al., 2022, arXiv:2210.17323) column by column, with the second moments of the layer's rounded
    inputs over a random share of their positions. A layer whose moments cannot be inverted, that is wider than
    ``WIDEST``, or a transposed convolution is rounded to nearest.
    """
    placed = {layer.node for layer in placement.layers}
    moments: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    simulation = Simulation(module, placement.edges, ranges)

    def step(node: Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if node.name in placed and node.target not in TRANSPOSED and weight(module, node)[0].numel() <= WIDEST:
            rounded = simulation.read(node, node.args[0], args[0])
            rows = _rows(node, rounded, weight(module, node), generator, len(batches))
            _add_moments(moments, node.name, rows)
        return simulation.step(node, args, kwargs)

    with torch.no_grad():
        for batch in batches:
            execute(module, batch, step)
        scales = {}
        for node in layers(module):
            if node.name in placed:
                axis, own = output_axis(node), weight(module, node)
                scales[node.name] = weight_scales(own, axis, bits)
                if node.name in moments:
                    upper = moments.pop(node.name)
                    own.copy_(_rounded(own, scales[node.name], upper.triu() + upper.triu(1).mT, bits))
                else:
                    own.copy_(round_weight(own, scales[node.name], axis, bits))
    return scales


def _rows(layer: Node, value: Tensor, own: Tensor, generator: torch.Generator, batches: int) -> Tensor:
    """The layer's input as the rows its weight is multiplied with: (positions, inputs) or (groups, positions, inputs).

    A random share of the positions: of all ``batches`` together about ``ROWS_PER_COLUMN`` for each column.
    """
    columns = own[0].numel()
    enough = -(-max(FEWEST_ROWS, ROWS_PER_COLUMN * columns) // batches)
    if layer.target in LINEARS:
        flat = value.reshape(-1, value.shape[-1])
        return flat[_some(len(flat), enough, generator)]
    args = arguments(layer)
    rank = own.dim() - 2
    kernel, stride = own.shape[2:], sizes_of(args["stride"], rank)
    dilation, padding = sizes_of(args["dilation"], rank), args["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in sizes_of(padding, rank)]
    value = torch.nn.functional.pad(value, [side for pair in reversed(pads) for side in pair])
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(value.shape[2:], dilation, kernel, stride, strict=True)
    ]
    strides = value.stride()
    windows = value.as_strided(
        (len(value), *sizes, value.shape[1], *kernel),
        (
            strides[0],
            *(a * b for a, b in zip(strides[2:], stride, strict=True)),
            strides[1],
            *(a * b for a, b in zip(strides[2:], dilation, strict=True)),
        ),
    )
    count = len(value)
    for size in sizes:
        count *= size
    some = _some(count, enough, generator)
    places = torch.unravel_index(some, (len(value), *sizes))
    picked = windows[places]
    groups = group_count(layer)
    picked = picked.reshape(len(some), groups, columns)
    return picked.transpose(0, 1) if groups > 1 else picked[:, 0]


def _add_moments(moments: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Add the products of the columns of (..., positions, inputs) with each other: the upper half, block by block."""
    columns = rows.shape[-1]
    if name not in moments:
        moments[name] = rows.new_zeros(*rows.shape[:-2], columns, columns)
    for start in range(0, columns, WIDE):
        some = rows[..., start : start + WIDE].transpose(-1, -2)
        moments[name][..., start : start + WIDE, start:] += some @ rows[..., start:]


def _some(count: int, enough: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= enough else torch.randint(count, (enough,), generator=generator)


def _rounded(own: Tensor, scales: Tensor, moments: Tensor, bits: int) -> Tensor:
    """Weights (outputs, ...) on the grid of ``scales``, each column's error made up for by those after it.

    Columns go in the order of falling second moments, GPTQ's ``act_order``: the largest are rounded first.
    """
    groups = len(moments) if moments.dim() == 3 else 1
    # (groups, columns, outputs), so that a column lies in one piece.
    left = own.flatten(1).view(groups, -1, own[0].numel()).transpose(1, 2).contiguous()
    grid = scales.view(groups, -1)
    order = moments.diagonal(dim1=-2, dim2=-1).view(groups, -1).mean(0).argsort(descending=True)
    back = order.argsort()
    left = left[:, order]
    moments = moments.view(groups, *moments.shape[-2:])[:, order][..., order]
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True) + 1e-8
    inverse = _inverse_factor(moments)
    top = 2 ** (bits - 1)

    def nearest(values: Tensor, steps: Tensor) -> Tensor:
        return (values / steps).round_().clamp_(-top, top - 1).mul_(steps)

    if inverse is None:
        return nearest(left, grid.unsqueeze(1))[:, back].transpose(1, 2).reshape(own.shape)
    rounded = torch.empty_like(left)
    columns = left.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            rounded[:, column] = nearest(left[:, column], grid)
            error = (left[:, column] - rounded[:, column]).div_(inverse[:, column, column].unsqueeze(1))
            errors[:, column - start] = error
            after = inverse[:, column, column + 1 : stop]
            left[:, column + 1 : stop].baddbmm_(after.unsqueeze(2), error.unsqueeze(1), alpha=-1)
        left[:, stop:].baddbmm_(inverse[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
    return rounded[:, back].transpose(1, 2).reshape(own.shape)


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """The upper triangular R with R^T R the inverse of each matrix; ``None`` where one of them has none.

    With the matrix turned by half, L L^T, R is the inverse of L turned back: half the work of inverting first.
    """
    lower, failed = torch.linalg.cholesky_ex(moments.flip(-1, -2))
    if int(failed.max()):
        return None
    inverse = _inverse_of_lower(lower).flip(-1, -2)
    return inverse if bool(inverse.isfinite().all()) else None


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of lower triangular matrices, by halves, in 0.6 of the time of solving for all columns at once."""
    columns = lower.shape[-1]
    if columns <= WIDE:
        identity = torch.eye(columns, dtype=lower.dtype).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = columns // 2
    first, last = _inverse_of_lower(lower[..., :half, :half]), _inverse_of_lower(lower[..., half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[..., :half, :half], inverse[..., half:, half:] = first, last
    inverse[..., half:, :half] = -last @ (lower[..., half:, :half] @ first)
    return inverse
