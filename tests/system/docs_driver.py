"""Runs what the documentation shows, in one process, so that torch is imported once for all pages.

Reads a JSON request a line from stdin and answers each with a line on stdout. A request has the page's ``folder`` and
``code`` (Python, in the page's namespace), ``script`` (a Python file and its arguments), ``module`` (one, as ``python
-m`` has it) or ``command`` (of corewise).
Searches are cut short: they measure for moments, run in this process, and try the baseline alone; a ``thorough`` one
also tries a candidate of an engine.
"""

import contextlib
import importlib
import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from corewise.artifact import open as opening
from corewise.artifact import under_load
from corewise.batching import simulate
from corewise.cli import main as corewise
from corewise.common import stats
from corewise.engines.onnxruntime import OnnxRuntime
from corewise.records.build import Build
from corewise.runtime import race
from corewise.runtime.client import Client, InProcess
from corewise.runtime.worker import TrialChild
from corewise.search import elastic, end_to_end, finals, optimization, pixels, retuning, search, slo, trial, tuning
from corewise.search.trial import SearchContext

ENGINES = ("onnxruntime",)


class Here(InProcess):
    """What a process of trials does, of any engine, in this process, which has imported torch."""

    def __init__(self, **process: Any) -> None:
        self._child = TrialChild()

    def close(self) -> None:
        self._child._close()


class Quick:
    """Searches that take seconds."""

    thorough = False

    def __init__(self) -> None:
        trial.MEASURE_S = race.WARM_S = 0.1
        end_to_end.MEASURE_S = pixels.ROUND_S = 0.05
        retuning.MEASURE_S = retuning.ROUND_S = 0.05
        elastic.REQUESTS, elastic.ROUNDS = 100, 1
        elastic.DUEL_S = elastic.SHORTEST_DUEL_S = 0.05
        race.run_race.__kwdefaults__["round_s"] = 0.05
        finals.ROUNDS = stats.MIN_ROUNDS
        for module in (tuning, search, retuning):
            module.BATCHES = (1, 8, 16)
        slo.LOAD_S = slo.CONFIRM_S = 0.5
        slo.REQUESTS, slo.MOST_LOADS = 20, 2
        simulate.most_rate.__kwdefaults__["requests"] = simulate._MOST_REQUESTS = 200
        search.find_contradiction = lambda *of: None  # moments often contradict each other
        for module in (opening, retuning, under_load):
            module.Worker = Here
        optimization.DEFAULT_ENGINES = ENGINES
        optimization.optimize.__kwdefaults__["engines"] = ENGINES
        offered = OnnxRuntime.candidates

        def candidates(onnxruntime: Any, cpu: Any, operators: Any) -> Any:
            builds = offered(onnxruntime, cpu, operators) if self.thorough else ()
            return tuple(build for build in builds if build.precision == "int8" and not build.option("quantizer", ""))

        OnnxRuntime.candidates = candidates  # type: ignore[method-assign]
        if "PYTEST_XDIST_WORKER" in os.environ:  # as in conftest.py
            torch.set_num_threads(1)

        def client(context: SearchContext, build: Build, share: float = 1.0) -> Client:
            return Here()

        SearchContext.client = client  # type: ignore[method-assign]


def enter(folder: str) -> None:
    """Work in the page's folder, and import from it as ``python`` does; forget the modules of other pages."""
    if sys.path[0] == folder:
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(str(Path(folder).parent) + os.sep):
            del sys.modules[name]
    sys.path[0] = folder
    os.chdir(folder)
    importlib.invalidate_caches()


def run(request: dict[str, Any], names: dict[str, Any]) -> str:
    """What went wrong, empty where nothing did."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if "code" in request:
                exec(compile(request["code"], request["page"], "exec"), names)
            elif "script" in request:
                sys.argv = request["script"]
                runpy.run_path(sys.argv[0], run_name="__main__")
            elif "module" in request:
                sys.argv = request["module"]
                runpy.run_module(sys.argv[0], run_name="__main__")
            else:
                sys.argv = request["command"]
                corewise()
        except SystemExit as exit:
            return f"exit code {exit.code}\n{output.getvalue()}" if exit.code else ""
        except Exception:  # noqa: BLE001 - a page may raise anything, and the test says what
            return f"{output.getvalue()}\n{traceback.format_exc()}"
    return ""


def main() -> None:
    """Answer requests until stdin ends."""
    # Libraries may print to descriptor 1; answers have one of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    quick = Quick()
    names: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        enter(request["folder"])
        quick.thorough = request["thorough"]
        error = run(request, names.setdefault(request["folder"], {"__name__": "__main__"}))
        answers.write(json.dumps({"error": error}) + "\n")


if __name__ == "__main__":
    main()
