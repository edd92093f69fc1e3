"""Events of a search, which a display shows as they happen."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from corewise.records.build import Build, Plan
from corewise.records.measurement import LoadRun, Rates
from corewise.records.reason import Reason, Step
from corewise.records.trial import Trial


class Stage(StrEnum):
    """A step outside the trials."""

    READING_SAMPLES = "reading the samples"
    EXPORTING = "exporting the model"
    TUNING_PLANS = "searching plans"
    LOADING = "putting under load"
    MEASURING_PLAN = "measuring a plan"
    RACING = "racing"
    FROM_FILES = "measuring from files to answers"
    UNDER_SHIFT = "judging on samples unlike those that calibrated"
    QUANTIZING = "quantizing"
    QUANTIZING_LAYERS = "quantizing layers"
    TIMING_LAYERS = "timing layers"


@dataclass(frozen=True)
class StageStarted:
    """A step outside the trials began; the other fields are its subject."""

    stage: Stage
    build: Build | None = None
    plan: Plan | None = None
    count: int = 0
    """Number of builds, plans or layers."""
    samples: int = 0


@dataclass(frozen=True)
class TrialStarted:
    """Trial ``number`` (from 1) of about ``total`` began."""

    build: Build
    number: int
    total: int


@dataclass(frozen=True)
class TrialStep:
    """The running trial went on to its next step."""

    build: Build
    step: Step
    plan: Plan | None = None


@dataclass(frozen=True)
class TrialEnded:
    """A trial has its record; a ``resumed`` one was read from the journal of an interrupted run."""

    trial: Trial
    resumed: bool = False


@dataclass(frozen=True)
class BuildsLeftUntried:
    """The budget has no time for further builds; ``reason`` names them."""

    reason: Reason


@dataclass(frozen=True)
class EarlierTrialsUnused:
    """An earlier run in the same place was another one; ``reason`` says what differs."""

    reason: Reason


@dataclass(frozen=True)
class LoadEnded:
    """A load on a build is over."""

    build: Build
    load: LoadRun


@dataclass(frozen=True)
class PlansTuned:
    """The search of a trial's plans, or the loads on it, ended."""

    trial: Trial


@dataclass(frozen=True)
class RaceRound:
    """Round ``round`` (from 1) of the race is measured; ``rates`` are those of all rounds so far."""

    round: int
    rounds: int
    rates: tuple[Rates, ...]


Event = (
    StageStarted
    | TrialStarted
    | TrialStep
    | TrialEnded
    | BuildsLeftUntried
    | EarlierTrialsUnused
    | LoadEnded
    | PlansTuned
    | RaceRound
)
OnEvent = Callable[[Event], None]
