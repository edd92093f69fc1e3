"""Answers in files: the parts of a job, each written whole or not at all, and the file that they make together."""

import json
import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from corewise.common.errors import InputError, MissingExtra
from corewise.records.pipeline import AudioPipeline, MediaPipeline, TextPipeline

_NOT_ROWS = {
    "vectors": "vectors of several sizes",
    "classes": "classes with their probabilities",
    "tokens": "spans",
    "boxes": "boxes",
}
"""The answers that are no rows of one size, as an array has, by the pipeline's task."""


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One answered row of a job: its number over all inputs from 0, its file if there are several, its answer."""

    row: int
    input: str | None
    answer: Any


class Format(Protocol):
    """How answers are stored."""

    @abstractmethod
    def write(self, path: Path, rows: Sequence[AnswerRow], first: int, count: int) -> None:
        """Write a part: the answers to ``count`` rows from number ``first`` on, of which some may have none."""

    @abstractmethod
    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Write all parts as one file."""


def format_of(name: str, pipeline: TextPipeline | MediaPipeline) -> Format:
    """The format that the name of the output says.

    Raises:
        InputError: The name says none, or the format cannot hold such answers.
        MissingExtra: pyarrow is not installed and the format is Parquet.
    """
    suffix = "." + name.rpartition(".")[2].lower()
    if suffix == ".jsonl":
        return _JsonLines(_field(pipeline))
    if suffix == ".parquet":
        return _Parquet(_field(pipeline))
    if suffix != ".npy":
        raise InputError(f"the name {name} does not say the format", "end it with .parquet, .jsonl or .npy")
    ragged = isinstance(pipeline, AudioPipeline) and pipeline.ragged
    ragged |= isinstance(pipeline, TextPipeline) and pipeline.task == "vectors" and pipeline.pooling == "none"
    if pipeline.task not in ("vectors", "scores") or ragged:
        raise InputError(f"{name} cannot hold {_NOT_ROWS[pipeline.task]}", "name it .parquet or .jsonl")
    return _Npy()


def plain(answer: Any) -> Any:
    """An answer as JSON data."""
    if is_dataclass(answer) and not isinstance(answer, type):
        return asdict(answer)
    if isinstance(answer, list):
        return [plain(part) for part in answer]
    return answer.tolist() if isinstance(answer, np.ndarray) else answer


def _field(pipeline: TextPipeline | MediaPipeline) -> str:
    if isinstance(pipeline, MediaPipeline):
        return {"vectors": "vector", "classes": "top", "boxes": "boxes"}[pipeline.task]
    return {"vectors": "vector", "scores": "score", "classes": "answer", "tokens": "spans"}[pipeline.task]


def _record(row: AnswerRow, field: str) -> dict[str, Any]:
    """A row's columns: the fields of a class answer are columns of their own."""
    where = {"row": row.row} if row.input is None else {"row": row.row, "input": row.input}
    answer = plain(row.answer)
    if field == "top":  # a list: of many classes, each row names others
        top = [{"label": label, "probability": value} for label, value in answer["probabilities"].items()]
        return {**where, "label": answer["label"], "probability": answer["probability"], "top": top}
    if field == "boxes":  # columns of one length, as torchvision has them
        names = {"labels": "label", "scores": "score", "boxes": "box"}
        return {**where, **{column: [one[name] for one in answer] for column, name in names.items()}}
    return {**where, **(answer if field == "answer" else {field: answer})}


def _json(record: dict[str, Any]) -> str:
    """A record as JSON, which has no NaN and no infinity: they become null, as the server writes them."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON data with ``None`` for each number that is none."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _JsonLines:
    def __init__(self, field: str) -> None:
        self._field = field

    def write(self, path: Path, rows: Sequence[AnswerRow], first: int, count: int) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(_json(_record(row, self._field)) + "\n")

    def join(self, parts: Sequence[Path], path: Path) -> None:
        join_lines(parts, path)


class _Parquet:
    def __init__(self, field: str) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingExtra("pyarrow", "parquet", "writing Parquet") from None
        self._field = field

    def write(self, path: Path, rows: Sequence[AnswerRow], first: int, count: int) -> None:
        import pyarrow
        from pyarrow import parquet

        if rows and isinstance(rows[0].answer, np.ndarray) and rows[0].answer.ndim == 1:
            table = _vector_table(rows)
        else:
            records = [_record(row, self._field) for row in rows]
            table = pyarrow.Table.from_pylist(records, _boxes_schema(rows) if self._field == "boxes" else None)
            if rows and self._field == "spans":  # of texts without any, nothing tells the type
                place = table.schema.get_field_index("spans")
                table = table.set_column(place, "spans", table.column("spans").cast(_spans_type()))
        parquet.write_table(table, path, **_storage(table.schema))

    def join(self, parts: Sequence[Path], path: Path) -> None:
        from pyarrow import parquet

        filled = [part for part in parts if parquet.read_metadata(part).num_rows] or list(parts[:1])
        schema = parquet.read_schema(filled[0])
        with parquet.ParquetWriter(path, schema, **_storage(schema)) as whole:
            for part in filled:
                # read_table of older versions takes a folder named lang=en for a column.
                with parquet.ParquetFile(part) as file:
                    whole.write_table(file.read().cast(schema))


def _vector_table(rows: Sequence[AnswerRow]) -> Any:
    """Rows whose answers are vectors, from buffers: ``pyarrow.array`` imports pandas, which takes a second."""
    import pyarrow as pa

    vectors = np.stack([row.answer for row in rows]).astype(np.float32, copy=False)
    flat = pa.Array.from_buffers(pa.float32(), vectors.size, [None, pa.py_buffer(vectors)])
    numbers = np.array([row.row for row in rows], np.int64)
    columns = {"row": pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(numbers)])}
    if rows[0].input is not None:
        names = [(row.input or "").encode() for row in rows]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int32)
        columns["input"] = pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(b"".join(names)))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pa.Table.from_arrays([*columns.values()], names=[*columns])


def _storage(schema: Any) -> dict[str, Any]:
    """How Parquet stores the columns: vectors as they are.

    A dictionary of their values, compression and statistics make their files hardly smaller, and take time: without
    compression they are read in a quarter of it.
    """
    if "vector" not in schema.names:
        return {}
    others = [name for name in schema.names if name != "vector"]
    compression = {name: "none" if name == "vector" else "snappy" for name in schema.names}
    return {"use_dictionary": others, "compression": compression, "write_statistics": others}


def _boxes_schema(rows: Sequence[AnswerRow]) -> Any:
    """The schema of a table of detections, which may have no rows."""
    import pyarrow as pa

    floats = pa.list_(pa.float32())
    several = [("input", pa.string())] if rows and rows[0].input is not None else []
    lists = [("labels", pa.list_(pa.string())), ("scores", floats), ("boxes", pa.list_(floats))]
    return pa.schema([("row", pa.int64()), *several, *lists])


def _spans_type() -> Any:
    """What Arrow calls a list of ``Span``."""
    import pyarrow

    whole, text = pyarrow.int64(), pyarrow.string()
    fields = {"label": text, "probability": pyarrow.float64(), "start": whole, "end": whole, "text": text}
    return pyarrow.list_(pyarrow.struct(list(fields.items())))


class _Npy:
    """An array with a row for each row of the inputs; those that were set aside are NaN."""

    def write(self, path: Path, rows: Sequence[AnswerRow], first: int, count: int) -> None:
        size = np.shape(rows[0].answer) if rows else (0,)
        made = np.full((count, *size), np.nan, np.float32)
        for row in rows:
            if np.shape(row.answer) != size:
                raise _other_size(np.shape(row.answer), size)
            made[row.row - first] = row.answer
        with path.open("wb") as file:  # to a path that does not end with .npy, numpy would add that
            np.save(file, made)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        arrays = [np.load(part, mmap_mode="r") for part in parts]
        size = next((array.shape[1:] for array in arrays if array.shape[1:] != (0,)), ())
        for array in arrays:
            if array.shape[1:] not in (size, (0,)):
                raise _other_size(array.shape[1:], size)
        shape = (sum(map(len, arrays)), *size)
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for array in arrays:
                empty = array.shape[1:] == (0,)
                file.write((np.full((len(array), *size), np.nan, np.float32) if empty else np.asarray(array)).tobytes())


def _other_size(size: tuple[int, ...], first: tuple[int, ...]) -> InputError:
    return InputError(
        f"an .npy file cannot hold answers of several sizes, such as {size} and {first}", "name it .parquet or .jsonl"
    )


def _copy(part: Path, whole: BinaryIO) -> None:
    with part.open("rb") as file:
        while block := file.read(1 << 20):
            whole.write(block)


def join_lines(parts: Sequence[Path], path: Path) -> None:
    """Write text files one after the other."""
    with path.open("wb") as whole:
        for part in parts:
            _copy(part, whole)


def sync(path: Path) -> None:
    """Have a file's content on disk before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
