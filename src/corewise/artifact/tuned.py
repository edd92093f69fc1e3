"""Plans that were measured on the machines that run an artifact: ``tuned.json`` beside its manifest.

One entry for each machine, so that one folder on a shared disk serves several. The manifest and its hashes stay as
they were made. A wrong plan costs speed and never correctness, so a file that is damaged is told of and not used,
where a damaged payload is refused.
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
from corewise.batching import LatencyTable
from corewise.common.errors import ArtifactError, InputError, OutputError
from corewise.machine.layouts import most_threads, warning
from corewise.records.build import Plan
from corewise.records.cpu import Cpu
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
    """The plan that an artifact runs under here, and what to know about it."""

    plan: Plan
    tuned: Tuned | None
    """The entry it comes from; ``None`` for the manifest's."""
    warnings: tuple[str, ...]


def fit(found: Artifact, cpu: Cpu) -> Fit:
    """The plan for this machine: the one tuned on it, else the manifest's.

    On a machine other than the one it was measured on, the manifest's plan is cut down to the threads that may compute
    at once there; on its own machine it runs as it is, with a warning where that is too many.
    """
    here, there, manifest = Machine.of(cpu), Machine.of(found.report.cpu), found.manifest.plan
    warnings = []
    try:
        for entry in read(found.folder):
            if entry.machine == here and _within(entry.plan, manifest, cpu):
                return Fit(plan=entry.plan, tuned=entry, warnings=_crowded(found, entry.plan, cpu))
    except ArtifactError as error:
        warnings.append(f"{error.what}, and so no plan of it is used; {error.fix}")
    if here == there:
        return Fit(plan=manifest, tuned=None, warnings=(*warnings, *_crowded(found, manifest, cpu)))
    plan = _cut_down(manifest, cpu)
    before, now = there.against(here)
    until = "" if plan == manifest else f" and its plan was cut down to {plan.label}"
    warnings.append(
        f"{found.folder} was planned on {before}, this is {now}: its speed here is another{until}; "
        f"run corewise retune {found.folder}"
    )
    return Fit(plan=plan, tuned=None, warnings=tuple(warnings))


def asked(
    found: Artifact,
    cpu: Cpu,
    *,
    threads_per_instance: int | None = None,
    instances: int | None = None,
    batch: int | None = None,
) -> Fit:
    """``fit``, with what the user asks for in the place of the plan's own; more threads than cores with a warning.

    Raises ``InputError`` for what is no plan.
    """
    planned = fit(found, cpu)
    given = {"threads_per_instance": threads_per_instance, "instances": instances, "batch": batch}
    wanted = {name: number for name, number in given.items() if number is not None}
    if not wanted:
        return planned
    for name, number in wanted.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name.replace('_', ' ')}: {number!r} is no plan", "give a whole number, 1 or more")
    plan = replace(planned.plan, **wanted)
    if not _sane(plan):
        raise InputError(
            f"{plan.label} is more than any machine has", f"stay within {MOST_THREADS} threads and batch {MOST_BATCH}"
        )
    if wanted.keys() == {"batch"}:
        return replace(planned, plan=plan)
    others = tuple(one for one in planned.warnings if one not in _crowded(found, planned.plan, cpu))
    crowding = warning(cpu, plan.threads_per_instance, plan.instances)
    crowded = (f"{plan.label}, as asked: {crowding}",) if crowding else ()
    return replace(planned, plan=plan, warnings=(*others, *crowded))


def latency_table(found: Artifact, fit: Fit) -> LatencyTable:
    """Milliseconds over the batch (p99), as measured with the threads and instances of the plan that fits here.

    Raises ``ArtifactError`` where nothing was.
    """
    made = found.report.winner.measurements
    measured = fit.tuned.measurements if fit.tuned else made
    chosen = _alike(fit.plan, measured)
    if not chosen and fit.tuned and fit.tuned.machine == Machine.of(found.report.cpu):
        chosen = _alike(fit.plan, made)
    if not chosen:
        raise ArtifactError(
            f"{found.folder} has no measurement with {fit.plan.label}", f"run corewise retune {found.folder}"
        )
    return LatencyTable.of(chosen)


def usable_table(found: Artifact, fit: Fit, cpu: Cpu) -> tuple[LatencyTable, tuple[str, ...]]:
    """``latency_table``; where nothing was measured an estimate, and a note that says so.

    The estimate is the table of the plan that was measured here, else of the manifest's: slower as there are fewer
    threads, and as they take turns. Raises ``ArtifactError`` where there is no table at all.
    """
    try:
        return latency_table(found, fit), ()
    except ArtifactError as error:
        measured = _alike(fit.tuned.plan, fit.tuned.measurements) if fit.tuned else []
        measured = measured or _alike(found.manifest.plan, found.report.winner.measurements)
        if not measured:
            raise
        there, here = measured[0].plan, fit.plan
        fewer = max(1.0, there.threads_per_instance / here.threads_per_instance)
        turns = max(1.0, here.threads_per_instance * here.instances / most_threads(cpu))
        points = tuple((batch, fewer * turns * ms) for batch, ms in LatencyTable.of(measured).points)
        return LatencyTable(points=points), (f"{error}: until then latencies are estimated",)


def _alike(plan: Plan, measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those with as many threads and instances."""
    shape = (plan.threads_per_instance, plan.instances)
    return [one for one in measurements if (one.plan.threads_per_instance, one.plan.instances) == shape]


def read(folder: Path) -> tuple[Tuned, ...]:
    """The entries of an artifact's ``tuned.json``, the newest first; none where there is no such file.

    Raises ``ArtifactError`` where it is damaged, of another schema or another artifact, or holds no sane plan.
    """
    path = folder / TUNED
    if not path.exists() and not path.is_symlink():
        return ()
    again = f"run corewise retune {folder} to make it anew, or remove it"
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return _entries(json.loads(text), folder)
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} is damaged ({why})", again) from error


def write(folder: Path, entry: Tuned) -> None:
    """Put the entry in the place of its machine's in ``tuned.json``, whole or not at all.

    Entries of other machines stay, unless the file was damaged. Raises ``OutputError`` where it cannot be written.
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
    """Raises ``ValueError`` with what is wrong."""
    if not isinstance(content, dict) or not isinstance(content.get("machines"), list):
        raise ValueError("it is no list of machines")
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
    """The entry of a machine in schema 1; what does not fit is left to the validation."""
    if not isinstance(machine, dict) or not isinstance(machine.get("measurements"), list):
        return machine
    upgraded = [upgrade_measurement(one) if isinstance(one, dict) else one for one in machine["measurements"]]
    return {**machine, "measurements": upgraded}


def _check(entry: Tuned) -> None:
    if len(entry.measurements) > MOST_MEASUREMENTS:
        raise ValueError(f"it has more than {MOST_MEASUREMENTS} measurements of a machine")
    for plan in (entry.plan, *(one.plan for one in entry.measurements)):
        if not _sane(plan):
            raise ValueError(f"a plan has {plan.label}")
    for one in entry.measurements:
        if not all(isfinite(value) and value > 0 for value in (one.throughput_per_s, one.p50_ms, one.p99_ms)):
            raise ValueError(f"{one.plan.label} was measured with {one.p50_ms} ms a call")


def _sane(plan: Plan) -> bool:
    return plan.threads_per_instance * plan.instances <= MOST_THREADS and plan.batch <= MOST_BATCH


def _within(plan: Plan, manifest: Plan, cpu: Cpu) -> bool:
    """Whether it has no more threads than can compute at once, or than the manifest's, which was allowed to."""
    most = max(most_threads(cpu), manifest.threads_per_instance * manifest.instances)
    return plan.threads_per_instance * plan.instances <= most


def _cut_down(plan: Plan, cpu: Cpu) -> Plan:
    most = most_threads(cpu)
    threads = min(plan.threads_per_instance, most)
    return replace(plan, threads_per_instance=threads, instances=max(1, min(plan.instances, most // threads)))


def _crowded(found: Artifact, plan: Plan, cpu: Cpu) -> tuple[str, ...]:
    crowding = warning(cpu, plan.threads_per_instance, plan.instances)
    return (f"{found.folder} runs {plan.label}: {crowding}; run corewise retune {found.folder}",) if crowding else ()


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Others wait. Not every shared disk has locks: there the last of two writers at the same moment wins."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)
