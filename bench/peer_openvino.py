"""OpenVINO with one of its performance hints behind corewise's own server, as OpenVINO Model Server runs it.

    python -m bench.peer_openvino serve ...

is ``corewise serve`` for artifacts whose engine is ``Latency`` or ``Throughput``. The model is compiled once, for one
row. There are as many requests at a time as it calls optimal; each takes a client's row, and requests share no call.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.by_hand import ByHand
from corewise.engines import ENGINES
from corewise.engines.base import chunks, run_cut
from corewise.engines.openvino_session import MODEL, PRECISION_HINTS, in_bf16, reshape_batch
from corewise.records.build import Build, Plan

HINTS = {"LATENCY": "bench.peer_openvino:Latency", "THROUGHPUT": "bench.peer_openvino:Throughput"}
READABLE = (MODEL, "model.onnx")


def compiled(folder: Path, build: Build, hint: str) -> Any:
    """A payload's model, compiled for one row. Raises ``RuntimeError`` if OpenVINO cannot."""
    import openvino

    file = next((folder / name for name in READABLE if (folder / name).exists()), None)
    if file is None:
        raise RuntimeError(f"OpenVINO reads no payload of {build.engine}")
    core = openvino.Core()
    model = core.read_model(file)
    reshape_batch(model, 1)
    precision = PRECISION_HINTS["bf16" if in_bf16(build, folder) else "fp32"]
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))  # OpenVINO's threads have that of the one that compiles
    try:
        return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision})
    finally:
        os.sched_setaffinity(0, affinity)


def hinted_plan(folder: Path, build: Build, hint: str, cores: int) -> Plan:
    """What the server has to open: an instance for each request that the model calls optimal."""
    requests = compiled(folder, build, hint).get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    return Plan(threads_per_instance=max(1, cores // requests), instances=requests)


class Session:
    """A request of a compiled model; the model's own threads run it."""

    def __init__(self, model: Any) -> None:
        self._model, self._request = model, model.create_infer_request()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Row by row."""
        return run_cut(self._call, inputs, chunks(len(inputs[0]), (1,)))

    def another(self) -> "Session":
        """One more request of the same model."""
        return Session(self._model)

    def close(self) -> None:
        """Drop it."""
        del self._request, self._model

    def _call(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        self._request.start_async(inputs)
        self._request.wait()
        return [self._request.get_output_tensor(k).data.copy() for k in range(len(self._request.model_outputs))]


class Latency(ByHand):
    """The hint LATENCY, which is the default."""

    hint = "LATENCY"

    def open(self, folder: Path, build: Build, plan: Plan) -> Session:
        return Session(compiled(folder, build, self.hint))


class Throughput(Latency):
    """The hint THROUGHPUT."""

    hint = "THROUGHPUT"


def main() -> None:
    """The command line, which serves artifacts of these engines too."""
    from corewise.cli import main as corewise

    ENGINES.update({name: name for name in HINTS.values()})
    corewise()


if __name__ == "__main__":
    main()
