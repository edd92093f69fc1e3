"""Why something happened, as a closed list with details; ``report.reasons`` makes the sentences."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

Detail = str | int | float | bool | None | list[str]


class Step(StrEnum):
    """What a trial process is doing."""

    STARTING = "starting"
    BUILDING = "building"
    OPENING = "opening"
    VERIFYING = "verifying"
    OBSERVING_INT8 = "observing its int8 layers"
    MEASURING = "measuring"
    WARMING_UP = "warming up for the race"
    RACING = "racing"
    UNDER_LOAD = "under load"


class ReasonKind(StrEnum):
    """Each kind's details are named by its template in ``report.reasons``."""

    TEXT = "text"
    """Words from elsewhere: an engine's error, or the record of an older version."""

    # Why a trial has its state.
    BASELINE = "baseline"
    ACCURATE = "accurate"
    INACCURATE = "inaccurate"
    BELOW_FLOOR = "below floor"
    NOT_JUDGED_UNDER_SHIFT = "not judged under shift"
    NOTHING_IN_INT8 = "nothing in int8"
    TOO_SLOW = "too slow"
    DEPENDS_ON_NEIGHBOURS = "depends on neighbours"
    BUDGET_SPENT = "budget spent"
    BUDGET_SPENT_BEFORE = "budget spent before"
    BUDGET_SPENT_DURING = "budget spent during"
    BUDGET_TOO_SHORT = "budget too short"
    BUDGET_BETTER_SPENT = "budget better spent"
    OVER_BUDGET = "over budget"
    STEP_FAILED = "step failed"
    HUNG = "hung"
    KILLED = "killed"
    CRASHED = "crashed"
    EXITED = "exited"
    UNRESPONSIVE = "unresponsive"

    # Why a plan was measured.
    FIRST_LOOK = "first look"
    OTHER_LAYOUT = "other layout"
    OTHER_THREADS = "other threads"
    SMALLER_BATCH = "smaller batch"
    LARGER_BATCH = "larger batch"
    SIMILAR_SPEED = "similar speed"
    TWINS_BEST = "twin's best"
    MEASURED_AGAIN = "measured again"
    LATENCY_TABLE = "latency table"
    SLO_TABLE = "SLO table"
    ELASTIC_TABLE = "elastic table"

    # Why a plan is no choice.
    OVER_MEMORY = "over memory"
    MEMORY_UNKNOWN = "memory unknown"

    # Why the search of a build's plans ended.
    FASTEST_PLAN = "fastest plan"
    FASTEST_CALL = "fastest call"
    MOST_WITHIN_SLO = "most within SLO"
    NONE_WITHIN_SLO = "none within SLO"
    NO_PLAN_ALLOWED = "no plan allowed"
    MUCH_SLOWER = "much slower"
    OTHERS_FASTER = "others faster"
    BASELINE_SHARE_SPENT = "baseline share spent"

    # Why a build won or lost.
    FASTER_THAN_BASELINE = "faster than baseline"
    NO_FINALIST_FASTER = "no finalist faster"
    ONLY_FINALIST = "only finalist"
    STAYS_BASELINE = "stays baseline"
    HIGHEST_RATE = "highest rate"
    SLOWER_THAN_WINNER = "slower than winner"
    LESS_ACCURATE = "less accurate"
    LOWER_RATE = "lower rate"
    NOT_A_FINALIST = "not a finalist"
    NOT_MEASURED = "not measured"

    # Doubts about the choice.
    SLO_UNCERTAIN = "SLO uncertain"
    NOTHING_FITS_MEMORY = "nothing fits memory"
    RACE_CONTRADICTS = "race contradicts"
    FEW_ROUNDS = "few rounds"
    SPEEDUP_UNCERTAIN = "speedup uncertain"
    DROP_UNCERTAIN = "drop uncertain"
    LOSES_UNDER_SHIFT = "loses under shift"
    NEAR_CHANCE = "near chance"
    NOISY = "noisy"

    # What limited the search.
    ENGINE_UNAVAILABLE = "engine unavailable"
    ONLY_EAGER = "only eager"
    FEWER_SAMPLES = "fewer samples"
    EARLIER_TRIALS_UNUSED = "earlier trials unused"
    LEFT_UNTRIED = "left untried"
    COREWISE_INT8_ONLY = "corewise int8 only"
    MIXES_BATCH = "mixes batch"
    FIXED_BATCH = "fixed batch"
    KEEPS_STATE = "keeps state"
    BASELINE_DIFFERS = "baseline differs"
    NOT_SPLIT = "not split"

    # Why there is no elastic plan to judge.
    ELASTIC_NOT_MEASURED = "elastic not measured"

    # How photos are decoded.
    SCALED_DECODING = "scaled decoding"
    FULL_DECODING = "full decoding"
    DECODING_NOT_JUDGED = "decoding not judged"

    # What of photos the engine takes.
    TAKES_PIXELS = "takes pixels"
    TAKES_FLOATS = "takes floats"

    # Whether several texts share a row.
    PACKS_TEXTS = "packs texts"
    PACKING_SLOWER = "packing slower"
    TEXTS_NOT_PACKED = "texts not packed"

    # How photos are answered from their files.
    FROM_FILES = "from files"


NOT_TRIED = (ReasonKind.BUDGET_SPENT_BEFORE, ReasonKind.BUDGET_TOO_SHORT, ReasonKind.BUDGET_BETTER_SPENT)
"""Why a build has a trial although it was not tried."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One reason: its kind and the details that its sentence needs, by name."""

    kind: ReasonKind
    details: dict[str, Detail] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, kind: ReasonKind, **details: Detail) -> Self:
        """The reason of that kind with these details."""
        return cls(kind=kind, details=details)

    @classmethod
    def text(cls, text: str) -> Self:
        """A reason in the words of an engine or an older version."""
        return cls.of(ReasonKind.TEXT, text=text)
