"""A job on a Ray cluster: what is done already, the driver's part, and the result beside the parts."""

import hashlib
import json
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

from corewise._version import __version__
from corewise.artifact import tuned
from corewise.cluster import driving
from corewise.cluster.actor import MARK, folder_of
from corewise.cluster.connection import connected
from corewise.cluster.crew import RayCrew
from corewise.cluster.driving import Driven, Driver, parts_of_rows
from corewise.cluster.messages import Task, packed
from corewise.common.errors import OutputError
from corewise.pipeline.job import Job, no_rows, records, writing
from corewise.pipeline.parts import Counts, Parts
from corewise.records.bulk import BulkResult, OnProgress
from corewise.records.jsonable import from_json, to_json
from corewise.records.tuned import Tuned

RESULT = f"{MARK}result.json"
"""In the folder of a finished job."""


def run_on_ray(
    address: str,
    artifact: Path,
    job: Job,
    *,
    preprocess: str | None,
    total: int,
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
        total: About how many rows there are.
        max_failed: How many rows may be set aside.
        retune_s: Seconds for the plan of each kind of machine that the artifact has none for; 0 for never.
        on_progress: Called as parts are done.

    Raises:
        SamplesError: An input cannot be read, has no such column, or no rows; or too many rows failed.
        OutputError: The output cannot be written, or belongs to another job.
        EngineError: The cluster does not answer or is not safe, or the engine fails.
    """
    start_s, kept = time.monotonic(), folder_of(job.output, several=job.several)
    facts = job.facts(driving.PART_ROWS)
    with writing(job.output, job.output):
        finished = kept.finished() if kept.same(facts) else {}
        parts = parts_of_rows(records(job), driving.PART_ROWS, finished)
        first = next(parts, None)
        if first is None and not finished:
            raise no_rows(job)
        kept.begin(facts)
        kept.sweep()
        done = Counts(sum(part.rows for part in finished.values()), sum(part.failed for part in finished.values()))
        kept.check_failed(done.failed, max_failed, "")
        result = BulkResult(
            output=job.output, failed_in=job.output, rows=done.rows, resumed=done.rows, failed=done.failed, wall_s=0.0
        )
        if first is not None:
            task = task_of(artifact, job, preprocess, kept)
            with connected(address) as reads_on:
                driver = Driver(
                    RayCrew(reads_on),
                    packed(task),
                    kept,
                    chain([first], parts),
                    done=done,
                    total=total,
                    max_failed=max_failed,
                    retune_s=retune_s,
                    on_tuned=lambda entry: keep(artifact, entry),
                    on_progress=on_progress,
                )
                result = _with(result, driver.run(), driver.done)
        elif (job.output / RESULT).is_file():
            known = from_json(BulkResult, json.loads((job.output / RESULT).read_text()))
            result = replace(known, resumed=known.rows)
        result = replace(result, wall_s=time.monotonic() - start_s)
        kept.sweep()
        kept.replace(job.output / RESULT, lambda path: path.write_text(json.dumps(to_json(result), indent=1)))
    return result


def task_of(artifact: Path, job: Job, preprocess: str | None, kept: Parts) -> Task:
    """What the actors of a job are told, whose folder was begun."""
    return Task(
        version=__version__,
        artifact=artifact,
        identity=job.artifact,
        output=job.output,
        job=hashlib.sha256(kept.about.read_bytes()).hexdigest(),
        several=job.several,
        prompt=job.prompt,
        top=job.top,
        preprocess=preprocess,
    )


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
        nodes=driven.shares,
        left_out=driven.left_out,
        notes=driven.notes,
    )
