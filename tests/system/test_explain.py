"""``corewise explain``: the command as a user runs it, the steps behind it, and what it draws."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from command_line import several
from rich.console import Console
from torch import nn

from corewise.common.errors import CorewiseError, EngineError, InputError, SamplesError, SourceError
from corewise.quantize.explanation import Explanation
from corewise.quantize.sensitivity import LayerSensitivity
from corewise.report.sensitivity import data, render, svg
from corewise.search.explanation import explain

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, from copying a graph

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
    )
"""


def images(count: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 12, 12)).astype(np.float32)


def run(*args: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "corewise.cli", "explain", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "net.py").write_text(MODEL)
    np.savez(folder / "good.npz", x=images())
    return folder


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws(place: Path) -> None:
    done = run("net.py:build", "--samples", "good.npz", "--measured", 4, "--plot", "figure.svg", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert "dB with all 2 layers in int8, on 4 samples" in said
    assert "good.npz: 4 calibrated, 4 measured" in said
    assert "4 calibrate; give 100 or more" in said
    assert "first to return to floating point: " in said
    assert "stay in floating point - 2: no engine has an int8 kernel" in said
    assert ElementTree.parse(place / "figure.svg").getroot().tag.endswith("svg")


def test_what_is_wrong_is_told_in_one_line(place: Path) -> None:
    wrong = (
        (("missing.py:build", "--samples", "good.npz"), "missing.py"),
        (("net.py:build", "--samples", "good.npz", "--plot", "nowhere/figure.svg"), "there is no folder nowhere"),
    )
    found = several([("explain", *args) for args, _ in wrong], place)
    for (_, words), (code, _, errors) in zip(wrong, found, strict=True):
        assert code == 2
        assert errors.startswith("corewise: ")
        assert words in errors
        assert len(errors.splitlines()) == 1


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3)))


def test_the_steps_from_python() -> None:
    torch.manual_seed(0)
    told: list[Any] = []
    found = explain(Branches(), list(images()), calibration=9, measured=100, weight_bits=8, on_event=told.append)
    assert [layer.name for layer in found.layers] == ["conv", "linear"]
    assert (found.model, found.calibration, found.measured, found.weight_bits) == ("Branches", 9, 3, 8)
    assert sorted(found.returning) == ["conv", "linear"]
    assert found.timed == found.timing.startswith("OpenVINO")
    assert len(told) == 5
    assert 10 < found.sqnr_db < 80


@pytest.mark.parametrize(
    ("model", "options", "kind", "words"),
    [
        (nn.Flatten(), {}, EngineError, "no convolution or linear layer to quantize"),
        (Branches(), {"measured": 0}, InputError, "0 samples cannot measure"),
        (Branches(), {"weight_bits": 4}, InputError, "4 bits"),
        (Branches(), {"calibration": 12}, InputError, "12 of 12 samples"),
        ("no_such_module:build", {}, SourceError, "no_such_module"),
    ],
)
def test_what_cannot_be_explained(model: Any, options: dict[str, int], kind: type[CorewiseError], words: str) -> None:
    with pytest.raises(kind, match=words):
        explain(model, list(images()), **options)


def test_no_samples_are_told() -> None:
    with pytest.raises(SamplesError, match="no samples"):
        explain(Branches(), [])


def layer(name: str, alone: float, multiply_adds: int = 1000, saves_ms: float | None = None) -> LayerSensitivity:
    return LayerSensitivity(
        name=name,
        kind="convolution",
        alone=alone,
        without=0.01 - alone / 2,
        everything=0.01,
        multiply_adds=multiply_adds,
        saves_ms=saves_ms,
    )


def explanation(*layers: LayerSensitivity) -> Explanation:
    return Explanation(
        model="net.py:<build>",
        samples="photos",
        calibration=9,
        measured=3,
        weight_bits=7,
        layers=layers,
        returning=tuple(one.name for one in layers),
        kept=(("up", "no kernel"),),
        notes=("bias correction +0.4 dB, kept",),
        timing="not measured: needs openvino",
    )


def printed(found: Explanation, **options: bool) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 (closed with the console)
    with console.file:
        console.print(render(found, **options))
        return console.export_text()


MANY = explanation(*(layer(f"layer{k}", 0.0001 * (k + 1)) for k in range(25)), layer("still", 0.0))


def test_the_table_has_the_worst_first() -> None:
    text = printed(MANY)
    rows = [line.split()[0] for line in text.splitlines() if " conv " in line]
    assert rows == [f"layer{k}" for k in range(24, 4, -1)]
    assert "and 6 more" in text
    assert "20.0 dB with all 26 layers in int8, on 3 samples" in text
    assert "saves" not in text
    whole = printed(MANY, everything=True)
    assert [line.split()[0] for line in whole.splitlines() if " conv " in line][-2:] == ["layer0", "still"]
    assert "more with smaller errors" not in whole
    lengths = [line.count("█") for line in whole.splitlines() if " conv " in line]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 10


def test_the_table_fits_eighty_columns_and_tells_times() -> None:
    text = printed(explanation(layer("a.very.long.name." * 4, 0.01, saves_ms=-1.5), layer("b", 0.001)))
    assert max(map(len, text.splitlines())) <= 80
    assert "-1.50" in text


def test_json_is_whole() -> None:
    found = json.loads(json.dumps(data(replace(MANY, layers=MANY.layers[:2]))))
    assert found["sqnr_db"] == pytest.approx(20.0)
    assert found["kept"] == {"up": "no kernel"}
    assert found["order_of_return"][:2] == ["layer0", "layer1"]
    first = found["layers"][0]
    assert (first["name"], first["alone_db"], first["saves_ms"]) == ("layer0", pytest.approx(40.0), None)
    assert first["multiply_adds_share"] == 0.5


@pytest.mark.parametrize(
    "found",
    [
        MANY,
        explanation(layer("one", 0.0)),
        explanation(layer("<script>&'\"", 0.01, saves_ms=0.0), layer("b", 0.001, saves_ms=-2.0)),
        explanation(layer("a.very.long.name." * 9, 0.01, multiply_adds=0)),
    ],
)
def test_the_figure_holds_every_layer_within_its_frame(found: Explanation) -> None:
    text = svg(found)
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert len(root.findall(f"{space}g")) == len(found.layers)
    for element in root.iter():
        for key, limit in (("cx", width), ("x1", width), ("x2", width), ("x", width), ("cy", height), ("y", height)):
            assert 0 <= float(element.attrib.get(key, 0)) <= limit
        assert float(element.attrib.get("width", 0)) >= 0
    assert text.count("http") == 1  # nothing but the name space
    said = " ".join(element.text or "" for element in root.iter(f"{space}text"))
    assert "signal over error at the output, dB" in said
    assert ("ms that int8 saves" in said) == found.timed
