"""Serving from an environment that has the server, the engine and nothing more: no torch, nothing that builds."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from places import ROOT
from serving_tools import ARTIFACT, serving

from corewise import artifact
from corewise.machine.inspect import inspect_cpu

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

PROJECT = ROOT
MOST_MEMORY_BYTES = 400e6


def pip(interpreter, command, *args):
    """What pip prints; uv in its place where there is one, for it keeps what it has unpacked before."""
    if find_spec("uv"):
        whole = [sys.executable, "-m", "uv", "pip", command, "--python", interpreter, *args]
    else:
        whole = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter, command, *args]
    return subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with ``corewise[serve-onnxruntime]``."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    interpreter = folder / "bin" / "python"
    pip(interpreter, "install", "--quiet", f"{PROJECT}[serve-onnxruntime]")
    return interpreter


def resident_bytes(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def test_an_artifact_is_served_without_torch(python, tmp_path):
    packages = pip(python, "list")
    assert not {"torch", "onnx", "onnxscript", "torchao"} & {line.split()[0] for line in packages.splitlines()}
    shutil.copytree(ARTIFACT, tmp_path / "net.cw")
    inputs, outputs = artifact.read(ARTIFACT).golden()
    with serving(tmp_path / "net.cw", python=python) as server:
        rows = inputs[0][:2]
        tensor = {"name": "input", "datatype": "FP32", "shape": list(rows.shape), "data": rows.reshape(-1).tolist()}
        found = server.post("/v2/models/net/infer", json={"inputs": [tensor]})
        assert found.status_code == 200, found.text
        answer = np.reshape(found.json()["outputs"][0]["data"], (2, -1))
        np.testing.assert_allclose(answer, outputs[0][:2].reshape(2, -1), atol=5e-3)
        # Proportional: what both processes share counts once.
        assert sum(map(resident_bytes, [server.process.pid, *server.engine_pids()])) < MOST_MEMORY_BYTES
        assert server.stop() == 0
