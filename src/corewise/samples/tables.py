"""Files of texts: a line each (.txt), or columns for text, pair and label (.csv, .tsv, .jsonl, .parquet)."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count, islice
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from corewise.common.errors import MissingExtra, SamplesError
from corewise.common.phrases import shown
from corewise.samples.places import Place, unreadable
from corewise.samples.raw import RawItem, RawKind, RawSamples, gather
from corewise.samples.texts import GUESSED, MOST_CHARACTERS, Columns, check_once, number_or_text, text_problem

FIRST = 16
"""Records whose columns are looked at, before the first of them is used."""
PARQUET_ROWS = 1024
"""Rows read at a time."""
MOST_LINE_CHARACTERS = 16 * 2**20
"""Characters of a line that are held: a file may have no ends of lines at all."""
DELIMITERS = (",", ";", "\t", "|")
"""The delimiter of a ``.csv`` is the first of these that its header has."""
JSON_LIST = re.compile(r"\s*\[\s*($|\{)")
"""How the first line of a list of objects begins."""
NUMBER = "number"


class _Record(NamedTuple):
    """One line or row: its values by column, or what is wrong with it."""

    name: str
    values: Mapping[str, Any]
    problem: str = ""
    blank: bool = False
    """Whether it is a line of text with nothing in it."""


def read_table(path: Path, columns: Columns = GUESSED, *, max_samples: int | None = None, seed: int = 0) -> RawSamples:
    """The texts of a file, or its pairs of texts where ``columns.pair`` is given.

    - ``.txt``: each line is a text, whether lines end with LF, CR LF or CR; empty lines are left out.
    - ``.csv``: with a header, quoted as in RFC 4180; with semicolons, tabs or bars where the header has no comma.
    - ``.tsv``: with a header; quotes are part of the text.
    - ``.jsonl``: each line is an object or a string.
    - ``.parquet``: needs pyarrow.

    Args:
        path: The file, in UTF-8. It is read once, and no more than ``max_samples`` texts are held.
        columns: Which columns hold the text, the second text of a pair, and the label.
        max_samples: Draw at most this many.
        seed: Seed of the draw.

    Raises:
        SamplesError: Naming the column that is not there, or the rows that cannot be used where more than a tenth are;
            fewer of them are set aside, and ``notes`` says so.
        MissingExtra: Where pyarrow is not installed.
    """
    kind: RawKind = "pair" if columns.pair else "text"
    return gather(iterate_table(path, columns), kind, source=str(path), max_samples=max_samples, seed=seed)


def iterate_table(path: Place, columns: Columns = GUESSED, *, samples: bool = True) -> Iterator[RawItem]:
    """The texts or pairs of a file as they are read, with what is wrong with those that cannot be used.

    As ``samples`` they may have labels, and empty lines of a ``.txt`` are left out; else each line is an item.
    """
    read = READERS[path.suffix.lower()]
    try:
        resolved: Columns | None = None
        label_kind = ""
        records = (one for one in read(path, columns, samples) if not (samples and one.blank))
        first = list(islice(records, FIRST))
        for number, record in enumerate(chain(first, records)):
            if record.problem:
                yield RawItem(number, None, name=record.name, problem=record.problem)
                continue
            if resolved is None:
                # The objects of a .jsonl may have different keys, and the first not the one that holds texts.
                header = list(dict.fromkeys(name for one in (record, *first) for name in one.values))
                try:
                    resolved = _resolved(columns, header, str(path), samples)
                except SamplesError:
                    with suppress(SamplesError):
                        resolved = _resolved(columns, list(record.values), str(path), samples)
                    if resolved is None:
                        raise
            value, label, problem = resolved.item(record.values)
            label = number_or_text(label) if isinstance(label, str) else label
            if not problem:
                label_kind = label_kind or _label_kind(label)
                if _label_kind(label) != (label_kind or NUMBER):
                    problem = f"has the label {shown(label)}, which is not a {label_kind or NUMBER}"
            yield RawItem(number, value, label, record.name, problem)
    except OSError as error:
        raise unreadable(path, error) from error


def _resolved(columns: Columns, header: list[str], source: str, samples: bool) -> Columns:
    resolved = columns.resolve(header, source)
    return resolved if samples else resolved._replace(label=None)


def _label_kind(label: Any) -> str:
    """What a label is; empty for NaN and infinity, which are no labels at all."""
    if isinstance(label, int | float):
        return NUMBER if -inf < label < inf else ""
    return "text" if isinstance(label, str) else "list" if isinstance(label, list) else type(label).__name__


def _open(path: Place, newline: str | None = None) -> TextIO:
    """A text file whose bytes that are no UTF-8 become lone surrogates, for ``text_problem`` to find.

    By default its lines end where Python's ``open`` ends them: at a line feed, a carriage return, or both together.
    What ``str.splitlines`` takes for ends of lines beside these, such as form feeds and U+2028, are characters.
    """
    with path.open("rb") as file:
        head = file.read(4)
        # With a byte order mark, or two characters of ASCII without one.
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or [*map(bool, head)] in ([True, False] * 2, [False, True] * 2):
            raise SamplesError(f"{path} is UTF-16", "save it as UTF-8")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _lines(path: Place) -> Iterator[tuple[str, str]]:
    """The lines, each with its name; of one that is too long, the beginning."""
    with _open(path) as file:
        for number in count(1):
            line = rest = file.readline(MOST_LINE_CHARACTERS)
            if not line:
                break
            while len(rest) == MOST_LINE_CHARACTERS and not rest.endswith("\n"):
                rest = file.readline(MOST_LINE_CHARACTERS)
            yield f"line {number}", line.removesuffix("\n")


def _txt(path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    if any(columns):
        raise SamplesError(f"{path} has lines but no columns", "give a .csv, .tsv, .jsonl or .parquet file")
    for name, line in _lines(path):
        yield _Record(name, {"text": line}, text_problem(line), blank=not line.strip())


def _jsonl(path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    for name, line in _lines(path):
        if not line.strip():
            continue
        if name == "line 1" and JSON_LIST.match(line):
            raise SamplesError(f"{path} is one JSON list", "write each of its objects on a line of its own")
        if len(line) >= MOST_LINE_CHARACTERS:
            yield _Record(name, {}, f"has more than {MOST_LINE_CHARACTERS:,} characters")
            continue
        try:
            line.encode()
            value = json.loads(line)
        except UnicodeEncodeError as error:
            yield _Record(name, {}, f"is not UTF-8 at character {error.start}")
        except (ValueError, RecursionError) as error:
            yield _Record(name, {}, f"is not JSON: {error}")
        else:
            record = {"text": value} if isinstance(value, str) else value
            yield _Record(name, record) if isinstance(record, dict) else _Record(name, {}, "is not a JSON object")


def _csv(path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    with _open(path, newline="") as file:
        header = file.readline(MOST_LINE_CHARACTERS)
        file.seek(0)
        unquoted = "".join(header.split('"')[::2])
        delimiter = next((mark for mark in DELIMITERS if mark in unquoted), ",")
        too_long: set[int] = set()
        reader = csv.reader(_bounded(file, too_long), delimiter=delimiter, strict=True)
        yield from _fields(reader, too_long, path, columns, samples)


def _tsv(path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    with _open(path, newline="") as file:
        too_long: set[int] = set()
        reader = csv.reader(_bounded(file, too_long), delimiter="\t", quoting=csv.QUOTE_NONE)
        yield from _fields(reader, too_long, path, columns, samples)


def _bounded(file: TextIO, too_long: set[int]) -> Iterator[str]:
    """The lines with their ends. A line that is too long is cut, and its number is added to ``too_long``."""
    for number in count(1):
        line = rest = file.readline(MOST_LINE_CHARACTERS)
        if not line:
            break
        if len(line) == MOST_LINE_CHARACTERS and not line.endswith(("\r", "\n")):
            too_long.add(number)
            while len(rest) == MOST_LINE_CHARACTERS and not rest.endswith(("\r", "\n")):
                rest = file.readline(MOST_LINE_CHARACTERS)
            line += "\n"
        yield line


def _fields(reader: Any, too_long: set[int], path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    """The rows below the header; a row that is broken is a problem of each line that it took."""
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = _next(reader)
        except csv.Error as error:
            for broken in range(line, reader.line_num + 1):
                yield _Record(f"line {broken}", {}, f"is not CSV: {error}")
            continue
        if fields is None:
            break
        if not fields:
            continue  # an empty line
        if not too_long.isdisjoint(range(line, reader.line_num + 1)):
            problem = f"has more than {MOST_LINE_CHARACTERS:,} characters"
            if header is None:
                raise SamplesError(f"the header of {path} {problem}", "end the header and each row with a line feed")
            yield _Record(f"line {line}", {}, problem)
        elif header is None:
            header = [name.strip() for name in fields]
            check_once(_resolved(columns, header, str(path), samples), header, str(path))
        elif len(fields) == len(header):
            yield _Record(f"line {line}", dict(zip(header, fields, strict=True)))
        else:
            yield _Record(f"line {line}", {}, f"has {len(fields)} fields where the header has {len(header)}")
    if not header:
        raise SamplesError(f"{path} is empty", "give a header and rows")


def _next(reader: Any) -> list[str] | None:
    """The next row, however long its fields; the limit on these is the process's, and is left as it was."""
    limit = csv.field_size_limit(4 * MOST_CHARACTERS)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Place, columns: Columns, samples: bool) -> Iterator[_Record]:
    with _parquet_file(path) as file:
        header = file.schema_arrow.names
        resolved = _resolved(columns, header, str(path), samples)
        check_once(resolved, header, str(path))
        names = [name for name in resolved if name is not None]
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=names):
            for cells in zip(*(batch.column(name) for name in names), strict=True):
                yield _cells(f"row {row}", names, cells)
                row += 1


def parquet_rows(path: Place) -> int:
    """How many rows a Parquet file has. Raises ``SamplesError`` if it is none, and ``MissingExtra``."""
    with _parquet_file(path) as file:
        return int(file.metadata.num_rows)


@contextmanager
def _parquet_file(path: Place) -> Iterator[Any]:
    """The file as pyarrow opens it; its errors until the ``with`` ends are told of the file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading {path}") from None
    try:
        with path.open("rb") as content, parquet.ParquetFile(content) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise SamplesError(f"{path} is not a Parquet file: {error}", "write it with pyarrow or pandas") from error


def _cells(row: str, names: list[str], cells: tuple[Any, ...]) -> _Record:
    try:
        return _Record(row, dict(zip(names, (cell.as_py() for cell in cells), strict=True)))
    except UnicodeDecodeError as error:
        return _Record(row, {}, f"is not UTF-8 at byte {error.start}")
    except (ValueError, OverflowError) as error:  # times that Python does not have
        return _Record(row, {}, f"has a value that Python does not have: {error}")


READERS: dict[str, Callable[[Place, Columns, bool], Iterator[_Record]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}
"""By the file's suffix."""
