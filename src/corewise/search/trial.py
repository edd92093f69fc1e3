"""One build in a trial process: built, verified, then measured. Crashes, hangs and kills become reasons."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from corewise.accuracy.fidelity import Outputs
from corewise.accuracy.gate import Verdict
from corewise.common.errors import CorewiseError, InputError
from corewise.engines import Engine
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.events import Event, TrialStep
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import Measurement
from corewise.records.trial import Fidelity, Trial
from corewise.runtime.client import AnyWorker, Hung, InProcess, Worker, read_outputs
from corewise.runtime.worker import HOLDOUT
from corewise.search.budget import Budget, BudgetSplit

VERIFY_BATCH = 16

MEASURE_S = 1.0

HOPELESS = 0.5
"""A candidate that verifies slower than this share of the best so far is not measured."""

LONGEST_NAME = 150


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """What all trials of one run share."""

    folder: Path
    """Holds the material (``worker.read_build_inputs``), the holdout, and a folder a build."""
    plan: Plan
    """What every build is first measured under."""
    cpu: Cpu
    timeout_s: float
    verify: Callable[[Outputs], tuple[Fidelity, Verdict]]
    tell: Callable[[Event], None]
    shapes: Callable[[Build], Sequence[tuple[int, int]]] = lambda build: ()
    """(Threads per instance, instances) to try for a build."""
    budget: Budget = field(default_factory=Budget)
    shares: BudgetSplit = field(default_factory=BudgetSplit)
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
    context: SearchContext,
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
    payload = context.payload(build)
    shutil.rmtree(payload, ignore_errors=True)
    payload.mkdir(parents=True)
    record: dict[str, Any] = {"build": build}
    start = time.monotonic()
    try:
        with context.worker(build, share) as worker:
            try:
                _run(build, context, worker, payload, record, best_verified_per_s, is_baseline)
            finally:
                record["peak_memory_bytes"] = worker.peak_memory_bytes
    except InputError:
        raise
    except CorewiseError as error:
        record.update(state="failed", reason=str(error), build_s=record.get("build_s", time.monotonic() - start))
        if isinstance(error, Hung) and context.budget.ended(share) and not is_baseline:
            record.update(state="pruned", reason=f"{context.budget.spent} while it was tried")
    return Trial(**record)


def _run(
    build: Build,
    context: SearchContext,
    worker: AnyWorker,
    payload: Path,
    record: dict[str, Any],
    best_verified_per_s: float,
    is_baseline: bool,
) -> None:
    """The steps of a trial; what is known so far is in ``record`` when a step raises."""
    context.tell(TrialStep(build, "building"))
    start = time.monotonic()
    answer = worker.call("build", "building", material=str(context.folder), build=to_json(build), folder=str(payload))
    record["build_s"] = time.monotonic() - start
    record["notes"] = tuple(answer["notes"])
    record["payload_bytes"] = sum(file.stat().st_size for file in payload.rglob("*") if file.is_file())
    context.tell(TrialStep(build, "verifying"))
    outputs, per_s = _holdout_outputs(build, context, worker, payload)
    fidelity, verdict = context.verify(outputs)
    record.update(fidelity=fidelity, verified_per_s=per_s)
    receipt = record["receipt"] = _receipt(build, context, worker, payload)
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
    context.tell(TrialStep(build, f"measuring, {context.plan.label}"))
    record["measurements"] = (measured(build, context, worker, context.plan),)
    record.update(state="ok", reason="the baseline" if is_baseline else verdict.reason)


def measured(
    build: Build, context: SearchContext, worker: AnyWorker, plan: Plan, why: str = "the first look"
) -> Measurement:
    """The payload opened and timed under a plan. Raises ``CorewiseError`` with what went wrong."""
    payload = str(context.payload(build))
    opened = worker.call("open", f"opening with {plan.label}", folder=payload, build=to_json(build), plan=to_json(plan))
    doing = f"measuring {plan.label}"
    answer = worker.call("measure", doing, samples=context.holdout, plan=to_json(plan), budget_s=MEASURE_S)
    found = from_json(Measurement, answer["measurement"])
    return replace(found, why=f"{why}; {opened['warning']}" if opened["warning"] else why)


def _holdout_outputs(build: Build, context: SearchContext, worker: AnyWorker, payload: Path) -> tuple[Outputs, float]:
    """The payload's outputs for the holdout in its order, and the items per second that took."""
    plan = Plan(threads_per_instance=context.cpu.usable_cores, batch=VERIFY_BATCH)
    worker.call("open", "opening", folder=str(payload), build=to_json(build), plan=to_json(plan))
    path = context.outputs(build)
    answer = worker.call("outputs", "verifying", samples=context.holdout, batch=plan.batch, path=str(path))
    return read_outputs(path), answer["per_s"]


def _receipt(build: Build, context: SearchContext, worker: AnyWorker, payload: Path) -> Receipt | None:
    """What the payload runs in int8; ``None`` for builds of other precisions and where the engine cannot tell."""
    if build.precision not in ("int8", "int8-dynamic"):
        return None
    plan = Plan(threads_per_instance=context.cpu.usable_cores, batch=VERIFY_BATCH)
    answer = worker.call(
        "receipt",
        "observing its int8 layers",
        folder=str(payload),
        build=to_json(build),
        plan=to_json(plan),
        samples=context.holdout,
    )
    return from_json(Receipt, answer["receipt"]) if answer["receipt"] else None
