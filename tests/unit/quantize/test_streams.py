"""Residual streams: which values adds tie together, grids on which their sums are exact, and what a ReLU hides."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node

from corewise.common.errors import SamplesError
from corewise.quantize import streams
from corewise.quantize.calibration import observe
from corewise.quantize.graph import bias, compute, execute, folded, layers
from corewise.quantize.observers import LEVELS, QParams, fake_quantize, qparams
from corewise.quantize.placement import place
from corewise.quantize.ptq import quantize
from corewise.quantize.quantized import Quantized, Recipe
from corewise.samples import from_python

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph

IMAGE = (3, 8, 8)
FLOATS = st.floats(-50, 50, width=32)


class Blocks(nn.Module):
    """Two residual blocks of one width, a pooling, one block of another; the last sum has no ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.wide, self.three, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + x).relu()
        x = (self.two(x) + x).relu()
        x = self.wide(nn.functional.max_pool2d(x, 2))
        x = self.three(x) + x
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Four residual blocks whose branches are as wide as the stream: half of the rounding is that of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.bodies = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
        for body in self.bodies:
            nn.init.orthogonal_(body.weight, gain=0.5)
            nn.init.zeros_(body.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for body in self.bodies:
            x = (body(x) + x).relu()
        return self.head(x)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    example = (torch.randn(2, *IMAGE),)
    return torch.export.export(model.eval(), example, dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)


@pytest.fixture(scope="module")
def blocks() -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folded(exported(Blocks()))


# --- what adds tie together ---------------------------------------------------------------------------------------


def test_values_that_adds_tie_together_are_one_stream(blocks: GraphModule):
    found = [set(names) for names in streams.residual_streams(blocks, place(blocks, "everywhere"))]
    # The value behind the pooling is the second block's; the sum of the last block is read by the mean.
    assert found == [
        {"conv2d_3", "conv2d_4", "add_2"},
        {"relu", "conv2d_1", "relu_1", "conv2d_2", "relu_2", "max_pool2d"},
    ]


def test_nothing_is_tied_where_one_operand_is_not_rounded(blocks: GraphModule):
    assert streams.residual_streams(blocks, place(blocks, "fused")) == ()


def test_a_relu_hides_what_it_cuts_off_only_from_the_value_that_nothing_else_reads(blocks: GraphModule):
    found = {node.name: [operand.name for operand in own] for node, own in streams.cut_off(blocks).items()}
    assert found == {"add": ["conv2d_1"], "add_1": ["conv2d_2"]}


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20), st.booleans())
def test_ranges_of_what_a_relu_feels_lose_half_a_step(pairs: list[tuple[float, float]], both: bool):
    value, other = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    felt = streams.felt(value, other)
    assert float(felt.min()) >= float(value.min())
    grid = qparams(float(felt.min()), float(felt.max()))
    found, lost = fake_quantize(value, grid), grid.scale * 0.51
    if both:  # as where a block's branch and its shortcut are convolutions
        feels = streams.felt(other, value)
        second = qparams(float(feels.min()), float(feels.max()))
        found, lost = found + fake_quantize(other, second), lost + second.scale * 0.51
    else:
        found = found + other
    assert float((found.relu() - (value + other).relu()).abs().max()) <= lost + 1e-4


# --- grids --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-30, 0), st.floats(0.1, 30)), min_size=2, max_size=5),
    st.booleans(),
    st.sampled_from((0.7, 0.8, 0.9, 1.0)),
)
def test_new_grids_hold_zero_and_their_share(ends: list[tuple[float, float]], shared: bool, share: float):
    ranges = {f"v{k}": qparams(*pair) for k, pair in enumerate(ends)}
    made = streams.regrid(ranges, tuple(ranges), shared, share)
    widest = max(one.scale for one in ranges.values())
    for name, one in made.items():
        own = ranges[name]
        assert 0 <= one.zero_point <= LEVELS
        assert one.scale == pytest.approx(share * (widest if shared else own.scale))
        # Both ends, in steps: as they were where the scale allows it, else their share.
        kept = min(1.0, one.scale / own.scale)
        assert -one.zero_point * one.scale == pytest.approx(-own.zero_point * own.scale * kept, abs=one.scale)
        high = (LEVELS - one.zero_point) * one.scale
        assert high >= (LEVELS - own.zero_point) * own.scale * kept - one.scale
    if not shared and share == 1.0:
        assert made == ranges


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=30), st.floats(1e-3, 2.0))
def test_on_one_scale_a_sum_is_rounded_no_more(steps: list[tuple[int, int]], scale: float):
    own = {name: QParams(scale=scale / (k + 1), zero_point=40 * (k + 1)) for k, name in enumerate(("out", "a", "b"))}
    out, a, b = streams.regrid(own, tuple(own), shared=True, share=1.0).values()
    values = [
        torch.tensor([pair[k] - one.zero_point for pair in steps], dtype=torch.float32) * one.scale
        for k, one in enumerate((a, b))
    ]
    total = values[0] + values[1]
    inside = ((total / scale).round() >= -out.zero_point) & ((total / scale).round() <= LEVELS - out.zero_point)
    torch.testing.assert_close(fake_quantize(total, out)[inside], total[inside], rtol=1e-5, atol=1e-5)


# --- the choice ---------------------------------------------------------------------------------------------------

RANGES = {name: QParams(scale=scale, zero_point=0) for name, scale in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0))}
FOUND = (("c", "d"), ("a", "b"))
Judge = Callable[[Mapping[str, QParams]], float]


def best_at(**scales: float) -> Judge:
    """20 dB where every scale is the one given, a tenth of a dB less for each per cent off."""
    return lambda ranges: 20.0 - sum(10 * abs(ranges[name].scale / scale - 1) for name, scale in scales.items())


def test_one_scale_and_each_streams_own_share_are_found():
    judge = best_at(a=1.6, b=1.6, c=7.2, d=7.2)
    made = streams.tune(RANGES, FOUND, judge, judge, judge(RANGES), shared=True)
    assert {name: round(one.scale, 6) for name, one in made.ranges.items()} == {"a": 1.6, "b": 1.6, "c": 7.2, "d": 7.2}
    assert made.sqnr_db == pytest.approx(20)
    assert made.words == "at one scale each, 0.8 to 0.9 of their ranges"


def test_without_sharing_values_keep_scales_of_their_own():
    judge = best_at(a=0.8, b=1.6, c=2.8, d=5.6)
    made = streams.tune(RANGES, FOUND, judge, judge, judge(RANGES), shared=False)
    assert {name: round(one.scale, 6) for name, one in made.ranges.items()} == {"a": 0.8, "b": 1.6, "c": 2.8, "d": 5.6}
    assert made.words == "0.7 to 0.8 of their ranges"


@pytest.mark.parametrize("shared", [True, False])
def test_what_wins_nothing_is_left_alone_after_few_tries(shared: bool):
    tried: list[Mapping[str, QParams]] = []

    def choose(ranges: Mapping[str, QParams]) -> float:
        tried.append(ranges)
        return 20.0

    made = streams.tune(RANGES, FOUND, choose, lambda _: 99.0, 20.0, shared)
    assert (made.ranges, made.sqnr_db, made.words) == (RANGES, 20.0, "")
    assert 0 < len(tried) <= 3
    made = streams.tune(RANGES, (), choose, lambda _: 99.0, 20.0, shared)
    assert (made.ranges, made.words) == (RANGES, "")


@pytest.mark.parametrize(("judged_db", "kept"), [(20.05, False), (20.2, True)])
def test_what_chooses_does_not_judge(judged_db: float, kept: bool):
    choose = best_at(a=1.6, b=1.6, c=7.2, d=7.2)
    made = streams.tune(RANGES, FOUND, choose, lambda _: judged_db, 20.0, shared=True)
    assert (made.ranges != RANGES) == bool(made.words) == kept
    assert made.sqnr_db == (judged_db if kept else 20.0)


def test_no_choice_is_judged_twice():
    judged: list[tuple[float, ...]] = []
    judge = best_at(a=1.6, b=1.6, c=7.2, d=7.2)

    def counting(ranges: Mapping[str, QParams]) -> float:
        judged.append(tuple(one.scale for one in ranges.values()))
        return judge(ranges)

    streams.tune(RANGES, FOUND, counting, judge, judge(RANGES), shared=True)
    assert len(judged) == len(set(judged))


# --- what is seen -------------------------------------------------------------------------------------------------


def test_calibration_sees_what_the_relu_feels(blocks: GraphModule):
    module, batch = copy.deepcopy(blocks), (torch.randn(4, *IMAGE),)
    with torch.no_grad():
        bias(module, next(node for node in layers(module) if node.name == "conv2d_1")).sub_(3.0)
    found = observe(module, ("conv2d_1", "relu"), [batch])
    values: dict[str, Tensor] = {}

    def step(node: Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        values[node.name] = value = compute(node, args, kwargs)
        return value

    with torch.no_grad():
        execute(module, batch, step)
    assert found["conv2d_1"].low == pytest.approx(float(streams.felt(values["conv2d_1"], values["relu"]).min()))
    assert found["conv2d_1"].low > float(values["conv2d_1"].min())
    assert found["relu"].high == pytest.approx(float(values["relu"].max()))


class Odd(nn.Module):
    """A convolution plus what is no float tensor of its shape, behind a ReLU."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.head, self.what = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1), what
        self.offset = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.float())
        others = {
            "size": lambda: x.shape[0],
            "row": lambda: y.mean((2, 3), keepdim=True),
            "parameter": lambda: self.offset,
            "uint8": lambda: (x.abs() * 60).to(torch.uint8),
            "itself": lambda: y,
        }
        return self.head((y + others[self.what]()).relu())


@pytest.mark.parametrize("what", ["size", "row", "parameter", "uint8", "itself"])
def test_operands_of_any_kind_are_calibrated(what: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantize(exported(Odd(what)), from_python(photos()), Recipe(corrections=()))
    _, _, ranges = made.placed("everywhere")
    assert made.sqnr_db > 25
    assert ranges["conv2d"].scale < 0.05


# --- in the quantizer ---------------------------------------------------------------------------------------------


def photos(count: int = 48) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(IMAGE, np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def made() -> Quantized:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return quantize(exported(Tied()), from_python(photos(96)), Recipe(corrections=("streams",)))


def test_each_placement_has_ranges_of_its_own(made: Quantized):
    notes = [note for note in made.notes if note.startswith("residual streams")]
    assert [note.split(")")[0] for note in notes] == ["residual streams (fused", "residual streams (everywhere"]
    assert "at one scale each" in notes[1]
    _, placement, ranges = made.placed("everywhere")
    (stream,) = streams.residual_streams(made.module, placement)
    _, _, fused = made.placed("fused")
    assert len(stream) == 9
    assert len({ranges[name].scale for name in stream}) == 1
    assert len({fused[name].scale for name in stream}) > 1


def test_what_judges_has_no_part_in_ranges():
    rows = photos()
    far = [*rows[:-1], 100 * rows[-1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exported(Blocks())
        recipe = Recipe(corrections=("streams",), observers=("minmax",))
        near, outlying = (quantize(copy.deepcopy(program), from_python(one), recipe) for one in (rows, far))
        seen = quantize(program, from_python(far), Recipe(corrections=(), observers=("minmax",)))
    assert outlying.ranges["fused"]["x"] == near.ranges["fused"]["x"]
    assert seen.ranges["fused"]["x"].scale > 10 * near.ranges["fused"]["x"].scale


@pytest.mark.parametrize("position", [3, -1])
def test_a_sample_that_is_not_finite_is_refused_wherever_it_stands(position: int):
    rows = [(photo,) for photo in photos()]
    rows[position] = (np.full(IMAGE, np.nan, np.float32),)
    samples = replace(from_python(photos()), rows=rows)  # which looks at them first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exported(Blocks())
        with pytest.raises(SamplesError, match=f"sample {position % len(rows)} makes .* NaN or infinite"):
            quantize(program, samples, Recipe())
