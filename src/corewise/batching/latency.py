"""How long a call takes by its batch: what all decisions about batches and admission rest on. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import Literal, Self

import numpy as np

from corewise.records.measurement import Measurement


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds of one call over its batch, as (batch, ms): batches rise, and no larger one is faster."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points))
        if not self.points or not rising or self.points[0][0] < 1 or not 0 < self.points[0][1] < inf:
            raise ValueError(f"a latency table rises in batch and time, from above 0; this one is {self.points}")

    @classmethod
    def of(cls, measurements: Sequence[Measurement], figure: Literal["p50_ms", "p99_ms"] = "p99_ms") -> Self:
        """The table of measurements of one build that differ only in the batch.

        With p99 nearly all admitted requests are in time; with p50 more are admitted, and the last ones are often late.
        A batch measured faster than a smaller one counts as slow as that one. Raises ``ValueError`` if there is no
        measurement, or if threads or instances differ.
        """
        if len({(m.plan.threads_per_instance, m.plan.instances) for m in measurements}) != 1:
            raise ValueError("a latency table needs measurements with the same threads and instances")
        ordered = sorted((m.plan.batch, float(getattr(m, figure))) for m in measurements)
        slowest = accumulate((ms for _, ms in ordered), max)
        return cls(points=tuple({batch: ms for (batch, _), ms in zip(ordered, slowest, strict=True)}.items()))

    def latency_ms(self, rows: int) -> float:
        """Latency of a call with ``rows`` items: interpolated; above the table, in proportion to the last point."""
        batches, ms = zip(*self.points, strict=True)
        return float(np.interp(rows, batches, ms)) * max(1.0, rows / float(batches[-1]))
