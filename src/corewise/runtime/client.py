"""The parent's side of a trial process: its requests, and the errors for crashes, hangs and kills."""

import os
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from corewise.accuracy.outputs import Outputs
from corewise.batching import ElasticTables, LatencyTable
from corewise.common.errors import CorewiseError, OutputError
from corewise.common.references import guard
from corewise.engines import Engine
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.pipeline import ImagePipeline, PhotoPlan, PhotoRate
from corewise.records.reason import Reason, ReasonKind, Step
from corewise.report.reasons import sentence
from corewise.runtime import messages
from corewise.runtime.messages import Request
from corewise.runtime.worker import TrialChild
from corewise.runtime.workspace import Workspace

A = TypeVar("A")

LEAST_S, MOST_S = 10.0, 1e8
"""Each request may take the first, even if less of the budget is left; sockets cannot wait much longer than the
second, three years."""
LOG_TAIL = 300
DYING_S = 10.0


def child_environment(cpu: Cpu) -> dict[str, str]:
    """The environment of a process that runs instances: a thread for each core unless a plan says how many."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(cpu.usable_cores),
        "PYTHONPATH": os.pathsep.join(sys.path),
        # As instances.one_arena, from the first thread on.
        "MALLOC_ARENA_MAX": "1",
    }


class StepFailed(CorewiseError):
    """A request to a trial process failed; ``reason`` says why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(sentence(reason))
        self.reason = reason


class Died(StepFailed):
    """A trial process ended or hung before it answered."""


class Hung(Died):
    """A trial process did not answer in time."""


class Client(ABC):
    """Sends requests to a ``TrialChild`` in this or another process; a context manager that leaves no process behind.

    Every method raises ``StepFailed`` with the child's reason, ``Died`` if the process is gone, and ``OutputError`` if
    the disk is full.
    """

    peak_memory_bytes: int = 0

    def build(self, workspace: Workspace, build: Build, payload: Path) -> messages.BuiltPayload:
        """Write the payload of ``build`` into the empty folder ``payload``."""
        request = messages.BuildPayload(workspace=workspace.folder, build=build, payload=payload)
        return self._ask(request, messages.BuiltPayload, Step.BUILDING)

    def open(self, payload: Path, build: Build, plan: Plan, wide: Plan | None = None) -> messages.OpenedPayload:
        """Open the instances of ``plan``, and the one of ``wide``, unless they are those that are open."""
        request = messages.OpenPayload(payload=payload, build=build, plan=plan, wide=wide)
        return self._ask(request, messages.OpenedPayload, Step.OPENING, plan)

    def observe_int8(self, payload: Path, build: Build, plan: Plan, samples: Path) -> Receipt | None:
        """What the payload runs in int8; closes what is open."""
        request = messages.ObserveInt8(payload=payload, build=build, plan=plan, samples=samples)
        return self._ask(request, messages.ObservedInt8, Step.OBSERVING_INT8).receipt

    def run_samples(self, samples: Path, batch: int, outputs: Path, *, alone: bool = True) -> messages.RanSamples:
        """Run all samples on one instance and write their outputs, which ``read_outputs`` reads."""
        request = messages.RunSamples(samples=samples, batch=batch, outputs=outputs, alone=alone)
        return self._ask(request, messages.RanSamples, Step.VERIFYING)

    def measure(self, samples: Path, plan: Plan, budget_s: float) -> Measurement:
        """Time the open instances under ``plan``."""
        request = messages.Measure(samples=samples, plan=plan, budget_s=budget_s)
        return self._ask(request, Measurement, Step.MEASURING, plan)

    def warm_up(self, samples: Path, batch: int, budget_s: float) -> messages.Warm:
        """Warm the open instances up for ``run_round``."""
        request = messages.WarmUp(samples=samples, batch=batch, budget_s=budget_s)
        return self._ask(request, messages.Warm, Step.WARMING_UP)

    def run_round(self, budget_s: float) -> messages.RoundRate:
        """One round of an alternating race."""
        return self._ask(messages.RunRound(budget_s=budget_s), messages.RoundRate, Step.RACING)

    def time_calls(self, samples: Path, points: Sequence[tuple[int, int]], budget_s: float) -> tuple[float, ...]:
        """Milliseconds of a call of each (rows, tokens) on the open instances; the last ones may be left out."""
        request = messages.TimeCalls(samples=samples, points=tuple(points), budget_s=budget_s)
        return self._ask(request, messages.TimedCalls, Step.MEASURING).ms

    def load(
        self,
        samples: Path,
        plan: Plan,
        table: LatencyTable,
        *,
        duration_s: float,
        rate_per_s: float | None = None,
        clients: int | None = None,
        slo_ms: float | None = None,
        seed: int = 0,
        elastic: ElasticTables | None = None,
    ) -> LoadRun:
        """Put load on the open instances: at a rate, or by a number of clients."""
        request = messages.RunLoad(
            samples=samples,
            plan=plan,
            table=table,
            duration_s=duration_s,
            rate_per_s=rate_per_s,
            clients=clients,
            slo_ms=slo_ms,
            seed=seed,
            elastic=elastic,
        )
        return self._ask(request, LoadRun, Step.UNDER_LOAD)

    def measure_photos(
        self,
        payload: Path,
        build: Build,
        photos: PhotoPlan,
        pipeline: ImagePipeline,
        files: tuple[Path, ...],
        budget_s: float,
    ) -> PhotoRate:
        """How many photos a second are answered from their files; closes what is open."""
        request = messages.MeasurePhotos(
            payload=payload, build=build, photos=photos, pipeline=pipeline, files=files, budget_s=budget_s
        )
        return self._ask(request, PhotoRate, Step.MEASURING, photos.plan)

    @abstractmethod
    def _ask(self, request: Request, kind: type[A], step: Step, plan: Plan | None = None) -> A:
        """The answer to ``request``, a ``kind``."""

    def close(self) -> None:  # noqa: B027 - in process, nothing has to end
        """End what runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker(Client):
    """A trial process of its own (``python -m corewise.runtime.worker``)."""

    def __init__(self, *, cpu: Cpu, log: Path, timeout_s: float, left_s: Callable[[], float] = lambda: inf) -> None:
        """Start a process on all of ``cpu`` that this process may use; what it prints goes to ``log``.

        It gets all of the CPU because plans pin their instances themselves. A request may last ``timeout_s`` and no
        longer than ``left_s`` returns then, but always ``LEAST_S``.
        """
        self._timeout_s, self._left_s = timeout_s, left_s
        self._log = log
        self._channel, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "corewise.runtime.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment(cpu),
                # A process group of its own: Ctrl-C reaches the parent alone, which then ends the child.
                start_new_session=True,
            )
        self._answers = self._channel.makefile("r", encoding="utf-8")
        with ExitStack() as undo:
            undo.callback(self.close)
            request = messages.Prepare(cpus=tuple(cpu.affinity), path=tuple(sys.path))
            self._ask(request, messages.Prepared, Step.STARTING)
            undo.pop_all()

    def _ask(self, request: Request, kind: type[A], step: Step, plan: Plan | None = None) -> A:
        timeout_s = min(MOST_S, self._timeout_s, max(LEAST_S, self._left_s()))
        self._channel.settimeout(timeout_s)
        try:
            self._channel.sendall(messages.encode_request(request))
            line = self._answers.readline()
        except TimeoutError as error:
            self.close()
            raise Hung(_at(step, plan, ReasonKind.HUNG, timeout_s=timeout_s)) from error
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise Died(self._ending(step, plan))
        reply = messages.decode_reply(line)
        self.peak_memory_bytes = max(self.peak_memory_bytes, reply.peak_memory_bytes)
        if reply.failure is None:
            return reply.read(kind)
        if reply.failure.disk_full:
            raise OutputError(
                f"the disk is full: {reply.failure.text}", "free space and run the same command to resume"
            )
        raise StepFailed(_at(step, plan, ReasonKind.STEP_FAILED, text=reply.failure.text))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def close(self) -> None:
        """End the process and what it started, whatever they are doing."""
        self._answers.close()
        self._channel.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ending(self, step: Step, plan: Plan | None) -> Reason:
        """How the process ended."""
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            self.close()
            return _at(step, plan, ReasonKind.UNRESPONSIVE)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last_words = lines[-1][-LOG_TAIL:] if lines else ""
        if code == -signal.SIGKILL:
            return _at(step, plan, ReasonKind.KILLED, last_words=last_words)
        if code < 0:
            return _at(step, plan, ReasonKind.CRASHED, signal=signal.Signals(-code).name, last_words=last_words)
        return _at(step, plan, ReasonKind.EXITED, code=code, last_words=last_words)


class InProcess(Client):
    """Runs the child in this process, for a model that cannot be exported and so cannot be sent to another one."""

    class _Child(TrialChild):
        def __init__(self, eager: Engine) -> None:
            super().__init__()
            self._eager = eager

        def engine(self, name: str) -> Engine:
            return self._eager

    def __init__(self, eager: Engine) -> None:
        self._child = self._Child(eager)

    def _ask(self, request: Request, kind: type[A], step: Step, plan: Plan | None = None) -> A:
        try:
            with guard(CorewiseError, step.value, ""):
                answer = self._child.answer(request)
        except OutputError:
            raise
        except CorewiseError as error:
            raise StepFailed(_at(step, plan, ReasonKind.STEP_FAILED, text=str(error))) from error
        assert isinstance(answer, kind)
        return answer


def _at(step: Step, plan: Plan | None, kind: ReasonKind, **details: str | int | float) -> Reason:
    place = {"step": step.value} if plan is None else {"step": step.value, "plan": plan.label}
    return Reason(kind=kind, details={**place, **details})


def read_outputs(path: Path) -> Outputs:
    """The outputs that ``Client.run_samples`` wrote, in the order of the samples."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    batches = sum(name.endswith(".rows") for name in tensors)
    count = len(tensors) // batches - 1
    gathered = Outputs.gather([tensors[f"{b}.{k}"] for k in range(count)] for b in range(batches))
    return gathered.rows(np.argsort(np.concatenate([tensors[f"{b}.rows"] for b in range(batches)])))
