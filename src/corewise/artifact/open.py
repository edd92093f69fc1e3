"""Use an artifact: open it as a model, verify it on this machine, race it against other engines."""

import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corewise.artifact import (
    PAYLOAD,
    REBUILD,
    REFERENCE,
    Artifact,
    check_golden,
    check_packed_golden,
    read,
    tuned,
)
from corewise.artifact.checks import input_ranges
from corewise.artifact.model import Model
from corewise.artifact.photos import open_images
from corewise.artifact.recordings import audio_of, audio_runner
from corewise.artifact.texts import open_packed, open_texts
from corewise.common.errors import ArtifactError, EngineError, InputError
from corewise.common.references import guard
from corewise.common.stats import Ratio, ratio_interval
from corewise.engines import ENGINES, BuildInputs, Engine, Session, engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build
from corewise.records.cpu import Cpu
from corewise.records.measurement import Rates
from corewise.runtime.client import Worker
from corewise.runtime.elastic import open_elastic
from corewise.runtime.instances import open_plan, whole_calls
from corewise.runtime.race import Contender, run_race
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples

TIMEOUT_S = 600.0


def load(
    folder: str | Path,
    *,
    model: Any = None,
    threads_per_instance: int | None = None,
    instances: int | None = None,
    batch: int | None = None,
    check_finite: bool = True,
    preprocess: str | Callable[..., Any] | None = None,
    photos: bool = False,
) -> Model:
    """Open an artifact as a model that is called as the original was.

    Every hash and the CPU are checked before anything is opened; nothing is unpickled or compiled. It runs the plan
    that ``retune`` found on this machine, or else the one it was made with, and warns if that plan was measured on
    another machine. If that plan is elastic, a call that is alone takes all cores, and calls from many threads share
    them. It works only in the process that opened it; a child that is forked later must load it itself.

    Args:
        folder: the artifact.
        model: the same ``nn.Module``, only for a model that could not be exported; it gets the artifact's weights.
        threads_per_instance: threads of each instance. Default: the plan's.
        instances: calls that run at the same time. Default: the plan's.
        batch: rows of one call to the engine. Default: the plan's.
        check_finite: refuse calls whose inputs have NaN or infinity. Turn it off if infinity is meant, as in an
            attention mask.
        preprocess: the function, or its reference, that ``--preprocess`` named when the artifact was made; ``predict``
            needs it, because an artifact never runs code of its own.
        photos: open it for ``predict`` on files of photos: with the plan that was the fastest from files to answers,
            if the artifact has one for this machine and no number above is given.

    Returns:
        A thread-safe model. PyTorch tensors give tensors, NumPy arrays give arrays; dtypes and shapes are those of the
        original's inputs, with the batch as dimension 0. It is a context manager; ``close`` frees threads and memory.

    Raises:
        ArtifactError: it is truncated, altered, foreign or does not fit this CPU.
        EngineError: its engine is not installed or cannot run such a plan.
        InputError: a number of the plan is not 1 or more, or too large. A call also raises it if its inputs do not
            fit the model: their shapes or dtypes, or token ids and positions outside of the model's tables.

    Example:
        >>> import numpy as np, corewise
        >>> with corewise.load("model.cw") as fast:
        ...     fast(np.zeros((2, 3, 12, 12), np.float32)).shape
        (2, 4)
    """
    cpu = inspect_cpu()
    artifact = read(Path(folder), cpu=cpu)
    fit = tuned.asked(artifact, cpu, threads_per_instance=threads_per_instance, instances=instances, batch=batch)
    if photos and (threads_per_instance, instances, batch) == (None, None, None):
        fit = tuned.for_photos(artifact, cpu)
    for warning in fit.warnings:
        warnings.warn(warning, stacklevel=2)
    return _opened(artifact, fit, cpu, model, check_finite, preprocess)


def load_for_bulk(folder: Path, *, preprocess: str | None = None, photos: bool = False) -> Model:
    """``load`` for a job that leaves no core idle. Raises as ``load``."""
    cpu = inspect_cpu()
    artifact = read(folder, cpu=cpu)
    fit = tuned.for_photos(artifact, cpu) if photos else tuned.for_bulk(artifact, cpu)
    for warning in fit.warnings:
        warnings.warn(warning, stacklevel=2)
    return _opened(artifact, fit, cpu, preprocess=preprocess)


def _opened(
    artifact: Artifact,
    fit: tuned.Fit,
    cpu: Cpu,
    model: Any = None,
    check_finite: bool = True,
    preprocess: str | Callable[..., Any] | None = None,
) -> Model:
    session = _open(artifact, fit, cpu, model)
    return Model(
        session,
        inputs=artifact.manifest.inputs,
        input_structure=artifact.input_structure,
        output_structure=artifact.output_structure,
        ranges=input_ranges(artifact),
        check_finite=check_finite,
        texts=open_texts(artifact, whole_calls(session), fit.plan, cpu),
        seen_ranges=artifact.manifest.seen_ranges,
        images=open_images(artifact, session, fit.plan, preprocess),
        recordings=audio_runner(audio_of(artifact), session, fit.plan, preprocess),
    )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of ``verify``: everything fits, and the golden outputs come this close."""

    files: int
    size_bytes: int
    golden_samples: int
    sqnr_db: float
    notes: tuple[str, ...]


def verify(folder: str | Path, *, model: Any = None) -> Verification:
    """Check an artifact on this machine: hashes, CPU, and golden outputs under the plan that ``load`` runs.

    Args:
        folder: the artifact.
        model: as for ``load``.

    Returns:
        The number and size of the files, and how near the golden outputs come: signal over error in decibels, at most
        200.

    Raises:
        ArtifactError: with the first thing that is wrong.
        EngineError: its engine is not installed.

    Example:
        >>> import corewise
        >>> corewise.verify("model.cw").sqnr_db > 20
        True
    """
    cpu = inspect_cpu()
    artifact = read(Path(folder), cpu=cpu)
    fit = tuned.fit(artifact, cpu)
    with closing(_open(artifact, fit, cpu, model)) as session:
        sqnr_db = check_golden(artifact, session)
    if artifact.manifest.packing is not None:
        with closing(open_packed(artifact, artifact.manifest.packing, fit.plan, cpu, open_plan)) as session:
            sqnr_db = min(sqnr_db, check_packed_golden(artifact, session))
    return Verification(
        files=len(artifact.manifest.files),
        size_bytes=sum(facts.size_bytes for facts in artifact.manifest.files.values()),
        golden_samples=len(artifact.golden()[0][0]),
        sqnr_db=sqnr_db,
        notes=(*fit.warnings, *((fit.tuned.label,) if fit.tuned else ())),
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A race of an artifact against another way to run its model."""

    rates: tuple[Rates, Rates]
    ratio: Ratio
    """The artifact's items per second over the other's."""


def bench(
    folder: str | Path, *, against: str = "eager", on_round: Callable[[int, int], None] = lambda number, rounds: None
) -> Bench:
    """Race an artifact against its own fp32 program in alternating rounds.

    Args:
        folder: the artifact; it must carry its fp32 program.
        against: the engine that runs the fp32 program, at the artifact's threads, instances and batch. Default: eager.
        on_round: called after each round with its number and the number of rounds.

    Returns:
        Both rates in items per second, round by round, and their ratio with its 95 % confidence interval.

    Raises:
        ArtifactError: it is damaged or carries no fp32 program.
        EngineError: an engine is unknown or not installed.

    Example:
        >>> import corewise
        >>> race = corewise.bench("model.cw")
        >>> race.ratio.low <= race.ratio.value <= race.ratio.high
        True
    """
    cpu = inspect_cpu()
    artifact = read(Path(folder), cpu=cpu)
    if REFERENCE not in artifact.manifest.files:
        raise ArtifactError(
            f"{folder} carries no fp32 program", "save it with reference=True, from a model that can be exported"
        )
    check_trusted(artifact, artifact.manifest.build.engine)
    for name in ("eager", against, artifact.manifest.build.engine):
        check_available(name, f"racing {folder}")
    plan = tuned.fit(artifact, cpu).plan
    other = Build(engine=against, precision="fp32")
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        workspace = Workspace(Path(name))
        payload = workspace.empty_payload(other)
        write_reference(artifact, golden_samples(artifact), cpu, workspace)

        def start(build: Build) -> Worker:
            return Worker(cpu=cpu, log=workspace.folder / f"{build.engine}.log", timeout_s=TIMEOUT_S)

        with start(other) as worker:
            worker.build(workspace, other, payload)
        run = run_race(
            (
                Contender(build=artifact.manifest.build, plan=plan, payload=artifact.folder / PAYLOAD),
                Contender(build=other, plan=plan, payload=payload),
            ),
            samples=workspace.calibration,
            start=start,
            on_round=lambda number, rounds, rates: on_round(number, rounds),
        )
    ours, theirs = run.rates
    return Bench(rates=(ours, theirs), ratio=ratio_interval(ours.per_s, theirs.per_s))


def _open(artifact: Artifact, fit: tuned.Fit, cpu: Cpu, model: Any) -> Session:
    build, payload = artifact.manifest.build, artifact.folder / PAYLOAD
    check_trusted(artifact, build.engine)
    check_available(build.engine, f"opening {artifact.folder}")
    fix = REBUILD if model is None else "give the model that it was made from"
    with guard(ArtifactError, f"{artifact.folder} cannot be opened here", fix):
        if fit.elastic is None:
            return open_plan(opener(artifact, model), payload, build, fit.plan, cpu)
        divided = tuned.partitions(fit.elastic, tuned.measured(artifact, fit))
        return open_elastic(opener(artifact, model), payload, build, fit.elastic, divided, cpu)


def opener(artifact: Artifact, model: Any) -> Engine:
    """The artifact's engine; with ``model``, eager around that module with the artifact's weights.

    Raises ``InputError`` if ``model`` is given and the artifact does not need it, or it is no model.
    """
    if model is None:
        return engine(artifact.manifest.build.engine)
    if not needs_model(artifact):
        raise InputError(f"{artifact.folder} does not need its model's code", "leave out model")
    from corewise.engines.eager import Eager
    from corewise.source import Flat, as_module

    module, _ = as_module(model)
    return Eager(Flat(module, artifact.input_structure))


def needs_model(artifact: Artifact) -> bool:
    """Whether it holds the weights of a model that could not be exported, but not its code."""
    from corewise.engines.eager import WEIGHTS

    return f"{PAYLOAD}/{WEIGHTS}" in artifact.manifest.files


def check_trusted(artifact: Artifact, name: str) -> None:
    """Raise ``ArtifactError`` unless the engine is corewise's, or a class whose module the caller has imported.

    An artifact must never cause an import.
    """
    module, _, attribute = name.partition(":")
    if name not in ENGINES and not isinstance(vars(sys.modules.get(module, object)).get(attribute), type):
        raise ArtifactError(
            f"{artifact.folder} needs the engine {name}, which is not corewise's",
            f"import {module} first if you trust it",
        )


def check_available(name: str, purpose: str) -> None:
    """Raise ``EngineError`` if the engine cannot open payloads here."""
    why = engine(name).unavailable(opening=True)
    if why:
        raise EngineError(f"{purpose}: the engine {name} {why}")


def golden_samples(artifact: Artifact) -> Samples:
    """The artifact's golden inputs as samples, without labels."""
    inputs, _ = artifact.golden()
    rows = [tuple(array[i] for array in inputs) for i in range(len(inputs[0]))]
    return Samples(rows=rows, structure=artifact.input_structure, source=str(artifact.folder))


def write_reference(artifact: Artifact, golden: Samples, cpu: Cpu, workspace: Workspace) -> None:
    """Write the artifact's fp32 program and golden inputs into a workspace, as inputs of a build."""
    from corewise.source import load_program, operators

    workspace.program.symlink_to((artifact.folder / REFERENCE).resolve())
    workspace.write_build_inputs(
        BuildInputs(
            program=workspace.program,
            inputs=artifact.manifest.inputs,
            outputs=artifact.manifest.outputs,
            operators=operators(load_program(workspace.program)),
            calibration=golden,
            cpu=cpu,
            cache=workspace.cache,
        )
    )
