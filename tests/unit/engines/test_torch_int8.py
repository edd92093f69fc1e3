"""torch-int8: what is offered, what ends in int8, and that its ranges and weights are what they should be."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs
from corewise.engines.base import MIXED_ROWS
from corewise.engines.libraries import quiet
from corewise.engines.torch_int8 import TorchInt8
from corewise.machine import inspect as cpu
from corewise.quantize import fx
from corewise.quantize.lift import lift_program
from corewise.records.build import Build, Plan
from corewise.samples import from_python
from corewise.source import export, save_program

REDUCED = Build(engine="torch-int8", precision="int8", options=(("reduce_range", True),))
DYNAMIC = Build(engine="torch-int8", precision="int8-dynamic")
PLAN = Plan(threads_per_instance=1, batch=4)


class Mobile(nn.Module):
    """An inverted residual with a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        x = torch.relu(self.project(y * self.gate(y)) + x)
        return self.head(x.mean((2, 3)))


class UpAndDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, 2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    """States of the batch's size, which a trace would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.feed = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        heads = [layer(x).view(x.shape[0], -1, 2, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        y = nn.functional.scaled_dot_product_attention(*heads, attn_mask=(ids > 3)[:, None, None, :])
        x = self.norm(x + y.transpose(1, 2).reshape(x.shape[0], -1, 16))
        return x + self.feed(x)


class Computed(nn.Module):
    """A convolution with a constant weight and one whose weight is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.one(x), (self.two.weight + 0 * x.sum()).tanh())


class OnlyComputed(Computed):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, (self.two.weight + 0 * x.sum()).tanh())


class Normed(nn.Module):
    """Weights that are computed from parameters alone, as vocoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.two = nn.utils.parametrizations.weight_norm(nn.Linear(36 * 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu().flatten(1))


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 3, 8, 8), np.float32)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 20, (24, 6))


def sequences() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 5, 4), np.float32)


@pytest.fixture
def material(tmp_path: Path) -> Callable[[nn.Module, np.ndarray], BuildInputs]:
    def make(model: nn.Module, rows: np.ndarray) -> BuildInputs:
        samples = from_python(list(rows))
        exported = export(model, samples)
        assert exported.program is not None, exported.why_not
        save_program(exported.program, tmp_path / "program.pt2")
        names = [str(node.target) for node in exported.program.graph.nodes if node.op == "call_function"]
        return BuildInputs(
            program=tmp_path / "program.pt2",
            inputs=exported.inputs,
            outputs=exported.outputs,
            operators=dict(Counter(names)),
            calibration=samples,
            cpu=cpu.inspect_cpu(),
            cache=tmp_path,
        )

    return make


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    folder = tmp_path / "payload"
    folder.mkdir()
    return folder


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def sqnr_db(found: np.ndarray, expected: np.ndarray) -> float:
    return 10 * float(np.log10(np.square(expected).sum() / np.square(found - expected).sum()))


@pytest.mark.parametrize(
    ("make", "rows", "build", "told"),
    [
        (Mobile, images, REDUCED, "4 convolutions and 1 linear layers in int8"),
        (UpAndDown, images, REDUCED, "2 convolutions and 0 linear layers in int8"),
        (Computed, images, REDUCED, "1 convolutions and 0 linear layers in int8, 1 of 2 layers stay in fp32"),
        (Normed, images, REDUCED, "1 convolutions and 1 linear layers in int8"),
        (Recurrent, sequences, REDUCED, "0 convolutions and 1 linear layers in int8"),
        (Recurrent, sequences, DYNAMIC, "1 linear layers in int8"),
        (Attention, tokens, REDUCED, "0 convolutions and 5 linear layers in int8"),
        (Attention, tokens, DYNAMIC, "5 linear layers in int8"),
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "precision", "")),
)
def test_layers_run_in_int8_and_answer_as_the_model_at_any_batch(
    make: Callable[[], nn.Module],
    rows: Callable[[], np.ndarray],
    build: Build,
    told: str,
    material: Callable[[nn.Module, np.ndarray], BuildInputs],
    payload: Path,
) -> None:
    before, model = torch.backends.quantized.engine, seeded(make)
    notes = TorchInt8().build(material(model, rows()), build, payload)
    session = TorchInt8().open(payload, build, PLAN)
    assert torch.backends.quantized.engine == before
    assert all(" is wrong: " in note or note == MIXED_ROWS for note in notes[1:])
    assert (MIXED_ROWS in notes) == (build.precision == "int8-dynamic")
    assert notes[0].endswith(f"), {told}")
    backend = json.loads((payload / "torch_int8.json").read_text())["backend"]
    assert notes[0].startswith(f"backend {backend} (")
    for batch in (1, 3, 24):
        with torch.no_grad():
            expected = model(torch.from_numpy(rows()[:batch])).numpy()
        assert sqnr_db(session.run([rows()[:batch]])[0], expected) > 20
    session.close()


def test_opening_and_running_print_nothing(
    material: Callable[[nn.Module, np.ndarray], BuildInputs], payload: Path
) -> None:
    TorchInt8().build(material(seeded(Computed), images()), REDUCED, payload)
    np.save(payload / "images.npy", images())
    code = """
import sys, numpy
from pathlib import Path
from corewise.engines import engine
from corewise.records.build import Build, Plan

folder, build = Path(sys.argv[1]), Build(engine="torch-int8", precision="int8")
session = engine("torch-int8").open(folder, build, Plan(threads_per_instance=1))
session.run([numpy.load(folder / "images.npy")])
"""
    command = [sys.executable, "-W", "error", "-c", code, str(payload)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_constant_weights_there_is_nothing_to_quantize(
    material: Callable[[nn.Module, np.ndarray], BuildInputs], payload: Path
) -> None:
    with pytest.raises(EngineError, match="nothing to quantize"):
        TorchInt8().build(material(seeded(OnlyComputed), images()), REDUCED, payload)


def test_a_backend_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch_int8.json").write_text('{"backend": "abacus"}')
    with pytest.raises(EngineError, match="no quantized backend abacus; optimize again"):
        TorchInt8().open(tmp_path, REDUCED, PLAN)


def test_what_is_offered_depends_on_layers_and_cpu() -> None:
    here = cpu.inspect_cpu()
    old = dataclasses.replace(here, architecture="x86_64", isa=("avx2",))
    new = dataclasses.replace(old, isa=("avx2", "avx_vnni"))
    arm = dataclasses.replace(old, architecture="aarch64", isa=("neon",))
    full = Build(engine="torch-int8", precision="int8")
    convolutions, linears = {"aten.conv2d.default": 5, "aten.linear.default": 1}, {"aten.linear.default": 3}
    assert TorchInt8().candidates(old, convolutions) == (REDUCED,)
    assert TorchInt8().candidates(new, convolutions) == (full,)
    assert TorchInt8().candidates(arm, convolutions) == (full,)
    assert TorchInt8().candidates(old, linears) == (REDUCED, DYNAMIC)
    assert TorchInt8().candidates(old, {"aten.sin.default": 3}) == ()
    assert TorchInt8().needs(REDUCED) == TorchInt8().needs(DYNAMIC) == ()
    if here.architecture == "x86_64":
        assert TorchInt8().needs(full) == ("int8_dot",)


def converted(model: nn.Module, rows: np.ndarray, reduce_range: bool) -> Any:
    x = torch.from_numpy(rows)
    program = torch.export.export(model.eval(), (x,), strict=False)
    with quiet(), fx.backend(fx.backends()[0]):
        return fx.to_int8(fx.calibrate(lift_program(program), [(x,)], reduce_range))


@pytest.mark.parametrize(("reduce_range", "largest"), [(True, 64), (False, 128)])
def test_reduced_range_takes_a_bit_from_the_weights(reduce_range: bool, largest: int) -> None:
    module = converted(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), images(), reduce_range)
    (layer,) = module.children()
    weight = layer.weight().int_repr().int().abs()
    assert largest * 0.9 < int(weight.max()) <= largest
    assert int(weight.amax((1, 2, 3)).min()) > largest * 0.9  # per channel


def test_the_range_of_a_relu6_is_all_used() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            nn.init.normal_(self.conv.weight, std=10)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu6(self.conv(x))

    model, x = seeded(Wide), torch.from_numpy(images())
    found = converted(model, images(), True)(x)[0]
    with torch.no_grad():
        assert float(found.max()) <= 6.05
        assert float((found - model(x)).abs().quantile(0.9)) <= 6 / 255


def test_a_histogram_of_some_values_finds_the_range_of_all() -> None:
    tensor = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 16, 64, 64), np.float32))
    sampled, full = fx.SampledHistogram(), torch.ao.quantization.HistogramObserver()
    assert sampled(tensor) is tensor
    full(tensor)
    scales = [float(observer.calculate_qparams()[0]) for observer in (sampled, full)]
    assert scales[0] == pytest.approx(scales[1], rel=0.1)
