"""What happens while optimizing, as it happens: the search reports it, a display shows it."""

from collections.abc import Callable
from dataclasses import dataclass

from corewise.records.build import Build
from corewise.records.measurement import Rates
from corewise.records.trial import Trial


@dataclass(frozen=True)
class StageStarted:
    """A step outside the trials began, e.g. "exporting the program"."""

    text: str


@dataclass(frozen=True)
class TrialStarted:
    """Trial ``number`` (from 1) of about ``total`` began."""

    build: Build
    number: int
    total: int


@dataclass(frozen=True)
class TrialStep:
    """The running trial went on to its next step, e.g. "verifying on 300 samples"."""

    build: Build
    text: str


@dataclass(frozen=True)
class TrialEnded:
    """A trial has its record; a ``resumed`` one was read from the journal of an interrupted run."""

    trial: Trial
    resumed: bool = False


@dataclass(frozen=True)
class Explored:
    """The search of a trial's plans ended."""

    trial: Trial


@dataclass(frozen=True)
class FinalsRound:
    """Round ``round`` (from 1) of the alternating run is measured; ``rates`` are those of all rounds so far."""

    round: int
    rounds: int
    rates: tuple[Rates, ...]


Event = StageStarted | TrialStarted | TrialStep | TrialEnded | Explored | FinalsRound
OnEvent = Callable[[Event], None]
