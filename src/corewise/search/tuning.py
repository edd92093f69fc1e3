"""The search over the plans of one build, in a trial process."""

from contextlib import ExitStack
from dataclasses import replace
from math import inf

from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Build, Plan
from corewise.records.events import Stage, StageStarted, TrialStep
from corewise.records.goal import Requirements
from corewise.records.measurement import Measurement
from corewise.records.reason import Reason, ReasonKind, Step
from corewise.records.trial import FailedPlan, State, Trial
from corewise.runtime.client import Client, Died
from corewise.search.budget import BASELINE_SHARE
from corewise.search.candidates import is_baseline
from corewise.search.plans import BATCHES, PlanRequest, drive, not_run, strategy
from corewise.search.trial import SearchContext, measure_plan, reason_of


def tune(trial: Trial, context: SearchContext, *, like: Plan | None = None, most_s: float = inf) -> Trial:
    """The trial with the plans of its build measured; rejected if none of them is allowed.

    The search starts from the plan ``like``, the best of a twin, and lasts ``most_s`` at most.
    """
    started_s = context.budget.elapsed_s
    context.on_event(StageStarted(Stage.TUNING_PLANS, build=trial.build))
    requirements = context.requirements
    # The process of the trial keeps what building left there, so its memory says nothing.
    known = () if requirements.memory_limit_bytes else trial.measurements
    measurements = {measurement.plan: measurement for measurement in known}
    reason: Reason | None = None
    with ExitStack() as stack:
        bench = _Bench(trial.build, context, stack)
        batches = BATCHES if trial.build.fixed_batch is None else (trial.build.fixed_batch,)
        steps = strategy(requirements.goal, context.layouts(trial.build), batches, like)
        for step in drive(steps, known, bench.measure, ended=lambda: _spent(context, started_s, most_s)):
            if isinstance(step, Reason):
                reason = step
            elif step.plan not in bench.failed:
                measurements[step.plan] = step
    tuned = replace(
        trial,
        measurements=tuple(measurements.values()) or trial.measurements,
        tuned=reason,
        failed_plans=tuple(FailedPlan(plan=plan, reason=why) for plan, why in bench.failed.items()),
    )
    if is_baseline(trial.build) or (measurements and requirements.goal.best(tuned) is not None):
        return tuned
    rejections = [measurement.rejected for measurement in measurements.values() if measurement.rejected]
    return replace(tuned, state=State.REJECTED, reason=(*rejections, reason or trial.reason)[0])


def not_tuned(trial: Trial, why: Reason, requirements: Requirements) -> Trial:
    """The trial of a build whose plans are not searched; under a memory limit nobody knows whether it fits."""
    left_out = replace(trial, tuned=why)
    if requirements.memory_limit_bytes is None:
        return left_out
    unknown = Reason.of(ReasonKind.MEMORY_UNKNOWN, **why.details)
    return replace(
        left_out, measurements=tuple(replace(measurement, rejected=unknown) for measurement in trial.measurements)
    )


class _Bench:
    """Measures plans of a build; a process that died is replaced by a new one."""

    def __init__(self, build: Build, context: SearchContext, stack: ExitStack) -> None:
        self._build, self._context, self._stack = build, context, stack
        self._client: Client | None = None
        self.failed: dict[Plan, Reason] = {}

    def measure(self, request: PlanRequest) -> Measurement:
        self._context.on_event(TrialStep(self._build, Step.MEASURING, request.plan))
        try:
            self._client = self._client or self._stack.enter_context(self._context.client(self._build))
            why = Reason.of(request.why)
            measurement = measure_plan(self._build, self._context, self._client, request.plan, why)
        except InputError:
            raise
        except CorewiseError as error:
            self.failed[request.plan] = reason_of(error)
            self._client = None if isinstance(error, Died) else self._client
            return not_run(request.plan, reason_of(error))
        return _within_memory(measurement, self._context.requirements)


def _within_memory(measurement: Measurement, requirements: Requirements) -> Measurement:
    """The measurement, rejected if its process needs more memory than it may."""
    if requirements.within_memory(measurement.memory_bytes):
        return measurement
    reason = Reason.of(
        ReasonKind.OVER_MEMORY,
        plan=measurement.plan.label,
        needs_bytes=measurement.memory_bytes,
        limit_bytes=requirements.memory_limit_bytes,
    )
    return replace(measurement, rejected=reason)


def _spent(context: SearchContext, started_s: float, most_s: float) -> Reason | None:
    budget = context.budget
    if budget.ended(context.split.plans):
        return budget.reason(ReasonKind.BUDGET_SPENT)
    if budget.elapsed_s - started_s >= most_s:
        return budget.reason(ReasonKind.BASELINE_SHARE_SPENT, share=BASELINE_SHARE)
    return None
