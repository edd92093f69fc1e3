"""The contract suite over the engines that come with corewise."""

import json
import subprocess
import sys
from importlib.util import find_spec

from corewise.testing.engine_contract import PLAN, Case, EngineContract
from corewise.values import to_json

OPEN = """
import json, sys
from pathlib import Path
from corewise.engines import engine
from corewise.values import Build, Plan, from_json

build, plan = (from_json(kind, json.loads(text)) for kind, text in zip((Build, Plan), sys.argv[2:]))
engine(build.engine).open(Path(sys.argv[1]), build, plan).close()
assert "torch" not in sys.modules
"""


class OpensWithoutTorch(EngineContract):
    def test_opening_imports_no_torch(self, case: Case) -> None:
        values = [json.dumps(to_json(value)) for value in (case.build, PLAN)]
        subprocess.run([sys.executable, "-c", OPEN, str(case.payload), *values], check=True, capture_output=True)

    def test_building_prints_nothing(self, case: Case, tmp_path, capfd) -> None:
        case.engine.build(case.material, case.build, tmp_path)
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", "")


class TestEager(EngineContract):
    engine_name = "eager"


if find_spec("corewise.engines.torch_int8"):

    class TestTorchInt8(EngineContract):
        engine_name = "torch-int8"


class TestOpenVino(OpensWithoutTorch):
    engine_name = "openvino"


class TestOnnxRuntime(OpensWithoutTorch):
    engine_name = "onnxruntime"
