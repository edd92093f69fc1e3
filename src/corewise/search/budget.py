"""The time a search may take, and how its stages share it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import floor, inf, log2

from corewise.records.reason import Detail, Reason, ReasonKind


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time a search may take; ``None`` for no limit."""

    total_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return self.clock() - self.started_s

    def left_s(self, share: float = 1.0) -> float:
        """What is left of a share of the whole; ``inf`` without a limit."""
        return inf if self.total_s is None else share * self.total_s - self.elapsed_s

    def ended(self, share: float = 1.0) -> bool:
        """Whether that share is spent, so that nothing more may begin in it."""
        return self.left_s(share) <= 0

    def reason(self, kind: ReasonKind, **details: Detail) -> Reason:
        """A reason of that kind, with the budget's seconds and those that have passed."""
        assert self.total_s is not None  # without a limit the budget is no reason
        return Reason.of(kind, budget_s=self.total_s, elapsed_s=self.elapsed_s, **details)


BASELINE_SHARE = 0.2
"""Most of the budget that the baseline takes."""
BASELINE_START_S = 4.0
"""Seconds until the baseline's process runs the first row (two cores of a Zen 4)."""
BASELINE_ROWS = 28
"""Rows that the baseline runs to choose its memory format and to warm up."""
BASELINE_CALLS = 6
"""Calls that measure its first plan."""
CALIBRATION_SHARE = 0.15
"""Most of the budget that one pass of the calibration samples takes."""
FEWEST_HOLDOUT, FEWEST_CALIBRATION = 32, 48
CALL_S = 0.25
"""Under a budget the baseline's first plan has calls that are no longer, if one row allows it."""


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """How many samples a budget has time for."""

    holdout: int
    calibration: int


def sample_limits(budget_s: float, row_s: float, calibration: int | None = None) -> SampleLimits:
    """The most samples to judge and to calibrate with, if a row takes ``row_s`` in eager PyTorch.

    If the user said how many calibrate, so many do.

    The baseline answers the holdout within its share. Both are rounded down to steps of a third or half, so that the
    same command nearly always finds the same samples again.
    """
    batch = baseline_batch(row_s, 16)
    baseline_s = BASELINE_SHARE * budget_s - BASELINE_START_S
    holdout = baseline_s / row_s - BASELINE_ROWS - BASELINE_CALLS * batch
    return SampleLimits(
        holdout=_step_below(holdout, FEWEST_HOLDOUT),
        calibration=calibration or _step_below(CALIBRATION_SHARE * budget_s / row_s, FEWEST_CALIBRATION),
    )


def baseline_batch(row_s: float, most: int) -> int:
    """The batch of the baseline's first plan under a budget: ``most``, or fewer rows if calls would be long."""
    batch = most
    while batch > 1 and batch * row_s > CALL_S:
        batch //= 2
    return max(1, batch)


def _step_below(value: float, fewest: int) -> int:
    """The largest of ``fewest`` times 1, 1.5, 2, 3, 4, 6, ... that is not above ``value``; ``fewest`` if none is."""
    power = floor(log2(value / fewest)) if value > fewest else 0
    base = fewest * 2**power
    return int(1.5 * base) if 1.5 * base <= value else base


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """Shares of the budget at which a stage gives way to the next one."""

    trials: float = 0.6
    """No further trial begins."""
    last_trial: float = 0.7
    """An unfinished trial is ended if another candidate is finished: the plans of one are worth more than one more."""
    plans: float = 0.85
    """No further plan is measured."""
    race: float = 1.0
    """The race has as many rounds as fit in until then, but enough for an interval."""


FINISHING = 1.1
"""Share of the budget until which the winner is fitted to raw data: how photos are taken, what calls of texts cost."""
WITH_LOADS = BudgetSplit(trials=0.45, last_trial=0.55, plans=0.65)
"""For an SLO, whose loads need a minute or two."""
WITH_PHOTOS = BudgetSplit(trials=0.5, last_trial=0.6, plans=0.7, race=0.85)
"""For files of photos: how they are decoded, and under which plan, may win more than another build does."""
