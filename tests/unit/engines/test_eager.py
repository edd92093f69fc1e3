"""eager: the baseline computes what the model computes, whatever numbers that keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corewise.engines import BuildInputs
from corewise.engines.eager import Eager
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.samples import from_python
from corewise.source import Exported, export, operators, save_program

PLAN = Plan(threads_per_instance=1, batch=4)


class Keeping(nn.Module):
    """A layer, and something else that it keeps."""

    def __init__(self, function: Callable[..., Any], kept: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 3, 3)
        self.function = function
        if isinstance(kept, nn.Parameter):
            self.kept = kept
        else:
            self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def rotated(model: Keeping, x: Tensor) -> Tensor:
    """Positions by rotation, as the code of LLaMA has them."""
    pairs = torch.view_as_complex(x.reshape(-1, 4, 2))
    return torch.view_as_real(pairs * model.kept).flatten(1)


def converted(model: Keeping, x: Tensor) -> Tensor:
    """Converts to what it has already, as many do to be exact in half precision."""
    return model.linear(x).to(torch.float32).softmax(1)


ANGLES = torch.polar(torch.ones(4), torch.arange(4.0))
SPECTRUM = torch.randn(4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
DOUBLES = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOTHING = torch.zeros(1)


def vectors(dtype: Any = np.float32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((6, 8)).astype(dtype))


def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((6, 2, 8, 8)).astype(np.float32))


CASES = {
    "complex buffer": (rotated, ANGLES, vectors()),
    "complex parameter": (
        lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x.reshape(-1, 4, 4)) * m.kept),
        nn.Parameter(SPECTRUM),
        list(np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)),
    ),
    "float64 buffer": (lambda m, x: (m.linear(x).double() @ m.kept).float(), DOUBLES, vectors()),
    "float16 input": (lambda m, x: m.linear((x * x).float()), NOTHING, vectors(np.float16)),
    "view of what a convolution returns": (lambda m, x: m.conv(x).view(x.size(0), -1), NOTHING, images()),
}


def prepared(model: nn.Module, samples: Any, folder: Path) -> tuple[Exported, BuildInputs]:
    exported = export(model, samples)
    if exported.program is not None:
        save_program(exported.program, folder / "program.pt2")
    inputs = BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators(exported.program) if exported.program else {},
        calibration=samples,
        cpu=inspect_cpu(),
        cache=folder,
    )
    return exported, inputs


@pytest.mark.parametrize("name", CASES)
def test_the_baseline_answers_as_the_model(tmp_path: Path, name: str) -> None:
    function, kept, rows = CASES[name]
    samples = from_python(rows)
    exported, inputs = prepared(Keeping(function, kept), samples, tmp_path)
    assert exported.program is not None, exported.why_not
    build, folder = Build(engine="eager", precision="fp32"), tmp_path / "payload"
    folder.mkdir()
    Eager().build(inputs, build, folder)
    session = Eager().open(folder, build, PLAN)
    stacked = np.stack(rows)
    with torch.no_grad():
        expected = exported.module(torch.from_numpy(stacked))[0].numpy()
    np.testing.assert_allclose(session.run([stacked])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["float64 buffer", "conversion"])
def test_bf16_converts_nothing_but_float32(tmp_path: Path, name: str) -> None:
    function, kept, rows = CASES.get(name, (converted, NOTHING, vectors()))
    samples = from_python(rows)
    exported, inputs = prepared(Keeping(function, kept), samples, tmp_path)
    build, folder = Build(engine="eager", precision="bf16"), tmp_path / "payload"
    folder.mkdir()
    Eager().build(inputs, build, folder)
    stacked = np.stack(rows)
    with torch.no_grad():
        expected = exported.module(torch.from_numpy(stacked))[0].numpy()
    found = Eager().open(folder, build, PLAN).run([stacked])[0]
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


class Forces(nn.Module):
    """The gradient of an energy, as potentials of atoms return it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_(True)
            (forces,) = torch.autograd.grad(self.energy(given).sum(), given)
        return forces


def test_a_model_may_compute_gradients(tmp_path: Path) -> None:
    samples = from_python(vectors())
    model = Forces()
    exported, inputs = prepared(model, samples, tmp_path)
    build, folder = Build(engine="eager", precision="fp32"), tmp_path / "payload"
    folder.mkdir()
    eager = Eager() if exported.program is not None else Eager(exported.module)
    eager.build(inputs, build, folder)
    stacked = np.stack(vectors())
    found = eager.open(folder, build, PLAN).run([stacked])[0]
    np.testing.assert_allclose(found, model(torch.from_numpy(stacked)).detach().numpy(), rtol=1e-5, atol=1e-6)
