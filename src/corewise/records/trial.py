"""The record of one build: its state, accuracy and measurements."""

from dataclasses import dataclass
from typing import Literal

from corewise.records.build import Build, Receipt
from corewise.records.fidelity import Fidelity
from corewise.records.goal import Goal
from corewise.records.measurement import LoadRun, Measurement

__all__ = ["Fidelity", "State", "Trial"]

State = Literal["ok", "failed", "rejected", "pruned"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The record of one build: what became of it and why."""

    build: Build
    state: State
    reason: str
    """Why it failed, was rejected or pruned; for ``ok`` what it achieved. In words."""
    build_s: float = 0.0
    payload_bytes: int = 0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    fidelity: Fidelity | None = None
    verified_per_s: float = 0.0
    """Items per second of the median batch while verifying: a first look at its speed, 0 where it got not so far."""
    measurements: tuple[Measurement, ...] = ()
    receipt: Receipt | None = None
    """What really ran in int8; ``None`` for other precisions and where the engine cannot tell."""
    explored: str = ""
    """Why the search of plans for this build ended; empty where its plans were not searched."""
    loads: tuple[LoadRun, ...] = ()
    """Loads that were put on it to find the rate it holds under the SLO, in their order."""

    def best(self, goal: Goal, slo_ms: float | None = None) -> Measurement | None:
        """The measurement that serves the goal best; ``None`` where there is none to choose.

        For an SLO of ``slo_ms`` that none was seen to hold, the fastest of those whose calls are within it.
        """
        choices = [one for one in self.measurements if not one.rejected]
        if not choices:
            return None
        if goal == "latency":
            return min(choices, key=lambda m: (m.plan.batch, m.p50_ms))
        if goal == "slo" and (held := self.promise) is not None:
            return next(one for one in self.measurements if one.plan == held.plan)
        if slo_ms is not None:
            within = [one for one in choices if one.p99_ms <= slo_ms]
            choices = within or [min(choices, key=lambda m: m.p99_ms)]
        return max(choices, key=lambda m: m.throughput_per_s)

    @property
    def inaccurate(self) -> bool:
        """Whether the accuracy gate rejected it; what is measured was let through, and rejected for something else."""
        return self.state == "rejected" and not self.measurements

    @property
    def promise(self) -> LoadRun | None:
        """The load that confirmed the rate that it held; ``None`` where none did."""
        return next((load for load in self.loads if load.promised), None)
