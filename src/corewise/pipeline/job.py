"""Files of texts, or of images, to answers, part by part, so that a job that was killed resumes where it was.

A part is a fixed number of rows in the order of the inputs, with a file of the rows that were set aside, and gets its
name when it is whole on disk. The output is a folder of Parquet parts; or a file, which is made of the parts at the
end: until then a folder beside it, ``OUT.parts``, holds them.
"""

import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import reduce
from itertools import chain, count, groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from corewise.common.errors import InputError, OutputError, SamplesError
from corewise.pipeline.drawing import draw_answer
from corewise.pipeline.outputs import Format, format_of, join_lines, sync
from corewise.pipeline.parts import Counts, Parts, Record
from corewise.pipeline.photos import USUAL, ImageAsk, ImageRunner, MediaRunner, content_of
from corewise.pipeline.runner import Rejected, TextRunner
from corewise.samples.archives import is_archive, read_archive
from corewise.samples.places import Place, RemotePath, real_name, unreadable
from corewise.samples.tables import READERS, iterate_table, parquet_rows
from corewise.samples.texts import Columns

PART_ROWS, FOLDER_PART_ROWS = 4096, 1024
"""Rows of a part, and of one that stays a file in a folder: what is done again at most after a kill."""
PART_BYTES = 64 * 2**20
"""The most bytes of a part's answers, and of its texts: if they are large (a vector of each token, maps of photos,
books), a part has fewer rows."""
SUFFIX, MARK = ".parquet", "_"
"""In a folder of Parquet parts, how the names of files of answers end, and how those of all other files begin."""
SWITCH_S = 0.0005
"""How long Python's threads wait for each other at most. Those that hand calls to the engine wait for the one that
reads and writes rows: with Python's own 5 ms a job of short texts had 0.96 of the rate (MiniLM, two cores)."""
BLOCK_BYTES = 1 << 20
SECOND_NS = 10**9

OnRows = Callable[[Counts], None]
"""Called with the numbers of rows that are done and of those set aside, an earlier run's included."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked: the same job finds its finished parts."""

    inputs: tuple[Place, ...]
    output: Place
    columns: Columns
    prompt: str | None
    artifact: str
    """The identity of the artifact: the sha256 of its manifest."""
    ask: ImageAsk | None = None
    """What is wanted of images and recordings, each of which is a row."""
    drawings: Path | None = None
    """The folder of the photos with their answers drawn on them."""
    preprocess: str | None = None
    """The function that prepares images and recordings, as a reference."""
    folder: bool = False
    """Whether the output is a folder of Parquet parts, and no file."""
    answer_bytes: int = 0
    """About how large an answer is, if that is known: the answers of a part are in memory together."""
    row_bytes: int = 0
    """About how large a text is: on a cluster, the texts of two parts for each node are in memory together."""

    @property
    def file(self) -> Path:
        """The output that is a file."""
        assert isinstance(self.output, Path)
        return self.output

    @property
    def parts(self) -> Path:
        """The folder of what is finished of an output that is a file."""
        return self.file.with_name(f"{self.file.name}.parts")

    @property
    def failed(self) -> Place:
        """The file of rows that were set aside, or the folder that has one for each part."""
        return self.output if self.folder else self.file.with_name(f"{self.file.stem}.failed.jsonl")

    @property
    def part_rows(self) -> int:
        """Rows of a part."""
        usual = FOLDER_PART_ROWS if self.folder else PART_ROWS
        return max(1, min(usual, PART_BYTES // max(1, self.answer_bytes, self.row_bytes)))

    @property
    def several(self) -> bool:
        """Whether an answer says which input it belongs to."""
        return len(self.inputs) > 1 or self.ask is not None

    @property
    def kept(self) -> Parts:
        """The parts in their folder."""
        if self.folder:
            return folder_of(self.output, several=self.several)
        return Parts(folder=self.parts, suffix=self.file.suffix, several=self.several)

    def facts(self) -> dict[str, Any]:
        """What must be equal for parts to count."""
        return {
            "artifact": self.artifact,
            "inputs": [[real_name(path), *_size_and_time(path)] for path in self.inputs],
            "columns": list(self.columns),
            "prompt": self.prompt,
            "part_rows": self.part_rows,
            "ask": None if self.ask is None else asdict(self.ask),
            "preprocess": self.preprocess,
            "drawings": None if self.drawings is None else str(self.drawings.resolve()),
        }


def _size_and_time(path: Place) -> tuple[int, int]:
    """Zeros for a link to nothing. Stores know the time of a single file to the second, in a listing more closely."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    unit_ns = SECOND_NS if isinstance(path, RemotePath) else 1
    return found.st_size, found.st_mtime_ns // unit_ns * unit_ns


def folder_of(output: Place, *, several: bool) -> Parts:
    """A folder of Parquet parts; ``several``: answers say which input they belong to."""
    return Parts(folder=output, suffix=SUFFIX, several=several, mark=MARK)


class Done(NamedTuple):
    """The outcome of a job: rows read, those of an earlier run among them, rows set aside, and rows that were cut."""

    rows: int
    resumed: int
    failed: int
    cut: int = 0


def check_inputs(job: Job) -> None:
    """Raise ``SamplesError`` for files of texts that are missing, of unknown kinds, or have no such column.

    Images that are missing are rows that are set aside. A file that has the name of a tar file and is none is found
    here, because it would end the job halfway.
    """
    if job.ask is not None:
        for path in job.inputs if len(job.inputs) > 1 else ():
            if is_archive(path) and isinstance(path, Path):
                next(read_archive(path, sliced=True), None)
        return
    for path in job.inputs:
        if not path.is_file():
            raise SamplesError(f"there is no file {path}", "check the path")
        if path.suffix.lower() not in READERS:
            raise SamplesError(f"{path} is not a file of texts", f"give one of {', '.join(READERS)}")
        if len(job.inputs) > 1 and isinstance(path, Path):
            next(iterate_table(path, job.columns, samples=False), None)  # so that no wrong header ends the job halfway


def check_job(job: Job) -> None:
    """Raise for inputs that are missing or of unknown kinds, and an output that exists or cannot be written.

    Raises:
        SamplesError: An input.
        OutputError: The output.
    """
    check_inputs(job)
    if job.folder:
        check_folder(job.output)
    else:
        _check_file(job)
    folder = job.drawings
    if folder is not None and not folder.is_dir() and (folder.exists() or not folder.parent.is_dir()):
        why = "it is a file" if folder.exists() else f"there is no folder {folder.parent}"
        raise OutputError(f"{folder} cannot be made: {why}", "give another folder with --draw")


def _check_file(job: Job) -> None:
    output = job.file
    if output.is_dir() or not output.parent.is_dir():
        why = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise OutputError(f"{output} cannot be written: {why}", "give another name with -o")
    for path in (output, Path(str(job.failed))):
        if path.exists() and not job.kept.about.is_file():
            raise OutputError(f"{path} exists already", "remove it or give another name with -o")


def check_folder(output: Place) -> None:
    """Raise ``OutputError`` unless the output is a job's folder or can become one."""
    if output.suffix in (".jsonl", ".npy"):
        raise OutputError(f"{output} is the name of a file", "give a folder for Parquet files with -o")
    if str(output).encode("utf-8", "ignore").decode() != str(output):
        raise OutputError(f"{output} is not a name in UTF-8", "give another name with -o")
    if output.is_file():
        raise OutputError(f"{output} exists already and is not a folder", "give another name with -o")
    if isinstance(output, Path) and not output.parent.is_dir():
        raise OutputError(
            f"{output} cannot be written: there is no folder {output.parent}", "create it, or give another name with -o"
        )
    if (isinstance(output, RemotePath) or output.is_dir()) and folder_of(output, several=False).is_foreign():
        raise OutputError(f"{output} has files that are not from such a job", "give another name with -o")


def count_rows(paths: Iterable[Place]) -> int:
    """About how many rows files have, for a progress bar: their lines; of Parquet the exact number."""
    total = 0
    for path in paths:
        try:
            total += parquet_rows(path) if path.suffix.lower() == ".parquet" else _lines(path)
        except OSError as error:
            raise unreadable(path, error) from error
    return total


def _lines(path: Place) -> int:
    """How many lines a file has, without a header."""
    with path.open("rb") as file:
        if isinstance(path, RemotePath):  # to read it all would take as long as the job
            head = file.read(BLOCK_BYTES)
            lines = _ends(head) * path.stat().st_size // max(1, len(head))
        else:
            last, lines = b"", 0
            for block in iter(lambda: file.read(BLOCK_BYTES), b""):
                lines += _ends(block) - (last == b"\r" and block[:1] == b"\n")
                last = block[-1:]
            lines += last not in (b"", b"\r", b"\n")
    return max(0, int(lines) - (path.suffix.lower() in (".csv", ".tsv")))


def _ends(block: bytes) -> int:
    """How many lines end in it."""
    returns = block.count(b"\r")
    return block.count(b"\n") + (returns - block.count(b"\r\n") if returns else 0)


def run_job(
    job: Job,
    runner: TextRunner | MediaRunner,
    *,
    max_failed: int | None = None,
    on_rows: OnRows = lambda done: None,
) -> Done:
    """Answer all rows of the inputs and write the output, resuming what an earlier run of the same job finished.

    Rows are numbered from 0 over all inputs. A row that cannot be answered is in ``job.failed`` with its reason; more
    of them than ``max_failed`` end the job. Memory is bounded, whatever the inputs' size.

    Raises:
        SamplesError: An input cannot be read, has no such column, or no rows, or has changed; or too many rows failed.
        InputError: The output cannot hold such answers, or there is nothing to draw.
        OutputError: The output cannot be written, or its folder of parts is another job's.
        EngineError: The engine fails.
    """
    check_job(job)
    if job.drawings is not None and (not isinstance(runner, ImageRunner) or runner.pipeline.task == "vectors"):
        raise InputError("the model gives no classes and no boxes that could be drawn", "leave out --draw")
    pipeline = runner.pipeline if isinstance(runner, MediaRunner) else runner.encoder.pipeline
    kept, facts = job.kept, job.facts()
    kind = format_of(SUFFIX if job.folder else str(job.output), pipeline)
    first = next(rest := records(job), None)
    if first is None:
        raise no_rows(job)
    with writing(str(job.output), str(kept.folder)), kept.begun(facts), _switching_soon():
        if job.drawings is not None:
            job.drawings.mkdir(exist_ok=True)
        finished = kept.finished()
        resumed = done = total_of(finished)
        kept.check_failed(done.failed, max_failed, "")
        on_rows(done)
        size = job.part_rows
        missing = (record for record in chain([first], rest) if record.row // size not in finished)
        made = answered(missing, runner, prompt=job.prompt, ask=job.ask, drawings=job.drawings)
        for number, part in groupby(made, lambda each: each[0].row // size):
            counts = kept.write(number, kind, list(part))
            done = done.plus(counts)
            kept.check_failed(done.failed, max_failed, counts.example)
            on_rows(done)
        check_unchanged(job, facts)
        if not job.folder:
            _join(job, kind, done)
    return Done(done.rows, resumed.rows, done.failed, done.cut)


@contextmanager
def _switching_soon() -> Iterator[None]:
    """Have Python's threads wait ``SWITCH_S`` for each other at most, in the whole process."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(min(before_s, SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


def total_of(finished: Mapping[int, Counts]) -> Counts:
    """The rows of finished parts, those of them that were set aside, and those that were cut."""
    return reduce(Counts.plus, finished.values(), Counts(0, 0))


def check_unchanged(job: Job, facts: Mapping[str, Any]) -> None:
    """Raise ``SamplesError`` if an input is not what it was when the job began.

    Of an object store, files with many rows: of others it would take a request for each row, and each is a row still.
    """
    inputs = tuple(_afresh(path) if job.ask is None or is_archive(path) else path for path in job.inputs)
    try:
        changed = replace(job, inputs=inputs).facts() != facts
    except FileNotFoundError:
        changed = True
    if changed:
        raise SamplesError(
            "an input has changed while it was read", f"remove {job.kept.folder} and run the same command"
        )


def _afresh(path: Place) -> Place:
    """The file without what a listing said of it."""
    return RemotePath(path.url) if isinstance(path, RemotePath) else path


def no_rows(job: Job) -> SamplesError:
    """The error for inputs without rows."""
    return SamplesError(f"there are no rows in {', '.join(map(str, job.inputs))}", "give at least one")


def records(job: Job, *, sliced: bool = False) -> Iterator[Record]:
    """All rows of the inputs, in order, read as they are taken; ``sliced`` leaves images of tar files where they are.

    Raises:
        SamplesError: An input cannot be read, or has no such column.
    """
    if job.ask is not None:
        yield from _images(job.inputs, sliced)
        return
    row = 0
    for path in job.inputs:
        for item in iterate_table(path, job.columns, samples=False):
            yield Record(row, str(path), item.name or "", item.value, item.problem)
            row += 1


def _images(inputs: Iterable[Place], sliced: bool) -> Iterator[Record]:
    """A record for each image file, and for each image of a tar file."""
    rows = count()
    for path in inputs:
        if not is_archive(path):
            yield Record(next(rows), str(path), "", str(path), "")
            continue
        for member in read_archive(path, sliced=sliced):
            place = f"{path}/{member.name}" if member.name else str(path)
            yield Record(next(rows), place, "", member.slice or member.content, member.problem)


def answered(
    rows: Iterable[Record],
    runner: TextRunner | MediaRunner,
    *,
    prompt: str | None,
    ask: ImageAsk | None,
    drawings: Path | None = None,
) -> Iterator[tuple[Record, Any]]:
    """The rows with their answers, in order; ``Rejected`` for one that cannot be answered. Rows say if they were cut.

    Photos with their answers drawn on them go to ``drawings``, the row's number in their names.
    """
    waiting: deque[Record] = deque()
    cut: set[int] = set()

    def values() -> Iterator[Any]:
        for record in rows:
            waiting.append(record if drawings is not None else record._replace(value=None))
            yield None if record.problem else record.value

    if isinstance(runner, MediaRunner):
        answers = runner.answers(values(), ask or USUAL)
    else:
        answers = runner.answers(values(), prompt=prompt, on_cut=cut.add)
    for number, answer in enumerate(answers):
        record = waiting.popleft()
        answer = Rejected(record.problem) if record.problem else answer
        if drawings is not None and not isinstance(answer, Rejected):
            source = record.value if isinstance(record.value, bytes) else content_of(record.value)
            draw_answer(source, answer, drawings / _drawing(record))
        yield record._replace(value=None, is_cut=number in cut), answer
        cut.discard(number)


def _drawing(record: Record) -> str:
    """A file name of a length that file systems take, in characters that they and shells take."""
    stem = re.sub(r"[^\w.-]", "_", PurePosixPath(record.input).stem)
    return f"{record.row:06}-{stem[:60]}.jpg"


def _join(job: Job, kind: Format, expected: Counts) -> None:
    """Join the parts and remove their folder. Raises ``OutputError`` unless they have all rows."""
    done = job.kept.finished()
    if total_of(done) != expected:
        raise OutputError(f"files were removed from {job.parts} while the job ran", "run the same command again")
    answers = [job.parts / job.kept.answers(number).name for number in done]
    whole = job.parts / f"whole{job.file.suffix}"
    kind.join(answers, whole)
    if expected.failed:
        aside = job.parts / "whole.failed"
        join_lines([job.parts / job.kept.failed(number).name for number in done], aside)
        sync(aside)
        aside.replace(str(job.failed))
    sync(whole)
    whole.replace(job.file)
    (job.parts / job.kept.about.name).unlink()  # first: parts that a kill leaves here belong to no job
    shutil.rmtree(job.parts)


@contextmanager
def writing(output: str, parts: str) -> Iterator[None]:
    """Turn what goes wrong with the disk into ``OutputError``."""
    try:
        yield
    except OSError as error:
        kept = f"run the same command: finished parts are kept in {parts}"
        fixes = {EACCES: "make it writable, or give another name with -o", ENOSPC: f"free space and {kept}"}
        fixes |= {EPERM: fixes[EACCES], EROFS: fixes[EACCES], EDQUOT: fixes[ENOSPC]}
        raise OutputError(
            f"{error.filename or output} cannot be written: {error.strerror or error}",
            fixes.get(error.errno or 0, kept),
        ) from error
