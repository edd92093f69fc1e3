"""The time a search may take, and how its stages share it."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import floor, inf, log2
from pathlib import Path
from typing import Self

from corewise.records.jsonable import from_json, to_json
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


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Seconds of what comes before the first trial."""

    samples_s: float = 0.0
    """Reading the samples."""
    export_s: float = 0.0
    """Importing torch, loading the model and exporting it."""


BASELINE_SHARE = 0.2
"""Most of the budget that the baseline takes."""
BASELINE_START_S = 4.0
"""Seconds until the baseline's process runs the first row (two cores of a Zen 4)."""
BASELINE_ROWS = 28
"""Rows that the baseline runs to choose its memory format and to warm up."""
BASELINE_CALLS = 6
"""Calls that measure its first plan."""
HOLDOUT_SHARE = 0.1
"""Most of the budget that eager PyTorch takes to answer the holdout, because every build and twin answers it too."""
CALIBRATION_SHARE = 0.15
"""Most of the budget that one pass of the calibration samples takes."""
FEWEST_HOLDOUT, FEWEST_CALIBRATION = 32, 48
CALL_S = 0.25
"""Under a budget the baseline's first plan has calls that are no longer, if one row allows it."""


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """How many samples a budget has time for."""

    budget_s: float
    holdout: int
    calibration: int

    def keep(self, path: Path) -> None:
        """Write them for a run that resumes: a row takes another time then, and other samples would start it again."""
        path.write_text(json.dumps(to_json(self)))

    @classmethod
    def kept(cls, path: Path, budget_s: float | None) -> Self | None:
        """Those of an earlier run with the same budget; ``None`` if there are none."""
        try:
            limits = from_json(cls, json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return limits if limits.budget_s == budget_s else None


def sample_limits(budget_s: float, row_s: float, calibration: int | None = None) -> SampleLimits:
    """The most samples to judge and to calibrate with, if a row takes ``row_s`` in eager PyTorch.

    The user's own number of calibration samples is kept.

    The baseline and the holdout keep within their shares. Both numbers are rounded down to steps of a third or half, so
    that the same command finds the same samples again most of the time.
    """
    batch = baseline_batch(row_s, 16)
    baseline_s = BASELINE_SHARE * budget_s - BASELINE_START_S
    holdout = min(baseline_s / row_s - BASELINE_ROWS - BASELINE_CALLS * batch, HOLDOUT_SHARE * budget_s / row_s)
    return SampleLimits(
        budget_s=budget_s,
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

    first_trials: float = 1.0
    """While no candidate has passed, trials are planned to end then."""
    trials: float = 0.6
    """No further trial begins."""
    last_trial: float = 0.7
    """An unfinished trial is ended if another candidate is finished: the plans of one are worth more than one more."""
    plans: float = 0.85
    """No further plan is measured."""
    race: float = 1.0
    """The race has as many rounds as fit in until then, but enough for an interval."""

    def ending_before(self, total_s: float | None, after_s: float) -> "BudgetSplit":
        """The same with ``after_s`` seconds of ``total_s`` for what follows the race, but at most a third of all."""
        if total_s is None:
            return self
        return replace(self, race=min(self.race, max(1 - after_s / total_s, 2 / 3)))

    def leaving(self, total_s: float | None, race_s: float) -> "BudgetSplit":
        """The same with ``race_s`` seconds of ``total_s`` for what follows the plans, but no more than half of all."""
        if total_s is None or (self.race - self.plans) * total_s >= race_s:
            return self
        left = max(self.race - race_s / total_s, self.race / 2)
        shorter = left / self.plans
        return replace(
            self,
            first_trials=min(1.0, left + LATE),
            trials=shorter * self.trials,
            last_trial=shorter * self.last_trial,
            plans=left,
        )


LATE = 0.15
"""Share of a short budget by which the first candidates may be late, so that the race ends about as much after it."""
RACE_S = 18.0
"""Seconds that the shortest race takes, with the latency table after it: two contenders started, six rounds (Zen 3)."""
FINISHING = 1.1
"""Share of the budget until which the winner is fitted to raw data: how photos are taken, what calls of texts cost."""
WITH_LOADS = BudgetSplit(trials=0.45, last_trial=0.55, plans=0.65)
"""For an SLO, whose loads need a minute or two."""
WITH_PHOTOS = BudgetSplit(trials=0.5, last_trial=0.6, plans=0.7, race=0.85)
"""For files of photos: how they are decoded, and under which plan, may win more than another build does."""
PHOTOS_S = 25.0
"""Seconds that this takes at least, after the winner was judged under shift (MobileNetV2, two slow cores with AMX)."""
