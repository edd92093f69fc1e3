"""Which calls of texts are timed, and the table of their costs that ``calls.fill`` weighs. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np

from corewise.pipeline.calls import BLOCK, CallLimits, CostTable

QUANTILES = (0.0, 0.5, 0.9, 1.0)
"""Quantiles of the samples' lengths at which calls are timed. Between them costs are interpolated."""
PROBE_TOKENS = 512
"""Rows times tokens of the calls that say what an incomplete block costs."""

Point = tuple[int, int]
"""Rows of a call, and the tokens that each is padded to."""


def cost_points(lengths: Sequence[int], limits: CallLimits, multiple: int) -> tuple[Point, ...]:
    """The calls that are worth timing, those of the fewest tokens first.

    Those of the table have whole blocks, or every number of tokens below one. Beside the median there are also some
    whose last block is incomplete.

    Args:
        lengths: The tokens of each sample, (N,).
        limits: The most that one call may have; one row may have more tokens.
        multiple: Texts are padded to a multiple of this many tokens, of which a block has several.
    """
    padded = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    typical = [int(np.quantile(padded, q, method="nearest")) for q in QUANTILES]
    base = max(BLOCK, typical[1] // BLOCK * BLOCK)
    around = (base, base + BLOCK) if base + BLOCK <= typical[-1] else ()
    below = range(typical[0], min(BLOCK, typical[-1] + 1), multiple)
    tokens = {*below, *(-(-size // BLOCK) * BLOCK for size in typical if size >= BLOCK), *around}
    rows = {*(2**k for k in range(limits.rows.bit_length())), limits.rows}
    points = {(count, size) for size in tokens for count in rows if count == 1 or count * size <= limits.tokens}
    if around:
        most = max(count for count in rows if count == 1 or count * base <= PROBE_TOKENS)
        points |= {(most, size) for size in range(base, base + BLOCK, multiple)}
    return tuple(sorted(points, key=lambda point: (point[0] * point[1], point)))


def cost_table(measured: Mapping[Point, float]) -> CostTable:
    """The table of timed calls; a call that was not timed costs in proportion to the nearest smaller one that was.

    No call costs more than a larger one: where it was slower, something else disturbed it.

    Args:
        measured: Milliseconds by rows and tokens, at least those of the call with the fewest of both.
    """
    probes = {point: ms for point, ms in measured.items() if point[1] > BLOCK and point[1] % BLOCK}
    measured = {point: ms for point, ms in measured.items() if point not in probes}
    rows, tokens = (sorted({point[axis] for point in measured}) for axis in (0, 1))
    ms: dict[Point, float] = {}
    for j, size in enumerate(tokens):
        for i, count in enumerate(rows):
            if (count, size) in measured:
                ms[count, size] = measured[count, size]
            elif i:
                ms[count, size] = ms[rows[i - 1], size] * count / rows[i - 1]
            else:
                ms[count, size] = ms[count, tokens[j - 1]] * size / tokens[j - 1]
    times = np.array([[ms[count, size] for size in tokens] for count in rows])
    for axis in (0, 1):
        times = np.flip(np.minimum.accumulate(np.flip(times, axis), axis), axis)
    incomplete = _incomplete(probes, measured)
    return CostTable(
        rows=tuple(rows), tokens=tuple(tokens), ms=tuple(map(tuple, times.tolist())), incomplete=incomplete
    )


def _incomplete(probes: Mapping[Point, float], measured: Mapping[Point, float]) -> tuple[float, ...]:
    """What the probes took of what lies between the whole blocks around them; empty if one was not timed."""
    factors = []
    for (rows, tokens), ms in sorted(probes.items()):
        start = tokens // BLOCK * BLOCK
        around = [measured.get((rows, size)) for size in (start, start + BLOCK)]
        if around[0] is None or around[1] is None:
            return ()
        between = around[0] + (around[1] - around[0]) * (tokens - start) / BLOCK
        factors.append(max(1.0, ms / between))
    return tuple(factors)
