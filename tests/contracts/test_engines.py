"""The contract suite over the engines that come with corewise.

Inductor keeps it in ``tests/unit/engines/test_inductor.py``, whose other tests need some of the same packages.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from corewise.engines import engine
from corewise.records.jsonable import to_json
from corewise.testing.engine_contract import PLAN, Case, EngineContract, tiny_material

OPEN = """
import json, sys
from pathlib import Path
from corewise.engines import engine
from corewise.records.build import Build, Plan; from corewise.records.jsonable import from_json

build, plan = (from_json(kind, json.loads(text)) for kind, text in zip((Build, Plan), sys.argv[2:]))
engine(build.engine).open(Path(sys.argv[1]), build, plan).close()
assert "torch" not in sys.modules
"""


class OpensWithoutTorch(EngineContract):
    def test_opening_imports_no_torch(self, case: Case) -> None:
        values = [json.dumps(to_json(value)) for value in (case.build, PLAN)]
        subprocess.run([sys.executable, "-c", OPEN, str(case.payload), *values], check=True, capture_output=True)


class TestEager(EngineContract):
    engine_name = "eager"


if find_spec("corewise.engines.torch_int8"):

    class TestTorchInt8(EngineContract):
        engine_name = "torch-int8"


class TestOpenVino(OpensWithoutTorch):
    engine_name = "openvino"


class TestOnnxRuntime(OpensWithoutTorch):
    engine_name = "onnxruntime"


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_building_int8_prints_nothing(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made, (_, material) = engine(name), tiny_material("text", tmp_path / "material")
    made.build(material, made.candidates(material.cpu, material.operators)[0], tmp_path)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
