"""Which samples are used where there are more than are wanted: drawn with a seed, each with the same chance."""

from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import SamplesError

MAX_SAMPLES = 2000
"""Drawn from files of raw samples unless the user names a number: what is decoded is kept on disk, and each candidate
is judged on all of it."""


class Draw:
    """Which items of a stream of unknown length are drawn: at most ``most``, or all of them for ``None``.

    Reservoir sampling (Vitter's algorithm R): ``slot`` says, item by item, which place an item takes, whose former
    holder then drops out. Raises ``SamplesError`` where ``most`` is below 2.
    """

    def __init__(self, most: int | None, seed: int) -> None:
        if most is not None and most < 2:
            raise SamplesError(f"max_samples is {most}", "give at least 2: one to calibrate, one to verify with")
        self._most = most
        self._seed = seed
        self._random = Random(seed)
        self.seen = 0

    def slot(self) -> int | None:
        """The next item's place, or ``None`` where it is not drawn."""
        self.seen += 1
        if self._most is None or self.seen <= self._most:
            return self.seen - 1
        place = int(self._random.random() * self.seen)
        return place if place < self._most else None

    def notes(self, noun: str) -> tuple[str, ...]:
        """A sentence for the report where some items were left out."""
        if self._most is None or self.seen <= self._most:
            return ()
        return (f"{self._most:,} of {self.seen:,} {noun} were drawn with seed {self._seed}",)


def draw(
    total: int, most: int | None, seed: int, groups: NDArray[Any] | None = None, noun: str = "samples"
) -> tuple[list[int], tuple[str, ...]]:
    """At most ``most`` of the numbers below ``total``, ascending, and a sentence for the report.

    Those of one group stay together; at least two groups are drawn, for a split needs two.
    """
    drawing = Draw(most, seed)
    slots = [(drawing.slot(), number) for number in range(total)]
    notes = drawing.notes(noun)
    if most is None or not notes:
        return list(range(total)), ()
    if groups is None:
        return sorted({slot: number for slot, number in slots if slot is not None}.values()), notes
    members, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(members))
    fits = np.cumsum(sizes[order]) <= most
    fits[:2] = True
    chosen = np.flatnonzero(np.isin(groups, members[order[fits]])).tolist()
    return chosen, (f"{len(chosen):,} of {total:,} {noun} were drawn with seed {seed}, in whole groups",)
