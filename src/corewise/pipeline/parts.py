"""A job's finished parts in a folder. Each is on disk as a whole or not at all, even if its writer is killed.

A part is its answers, the rows that were set aside with their reasons, and a small file ``.done``, which comes last and
says how large both are. Each file is written under a name of its own and renamed, so that two writers of one part, of
which one was given up for dead, do not harm each other: both write the same. In an object store a file appears when it
is whole.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from corewise.common.errors import CorewiseError, OutputError, SamplesError
from corewise.pipeline.outputs import AnswerRow, Format, sync
from corewise.pipeline.runner import Rejected
from corewise.samples.places import Place, RemotePath

LOCK, NEW = "lock", "new-"
"""Behind ``mark``: the file that is locked, and what begins the name of a file that is not whole yet."""
READERS = 16
"""Requests at the same time, of those that ask what is done."""


class Record(NamedTuple):
    """A row of the inputs: its number over all of them, its file, its name there, its value, and its problem if any.

    One that is answered has no value any more, and says whether its text was cut to the tokens that the model takes.
    """

    row: int
    input: str
    name: str
    value: Any
    problem: str
    is_cut: bool = False


class Counts(NamedTuple):
    """The rows of a part, those of them that were set aside, and the first of these with its reason.

    ``cut`` are those whose texts were cut to the tokens that the model takes.
    """

    rows: int
    failed: int
    cut: int = 0
    example: str = ""

    def plus(self, other: "Counts") -> "Counts":
        """The counts of both together, without an example."""
        return Counts(self.rows + other.rows, self.failed + other.failed, self.cut + other.cut)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The folder of a job's parts."""

    folder: Place
    suffix: str
    """The suffix of the files of answers, which says their format."""
    several: bool
    """Whether an answer says which input it belongs to."""
    mark: str = ""
    """Begins the names of all other files. Readers of Parquet folders leave out what begins with ``_``."""

    @property
    def about(self) -> Place:
        """The file that says which job this is."""
        return self.folder / f"{self.mark}job.json"

    def answers(self, number: int) -> Place:
        """The file of a part's answers."""
        return self.folder / f"part-{number:06}{self.suffix}"

    def failed(self, number: int) -> Place:
        """The file of a part's rows that were set aside, JSON Lines."""
        return self.folder / f"{self.mark}part-{number:06}.failed"

    @contextmanager
    def begun(self, facts: dict[str, Any]) -> Iterator[None]:
        """Make the folder, or find it begun by a job with the same facts; a local one is this process's for as long.

        Raises:
            OutputError: It belongs to another job, or another process writes it.
        """
        made = isinstance(self.folder, Path) and not self.folder.exists()
        if isinstance(self.folder, Path):
            self.folder.mkdir(exist_ok=True)
        with self._locked():
            wrote = self._begin(facts)
            self.sweep()
            try:
                yield
            except CorewiseError:
                if wrote:
                    with suppress(OSError, CorewiseError):  # what is left does no harm
                        self._forget(made=made)
                raise

    def _forget(self, *, made: bool) -> None:
        """Remove what says which job this is if nothing of it is done: the name is free for another job then.

        ``made``: and the folder.
        """
        lock = f"{self.mark}{LOCK}"
        if {*names_in(self.folder)} <= {self.about.name, lock}:
            self.about.unlink()
            if isinstance(self.folder, Path):
                (self.folder / lock).unlink()
                if made:
                    self.folder.rmdir()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other jobs out. The lock ends with its process, however that ends."""
        if isinstance(self.folder, RemotePath):  # which has none; two writers write the same
            yield
            return
        with (self.folder / f"{self.mark}{LOCK}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another process writes {self.folder}", "wait until it has ended, or give another name with -o"
                ) from None
            except OSError:  # a network file system without locks
                pass
            yield

    def _begin(self, facts: dict[str, Any]) -> bool:
        """Write which job this is, unless that is there already; returns whether it was written."""
        if not self.about.is_file():
            if isinstance(self.folder, Path):
                for name in self._done(names_in(self.folder)):  # of a job that was killed while its folder was removed
                    os.unlink(self.folder / name)
            self.replace(self.about, lambda path: path.write_text(_text(facts), encoding="utf-8"))
            return True
        self.check_same(facts)
        return False

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise ``OutputError`` if the folder was begun by a job with other facts."""
        if self.about.is_file() and not self.same(facts):
            raise OutputError(
                f"{self.folder} holds the parts of another job, or its inputs or artifact have changed",
                "remove that folder to begin again, or give another name with -o",
            )

    def is_foreign(self) -> bool:
        """Whether the folder has files, but no job began it."""
        ours = (f"{self.mark}{LOCK}", f"{self.mark}{NEW}")
        return any(not name.startswith(ours) for name in names_in(self.folder)) and not self.about.is_file()

    def same(self, facts: dict[str, Any]) -> bool:
        """Whether the folder was begun by a job with the same facts."""
        return self.about.is_file() and self.about.read_text(encoding="utf-8") == _text(facts)

    def finished(self) -> dict[int, Counts]:
        """The finished parts by their numbers, rising, without those of which a file is gone or has another size."""
        sizes = sizes_in(self.folder)
        start = len(f"{self.mark}part-")
        with ThreadPoolExecutor(READERS) as pool:
            found = {int(name[start:-5]): pool.submit(self._counts, name, sizes) for name in self._done(sizes)}
            counts = {number: future.result() for number, future in sorted(found.items())}
        return {number: count for number, count in counts.items() if count is not None}

    def _counts(self, name: str, sizes: Mapping[str, int]) -> Counts | None:
        """What a part's last file says; ``None`` if that is not true, or the file was damaged itself."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            said = json.loads((self.folder / name).read_text())
            if said["files"].items() <= sizes.items():
                return Counts(int(said["rows"]), int(said["failed"]), int(said["cut"]))
        return None

    def _has_file(self, rows: int) -> bool:
        """In a folder of Parquet no file is without rows: it would have no columns, which a reader would miss."""
        return rows > 0 or not self.mark

    def _done(self, names: Iterable[str]) -> list[str]:
        start = f"{self.mark}part-"
        return [
            name
            for name in names
            if name.startswith(start) and name.endswith(".done") and name[len(start) : -5].isdecimal()
        ]

    def write(self, number: int, kind: Format, part: Sequence[tuple[Record, Any]]) -> Counts:
        """Write a part's rows with their answers, in order; a ``Rejected`` is set aside."""
        good = [
            AnswerRow(row=record.row, input=_printable(record.input) if self.several else None, answer=answer)
            for record, answer in part
            if not isinstance(answer, Rejected)
        ]
        bad = [(record, answer) for record, answer in part if isinstance(answer, Rejected)]
        answers, failed = self.answers(number), self.failed(number)
        done = self.folder / f"{self.mark}part-{number:06}.done"
        self._remove(done)  # of an earlier attempt: it would vouch for a part that is half of each
        files: dict[str, int] = {}
        if self._has_file(len(good)):
            first = part[0][0].row
            files[answers.name] = self.replace(answers, lambda path: kind.write(path, good, first, len(part)))
        else:
            self._remove(answers)
        if self._has_file(len(bad)):
            text = "".join(_aside(record, answer) for record, answer in bad)
            files[failed.name] = self.replace(failed, lambda path: path.write_bytes(text.encode("utf-8", "replace")))
        else:
            self._remove(failed)
        cut = sum(record.is_cut for record, answer in part if not isinstance(answer, Rejected))
        said = json.dumps({"rows": len(part), "failed": len(bad), "cut": cut, "files": files})
        self.replace(done, lambda path: path.write_text(said))
        example = f"{bad[0][0].name or bad[0][0].input} {bad[0][1].reason}" if bad else ""
        return Counts(len(part), len(bad), cut, example)

    def replace(self, path: Place, write: Callable[[Path], Any]) -> int:
        """Write a file under another name, and give it its own when it is on disk. Returns its size in bytes."""
        if isinstance(path, RemotePath):
            assert isinstance(self.folder, RemotePath)
            return self.folder.write_whole(path.name, write)
        new = path.with_name(f"{self.mark}{NEW}{secrets.token_hex(4)}-{path.name}")
        write(new)
        sync(new)
        size_bytes = new.stat().st_size
        new.replace(path)
        return size_bytes

    def _remove(self, path: Place) -> None:
        """Remove what an attempt that was killed left: it may have read other rows, which would be there twice."""
        if isinstance(path, Path):
            path.unlink(missing_ok=True)
        elif path.is_file():
            path.unlink()

    def sweep(self) -> None:
        """Remove what writers that were killed left."""
        if isinstance(self.folder, Path):
            for path in self.folder.glob(f"{self.mark}{NEW}*"):
                path.unlink(missing_ok=True)

    def check_failed(self, failed: int, most: int | None, example: str) -> None:
        """Raise ``SamplesError`` if more rows were set aside than ``most``."""
        if most is not None and failed > most:
            first = f", such as {example}" if example else ""
            rows = "1 row" if failed == 1 else f"{failed:,} rows"
            raise SamplesError(
                f"{rows} cannot be answered{first}, and --max-failed is {most:,}",
                f"correct them or give a larger --max-failed; finished parts are kept in {self.folder}",
            )


def names_in(folder: Place) -> list[str]:
    """The names of what is in a folder."""
    return os.listdir(folder) if isinstance(folder, Path) else folder.names()


def sizes_in(folder: Place) -> dict[str, int]:
    """The sizes of the files in a folder, in bytes, by their names."""
    if isinstance(folder, RemotePath):
        return {file.name: file.stat().st_size for file in folder.children()}
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another job writes there
                sizes[entry.name] = entry.stat().st_size
    return sizes


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=1)


def _printable(path: str) -> str:
    """A path as UTF-8 can have it: a name that is none in UTF-8 has ``?`` for each wrong byte."""
    return path.encode("utf-8", "replace").decode()


def _aside(record: Record, answer: Rejected) -> str:
    line = {"row": record.row, "input": record.input, "where": record.name, "reason": answer.reason}
    return json.dumps(line, ensure_ascii=False) + "\n"
