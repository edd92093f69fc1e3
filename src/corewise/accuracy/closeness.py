"""Metrics that need no labels: how close outputs are to fp32's."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.groups import CONSTANT, layouts
from corewise.accuracy.outputs import Array, kind
from corewise.accuracy.pooled import Pooled, Rows
from corewise.common.nested import flatten


class Energies(NamedTuple):
    """Sums of squares and products over all outputs of each sample: float64 arrays (N,)."""

    signal: NDArray[np.float64]
    error: NDArray[np.float64]
    candidate: NDArray[np.float64]
    product: NDArray[np.float64]

    @property
    def cosine(self) -> NDArray[np.float64]:
        """Each sample's cosine, (N,); 1 where both are all zero, 0 where only one is."""
        norm = np.sqrt(self.signal * self.candidate)
        alike = (self.signal == self.candidate).astype(np.float64)
        return np.asarray(np.clip(np.divide(self.product, norm, out=alike, where=norm > 0), -1, 1))


def cosine(outputs: Any, reference: Any) -> NDArray[np.float64]:
    """The cosine of each sample's outputs to the reference's, all arrays taken as one vector: (N,)."""
    return energies(flatten(reference)[0], flatten(outputs)[0]).cosine


def concordance(outputs: Any, reference: Any) -> Pooled:
    """Lin's concordance correlation with fp32 over samples, of the group of channels where it is lowest.

    1 - sum |candidate - fp32|^2 / (sum |fp32 - m|^2 + sum |candidate - m|^2), where m is fp32's mean over samples:
    a correlation that also falls where values are shifted or scaled. 1 for equal outputs, about 0 for unrelated ones
    (Lin, Biometrics 45, 1989). Integer outputs count by the share of equal values.
    """
    leaves, candidate_leaves = flatten(reference)[0], flatten(outputs)[0]
    columns = []
    for layout, ours, theirs in zip(layouts(leaves), leaves, candidate_leaves, strict=True):
        sums = layout.energies(ours, theirs)
        parts = np.stack([sums.signal, sums.candidate, sums.error, sums.raw])
        columns += [parts[:, :, channels].sum(axis=2) for channels in layout.groups]
    of_groups = np.stack(columns, axis=-1)

    def of_rows(rows: Rows) -> float:
        signal, candidate, error, raw = of_groups[:, rows].sum(axis=1)
        floor = CONSTANT**2 * raw
        whole = np.maximum(signal, floor) + np.maximum(candidate, floor)
        known = whole > 0
        return float(np.where(known, 1 - error / np.where(known, whole, 1), error == 0).min())

    return Pooled(of_rows, of_groups.shape[1])


def energies(reference: Sequence[Array], candidate: Sequence[Array]) -> Energies:
    """Over all floating outputs (over all, where none is floating) of equal shapes, where the reference is finite."""
    pairs = list(zip(reference, candidate, strict=True))
    floating = [pair for pair in pairs if kind(pair[0]) == "f"]
    signal, error, of_candidate, product = np.sum([_energies(*pair) for pair in floating or pairs], axis=0)
    return Energies(signal, error, of_candidate, product)


def _energies(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """The four rows of ``Energies`` of one output."""
    if reference.dtype == object:
        return np.concatenate([_energies(r[None], c[None]) for r, c in zip(reference, candidate, strict=True)], axis=1)
    wide = np.promote_types(reference.dtype, np.float32)
    r, c = (
        array.reshape(len(array), prod(array.shape[1:])).astype(wide, copy=False) for array in (reference, candidate)
    )
    if not (known := np.isfinite(r)).all():
        r, c = np.where(known, r, 0), np.where(known, c, 0)
    pairs = ((r, r), (c - r, c - r), (c, c), (r, c))
    return np.stack([np.einsum("nk,nk->n", a, b, dtype=np.float64) for a, b in pairs])
