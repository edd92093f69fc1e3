"""Quantization before engines: the folded graph, placements, ranges, corrections, and what comes of samples."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import Depthwise, Mlp, Residual
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from corewise.common.errors import EngineError, SamplesError
from corewise.quantize import corrections
from corewise.quantize.calibration import observe
from corewise.quantize.graph import bias, compute, execute, folded, layer_name, layers, output_axis, weight
from corewise.quantize.observers import (
    OBSERVERS,
    Channels,
    Observed,
    QParams,
    fake_quantize,
    minmax,
    moving_average,
    mse,
    percentile,
    qparams,
    round_weight,
    weight_scales,
)
from corewise.quantize.placement import TARGETS, Placement, Target, place
from corewise.quantize.ptq import quantize
from corewise.quantize.quantized import CORRECTIONS, Quantized, Recipe
from corewise.quantize.simulate import Simulation
from corewise.records.jsonable import from_json, to_json
from corewise.samples import Samples, from_python

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph

IMAGE = (3, 8, 8)
Make = Callable[[], nn.Module]


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Sequence(nn.Module):
    """One-dimensional convolutions, one in groups, one with its padding by name."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.norm = nn.Conv1d(4, 6, 3, padding="same", dilation=2, bias=False), nn.BatchNorm1d(6)
        self.grouped, self.plain_norm = nn.Conv1d(6, 4, 3, groups=2), nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain_norm(self.grouped(self.norm(self.same(x)).relu()))


class Upsampling(nn.Module):
    """Transposed convolutions in one, two and three dimensions, one in groups; norms behind all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, bias=False), nn.BatchNorm2d(4)
        self.grouped, self.grouped_norm = nn.ConvTranspose2d(4, 8, 2, groups=2, bias=False), nn.BatchNorm2d(8)
        self.line, self.line_norm = nn.ConvTranspose1d(8, 4, 2), nn.BatchNorm1d(4)
        self.volume, self.volume_norm = nn.ConvTranspose3d(1, 2, 2), nn.BatchNorm3d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.grouped_norm(self.grouped(self.norm(self.up(x)).relu()))
        return self.line_norm(self.line(x.flatten(2))), self.volume_norm(self.volume(x.unsqueeze(1)))


class Shared(nn.Module):
    """A convolution used twice, with a norm of its own each time, and one whose value has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.second(self.conv(self.first(self.conv(x)).relu())))
        return self.third(y) + y


class Products(nn.Module):
    """Linears written as addmm, mm and matmul, also with factors and a product of values that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.c, self.d = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 5))
        self.e, self.f = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.e, x, self.d) @ self.f
        y = torch.addmm(self.b, x, self.a.t())
        z = torch.mm(y, self.c.transpose(0, 1)) + torch.addmm(self.b[:4], y, self.c.permute(1, 0), beta=2, alpha=3)
        return torch.mm(z, torch.mm(z.t(), z))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


def trained(make: Make, seed: int = 0) -> nn.Module:
    """The module in eval mode, with batch norms that do something."""
    torch.manual_seed(seed)
    model = make().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.running_var, 0.3, 1.0)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 2.0)
                nn.init.uniform_(layer.bias, -0.3, 0.5)
    return model


def program_of(model: nn.Module, *shape: int) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = ({0: Dim("batch", min=1)},)
        return torch.export.export(model.eval(), (torch.rand(2, *shape),), dynamic_shapes=batch, strict=False)


def graph_of(make: Make, *shape: int) -> GraphModule:
    return folded(program_of(trained(make), *shape))


def images(count: int = 24, seed: int = 0) -> Samples:
    return from_python(list(np.random.default_rng(seed).standard_normal((count, *IMAGE), np.float32)))


def run(module: GraphModule, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return execute(module, inputs, compute)


def snapshot(module: GraphModule) -> tuple[str, dict[str, Tensor]]:
    return str(module.graph), {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: GraphModule, before: tuple[str, dict[str, Tensor]]) -> None:
    assert str(module.graph) == before[0]
    assert module.state_dict().keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in module.state_dict().items())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small nets are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """PyTorch's own encoder layer, whose contiguous() stands before a view; masked scores of -inf come out too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.encoder(x))
        return scores.masked_fill(x[..., :4] > 1.0, -torch.inf)


def test_attention_and_outputs_of_minus_infinity_are_quantized():
    program = program_of(trained(Attention), 6, 8)
    generator = np.random.default_rng(0)
    rows = from_python([generator.standard_normal((6, 8)).astype(np.float32) for _ in range(40)])
    found = quantize(program, rows, Recipe())
    assert 15 < found.sqnr_db < 80


class Branches(nn.Module):
    """Control flow that torch.export keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x * 2, (x,))


def test_control_flow_is_refused_in_words():
    program = torch.export.export(Branches().eval(), (torch.randn(2, 4),))
    with pytest.raises(EngineError, match=r"cannot look into.*cond"):
        folded(program)


# --- the folded graph ---------------------------------------------------------------------------------------------

FOLDED = [
    (Residual, IMAGE, 5, 0),
    (Depthwise, IMAGE, 4, 0),
    (Mlp, (5, 8), 3, 0),
    (Volumes, (2, 5, 6, 7), 1, 0),
    (Sequence, (4, 12), 2, 0),
    (Upsampling, IMAGE, 4, 0),
    (Shared, IMAGE, 3, 1),
    (Products, (4,), 4, 0),
]


@pytest.mark.parametrize(("make", "shape", "count", "norms"), FOLDED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folded_graph_computes_what_the_program_does(make: Make, shape: tuple[int, ...], count: int, norms: int):
    model = trained(make)
    module = folded(program_of(model, *shape))
    assert len(layers(module)) == count
    assert Counter("batch_norm" in str(node.target) for node in module.graph.nodes)[True] == norms
    owned = [str(node.args[1].target) for node in layers(module)]
    assert len(set(owned)) == count
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = model(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found in (run(module, x), module(x)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_graph_of_a_program_is_a_copy():
    program = program_of(trained(Residual), *IMAGE)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    module = folded(program)
    for layer in layers(module):
        weight(module, layer).mul_(3)
        bias(module, layer).add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict.items())


class Positions(nn.Module):
    """A net for a table of positions beside one for the input, as Swin V2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(9, 2))
        self.bias, self.head = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.bias(self.table).sigmoid().mean(0)


def test_layers_that_see_constants_alone_are_values():
    torch.manual_seed(0)
    model = Positions().eval()
    module = folded(program_of(model, 6))
    assert [layer_name(layer) for layer in layers(module)] == ["head"]
    x = torch.randn(5, 6)
    with torch.no_grad():
        assert torch.allclose(execute(module, (x,), compute)[0], model(x), atol=1e-6)
    samples = from_python(list(np.random.default_rng(0).standard_normal((24, 6), np.float32)))
    assert quantize(program_of(model, 6), samples, Recipe()).sqnr_db > 10


class Parametrized(nn.Module):
    """Weights that are computed at each call, but of parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the older of the two is deprecated
            self.old = nn.utils.weight_norm(nn.Conv1d(3, 8, 3))
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5))
        self.raw = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spectral(self.new(self.old(x).relu()).relu().mean(2))
        return nn.functional.linear(x, self.raw.tanh(), self.raw.sum(1))


def test_weights_computed_of_parameters_are_values():
    torch.manual_seed(0)
    model = Parametrized().eval()
    program = program_of(model, 3, 12)
    module = folded(program)
    assert len(place(module, "fused").layers) == 4
    assert not place(module, "fused").kept
    x = torch.randn(5, 3, 12)
    with torch.no_grad():
        assert torch.allclose(execute(module, (x,), compute)[0], model(x), atol=1e-5)
    samples = from_python(list(np.random.default_rng(0).standard_normal((24, 3, 12), np.float32)))
    assert quantize(program, samples, Recipe()).sqnr_db > 10


# --- grids --------------------------------------------------------------------------------------------------------

bounds = st.floats(-1e6, 1e6, width=32)


@given(bounds, bounds)
def test_a_grid_holds_zero_exactly_and_covers_its_range(a: float, b: float):
    low, high = min(a, b), max(a, b)
    q = qparams(low, high)
    assert q.scale > 0
    assert np.isfinite(1 / np.float32(q.scale))
    assert 0 <= q.zero_point <= 255
    assert isinstance(q.zero_point, int)
    assert float(fake_quantize(torch.zeros(1), q)) == 0
    half = q.scale * 0.5001
    assert -q.zero_point * q.scale <= min(low, 0.0) + half
    assert (255 - q.zero_point) * q.scale >= max(high, 0.0) - half


@given(bounds, bounds, st.integers(0, 2**31))
def test_a_round_trip_loses_half_a_step_at_most(a: float, b: float, seed: int):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    q = qparams(low, high)
    x = low + (high - low) * torch.rand(64, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([x, torch.tensor([low, high, 0.0])])
    found = fake_quantize(x, q)
    assert float((found - x).abs().max()) <= q.scale * 0.501
    assert torch.equal(fake_quantize(found, q), found)


@given(
    st.sampled_from([7, 8]),
    st.integers(0, 1),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=12, max_size=12),
)
def test_weights_keep_their_extremes_and_lose_half_a_step(bits: int, axis: int, values: list[float]):
    w = torch.tensor(values).view(3, 4)
    scales = weight_scales(w, axis, bits)
    rounded = round_weight(w, scales, axis, bits)
    assert scales.shape == (w.shape[axis],)
    assert bool((scales > 0).all())
    shaped = scales.view(-1, 1) if axis == 0 else scales.view(1, -1)
    assert bool(((rounded - w).abs() <= shaped * 0.501).all())
    steps = rounded / shaped
    assert float(steps.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-3
    assert torch.equal(round_weight(rounded, scales, axis, bits), rounded)


# --- observers ----------------------------------------------------------------------------------------------------


def observed(*batches: Tensor, axis: int = 1) -> Observed:
    seen = Observed(axis)
    for batch in batches:
        assert seen.see(batch)
    return seen


def normal(count: int, size: float = 1.0, seed: int = 0, shift: float = 0.0) -> Tensor:
    return shift + size * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_memory_is_flat_in_the_number_of_batches():
    def numbers(seen: Observed) -> int:
        return sum(value.numel() for value in vars(seen).values() if isinstance(value, Tensor))

    seen = observed(normal(100))
    first = numbers(seen)
    for k in range(30):
        assert seen.see(normal(100 + 50 * k, size=1.3**k, seed=k))
    assert numbers(seen) == first


@pytest.mark.parametrize("order", list(permutations(range(4)))[1:])
def test_the_order_of_batches_moves_no_range_by_more_than_a_bin(order: tuple[int, ...]):
    batches = [normal(500, size, seed=k) for k, size in enumerate((0.01, 1.0, 7.0, 40.0))]
    ascending, seen = observed(*batches), observed(*(batches[k] for k in order))
    assert minmax(seen) == minmax(ascending)
    assert float(seen.histogram.sum()) == float(ascending.histogram.sum()) == 4 * 500 * 4
    torch.testing.assert_close(seen.channels.mean_square, ascending.channels.mean_square)
    assert seen.bound >= max(-seen.low, seen.high)
    assert seen.bound < 2 * max(-seen.low, seen.high)
    bin_width = 2 * max(seen.bound, ascending.bound) / len(seen.histogram)
    for one, other in zip(percentile(seen), percentile(ascending), strict=True):
        assert abs(one - other) <= 2 * bin_width


def test_a_doubled_histogram_is_the_one_of_its_final_range():
    batches = [normal(3000, size, seed=k) for k, size in enumerate((0.1, 3.0, 1.0, 50.0))]
    seen = observed(*batches)
    direct = torch.histc(torch.cat([b.flatten() for b in batches]), len(seen.histogram), -seen.bound, seen.bound)
    # Values on the edge of two bins may be counted in either.
    assert float((seen.histogram - direct).abs().sum()) <= 10


@pytest.mark.parametrize("outlier", [1.0, 3.0, 10.0, 60.0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("relu", [False, True])
def test_ranges_of_least_squared_error_lose_no_more_than_extremes(outlier: float, shift: float, relu: bool):
    values = torch.cat([normal(5000, shift=shift), normal(5, outlier, seed=1)])
    values = values.relu() if relu else values
    seen = observed(values)

    def error(low: float, high: float) -> float:
        return float((fake_quantize(values, qparams(low, high)) - values).square().mean())

    # The histogram's bins and uniform noise within a step are approximations.
    # Zeros of a ReLU, which round exactly, count as if they did not.
    assert error(*mse(seen)) <= 1.02 * error(*minmax(seen))


def test_ranges_of_least_squared_error_cut_what_is_rare():
    batches = [normal(30_000, seed=k) for k in range(4)]
    batches[2][0, 0] = 30.0
    seen = observed(*batches)
    low, high = mse(seen)
    # The sum of (30 - high)^2 for the outlier and (high - low)^2 / 255^2 / 12 for each value is least at 17.
    assert high == pytest.approx(17, abs=2)
    assert -6 < low < -3


def test_percentiles_ignore_an_outlier():
    values = normal(50_000)
    values[0, 0] = 1000.0
    seen = observed(values)
    assert minmax(seen)[1] == 1000.0
    low, high = percentile(seen)
    assert 3 < -low < 6
    assert 3 < high < 6


def test_a_moving_average_weighs_later_batches():
    seen = observed(torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([[0.0, 12.0]]))
    low, high = moving_average(seen)
    assert low == pytest.approx(((-1.0 * 0.9) + -3.0 * 0.1) * 0.9)
    assert high == pytest.approx((2.0 * 0.9 + 1.0 * 0.1) * 0.9 + 12.0 * 0.1)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [-2.0, 0.0, 1e-9, 5.0])
def test_a_constant_value_has_a_grid_that_holds_it(name: str, value: float):
    low, high = OBSERVERS[name](observed(torch.full((10, 4), value)))
    assert low <= 0 <= high
    q = qparams(low, high)
    assert float(fake_quantize(torch.tensor([value]), q)) == pytest.approx(value, rel=0.01, abs=q.scale / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_not_counted(bad: float):
    seen = observed(normal(10))
    before = minmax(seen), seen.histogram.clone()
    spoilt = normal(10, size=9.0)
    spoilt[3, 2] = bad
    assert not seen.see(spoilt)
    assert minmax(seen) == before[0]
    assert torch.equal(seen.histogram, before[1])


def test_channels_are_counted_along_their_axis():
    values = torch.arange(24.0).view(2, 3, 4)
    for axis, dims in ((1, (0, 2)), (2, (0, 1))):
        seen = observed(values, -values, axis=axis)
        assert torch.equal(seen.channel_high, values.amax(dims))
        assert torch.equal(seen.channel_low, -values.amax(dims))
        torch.testing.assert_close(seen.channels.mean_square, values.square().mean(dims))


# --- placements ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual() -> GraphModule:
    return graph_of(Residual, *IMAGE)


def names(module: GraphModule) -> dict[str, str]:
    """The layers' nodes by the user's names."""
    return {layer_name(node): node.name for node in layers(module)}


def adds(module: GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if str(node.target).startswith("aten.add")]


@pytest.mark.parametrize("target", TARGETS)
def test_placing_reads_the_graph_and_says_the_same_again(residual: GraphModule, target: Target):
    before = snapshot(residual)
    first = place(residual, target)
    assert place(residual, target) == first
    copied = place(copy.deepcopy(residual), target)
    assert set(copied.edges) == set(first.edges)
    assert replace(copied, edges=first.edges) == first
    assert_unchanged(residual, before)
    assert first.kept == ()
    assert [layer.name for layer in first.layers] == ["stem.0", "body1.0", "body2.0", "last", "head"]
    assert [layer.kind for layer in first.layers] == ["convolution"] * 4 + ["linear"]
    assert len(set(first.edges)) == len(first.edges)


@pytest.mark.parametrize("target", TARGETS)
def test_every_quantized_layer_reads_its_input_through_a_pair(residual: GraphModule, target: Target):
    placement = place(residual, target)
    nodes = {node.name: node for node in residual.graph.nodes}
    for layer in placement.layers:
        assert (nodes[layer.node].args[0].name, layer.node) in placement.edges
    assert {producer for producer, _ in placement.edges} == set(placement.tensors)
    assert all(nodes[producer] in nodes[consumer].all_input_nodes for producer, consumer in placement.edges)


def test_fused_leaves_the_convolution_before_an_add_alone(residual: GraphModule):
    placement = place(residual, "fused")
    assert names(residual)["body2.0"] not in placement.tensors


def test_everywhere_has_pairs_on_both_inputs_of_an_add(residual: GraphModule):
    placement = place(residual, "everywhere")
    (add,) = adds(residual)
    operands = {producer for producer, consumer in placement.edges if consumer == add}
    assert len(operands) == 2
    assert names(residual)["body2.0"] in operands


@pytest.mark.parametrize("target", TARGETS)
def test_transposed_convolutions_in_groups_are_kept(target: Target):
    placement = place(graph_of(Upsampling, *IMAGE), target)
    assert [name for name, _ in placement.kept] == ["grouped"]
    assert [layer.name for layer in placement.layers] == ["up", "line", "volume"]


@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        (("last",), {"last"}),
        (("stem.0", "head"), {"stem.0", "head"}),
        ((r"body\d\.0",), {"body1.0", "body2.0"}),
        ((r"body.*", "body1.0"), {"body1.0", "body2.0"}),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_ignored_layers_stay_in_floating_point(
    residual: GraphModule, ignored: tuple[str, ...], left: set[str], target: Target
):
    placement = place(residual, target, ignored)
    assert {name for name, _ in placement.kept} == left
    assert all(why for _, why in placement.kept)
    assert {layer.name for layer in placement.layers} == set(names(residual)) - left


@pytest.mark.parametrize("pattern", ["las", "body", "LAST", ""])
def test_an_ignored_layer_that_matches_nothing_is_told_with_names_that_would(residual: GraphModule, pattern: str):
    with pytest.raises(EngineError) as error:
        place(residual, "fused", ("last", pattern))
    assert repr(pattern) in str(error.value)
    assert any(name in error.value.fix for name in names(residual))


@pytest.mark.parametrize("pattern", ["(", "body[", "*"])
def test_a_broken_expression_is_told(residual: GraphModule, pattern: str):
    with pytest.raises(EngineError, match="not a regular expression") as error:
        place(residual, "fused", (pattern,))
    assert repr(pattern) in str(error.value)


# --- quantize: samples and notes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return program_of(trained(Residual), *IMAGE)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_without_layers_has_an_empty_placement_and_stays_as_it_is(target: Target):
    module = graph_of(Plain, *IMAGE)
    before = snapshot(module)
    placement = place(module, target)
    assert (placement.layers, placement.edges, placement.kept) == ((), (), ())
    assert_unchanged(module, before)


def test_nothing_to_quantize_is_an_error():
    program = program_of(Plain(), *IMAGE)
    with pytest.raises(EngineError, match="to quantize"):
        quantize(program, images(), Recipe())


class Named(nn.Module):
    """Values that some samples make infinite or NaN before or behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        nn.init.constant_(self.first.weight, 10.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.gate(self.first(x)).sqrt()) + self.second(1 / (x + 2))


@pytest.mark.parametrize(("bad", "name"), [(3e38, "gate|sqrt"), (-2.0, "reciprocal|div|mul")])
def test_a_value_that_becomes_infinite_is_named(bad: float, name: str):
    rows = list(np.random.default_rng(0).random((24, 4), np.float32))
    program = program_of(Named(), 4)
    quantize(program, from_python(rows), Recipe(corrections=()))
    rows[20] = np.full(4, bad, np.float32)
    with pytest.raises(SamplesError, match=rf"sample 20 makes the value of ({name})\S* NaN or infinite"):
        quantize(program, from_python(rows), Recipe(corrections=()))


def test_too_few_samples_and_constant_ones_are_noted(program: ExportedProgram):
    def warned(samples: Samples) -> list[str]:
        return list(quantize(program, samples, Recipe(corrections=())).warnings)

    assert warned(images()) == []
    few = warned(images(3))
    assert len(few) == 1
    assert "3 calibrate" in few[0]
    constant = warned(from_python([np.zeros(IMAGE, np.float32)] * 24))
    assert constant
    assert all("nothing but" in note for note in constant)


@pytest.fixture(scope="module", params=[Residual, Depthwise], ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest) -> tuple[Quantized, Quantized, ExportedProgram]:
    """Without corrections and with all of them, in 7 bits; and the program."""
    program = program_of(trained(request.param), *IMAGE)
    plain, full = (quantize(program, images(40), Recipe(weight_bits=7, corrections=c)) for c in ((), CORRECTIONS))
    return plain, full, program


def test_corrections_are_kept_only_where_they_pay(pair: tuple[Quantized, Quantized, ExportedProgram]):
    plain, full, _ = pair
    assert 15 < plain.sqnr_db <= full.sqnr_db < 60
    assert len(full.notes) > len(plain.notes)


def test_weights_are_on_their_grids(pair: tuple[Quantized, Quantized, ExportedProgram]):
    for made in pair[:2]:
        assert set(made.scales) == {layer.node for layer in made.placed("fused")[1].layers}
        for node in layers(made.module):
            steps = weight(made.module, node).movedim(output_axis(node), 0).flatten(1) / made.scales[node.name][:, None]
            assert float((steps - steps.round()).abs().max()) < 1e-3
            assert -64.01 < float(steps.min()) <= float(steps.max()) < 63.01


def test_the_reference_stays_what_the_program_computes(pair: tuple[Quantized, Quantized, ExportedProgram]):
    x = torch.randn(5, *IMAGE)
    expected = pair[2].module()(x)
    for made in pair[:2]:
        torch.testing.assert_close(run(made.reference, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_recipe_has_a_key_of_its_own():
    recipe = Recipe()
    other = {int: lambda v: v - 1, str: lambda v: v + "x", tuple: lambda v: (*v, "x"), bool: lambda v: not v}
    changed = [
        replace(recipe, **{field.name: other[type(value)](value)})
        for field in fields(Recipe)
        for value in [getattr(recipe, field.name)]
    ]
    keys = [one.key for one in (recipe, *changed, Recipe(observers=("ab",)), Recipe(observers=("a", "b")))]
    assert len(set(keys)) == len(keys)
    assert all(key.isalnum() and len(key) <= 64 for key in keys)
    assert Recipe(observers=("a", "b")).key == Recipe(observers=("a", "b")).key == keys[-1]
    assert from_json(Recipe, to_json(recipe)).key == recipe.key


# --- corrections --------------------------------------------------------------------------------------------------


def ranged(module: GraphModule, placement: Placement, batches: list[Tensor]) -> dict[str, QParams]:
    seen = observe(module, placement.tensors, [(batch,) for batch in batches])
    return {name: qparams(*minmax(one)) for name, one in seen.items()}


def channels_of(module: GraphModule, placement: Placement, x: Tensor) -> dict[str, Channels]:
    return {name: one.channels for name, one in observe(module, placement.tensors, [(x,)]).items()}


def smooth(shape: tuple[int, ...], rows: int = 64, seed: int = 0) -> Tensor:
    """Inputs whose neighbours are alike, in channels and places, and have a mean."""
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))
    for dim in range(1, x.dim()):
        x = x.cumsum(dim) / x.shape[dim] ** 0.5
    return x + 1


LAYERS: list[tuple[Make, tuple[int, ...]]] = [
    (lambda: nn.Linear(32, 16), (32,)),
    (lambda: nn.Linear(32, 16, bias=False), (5, 32)),
    (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 9, 9)),
    (lambda: nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (4, 9, 8)),
    (lambda: nn.Conv2d(6, 9, 3, groups=3), (6, 9, 9)),
    (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), (6, 9, 9)),
    (lambda: nn.Conv1d(6, 8, 4, padding="same"), (6, 20)),
    (lambda: nn.Conv3d(2, 6, 3, padding=1), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS, ids=lambda v: str(v()) if callable(v) else "")
def test_rounding_by_second_moments_beats_rounding_to_nearest(make: Make, shape: tuple[int, ...]):
    bits = 4
    module = graph_of(make, *shape)
    (node,) = layers(module)
    before = weight(module, node).clone()
    scales = weight_scales(before, output_axis(node), bits)
    placement = place(module, "fused")
    learnt, fresh = smooth(shape), smooth(shape, seed=1)
    ranges = ranged(module, placement, [learnt])
    expected = run(module, fresh)[0]

    def error() -> float:
        return float((run(module, fresh)[0] - expected).square().mean())

    found = corrections.round_weights(module, placement, ranges, [(learnt,)], bits)
    assert torch.equal(found[node.name], scales)
    corrected, rounded = error(), weight(module, node).clone()
    shaped = scales.view([-1, *[1] * (before.dim() - 1)])
    assert float((rounded / shaped - (rounded / shaped).round()).abs().max()) < 1e-4
    assert -8.01 < float((rounded / shaped).min()) <= float((rounded / shaped).max()) < 7.01
    weight(module, node).copy_(round_weight(before, scales, output_axis(node), bits))
    assert corrected < 0.8 * error()


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    module = graph_of(lambda: nn.Linear(8, 4), 8)
    (node,) = layers(module)
    before = weight(module, node).clone()
    placement, zeros = place(module, "fused"), torch.zeros(4, 8)
    corrections.round_weights(module, placement, ranged(module, placement, [zeros]), [(zeros,)], 8)
    assert torch.equal(weight(module, node), round_weight(before, weight_scales(before, 0, 8), 0, 8))


def test_a_transposed_convolution_is_rounded_to_nearest():
    module = graph_of(lambda: nn.ConvTranspose2d(3, 4, 2), 3, 5, 5)
    (node,) = layers(module)
    before = weight(module, node).clone()
    placement, learnt = place(module, "fused"), smooth((3, 5, 5))
    scales = corrections.round_weights(module, placement, ranged(module, placement, [learnt]), [(learnt,)], 8)
    assert torch.equal(weight(module, node), round_weight(before, scales[node.name], 1, 8))


def test_a_mean_over_everything_is_no_obstacle():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu()
            return y / y.mean(dim=None)

    assert quantize(program_of(Whole().eval(), *IMAGE), images(), Recipe()).sqnr_db > 20


class Chain(nn.Module):
    """Convolutions through a ReLU, a residual add and none, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.c, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head(self.c(torch.relu(self.b(x) + x)).mean((2, 3)))


@pytest.mark.parametrize("name", ["a", "b", "c", "head"])
def test_a_planted_bias_is_found_and_corrected(name: str):
    module = graph_of(Chain, *IMAGE)
    reference = copy.deepcopy(module)
    placement = place(module, "fused")
    x, fresh = (torch.randn(200, *IMAGE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ranges = ranged(module, placement, [x])
    node = next(node for node in layers(module) if layer_name(node) == name)
    planted = torch.linspace(-0.2, 0.2, len(bias(module, node)))
    bias(module, node).add_(planted)

    def error(batch: Tensor) -> float:
        found = Simulation(module, placement.edges, ranges).run((batch,))[0]
        return float((found - run(reference, batch)[0]).square().mean())

    before, right = error(fresh), bias(reference, next(n for n in layers(reference) if layer_name(n) == name))
    corrections.correct_bias(module, reference, placement, ranges, (x,))
    assert error(fresh) < 0.1 * before
    assert float((bias(module, node) - right).abs().max()) < 0.1 * float(planted.abs().max())


def scaled_apart(make: Make, layer: str, reader: str) -> nn.Module:
    """The net with channels of ``layer`` that differ by up to 64 and are made up for in ``reader``."""
    model = trained(make)
    made, read = model.get_submodule(layer), model.get_submodule(reader)
    factors = 2.0 ** -torch.arange(len(made.bias)).remainder(7)
    with torch.no_grad():
        made.weight.mul_(factors.view(-1, *[1] * (made.weight.dim() - 1)))
        made.bias.mul_(factors)
        grouped = isinstance(read, nn.Conv2d) and read.groups > 1
        read.weight.div_(factors.view((-1, 1, 1, 1) if grouped else (1, -1, *[1] * (read.weight.dim() - 2))))
    return model


class Separable(nn.Module):
    def __init__(self, gate: type[nn.Module]) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        self.gate = gate()
        for layer in (self.expand, self.depthwise):
            nn.init.constant_(layer.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.gate(self.depthwise(self.gate(self.expand(x)))))


EQUALIZED: list[tuple[Make, str, str, tuple[int, ...]]] = [
    (lambda: Separable(nn.ReLU), "expand", "depthwise", IMAGE),
    (lambda: Separable(nn.ReLU), "depthwise", "project", IMAGE),
    (lambda: Separable(nn.ReLU6), "expand", "depthwise", IMAGE),
    (Chain, "c", "head", IMAGE),
    (Mlp, "norm1", "up", (5, 8)),
]


@pytest.mark.parametrize(("make", "layer", "reader", "shape"), EQUALIZED)
def test_equalizing_evens_ranges_and_keeps_the_function(make: Make, layer: str, reader: str, shape: tuple[int, ...]):
    module = folded(program_of(scaled_apart(make, layer, reader), *shape))
    node = next(node for node in layers(module) if layer_name(node) == reader)
    value = node.args[0].name
    placement = place(module, "fused")
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    before = run(module, x)[0]

    def seen() -> dict[str, Channels]:
        return channels_of(module, placement, x)

    def spread() -> float:
        found = seen()[value]
        largest = torch.maximum(found.high, -found.low)
        return float(largest.max() / largest.min())

    apart = spread()
    with torch.no_grad():
        assert corrections.equalize(module, placement, seen(), 8) >= 1
    assert apart > 20
    assert spread() < apart / 4
    torch.testing.assert_close(run(module, x)[0], before, rtol=1e-3, atol=1e-4)


class NormTwice(nn.Module):
    """One layer norm before two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight.copy_(2.0 ** torch.arange(8))
            self.a.weight.div_(self.norm.weight)
            self.b.weight.div_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.relu(self.a(self.norm(x)))))


class Widths(nn.Module):
    """A linear along the width of a convolution's output, as wide as it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        with torch.no_grad():
            self.linear.weight.mul_(2.0 ** -torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(x)))


class NormedImages(nn.Module):
    """A layer norm over whole images, read by a convolution along another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(IMAGE), nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.norm.weight[0] *= 64

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class GroupedReader(nn.Module):
    """A value read by a convolution with one output in each group of two channels, and by a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.grouped, self.plain = nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.conv.weight.mul_(2.0 ** -torch.arange(8).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.grouped(x) + self.plain(x)


@pytest.mark.parametrize(
    ("make", "shape"), [(NormTwice, (8,)), (Widths, IMAGE), (NormedImages, IMAGE), (GroupedReader, IMAGE)]
)
def test_equalizing_leaves_alone_what_it_cannot_rescale(make: Make, shape: tuple[int, ...]):
    module = graph_of(make, *shape)
    placement = place(module, "fused")
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    before = run(module, x)[0]
    with torch.no_grad():
        corrections.equalize(module, placement, channels_of(module, placement, x), 8)
    torch.testing.assert_close(run(module, x)[0], before, rtol=1e-3, atol=1e-4)
