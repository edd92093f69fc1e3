"""How near two answers to the same rows are: alone and in a batch, or in two calls."""

from collections.abc import Sequence
from math import log10

import numpy as np

EQUAL_DB = 200.0
"""Stands for "no difference", and caps smaller differences."""


def worst_row_db(expected: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> float:
    """Signal-to-noise ratio of the row and output that differ most, in decibels.

    The noise of a row is set against the mean size of the output's rows, so that a row that is nearly zero does not
    count as far off. A difference of one part in a thousand is 60 dB.

    Args:
        expected: The outputs, each (rows, ...); floats, integers or booleans.
        answers: The same outputs for the same rows, from another call.

    Returns:
        Between -200 (nothing in common, other shapes, or NaN on one side only) and 200 (equal).
    """
    return min(map(_output_db, expected, answers), default=EQUAL_DB)


def _output_db(expected: np.ndarray, answers: np.ndarray) -> float:
    if expected.shape != answers.shape:
        return -EQUAL_DB
    if np.array_equal(expected, answers, equal_nan=expected.dtype.kind in "fc"):
        return EQUAL_DB
    rows = len(expected)
    ours = expected.reshape(rows, -1).astype(np.float64)
    theirs = answers.reshape(rows, -1).astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        noise = np.square(np.where(same, 0.0, ours - theirs)).sum(axis=1).max()
    signal = np.square(np.where(np.isfinite(ours), ours, 0.0)).sum(axis=1).mean()
    if not np.isfinite(noise) or not signal:
        return -EQUAL_DB
    return float(np.clip(10 * log10(signal / noise), -EQUAL_DB, EQUAL_DB))
