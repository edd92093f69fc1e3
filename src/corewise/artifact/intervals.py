"""Intervals of whole numbers whose ends are linear in a model's inputs and sizes. Pure."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Region(NamedTuple):
    """The values of an input, or of ``start`` to ``stop`` of one of its dimensions."""

    input: str
    axis: int | None = None
    start: int = 0
    stop: int | None = None


class Linear(NamedTuple):
    """``constant`` plus each symbol times its factor; a symbol is a size (its name) or an input's values (a region)."""

    constant: int
    terms: frozenset[tuple[Hashable, int]] = frozenset()

    @classmethod
    def of(cls, symbol: Hashable) -> "Linear":
        """The symbol itself."""
        return cls(0, frozenset({(symbol, 1)}))

    def plus(self, other: "Linear") -> "Linear":
        """The sum."""
        factors = dict(self.terms)
        for symbol, factor in other.terms:
            factors[symbol] = factors.get(symbol, 0) + factor
        return Linear(self.constant + other.constant, frozenset((s, f) for s, f in factors.items() if f))

    def times(self, number: int) -> "Linear":
        """The product with a whole number."""
        return Linear(self.constant * number, frozenset((s, f * number) for s, f in self.terms if number))

    @property
    def follows_input(self) -> bool:
        """Whether an input's values are in it."""
        return any(isinstance(symbol, Region) for symbol, _ in self.terms)

    @property
    def is_natural(self) -> bool:
        """Whether it is 0 or more, whatever the sizes are."""
        return not self.follows_input and self.constant >= 0 and all(factor > 0 for _, factor in self.terms)


class Interval(NamedTuple):
    """The numbers from ``low`` to ``high``; ``None`` is an unknown end."""

    low: Linear | None
    high: Linear | None

    def plus(self, other: "Interval") -> "Interval":
        """The sums of a number of each."""
        low = None if self.low is None or other.low is None else self.low.plus(other.low)
        high = None if self.high is None or other.high is None else self.high.plus(other.high)
        return Interval(low, high)

    def times(self, number: int) -> "Interval":
        """The products with a whole number."""
        low, high = (None if end is None else end.times(number) for end in self)
        return Interval(low, high) if number >= 0 else Interval(high, low)

    @property
    def follows_input(self) -> bool:
        """Whether an input's values are at an end of it."""
        return any(end is not None and end.follows_input for end in self)

    @property
    def is_natural(self) -> bool:
        """Whether all its numbers are 0 or more, whatever the sizes are."""
        return self.low is not None and self.low.is_natural


class Values(NamedTuple):
    """The numbers of a tensor: each lies in one of the intervals."""

    intervals: tuple[Interval, ...]
    in_place: bool = False
    """Whether each number is still at the place that it has in the input."""

    @property
    def follows_input(self) -> bool:
        """Whether an input's values are among them."""
        return any(interval.follows_input for interval in self.intervals)

    @classmethod
    def between(cls, low: int, high: Linear) -> "Values":
        """Any numbers from ``low`` to ``high``."""
        return cls((Interval(Linear(low), high),))


class Limits:
    """The bounds of symbols that follow from inequalities."""

    def __init__(self) -> None:
        self.lows: dict[Hashable, int] = {}
        self.highs: dict[Hashable, int] = {}

    def require(self, index: Iterable[Interval], low: Linear, high: Linear) -> None:
        """Require all intervals to lie between ``low`` and ``high``."""
        for interval in index:
            if interval.low is not None:
                self._require_natural(interval.low.plus(low.times(-1)))
            if interval.high is not None:
                self._require_natural(high.plus(interval.high.times(-1)))

    def _require_natural(self, number: Linear) -> None:
        """Only bounds of a single symbol are kept: a range cannot express others."""
        if len(number.terms) != 1:
            return
        ((symbol, factor),) = number.terms
        if factor < 0:
            most = number.constant // -factor
            self.highs[symbol] = min(most, self.highs.get(symbol, most))
        else:
            least = -(number.constant // factor)
            self.lows[symbol] = max(least, self.lows.get(symbol, least))
