"""The time a search may take, and how its stages share it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from corewise.records.reason import Reason, ReasonKind


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

    def reason(self, kind: ReasonKind, **details: float) -> Reason:
        """A reason of that kind, with the budget's seconds."""
        assert self.total_s is not None  # without a limit the budget is no reason
        return Reason.of(kind, budget_s=self.total_s, **details)


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """Shares of the budget at which a stage gives way to the next one."""

    trials: float = 0.6
    """No further trial begins."""
    last_trial: float = 0.7
    """An unfinished trial is ended if another candidate is finished: the plans of one are worth more than one more."""
    plans: float = 0.85
    """No further plan is measured."""


WITH_LOADS = BudgetSplit(trials=0.45, last_trial=0.55, plans=0.65)
"""For an SLO, whose loads need a minute or two."""
