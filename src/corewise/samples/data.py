"""The samples as a value: rows, labels and groups, what they are called, and the split."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import OutputError, SamplesError
from corewise.common.nested import Structure
from corewise.records.jsonable import from_json, to_json
from corewise.records.report import AudioPreprocess, Preprocess, TokenFacts
from corewise.samples.drawing import draw
from corewise.samples.labels import digest_bytes, label_tensors, stored_labels
from corewise.samples.stored import (
    Array,
    FileRows,
    LazyRows,
    Row,
    Shapes,
    StoredFile,
    Tensor,
    row_tensors,
    text_tensor,
    write,
)

if TYPE_CHECKING:
    from corewise.samples.raw import RawSamples


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Samples of one model's inputs.

    ``rows`` holds each sample's input arrays without batch dimension, flat in the order of ``structure``, which is
    that of the call's (args, kwargs). Arrays may differ in shape between samples, not in rank or dtype. Samples
    with the same number in ``groups`` belong together (the two sentences of a pair) and are never split apart.

    ``labels`` is an array (N, ...) of int64 or float64, or an object array (N,): of arrays where their sizes differ
    (a label for each token), of dicts of arrays (boxes and classes of a detector), or of strings (transcripts).

    ``numbers`` (N,) holds the user's own sample numbers and ``names`` file names or lines, where there are any:
    ``describe`` says which sample a row is, also after a split. ``notes`` are sentences for the report: what was
    skipped, set aside or drawn.

    Raises ``SamplesError`` where there are no samples, or labels, groups, numbers or names of another length.
    """

    rows: Sequence[Row]
    structure: Structure
    labels: Array | None = None
    groups: Array | None = None
    source: str = "python"
    preprocess: Preprocess | None = None
    numbers: Array | None = None
    names: Sequence[str] | None = None
    notes: tuple[str, ...] = ()
    tokens: TokenFacts | None = None
    """How long the texts were that the rows were made of; ``save`` leaves it out."""
    audio: AudioPreprocess | None = None
    """How the rows were made of recordings; ``save`` leaves it out."""
    originals: "RawSamples | None" = None
    """The images that the rows were made of, to be decoded in another way; ``save`` leaves them out."""
    call_rows: int | None = None
    """How many rows each call has of a model that takes no other number; ``save`` leaves it out."""

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise SamplesError(f"there are no samples in {self.source}", "give at least 2; a few hundred are better")
        for field in ("labels", "groups", "numbers", "names"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.rows):
                raise SamplesError(
                    f"{self.source} has {len(values)} {field} for {len(self.rows)} samples",
                    f"give as many {field} as samples",
                )
        for field, values, kinds in (("labels", self.labels, "biufO"), ("groups", self.groups, "iu")):
            if values is not None and values.dtype.kind not in kinds:
                raise SamplesError(f"the {field} of {self.source} are {values.dtype}", "give int64 or float64")

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, row: int) -> str:
        """Which of the user's samples a row is: ``sample 40 (cat/3.jpg)``."""
        number = row if self.numbers is None else int(self.numbers[row])
        return sample_name(number, None if self.names is None else self.names[row])

    @cached_property
    def shapes(self) -> Sequence[Shapes]:
        """The shapes of each sample's arrays; rows that lie in a file are not read for it."""
        if isinstance(self.rows, LazyRows):
            return self.rows.shapes
        return [tuple(array.shape for array in row) for row in self.rows]

    def take(self, indices: Iterable[int] | Array) -> "Samples":
        """The samples at ``indices``, in that order."""
        chosen = np.asarray(list(indices), np.int64)
        return replace(
            self,
            rows=_View(self.rows, chosen, self),
            labels=None if self.labels is None else self.labels[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            numbers=chosen if self.numbers is None else self.numbers[chosen],
            names=None if self.names is None else [self.names[index] for index in chosen],
            originals=None if self.originals is None else self.originals.take(chosen),
        )

    def draw(self, most: int | None, seed: int) -> "Samples":
        """At most ``most`` samples, drawn with ``seed``, in the order they had; groups stay whole.

        ``None`` takes all. Raises ``SamplesError`` where ``most`` is below 2.
        """
        chosen, notes = draw(len(self), most, seed, self.groups)
        return replace(self.take(chosen), notes=(*self.notes, *notes)) if notes else self

    def shuffled(self, seed: int) -> "Samples":
        """All samples in an order drawn with ``seed``, so that any few of them are like the rest.

        Class folders, for example, come class by class.
        """
        return self.take(np.random.default_rng(seed).permutation(len(self)))

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.int64], Row]]:
        """Stacked inputs of at most ``size`` samples, with the samples' indices.

        Samples of different shapes never share a batch; those of one shape keep their order.
        """
        waiting: dict[Shapes, list[tuple[int, Row]]] = {}
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
        for array in chain(chain.from_iterable(self.rows), (self.labels, self.groups)):
            for part in digest_bytes(array):
                digest.update(part)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one ``.safetensors`` file that ``load`` reads row by row. Raises ``OutputError``."""
        tensors = [*row_tensors(self.rows, self.shapes), *label_tensors(self.labels)]
        for name, values in (("groups", self.groups), ("numbers", self.numbers)):
            if values is not None:
                tensors.append(Tensor.whole(name, values))
        if self.names is not None:
            tensors.append(text_tensor("names", self.names))
        about = {
            "structure": self.structure.to_data(),
            "source": self.source,
            "preprocess": to_json(self.preprocess),
            "notes": list(self.notes),
        }
        try:
            write(path, tensors, {"corewise.samples": json.dumps(about)})
        except OSError as error:
            raise OutputError(f"the samples cannot be written to {path}: {error.strerror}", "free space") from error

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """The samples that ``save`` wrote; a row is read from the file when it is asked for.

        Raises ``SamplesError`` where the file is missing, damaged or another one.
        """
        from safetensors import SafetensorError

        try:
            file = StoredFile(path)
            about = json.loads(file.metadata["corewise.samples"])
            return cls(
                rows=FileRows.stored(file),
                structure=Structure.from_data(about["structure"]),
                labels=stored_labels(file),
                groups=file.array("groups") if "groups" in file.names else None,
                numbers=file.array("numbers") if "numbers" in file.names else None,
                names=file.texts("names") if "names" in file.names else None,
                source=about["source"],
                preprocess=from_json(Preprocess, about["preprocess"]) if about["preprocess"] else None,
                notes=tuple(about.get("notes", ())),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SamplesError(f"{path} is not a file of samples: {error}", "write it with Samples.save") from error


def sample_name(number: int, name: str | None = None) -> str:
    """What messages call a sample: ``sample 40``, or ``sample 40 (cat/3.jpg)``."""
    return f"sample {number} ({name})" if name else f"sample {number}"


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
            f"{calibration} of {total} samples cannot be for calibration, only 1 to {total - 1}",
            f"give at least {max(2, calibration + 1)} samples, or change the number of calibration samples",
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


class _View(LazyRows):
    """Some of the rows, in another order."""

    def __init__(self, rows: Sequence[Row], indices: NDArray[np.int64], of: Samples) -> None:
        self._rows = rows
        self._indices = indices
        self._of = of

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def shapes(self) -> Sequence[Shapes]:
        """The shapes of those rows."""
        shapes = self._of.shapes
        return [shapes[index] for index in self._indices]

    def _row(self, index: int) -> Row:
        return self._rows[int(self._indices[index])]


def _stack(members: list[tuple[int, Row]]) -> tuple[NDArray[np.int64], Row]:
    indices, rows = zip(*members, strict=True)
    return np.array(indices, np.int64), tuple(np.stack(column) for column in zip(*rows, strict=True))
