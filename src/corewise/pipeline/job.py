"""Files of texts, or of images, to a file of answers, part by part, so that a job that was killed resumes where it was.

A folder beside the output, ``OUT.parts``, holds what is finished: a part for each ``PART_ROWS`` rows in the order of
the inputs, with a file of the rows that were set aside. A part gets its name when it is whole on disk. At the end the
parts are joined and the folder is removed.
"""

import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from corewise.common.errors import InputError, OutputError, SamplesError
from corewise.pipeline.drawing import draw_answer
from corewise.pipeline.outputs import Format, format_of, join_lines, sync
from corewise.pipeline.parts import Counts, Parts, Record
from corewise.pipeline.photos import USUAL, ImageAsk, ImageRunner
from corewise.pipeline.runner import Rejected, TextRunner
from corewise.samples.archives import is_archive, read_archive
from corewise.samples.tables import READERS, iterate_table
from corewise.samples.texts import Columns

PART_ROWS = 4096
"""Rows of a part: what is done again at most after a kill."""
BLOCK_BYTES = 1 << 20

OnRows = Callable[[Counts], None]
"""Called with the numbers of rows that are done and of those set aside, an earlier run's included."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked: the same job finds its finished parts."""

    inputs: tuple[Path, ...]
    output: Path
    columns: Columns
    prompt: str | None
    artifact: str
    """The identity of the artifact: the sha256 of its manifest."""
    ask: ImageAsk | None = None
    """For images, each of which is a row: what is wanted of them."""
    drawings: Path | None = None
    """For images: the folder of the photos with their answers drawn on them."""
    preprocess: str | None = None
    """For images: the function that prepares them, as a reference."""

    @property
    def parts(self) -> Path:
        """The folder of what is finished."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def failed(self) -> Path:
        """The file of rows that were set aside."""
        return self.output.with_name(f"{self.output.stem}.failed.jsonl")

    @property
    def several(self) -> bool:
        """Whether an answer says which input it belongs to."""
        return len(self.inputs) > 1 or self.ask is not None

    @property
    def kept(self) -> Parts:
        """The parts in their folder."""
        return Parts(folder=self.parts, suffix=self.output.suffix, several=self.several)

    def facts(self, part_rows: int) -> dict[str, Any]:
        """What must be equal for parts of so many rows to count."""
        return {
            "artifact": self.artifact,
            "inputs": [[str(path.resolve()), *_size_and_time(path)] for path in self.inputs],
            "columns": list(self.columns),
            "prompt": self.prompt,
            "part_rows": part_rows,
            "ask": None if self.ask is None else asdict(self.ask),
            "preprocess": self.preprocess,
            "drawings": None if self.drawings is None else str(self.drawings.resolve()),
        }


def _size_and_time(path: Path) -> tuple[int, int]:
    """Zeros for a link to nothing."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


class Done(NamedTuple):
    """The outcome of a job: rows read, those of an earlier run among them, and rows set aside."""

    rows: int
    resumed: int
    failed: int


def check_inputs(job: Job) -> None:
    """Raise ``SamplesError`` for files of texts that are missing or of unknown kinds; missing images are set aside."""
    for path in () if job.ask is not None else job.inputs:
        if not path.is_file():
            raise SamplesError(f"there is no file {path}", "check the path")
        if path.suffix.lower() not in READERS:
            raise SamplesError(f"{path} is not a file of texts", f"give one of {', '.join(READERS)}")


def check_job(job: Job) -> None:
    """Raise for inputs that are missing or of unknown kinds, and an output that exists or cannot be written.

    Raises:
        SamplesError: An input.
        OutputError: The output.
    """
    check_inputs(job)
    if job.output.is_dir() or not job.output.parent.is_dir():
        why = "it is a folder" if job.output.is_dir() else f"there is no folder {job.output.parent}"
        raise OutputError(f"{job.output} cannot be written: {why}", "give another name with -o")
    if job.output.exists() and not job.kept.about.is_file():
        raise OutputError(f"{job.output} exists already", "remove it or give another name with -o")
    folder = job.drawings
    if folder is not None and not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        why = "it is a file" if folder.exists() else f"there is no folder {folder.parent}"
        raise OutputError(f"{folder} cannot be made: {why}", "give another folder with --draw")


def count_rows(paths: Iterable[Path]) -> int:
    """About how many rows files have, for a progress bar: their lines; of Parquet the exact number."""
    total = 0
    for path in paths:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            total += parquet.read_metadata(path).num_rows
            continue
        with path.open("rb") as file:
            total += sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK_BYTES), b""))
            total -= path.suffix.lower() in (".csv", ".tsv")
    return total


def run_job(
    job: Job,
    runner: TextRunner | ImageRunner,
    *,
    max_failed: int | None = None,
    on_rows: OnRows = lambda done: None,
) -> Done:
    """Answer all rows of the inputs and write the output, resuming what an earlier run of the same job finished.

    Rows are numbered from 0 over all inputs. A row that cannot be answered is in ``job.failed`` with its reason; more
    of them than ``max_failed`` end the job. Memory is bounded, whatever the inputs' size.

    Raises:
        SamplesError: An input cannot be read, has no such column, or no rows; or too many rows failed.
        InputError: The output cannot hold such answers, or there is nothing to draw.
        OutputError: The output cannot be written, or its folder of parts is another job's.
        EngineError: The engine fails.
    """
    check_job(job)
    if job.drawings is not None and (not isinstance(runner, ImageRunner) or runner.pipeline.task == "vectors"):
        raise InputError("the model gives no classes and no boxes that could be drawn", "leave out --draw")
    kind = format_of(job.output, runner.pipeline if isinstance(runner, ImageRunner) else runner.encoder.pipeline)
    with writing(job.output, job.parts):
        if job.drawings is not None:
            job.drawings.mkdir(exist_ok=True)
        finished = _resume(job)
        resumed = len(finished) * PART_ROWS
        done = Counts(resumed, sum(counts.failed for counts in finished.values()))
        job.kept.check_failed(done.failed, max_failed, "")
        on_rows(done)
        rest = answered(
            islice(records(job), resumed, None), runner, prompt=job.prompt, ask=job.ask, drawings=job.drawings
        )
        for number in count(len(finished)):
            part = list(islice(rest, PART_ROWS))
            if not part:
                break
            counts = job.kept.write(number, kind, part)
            done = Counts(done.rows + counts.rows, done.failed + counts.failed)
            job.kept.check_failed(done.failed, max_failed, counts.example)
            on_rows(done)
        if not any(job.parts.glob("part-*.done")):
            shutil.rmtree(job.parts)
            raise no_rows(job)
        rows, failed = _join(job, kind)
    return Done(rows, min(resumed, rows), failed)


def no_rows(job: Job) -> SamplesError:
    """The error for inputs without rows."""
    return SamplesError(f"there are no rows in {', '.join(map(str, job.inputs))}", "give at least one")


def records(job: Job) -> Iterator[Record]:
    """All rows of the inputs, in order, read as they are taken.

    Raises:
        SamplesError: An input cannot be read, or has no such column.
    """
    if job.ask is not None:
        yield from _images(job.inputs)
        return
    row = 0
    for path in job.inputs:
        for item in iterate_table(path, job.columns, labelled=False):
            yield Record(row, str(path), item.name or "", item.value, item.problem)
            row += 1


def _images(inputs: Iterable[Path]) -> Iterator[Record]:
    """A record for each image file, and for each image of a tar file."""
    rows = count()
    for path in inputs:
        if not is_archive(path):
            yield Record(next(rows), str(path), "", str(path), "")
            continue
        for member in read_archive(path):
            place = f"{path}/{member.name}" if member.name else str(path)
            yield Record(next(rows), place, "", member.content, member.problem)


def answered(
    rows: Iterable[Record],
    runner: TextRunner | ImageRunner,
    *,
    prompt: str | None,
    ask: ImageAsk | None,
    drawings: Path | None = None,
) -> Iterator[tuple[Record, Any]]:
    """The rows with their answers, in order; ``Rejected`` for one that cannot be answered.

    Photos with their answers drawn on them go to ``drawings``, the row's number in their names.
    """
    waiting: deque[Record] = deque()

    def values() -> Iterator[Any]:
        for record in rows:
            waiting.append(record if drawings is not None else record._replace(value=None))
            yield None if record.problem else record.value

    if isinstance(runner, ImageRunner):
        answers = runner.answers(values(), ask or USUAL)
    else:
        answers = runner.answers(values(), prompt=prompt)
    for answer in answers:
        record = waiting.popleft()
        answer = Rejected(record.problem) if record.problem else answer
        if drawings is not None and not isinstance(answer, Rejected):
            source = record.value if isinstance(record.value, bytes) else Path(record.value)
            draw_answer(source, answer, drawings / _drawing(record))
        yield record._replace(value=None), answer


def _drawing(record: Record) -> str:
    """A file name of a length that file systems take, in characters that they and shells take."""
    stem = re.sub(r"[^\w.-]", "_", PurePosixPath(record.input).stem)
    return f"{record.row:06}-{stem[:60]}.jpg"


def _resume(job: Job) -> dict[int, Counts]:
    """The finished parts, in order; makes the folder for a new job."""
    job.kept.begin(job.facts(PART_ROWS))
    job.kept.sweep()
    finished = job.kept.finished()
    return dict(islice(finished.items(), next(number for number in count() if number not in finished)))


def _join(job: Job, kind: Format) -> tuple[int, int]:
    """Join the parts and remove their folder; rows in all, and rows set aside."""
    done = job.kept.finished()
    rows, failed = sum(counts.rows for counts in done.values()), sum(counts.failed for counts in done.values())
    whole = job.parts / f"whole{job.output.suffix}"
    kind.join([job.kept.answers(number) for number in done], whole)
    if failed:
        aside = job.parts / "whole.failed"
        join_lines([job.kept.failed(number) for number in done], aside)
        sync(aside)
        aside.replace(job.failed)
    sync(whole)
    whole.replace(job.output)
    job.kept.about.unlink()  # first: parts that a kill leaves here belong to no job
    shutil.rmtree(job.parts)
    return rows, failed


@contextmanager
def writing(output: Path, parts: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk into ``OutputError``."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or output} cannot be written: {error.strerror or error}",
            f"free space and run the same command: finished parts are kept in {parts}",
        ) from error
