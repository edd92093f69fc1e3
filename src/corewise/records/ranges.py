"""Which values and sizes the inputs of a model may have."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """The integers from ``low`` to ``high``, both included; ``None`` means no bound on that side.

    It holds for the whole input or, with ``axis``, for the slice ``start:stop`` of that dimension.
    """

    low: int | None
    high: int | None
    axis: int | None = None
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """The values and sizes that one input may have."""

    values: tuple[ValueRange, ...] = ()
    longest: tuple[int | None, ...] = ()
    """The largest size of each dimension; ``None`` means any."""
    shortest: tuple[int | None, ...] = ()
    """The smallest size, likewise; empty if all may be small, and in artifacts of older versions."""
    multiples: tuple[int | None, ...] = ()
    """What each size must be a multiple of, likewise."""


@dataclass(frozen=True, kw_only=True)
class SeenRange:
    """The extremes that one input or output had in the samples of the search."""

    name: str
    samples: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    """The extremes of each channel, or one pair for all."""


@dataclass(frozen=True, kw_only=True)
class SeenRanges:
    """The ranges of the calibration samples' inputs, and of the winner's outputs for the holdout.

    ``None`` stands for integers, which have no ranges.
    """

    inputs: tuple[SeenRange | None, ...]
    outputs: tuple[SeenRange | None, ...]
