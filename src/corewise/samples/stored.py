"""Samples in files: what ``Samples.save`` writes, and the temporary file that large samples wait in.

Rows are read one by one, with ``pread`` and not through a memory map: what was read does not stay in the process.
"""

import json
import os
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import OutputError, SamplesError

Array = NDArray[Any]
Row = tuple[Array, ...]
Shapes = tuple[tuple[int, ...], ...]

MOST_IN_MEMORY_BYTES = 64 * 2**20
"""Rows beyond it wait in a temporary file."""

SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


def to_array(value: Any, where: str) -> Array:
    """An array or torch tensor as a numpy array of numbers. Raises ``SamplesError``, which calls it ``where``."""
    try:
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SamplesError(f"{where} is not a NumPy array: {error}", "give numbers, e.g. float32") from error
    if array.dtype.kind not in "biuf":
        raise SamplesError(f"{where} has dtype {array.dtype}", "give numbers")
    return array


class LazyRows(Sequence[Row]):
    """Rows that are made when they are asked for, by ``_row``, and whose shapes are known before."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    @property
    @abstractmethod
    def shapes(self) -> Sequence[Shapes]:
        """The shapes of each row's arrays."""

    @abstractmethod
    def _row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written, in pieces."""

    name: str
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    pieces: Iterable[Array]

    @classmethod
    def whole(cls, name: str, array: Array) -> "Tensor":
        """A tensor of one piece."""
        return cls(name, array.dtype, array.shape, [array])


def text_tensor(name: str, texts: Sequence[str]) -> Tensor:
    """Strings as JSON in bytes; ``StoredFile.texts`` reads them."""
    return Tensor.whole(name, np.frombuffer(json.dumps(list(texts)).encode(), np.uint8))


def row_tensors(rows: Sequence[Row], shapes: Sequence[Shapes], prefix: str = "") -> list[Tensor]:
    """Input k of all rows as one flat tensor ``data.k``, with the rows' shapes, int64 (N, rank), in ``shape.k``."""
    tensors = []
    for k, first in enumerate(rows[0]):
        sizes = np.array([shape[k] for shape in shapes], np.int64)
        tensors.append(Tensor.whole(f"{prefix}shape.{k}", sizes))
        total = int(sizes.prod(axis=1).sum())
        tensors.append(Tensor(f"{prefix}data.{k}", first.dtype, (total,), map(itemgetter(k), rows)))
    return tensors


def write(path: Path, tensors: Sequence[Tensor], metadata: dict[str, str]) -> None:
    """The format of https://github.com/huggingface/safetensors: header size, JSON header, data.

    Written piece by piece, so that no second copy of the data is in memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in tensor.pieces:
                file.write(piece.tobytes())


class StoredFile:
    """An open ``.safetensors`` file: small tensors whole, and where each tensor's data begins.

    Raises what ``safetensors`` does where the file is missing, damaged or another one.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        self._file = cast(Any, safe_open(path, framework="numpy"))
        self.names: set[str] = set(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def array(self, name: str) -> Array:
        """One tensor."""
        array: Array = self._file.get_tensor(name)
        return array

    def texts(self, name: str) -> list[str]:
        """The strings that ``text_tensor`` wrote."""
        texts: list[str] = json.loads(self.array(name).tobytes())
        return texts

    def starts(self) -> dict[str, int]:
        """The place of each tensor's first byte in the file."""
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return {name: 8 + size + header[name]["data_offsets"][0] for name in self.names}

    def dtype(self, name: str) -> "np.dtype[Any]":
        """A tensor's dtype; no data is read."""
        names = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
        return np.dtype(names[self._file.get_slice(name).get_dtype()])


class FileRows(LazyRows):
    """Rows in an open file, which is closed when they are gone.

    Array k of row i has the shape ``sizes[k][i]`` and begins at the byte ``offsets[k][i]``.
    """

    def __init__(
        self, descriptor: int, dtypes: Sequence["np.dtype[Any]"], sizes: Sequence[Array], offsets: Sequence[Array]
    ) -> None:
        self._descriptor = descriptor
        self._dtypes = dtypes
        self._sizes = sizes
        self._offsets = offsets
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def stored(cls, file: StoredFile, prefix: str = "") -> "FileRows":
        """The rows that ``row_tensors`` wrote."""
        inputs = sum(name.startswith(f"{prefix}shape.") for name in file.names)
        sizes = [file.array(f"{prefix}shape.{k}") for k in range(inputs)]
        dtypes = [file.dtype(f"{prefix}data.{k}") for k in range(inputs)]
        starts = file.starts()
        offsets = []
        for k, (size, dtype) in enumerate(zip(sizes, dtypes, strict=True)):
            counts = size.prod(axis=1)
            offsets.append(starts[f"{prefix}data.{k}"] + (np.cumsum(counts) - counts) * dtype.itemsize)
        return cls(os.open(file.path, os.O_RDONLY), dtypes, sizes, offsets)

    def __len__(self) -> int:
        return len(self._sizes[0])

    @property
    def shapes(self) -> Sequence[Shapes]:
        """The shapes of each row's arrays."""
        columns = [list(map(tuple, size.tolist())) for size in self._sizes]
        return list(zip(*columns, strict=True))

    def _row(self, index: int) -> Row:
        row = []
        for dtype, sizes, offsets in zip(self._dtypes, self._sizes, self._offsets, strict=True):
            array: Array = np.empty(tuple(sizes[index]), dtype)
            self._fill(array.reshape(-1).view(np.uint8).data, int(offsets[index]))
            row.append(array)
        return tuple(row)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._descriptor, [buffer[filled:]], offset + filled)
            if not count:
                raise SamplesError(
                    "a file of samples became shorter while it was read", "do not change it during a run"
                )
            filled += count


class Spool:
    """Rows on their way in: in memory up to ``MOST_IN_MEMORY_BYTES``, then in a temporary file without a name.

    ``folder`` is where that file lies; ``None`` for the system's folder for temporary files. Raises ``OutputError``
    where it cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._waiting: list[Row] = []
        self._waiting_bytes = 0
        self._dtypes: list[np.dtype[Any]] = []
        self._shapes: list[Shapes] = []
        self._offsets: list[tuple[int, ...]] = []
        self._end = 0

    def append(self, row: Row) -> None:
        """Take the next row."""
        self._waiting.append(row)
        self._waiting_bytes += sum(array.nbytes for array in row)
        if self._waiting_bytes > MOST_IN_MEMORY_BYTES:
            self._flush()

    def rows(self) -> Sequence[Row]:
        """All rows, in the order they came."""
        if self._descriptor is None:
            return self._waiting
        self._flush()
        inputs = range(len(self._dtypes))
        sizes = [np.array([shapes[k] for shapes in self._shapes], np.int64) for k in inputs]
        offsets = [np.array([starts[k] for starts in self._offsets], np.int64) for k in inputs]
        return FileRows(os.dup(self._descriptor), self._dtypes, sizes, offsets)

    def _flush(self) -> None:
        try:
            if self._descriptor is None:
                self._descriptor, name = tempfile.mkstemp(prefix="corewise-", dir=self._folder)
                weakref.finalize(self, os.close, self._descriptor)
                os.unlink(name)
                self._dtypes = [array.dtype for array in self._waiting[0]]
            with open(self._descriptor, "wb", closefd=False) as file:
                for row in self._waiting:
                    self._write(row, file)
        except OSError as error:
            place = self._folder or tempfile.gettempdir()
            raise OutputError(
                f"the samples cannot be kept in {place}: {error.strerror}", "free space, or use fewer samples"
            ) from error
        self._waiting = []
        self._waiting_bytes = 0

    def _write(self, row: Row, file: BinaryIO) -> None:
        starts = []
        for array in row:
            starts.append(self._end)
            self._end += file.write(array.tobytes())
        self._offsets.append(tuple(starts))
        self._shapes.append(tuple(array.shape for array in row))
