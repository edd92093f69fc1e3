"""From a model and samples to a verified, faster model: the order of steps."""

import errno
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from corewise.accuracy.gate import AccuracyGate
from corewise.common.errors import InputError, MissingExtra, OutputError
from corewise.engines import BuildInputs, engine
from corewise.records.events import EarlierTrialsUnused, OnEvent
from corewise.records.goal import Goal, GoalName, Requirements, Slo, parse_goal
from corewise.records.pipeline import Pooling
from corewise.records.reason import Reason
from corewise.records.report import Choice, Report
from corewise.runtime.measure import kinds_of
from corewise.runtime.worker import peak_memory_bytes
from corewise.runtime.workspace import Workspace
from corewise.search.alone import alone_guard
from corewise.search.budget import (
    PHOTOS_S,
    RACE_S,
    WITH_LOADS,
    WITH_PHOTOS,
    Budget,
    BudgetSplit,
    SampleLimits,
    baseline_batch,
)
from corewise.search.call_costs import time_calls
from corewise.search.candidates import first_plan, layouts
from corewise.search.end_to_end import LEAST_FILES, photo_files
from corewise.search.images import ImagePlan, prepare_images
from corewise.search.journal import Journal
from corewise.search.packing import judge_packing, reserved_s
from corewise.search.result import Result
from corewise.search.search import Search
from corewise.search.shifting import ShiftGuard
from corewise.search.task import MetricLike, Task, digest, package_versions
from corewise.search.trial import SearchContext

DEFAULT_ENGINES = ("torch-int8", "openvino", "onnxruntime", "eager")
TIMEOUT_S = 600.0


def optimize(
    model: Any,
    samples: Any,
    *,
    metric: MetricLike = None,
    max_drop: float = 0.01,
    objective: GoalName | Goal = "throughput",
    slo_ms: float | None = None,
    memory_limit_bytes: int | None = None,
    strict: bool = False,
    robust: bool | None = None,
    engines: Sequence[str] = DEFAULT_ENGINES,
    ignored: Sequence[str] = (),
    calibration: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    tokenizer: Any = None,
    pooling: Pooling | None = None,
    end_to_end: bool | None = None,
    budget_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
    work: str | Path | None = None,
    on_event: OnEvent = lambda event: None,
) -> Result:
    """Find the fastest way to run a model on this CPU that loses at most ``max_drop`` of a metric.

    A candidate that fails is not an error. If none is good enough, the result is the baseline.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram``, a ``SentenceTransformer`` or ``CrossEncoder``, or a reference
            such as "file.py:function", "model.pt2", "st:FOLDER" or "timm:NAME".
        samples: arrays or tensors without a batch dimension, or dicts or tuples of them, with labels if there are any;
            texts or pairs of texts, for a model with a tokenizer; a function that returns them; or a reference such as
            a folder of images or recordings, a file of texts or "file.py:function".
        metric: the name of a built-in metric, "file.py:function", or a callable (outputs, labels) -> score, the higher
            the better. Default: the one that fits the labels; without labels, how close the outputs are to fp32's.
        max_drop: how much of the metric may be lost, in the metric's unit.
        objective: "throughput" (items/s), "latency" (of single items), "slo" (the most requests/s with 99 % of them
            answered within ``slo_ms``), or a goal object such as ``Slo(p99_ms=50)``.
        slo_ms: for "slo", milliseconds.
        memory_limit_bytes: the most memory that the process that runs the winner may use. Default: no limit.
        strict: require the upper end of the drop's 95 % confidence interval to be within ``max_drop``.
        robust: also require that int8 is accurate on samples unlike those that calibrated it. Default: for texts and
            embeddings, but a build may then win with a warning if there was no time to judge it.
        engines: the engines to try; eager PyTorch is always the baseline. One that cannot be tried at all is an error,
            unless the engines are the default ones.
        ignored: layers that never run in int8: names as ``explain`` lists them, or regular expressions for whole names.
        calibration: samples to calibrate with, drawn with ``seed``; all others are the holdout that decides. Default:
            two of five, at most 200.
        seed: seed of the split into calibration and holdout.
        class_names: names of the classes in the order of the scores, which the artifact keeps. Default: those that the
            model brings (``id2label``, torchvision's categories, timm's ImageNet names, Ultralytics' ``names``).
        tokenizer: the path of a ``tokenizer.json``, or a tokenizer of transformers, for a model that takes token ids
            and brings none: samples may then be texts.
        pooling: make one vector of each text: "mean", "cls", "max" or "last" of its token vectors; for "hf:" models and
            models with ``tokenizer``.
        end_to_end: also find the fastest plan from files of photos to answers, decoding included, which ``predict``
            uses. Default: for a folder of photos.
        budget_s: seconds for the whole search; a short one judges with fewer samples. Default: as long as it takes.
        timeout_s: seconds for each step of a trial.
        work: a folder that keeps finished trials, so that the same call resumes. Default: a temporary folder.
        on_event: called with each event of ``corewise.records.events`` as it happens.

    Returns:
        The result: its report, the model ready to call, and ``save``.

    Raises:
        InputError: something is wrong with an argument, or the budget is too short for a single candidate.
        MissingExtra: torch is not installed.
        EngineError: an engine in ``engines`` cannot be tried: it is not installed, or has no build for this model.

    Example:
        >>> import numpy as np, torch, corewise
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
        >>> samples = list(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
        >>> result = corewise.optimize(model, samples, engines=["eager"], budget_s=30)
        >>> result.report.choice.winner.engine
        'eager'
    """
    budget = Budget(total_s=budget_s)
    for name, given in (("engines", engines), ("ignored", ignored), ("class_names", class_names)):
        if isinstance(given, str):  # whose letters would be taken for names
            raise InputError(f"{name} is the text {given!r}", f"give a list: {name}=[{given!r}]")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", "optimize", "optimizing a model")
    requirements = Requirements(
        goal=parse_goal(objective, slo_ms=slo_ms),
        max_drop=max_drop,
        strict=strict,
        memory_limit_bytes=memory_limit_bytes,
        robust=robust,
    )
    _check(requirements, budget_s, timeout_s)
    task = Task.read(
        str(model) if isinstance(model, Path) else model,
        samples,
        metric=metric,
        engines=engines,
        ignored=ignored,
        calibration=calibration,
        seed=seed,
        class_names=class_names,
        tokenizer=tokenizer,
        pooling=pooling,
        on_event=on_event,
        budget_s=budget_s,
        kept_limits=SampleLimits.kept(Workspace(Path(work)).sample_limits, budget_s)
        if work and calibration is None
        else None,
        required=tuple(engines) != DEFAULT_ENGINES,
    )
    if end_to_end and not photo_files(task.holdout):
        raise InputError(
            "there are no files of photos to measure from end to end",
            f"give enough photos that {LEAST_FILES} or more are held out, or leave out --end-to-end",
        )
    workspace = Workspace.create(work)
    gate = task.gate(requirements)
    context = _context(task, workspace, gate, requirements, budget, timeout_s, on_event)
    with _working(workspace), _journal(task, requirements, workspace) as journal:
        if journal.set_aside is not None:
            on_event(EarlierTrialsUnused(journal.set_aside))
        if journal.empty:
            workspace.clear()
        if task.limits is not None:
            task.limits.keep(workspace.sample_limits)
        try:
            return _searched(task, gate, context, journal, end_to_end=end_to_end is not False)
        finally:
            if journal.empty:  # it ended before anything worth keeping
                workspace.remove()


def _searched(task: Task, gate: AccuracyGate, context: SearchContext, journal: Journal, *, end_to_end: bool) -> Result:
    """The stages of the search, in their order."""
    build_inputs = task.write(context.workspace)
    shift = ShiftGuard(gate, context, build_inputs, task.builds[0])
    alone = alone_guard(task, gate, context)
    search = Search(task.builds, gate, context, journal, shift, alone, task.baseline_doubt)
    search.try_builds()
    search.revert_layers()
    search.judge_under_shift()
    search.tune_plans()
    search.climb_rungs()
    search.find_slo_rate()
    search.race()
    choice = search.choose()
    images = prepare_images(task, choice, gate, context, end_to_end=end_to_end)
    call_costs = time_calls(task.pipeline, task.holdout, choice, context)
    packed, why_packed = judge_packing(task, choice, context, call_costs)
    choice = search.choose_layouts(choice)  # with the memory that pixels take
    reasons = images.reasons if why_packed is None else (*images.reasons, why_packed)
    result = _result(task, search, choice, build_inputs, images, reasons)
    return replace(result, call_costs=call_costs, packed=packed)


def _context(
    task: Task,
    workspace: Workspace,
    gate: AccuracyGate,
    requirements: Requirements,
    budget: Budget,
    timeout_s: float,
    on_event: OnEvent,
) -> SearchContext:
    plan = first_plan(task.cpu, requirements.goal, task.exported.fixed_batch)
    shorter = task.row_s is not None and task.exported.fixed_batch is None
    return SearchContext(
        workspace=workspace,
        plan=plan,
        baseline_plan=replace(plan, batch=baseline_batch(task.row_s or 0.0, plan.batch)) if shorter else plan,
        preparation=task.preparation,
        calibration=len(task.calibration),
        holdout=len(task.holdout),
        kinds=len(kinds_of(task.holdout)),
        convolves=task.convolves,
        layouts=lambda build: layouts(task.cpu, build),
        cpu=task.cpu,
        timeout_s=timeout_s,
        verify=gate,
        on_event=on_event,
        requirements=requirements,
        budget=budget,
        split=_split(task, requirements, budget.total_s).leaving(budget.total_s, RACE_S),
        in_process=task.in_process,
    )


def _journal(task: Task, requirements: Requirements, workspace: Workspace) -> Journal:
    parts = task.key_parts(requirements)
    return Journal(workspace.journal, digest(parts), parts)


def _split(task: Task, requirements: Requirements, total_s: float | None) -> BudgetSplit:
    if isinstance(requirements.goal, Slo):
        return WITH_LOADS
    if photo_files(task.holdout):
        return WITH_PHOTOS.ending_before(total_s, PHOTOS_S)
    return BudgetSplit().ending_before(total_s, reserved_s(task, requirements, total_s))


def _result(
    task: Task,
    search: Search,
    choice: Choice,
    build_inputs: BuildInputs,
    images: ImagePlan,
    reasons: Sequence[Reason],
) -> Result:
    context, overtime = search.context, search.overtime()
    report = Report(
        model=task.model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=package_versions(),
        cpu=task.cpu,
        requirements=replace(context.requirements, robust=search.gate.is_robust),
        samples=replace(task.facts, preprocess=images.preprocess),
        trials=tuple(search.trials),
        finals=search.rates,
        choice=choice,
        wall_s=context.budget.elapsed_s,
        peak_memory_bytes=peak_memory_bytes() + search.peak_memory_bytes,
        notes=(*task.notes, *search.notes, *reasons, *((overtime,) if overtime else ())),
    )
    return Result(
        report=report,
        build_inputs=build_inputs,
        holdout=replace(task.holdout, preprocess=images.preprocess),
        output_structure=task.exported.output_structure,
        payload=context.workspace.payload(choice.winner),
        outputs=context.workspace.outputs(choice.winner),
        opener=task.in_process or engine(choice.winner.engine),
        workspace=context.workspace,
        class_names=task.class_names,
        pipeline=task.pipeline,
        tokenizer=task.tokenizer,
        photos=images.photos,
    )


def _check(requirements: Requirements, budget_s: float | None, timeout_s: float) -> None:
    if not 0 <= requirements.max_drop < inf:
        raise InputError(f"max_drop is {requirements.max_drop}", "give 0 or more, e.g. 0.01 for one point of top-1")
    limit_bytes = requirements.memory_limit_bytes
    if limit_bytes is not None and limit_bytes <= 0:
        raise InputError(f"memory_limit_bytes is {limit_bytes}", "give bytes above 0")
    if not 0 < timeout_s < inf:
        raise InputError(f"timeout_s is {timeout_s}", "give seconds above 0, e.g. 600")
    if budget_s is not None and not 0 < budget_s < inf:
        raise InputError(f"the budget is {budget_s} s", "give seconds above 0, e.g. 300")


@contextmanager
def _working(workspace: Workspace) -> Iterator[None]:
    """Say what to do about errors of the system, such as a full disk."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or workspace.folder} cannot be written: {error.strerror or error}"
        fix = "free space"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what, fix = f"the system refused: {error}", "correct that"
        kept = f"finished trials are kept in {workspace.folder}"
        raise OutputError(what, f"{fix} and run the same command: {kept}") from error
