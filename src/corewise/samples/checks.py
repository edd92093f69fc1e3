"""NaN named where it comes in, before a model spreads it."""

from collections.abc import Sequence

import numpy as np

from corewise.common.errors import SamplesError
from corewise.samples.stored import Array


def check_finite(arrays: Sequence[Array], inputs: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Refuse NaN and infinity in a batch of a model's inputs.

    Args:
        arrays: The inputs, each (N, ...). Integers always pass.
        inputs: What each of them is called.
        names: What each of the N rows is called, e.g. ``sample 40 (cat/3.jpg)``; ``row 0``, ``row 1``, ... by default.

    Raises:
        SamplesError: Naming the first such row and its input.

    Example:
        >>> check_finite([np.array([[1.0], [np.nan]])], ["x"])
        Traceback (most recent call last):
        corewise.common.errors.SamplesError: row 1: x has NaN or infinite values; remove or repair that sample
    """
    for array, name in zip(arrays, inputs, strict=True):
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        place = f"row {row}" if names is None else names[row]
        raise SamplesError(f"{place}: {name} has NaN or infinite values", "remove or repair that sample")
