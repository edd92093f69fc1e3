"""The task of a search: the model as one exported program, the samples, and the builds worth trying."""

import hashlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import numpy as np

from corewise._version import __version__
from corewise.accuracy import metrics
from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Outputs
from corewise.common.agreement import worst_row_db
from corewise.common.errors import EngineError, InputError
from corewise.engines import BuildInputs, Engine, engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.events import OnEvent, Stage, StageStarted
from corewise.records.goal import Requirements
from corewise.records.jsonable import to_json
from corewise.records.pipeline import Pooling, TextPipeline
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import SampleFacts
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples, check_class_names, default_calibration, split
from corewise.samples.drawing import draw
from corewise.search.budget import Preparation, SampleLimits, sample_limits
from corewise.search.candidates import BASELINE, list_candidates
from corewise.search.texts import fitted, read_samples, tokenized

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from corewise.source import Exported

LINEARS = ("aten.linear.default", "aten.addmm.default", "aten.mm.default")
SAME_DB = 40.0
"""How near the baseline's answers are to those of the user's own module: one part in a hundred is no rounding."""
PACKAGES = ("torch", "openvino", "nncf", "onnxruntime", "onnx", "numpy")

MetricLike = str | Callable[[Any, Any], Any] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What a search starts from."""

    model: str
    exported: "Exported"
    samples: Samples
    calibration: Samples
    holdout: Samples
    metric: MetricLike
    cpu: Cpu
    builds: tuple[Build, ...]
    in_process: Engine | None
    """Runs the builds of a model that cannot be exported."""
    notes: tuple[Reason, ...]
    seed: int
    pipeline: TextPipeline | None = None
    """How texts become the model's inputs, if they do."""
    tokenizer: bytes = b""
    class_names: tuple[str, ...] | None = None
    """In the order of the scores: given, or else those that the model's library has."""
    limits: SampleLimits | None = None
    """Under a budget, how many samples it has time for."""
    row_s: float | None = None
    """Seconds of one row in eager PyTorch; timed under a budget only."""
    preparation: Preparation = field(default_factory=Preparation)

    @classmethod
    def read(
        cls,
        model: Any,
        samples: Any,
        *,
        metric: MetricLike,
        engines: Sequence[str],
        ignored: Sequence[str],
        calibration: int | None,
        seed: int,
        class_names: Sequence[str] | None,
        tokenizer: Any,
        pooling: Pooling | None,
        on_event: OnEvent,
        budget_s: float | None = None,
        kept_limits: SampleLimits | None = None,
        required: bool = False,
    ) -> Self:
        """Read the samples, export the model and list its builds.

        A run that resumes has the ``kept_limits`` of the one before.

        Raises ``InputError`` for what is wrong with them, and ``EngineError`` if an engine that is ``required`` cannot
        be tried at all.
        """
        from corewise import source

        if metric is not None:
            metrics.resolve(metric)
        started_s = time.monotonic()
        usable, notes = _usable(engines, required)
        on_event(StageStarted(Stage.READING_SAMPLES))
        reading_s = time.monotonic()
        gathered = read_samples(model, samples)
        samples_s = time.monotonic() - reading_s
        on_event(StageStarted(Stage.EXPORTING))
        loaded = source.load_with_texts(model, tokenizer=tokenizer, pooling=pooling)
        loaded, data = tokenized(loaded, gathered, class_names)
        count = default_calibration(len(data)) if calibration is None else calibration
        calibrating, holdout = split(data, calibration=count, seed=seed)
        exported = source.export(loaded.model, data)
        loaded = fitted(loaded, exported, asked=tokenizer is not None)
        row_s = None if budget_s is None else source.row_seconds(exported, data)
        fewer: tuple[Reason, ...] = ()
        limits = None
        if budget_s is not None and row_s is not None:
            given = None if calibration is None else len(calibrating)
            limits = sample_limits(budget_s, row_s, given) if kept_limits is None else kept_limits
            calibrating, holdout, fewer = _affordable(calibrating, holdout, limits, seed)
        calibrating = calibrating.shuffled(seed)  # quantizers take ranges from the first few, and judge by the last
        names = fitting_class_names(class_names, loaded.class_names, exported.outputs)
        in_process = None
        if exported.program is None:
            in_process, usable, notes = _only_eager(exported, engines if required else ())
        elif ignored:
            _check_ignored(exported.program, ignored)
            notes = (*notes, Reason.of(ReasonKind.COREWISE_INT8_ONLY, layers=", ".join(ignored)))
        cpu = inspect_cpu()
        return cls(
            model=model if isinstance(model, str) else type(model).__name__,
            exported=exported,
            samples=data,
            calibration=calibrating,
            holdout=holdout,
            metric=metric,
            cpu=cpu,
            builds=_builds(exported, usable, ignored, cpu, required),
            in_process=in_process,
            pipeline=loaded.pipeline,
            tokenizer=loaded.tokenizer,
            notes=(*map(Reason.text, data.notes), *notes, *fewer, *_behaviour(exported)),
            seed=seed,
            class_names=names,
            limits=limits,
            row_s=row_s,
            preparation=Preparation(samples_s=samples_s, export_s=time.monotonic() - started_s - samples_s),
        )

    @property
    def convolves(self) -> bool:
        """Whether most of its layers are convolutions."""
        from corewise import source

        operators = source.operators(self.exported.program) if self.exported.program else {}
        convolutions = sum(count for name, count in operators.items() if "conv" in name)
        return 2 * convolutions >= convolutions + sum(operators.get(name, 0) for name in LINEARS)

    @property
    def facts(self) -> SampleFacts:
        """Where the samples came from and how they were split."""
        return SampleFacts(
            source=self.samples.source,
            fingerprint=self.samples.fingerprint,
            calibration=len(self.calibration),
            holdout=len(self.holdout),
            seed=self.seed,
            labelled=self.samples.labels is not None,
            preprocess=self.samples.preprocess,
            tokens=self.samples.tokens,
            audio=self.samples.audio,
        )

    def gate(self, requirements: Requirements) -> AccuracyGate:
        """What compares outputs for the holdout with fp32's."""
        scorer = None if self.metric is None else metrics.resolve(self.metric)
        return AccuracyGate(
            scorer,
            self.holdout,
            self.exported.output_structure,
            requirements,
            self.seed,
            robust=requirements.robust,
            integer_inputs=any("int" in spec.dtype for spec in self.exported.inputs),
        )

    def baseline_doubt(self, outputs: Outputs) -> Reason | None:
        """What to say of the baseline's ``outputs`` for the holdout if the user's own module answers otherwise.

        All builds are compared with the baseline, so nothing else would tell.
        """
        from corewise import source

        if self.exported.state is not None:  # a call would change what the module keeps
            return None
        rows, answers = source.own_answers(self.exported, self.holdout)
        theirs = [np.stack(list(leaf)) for leaf in outputs.rows(rows).leaves]
        decibels = worst_row_db(answers, theirs)
        if decibels >= SAME_DB:
            return None
        return Reason.of(ReasonKind.BASELINE_DIFFERS, decibels=decibels, samples=len(rows))

    def write(self, workspace: Workspace) -> BuildInputs:
        """Write what the trial processes read into the workspace."""
        return write_program(self.exported, self.calibration, self.holdout, self.cpu, workspace)

    def key_parts(self, requirements: Requirements) -> dict[str, str]:
        """What must be equal for finished trials to count in another run, by its name: a value, or a digest of it."""
        from corewise import source

        facts = self.facts
        return {
            "the model": source.digest(self.exported),
            "the samples": digest((facts.source, facts.fingerprint, facts.labelled)),
            "the number of calibration samples": str(facts.calibration),
            "the number of held-out samples": str(facts.holdout),
            "the seed": str(facts.seed),
            "how samples become inputs": digest((facts.preprocess, facts.tokens, facts.audio)),
            **{f"the requirement {name}": str(value) for name, value in requirements.flat().items()},
            "the builds to try": digest(self.builds),
            "the metric": _identity(self.metric),
            "the CPU": digest(self.cpu),
            **{f"the version of {package}": version for package, version in package_versions().items()},
        }


def write_program(
    exported: "Exported", calibration: Samples, holdout: Samples, cpu: Cpu, workspace: Workspace
) -> BuildInputs:
    """Write the program, if there is one, and the samples that trial processes read; returns what builds are given."""
    from corewise import source

    if exported.program is not None:
        source.save_program(exported.program, workspace.program)
    holdout.save(workspace.holdout)
    inputs = BuildInputs(
        program=workspace.program,
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=source.operators(exported.program) if exported.program else {},
        calibration=calibration,
        cpu=cpu,
        cache=workspace.cache,
    )
    workspace.write_build_inputs(inputs)
    return inputs


def fitting_class_names(
    given: Sequence[str] | None, own: tuple[str, ...], outputs: Sequence[TensorSpec]
) -> tuple[str, ...] | None:
    """The names given, else the model's own if they fit. Raises ``SamplesError`` where those given do not.

    Of a detector any output may have a place for each class, and for four coordinates, the background and objectness.
    """
    classes = outputs[0].shape[-1] or 0
    if len(outputs[0].shape) == 2 and len(outputs) == 1:
        if given is not None:
            check_class_names(given, classes, "the list of class names")
        return tuple(given) if given is not None else own if len(own) == classes else None
    sizes = {size for spec in outputs for size in spec.shape[1:]}

    def fits(names: Sequence[str]) -> bool:
        return not sizes.isdisjoint({len(names) + extra for extra in (0, 1, 4, 5)}) or sizes <= {None, 4, 6}

    if given is not None and len(outputs) == 1 and not fits(given):
        check_class_names(given, classes, "the list of class names")
    return tuple(given) if given is not None else own if own and fits(own) else None


def _affordable(
    calibrating: Samples, holdout: Samples, limits: SampleLimits, seed: int
) -> tuple[Samples, Samples, tuple[Reason, ...]]:
    """As many samples of both parts as the budget has time for, and a note for each part that has fewer."""
    parts, notes = [], []
    for samples, most, role in (
        (calibrating, limits.calibration, "calibration"),
        (holdout, limits.holdout, "held-out"),
    ):
        chosen, drawn = draw(len(samples), most, seed, samples.groups)
        parts.append(samples.take(chosen) if drawn else samples)
        if drawn:
            notes.append(Reason.of(ReasonKind.FEWER_SAMPLES, used=len(chosen), of=len(samples), role=role))
    return parts[0], parts[1], tuple(notes)


def _only_eager(exported: "Exported", required: Sequence[str]) -> tuple[Engine, dict[str, Engine], tuple[Reason, ...]]:
    """For a model that cannot be exported: only this process has the module, and only eager can run it.

    Raises ``EngineError`` if another engine is ``required``.
    """
    from corewise.engines.eager import Eager

    others = [name for name in required if name != BASELINE.engine]
    _check_tried(dict.fromkeys(others, f"the model cannot be exported ({exported.why_not})"))

    eager = Eager(exported.module)
    return eager, {"eager": eager}, (Reason.of(ReasonKind.ONLY_EAGER, why=exported.why_not),)


def _builds(
    exported: "Exported", usable: Mapping[str, Engine], ignored: Sequence[str], cpu: Cpu, required: bool
) -> tuple[Build, ...]:
    """The builds to try. Raises ``EngineError`` if a ``required`` engine has none."""
    from corewise import source

    operators = source.operators(exported.program) if exported.program else {}
    builds = list_candidates(cpu, operators, usable, ignored, exported.fixed_batch)
    if required:
        without = set(usable) - {BASELINE.engine, *(build.engine for build in builds)}
        _check_tried(dict.fromkeys(without, "it has no build for this model on this CPU"))
    return builds


def _behaviour(exported: "Exported") -> Iterator[Reason]:
    """What is unusual about the model, and what follows."""
    if exported.mixing is not None:
        mixing, origin = exported.mixing, exported.mixing.origin
        yield Reason.of(
            ReasonKind.MIXES_BATCH,
            decibels=mixing.decibels,
            operation=origin.operation if origin else "",
            where=origin.where if origin else "",
        )
    elif exported.fixed_batch is not None:
        yield Reason.of(ReasonKind.FIXED_BATCH, rows=exported.fixed_batch, why=exported.why_fixed)
    if exported.state is not None:
        state, where = exported.state, exported.state.origin.where if exported.state.origin else ""
        yield Reason.of(ReasonKind.KEEPS_STATE, name=state.name, where=where, is_read=state.is_read)


def _check_ignored(program: "ExportedProgram", ignored: Sequence[str]) -> None:
    """Raise ``InputError`` if one of them matches no layer, before any work."""
    from corewise.quantize.graph import folded
    from corewise.quantize.placement import place

    if any(set(name) & set(" \t\n") for name in ignored):
        raise InputError("an ignored layer has a space in its name", r"give a regular expression with \s for it")
    try:
        place(folded(program), "fused", ignored)
    except EngineError as error:
        raise InputError(error.what, error.fix) from error


def _usable(names: Sequence[str], required: bool) -> tuple[dict[str, Engine], tuple[Reason, ...]]:
    """The engines that can run here, and why each other one cannot; ``EngineError`` if that one is ``required``."""
    engines = {name: engine(name) for name in names}
    reasons = {name: named_engine.unavailable() for name, named_engine in engines.items()}
    if required:
        _check_tried({name: why for name, why in reasons.items() if why})
    notes = tuple(
        Reason.of(ReasonKind.ENGINE_UNAVAILABLE, engine=name, why=why) for name, why in reasons.items() if why
    )
    return {name: named_engine for name, named_engine in engines.items() if not reasons[name]}, notes


def _check_tried(unable: Mapping[str, str]) -> None:
    """Raise ``EngineError`` for the first engine that was asked for and is ``unable``, with the reason."""
    for name, why in unable.items():
        raise EngineError(f"engine {name} cannot be tried: {why}", "leave it out")


def digest(value: Any) -> str:
    """Equal for equal values."""
    return hashlib.sha256(json.dumps(to_json(value)).encode()).hexdigest()


def _identity(metric: MetricLike) -> str:
    """What distinguishes one metric from another in the journal: its place in its file, and that file's content.

    The values that it closes over do not count. A metric without a file, such as an object, cannot be distinguished
    from others, so nothing resumes.
    """
    if metric is None or (isinstance(metric, str) and ":" not in metric):  # built in, such as recall@5
        return metric or ""
    function = metrics.resolve(metric).score
    code = getattr(function, "__code__", None)
    file = Path(code.co_filename) if code else Path()
    if code is None or not file.is_file():
        return uuid4().hex
    return hashlib.sha256(file.read_bytes() + f"{code.co_qualname}:{code.co_firstlineno}".encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """The versions of corewise and of the packages that compute."""
    versions = {"corewise": __version__}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            versions[package] = importlib.metadata.version(package)
    return versions
