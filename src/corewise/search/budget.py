"""The time a search may take, and how its stages share it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time a search may take; ``None`` for as long as it takes."""

    total_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    started_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Since the search began."""
        return self.clock() - self.started_s

    def left_s(self, share: float = 1.0) -> float:
        """What is left of a share of the whole; ``inf`` without a limit."""
        return inf if self.total_s is None else share * self.total_s - self.elapsed_s

    def ended(self, share: float = 1.0) -> str:
        """Why nothing more may be begun; empty where it may."""
        return self.spent if self.left_s(share) <= 0 else ""

    @property
    def spent(self) -> str:
        """``the budget of 300 s was spent``."""
        return f"the budget of {self.total_s:g} s was spent"


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """Of the budget: when a stage makes room for the next one."""

    trials: float = 0.6
    """No further trial is begun."""
    last_trial: float = 0.7
    """A trial is ended that is not done, if another candidate is: the plans of one are worth more than one more."""
    plans: float = 0.85
    """No further plan is begun."""


WITH_LOADS = BudgetSplit(trials=0.45, last_trial=0.55, plans=0.65)
"""Where loads follow, which need a minute or two."""
