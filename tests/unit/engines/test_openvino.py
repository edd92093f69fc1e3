"""OpenVINO: errors with their cause, and the precision of what is not int8."""

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build_inputs
from torch import Tensor, nn

from corewise.common.errors import EngineError
from corewise.engines import BuildInputs, engine, openvino_session
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, QuantizationOptions
from corewise.samples import from_python

pytest.importorskip("openvino")
PLAN = Plan(threads_per_instance=1, batch=2)
REDUCED = QuantizationOptions(reduce_range=not inspect_cpu().int8_dot)


class SuperResolution(nn.Module):
    """ESPCN (Shi et al. 2016) in small: tanh between convolutions, and a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.shuffle = nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, image: Tensor) -> Tensor:
        return self.shuffle(self.last(torch.tanh(self.second(torch.tanh(self.first(image))))))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> BuildInputs:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("espcn")
    calibration = from_python(list(np.random.default_rng(0).random((12, 1, 12, 12), np.float32)))
    return build_inputs(SuperResolution().eval(), calibration, folder)


def built(given: BuildInputs, build: Build, folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    return engine("openvino").build(given, build, folder)


def answered(build: Build, folder: Path) -> np.ndarray:
    session = engine("openvino").open(folder, build, PLAN)
    answer = session.run([np.random.default_rng(1).random((3, 1, 12, 12), np.float32)])[0]
    session.close()
    return answer


@pytest.mark.parametrize("quantizer", ["engine", "corewise"])
def test_a_rest_that_does_not_compile_in_bf16_runs_in_fp32(
    quantizer: str, given: BuildInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"quantizer": quantizer, "reduce_range": REDUCED.reduce_range}
    plain = Build(engine="openvino", precision="int8").with_quantization(QuantizationOptions(**options))
    mixed = plain.with_quantization(QuantizationOptions(**options, rest="bf16"))
    assert not any("bf16" in note for note in built(given, plain, tmp_path / "plain"))
    # OpenVINO refuses this precision on every CPU, as it refuses bf16 for some graphs on CPUs that have it.
    monkeypatch.setitem(openvino_session.PRECISION_HINTS, "bf16", "none")
    note = built(given, mixed, tmp_path / "mixed")[-1]
    assert note.startswith(
        "warning: what is not int8 runs in fp32 instead of bf16: OpenVINO cannot compile this model: "
    )
    assert "INFERENCE_PRECISION_HINT" in note
    assert np.array_equal(answered(mixed, tmp_path / "mixed"), answered(plain, tmp_path / "plain"))


def test_a_rest_that_compiles_in_bf16_stays(given: BuildInputs, tmp_path: Path) -> None:
    build = Build(engine="openvino", precision="int8").with_quantization(
        QuantizationOptions(reduce_range=REDUCED.reduce_range, rest="bf16")
    )
    notes = built(given, build, tmp_path / "payload")
    # Without bf16 hardware OpenVINO takes the hint and computes in fp32.
    fell_back = (tmp_path / "payload" / openvino_session.SETTINGS).exists()
    assert fell_back == any("fp32 instead of bf16" in note for note in notes)
    assert answered(build, tmp_path / "payload").shape == (3, 1, 24, 24)


def test_openvinos_errors_name_their_cause(given: BuildInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(engine="openvino", precision="fp32")
    built(given, build, tmp_path / "payload")
    monkeypatch.setitem(openvino_session.PRECISION_HINTS, "fp32", "none")
    with pytest.raises(EngineError) as caught:
        engine("openvino").open(tmp_path / "payload", build, PLAN)
    assert caught.value.what.startswith("OpenVINO cannot compile this model: Wrong value none for property key")
    assert "Exception from" not in caught.value.what
    assert ".cpp:" not in caught.value.what
    monkeypatch.undo()
    (tmp_path / "payload" / "model.xml").write_text("<nonsense/>")
    with pytest.raises(EngineError, match=r"OpenVINO cannot read model\.xml: "):
        engine("openvino").open(tmp_path / "payload", build, PLAN)
