"""lift: the module computes what the program does, out of layers that FX quantization knows."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from corewise.quantize.lift import lift_program

IMAGE = (3, 8, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += x
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.pool(y.relu_()), 1), 1))


class Squeeze(nn.Module):
    """Depthwise and grouped convolutions, and a gate that multiplies with broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.ReLU6())
        self.grouped = nn.Conv2d(6, 8, 1, groups=2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.grouped(self.depthwise(x)))
        return torch.cat([self.drop(x * self.gate(x)), x], 1).mean((2, 3))


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1, groups=1)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 2, 3, stride=2, padding="valid", dilation=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.up(x))
        return y, self.down(y).clamp(0, 6)


class Sequence(nn.Module):
    """One-dimensional convolutions; one with padding on one side only."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv1d(4, 4, 3, padding="same")
        self.uneven = nn.Conv1d(4, 4, 2, padding="same")
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.uneven(self.norm(self.same(x)).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Odd(nn.Module):
    """A layer used twice, a weight computed from the input, products of matrices, a weight without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.plain = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu())
        x = nn.functional.linear(x, self.twice.weight * x.abs().mean(), self.twice.bias)
        return torch.addmm(self.bias, x, self.plain) + torch.mm(x, self.plain)


def program_of(model: nn.Module, *shape: int) -> ExportedProgram:
    example = torch.rand(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model.eval(), (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """The module with batch norms that do something."""
    torch.manual_seed(0)
    model = make()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 2.0)
    return model


def kinds(module: GraphModule) -> Counter[str]:
    return Counter(type(layer).__name__ for layer in module.children() if type(layer) is not nn.Module)


def left(module: GraphModule) -> set[str]:
    """The ATen operators that were not lifted."""
    return {str(node.target) for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


CASES = [
    (Residual, IMAGE, {"Conv2d": 2, "BatchNorm2d": 2, "ReLU": 2, "Linear": 1}, set()),
    (Squeeze, IMAGE, {"Conv2d": 3, "BatchNorm2d": 1, "ReLU6": 1, "Hardswish": 1, "Hardsigmoid": 1}, set()),
    (Upsampling, IMAGE, {"ConvTranspose2d": 1, "BatchNorm2d": 1, "Conv2d": 1, "ReLU6": 1}, set()),
    (Sequence, (4, 9), {"Conv1d": 1, "BatchNorm1d": 1, "ReLU": 1}, {"aten.conv1d.padding"}),
    (Recurrent, (5, 4), {"Linear": 1}, {"aten.zeros.default", "aten.lstm.input", "aten.select.int"}),
    (Odd, (4,), {"Linear": 4, "ReLU": 1}, {"aten.linear.default", "aten.abs.default"}),
]


@pytest.mark.parametrize(
    ("make", "shape", "layers", "operators"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_the_module_computes_what_the_program_does(
    make: Callable[[], nn.Module], shape: tuple[int, ...], layers: dict[str, int], operators: set[str], decomposed: bool
) -> None:
    program = program_of(trained(make), *shape)
    if decomposed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = program.run_decompositions()
    module = lift_program(program)
    if not decomposed:
        assert kinds(module) == layers
        assert left(module) >= operators
        assert operators or not left(module)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            assert_same(module(x), make_tuple(program.module()(x)))


def make_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
