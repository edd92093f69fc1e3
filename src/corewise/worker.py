"""The trial child: one process that builds, opens, runs and times one payload when told to.

Started as ``python -m corewise.worker FD``; requests and answers are JSON lines on that socket. What it does can
crash, hang or exhaust the memory without harming the run (``trial.Worker`` is the other end).
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from corewise.cpu import inspect
from corewise.engines import Engine, Material, Session, engine
from corewise.errors import CorewiseError
from corewise.imports import describe
from corewise.instances import Instances
from corewise.measure import batch_of, measure, throughput_per_s, time_calls, warm_up
from corewise.samples import Samples
from corewise.thread_plan import assign, warning
from corewise.values import Build, Cpu, Plan, TensorSpec, from_json, to_json

MATERIAL = "material.json"
PROGRAM = "program.pt2"
CALIBRATION = "calibration.safetensors"
HOLDOUT = "holdout.safetensors"


def write_material(folder: Path, material: Material) -> None:
    """Describe ``material``, whose program and samples lie in ``folder`` already, for ``read_material``."""
    about = {
        "inputs": material.inputs,
        "outputs": material.outputs,
        "operators": material.operators,
        "cpu": material.cpu,
    }
    (folder / MATERIAL).write_text(json.dumps(to_json(about)))


def read_material(folder: Path) -> Material:
    """The material that a folder holds; samples are read from their file when asked for."""
    about = json.loads((folder / MATERIAL).read_text())
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    return Material(
        program=folder / PROGRAM,
        inputs=from_json(tuple[TensorSpec, ...], about["inputs"]),
        outputs=from_json(tuple[TensorSpec, ...], about["outputs"]),
        operators=about["operators"],
        calibration=Samples.load(folder / CALIBRATION),
        cpu=from_json(Cpu, about["cpu"]),
        cache=cache,
    )


class Child:
    """What the parent can ask for; each public method is one request."""

    def __init__(self) -> None:
        self._instances: Instances | None = None

    def engine(self, name: str) -> Engine:
        """The engine that builds and opens."""
        return engine(name)

    def prepare(self, cpus: list[int], path: list[str]) -> dict[str, Any]:
        """Run on these hardware threads only, and import user code from ``path``."""
        os.sched_setaffinity(0, cpus)
        sys.path[:] = path
        return {}

    def build(self, material: str, build: Any, folder: str) -> dict[str, Any]:
        """Write the payload of ``build`` into ``folder``."""
        wanted = from_json(Build, build)
        notes = self.engine(wanted.engine).build(read_material(Path(material)), wanted, Path(folder))
        return {"notes": list(notes)}

    def open(self, folder: str, build: Any, plan: Any) -> dict[str, Any]:
        """Open the plan's instances of a payload in place of those open now, on what this process may use.

        Answers the hardware threads of each, the memory that the second one took to open, and a warning where there
        are more threads than can compute at once.
        """
        wanted, how, cpu = from_json(Build, build), from_json(Plan, plan), inspect()
        self._close()
        cpus = assign(cpu, how.threads_per_instance, how.instances)
        self._instances = Instances(self.engine(wanted.engine), Path(folder), wanted, how, cpus)
        return {
            "cpus": [list(one) for one in cpus],
            "memory_per_instance_bytes": self._instances.memory_per_instance_bytes,
            "warning": warning(cpu, how.threads_per_instance, how.instances),
        }

    def receipt(self, folder: str, build: Any, plan: Any, samples: str) -> dict[str, Any]:
        """Observe what a payload runs in int8; closes what is open, for memory need not hold the model twice."""
        wanted, how = from_json(Build, build), from_json(Plan, plan)
        self._close()
        inputs = batch_of(Samples.load(Path(samples)), how.batch)
        return {"receipt": to_json(self.engine(wanted.engine).receipt(Path(folder), wanted, how, inputs))}

    def outputs(self, samples: str, batch: int, path: str) -> dict[str, Any]:
        """Run all samples on one instance and write the outputs: ``B.rows`` and ``B.K`` for batch B and output K.

        Answers the items per second of the median batch: the first ones are slow, being cold.
        """
        from safetensors.numpy import save_file

        tensors = {}
        per_s = []
        for number, (rows, arrays) in enumerate(Samples.load(Path(samples)).batches(batch)):
            start = time.perf_counter()
            results = self._opened().run(0, arrays)
            per_s.append(len(rows) / (time.perf_counter() - start))
            tensors[f"{number}.rows"] = rows
            tensors.update({f"{number}.{k}": array for k, array in enumerate(results)})
        save_file(tensors, path)
        return {"per_s": median(per_s)}

    def measure(self, samples: str, plan: Any, budget_s: float) -> dict[str, Any]:
        """Measure the open instances, all at work, under ``plan``."""
        wanted, instances = from_json(Plan, plan), self._opened()
        inputs = batch_of(Samples.load(Path(samples)), wanted.batch)
        instances.touch(inputs)
        measured = measure(
            instances.each,
            inputs,
            wanted,
            budget_s=budget_s,
            memory_per_instance_bytes=instances.memory_per_instance_bytes,
        )
        return {"measurement": to_json(measured)}

    def enter_race(self, samples: str, batch: int, budget_s: float) -> dict[str, Any]:
        """Warm up for ``round``."""
        self._inputs = batch_of(Samples.load(Path(samples)), batch)
        calls = self._opened().each(lambda session: warm_up(session, self._inputs, budget_s=budget_s))
        return {"calls": sum(calls)}

    def round(self, budget_s: float) -> dict[str, Any]:
        """Items per second over one round of an alternating run: whole calls, each instance's first one untimed."""
        instances = self._opened()

        def calls(session: Session) -> list[float]:
            session.run(self._inputs)
            return time_calls(session, self._inputs, budget_s=budget_s, min_calls=1)

        return {"per_s": throughput_per_s(len(self._inputs[0]), instances.each(calls))}

    def _opened(self) -> Instances:
        if self._instances is None:
            raise CorewiseError("the worker has no open session", "this is a bug in corewise")
        return self._instances

    def _close(self) -> None:
        if self._instances is not None:
            self._instances.close()
        self._instances = None


def peak_memory_bytes() -> int:
    """The most memory this process ever had resident (VmHWM); 0 where the kernel does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def serve(channel: socket.socket) -> None:
    """Answer requests until the parent closes the channel."""
    child = Child()
    with channel.makefile("r", encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            handler: Callable[..., dict[str, Any]] = getattr(child, request.pop("op"))
            answer = _answer(handler, request)
            answer["peak_memory_bytes"] = peak_memory_bytes()
            channel.sendall(json.dumps(answer).encode() + b"\n")


def _answer(handler: Callable[..., dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return handler(**request)
    except CorewiseError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - the trial boundary: whatever an engine raises is the trial's reason
        return {"error": describe(error), "disk_full": "No space left" in str(error)}


if __name__ == "__main__":
    # A hanging child must not outlive a parent that was killed: prctl(PR_SET_PDEATHSIG, SIGKILL), see prctl(2).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # OpenVINO and NNCF send usage data unless told not to; without this package they cannot.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    serve(socket.socket(fileno=int(sys.argv[1])))
