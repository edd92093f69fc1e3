"""Which texts run together: calls filled from length-sorted neighbours, so that padding costs less than it saves. Pure.

In a call all texts are padded to the longest one. Many short calls pay each call's overhead; few long ones pay for
padding. ``fill`` weighs the two with the cost of calls: among all ways to cut the length-sorted texts into calls it
takes the cheapest (dynamic programming over the cuts), so it is never worse than one call for each text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CallCost = Callable[[NDArray[np.int64], int], NDArray[np.float64]]
"""The cost of calls with these numbers of rows (R,), all padded to one number of tokens: (R,), in any unit."""

OVERHEAD_TOKENS = 16
"""What a call costs beside its tokens, in tokens, where nothing was measured."""
CALL_TOKENS = 4096
"""Rows times padded tokens of one call, at most: what bounds its memory."""
BLOCK = 16
"""Engines compute tokens in blocks of this many, the floats of AVX-512's registers, and an incomplete one costs extra.
With dynamic shapes OpenVINO takes less time for 48, 80 or 192 tokens than for four fewer (MiniLM in int8, Zen 4)."""


class Call(NamedTuple):
    """The texts of one call by their places in the input, the longest first, and the tokens that each is padded to."""

    places: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """The most that one call may have."""

    rows: int
    tokens: int = CALL_TOKENS
    """Rows times padded tokens. A single text may have more."""
    sizes: tuple[int, ...] = ()
    """The numbers of rows that a call may have beside 1; empty: any."""

    @classmethod
    def of_few_sizes(cls, rows: int, tokens: int = CALL_TOKENS) -> "CallLimits":
        """Calls of up to ``rows`` rows, but of few numbers of rows.

        Engines prepare each new shape once, and that takes OpenVINO about as long as a short call.
        """
        steps = {step * 2**k for k in range(rows.bit_length()) for step in (2, 3)}
        return cls(rows=rows, sizes=tuple(sorted({1, *(size for size in steps if size < rows), rows})), tokens=tokens)


def by_tokens(rows: NDArray[np.int64], tokens: int) -> NDArray[np.float64]:
    """The cost where nothing was measured: the padded tokens, and ``OVERHEAD_TOKENS`` for the call."""
    return np.asarray(rows * tokens + OVERHEAD_TOKENS, np.float64)


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Measured milliseconds of calls over their rows and padded tokens, interpolated between the points.

    ``ms[i][j]`` is a call of ``rows[i]`` rows of ``tokens[j]`` tokens. Beyond the table, time grows in proportion to
    the last point. Raises ``ValueError`` if rows or tokens do not rise, or a time is not above 0.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    incomplete: tuple[float, ...] = ()
    """How many times as long calls take whose last block is incomplete, by equal steps of its tokens: for blocks of 16,
    three numbers are for 4, 8 and 12 of them. Shorter texts than a block are in the table as they are."""

    def __post_init__(self) -> None:
        rising = all(a < b for axis in (self.rows, self.tokens) for a, b in pairwise(axis))
        whole = len(self.ms) == len(self.rows) > 0 and all(len(row) == len(self.tokens) > 0 for row in self.ms)
        if not rising or not whole or min(self.rows[0], self.tokens[0]) < 1 or min(map(min, self.ms)) <= 0:
            raise ValueError("a cost table has rising rows and tokens of 1 or more, and times above 0")

    def __call__(self, rows: NDArray[np.int64], tokens: int) -> NDArray[np.float64]:
        """Milliseconds of calls with these numbers of rows."""
        factor = max(1.0, tokens / self.tokens[-1]) * self._incomplete(tokens)
        column = [float(np.interp(tokens, self.tokens, row)) * factor for row in self.ms]
        return np.interp(rows, self.rows, column) * np.maximum(1.0, rows / self.rows[-1])

    def _incomplete(self, tokens: int) -> float:
        """The factor for the last block, which has ``tokens``."""
        if tokens < BLOCK or not self.incomplete:
            return 1.0
        return (1.0, *self.incomplete)[(tokens % BLOCK) * (len(self.incomplete) + 1) // BLOCK]


def fill(
    lengths: Sequence[int],
    *,
    limits: CallLimits,
    cost: CallCost = by_tokens,
    instances: int = 1,
    multiple: int = 1,
    pads: bool = True,
) -> list[Call]:
    """Put texts into calls at the least total cost, the longest texts first.

    Args:
        lengths: The tokens of each text, (N,), 1 or more.
        limits: The most that one call may have.
        cost: What a call costs.
        instances: How many calls run at the same time: none gets more than its share of the texts.
        multiple: Texts are padded to a multiple of this many tokens, so that fewer shapes occur, or to whole blocks
            where ``cost`` says that those take less time.
        pads: Whether texts may be padded at all; else those of one length share calls.

    Returns:
        The calls, each text in exactly one.

    Example:
        >>> [call.places for call in fill([3, 40, 4, 3], limits=CallLimits(rows=8))]
        [(1,), (2, 0, 3)]
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    step = multiple if pads else 1
    most_rows = max(1, min(limits.rows, -(-len(lengths) // instances)))
    padded = [-(-int(lengths[place]) // step) * step for place in order]
    if pads:
        cheaper = {tokens: _in_blocks(tokens, most_rows, limits, cost) for tokens in set(padded)}
        padded = [cheaper[tokens] for tokens in padded]
    counts = np.arange(1, most_rows + 1)
    allowed = np.isin(counts, (1, *limits.sizes)) if limits.sizes else counts > 0
    costs = {tokens: np.where(allowed, cost(counts, tokens), np.inf) for tokens in set(padded)}
    total = np.zeros(len(padded) + 1)
    """The least cost of the texts from each place on."""
    best = [0] * len(padded)
    equal = 0
    """How many texts from a place on have its length."""
    for start in range(len(padded) - 1, -1, -1):
        tokens = padded[start]
        equal = equal + 1 if padded[start : start + 2] == [tokens] * 2 else 1
        most = max(1, min(most_rows, len(padded) - start if pads else equal, limits.tokens // tokens))
        options = costs[tokens][:most] + total[start + 1 : start + 1 + most]
        best[start] = int(np.argmin(options)) + 1
        total[start] = options[best[start] - 1]
    calls, start = [], 0
    while start < len(padded):
        stop = start + best[start]
        calls.append(Call(tuple(int(place) for place in order[start:stop]), padded[start]))
        start = stop
    return calls


def _in_blocks(tokens: int, most_rows: int, limits: CallLimits, cost: CallCost) -> int:
    """The tokens, or those of whole blocks if such calls are cheaper."""
    whole = -(-tokens // BLOCK) * BLOCK
    rows = np.array([max(1, min(most_rows, limits.tokens // whole))])
    return whole if cost(rows, whole)[0] < cost(rows, tokens)[0] else tokens
