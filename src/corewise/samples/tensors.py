"""Samples from items, one after the other: checked, brought to one form, and kept in memory or in a file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from corewise.common import nested
from corewise.common.errors import InputError, SamplesError
from corewise.common.nested import Structure
from corewise.records.report import Preprocess
from corewise.samples.checks import check_finite
from corewise.samples.data import Samples, sample_name
from corewise.samples.drawing import Draw
from corewise.samples.labels import stack_labels
from corewise.samples.stored import Array, Row, Spool, to_array

INPUT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32")


class Item(NamedTuple):
    """A sample on its way in: the user's number for it, the model's inputs, and a label or ``None``."""

    number: int
    inputs: Any
    label: Any = None
    name: str | None = None
    group: int | None = None


def collect(
    items: Iterable[Item],
    *,
    source: str,
    preprocess: Preprocess | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    spool: Spool | None = None,
) -> Samples:
    """Check every item and bring it to one form; at most ``max_samples`` of them, drawn with ``seed``.

    ``spool`` moves many rows to a file; without one they stay in memory. Raises ``SamplesError`` naming the sample.
    """
    form = _Form(source)
    drawing = Draw(max_samples, seed)
    rows: list[Row] = []
    kept: list[Item] = []
    places: dict[int, int] = {}
    for item in items:
        slot = drawing.slot()
        if slot is None:
            continue
        places[slot] = len(kept)
        (spool or rows).append(form.row(item))
        kept.append(item._replace(inputs=None))
    if form.structure is None:
        raise SamplesError(f"there are no samples in {source}", "give at least 2; a few hundred are better")

    def describe(place: int) -> str:
        return sample_name(kept[place].number, kept[place].name)

    samples = Samples(
        rows=rows if spool is None else spool.rows(),
        structure=form.structure,
        labels=stack_labels([item.label for item in kept], describe, source),
        groups=number_groups([item.group for item in kept]),
        source=source,
        preprocess=preprocess,
        numbers=np.array([item.number for item in kept], np.int64),
        names=[item.name or "" for item in kept] if any(item.name for item in kept) else None,
        notes=drawing.notes("samples"),
    )
    return samples.take(sorted(places.values())) if samples.notes else samples


def number_groups(groups: Sequence[int | None]) -> Array | None:
    """The groups numbered from 0, (N,); ``None`` where samples are in none."""
    return None if None in groups else np.unique(np.array(groups), return_inverse=True)[1]


class _Form:
    """What the first sample looks like, which the others must."""

    def __init__(self, source: str) -> None:
        self.structure: Structure | None = None
        self._source = source
        self._names: tuple[str, ...] = ()
        self._first: Row = ()

    def row(self, item: Item) -> Row:
        """The item's arrays in the order of the structure."""
        place = f"{sample_name(item.number, item.name)} of {self._source}"
        args, kwargs = _call(item.inputs)
        try:
            if self.structure is None:
                leaves, self.structure = nested.flatten((args, kwargs), "inputs")
                self._names = nested.input_names(self.structure)
                if not self._names:
                    raise InputError("there is no array", "give numpy arrays or torch tensors")
            else:
                leaves = nested.match_call(self.structure, args, kwargs)
        except InputError as error:
            raise SamplesError(f"{place}: {error.what}", error.fix) from error
        where = [f"{place}: {name}" for name in self._names]
        row = tuple(map(_input, leaves, where))
        check_finite([array[None] for array in row], self._names, [place])
        self._first = self._first or row
        for array, first, name in zip(row, self._first, where, strict=True):
            _check_like(array, first, name)
        return row


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    return (inputs,), {}


def _input(value: Any, where: str) -> Array:
    array = to_array(value, where)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.name not in INPUT_DTYPES:
        raise SamplesError(f"{where} has dtype {array.dtype}", f"give one of {', '.join(INPUT_DTYPES)}")
    if not array.size:
        raise SamplesError(f"{where} is empty: its shape is {array.shape}", "remove that sample")
    return array


def _check_like(array: Array, first: Array, where: str) -> None:
    if array.dtype != first.dtype:
        raise SamplesError(f"{where} is {array.dtype}, but in the first sample it is {first.dtype}", "use one dtype")
    if array.ndim != first.ndim:
        raise SamplesError(
            f"{where} has shape {array.shape}, but in the first sample it has {first.shape}",
            "use one number of dimensions",
        )
