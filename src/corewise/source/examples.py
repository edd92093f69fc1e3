"""Batches of the user's samples to run and export a model with."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from corewise.common import nested
from corewise.records.build import TensorSpec
from corewise.samples import Samples

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some samples of one shape, stacked."""

    tensors: tuple[Tensor, ...]
    samples: tuple[int, ...]
    """The numbers of the samples that its rows are, from 0."""
    names: tuple[str, ...]
    """What the user calls them."""

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, indices: Sequence[int]) -> "Batch":
        """The batch of those rows, in that order."""
        chosen = list(indices)
        return Batch(
            tensors=tuple(tensor[chosen] for tensor in self.tensors),
            samples=tuple(self.samples[row] for row in chosen),
            names=tuple(self.names[row] for row in chosen),
        )


class Examples:
    """The samples of a model: their specs, and batches of them."""

    def __init__(self, samples: Samples, model: nn.Module) -> None:
        self._samples = samples
        self._shapes = [tuple(array.shape for array in row) for row in samples.rows]
        names = nested.input_names(samples.structure, _parameters(model))
        self.varying = [_varying([shapes[k] for shapes in self._shapes]) for k in range(len(names))]
        """For each input, the dimensions whose size differs between samples; the batch is not counted."""
        self.inputs = tuple(
            TensorSpec(name=name, dtype=array.dtype.name, shape=(None, *free(array.shape, dims)))
            for name, array, dims in zip(names, samples.rows[0], self.varying, strict=True)
        )

    def largest(self, rows: int) -> Batch:
        """A batch of samples of the largest shape; samples are repeated where there are too few."""
        return self._batch(max(self._shapes, key=_size), rows)

    def smallest(self, rows: int) -> Batch:
        """The same of the smallest shape."""
        return self._batch(min(self._shapes, key=_size), rows)

    def unlike(self, rows: int) -> Batch:
        """The same of the most frequent shape, all rows different: a repeated sample is scaled or reversed."""
        batch = self._batch(max(self._shapes, key=self._shapes.count), rows)
        first = {sample: row for row, sample in reversed(list(enumerate(batch.samples)))}
        tensors = [tensor.clone() for tensor in batch.tensors]
        for row, sample in enumerate(batch.samples):
            if first[sample] != row:
                for tensor in tensors:
                    tensor[row] = _changed(tensor[row], row)
        return replace(batch, tensors=tuple(tensors))

    def other(self, rows: int) -> Batch:
        """A batch of the shape of ``largest``, of other values: the last samples of that shape, scaled or reversed."""
        batch = self._batch(max(self._shapes, key=_size), rows, last=True)
        return replace(batch, tensors=tuple(_changed(tensor, 2) for tensor in batch.tensors))

    def ragged(self, rows: int) -> Batch | None:
        """A batch of samples from the largest to the smallest, with zeros behind their ends, and one step more for all.

        ``None`` where all samples have the same shape.
        """
        if not any(self.varying):
            return None
        order = sorted(range(len(self._shapes)), key=lambda number: _size(self._shapes[number]), reverse=True)
        numbers = [order[row * (len(order) - 1) // (rows - 1)] for row in range(rows)]
        inputs = zip(*(self._samples.rows[number] for number in numbers), strict=True)
        return Batch(
            tensors=tuple(map(_with_zeros, inputs, self.varying)),
            samples=tuple(numbers),
            names=tuple(map(self._samples.describe, numbers)),
        )

    def _batch(self, shapes: Shapes, rows: int, *, last: bool = False) -> Batch:
        fitting = [number for number, other in enumerate(self._shapes) if other == shapes]
        fitting = fitting[-rows:] if last else fitting[:rows]
        numbers = [fitting[row % len(fitting)] for row in range(rows)]
        stacked = zip(*(self._samples.rows[number] for number in numbers), strict=True)
        return Batch(
            tensors=tuple(torch.from_numpy(np.stack(arrays)) for arrays in stacked),
            samples=tuple(numbers),
            names=tuple(map(self._samples.describe, numbers)),
        )


def free(shape: Sequence[int], varying: set[int]) -> tuple[int | None, ...]:
    """The shape with ``None`` for the dimensions that vary."""
    return tuple(None if dim in varying else size for dim, size in enumerate(shape))


def _with_zeros(arrays: Sequence[np.ndarray], varying: set[int]) -> Tensor:
    """Arrays of different sizes, stacked: zeros make each as large as the largest, and by one in what varies."""
    largest = [max(sizes) + (dim in varying) for dim, sizes in enumerate(zip(*(a.shape for a in arrays), strict=True))]
    missing = [[(0, most - size) for most, size in zip(largest, a.shape, strict=True)] for a in arrays]
    return torch.from_numpy(np.stack([np.pad(a, pads) if pads else a for a, pads in zip(arrays, missing, strict=True)]))


def _changed(row: Tensor, number: int) -> Tensor:
    """Another row of the same kind: integers, as ids of tokens, stay within their range."""
    if row.is_floating_point():
        return row * (1 + number / 2)
    return row.flip(-1) if row.dim() else row


def _parameters(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except ValueError:  # a traced TorchScript module has none
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _varying(shapes: Sequence[tuple[int, ...]]) -> set[int]:
    """The dimensions whose size differs between samples."""
    return {dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}


def _size(shapes: Shapes) -> tuple[int, int]:
    # A dimension of size 1 comes last: torch.export takes it for a constant.
    sizes = [size for shape in shapes for size in shape]
    return -sizes.count(1), sum(sizes)
