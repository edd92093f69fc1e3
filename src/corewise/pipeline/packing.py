"""Several texts in one row: which go together, the arrays of a call, and each text's answer of its output. Pure."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.pipeline.calls import Call, CallCost
from corewise.records.pipeline import Packing

Arrays = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Ids, positions and segments of a call's rows, (rows, tokens) each."""


@dataclass(frozen=True)
class PackedCall:
    """The texts of each row of one call, by their places in the input."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def places(self) -> tuple[int, ...]:
        """All texts, row by row."""
        return tuple(place for row in self.rows for place in row)


def pack(lengths: Sequence[int], packing: Packing) -> list[PackedCall]:
    """Put texts into rows, and rows into calls: the longest text that still fits goes first (best fit).

    Args:
        lengths: The tokens of each text, (N,), 1 to ``packing.tokens``.
        packing: How long rows are, and how many a call has; the last call may have fewer.

    Returns:
        The calls, each text in exactly one.

    Example:
        >>> pack([40, 30, 20, 4], Packing(rows=2, tokens=64, texts=8, ms=1.0))
        [PackedCall(rows=((0, 2, 3), (1,)))]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    waiting = [lengths[place] for place in order]
    rows: list[tuple[int, ...]] = []
    while order:
        room, row = packing.tokens, list[int]()
        while len(row) < packing.texts and (fitting := bisect_right(waiting, room)):
            room -= waiting.pop(fitting - 1)
            row.append(order.pop(fitting - 1))
        rows.append(tuple(row))
    return [PackedCall(tuple(rows[start : start + packing.rows])) for start in range(0, len(rows), packing.rows)]


def packed_arrays(ids: Sequence[Sequence[NDArray[Any]]], packing: Packing, pad_id: int) -> Arrays:
    """The inputs of one call.

    Args:
        ids: The token ids (tokens,) of each text of each row; at most ``packing.rows`` rows, others are left empty.
        packing: The size of a call.
        pad_id: What fills a row behind its last text.
    """
    tokens = np.full((packing.rows, packing.tokens), pad_id, np.int64)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, texts in enumerate(ids):
        start = 0
        for number, one in enumerate(texts, 1):
            part = slice(start, start + len(one))
            tokens[row, part], positions[row, part], segments[row, part] = one, np.arange(len(one)), number
            start += len(one)
    return tokens, positions, segments


def unpacked(call: PackedCall, vectors: NDArray[Any]) -> NDArray[Any]:
    """The vectors (N, D) of a call's texts, in the order of its places, of its output (rows, texts, D)."""
    return np.concatenate([vectors[number, : len(row)] for number, row in enumerate(call.rows)])


def with_packing(
    lengths: Sequence[int],
    fill: Callable[[Sequence[int]], list[Call]],
    cost: CallCost,
    packing: Packing,
    instances: int,
    pays: Callable[[float], bool],
) -> Sequence[Call | PackedCall]:
    """The calls of texts: as ``fill`` gives them, or packed if that takes less time.

    As each instance runs one call after another, some are idle while the last packed ones run.

    Args:
        lengths: The tokens of each text, (N,).
        fill: Puts texts of such lengths into usual calls.
        cost: The milliseconds of usual calls.
        packing: The packed calls. Texts that are longer than a row have usual calls.
        instances: How many calls run at the same time.
        pays: Whether the milliseconds that packing would save are worth it.
    """
    usual = fill(lengths)
    short = [place for place, length in enumerate(lengths) if length <= packing.tokens]
    long = [place for place, length in enumerate(lengths) if length > packing.tokens]
    packed = pack([lengths[place] for place in short], packing)
    beside = fill([lengths[place] for place in long]) if long else []
    packed_ms = ceil(len(packed) / instances) * instances * packing.ms + total_ms(beside, cost)
    saved_ms = (total_ms(usual, cost) - packed_ms) / instances
    if saved_ms <= 0 or not pays(saved_ms):
        return usual
    return [
        *(call._replace(places=tuple(long[place] for place in call.places)) for call in beside),
        *(PackedCall(tuple(tuple(short[place] for place in row) for row in call.rows)) for call in packed),
    ]


def pack_few(
    lengths: Sequence[int], fill: Callable[[Sequence[int]], list[Call]], cost: CallCost, packing: Packing
) -> Sequence[Call | PackedCall]:
    """The calls of a few texts, which one instance runs one after another: packed, if that takes less time.

    A packed call has only the rows that it needs, and costs in proportion to them.

    Args:
        lengths: The tokens of each text, (N,), 1 to ``packing.tokens``.
        fill: As in ``with_packing``.
        cost: As in ``with_packing``.
        packing: As in ``with_packing``.
    """
    usual, packed = fill(lengths), pack(lengths, packing)
    packed_ms = packing.ms / packing.rows * sum(len(call.rows) for call in packed)
    return packed if packed_ms < total_ms(usual, cost) else usual


def total_ms(calls: Sequence[Call], cost: CallCost) -> float:
    """What all these calls cost together."""
    return sum(float(cost(np.array([len(call.places)]), call.tokens)[0]) for call in calls)
