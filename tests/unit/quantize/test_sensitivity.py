"""What each layer costs: against runs of what would really be built, and the order in which layers return."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from corewise.common.errors import EngineError
from corewise.engines.onnx_export import export_onnx
from corewise.engines.openvino_profile import layer_ms
from corewise.quantize.graph import compute, execute
from corewise.quantize.placement import TARGETS, Target
from corewise.quantize.ptq import quantize
from corewise.quantize.quantized import Quantized, Recipe, batches, lower
from corewise.quantize.sensitivity import (
    EQUAL_DB,
    LayerSensitivity,
    decibels,
    floating,
    measure_sensitivity,
    nodes_by_layer,
    order_of_return,
    saving,
)
from corewise.quantize.simulate import Simulation, sqnr_db
from corewise.records.build import TensorSpec
from corewise.samples import Samples, from_python

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph


class Residual(nn.Module):
    """A residual block whose first convolution runs twice, depthwise and transposed convolutions, linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.mix, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = torch.relu(self.twice(self.twice(x).relu()) + x)
        y = self.up(self.depthwise(x))
        return self.head(self.mix(y.mean((2, 3))).relu()), y.argmax(1)


class Tokens(nn.Module):
    """Tokens (batch, 5, 8) with outliers behind the norm that count for little, for SmoothQuant to pay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16, bias=False), nn.Linear(16, 8)
        with torch.no_grad():
            self.norm.weight[0] = 40.0
            self.up.weight[:, 0] /= 40.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (3, 8, 8)),
    "tokens": (Tokens, (5, 8)),
}


def samples(shape: tuple[int, ...], count: int = 24) -> Samples:
    generator = np.random.default_rng(0)
    return from_python([generator.standard_normal(shape).astype(np.float32) for _ in range(count)])


@cache
def quantized(name: str) -> Quantized:
    torch.manual_seed(0)
    make, shape = NETS[name]
    example = (torch.randn(2, *shape),)
    program = torch.export.export(make().eval(), example, dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
    # Without what comes before and would make the one that is wanted useless.
    corrections = ("rounding", "bias") if name == "residual" else ("smooth", "rounding")
    return quantize(program, samples(shape), Recipe(weight_bits=7, corrections=corrections))


def inputs(name: str) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="x", dtype="float32", shape=(None, *NETS[name][1])),)


def held(name: str, size: int) -> list[tuple[Tensor, ...]]:
    return list(batches(samples(NETS[name][1], 6), size))


def built_db(found: Quantized, given: list[tuple[Tensor, ...]], target: Target, ignored: tuple[str, ...]) -> float:
    """SQNR of what ``Quantized.placed`` builds."""
    module, placement, ranges = found.placed(target, ignored)
    simulation = Simulation(module, placement.edges, ranges)
    with torch.no_grad():
        expected = [execute(found.reference, batch, compute) for batch in given]
    return sqnr_db(expected, [simulation.run(batch) for batch in given])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETS)
def test_errors_are_those_of_what_would_be_built(name: str, target: Target) -> None:
    found, given = quantized(name), held(name, 4)
    rows = measure_sensitivity(found, given, target)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) > 1
    for row in rows:
        others = tuple(other for other in names if other != row.name)
        assert row.alone_db == pytest.approx(built_db(found, given, target, others), abs=0.02)
        assert row.without_db == pytest.approx(built_db(found, given, target, (row.name,)), abs=0.02)
        assert row.everything_db == pytest.approx(built_db(found, given, target, ()), abs=0.02)
        assert row.won_back == row.everything - row.without
        assert row.saves_ms is None


def test_the_nets_are_corrected() -> None:
    notes = {name: " ".join(quantized(name).notes) for name in NETS}
    assert quantized("tokens").smoothed, notes
    assert any("GPTQ rounding" in note and ", kept" in note for note in quantized("residual").notes), notes


def test_batches_do_not_matter() -> None:
    found = quantized("residual")
    ones, all_at_once = (measure_sensitivity(found, held("residual", size)) for size in (1, 6))
    for a, b in zip(ones, all_at_once, strict=True):
        assert (a.alone, a.without) == pytest.approx((b.alone, b.without), rel=1e-2)
        assert a.multiply_adds == b.multiply_adds


def test_the_program_is_left_as_it_was() -> None:
    found = quantized("residual")
    before = {k: v.clone() for part in (found.module, found.plain) for k, v in part.state_dict().items()}
    measure_sensitivity(found, held("residual", 6))
    after = {k: v for part in (found.module, found.plain) for k, v in part.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_multiply_adds_are_counted_for_one_item() -> None:
    counted = {
        row.name: (row.kind, row.multiply_adds)
        for row in measure_sensitivity(quantized("residual"), held("residual", 4))
    }
    assert counted == {
        "stem": ("convolution", 8 * 8 * 8 * 3 * 9),
        "twice": ("convolution", 2 * 8 * 8 * 8 * 8 * 9),
        "depthwise": ("convolution", 4 * 4 * 8 * 9),
        "up": ("convolution", 4 * 4 * 8 * 4 * 2 * 2),
        "mix": ("linear", 4 * 4),
        "head": ("linear", 4 * 5),
    }
    tokens = {row.name: row.multiply_adds for row in measure_sensitivity(quantized("tokens"), held("tokens", 4))}
    assert tokens == {"up": 5 * 8 * 16, "down": 5 * 16 * 8}


def test_decibels() -> None:
    assert [decibels(error) for error in (1.0, 0.01, 0.0)] == [0.0, 20.0, EQUAL_DB]
    assert decibels(float("nan")) == decibels(float("inf")) == -EQUAL_DB


def test_layers_are_found_again_in_what_was_exported(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    found, example = quantized("residual"), held("residual", 2)[0]
    given = [example[0].repeat(8, 1, 1, 1).numpy()]
    for program in (floating(found, inputs("residual"), example), lower(found, "fused", inputs("residual"), example)):
        layers = nodes_by_layer(found, program)
        assert set(layers.values()) == {row.name for row in measure_sensitivity(found, [example])}
        path = tmp_path / "model.onnx"
        export_onnx(program, path)
        spent = layer_ms(path, layers, given, 1)
        assert spent.keys() == layers.keys()
        assert all(-0.1 < value < 1000 for value in spent.values())  # differences of means in whole microseconds
        assert sum(spent.values()) > 0


def test_a_floating_program_computes_what_the_model_did() -> None:
    found = quantized("tokens")
    given = held("tokens", 2)[0]
    expected = execute(found.reference, given, compute)[0]
    torch.testing.assert_close(floating(found, inputs("tokens"), given).module()(*given)[0], expected)


def test_a_program_that_openvino_cannot_read_is_told(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 3)) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])], "one", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"OpenVINO cannot run model\.onnx: .*NoSuchOperator"):
        layer_ms(tmp_path / "model.onnx", ["conv2d"], [np.zeros((1, 3), np.float32)], 1)


def row(name: str, won: float, saves_ms: float | None = 1.0, multiply_adds: int = 100) -> LayerSensitivity:
    return LayerSensitivity(
        name=name,
        kind="linear",
        alone=0.5,
        without=1.0 - won,
        everything=1.0,
        multiply_adds=multiply_adds,
        saves_ms=saves_ms,
    )


def test_layers_return_in_the_order_of_accuracy_won_for_time_lost() -> None:
    rows = [row("dear", 0.4, 8.0), row("cheap", 0.3, 1.0), row("harms", -0.1, 1.0), row("useless", 0.0, 1.0)]
    assert order_of_return(rows) == ("cheap", "dear", "useless", "harms")


def test_a_layer_that_saves_nothing_comes_early_but_not_for_noise() -> None:
    rows = [row("slower", 0.2, -3.0), row("noise", 1e-6, -3.0), row("cheap", 0.3, 1.0), row("dear", 0.3, 10.0)]
    assert order_of_return(rows) == ("slower", "cheap", "dear", "noise")


def test_multiply_adds_stand_in_where_any_time_is_missing() -> None:
    rows = [row("fast", 0.2, 0.1, multiply_adds=1000), row("small", 0.2, None, multiply_adds=10)]
    assert order_of_return(rows) == ("small", "fast")
    assert order_of_return([replace(one, saves_ms=0.1 * k + 0.1) for k, one in enumerate(rows)]) == ("fast", "small")


def test_what_one_kernel_saves_is_shared_by_multiply_adds() -> None:
    layers = [row("point", 0.1, None, 300), row("depth", 0.1, None, 100), row("next", 0.1, None, 100)]
    found = saving(layers, {"point": 9.0, "next": 3.0}, {"point": 3.0, "depth": 2.0, "next": 1.0})
    assert [one.saves_ms for one in found] == [3.0, 1.0, 2.0]
    assert [one.saves_ms for one in saving(layers, {}, {"next": 1.0})] == [None, None, None]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-5, 5)), max_size=12), st.integers(-3, 3))
def test_every_layer_returns_once_and_units_do_not_matter(pairs: list[tuple[float, float]], power: int) -> None:
    rows = [row(str(k), won, saves) for k, (won, saves) in enumerate(pairs)]
    order = order_of_return(rows)
    assert sorted(order) == sorted(one.name for one in rows)
    won = [next(one.won_back for one in rows if one.name == name) > 0 for name in order]
    assert won == sorted(won, reverse=True)
    scaled = [replace(one, saves_ms=(one.saves_ms or 0.0) * 2.0**power) for one in rows]
    if any(one.saves_ms > 1e-3 for one in rows if one.saves_ms is not None):
        assert order_of_return(scaled) == order
