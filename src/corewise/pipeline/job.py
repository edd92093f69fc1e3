"""Files of texts, or of images, to a file of answers, part by part, so that a job that was killed resumes where it was.

A folder beside the output, ``OUT.parts``, holds what is finished: a part for each ``PART_ROWS`` rows in the order of
the inputs, with a file of the rows that were set aside. A part gets its name when it is whole on disk. At the end the
parts are joined and the folder is removed.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from corewise.common.errors import InputError, OutputError, SamplesError
from corewise.pipeline.drawing import draw_answer
from corewise.pipeline.outputs import AnswerRow, Format, format_of, join_lines, sync
from corewise.pipeline.photos import ImageAsk, ImageRunner
from corewise.pipeline.runner import Rejected, TextRunner
from corewise.samples.archives import is_archive, read_archive
from corewise.samples.tables import READERS, iterate_table
from corewise.samples.texts import Columns

PART_ROWS = 4096
"""Rows of a part: what is done again at most after a kill."""
BLOCK_BYTES = 1 << 20

OnRows = Callable[[int], None]
"""Called with the number of rows that are done, those of an earlier run included."""


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

    @property
    def parts(self) -> Path:
        """The folder of what is finished."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def failed(self) -> Path:
        """The file of rows that were set aside."""
        return self.output.with_name(f"{self.output.stem}.failed.jsonl")

    def facts(self) -> dict[str, Any]:
        """What must be equal for parts to count."""
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.inputs]
        return {
            "artifact": self.artifact,
            "inputs": [list(file) for file in files],
            "columns": list(self.columns),
            "prompt": self.prompt,
            "part_rows": PART_ROWS,
            "ask": None if self.ask is None else asdict(self.ask),
        }


class Done(NamedTuple):
    """The outcome of a job: rows read, those of an earlier run among them, and rows set aside."""

    rows: int
    resumed: int
    failed: int


class _Record(NamedTuple):
    row: int
    input: Path
    name: str
    value: Any
    problem: str


def check_job(job: Job) -> None:
    """Raise for inputs that are missing or of unknown kinds, and an output that exists or cannot be written.

    Raises:
        SamplesError: An input.
        OutputError: The output.
    """
    for path in job.inputs:
        if not path.is_file():
            raise SamplesError(f"there is no file {path}", "check the path")
        if job.ask is None and path.suffix.lower() not in READERS:
            raise SamplesError(f"{path} is no file of texts", f"give one of {', '.join(READERS)}")
    if job.output.is_dir() or not job.output.parent.is_dir():
        why = "it is a folder" if job.output.is_dir() else f"there is no folder {job.output.parent}"
        raise OutputError(f"{job.output} cannot be written: {why}", "give another name with -o")
    if job.output.exists() and not job.parts.is_dir():
        raise OutputError(f"{job.output} exists already", "remove it or give another name with -o")
    if job.drawings is not None:
        try:
            job.drawings.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{job.drawings} cannot be made: {error.strerror}", "give a folder with --draw"
            ) from error


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


def run_job(job: Job, runner: TextRunner | ImageRunner, *, on_rows: OnRows = lambda rows: None) -> Done:
    """Answer all rows of the inputs and write the output, resuming what an earlier run of the same job finished.

    Rows are numbered from 0 over all inputs. A row that cannot be answered is in ``job.failed`` with its reason.
    Memory is bounded, whatever the inputs' size.

    Raises:
        SamplesError: An input cannot be read, has no such column, or no rows.
        InputError: The output cannot hold such answers, or there is nothing to draw.
        OutputError: The output cannot be written, or its folder of parts is another job's.
        EngineError: The engine fails.
    """
    check_job(job)
    if job.drawings is not None and (not isinstance(runner, ImageRunner) or runner.pipeline.task == "vectors"):
        raise InputError("the model gives no classes and no boxes that could be drawn", "leave out --draw")
    kind = format_of(job.output, runner.pipeline if isinstance(runner, ImageRunner) else runner.encoder.pipeline)
    with _writing(job):
        finished = _resume(job)
        resumed = rows = finished * PART_ROWS
        on_rows(resumed)
        failed = 0
        for number, part in enumerate(_parts(job, runner, resumed), start=finished):
            _write_part(job, kind, number, part)
            rows += len(part)
            on_rows(rows)
        if not any(job.parts.glob("part-*.done")):
            shutil.rmtree(job.parts)
            raise SamplesError(f"there are no rows in {', '.join(map(str, job.inputs))}", "give at least one")
        rows, failed = _join(job, kind)
    return Done(rows, min(resumed, rows), failed)


def _records(job: Job) -> Iterator[_Record]:
    if job.ask is not None:
        yield from _images(job)
        return
    row = 0
    for path in job.inputs:
        for item in iterate_table(path, job.columns, labelled=False):
            yield _Record(row, path, item.name or "", item.value, item.problem)
            row += 1


def _images(job: Job) -> Iterator[_Record]:
    """A record for each image file, and for each image of a tar file."""
    rows = count()
    for path in job.inputs:
        if not is_archive(path):
            yield _Record(next(rows), path, "", path, "")
            continue
        for member in read_archive(path):
            yield _Record(next(rows), path, member.name, member.content, member.problem)


def _draw(job: Job, record: _Record, answer: Any) -> None:
    """Draw an answer, if that was asked for; the number keeps files of one name apart."""
    if job.drawings is None or isinstance(answer, Rejected):
        return
    stem = PurePosixPath(record.name or record.input).stem
    draw_answer(record.value, answer, job.drawings / f"{record.row:06}-{stem}.jpg")


def _parts(job: Job, runner: TextRunner | ImageRunner, start: int) -> Iterator[list[tuple[_Record, Any]]]:
    """The rows from ``start`` on with their answers, a part at a time."""
    waiting: deque[_Record] = deque()

    def values() -> Iterator[Any]:
        for record in islice(_records(job), start, None):
            waiting.append(record if job.drawings is not None else record._replace(value=None))
            yield None if record.problem else record.value

    part: list[tuple[_Record, Any]] = []
    if isinstance(runner, ImageRunner):
        answers = runner.answers(values(), job.ask or ImageAsk())
    else:
        answers = runner.answers(values(), prompt=job.prompt)
    for answer in answers:
        record = waiting.popleft()
        answer = Rejected(record.problem) if record.problem else answer
        _draw(job, record, answer)
        part.append((record._replace(value=None), answer))
        if len(part) == PART_ROWS:
            yield part
            part = []
    if part:
        yield part


def _place(job: Job, record: _Record) -> str:
    """Where an answered row comes from: its file, of a tar file with the member's name behind it."""
    return f"{record.input}/{record.name}" if job.ask is not None and record.name else str(record.input)


def _resume(job: Job) -> int:
    """The number of finished parts; makes the folder for a new job."""
    about = job.parts / "job.json"
    facts = json.dumps(job.facts(), indent=1)
    if not about.is_file():
        job.parts.mkdir(exist_ok=True)
        _replace(about, lambda path: path.write_text(facts, encoding="utf-8"))
        return 0
    if about.read_text(encoding="utf-8") != facts:
        raise OutputError(
            f"{job.parts} holds the parts of another job, or its inputs or artifact have changed",
            "remove that folder to begin again, or give another name with -o",
        )
    number = 0
    while (job.parts / f"part-{number:06}.done").is_file():
        number += 1
    return number


def _write_part(job: Job, kind: Format, number: int, part: Sequence[tuple[_Record, Any]]) -> None:
    """A part's answers and its rows set aside; ``.done`` comes last and says that both are whole."""
    several = len(job.inputs) > 1 or job.ask is not None
    good = [
        AnswerRow(row=record.row, input=_place(job, record) if several else None, answer=answer)
        for record, answer in part
        if not isinstance(answer, Rejected)
    ]
    bad = [
        {"row": record.row, "input": str(record.input), "where": record.name, "reason": answer.reason}
        for record, answer in part
        if isinstance(answer, Rejected)
    ]
    place = job.parts / f"part-{number:06}"
    _replace(place.with_suffix(job.output.suffix), lambda path: kind.write(path, good, part[0][0].row, len(part)))
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
    _replace(place.with_suffix(".failed"), lambda path: path.write_bytes(lines.encode("utf-8", "replace")))
    counts = json.dumps({"rows": len(part), "failed": len(bad)})
    _replace(place.with_suffix(".done"), lambda path: path.write_text(counts))


def _join(job: Job, kind: Format) -> tuple[int, int]:
    """Join the parts and remove their folder; rows in all, and rows set aside."""
    done = sorted(job.parts.glob("part-*.done"))
    counts = [json.loads(path.read_text()) for path in done]
    rows, failed = (sum(count[name] for count in counts) for name in ("rows", "failed"))
    whole = job.parts / f"whole{job.output.suffix}"
    kind.join([path.with_suffix(job.output.suffix) for path in done], whole)
    if failed:
        aside = job.parts / "whole.failed"
        join_lines([path.with_suffix(".failed") for path in done], aside)
        sync(aside)
        aside.replace(job.failed)
    sync(whole)
    whole.replace(job.output)
    shutil.rmtree(job.parts)
    return rows, failed


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, and give it its own when it is on disk."""
    new = path.with_name(f"new-{path.name}")
    write(new)
    sync(new)
    new.replace(path)


@contextmanager
def _writing(job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or job.output} cannot be written: {error.strerror or error}",
            f"free space and run the same command: finished parts are kept in {job.parts}",
        ) from error
