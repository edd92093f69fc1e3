"""Whether the inputs and outputs of calls are like those of the search, by the ranges that these had.

An engine's kernels do not show the activations inside of a model. What can be watched whatever the engine is what goes
in and what comes out. Of samples like those of the search a known share leaves the ranges: the next of n + 1 samples
that could change places is below all others with a chance of 1 / (n + 1), and above them with the same. More than that
says that the samples are of another kind, for which int8's ranges, and the verdict about its accuracy, may not hold.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from corewise.common.phrases import percent
from corewise.records.build import TensorSpec
from corewise.records.ranges import SeenRange, SeenRanges
from corewise.records.report import Preprocess
from corewise.samples.images import normalize_pixels

MOST_CHANNELS = 4096
"""If an output has more channels, the extremes of the whole are kept."""
ROWS = 16
"""Rows of a call that are looked at."""
EVERY_S = 0.01
"""No more than one call in this time is looked at."""
RECENT_ROWS = 1000
FEWEST_ROWS = 200
"""There is no warning before this many rows were looked at."""
MANY, LEAST = 5.0, 0.01
"""Misses are too frequent at this multiple of the expected rate, if they are at least this share of all checks."""
ROUNDING = 1e-3
"""Share of a range by which a value may exceed it: other kernels round differently."""


def seen_range(spec: TensorSpec, batches: Iterable[np.ndarray]) -> SeenRange | None:
    """The extremes of one input or output, (N, ...), in all batches; ``None`` of integers and of varying channels."""
    if not spec.dtype.startswith("float"):
        return None
    low = high = np.zeros(0)
    samples = 0
    for batch in batches:
        if batch.dtype.kind != "f":
            return None
        lows, highs = _extremes(batch)
        if samples and lows.shape[1] != len(low):
            return None
        low = lows.min(axis=0) if not samples else np.minimum(low, lows.min(axis=0))
        high = highs.max(axis=0) if not samples else np.maximum(high, highs.max(axis=0))
        samples += len(batch)
    if not samples or not (np.isfinite(low).all() and np.isfinite(high).all()):
        return None
    return SeenRange(name=spec.name, samples=samples, low=tuple(map(float, low)), high=tuple(map(float, high)))


def _extremes(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each row and channel, (N, C): channels are dimension 1 of 2 or of 4."""
    channels = batch.shape[1] if batch.ndim in (2, 4) and batch.shape[1] <= MOST_CHANNELS else 1
    parts = batch.reshape(len(batch), channels, -1)
    if not parts.shape[2]:
        return np.zeros((len(batch), channels)), np.zeros((len(batch), channels))
    return parts.min(axis=2).astype(np.float64), parts.max(axis=2).astype(np.float64)


def pixel_extremes(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """What ``RangeWatch.see`` takes for pixels, uint8 (N, H, W, C): their normalized extremes, (N, C, 1, 2)."""
    levels = pixels[:ROWS].reshape(min(ROWS, len(pixels)), 1, -1, pixels.shape[3])
    return normalize_pixels(np.concatenate((levels.min(2, keepdims=True), levels.max(2, keepdims=True)), 2), preprocess)


@dataclass(frozen=True, kw_only=True)
class Outside:
    """How often extremes of rows left the ranges of the search."""

    checks: int
    """Extremes that were compared: two for each row and channel that was looked at."""
    outside: int
    """How many of them were outside."""
    share: float
    """The share that was outside among the last 1,000 rows looked at."""
    expected_share: float
    """The share that is outside for samples like those of the search."""
    many: bool
    """Whether that is so often that the samples must be of another kind."""

    @property
    def words(self) -> str:
        """One sentence."""
        return (
            f"{percent(self.share, 1)} of the extremes of inputs and outputs are outside of the ranges that the search "
            f"saw ({percent(self.expected_share, 1)} are expected): these may be samples that its accuracy was not "
            "judged on"
        )


class RangeWatch:
    """Compares calls with the ranges of the search. Thread-safe."""

    def __init__(self, seen: SeenRanges | None) -> None:
        """Without ranges it watches nothing."""
        kept = seen or SeenRanges(inputs=(), outputs=())
        self._inputs, self._outputs = ([_Limits.of(one) for one in part] for part in (kept.inputs, kept.outputs))
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._rows = self._checks = self._outside = 0
        self._recent_checks = self._recent_outside = self._recent_expected = 0.0
        self.watching = any(limits is not None for limits in (*self._inputs, *self._outputs))

    @property
    def is_due(self) -> bool:
        """Whether a call would be looked at now."""
        return self.watching and time.monotonic() >= self._next_s

    def see(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> bool:
        """Look at some rows of a call, unless another one was looked at just before; whether it was looked at."""
        now_s = time.monotonic()
        if not self.watching or now_s < self._next_s:
            return False
        self._next_s = now_s + EVERY_S
        checks, outside, expected = 0, 0, 0.0
        for limits, array in zip((*self._inputs, *self._outputs), (*inputs, *outputs), strict=True):
            if limits is not None:
                low, high = _extremes(array[:ROWS])
                if low.shape[1] == len(limits.low):
                    outside += int((low < limits.low).sum() + (high > limits.high).sum())
                    checks += 2 * low.size
                    expected += 2 * low.size / (limits.samples + 1)
        rows = min(ROWS, len(inputs[0]))
        with self._lock:
            kept = max(0.0, 1 - rows / RECENT_ROWS)
            self._rows += rows
            self._checks += checks
            self._outside += outside
            self._recent_checks = kept * self._recent_checks + checks
            self._recent_outside = kept * self._recent_outside + outside
            self._recent_expected = kept * self._recent_expected + expected
        return True

    @property
    def outside(self) -> Outside | None:
        """What was seen; ``None`` before anything was."""
        with self._lock:
            if not self._recent_checks:
                return None
            share, expected = (part / self._recent_checks for part in (self._recent_outside, self._recent_expected))
            many = self._rows >= FEWEST_ROWS and share >= max(MANY * expected, LEAST)
            return Outside(checks=self._checks, outside=self._outside, share=share, expected_share=expected, many=many)


@dataclass(frozen=True)
class _Limits:
    """A range with room for rounding."""

    samples: int
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, seen: SeenRange | None) -> "_Limits | None":
        if seen is None:
            return None
        low, high = np.asarray(seen.low), np.asarray(seen.high)
        room = ROUNDING * (high - low) + 1e-5 * np.maximum(np.abs(low), np.abs(high))
        return cls(seen.samples, low - room, high + room)
