"""The trial child: one process that builds, opens, runs and times one payload when told to.

Started as ``python -m corewise.runtime.worker FD``; requests and answers are JSON lines on that
socket. What it does can crash, hang or exhaust the memory without harming the run (``client.Worker`` is the other end).
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from corewise.batching import Answer, Batcher, LatencyTable, NotServed, Policy
from corewise.common.errors import CorewiseError
from corewise.common.references import describe
from corewise.engines import BuildInputs, Engine, Session, engine
from corewise.machine.inspect import inspect, throttled_count
from corewise.machine.layouts import assign, warning
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json
from corewise.runtime.instances import Instances, memory_bytes
from corewise.runtime.loadgen import check_load, closed_loop, open_loop
from corewise.runtime.measure import batch_of, measure, throughput_per_s, time_calls, warm_up
from corewise.samples import Samples

MATERIAL = "material.json"
PROGRAM = "program.pt2"
CALIBRATION = "calibration.safetensors"
HOLDOUT = "holdout.safetensors"
LOAD_SAMPLES = 16
MAX_WAITING = 1024
"""Rows that may wait under a load; where requests have deadlines, those bound the queue first."""


def write_build_inputs(folder: Path, material: BuildInputs) -> None:
    """Describe ``material``, whose program and samples lie in ``folder`` already, for ``read_build_inputs``."""
    about = {
        "inputs": material.inputs,
        "outputs": material.outputs,
        "operators": material.operators,
        "cpu": material.cpu,
    }
    (folder / MATERIAL).write_text(json.dumps(to_json(about)))


def read_build_inputs(folder: Path) -> BuildInputs:
    """The material that a folder holds; samples are read from their file when asked for."""
    about = json.loads((folder / MATERIAL).read_text())
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    return BuildInputs(
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
        notes = self.engine(wanted.engine).build(read_build_inputs(Path(material)), wanted, Path(folder))
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
        return {"measurement": to_json(replace(measured, memory_bytes=memory_bytes()))}

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

        before = throttled_count()
        per_s = throughput_per_s(len(self._inputs[0]), instances.each(calls))
        return {"per_s": per_s, "throttled": throttled_count() - before}

    def load(
        self,
        samples: str,
        plan: Any,
        curve: Any,
        duration_s: float,
        rate_per_s: float | None = None,
        clients: int | None = None,
        slo_ms: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Load the open instances through a batcher, which admits by ``curve``: at a rate, else by so many clients.

        Requests are of one row, some samples of one shape in turn. Some of the answers are checked to be their own
        request's (``_Own``); others count as failed.
        """
        check_load(rate_per_s=rate_per_s, clients=clients, duration_s=duration_s, slo_ms=slo_ms)
        wanted, instances = from_json(Plan, plan), self._opened()
        held = Samples.load(Path(samples))
        _, arrays = next(held.batches(LOAD_SAMPLES))
        rows = [tuple(array[i : i + 1] for array in arrays) for i in range(len(arrays[0]))]
        # Engines compile for a size when they first meet it: 1, 2, 4, ... and the plan's.
        for size in sorted({*(2**k for k in range(wanted.batch.bit_length())), wanted.batch}):
            for number in range(len(instances)):
                instances.run(number, batch_of(held, size))
        own = _Own([instances.run(0, row) for row in rows])
        max_waiting = max(MAX_WAITING, wanted.batch, clients or 0)
        policy = Policy(from_json(LatencyTable, curve), max_batch=wanted.batch, max_waiting=max_waiting)
        timeout_s = inf if slo_ms is None else slo_ms / 1e3
        before = throttled_count()
        with Batcher([partial(instances.run, number) for number in range(len(instances))], policy) as batcher:
            load = partial(
                open_loop if clients is None else closed_loop,
                lambda k: batcher.submit(rows[k % len(rows)], timeout_s=timeout_s),
                plan=wanted,
                duration_s=duration_s,
                slo_ms=slo_ms,
                refusal=NotServed,
                check=own,
            )
            run = load(rate_per_s=rate_per_s, seed=seed) if clients is None else load(clients=clients)
        return {"load": to_json(replace(run, throttled=throttled_count() - before))}

    def _opened(self) -> Instances:
        if self._instances is None:
            raise CorewiseError("the worker has no open session", "this is a bug in corewise")
        return self._instances

    def _close(self) -> None:
        if self._instances is not None:
            self._instances.close()
        self._instances = None


class _Own:
    """Whether an answer is its request's own: none of the samples gave, alone, outputs that are nearer to it.

    Equal it need not be, for calls of other sizes round differently. It looks at some answers and at some of their
    values only, for it takes the time of an instance.
    """

    EVERY = 7
    VALUES = 4096
    ROUNDING = 0.1
    """Relative to the output, what is no error between samples that hardly differ: 20 dB, as for golden outputs."""

    def __init__(self, alone: Sequence[Sequence[np.ndarray]]) -> None:
        self._alone = np.stack([self._flat(outputs) for outputs in alone])

    def __call__(self, k: int, answer: Answer) -> bool:
        if k % self.EVERY:
            return True
        found = self._flat(answer.outputs)
        if found.shape != self._alone[0].shape:
            return False
        errors = np.linalg.norm(self._alone - found, axis=1)
        sample = k % len(self._alone)
        return bool(errors[sample] <= max(errors.min(), self.ROUNDING * np.linalg.norm(self._alone[sample])))

    def _flat(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        parts = [output.reshape(-1)[:: -(-output.size // self.VALUES) or 1] for output in outputs]
        return np.nan_to_num(np.concatenate(parts).astype(np.float64))


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
    warnings.simplefilter("ignore")
    serve(socket.socket(fileno=int(sys.argv[1])))
