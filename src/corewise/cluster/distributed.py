"""A job on a Ray cluster: what is done already, the driver's part, and the result beside the parts."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from corewise._version import __version__
from corewise.artifact import tuned
from corewise.cluster.connection import connected
from corewise.cluster.crew import RayCrew
from corewise.cluster.driving import Driven, Driver, parts_of_rows
from corewise.cluster.messages import Task, packed
from corewise.cluster.metrics import with_metrics
from corewise.common.errors import OutputError
from corewise.pipeline.job import MARK, Job, check_unchanged, no_rows, records, total_of, writing
from corewise.pipeline.parts import Counts, Parts
from corewise.records.bulk import BulkResult, OnProgress
from corewise.records.jsonable import from_json, to_json
from corewise.records.tuned import Tuned
from corewise.samples.places import Place

RESULT = f"{MARK}result.json"
"""The file in the folder of a finished job that says what was done."""


def run_on_ray(
    address: str,
    artifact: Path,
    job: Job,
    *,
    preprocess: str | None,
    total: int | None,
    max_failed: int | None,
    retune_s: float,
    on_progress: OnProgress,
) -> BulkResult:
    """Answer all rows of the inputs into a folder of Parquet files, whatever is done of them.

    Args:
        address: The cluster.
        artifact: The folder of the artifact, which all nodes see.
        job: What is asked; its output is a folder that all nodes see.
        preprocess: The function that prepares images, as a reference that all nodes see.
        total: About how many rows there are, if that is known.
        max_failed: How many rows may be set aside.
        retune_s: Seconds for the plan of each kind of machine that the artifact has none for; 0 for never.
        on_progress: Called as parts are done.

    Raises:
        SamplesError: An input cannot be read, has no such column, or no rows; or too many rows failed.
        OutputError: The output cannot be written, or belongs to another job.
        EngineError: The cluster does not answer or is not safe, or the engine fails.
    """
    kept, facts = job.kept, job.facts()
    with writing(str(job.output), str(job.output)):
        finished = kept.finished() if kept.same(facts) else {}
        parts = parts_of_rows(records(job, sliced=True), job.part_rows, finished)
        first = next(parts, None)
        if first is None and not finished:
            raise no_rows(job)
        with kept.begun(facts):
            done = total_of(finished)
            kept.check_failed(done.failed, max_failed, "")
            result = BulkResult(
                output=str(job.output),
                failed_in=str(job.output),
                rows=done.rows,
                resumed=done.rows,
                failed=done.failed,
                wall_s=0.0,
                cut=done.cut,
            )
            if first is None:
                return result
            with connected(address) as reads_on:
                driver = Driver(
                    RayCrew(reads_on, grows=address != "local"),
                    packed(task_of(artifact, job, preprocess)),
                    kept,
                    chain([first], parts),
                    done=done,
                    total=total,
                    max_failed=max_failed,
                    retune_s=retune_s,
                    on_tuned=lambda entry: keep(artifact, entry),
                    on_progress=on_progress if reads_on is None else with_metrics(on_progress, str(job.output)),
                )
                result = _with(result, driver.run(), driver.done)
            kept.sweep()
            check_unchanged(job, facts)
    return result


def record_result(kept: Parts, result: BulkResult) -> BulkResult:
    """The result as it is written into the folder of a finished job; what ran where stays if nothing was left to do."""
    place = kept.folder / RESULT
    with writing(result.output, result.output):
        if result.rows == result.resumed and place.is_file():
            with suppress(ValueError):  # it is of another version
                known = from_json(BulkResult, json.loads(place.read_text()))
                result = replace(known, resumed=known.rows, wall_s=result.wall_s)
        kept.replace(place, lambda path: path.write_text(json.dumps(to_json(result), indent=1)))
    return result


def task_of(artifact: Path, job: Job, preprocess: str | None) -> Task:
    """What the actors of a job are told, whose folder was begun."""
    return Task(
        version=__version__,
        artifact=artifact,
        identity=job.artifact,
        output=str(job.output),
        job=hashlib.sha256(job.kept.about.read_text(encoding="utf-8").encode()).hexdigest(),
        several=job.several,
        prompt=job.prompt,
        ask=job.ask,
        preprocess=preprocess,
        seen=() if job.ask is None else seen_of(job.inputs),
    )


def seen_of(inputs: Iterable[Place]) -> tuple[str, ...]:
    """An input of each bucket or disk, as far as names tell: of each folder at the root, and in one of these.

    None is a link to nothing, or has a name that is no text.
    """
    found: dict[tuple[str, ...], str] = {}
    for path in inputs:
        name = str(path)
        key = (*os.path.dirname(name).split("/")[:3],)
        if key not in found and path.is_file() and name.encode("utf-8", "ignore").decode() == name:
            found[key] = name
    return tuple(found.values())


def keep(artifact: Path, entry: Tuned) -> str:
    """Keep a plan that was found in the artifact's folder; a note if that is not possible."""
    try:
        tuned.write(artifact, entry)
    except OutputError as error:
        return f"the plan for {entry.machine.label} is not kept: {error.what}"
    return ""


def _with(result: BulkResult, driven: Driven, done: Counts) -> BulkResult:
    return replace(
        result,
        rows=done.rows,
        failed=done.failed,
        cut=done.cut,
        nodes=driven.shares,
        left_out=driven.left_out,
        notes=driven.notes,
    )
