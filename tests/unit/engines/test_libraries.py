"""Nothing is sent anywhere: engines are watched for names looked up, sockets, and files in the home folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import corewise

WATCH = Path(__file__).with_name("watch_network.c")
BUILD = """
from pathlib import Path
from corewise.engines import engine
from corewise.records.build import Build
from corewise.testing.engine_contract import tiny_material

folder, name = Path(sys.argv[1]), sys.argv[2]
exported, given = tiny_material("images", folder / "images")
for precision in ("fp32", "int8"):
    build, payload = Build(engine=name, precision=precision), folder / precision
    payload.mkdir()
    engine(name).build(given, build, payload)
"""
OPEN = """
from pathlib import Path
import numpy as np
from corewise.engines import engine
from corewise.records.build import Build, Plan

folder, name = Path(sys.argv[1]), sys.argv[2]
for precision in ("fp32", "int8"):
    build = Build(engine=name, precision=precision)
    session = engine(name).open(folder / precision, build, Plan(threads_per_instance=1))
    session.run([np.zeros((1, 3, 20, 20), np.float32)])
    session.close()
"""
BY_ITSELF = {
    "openvino": """
import openvino, os, time
end = time.monotonic() + 60
while not os.path.exists(os.environ["WATCH_LOG"]) and time.monotonic() < end:
    time.sleep(0.05)
""",
    "onnxruntime": "import onnxruntime as ort; ort.InferenceSession(sys.argv[1] + '/fp32/model.onnx')",
}
"""What sends something or leaves files without corewise: it shows that the watch sees it."""


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc to compile the watch with")
    library = tmp_path_factory.mktemp("watch") / "watch.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, WATCH, "-ldl"], check=True)
    return library


def watched(code: str, arguments: list[object], watch: Path, folder: Path, home: str | None) -> list[str]:
    """The names that were looked up, the sockets that were made, and the files that were left in ``home``."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "CI", "XDG_CACHE_HOME")}
    environment |= {
        "LD_PRELOAD": str(watch),
        "WATCH_LOG": str(log),
        "PYTHONPATH": str(Path(corewise.__file__).parents[1]),
    }
    if home is not None:
        environment["HOME"] = home
    command = [sys.executable, "-W", "ignore", "-c", f"import sys\n{code}", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = log.read_text().splitlines() if log.exists() else []
    files = [path for path in Path(home).rglob("*") if path.is_file()] if home and Path(home).is_dir() else []
    return [*seen, *(str(path.relative_to(str(home))) for path in files)]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_engines_send_nothing_and_leave_nothing_at_home(name: str, watch: Path, tmp_path: Path) -> None:
    pytest.importorskip(name)
    homes = [tmp_path / f"home-{number}" for number in range(3)]
    for home in homes:
        home.mkdir()
    payloads = tmp_path / "payloads"
    payloads.mkdir()
    assert watched(BUILD, [payloads, name], watch, tmp_path, str(homes[0])) == []
    assert watched(OPEN, [payloads, name], watch, tmp_path, str(homes[1])) == []
    assert watched(OPEN, [payloads, name], watch, tmp_path, None) == []
    assert watched(OPEN, [payloads, name], watch, tmp_path, "/proc/nowhere") == []
    assert watched(BY_ITSELF[name], [payloads], watch, tmp_path, str(homes[2])) != []


FIRST_USE = """
import sys, threading
from corewise.engines.libraries import import_openvino
openvino = import_openvino()
sys.setswitchinterval(1e-6)
threading.Thread(target=lambda: [sum(range(50)) for _ in iter(int, 1)], daemon=True).start()
barrier = threading.Barrier(3)

def ask():
    barrier.wait()
    openvino.Type.i64.to_dtype()

threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_use_openvino_first_do_not_wait_for_each_other_forever() -> None:
    pytest.importorskip("openvino")
    for _ in range(3):
        subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=120)
