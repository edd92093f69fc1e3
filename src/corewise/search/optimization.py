"""The order of steps from a model and samples to a verified, faster one."""

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from uuid import uuid4

from corewise._version import __version__
from corewise.accuracy import metrics
from corewise.accuracy.gate import AccuracyGate
from corewise.common.errors import EngineError, InputError, MissingExtra, OutputError
from corewise.engines import BuildInputs, Engine, engine
from corewise.machine.inspect import inspect
from corewise.records.build import Build
from corewise.records.cpu import Cpu
from corewise.records.events import OnEvent, StageStarted
from corewise.records.goal import Goal, Objective
from corewise.records.jsonable import to_json
from corewise.records.report import Report, SampleFacts
from corewise.runtime.worker import CALIBRATION, HOLDOUT, PROGRAM, peak_memory_bytes, write_build_inputs
from corewise.samples import Samples, default_calibration, from_python, read, split
from corewise.search.budget import WITH_LOADS, Budget, BudgetSplit
from corewise.search.candidates import BASELINE, candidates, first_plan, shapes
from corewise.search.choose import choose
from corewise.search.journal import Journal
from corewise.search.result import JOURNAL, Result, Workspace
from corewise.search.slo import hold
from corewise.search.stages import explore, finals, revert_layers, run_trials, with_latency_table
from corewise.search.trial import SearchContext

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from corewise.source import Exported

DEFAULT_ENGINES = ("torch-int8", "openvino", "onnxruntime", "eager")
TIMEOUT_S = 600.0
PACKAGES = ("torch", "openvino", "nncf", "onnxruntime", "onnx", "numpy")


def optimize(
    model: Any,
    samples: Any,
    *,
    metric: str | Callable[[Any, Any], Any] | None = None,
    max_drop: float = 0.01,
    objective: Goal = "throughput",
    slo_ms: float | None = None,
    memory_limit_bytes: int | None = None,
    strict: bool = False,
    engines: Sequence[str] = DEFAULT_ENGINES,
    ignored: Sequence[str] = (),
    calibration: int | None = None,
    seed: int = 0,
    budget_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
    work: Path | None = None,
    tell: OnEvent = lambda event: None,
) -> Result:
    """Find the fastest way to run ``model`` on this CPU that loses at most ``max_drop`` of ``metric``.

    ``model`` is an ``nn.Module``, an ``ExportedProgram`` or a reference (see ``source.load``); ``samples`` whatever
    ``samples.from_python`` takes, a function that returns it, or a reference (see ``samples.read``).
    ``calibration`` of them are drawn with ``seed`` for quantization; all others are the holdout that decides.
    ``metric`` is a name in ``metrics.METRICS``, a ``module:function`` or a callable (outputs, labels) -> score,
    higher is better; without one, class labels ask for top-1, and no labels for agreement with fp32.
    ``objective``: items per second; the latency of single items; or ``slo``, the most requests per second of which
    99 % are answered within ``slo_ms``. ``memory_limit_bytes`` bounds the process that runs the winner. ``ignored``
    layers never run in int8: names as ``corewise explain`` lists them, or regular expressions for whole names; int8 is
    then by corewise's own quantizer only. ``budget_s`` bounds the whole search, ``timeout_s`` each step of a trial.
    Finished trials are kept in the folder ``work``, where the same call resumes. ``tell`` hears of the progress.

    Raises ``InputError`` for what is wrong with the arguments, for a budget in which no candidate can be tried too,
    and ``MissingExtra`` where torch is not installed. A candidate that fails is no error; where none is good enough,
    the result is the baseline.
    """
    budget = Budget(total_s=budget_s)
    _check_torch()
    from corewise import source

    goal = Objective(
        goal=objective, max_drop=max_drop, strict=strict, slo_ms=slo_ms, memory_limit_bytes=memory_limit_bytes
    )
    _check(goal, budget_s, timeout_s)
    scorer = None if metric is None else metrics.resolve(metric)
    usable, notes = _usable(engines)

    tell(StageStarted("reading the samples"))
    data = read(samples) if isinstance(samples, str) else from_python(samples() if callable(samples) else samples)
    wanted = default_calibration(len(data)) if calibration is None else calibration
    calibrating, holdout = split(data, calibration=wanted, seed=seed)

    tell(StageStarted("exporting the model"))
    exported = source.export(source.load(model) if isinstance(model, str) else model, data)
    operators = source.operators(exported.program) if exported.program else {}
    cpu = inspect()
    in_process = None
    if exported.program is None:
        in_process, usable, notes = _only_eager(exported)
    elif ignored:
        _check_ignored(exported.program, ignored)
        notes = (*notes, f"int8 by corewise's quantizer only, without {', '.join(ignored)}")
    builds = candidates(cpu, operators, usable, ignored)

    home = Workspace(work)
    material = BuildInputs(
        program=home.folder / PROGRAM,
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators,
        calibration=calibrating,
        cpu=cpu,
        cache=home.folder / "cache",
    )
    gate = AccuracyGate(scorer, holdout, exported.output_structure, goal, seed)
    context = SearchContext(
        folder=home.folder,
        plan=first_plan(cpu, objective),
        shapes=lambda build: shapes(cpu, build),
        cpu=cpu,
        timeout_s=timeout_s,
        verify=gate,
        tell=tell,
        budget=budget,
        shares=WITH_LOADS if objective == "slo" else BudgetSplit(),
        in_process=in_process,
    )
    facts = _facts(data, calibrating, holdout, seed)
    key = _key(exported, facts, goal, builds, _identity(metric), cpu)
    with _disk_errors(home.folder), Journal(home.folder / JOURNAL, key) as journal:
        if journal.empty:
            home.clear()
        try:
            _prepare(home.folder, exported, material, holdout)
            trials = run_trials(builds, context, journal, gate)
            trials = revert_layers(trials, context, journal)
            trials = explore(trials, context, journal, goal)
            if objective == "slo":
                trials = hold(trials, context, journal, goal)
            trials, run = finals(trials, context, goal)
            choice = choose(trials, run.rates, goal, BASELINE)
            trials = with_latency_table(trials, choice, context)
        finally:
            if journal.empty:  # it ended before anything worth keeping
                home.remove()
    report = Report(
        model=model if isinstance(model, str) else type(model).__name__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        cpu=cpu,
        objective=goal,
        samples=facts,
        trials=trials,
        finals=run.rates,
        choice=choice,
        wall_s=budget.elapsed_s,
        peak_memory_bytes=peak_memory_bytes() + max(run.peak_memory_bytes, *(t.peak_memory_bytes for t in trials)),
        notes=notes,
    )
    return Result(
        report=report,
        material=material,
        holdout=holdout,
        output_structure=exported.output_structure,
        payload=context.payload(report.choice.winner),
        outputs=context.outputs(report.choice.winner),
        opener=in_process or engine(report.choice.winner.engine),
        home=home,
    )


def _only_eager(exported: "Exported") -> tuple[Engine, dict[str, Engine], tuple[str, ...]]:
    """For a model that cannot be exported: only this process has the module, and only eager can run it."""
    from corewise.engines.eager import Eager

    eager = Eager(exported.module)
    return eager, {"eager": eager}, (f"only eager was tried: the model cannot be exported ({exported.why_not})",)


def _facts(data: Samples, calibrating: Samples, holdout: Samples, seed: int) -> SampleFacts:
    return SampleFacts(
        source=data.source,
        fingerprint=data.fingerprint,
        calibration=len(calibrating),
        holdout=len(holdout),
        seed=seed,
        labelled=data.labels is not None,
        preprocess=data.preprocess,
    )


def _check_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", "optimize", "optimizing a model")


def _check(objective: Objective, budget_s: float | None, timeout_s: float) -> None:
    if not 0 <= objective.max_drop < inf:
        raise InputError(f"max_drop is {objective.max_drop}", "give 0 or more, e.g. 0.01 for one point of top-1")
    if objective.goal not in get_args(Goal):
        raise InputError(f"the objective {objective.goal!r} is unknown", f"give {', '.join(get_args(Goal))}")
    if (objective.goal == "slo") != (objective.slo_ms is not None):
        raise InputError("the goal slo and slo_ms go together", "give both (e.g. slo and 100) or neither")
    if objective.slo_ms is not None and not 0 < objective.slo_ms < inf:
        raise InputError(f"slo_ms is {objective.slo_ms}", "give milliseconds above 0, e.g. 100")
    if objective.memory_limit_bytes is not None and objective.memory_limit_bytes <= 0:
        raise InputError(f"memory_limit_bytes is {objective.memory_limit_bytes}", "give bytes above 0")
    if not 0 < timeout_s < inf:
        raise InputError(f"timeout_s is {timeout_s}", "give seconds above 0, e.g. 600")
    if budget_s is not None and not 0 < budget_s < inf:
        raise InputError(f"the budget is {budget_s} s", "give seconds above 0, e.g. 300")


def _check_ignored(program: "ExportedProgram", ignored: Sequence[str]) -> None:
    """Raise ``InputError`` where one of them matches no layer, before any work."""
    from corewise.quantize.graph import folded
    from corewise.quantize.placement import place

    if any(set(name) & set(" \t\n") for name in ignored):
        raise InputError("an ignored layer has a space in its name", r"give a regular expression with \s for it")
    try:
        place(folded(program), "fused", ignored)
    except EngineError as error:
        raise InputError(error.what, error.fix) from error


def _usable(names: Sequence[str]) -> tuple[dict[str, Engine], tuple[str, ...]]:
    """The engines that can run here, and in words why each other one cannot."""
    found = {name: engine(name) for name in names}
    reasons = {name: one.unavailable() for name, one in found.items()}
    notes = tuple(f"engine {name} was not tried: {why}" for name, why in reasons.items() if why)
    return {name: one for name, one in found.items() if not reasons[name]}, notes


def _key(
    exported: "Exported", facts: SampleFacts, goal: Objective, builds: Sequence[Build], metric: str, cpu: Cpu
) -> str:
    """What must be equal for finished trials to count in another run."""
    from corewise import source

    parts = (source.digest(exported), facts, goal, builds, metric, cpu, _versions())
    return hashlib.sha256(json.dumps(to_json(parts)).encode()).hexdigest()


def _identity(metric: str | Callable[[Any, Any], Any] | None) -> str:
    """What tells one metric from another in the journal: where it stands in its file, and that file's content.

    Not the values that it closes over. What has no file, as an object, cannot be told from others: nothing resumes.
    """
    if metric is None or (isinstance(metric, str) and metric in metrics.METRICS):
        return metric or ""
    function = metrics.resolve(metric).score
    code = getattr(function, "__code__", None)
    file = Path(code.co_filename) if code else Path()
    if code is None or not file.is_file():
        return uuid4().hex
    return hashlib.sha256(file.read_bytes() + f"{code.co_qualname}:{code.co_firstlineno}".encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"corewise": __version__}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{error.filename or folder} cannot be written: {error.strerror or error}"
        fix = "free space"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what, fix = f"the system refused: {error}", "mend that"
        raise OutputError(what, f"{fix} and run the same command: finished trials are kept in {folder}") from error


def _prepare(folder: Path, exported: "Exported", material: BuildInputs, holdout: Samples) -> None:
    """Write what the trial children read."""
    from corewise import source

    if exported.program is not None:
        source.save_program(exported.program, material.program)
    material.calibration.save(folder / CALIBRATION)
    holdout.save(folder / HOLDOUT)
    write_build_inputs(folder, material)
