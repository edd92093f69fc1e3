"""What the benchmarks share: the command line, files of results, progress, trial processes, alternating rounds."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from corewise import source
from corewise.common.errors import SourceError
from corewise.common.references import find_reference
from corewise.common.stats import Ratio
from corewise.engines import BuildInputs
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.client import Worker
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples
from corewise.search.task import write_program

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DATA = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
PACKAGES = ("corewise", "torch", "torchao", "openvino", "nncf", "onnxruntime", "onnx", "transformers", "numpy")
TIMEOUT_S = 900.0


def parser_of(name: str, benchmark: ModuleType) -> argparse.ArgumentParser:
    """The command line of one benchmark: its own options, and where its results go."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_options(parser)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON goes (default: bench/results)"
    )
    return parser


def machine_facts() -> dict[str, Any]:
    """The CPU, and the versions of what computes on it."""
    return {"cpu": to_json(inspect_cpu()), "versions": versions(PACKAGES)}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def read_results(path: Path) -> dict[str, Any]:
    """What a file of results holds; nothing if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Replace a file of results, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
    say(f"written to {path}")


def add_results(path: Path, key: str, record: Mapping[str, Any]) -> None:
    """Put one record into a file of results; the other records stay. The machine's facts come with it."""
    write_results(path, {**read_results(path), key: {**record, **machine_facts()}})


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


def ratio_words(ratio: Mapping[str, float]) -> str:
    """A ratio with its 95 % interval."""
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def ratio_data(ratio: Ratio) -> dict[str, float]:
    """A ratio as JSON."""
    return ratio._asdict()


def alternate(rounds: int, contenders: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each contender once a round, so that the machine's drift reaches all alike; what each call returned."""
    returned: dict[str, list[T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            returned[name].append(contender())
    return returned


def example(name: str, attribute: str) -> Any:
    """A function or class of ``examples/NAME.py``."""
    return find_reference(f"{ROOT}/examples/{name}.py:{attribute}", SourceError, "the example")


def optimize(output: Path, model: str, *options: str) -> dict[str, Any]:
    """Run the command that a user types; its summary."""
    command = ["optimize", model, *options, "-o", str(output), "--json"]
    say(f"$ corewise {' '.join(command)}")
    ended = subprocess.run(
        [sys.executable, "-m", "corewise.cli", *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    summary: dict[str, Any] = json.loads(ended.stdout)
    return summary


@contextmanager
def temporary_workspace() -> Iterator[Workspace]:
    """A workspace that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as name:
        yield Workspace.create(Path(name))


def export_into(
    workspace: Workspace, model: Any, calibration: Samples, holdout: Samples, cpu: Cpu
) -> tuple[source.Exported, BuildInputs]:
    """Export the model and write what trial processes read.

    Raises ``SourceError`` with the reason if the model cannot be exported.
    """
    exported = source.export(model, calibration)
    if exported.program is None:
        raise SourceError(exported.why_not)
    return exported, write_program(exported, calibration, holdout, cpu, workspace)


def starter(workspace: Workspace, cpu: Cpu, timeout_s: float = TIMEOUT_S) -> Callable[[Build], Worker]:
    """What starts a trial process for a build."""
    return lambda build: Worker(cpu=cpu, log=workspace.log(build), timeout_s=timeout_s)
