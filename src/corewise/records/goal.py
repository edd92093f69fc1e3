"""What the user asks for."""

from dataclasses import dataclass
from typing import Literal

Goal = Literal["throughput", "latency", "slo"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the user wants: a goal, and how much of the metric may be lost for it."""

    goal: Goal = "throughput"
    max_drop: float = 0.01
    strict: bool = False
    """Ask the upper end of the drop's confidence interval to pass, not the estimate."""
    slo_ms: float | None = None
    """For the goal ``slo``: 99 % of requests must be answered within this time."""
    memory_limit_bytes: int | None = None
    """Plans whose process needs more memory are no choice."""
