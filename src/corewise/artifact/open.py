"""Use an artifact: open it as a model, verify it on this machine, race it against other engines."""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corewise import artifact
from corewise.artifact import Artifact, tuned
from corewise.artifact.model import Model
from corewise.common.errors import ArtifactError, EngineError, InputError
from corewise.common.references import guard
from corewise.common.stats import Ratio, ratio_interval
from corewise.engines import ENGINES, BuildInputs, Engine, Session, engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.measurement import Rates
from corewise.runtime.client import Worker
from corewise.runtime.instances import open_plan
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
) -> Model:
    """Open an artifact.

    Hashes and CPU fit are checked before anything is opened; nothing is unpickled or compiled. ``model`` is needed
    only for one that could not be exported: the same ``nn.Module``, which gets the artifact's weights.

    It runs the plan that ``retune`` found on this machine, else the one it was made with; on a machine other than that
    plan's, or one with too few cores for it, a warning says so (``tuned.fit``). ``threads_per_instance``, ``instances``
    and ``batch`` (the rows of a micro-batch) take the place of the plan's own. ``check_finite`` refuses calls whose
    inputs have NaN or infinity; turn it off where infinity is meant, as in an attention mask.

    It works in the process that opened it: a child that is forked later loads it itself.

    Raises ``ArtifactError`` where it is truncated, altered, foreign or does not fit this CPU, ``EngineError`` where its
    engine is not installed or cannot run such a plan, and ``InputError`` for numbers that are no plan.
    """
    cpu = inspect_cpu()
    found = artifact.read(Path(folder), cpu=cpu)
    fit = tuned.asked(found, cpu, threads_per_instance=threads_per_instance, instances=instances, batch=batch)
    for warning in fit.warnings:
        warnings.warn(warning, stacklevel=2)
    return Model(
        _open(found, fit.plan, cpu, model),
        inputs=found.manifest.inputs,
        input_structure=found.input_structure,
        output_structure=found.output_structure,
        check_finite=check_finite,
    )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``verify`` found: everything fits, and how close the golden outputs came."""

    files: int
    size_bytes: int
    golden_samples: int
    sqnr_db: float
    notes: tuple[str, ...]


def verify(folder: str | Path, *, model: Any = None) -> Verification:
    """Check hashes, CPU fit and golden outputs on this machine, under the plan that ``load`` runs.

    Raises ``ArtifactError`` with the first thing that is wrong.
    """
    cpu = inspect_cpu()
    found = artifact.read(Path(folder), cpu=cpu)
    fit = tuned.fit(found, cpu)
    session = _open(found, fit.plan, cpu, model)
    try:
        sqnr_db = artifact.check_golden(found, session)
    finally:
        session.close()
    return Verification(
        files=len(found.manifest.files),
        size_bytes=sum(facts.size_bytes for facts in found.manifest.files.values()),
        golden_samples=len(found.golden()[0][0]),
        sqnr_db=sqnr_db,
        notes=(*fit.warnings, *((fit.tuned.label,) if fit.tuned else ())),
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """An alternating run of an artifact against another way to run its model."""

    rates: tuple[Rates, Rates]
    ratio: Ratio
    """The artifact's items per second over the other's."""


def bench(
    folder: str | Path, *, against: str = "eager", on_round: Callable[[int, int], None] = lambda number, rounds: None
) -> Bench:
    """Race an artifact against the fp32 program that it carries, run by the engine ``against`` at the same batch.

    Raises ``ArtifactError`` where the artifact is not sound or carries no reference, ``EngineError``
    where an engine is unknown or not installed.
    """
    cpu = inspect_cpu()
    found = artifact.read(Path(folder), cpu=cpu)
    if artifact.REFERENCE not in found.manifest.files:
        raise ArtifactError(
            f"{folder} carries no fp32 program", "save it with reference=True, of a model that can be exported"
        )
    check_trusted(found, found.manifest.build.engine)
    for name in ("eager", against, found.manifest.build.engine):
        check_available(name, f"racing {folder}")
    plan = tuned.fit(found, cpu).plan
    other = Build(engine=against, precision="fp32")
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        workspace = Workspace(Path(name))
        payload = workspace.empty_payload(other)
        write_reference(found, golden_samples(found), cpu, workspace)

        def start(build: Build) -> Worker:
            return Worker(cpu=cpu, log=workspace.folder / f"{build.engine}.log", timeout_s=TIMEOUT_S)

        with start(other) as worker:
            worker.build(workspace, other, payload)
        run = run_race(
            (
                Contender(build=found.manifest.build, plan=plan, payload=found.folder / artifact.PAYLOAD),
                Contender(build=other, plan=plan, payload=payload),
            ),
            samples=workspace.calibration,
            start=start,
            on_round=lambda number, rounds, rates: on_round(number, rounds),
        )
    ours, theirs = run.rates
    return Bench(rates=(ours, theirs), ratio=ratio_interval(ours.per_s, theirs.per_s))


def _open(found: Artifact, plan: Plan, cpu: Cpu, model: Any) -> Session:
    build = found.manifest.build
    check_trusted(found, build.engine)
    check_available(build.engine, f"opening {found.folder}")
    with guard(ArtifactError, f"{found.folder} cannot be opened here", artifact.REBUILD):
        return open_plan(opener(found, model), found.folder / artifact.PAYLOAD, build, plan, cpu)


def opener(found: Artifact, model: Any) -> Engine:
    """The artifact's engine; around ``model``, with the artifact's weights, where it could not be exported.

    Raises ``InputError`` for a ``model`` that an artifact does not need.
    """
    if model is None:
        return engine(found.manifest.build.engine)
    from corewise.engines.eager import WEIGHTS, Eager
    from corewise.source import Flat

    if f"{artifact.PAYLOAD}/{WEIGHTS}" not in found.manifest.files:
        raise InputError(f"{found.folder} is complete without its model's code", "load it without model")
    return Eager(Flat(model.eval(), found.input_structure))


def check_trusted(found: Artifact, name: str) -> None:
    """An artifact must never cause an import or a call: another's engine is a class that the caller imported."""
    module, _, attribute = name.partition(":")
    if name not in ENGINES and not isinstance(vars(sys.modules.get(module, object)).get(attribute), type):
        raise ArtifactError(
            f"{found.folder} wants the engine {name}, which is not corewise's", f"import {module} first if you trust it"
        )


def check_available(name: str, purpose: str) -> None:
    """Raise ``EngineError`` where the engine cannot open payloads here."""
    why = engine(name).unavailable(opening=True)
    if why:
        raise EngineError(f"{purpose}: the engine {name} {why}")


def golden_samples(found: Artifact) -> Samples:
    """The artifact's golden inputs as samples, without labels."""
    inputs, _ = found.golden()
    rows = [tuple(array[i] for array in inputs) for i in range(len(inputs[0]))]
    return Samples(rows=rows, structure=found.input_structure, source=str(found.folder))


def write_reference(found: Artifact, golden: Samples, cpu: Cpu, workspace: Workspace) -> None:
    """Write the artifact's fp32 program and golden inputs into a workspace, as inputs of a build."""
    from corewise.source import load_program, operators

    workspace.program.symlink_to((found.folder / artifact.REFERENCE).resolve())
    workspace.write_build_inputs(
        BuildInputs(
            program=workspace.program,
            inputs=found.manifest.inputs,
            outputs=found.manifest.outputs,
            operators=operators(load_program(workspace.program)),
            calibration=golden,
            cpu=cpu,
            cache=workspace.cache,
        )
    )
