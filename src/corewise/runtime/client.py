"""The parent's side of a trial process: what it can be asked, and what its crashes, hangs and kills become."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from corewise.accuracy.fidelity import Outputs
from corewise.common.errors import CorewiseError, OutputError
from corewise.common.references import guard
from corewise.engines import Engine
from corewise.records.cpu import Cpu
from corewise.runtime.worker import Child

LEAST_S = 10.0
"""A child is given so much for each step though the budget has less left."""

LOG_TAIL = 300

DYING_S = 10.0


class AnyWorker(Protocol):
    """Who does what ``worker.Child`` can, wherever that runs."""

    peak_memory_bytes: int

    def call(self, op: str, doing: str, **arguments: Any) -> dict[str, Any]:
        """Ask for ``op`` and wait. Raises ``CorewiseError`` with what went wrong while ``doing``."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def child_environment(cpu: Cpu) -> dict[str, str]:
    """The environment of a process that runs instances: a thread for each core where no plan says how many."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(cpu.usable_cores),
        "PYTHONPATH": os.pathsep.join(sys.path),
        # As instances.one_arena, from the first thread on.
        "MALLOC_ARENA_MAX": "1",
    }


class Died(CorewiseError):
    """A trial child ended or hung before it answered."""


class Hung(Died):
    """It did not answer in time."""


class Worker:
    """The parent's end of a trial child (``worker.Child``); a context manager that leaves no process behind."""

    def __init__(self, *, cpu: Cpu, log: Path, timeout_s: float, left_s: Callable[[], float] = lambda: inf) -> None:
        """Start a child on all of ``cpu`` that this process may use; what it prints goes to ``log``.

        On all, not only what a plan will use: plans pin their instances themselves. Where no plan says how many threads
        to use, there is one for each usable core. Each call may last ``timeout_s``, and no longer than what is
        ``left_s`` then, but always ``LEAST_S``.
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
                # Its own group: Ctrl-C reaches the parent alone, which then ends the child.
                start_new_session=True,
            )
        self._answers = self._channel.makefile("r", encoding="utf-8")
        self.peak_memory_bytes = 0
        with ExitStack() as undo:
            undo.callback(self.close)
            self.call("prepare", "starting", cpus=list(cpu.affinity), path=sys.path)
            undo.pop_all()

    def call(self, op: str, doing: str, **arguments: Any) -> dict[str, Any]:
        """Ask for ``op`` and wait. Raises ``CorewiseError`` with the child's reason, ``Died`` where it is gone."""
        timeout_s = min(self._timeout_s, max(LEAST_S, self._left_s()))
        self._channel.settimeout(timeout_s)
        try:
            self._channel.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = self._answers.readline()
        except TimeoutError as error:
            self.close()
            raise Hung(f"hung while {doing}: no answer in {timeout_s:.0f} s, so it was ended") from error
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise Died(f"{self._epitaph()} while {doing}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_memory_bytes = max(self.peak_memory_bytes, answer["peak_memory_bytes"])
        if answer.get("disk_full"):
            raise OutputError(f"the disk is full: {answer['error']}", "free space and run the same command to resume")
        if "error" in answer:
            raise CorewiseError(f"{doing}: {answer['error']}")
        return answer

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def close(self) -> None:
        """End the child and what it started, whatever they are doing."""
        self._answers.close()
        self._channel.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            self.close()
            return "closed its channel and did not end"
        if code == -signal.SIGKILL:
            return "killed (SIGKILL, most likely by the kernel for want of memory)"
        return f"crashed with {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][-LOG_TAIL:]}" if lines else ""


class InProcess:
    """A worker without a process, for a model that cannot be exported and so cannot travel to a child."""

    class _Child(Child):
        def __init__(self, eager: Engine) -> None:
            super().__init__()
            self._eager = eager

        def engine(self, name: str) -> Engine:
            return self._eager

    def __init__(self, eager: Engine) -> None:
        self._child = self._Child(eager)
        self.peak_memory_bytes = 0

    def call(self, op: str, doing: str, **arguments: Any) -> dict[str, Any]:
        """Do ``op`` here. Raises ``CorewiseError`` with what the model raised."""
        with guard(CorewiseError, doing, ""):
            answer: dict[str, Any] = getattr(self._child, op)(**arguments)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""


def read_outputs(path: Path) -> Outputs:
    """The outputs that ``worker.Child.outputs`` wrote, in the order of the samples."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    batches = sum(name.endswith(".rows") for name in tensors)
    count = len(tensors) // batches - 1
    gathered = Outputs.gather([tensors[f"{b}.{k}"] for k in range(count)] for b in range(batches))
    return gathered.rows(np.argsort(np.concatenate([tensors[f"{b}.rows"] for b in range(batches)])))
