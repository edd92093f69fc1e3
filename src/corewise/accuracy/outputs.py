"""A model's outputs for all rows of a holdout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import EngineError

Array = NDArray[Any]
Rows = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's flat outputs for all N holdout rows.

    Each is an array (N, ...), or, where its size varies by row, an object array (N,) of arrays.
    """

    leaves: tuple[Array, ...]

    def __post_init__(self) -> None:
        counts = [len(leaf) if leaf.ndim else 0 for leaf in self.leaves]
        if not counts or min(counts) != max(counts) or not counts[0]:
            what = f"outputs have {counts} rows"
            raise EngineError(what, "return at least one output, each with one row per sample on dimension 0")

    @classmethod
    def gather(cls, batches: Iterable[Sequence[Array]]) -> "Outputs":
        """Join what a session returned batch by batch: per batch one array (B, ...) per output.

        The rows come in the batches' order; ``rows(np.argsort(indices))`` puts them back into the samples'.
        """
        return cls(tuple(_join(column) for column in zip(*batches, strict=True)))

    def __len__(self) -> int:
        return len(self.leaves[0])

    def rows(self, rows: Rows) -> "Outputs":
        """These rows, in this order, with repetitions."""
        return Outputs(tuple(leaf[rows] for leaf in self.leaves))


def _join(parts: Sequence[Array]) -> Array:
    """One array (N, ...), or an object array (N,) where the shapes differ."""
    if not all(part.ndim for part in parts):
        raise EngineError("an output is a single number", "return one row per sample on dimension 0 of every output")
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    return ragged([row for part in parts for row in part])


def ragged(rows: Sequence[Any]) -> Array:
    """An object array (N,) of arrays whose shapes may differ."""
    array = np.empty(len(rows), dtype=object)
    for index, row in enumerate(rows):
        array[index] = row
    return array


def kind(output: Array) -> str:
    """The kind of the output's numbers, as ``numpy.dtype.kind`` has it."""
    return str((np.asarray(output[0]) if output.dtype == object else output).dtype.kind)
