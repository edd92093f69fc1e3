"""Which values and sizes the inputs of a model may have."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ValueRange:
    """The integers from ``low`` to ``high``, both included; ``None`` is no bound on that side.

    It is the range of the whole input, or, with ``axis``, of ``start`` to ``stop`` of that dimension (as a slice).
    """

    low: int | None
    high: int | None
    axis: int | None = None
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """What one input may hold, by the tables that the model looks its values up in."""

    values: tuple[ValueRange, ...] = ()
    longest: tuple[int | None, ...] = ()
    """The largest size of each dimension; ``None`` is any."""
