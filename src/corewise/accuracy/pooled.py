"""Scores that only all samples together have, such as a correlation or an average precision."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Pooled:
    """One score of all samples, which any selection of them can be given again without running the metric again.

    A metric that returns it is resampled fast: what each sample contributes (matches, errors, ranks) is found once.
    """

    of_rows: Callable[[Rows], float]
    """The score of some samples, with repetitions; NaN where they have none."""
    samples: int
    members: Rows | None = None
    """Numbers from 0 the samples that only count together, such as the two sentences of a pair: (samples,)."""

    @property
    def value(self) -> float:
        """The score of all samples."""
        return float(self.of_rows(np.arange(self.samples)))


def share_of(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> Pooled:
    """The sum of ``parts`` over that of ``wholes``, one of each for a sample: (N,)."""

    def of_rows(rows: Rows) -> float:
        whole = float(wholes[rows].sum())
        return float(parts[rows].sum()) / whole if whole else float("nan")

    return Pooled(of_rows, len(parts))


def mean_share_of(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> Pooled:
    """The mean over classes of the share of ``parts`` in ``wholes``, both (N, classes); absent classes do not count."""

    def of_rows(rows: Rows) -> float:
        part, whole = parts[rows].sum(axis=0), wholes[rows].sum(axis=0)
        present = whole > 0
        return float((part[present] / whole[present]).mean()) if present.any() else float("nan")

    return Pooled(of_rows, len(parts))
