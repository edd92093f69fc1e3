"""The main job on real weights and real labelled data."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def corewise(*args):
    return subprocess.run(
        [sys.executable, "-m", "corewise.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


def test_resnet20_stays_as_accurate(data_folder, tmp_path):
    made = tmp_path / "resnet20.cw"
    found = json.loads(
        corewise(
            *("optimize", f"{EXAMPLES / 'resnet20.py'}:build", "--samples", data_folder / "cifar10.npz"),
            *("--resize", 32, "--crop", 32, "--metric", "top1", "--max-drop", 0.01),
            *("--engine", "openvino", "--objective", "latency", "-o", made, "--json"),
        )
    )
    assert found["holdout"] + found["calibration"] == 3000
    assert 0.9 < found["baseline_value"] < 0.93
    assert found["drop"] <= 0.01
    assert found["drop_low"] <= found["drop"] <= found["drop_high"]
    states = {trial["engine"]: trial["state"] for trial in found["trials"] if trial["precision"] == "int8"}
    assert states == {"openvino": "ok"}
    # How fast depends on the machine; that nothing slower than the baseline is chosen does not.
    assert found["speedup"] >= 1
    assert json.loads(corewise("verify", made, "--json"))["sqnr_db"] > 20
