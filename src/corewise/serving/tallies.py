"""Histograms and counters that cost little to add to, for Prometheus.

``prometheus_client``'s own take a lock and look through all buckets for each value; these are added to by one thread,
the event loop's.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Tally:
    """One histogram: how many values lie in each bucket, and their sum."""

    __slots__ = ("_counts", "_upper", "total")

    def __init__(self, upper: Sequence[float]) -> None:
        """``upper`` are the buckets' upper bounds, which belong to them; above the last lies one more."""
        self._upper = upper
        self._counts = [0] * (len(upper) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._upper, value)] += 1
        self.total += value

    @property
    def cumulative(self) -> list[tuple[str, float]]:
        """Each bucket's bound, as Prometheus writes it, and how many values are at most that."""
        found, below = [], 0
        for bound, count in zip([*map(str, map(float, self._upper)), "+Inf"], self._counts, strict=True):
            below += count
            found.append((bound, float(below)))
        return found


class Histogram(Collector):
    """A ``Tally`` for each model."""

    def __init__(self, name: str, about: str, labels: Sequence[str], upper: Sequence[float]) -> None:
        self._name, self._about, self._labels, self._upper = name, about, labels, upper
        self._tallies: dict[tuple[str, ...], Tally] = {}

    def of(self, key: tuple[str, ...]) -> Tally:
        """The tally with these values of the labels."""
        if key not in self._tallies:
            self._tallies[key] = Tally(self._upper)
        return self._tallies[key]

    def collect(self) -> Iterable[Metric]:
        """As the registry has it."""
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        for key, tally in list(self._tallies.items()):
            family.add_metric(key, tally.cumulative, tally.total)
        return (family,)


class Count(Collector):
    """A number for each combination of labels."""

    def __init__(self, name: str, about: str, labels: Sequence[str]) -> None:
        self._name, self._about, self._labels = name, about, labels
        self.counts: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Iterable[Metric]:
        """As the registry has it."""
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for key, count in list(self.counts.items()):
            family.add_metric(key, count)
        return (family,)
