"""Which tests pass under the torch of this environment.

    python bench/compat.py [TEST_FILE ...]

Runs the tests of engines, quantizer and sources, a file at a time, and writes to bench/compat.json how many passed,
failed and were skipped, and the names of those that failed. Results of other versions of torch stay in the file. With
another torch:

    COREWISE_TORCH=2.14.1 scripts/test tests/contracts     # makes the environment
    .venv-torch-2.14.1/bin/python bench/compat.py
"""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "compat.json"
FILES = (
    "tests/contracts/test_engines.py",
    *(
        f"tests/unit/{room}/test_{name}.py"
        for room, names in (
            (
                "engines",
                ("engines_base", "inductor", "onnx_attention", "openvino", "receipt", "torch_int8", "torch_tools"),
            ),
            ("machine", ("torch_features",)),
            ("quantize", ("attention", "lift", "quantize", "quantize_lowered", "sensitivity", "streams")),
            ("source", ("source",)),
        )
        for name in names
    ),
)
PACKAGES = ("torch", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "transformers", "numpy")
TIMEOUT_S = 3600


def run(file: str) -> dict[str, Any]:
    """The outcome of one file's tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", file]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [str(case.get("name")) for case in failed],
    }


def main() -> None:
    """Run the files named on the command line, or all."""
    torch = metadata.version("torch").partition("+")[0]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    entry = results.setdefault(torch, {"versions": {}, "files": {}})
    entry["versions"] = {name: metadata.version(name) for name in PACKAGES}
    for file in sys.argv[1:] or FILES:
        entry["files"][file] = run(file)
        counts = ", ".join(f"{entry['files'][file][key]} {key}" for key in ("passed", "failed", "skipped"))
        print(f"torch {torch}, {file}: {counts}", flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
