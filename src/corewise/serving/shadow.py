"""Runs fp32 on a sample of the requests, to see whether the served model's answers drift on real traffic."""

import logging
import os
import queue
import random
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from corewise import artifact
from corewise.artifact import Artifact
from corewise.artifact.open import check_available, golden_samples, write_reference
from corewise.common.errors import ArtifactError, CorewiseError, EngineError
from corewise.common.references import guard
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.runtime.client import Worker, read_outputs
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples
from corewise.samples.images import normalize_pixels

log = logging.getLogger("corewise.serve")

KEPT = 1000
WAITING = 4
NICE = 19
TIMEOUT_S = 120.0
CLOSING_S = 5.0
FP32 = Build(engine="eager", precision="fp32")
PLAN = Plan(threads_per_instance=1)


class Shadow:
    """Compares a share of the answers with the artifact's fp32 program, in a process of the lowest priority."""

    def __init__(self, found: Artifact, share: float, seed: int = 0) -> None:
        """Raises ``ArtifactError`` if it carries no fp32 program, ``EngineError`` if torch is not installed."""
        if artifact.REFERENCE not in found.manifest.files:
            raise ArtifactError(f"{found.folder} carries no fp32 program to compare with", "serve it without --shadow")
        check_available(FP32.engine, f"the shadow of {found.folder}")
        self._found, self._share = found, share
        self._random = random.Random(seed)
        self._waiting: queue.Queue[tuple[list[np.ndarray], Sequence[np.ndarray]] | None] = queue.Queue(WAITING)
        self._kept: deque[tuple[float, float, int, int]] = deque(maxlen=KEPT)
        self.compared = 0
        self.error = ""
        """Why it stopped comparing; empty while it runs."""
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._live, name="shadow", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The id of its process, while it compares."""
        worker = self._worker
        return None if worker is None or self.error else worker.pid

    @property
    def sqnr_db(self) -> float:
        """The signal-to-noise ratio of the last 1,000 answers against fp32's, at most 200 dB."""
        power, error, *_ = self._sums()
        if not np.isfinite(error):
            return 0.0
        return 200.0 if not error else min(200.0, float(10 * np.log10(max(power, 1e-300) / error)))

    @property
    def agreement(self) -> float | None:
        """The share of them whose highest score is fp32's; ``None`` if answers are not scores."""
        *_, agreeing, rows = self._sums()
        return agreeing / rows if rows else None

    def offer(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Compare this request, if it is drawn and the queue has room."""
        if self.error or self._random.random() >= self._share:
            return
        with suppress(queue.Full):
            self._waiting.put_nowait(([array.copy() for array in inputs], outputs))

    def close(self) -> None:
        """End it, even during a comparison."""
        self.error = self.error or "closed"
        worker = self._worker
        if worker is not None:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # its pending call ends with it
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(CLOSING_S)

    def _sums(self) -> tuple[float, float, int, int]:
        kept = list(self._kept)  # a copy: the thread appends to it meanwhile
        powers, errors, agreeing, rows = zip(*kept, strict=True) if kept else ((), (), (), ())
        return sum(powers), sum(errors), sum(agreeing), sum(rows)

    def _live(self) -> None:
        try:
            with guard(EngineError, "the shadow"), tempfile.TemporaryDirectory(prefix="corewise-shadow-") as name:
                self._compare(Path(name))
        except CorewiseError as error:
            if not self.error:
                log.error("the shadow stopped comparing: %s", error)
                self.error = str(error)

    def _compare(self, work: Path) -> None:
        cpu, workspace = inspect_cpu(), Workspace(work)
        payload = workspace.empty_payload(FP32)
        write_reference(self._found, golden_samples(self._found), cpu, workspace)
        with Worker(cpu=cpu, log=work / "log", timeout_s=TIMEOUT_S) as worker:
            self._worker = worker
            os.setpriority(os.PRIO_PROCESS, worker.pid, NICE)  # before it has any other thread
            worker.build(workspace, FP32, payload)
            worker.open(payload, FP32, PLAN)
            while (taken := self._waiting.get()) is not None:
                inputs, outputs = taken
                preprocess = self._found.manifest.preprocess
                if preprocess is not None and preprocess.dtype == "uint8" and inputs[0].dtype == np.uint8:
                    inputs = [normalize_pixels(inputs[0], preprocess)]
                rows = [tuple(array[k] for array in inputs) for k in range(len(inputs[0]))]
                samples, path = work / "samples.safetensors", work / "outputs.safetensors"
                Samples(rows=rows, structure=self._found.input_structure, source="traffic").save(samples)
                worker.run_samples(samples, 1, path)
                expected = [np.stack(list(leaf)) for leaf in read_outputs(path).leaves]
                self._kept.append(_difference(expected, outputs))
                self.compared += 1


def _difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> tuple[float, float, int, int]:
    """Power of the signal and of the error, rows with the same highest score, and rows of scores."""
    power = error = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        exact = theirs.astype(np.float64)
        power += float(np.square(exact).sum())
        error += float(np.square(ours.astype(np.float64) - exact).sum())
    scores = expected[0]
    if scores.ndim != 2 or scores.shape[1] < 2:
        return power, error, 0, 0
    return power, error, int((scores.argmax(1) == found[0].argmax(1)).sum()), len(scores)
