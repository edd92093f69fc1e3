"""One build in a trial process: built, verified, then measured. Crashes, hangs and kills become reasons."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from corewise.accuracy.gate import Verdict
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import CorewiseError, InputError
from corewise.engines import Engine
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, Plan, Receipt
from corewise.records.cpu import Cpu
from corewise.records.events import Event, TrialStep
from corewise.records.goal import Requirements, Throughput
from corewise.records.measurement import Measurement
from corewise.records.reason import Reason, ReasonKind, Step
from corewise.records.trial import Fidelity, State, Trial
from corewise.runtime.client import Client, Hung, InProcess, StepFailed, Worker, read_outputs
from corewise.runtime.messages import RanSamples
from corewise.runtime.workspace import Workspace
from corewise.search.budget import Budget, BudgetSplit, Preparation

VERIFY_BATCH = 16
MEASURE_S = 1.0
ALONE_DB = {"fp32": 50.0, "bf16": 25.0, "int8": 20.0, "int8-dynamic": 20.0}
"""How near a row's answer alone must be to its answer in a batch: kernels for other batches may round differently."""
PLANS_S = 6.0
"""Seconds that the plans of a build need at least, because its process starts again for them."""
HOPELESS = 0.5
"""A candidate that verifies slower than this share of the best so far is not measured."""


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """What all trials of one run share."""

    workspace: Workspace
    plan: Plan
    """What every build is first measured under."""
    cpu: Cpu
    timeout_s: float
    verify: Callable[[Outputs], tuple[Fidelity, Verdict]]
    on_event: Callable[[Event], None]
    requirements: Requirements = field(default_factory=Requirements)
    layouts: Callable[[Build], Sequence[ThreadLayout]] = lambda build: ()
    """The thread layouts to try for a build."""
    budget: Budget = field(default_factory=Budget)
    split: BudgetSplit = field(default_factory=BudgetSplit)
    preparation: Preparation = field(default_factory=Preparation)
    calibration: int = 0
    """Samples that calibrate."""
    holdout: int = 0
    """Samples that each build answers to be judged."""
    kinds: int = 1
    """Calls of which each timed pass consists (``measure.calls_of``)."""
    convolves: bool = True
    """Whether most layers of the model are convolutions."""
    baseline_plan: Plan | None = None
    """What the baseline is first measured under instead of ``plan``."""
    in_process: Engine | None = None
    """Runs every build in this process instead of in trial processes."""

    def client(self, build: Build, share: float = 1.0) -> Client:
        """A new trial process for the build, which may work until that share of the budget is spent."""
        if self.in_process is not None:
            return InProcess(self.in_process)
        return Worker(
            cpu=self.cpu,
            log=self.workspace.log(build),
            timeout_s=self.timeout_s,
            left_s=lambda: self.budget.left_s(share),
        )


def run_trial(
    build: Build,
    context: SearchContext,
    *,
    best_verified_per_s: float = 0.0,
    is_baseline: bool = False,
    share: float = 1.0,
) -> Trial:
    """Build, verify and measure ``build`` in a process of its own.

    ``best_verified_per_s`` is the best ``Trial.verified_per_s`` so far: a candidate far below is not measured. A trial
    that is unfinished when that ``share`` of the budget is spent is ended.

    Errors in what the user gave (a metric that raises, a full disk) are raised; all else becomes the trial's state
    and reason.
    """
    payload = context.workspace.empty_payload(build)
    record: dict[str, Any] = {"build": build}
    start_s = time.monotonic()
    try:
        with context.client(build, share) as client:
            try:
                _run(build, context, client, payload, record, best_verified_per_s, is_baseline)
            finally:
                record["peak_memory_bytes"] = client.peak_memory_bytes
    except InputError:
        raise
    except CorewiseError as error:
        record.update(
            state=State.FAILED,
            reason=reason_of(error),
            build_s=record.get("build_s", time.monotonic() - start_s),
        )
        if isinstance(error, Hung) and context.budget.ended(share) and not is_baseline:
            record.update(state=State.PRUNED, reason=context.budget.reason(ReasonKind.BUDGET_SPENT_DURING))
    return Trial(**record)


def reason_of(error: CorewiseError) -> Reason:
    """The error as a reason."""
    return error.reason if isinstance(error, StepFailed) else Reason.text(str(error))


def _run(
    build: Build,
    context: SearchContext,
    client: Client,
    payload: Path,
    record: dict[str, Any],
    best_verified_per_s: float,
    is_baseline: bool,
) -> None:
    """The steps of a trial; ``record`` has what is known so far when a step raises."""
    context.on_event(TrialStep(build, Step.BUILDING))
    start_s = time.monotonic()
    record["notes"] = client.build(context.workspace, build, payload).notes
    record["build_s"] = time.monotonic() - start_s
    record["payload_bytes"] = sum(file.stat().st_size for file in payload.rglob("*") if file.is_file())
    context.on_event(TrialStep(build, Step.VERIFYING))
    outputs, ran = holdout_outputs(build, context, client, payload, alone=not is_baseline)
    fidelity, verdict = context.verify(outputs)
    record.update(fidelity=fidelity, verified_per_s=ran.per_s)
    state, reason = _judged(build, verdict, ran, best_verified_per_s, is_baseline=is_baseline)
    if state == State.OK:
        plan = context.baseline_plan or context.plan if is_baseline else context.plan
        context.on_event(TrialStep(build, Step.MEASURING, plan))
        record["measurements"] = _first_looks(build, context, client, plan)
    # Last, because it closes what is open.
    receipt = record["receipt"] = _observe_int8(build, context, client, payload)
    if receipt and not receipt.int8:
        state, reason = State.FAILED, Reason.of(ReasonKind.NOTHING_IN_INT8, layers=receipt.layers)
        record.pop("measurements", None)
    record.update(state=state, reason=reason)


def _judged(
    build: Build, verdict: Verdict, ran: RanSamples, best_verified_per_s: float, *, is_baseline: bool
) -> tuple[State, Reason]:
    """What the answers to the holdout, and how they were run, make of a build."""
    if is_baseline:
        return State.OK, Reason.of(ReasonKind.BASELINE)
    if not verdict.passed:
        return State.REJECTED, verdict.reason
    floor_db = ALONE_DB[build.precision]
    if ran.alone_db < floor_db:
        return State.REJECTED, Reason.of(ReasonKind.DEPENDS_ON_NEIGHBOURS, decibels=ran.alone_db, floor_db=floor_db)
    if ran.per_s < HOPELESS * best_verified_per_s:
        return State.PRUNED, Reason.of(ReasonKind.TOO_SLOW, per_s=ran.per_s, best_per_s=best_verified_per_s)
    return State.OK, verdict.reason


def _first_looks(build: Build, context: SearchContext, client: Client, plan: Plan) -> tuple[Measurement, ...]:
    """What the build does under ``plan``, and in another layout if the budget will leave no time to search plans."""
    looks = [measure_plan(build, context, client, plan, Reason.of(ReasonKind.FIRST_LOOK))]
    requirements = context.requirements
    comparable = isinstance(requirements.goal, Throughput) and requirements.memory_limit_bytes is None
    if comparable and context.budget.left_s(context.split.plans) < PLANS_S:
        for layout in context.layouts(build)[1:2]:
            with suppress(StepFailed):  # the first look is enough for a trial
                other = layout.plan(plan.batch)
                looks.append(measure_plan(build, context, client, other, Reason.of(ReasonKind.OTHER_LAYOUT)))
    return tuple(looks)


def measure_plan(build: Build, context: SearchContext, client: Client, plan: Plan, why: Reason) -> Measurement:
    """The payload opened and timed under a plan. Raises ``CorewiseError`` with what went wrong."""
    opened = client.open(context.workspace.payload(build), build, plan)
    measurement = client.measure(context.workspace.holdout, plan, MEASURE_S)
    return replace(measurement, why=why, warning=opened.warning)


def holdout_outputs(
    build: Build, context: SearchContext, client: Client, payload: Path, *, alone: bool = True
) -> tuple[Outputs, RanSamples]:
    """The payload's outputs for the holdout in its order, and how they were run; some rows ``alone`` too."""
    plan = Plan(threads_per_instance=context.cpu.usable_cores, batch=VERIFY_BATCH)
    client.open(payload, build, plan)
    path = context.workspace.outputs(build)
    ran = client.run_samples(context.workspace.holdout, plan.batch, path, alone=alone)
    return read_outputs(path), ran


def _observe_int8(build: Build, context: SearchContext, client: Client, payload: Path) -> Receipt | None:
    """What the payload runs in int8; ``None`` for builds of other precisions and if the engine cannot say."""
    if build.precision not in ("int8", "int8-dynamic"):
        return None
    plan = Plan(threads_per_instance=context.cpu.usable_cores, batch=build.fixed_batch or VERIFY_BATCH)
    return client.observe_int8(payload, build, plan, context.workspace.holdout)
