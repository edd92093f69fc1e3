"""The record of one build: its state, accuracy and measurements."""

from dataclasses import dataclass
from enum import StrEnum

from corewise.records.build import Build, Plan, Receipt
from corewise.records.fidelity import Fidelity
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import NOT_TRIED, Reason, ReasonKind

__all__ = ["FailedPlan", "Fidelity", "State", "Trial"]


class State(StrEnum):
    """The outcome of a trial."""

    OK = "ok"
    FAILED = "failed"
    REJECTED = "rejected"
    PRUNED = "pruned"


@dataclass(frozen=True, kw_only=True)
class FailedPlan:
    """A plan that a build could not run."""

    plan: Plan
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The outcome of one build, and why."""

    build: Build
    state: State
    reason: Reason
    """Why it failed or was rejected or pruned; if it is ok, its accuracy."""
    build_s: float = 0.0
    payload_bytes: int = 0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    """The engine's remarks about the build."""
    fidelity: Fidelity | None = None
    verified_per_s: float = 0.0
    """Items per second of the median batch while verifying: a first look at its speed; 0 if it was not verified."""
    measurements: tuple[Measurement, ...] = ()
    receipt: Receipt | None = None
    """What really ran in int8; ``None`` for other precisions and if the engine cannot say."""
    tuned: Reason | None = None
    """Why the search of this build's plans ended; ``None`` if its plans were not searched."""
    failed_plans: tuple[FailedPlan, ...] = ()
    loads: tuple[LoadRun, ...] = ()
    """Loads that were put on it to find the rate that meets the SLO, in their order."""
    load_failure: Reason | None = None
    """Why loads ended early."""

    @property
    def allowed(self) -> tuple[Measurement, ...]:
        """The measurements of plans that may be chosen."""
        return tuple(measurement for measurement in self.measurements if measurement.rejected is None)

    @property
    def inaccurate(self) -> bool:
        """Whether the accuracy gate rejected it: a rejected trial with measurements passed the gate."""
        return self.state == State.REJECTED and not self.measurements

    @property
    def certified(self) -> LoadRun | None:
        """The load that confirmed the rate it meets under the SLO; ``None`` if none did."""
        return next((load for load in self.loads if load.certified), None)

    @property
    def untried(self) -> bool:
        """Whether it was not even begun, because the budget has no time for it."""
        return not self.build_s and self.reason.kind in NOT_TRIED

    @property
    def skipped_tuning(self) -> bool:
        """Whether its plans were not searched because other builds promised more."""
        return self.tuned is not None and self.tuned.kind in (ReasonKind.MUCH_SLOWER, ReasonKind.OTHERS_FASTER)
