"""Plans that were measured on the machines that run an artifact: ``tuned.json`` beside its manifest.

The file has one entry for each machine, so that several machines can share one folder. The manifest and its hashes do
not change. A wrong plan costs only speed, so a damaged file is ignored with a warning; a damaged payload is an error.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from corewise.artifact import TUNED, TUNED_NEW, Artifact, digest, identity
from corewise.batching import ElasticTables, LatencyTable, Partitions
from corewise.common.errors import ArtifactError, InputError, OutputError
from corewise.machine.layouts import ThreadLayout, most_threads, warning
from corewise.records.build import ElasticPlan, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import GoalName, Throughput
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import Measurement
from corewise.records.schema_1 import upgrade_measurement
from corewise.records.tuned import Machine, Tuned

SCHEMA = 2
READABLE = (1, SCHEMA)
MOST_BYTES = 8 * 2**20
MOST_MACHINES = 64
MOST_MEASUREMENTS = 512
MOST_THREADS = 4096
MOST_BATCH = 65536


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The plan that an artifact runs under on this machine, and warnings about it."""

    plan: Plan
    tuned: Tuned | None
    """The entry that the plan comes from; ``None`` if it is the manifest's."""
    warnings: tuple[str, ...]
    elastic: ElasticPlan | None = None
    """What runs in place of the plan."""


def fit(artifact: Artifact, cpu: Cpu) -> Fit:
    """The plan for this machine: the one tuned on it, else the manifest's.

    On other machines than the one it was measured on, the manifest's plan is reduced to the threads that can compute
    at once. On that machine it is used as it is, with a warning if it has more threads than that.
    """
    here, there, manifest = Machine.of(cpu), Machine.of(artifact.report.cpu), artifact.manifest.plan
    warnings = []
    try:
        for entry in read(artifact.folder):
            if entry.machine == here and _within(entry.plan, manifest, cpu):
                crowded = _crowded(artifact, entry.plan, cpu)
                return Fit(plan=entry.plan, tuned=entry, warnings=crowded, elastic=entry.elastic)
    except ArtifactError as error:
        warnings.append(f"{error.what}, so its plans are not used; {error.fix}")
    if here == there:
        crowded = _crowded(artifact, manifest, cpu)
        return Fit(plan=manifest, tuned=None, warnings=(*warnings, *crowded), elastic=artifact.manifest.elastic)
    plan = _cut_down(manifest, cpu)
    before, now = there.against(here)
    reduced = "" if plan == manifest else f", and its plan was reduced to {plan.label}"
    warnings.append(
        f"{artifact.folder} was tuned on {before}, this is {now}: its speed here is not known{reduced}; "
        f"run corewise retune {artifact.folder}"
    )
    return Fit(plan=plan, tuned=None, warnings=tuple(warnings))


def asked(
    artifact: Artifact,
    cpu: Cpu,
    *,
    threads_per_instance: int | None = None,
    instances: int | None = None,
    batch: int | None = None,
) -> Fit:
    """``fit`` with the given numbers instead of the plan's own, and a warning if there are more threads than cores.

    A plan of given numbers is not elastic.

    Raises ``InputError`` if the numbers are not a plan.
    """
    planned = fit(artifact, cpu)
    given = {"threads_per_instance": threads_per_instance, "instances": instances, "batch": batch}
    requested = {name: number for name, number in given.items() if number is not None}
    if not requested:
        return planned
    for name, number in requested.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name.replace('_', ' ')} is {number!r}", "give a whole number, 1 or more")
    plan = replace(planned.plan, **requested)
    if not _sane(plan):
        raise InputError(
            f"{plan.label} is more than any machine has", f"stay within {MOST_THREADS} threads and batch {MOST_BATCH}"
        )
    if requested.keys() == {"batch"}:
        return replace(planned, plan=plan, elastic=None)
    others = tuple(text for text in planned.warnings if text not in _crowded(artifact, planned.plan, cpu))
    crowding = warning(cpu, plan.threads_per_instance, plan.instances)
    crowded = (f"{plan.label}, as requested: {crowding}",) if crowding else ()
    return replace(planned, plan=plan, warnings=(*others, *crowded), elastic=None)


def for_photos(artifact: Artifact, cpu: Cpu) -> Fit:
    """The plan for photos from files, if one was measured on such a machine; else ``for_bulk``."""
    photos = artifact.manifest.photos
    if photos is None or Machine.of(cpu) != Machine.of(artifact.report.cpu):
        return for_bulk(artifact, cpu)
    return Fit(plan=photos.plan, tuned=None, warnings=_crowded(artifact, photos.plan, cpu))


def for_bulk(artifact: Artifact, cpu: Cpu) -> Fit:
    """The plan for work that leaves no core idle (``bulk_plan``)."""
    planned = fit(artifact, cpu)
    if planned.elastic is None:
        return planned
    goal = planned.tuned.goal if planned.tuned else artifact.report.requirements.goal.name
    best = bulk_plan(planned.plan, planned.elastic, goal, measured(artifact, planned))
    return replace(planned, plan=best, elastic=None)


def bulk_plan(plan: Plan, elastic: ElasticPlan | None, goal: GoalName, measurements: Sequence[Measurement]) -> Plan:
    """Of an elastic plan, the layout that does most items per second; for throughput the plan has won a race."""
    if elastic is None or goal == Throughput.name:
        return plan
    full = [measurement for measurement in measurements if measurement.plan in (elastic.wide, elastic.narrow)]
    best = max(full, key=lambda measurement: measurement.throughput_per_s, default=None)
    return best.plan if best else plan


def latency_table(artifact: Artifact, fit: Fit) -> LatencyTable:
    """Milliseconds (p99) over the batch, as measured with the threads and instances of the plan that fits here.

    Raises ``ArtifactError`` if nothing was measured with them.
    """
    chosen = _alike(fit.plan, measured(artifact, fit))
    if not chosen and fit.tuned and fit.tuned.machine == Machine.of(artifact.report.cpu):
        chosen = _alike(fit.plan, artifact.report.winner.measurements)
    if not chosen:
        raise ArtifactError(
            f"{artifact.folder} has no measurement with {fit.plan.label}", f"run corewise retune {artifact.folder}"
        )
    return LatencyTable.of(chosen)


def measured(artifact: Artifact, fit: Fit) -> tuple[Measurement, ...]:
    """The measurements that the plan was chosen from, with those of an elastic plan."""
    if fit.tuned:
        return fit.tuned.measurements
    report = artifact.report
    elasticity = report.choice.elasticity
    return (*report.winner.measurements, *(elasticity.measurements if elasticity else ()))


def partitions(elastic: ElasticPlan, measurements: Sequence[Measurement]) -> Partitions:
    """How an elastic plan divides its cores, by the measured times of both layouts (p50).

    Raises ``ValueError`` if a layout was not measured with calls of one row.
    """
    return elastic_tables(elastic, measurements).partitions


def elastic_tables(elastic: ElasticPlan, measurements: Sequence[Measurement]) -> ElasticTables:
    """The measured times of an elastic plan. Raises ``ValueError`` as ``partitions``."""
    found = []
    for plan in (elastic.wide, elastic.narrow):
        found.append([m for m in _alike(plan, measurements) if m.plan.batch <= plan.batch])
        if not any(m.plan.batch == 1 for m in found[-1]):
            raise ValueError(f"{plan.label} was not measured with calls of one row")
    wide, narrow = found
    return ElasticTables(
        cores=elastic.wide.threads_per_instance,
        threads=elastic.narrow.threads_per_instance,
        wide=LatencyTable.of(wide, "p50_ms"),
        narrow=LatencyTable.of(narrow, "p50_ms"),
        wide_slow=LatencyTable.of(wide),
    )


def for_requests(artifact: Artifact, fit: Fit) -> tuple[Fit, ElasticTables | None]:
    """The plan whose instances answer requests, and the tables of an elastic plan, whose narrow layout that is."""
    if fit.elastic is None:
        return fit, None
    tables = elastic_tables(fit.elastic, measured(artifact, fit))
    return replace(fit, plan=fit.elastic.narrow), tables


def usable_table(artifact: Artifact, fit: Fit, cpu: Cpu) -> tuple[LatencyTable, tuple[str, ...]]:
    """``latency_table``; if nothing was measured, an estimate and a note that says so.

    The estimate scales the table of the plan tuned here, or else of the manifest's plan: in proportion to the missing
    threads, and to the threads beyond those that can compute at once. Raises ``ArtifactError`` if there is no table.
    """
    try:
        return latency_table(artifact, fit), ()
    except ArtifactError as error:
        measured = _alike(fit.tuned.plan, fit.tuned.measurements) if fit.tuned else []
        measured = measured or _alike(artifact.manifest.plan, artifact.report.winner.measurements)
        if not measured:
            raise
        there, here = measured[0].plan, fit.plan
        fewer = max(1.0, there.threads_per_instance / here.threads_per_instance)
        turns = max(1.0, here.threads_per_instance * here.instances / most_threads(cpu))
        points = tuple((batch, fewer * turns * ms) for batch, ms in LatencyTable.of(measured).points)
        return LatencyTable(points=points), (f"{error}; until then latencies are estimated",)


def _alike(plan: Plan, measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with the plan's thread layout."""
    layout = ThreadLayout.of(plan)
    return [measurement for measurement in measurements if ThreadLayout.of(measurement.plan) == layout]


def read(folder: Path) -> tuple[Tuned, ...]:
    """The entries of an artifact's ``tuned.json``, the newest first; empty if there is no such file.

    Raises ``ArtifactError`` if it is damaged, of another schema or artifact, or holds a plan that no machine can run.
    """
    path = folder / TUNED
    if not path.exists() and not path.is_symlink():
        return ()
    again = f"run corewise retune {folder} to replace it, or remove it"
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return _entries(json.loads(text), folder)
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} is damaged ({why})", again) from error


def write(folder: Path, entry: Tuned) -> None:
    """Replace the machine's entry in ``tuned.json``, completely or not at all.

    Entries of other machines stay, unless the file was damaged. Raises ``OutputError`` if it cannot be written.
    """
    new = folder / TUNED_NEW
    try:
        with _one_writer(folder):
            kept = []
            with suppress(ArtifactError):
                kept = [other for other in read(folder) if other.machine != entry.machine]
            content = {
                "schema": SCHEMA,
                "manifest": identity(folder),
                "machines": to_json((entry, *kept)[:MOST_MACHINES]),
            }
            new.unlink(missing_ok=True)
            with new.open("x") as file:
                json.dump({**content, "digest": digest(content)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.chmod(0o644)  # as the rest of the artifact
            new.rename(folder / TUNED)
    except OSError as error:
        raise OutputError(
            f"{folder / TUNED} cannot be written: {error.strerror}",
            "make the folder writable, or copy the artifact to a place of your own and retune it there",
        ) from error


def _entries(content: Any, folder: Path) -> tuple[Tuned, ...]:
    """The entries in parsed JSON. Raises ``ValueError`` if they are not valid."""
    if not isinstance(content, dict) or not isinstance(content.get("machines"), list):
        raise ValueError("it has no list of machines")
    if content.get("schema") not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise ValueError(f"it has schema {content.get('schema')!r}, this corewise reads {known}")
    if content.pop("digest", None) != digest(content):
        raise ValueError("it was altered after it was written")
    if content.get("manifest") != identity(folder):
        raise ValueError("it was made for another artifact")
    if len(content["machines"]) > MOST_MACHINES:
        raise ValueError(f"it has more than {MOST_MACHINES} machines")
    machines = content["machines"]
    if content["schema"] == 1:
        machines = [_upgraded(machine) for machine in machines]
    entries = from_json(tuple[Tuned, ...], machines)
    for entry in entries:
        _check(entry)
    return entries


def _upgraded(machine: Any) -> Any:
    """A schema 1 entry as schema 2; the validation refuses anything of another form."""
    if not isinstance(machine, dict) or not isinstance(machine.get("measurements"), list):
        return machine
    upgraded = [upgrade_measurement(data) if isinstance(data, dict) else data for data in machine["measurements"]]
    return {**machine, "measurements": upgraded}


def _check(entry: Tuned) -> None:
    if len(entry.measurements) > MOST_MEASUREMENTS:
        raise ValueError(f"it has more than {MOST_MEASUREMENTS} measurements of a machine")
    elastic = (entry.elastic.wide, entry.elastic.narrow) if entry.elastic is not None else ()
    for plan in (entry.plan, *elastic, *(measurement.plan for measurement in entry.measurements)):
        if not _sane(plan):
            raise ValueError(f"a plan has {plan.label}")
    for measurement in entry.measurements:
        speeds = (measurement.throughput_per_s, measurement.p50_ms, measurement.p99_ms)
        if not all(isfinite(value) and value > 0 for value in speeds):
            raise ValueError(f"{measurement.plan.label} was measured with {measurement.p50_ms} ms a call")
    if entry.elastic is not None:
        threads = entry.plan.threads_per_instance * entry.plan.instances
        if threads != entry.elastic.wide.threads_per_instance:
            raise ValueError(f"{entry.elastic.label} has other threads than {entry.plan.label}")
        partitions(entry.elastic, entry.measurements)


def _sane(plan: Plan) -> bool:
    return plan.threads_per_instance * plan.instances <= MOST_THREADS and plan.batch <= MOST_BATCH


def _within(plan: Plan, manifest: Plan, cpu: Cpu) -> bool:
    """Whether the plan has at most the threads that can compute at once, or that the manifest's plan has."""
    most = max(most_threads(cpu), manifest.threads_per_instance * manifest.instances)
    return plan.threads_per_instance * plan.instances <= most


def _cut_down(plan: Plan, cpu: Cpu) -> Plan:
    most = most_threads(cpu)
    threads = min(plan.threads_per_instance, most)
    return replace(plan, threads_per_instance=threads, instances=max(1, min(plan.instances, most // threads)))


def _crowded(artifact: Artifact, plan: Plan, cpu: Cpu) -> tuple[str, ...]:
    crowding = warning(cpu, plan.threads_per_instance, plan.instances)
    return (
        (f"{artifact.folder} runs {plan.label}: {crowding}; run corewise retune {artifact.folder}",) if crowding else ()
    )


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """A lock on the folder. On disks without locks, the last of two simultaneous writers wins."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)
