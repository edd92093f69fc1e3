"""The samples as a value: rows, labels and groups, their file, and the split."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import OutputError, SamplesError
from corewise.common.nested import Structure
from corewise.records.jsonable import from_json, to_json
from corewise.records.report import Preprocess

Array = NDArray[Any]
Row = tuple[Array, ...]

SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Samples of one model's inputs.

    ``rows`` holds each sample's input arrays without batch dimension, flat in the order of ``structure``, which is
    that of the call's (args, kwargs). Arrays may differ in shape between samples, not in rank or dtype. Samples
    with the same number in ``groups`` belong together (the two sentences of a pair) and are never split apart.
    Raises ``SamplesError`` where there are none, or labels or groups of another length.
    """

    rows: Sequence[Row]
    structure: Structure
    labels: Array | None = None
    groups: Array | None = None
    source: str = "python"
    preprocess: Preprocess | None = None

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise SamplesError(f"there are no samples in {self.source}", "give at least 2; a few hundred are better")
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values is not None and len(values) != len(self.rows):
                raise SamplesError(
                    f"{self.source} has {len(values)} {name} for {len(self.rows)} samples",
                    f"give one of the {name} for each sample",
                )
            if values is not None and values.dtype.name not in SAFETENSORS_DTYPES:
                raise SamplesError(f"the {name} of {self.source} are {values.dtype}", "give int64 or float64")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Iterable[int] | Array) -> "Samples":
        """The samples at ``indices``, in that order."""
        chosen = np.asarray(list(indices), np.int64)
        return Samples(
            rows=_View(self.rows, chosen),
            structure=self.structure,
            labels=None if self.labels is None else self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            source=self.source,
            preprocess=self.preprocess,
        )

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.int64], Row]]:
        """Stacked inputs of at most ``size`` samples, with the samples' indices.

        Samples of different shapes never share a batch; those of one shape keep their order.
        """
        waiting: dict[tuple[tuple[int, ...], ...], list[tuple[int, Row]]] = {}
        for index, row in enumerate(self.rows):
            shapes = tuple(array.shape for array in row)
            members = waiting.setdefault(shapes, [])
            members.append((index, row))
            if len(members) == size:
                yield _stack(waiting.pop(shapes))
        for members in waiting.values():
            yield _stack(members)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the structure and every sample's inputs, label and group."""
        digest = sha256(json.dumps(self.structure.to_data()).encode())
        for array in (*(array for row in self.rows for array in row), self.labels, self.groups):
            digest.update(b"none" if array is None else f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one ``.safetensors`` file that ``load`` reads row by row.

        Input k of all samples is one flat tensor ``data.k`` with the samples' shapes, int64 (N, rank), in
        ``shape.k``; the rest is JSON in the file's metadata. Raises ``OutputError``.
        """
        tensors: list[_Tensor] = []
        for k, first in enumerate(self.rows[0]):
            shapes = np.array([row[k].shape for row in self.rows], np.int64)
            tensors.append(_Tensor(f"shape.{k}", shapes.dtype, shapes.shape, [shapes]))
            size = int(shapes.prod(axis=1).sum())
            tensors.append(_Tensor(f"data.{k}", first.dtype, (size,), map(itemgetter(k), self.rows)))
        for name, values in (("labels", self.labels), ("groups", self.groups)):
            if values is not None:
                tensors.append(_Tensor(name, values.dtype, values.shape, [values]))
        about = {"structure": self.structure.to_data(), "source": self.source, "preprocess": to_json(self.preprocess)}
        try:
            _write_safetensors(path, tensors, {"corewise.samples": json.dumps(about)})
        except OSError as error:
            raise OutputError(f"the samples cannot be written to {path}: {error.strerror}", "free space") from error

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """The samples that ``save`` wrote; a row is read from the file when it is asked for.

        Raises ``SamplesError`` where the file is missing, damaged or another one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(path, framework="numpy")
            names = file.keys()
            about = json.loads(file.metadata()["corewise.samples"])
            return cls(
                rows=_StoredRows(file),
                structure=Structure.from_data(about["structure"]),
                labels=file.get_tensor("labels") if "labels" in names else None,
                groups=file.get_tensor("groups") if "groups" in names else None,
                source=about["source"],
                preprocess=from_json(Preprocess, about["preprocess"]) if about["preprocess"] else None,
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SamplesError(f"{path} holds no samples of corewise: {error}", "write it with Samples.save") from error


def default_calibration(count: int) -> int:
    """How many of ``count`` samples calibrate: two fifths, at most 200, at least 1."""
    return max(1, min(200, count * 2 // 5))


def split(samples: Samples, *, calibration: int, seed: int) -> tuple[Samples, Samples]:
    """(calibration, holdout): disjoint, drawn with ``seed``, each in the order of ``samples``.

    Groups stay whole: calibration gets groups until it has ``calibration`` samples (or just more). Raises
    ``SamplesError`` where one of the two would be empty.
    """
    total = len(samples)
    if seed < 0:
        raise SamplesError(f"the seed is {seed}", "give 0 or more")
    if total < 2:
        raise SamplesError(f"{samples.source} has 1 sample", "give at least 2: one to calibrate, one to verify with")
    if not 1 <= calibration < total:
        raise SamplesError(
            f"{calibration} of {total} samples cannot be for calibration: 1 to {total - 1} can",
            f"give at least {max(2, calibration + 1)} samples or change the number for calibration",
        )
    members = np.arange(total) if samples.groups is None else samples.groups
    groups, sizes = np.unique(members, return_counts=True)
    if len(groups) < 2:
        raise SamplesError(f"all {total} samples are one group", "give at least 2 groups")
    order = np.random.default_rng(seed).permutation(len(groups))
    before = np.cumsum(sizes[order]) - sizes[order]
    # The last group is always left for the holdout.
    chosen = order[: min(int(np.count_nonzero(before < calibration)), len(groups) - 1)]
    calibrates = np.isin(members, groups[chosen])
    return samples.take(np.flatnonzero(calibrates)), samples.take(np.flatnonzero(~calibrates))


class _Rows(Sequence[Row]):
    """Rows that are made when they are asked for, by ``_row``."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    @abstractmethod
    def _row(self, index: int) -> Row: ...


class _View(_Rows):
    """Some of the rows, in another order."""

    def __init__(self, rows: Sequence[Row], indices: NDArray[np.int64]) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def _row(self, index: int) -> Row:
        return self._rows[int(self._indices[index])]


class _StoredRows(_Rows):
    """The rows of a file that ``Samples.save`` wrote; reading one touches only its own bytes of the file."""

    def __init__(self, file: Any) -> None:
        inputs = sum(name.startswith("shape.") for name in file.keys())  # noqa: SIM118
        self._shapes = [file.get_tensor(f"shape.{k}") for k in range(inputs)]
        self._data = [file.get_slice(f"data.{k}") for k in range(inputs)]
        self._ends = [np.cumsum(shapes.prod(axis=1)) for shapes in self._shapes]

    def __len__(self) -> int:
        return len(self._shapes[0])

    def _row(self, index: int) -> Row:
        row = []
        for shapes, data, ends in zip(self._shapes, self._data, self._ends, strict=True):
            shape, end = tuple(shapes[index]), int(ends[index])
            row.append(data[end - prod(shape) : end].reshape(shape))
        return tuple(row)


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written, in pieces."""

    name: str
    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    pieces: Iterable[Array]


def _stack(members: list[tuple[int, Row]]) -> tuple[NDArray[np.int64], Row]:
    indices, rows = zip(*members, strict=True)
    return np.array(indices, np.int64), tuple(np.stack(column) for column in zip(*rows, strict=True))


def _write_safetensors(path: Path, tensors: list[_Tensor], metadata: dict[str, str]) -> None:
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
