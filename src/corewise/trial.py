"""One build in a child process: built, verified, then measured. Crashes, hangs and kills become reasons."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from corewise.engines import Engine
from corewise.errors import CorewiseError, InputError, OutputError
from corewise.events import Event, TrialStep
from corewise.fidelity import Outputs, Verdict
from corewise.imports import guard
from corewise.values import Build, Cpu, Fidelity, Measurement, Plan, Receipt, Trial, from_json, to_json
from corewise.worker import HOLDOUT, Child

VERIFY_BATCH = 16
MEASURE_S = 1.0
HOPELESS = 0.5
"""A candidate that verifies slower than this share of the best so far is not measured."""
LEAST_S = 10.0
"""A child is given so much for each step though the budget has less left."""
LOG_TAIL = 300
LONGEST_NAME = 150
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
                [sys.executable, "-m", "corewise.worker", str(theirs.fileno())],
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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time a search may take; ``None`` for as long as it takes."""

    total_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Since the search began."""
        return self.clock() - self.started_s

    def left_s(self, share: float = 1.0) -> float:
        """What is left of a share of the whole; ``inf`` without a limit."""
        return inf if self.total_s is None else share * self.total_s - self.elapsed_s

    def ended(self, share: float = 1.0) -> str:
        """Why nothing more may be begun; empty where it may."""
        return self.spent if self.left_s(share) <= 0 else ""

    @property
    def spent(self) -> str:
        """``the budget of 300 s was spent``."""
        return f"the budget of {self.total_s:g} s was spent"


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the budget: when a stage makes room for the next one."""

    trials: float = 0.6
    """No further trial is begun."""
    last_trial: float = 0.7
    """A trial is ended that is not done, if another candidate is: the plans of one are worth more than one more."""
    plans: float = 0.85
    """No further plan is begun."""


WITH_LOADS = Shares(trials=0.45, last_trial=0.55, plans=0.65)
"""Where loads follow, which need a minute or two."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of one run share."""

    folder: Path
    """Holds the material (``worker.read_material``), the holdout, and a folder a build."""
    plan: Plan
    """What every build is first measured under."""
    cpu: Cpu
    timeout_s: float
    verify: Callable[[Outputs], tuple[Fidelity, Verdict]]
    tell: Callable[[Event], None]
    shapes: Callable[[Build], Sequence[tuple[int, int]]] = lambda build: ()
    """(Threads per instance, instances) to try for a build."""
    budget: Budget = Budget()
    shares: Shares = Shares()
    in_process: Engine | None = None
    """Runs every build in this process instead of in children."""

    def payload(self, build: Build) -> Path:
        """Where the build's payload lies."""
        return self.folder / "builds" / _file_name(build)

    @property
    def holdout(self) -> str:
        """The file of the holdout's samples."""
        return str(self.folder / HOLDOUT)

    def outputs(self, build: Build) -> Path:
        """The build's outputs for the holdout."""
        return self.folder / "outputs" / f"{_file_name(build)}.safetensors"

    def log(self, build: Build) -> Path:
        """What the build's children print."""
        return self.folder / "logs" / f"{_file_name(build)}.log"

    def worker(self, build: Build, share: float = 1.0) -> AnyWorker:
        """A fresh child for the build, which may work until that share of the budget is spent."""
        if self.in_process is not None:
            return InProcess(self.in_process)
        return Worker(
            cpu=self.cpu,
            log=self.log(build),
            timeout_s=self.timeout_s,
            left_s=lambda: self.budget.left_s(share),
        )


def _file_name(build: Build) -> str:
    """The build's label as a file name; of a long one the beginning and a hash."""
    name = build.label.replace("/", "_")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:12]}"


def run_trial(
    build: Build,
    setting: Setting,
    *,
    best_verified_per_s: float = 0.0,
    is_baseline: bool = False,
    share: float = 1.0,
) -> Trial:
    """Build, verify and measure ``build`` in a child of its own.

    ``best_verified_per_s`` is the best ``Trial.verified_per_s`` so far: a candidate far below is not measured. One that
    is not done when that ``share`` of the budget is spent is ended.
    Errors in what the user gave (a metric that raises, a full disk) are raised; all else becomes the trial's state
    and reason.
    """
    payload = setting.payload(build)
    shutil.rmtree(payload, ignore_errors=True)
    payload.mkdir(parents=True)
    record: dict[str, Any] = {"build": build}
    start = time.monotonic()
    try:
        with setting.worker(build, share) as worker:
            try:
                _run(build, setting, worker, payload, record, best_verified_per_s, is_baseline)
            finally:
                record["peak_memory_bytes"] = worker.peak_memory_bytes
    except InputError:
        raise
    except CorewiseError as error:
        record.update(state="failed", reason=str(error), build_s=record.get("build_s", time.monotonic() - start))
        if isinstance(error, Hung) and setting.budget.ended(share) and not is_baseline:
            record.update(state="pruned", reason=f"{setting.budget.spent} while it was tried")
    return Trial(**record)


def _run(
    build: Build,
    setting: Setting,
    worker: AnyWorker,
    payload: Path,
    record: dict[str, Any],
    best_verified_per_s: float,
    is_baseline: bool,
) -> None:
    """The steps of a trial; what is known so far is in ``record`` when a step raises."""
    setting.tell(TrialStep(build, "building"))
    start = time.monotonic()
    answer = worker.call("build", "building", material=str(setting.folder), build=to_json(build), folder=str(payload))
    record["build_s"] = time.monotonic() - start
    record["notes"] = tuple(answer["notes"])
    record["payload_bytes"] = sum(file.stat().st_size for file in payload.rglob("*") if file.is_file())
    setting.tell(TrialStep(build, "verifying"))
    outputs, per_s = _holdout_outputs(build, setting, worker, payload)
    fidelity, verdict = setting.verify(outputs)
    record.update(fidelity=fidelity, verified_per_s=per_s)
    receipt = record["receipt"] = _receipt(build, setting, worker, payload)
    if receipt and not receipt.int8:
        which = {0: "it has no layer that", 1: "its only layer"}.get(receipt.layers, f"all {receipt.layers} layers")
        what = "runs in int8" if not receipt.layers else "silently ran in fp32"
        record.update(state="failed", reason=f"{which} {what}")
        return
    if not (verdict.passed or is_baseline):
        record.update(state="rejected", reason=verdict.reason)
        return
    if per_s < HOPELESS * best_verified_per_s:
        reason = (
            f"too slow to measure: {per_s:.4g}/s while verifying, where the best so far did {best_verified_per_s:.4g}/s"
        )
        record.update(state="pruned", reason=reason)
        return
    setting.tell(TrialStep(build, f"measuring, {setting.plan.label}"))
    record["measurements"] = (measured(build, setting, worker, setting.plan),)
    record.update(state="ok", reason="the baseline" if is_baseline else verdict.reason)


def measured(build: Build, setting: Setting, worker: AnyWorker, plan: Plan, why: str = "the first look") -> Measurement:
    """The payload opened and timed under a plan. Raises ``CorewiseError`` with what went wrong."""
    payload = str(setting.payload(build))
    opened = worker.call("open", f"opening with {plan.label}", folder=payload, build=to_json(build), plan=to_json(plan))
    doing = f"measuring {plan.label}"
    answer = worker.call("measure", doing, samples=setting.holdout, plan=to_json(plan), budget_s=MEASURE_S)
    found = from_json(Measurement, answer["measurement"])
    return replace(found, why=f"{why}; {opened['warning']}" if opened["warning"] else why)


def _holdout_outputs(build: Build, setting: Setting, worker: AnyWorker, payload: Path) -> tuple[Outputs, float]:
    """The payload's outputs for the holdout in its order, and the items per second that took."""
    plan = Plan(threads_per_instance=setting.cpu.usable_cores, batch=VERIFY_BATCH)
    worker.call("open", "opening", folder=str(payload), build=to_json(build), plan=to_json(plan))
    path = setting.outputs(build)
    answer = worker.call("outputs", "verifying", samples=setting.holdout, batch=plan.batch, path=str(path))
    return read_outputs(path), answer["per_s"]


def _receipt(build: Build, setting: Setting, worker: AnyWorker, payload: Path) -> Receipt | None:
    """What the payload runs in int8; ``None`` for builds of other precisions and where the engine cannot tell."""
    if build.precision not in ("int8", "int8-dynamic"):
        return None
    plan = Plan(threads_per_instance=setting.cpu.usable_cores, batch=VERIFY_BATCH)
    answer = worker.call(
        "receipt",
        "observing its int8 layers",
        folder=str(payload),
        build=to_json(build),
        plan=to_json(plan),
        samples=setting.holdout,
    )
    return from_json(Receipt, answer["receipt"]) if answer["receipt"] else None


def read_outputs(path: Path) -> Outputs:
    """The outputs that ``worker.Child.outputs`` wrote, in the order of the samples."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    batches = sum(name.endswith(".rows") for name in tensors)
    count = len(tensors) // batches - 1
    gathered = Outputs.gather([tensors[f"{b}.{k}"] for k in range(count)] for b in range(batches))
    return gathered.rows(np.argsort(np.concatenate([tensors[f"{b}.rows"] for b in range(batches)])))
