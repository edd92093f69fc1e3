"""The command line beside the user's own code, which prints, moves elsewhere and reads its arguments."""

import json
import subprocess

import numpy as np
from command_line import command

MODEL = """
import argparse
import os
from torch import nn

print("importing", os.getcwd())
os.chdir(os.path.dirname(os.path.abspath(__file__)))
width = argparse.ArgumentParser().parse_args()

def build():
    print("building")
    return nn.Linear(4, 2)
"""


def test_what_it_does_to_its_process_is_no_matter(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "chatty.py").write_text(MODEL)
    np.savez(tmp_path / "samples.npz", x=np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32))
    wanted = command(
        *("optimize", "project/chatty.py:build", "--samples", "samples.npz", "--engine", "eager"),
        *("--objective", "latency", "--json", "-o", "made.cw"),
        in_process=True,
    )
    found = subprocess.run(wanted, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["engine"] == "eager"
    assert "building" in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.cw", "project", "samples.npz"]
    assert sorted(path.name for path in (tmp_path / "project").glob("*.cw*")) == []
