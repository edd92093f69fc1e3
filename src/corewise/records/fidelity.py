"""The record of how close a candidate's outputs are to fp32's."""

from dataclasses import dataclass
from typing import Literal

Basis = Literal["named", "labels", "answers", "outputs"]
"""What decided: a metric that the user named; labels, by the metric that fits them; whether top-1 answers are fp32's;
how close the outputs are to fp32's, because no other metric fits them."""


@dataclass(frozen=True, kw_only=True)
class GroupFidelity:
    """How close one group of an output's channels is to fp32's, beside the floor that holds for it."""

    name: str
    """The channels in Python's notation, for example ``output_0[:, 4:84]``; ``output_0`` alone for a whole output."""
    sqnr_db: float
    """10 log10(variance of fp32 over samples / error power). For integers: -10 log10(share of values that differ)."""
    floor_db: float
    """The lowest ``sqnr_db`` that passes."""
    correlation: float | None = None
    """Correlation with fp32 over samples; ``None`` for integers and for outputs that never change."""
    worst_channel: str = ""
    """The channel with the lowest SQNR of those that carry a signal; empty where channels were not judged alone."""
    worst_channel_db: float = 200.0
    channel_floor_db: float = -200.0
    """The lowest ``worst_channel_db`` that passes."""

    @property
    def passed(self) -> bool:
        """Whether the group and its worst channel reach their floors."""
        return self.sqnr_db >= self.floor_db and self.worst_channel_db >= self.channel_floor_db


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A candidate against fp32 on the holdout: the metric's paired drop and how close the outputs are."""

    metric: str
    samples: int
    baseline_value: float
    value: float
    drop: float
    """By how much the candidate is worse than fp32, in the metric's own unit: positive is worse."""
    drop_low: float
    drop_high: float
    """The 95 % confidence interval of the paired drop."""
    sqnr_db: float
    """10 log10(signal power / error power) over all floating outputs; capped at 200 for equal ones."""
    cosine: float
    """Mean over samples of the cosine between fp32's and the candidate's outputs."""
    agreement: float | None
    """Share of samples with fp32's top-1 answer; ``None`` where outputs are no class scores."""
    lower_is_better: bool = False
    """Whether the metric is an error: ``drop`` is then ``value - baseline_value``."""
    basis: Basis = "named"
    suggested_metrics: tuple[str, ...] = ()
    """Built-in metrics that fit such outputs and could be named; empty unless ``basis`` is ``outputs``."""
    groups: tuple[GroupFidelity, ...] = ()
    """Every group of output channels, the worst first; empty in records of earlier versions."""
    worst_sample: str = ""
    """The sample whose outputs are farthest from fp32's, by the user's number or file name."""
    worst_sample_db: float = 200.0
    chance: float | None = None
    """What guessing scores; ``None`` where the metric does not say."""
    chance_limit: float | None = None
    """A fp32 model that scores less is hardly better than guessing."""
    shift: "Fidelity | None" = None
    """The same comparison on samples unlike those that calibrated; ``None`` where it was not made."""

    @property
    def worst_group(self) -> GroupFidelity | None:
        """The group that is nearest to its floor, or farthest below it."""
        return self.groups[0] if self.groups else None

    @property
    def below_floor(self) -> tuple[GroupFidelity, ...]:
        """The groups that fail their floors."""
        return tuple(group for group in self.groups if not group.passed)

    @property
    def near_chance(self) -> bool:
        """Whether fp32 itself is hardly better than guessing, so that labels or preprocessing are wrong."""
        return self.chance_limit is not None and self.baseline_value < self.chance_limit

    @property
    def shift_drop(self) -> float | None:
        """The drop on samples unlike those that calibrated."""
        return self.shift.drop if self.shift else None
