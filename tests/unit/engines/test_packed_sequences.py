"""Layers over packed sequences, in the runtimes that have layers over padded ones only."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from corewise.engines import engine
from corewise.records.build import Build, Plan
from corewise.samples import from_python


class Steps(nn.Module):
    """All steps and the final states of a layer in both directions."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(3, 4, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
        outputs, states = self.layers(packed)
        states = states if isinstance(states, tuple) else (states,)
        return pad_packed_sequence(outputs, batch_first=True)[0], *(state.transpose(0, 1) for state in states)


class Layers(nn.Module):
    """Several layers, of sequences that are not packed, and their final states."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(3, 4, num_layers=3, batch_first=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs, states = self.layers(x)
        return outputs, states.transpose(0, 1)


RELU = partial(nn.RNN, nonlinearity="relu")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, RELU])
@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_rows_of_different_lengths_are_answered_as_packed(
    name: str, kind: Callable[..., nn.RNNBase], tmp_path: Path
) -> None:
    runtime = engine(name)
    if reason := runtime.unavailable():
        pytest.skip(reason)
    model = Steps(kind).eval()
    random = np.random.default_rng(0)
    rows = [{"x": random.normal(size=(n, 3)).astype(np.float32), "length": np.array(n)} for n in (2, 5, 3, 5, 5)]
    samples = from_python(rows)
    given = build_inputs(model, samples, tmp_path)
    build = Build(engine=name, precision="fp32")
    (tmp_path / "built").mkdir()
    runtime.build(given, build, tmp_path / "built")
    session = runtime.open(tmp_path / "built", build, Plan(threads_per_instance=1, batch=3))
    for lengths in ((5, 7, 1), (4, 2, 4)):  # the second is shorter than what it is padded to
        x, length = random.normal(size=(3, 7, 3)).astype(np.float32), np.array(lengths)
        with torch.no_grad():
            expected = model(torch.from_numpy(x), torch.from_numpy(length))
        for answer, tensor in zip(session.run([x, length]), expected, strict=True):
            np.testing.assert_allclose(answer, tensor.numpy(), atol=1e-5)
    session.close()


@pytest.mark.parametrize("kind", [nn.RNN, RELU])
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"bias": False}])
def test_layers_without_gates_take_sequences_of_any_length(
    name: str, kind: Callable[..., nn.RNNBase], options: dict[str, bool], tmp_path: Path
) -> None:
    runtime = engine(name)
    if reason := runtime.unavailable():
        pytest.skip(reason)
    model = Layers(kind, **options).eval()
    random = np.random.default_rng(0)
    samples = from_python([{"x": random.normal(size=(n, 3)).astype(np.float32)} for n in (2, 5, 3, 5, 5)])
    build = Build(engine=name, precision="fp32")
    (tmp_path / "built").mkdir()
    runtime.build(build_inputs(model, samples, tmp_path), build, tmp_path / "built")
    session = runtime.open(tmp_path / "built", build, Plan(threads_per_instance=1, batch=3))
    for steps in (7, 1):
        x = random.normal(size=(3, steps, 3)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x))
        for answer, tensor in zip(session.run([x]), expected, strict=True):
            np.testing.assert_allclose(answer, tensor.numpy(), atol=1e-5)
    session.close()
