"""What the user asks for: the goal, and the limits within which it is sought."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from math import inf
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from corewise.common.errors import InputError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from corewise.records.measurement import Measurement
    from corewise.records.trial import Trial

GoalName = Literal["throughput", "latency", "slo"]


class Goal(ABC):
    """What a plan is chosen for. Each goal says which measurement serves it best, and how contenders rank."""

    name: ClassVar[GoalName]
    unit: ClassVar[str]
    """Unit of ``figure``."""
    single_items: ClassVar[bool] = False
    """Whether a plan runs one item a call on one instance."""
    decided_by_race: ClassVar[bool] = True
    """Whether the alternating race decides; otherwise the rate that was met under load does."""

    @abstractmethod
    def best(self, trial: "Trial") -> "Measurement | None":
        """The trial's measurement that serves the goal best; ``None`` if none is allowed."""

    def cost(self, trial: "Trial") -> tuple[float, float]:
        """Orders trials that have a best measurement, the best first."""
        best = self.best(trial)
        assert best is not None
        return 0.0, -best.throughput_per_s

    def score(self, per_s: float, trial: "Trial") -> tuple[float, float]:
        """Orders finalists by the median rate of the race and their trial; higher is better."""
        return per_s, 0.0

    def figure(self, per_s: float) -> float:
        """A rate of the race in the goal's ``unit``."""
        return per_s

    def measured_figure(self, measurement: "Measurement") -> float:
        """A measurement's speed in the goal's ``unit``."""
        return measurement.throughput_per_s

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``from_data``."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_data(cls, data: Any) -> "Goal":
        """The goal in plain data. Raises ``ValueError`` if it is not a goal."""
        if isinstance(data, Goal):
            return data
        if not isinstance(data, dict):
            raise ValueError(f"{data!r} is not a goal")
        try:
            return parse_goal(data.get("name"), slo_ms=data.get("p99_ms"))
        except InputError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls.from_data)


@dataclass(frozen=True)
class Throughput(Goal):
    """The most items per second.

    Example:
        >>> Throughput().unit
        'items/s'
    """

    name = "throughput"
    unit = "items/s"

    def best(self, trial: "Trial") -> "Measurement | None":
        """The highest rate."""
        return max(trial.allowed, key=lambda measurement: measurement.throughput_per_s, default=None)


@dataclass(frozen=True)
class Latency(Goal):
    """The shortest time for single items.

    Example:
        >>> Latency().figure(per_s=200.0)
        5.0
    """

    name = "latency"
    unit = "ms"
    single_items = True

    def best(self, trial: "Trial") -> "Measurement | None":
        """The shortest median call of the smallest batch."""
        return min(trial.allowed, key=lambda measurement: (measurement.plan.batch, measurement.p50_ms), default=None)

    def cost(self, trial: "Trial") -> tuple[float, float]:
        """The median call; the shortest is the best."""
        best = self.best(trial)
        assert best is not None
        return 0.0, best.p50_ms

    def figure(self, per_s: float) -> float:
        """The race counts calls of one item, so its rate is 1/latency."""
        return 1e3 / per_s

    def measured_figure(self, measurement: "Measurement") -> float:
        """The median call."""
        return measurement.p50_ms


@dataclass(frozen=True)
class Slo(Goal):
    """The most requests per second with 99 % of them answered within ``p99_ms`` milliseconds.

    Example:
        >>> Slo(p99_ms=50.0).p99_ms
        50.0
    """

    p99_ms: float
    name = "slo"
    unit = "items/s"
    decided_by_race = False

    def __post_init__(self) -> None:
        if not isinstance(self.p99_ms, Real) or not 0 < self.p99_ms < inf:
            raise InputError(f"the SLO is {self.p99_ms!r} ms", "give milliseconds above 0, e.g. 100")

    def best(self, trial: "Trial") -> "Measurement | None":
        """The plan of the certified rate; without one, the highest rate of the plans whose calls are within the SLO."""
        if not trial.allowed:
            return None
        certified = trial.certified
        if certified is not None:
            return next(measurement for measurement in trial.measurements if measurement.plan == certified.plan)
        within = [measurement for measurement in trial.allowed if measurement.p99_ms <= self.p99_ms]
        if not within:
            return min(trial.allowed, key=lambda measurement: measurement.p99_ms)
        return max(within, key=lambda measurement: measurement.throughput_per_s)

    def cost(self, trial: "Trial") -> tuple[float, float]:
        """The certified rate, then the speed."""
        best, certified = self.best(trial), trial.certified
        assert best is not None
        return -(certified.rate_per_s or 0.0) if certified else 0.0, -best.throughput_per_s

    def score(self, per_s: float, trial: "Trial") -> tuple[float, float]:
        """The certified rate, then how near the shortest p99 of a call comes to the SLO."""
        if trial.certified:
            return trial.certified.rate_per_s or 0.0, 0.0
        return 0.0, -min((measurement.p99_ms for measurement in trial.measurements), default=inf)


def parse_goal(name: Any, *, slo_ms: float | None = None) -> Goal:
    """The goal of that name.

    Args:
        name: "throughput", "latency" or "slo"; a ``Goal`` is returned as it is.
        slo_ms: for "slo" alone, the time in milliseconds within which 99 % of requests are answered.

    Raises:
        InputError: the name is unknown, or ``slo_ms`` does not go with it.

    Example:
        >>> parse_goal("slo", slo_ms=100.0)
        Slo(p99_ms=100.0)
    """
    if isinstance(name, Goal):
        if slo_ms is not None:
            raise InputError("the objective is an object, and slo_ms is given too", "give Slo(p99_ms=...) alone")
        return name
    if not isinstance(name, str) or name not in GOALS:
        raise InputError(f"the objective {name!r} is unknown", f"give {', '.join(GOALS)}")
    if (GOALS[name] is Slo) != (slo_ms is not None):
        raise InputError("the objective slo and slo_ms go together", "give both (e.g. slo and 100) or neither")
    if slo_ms is not None:
        return Slo(p99_ms=slo_ms)
    return GOALS[name]()


GOALS: dict[GoalName, type[Goal]] = {"throughput": Throughput, "latency": Latency, "slo": Slo}


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """The goal, how much of the metric may be lost for it, and the memory that may be used."""

    goal: Goal = Throughput()
    max_drop: float = 0.01
    strict: bool = False
    """Require the upper end of the drop's confidence interval to pass, not only the estimate."""
    memory_limit_bytes: int | None = None
    """Plans whose process needs more memory are not chosen."""
    robust: bool | None = None
    """Require the same on samples unlike those that calibrated. ``None``: only for models of texts and embeddings."""

    def within_memory(self, memory_bytes: int) -> bool:
        """Whether a process of that size is allowed."""
        return self.memory_limit_bytes is None or memory_bytes <= self.memory_limit_bytes

    def flat(self) -> dict[str, Any]:
        """Plain data in the form of schema 1, for programs."""
        return {
            "goal": self.goal.name,
            "max_drop": self.max_drop,
            "strict": self.strict,
            "slo_ms": self.goal.p99_ms if isinstance(self.goal, Slo) else None,
            "memory_limit_bytes": self.memory_limit_bytes,
            "robust": self.robust,
        }

    to_data = flat

    @classmethod
    def from_data(cls, data: Any) -> "Requirements":
        """The requirements in plain data. Raises ``ValueError`` if they are not valid."""
        if isinstance(data, Requirements):
            return data
        if not isinstance(data, dict):
            raise ValueError(f"{data!r} are not requirements")
        limit_bytes, robust = data.get("memory_limit_bytes"), data.get("robust")
        return cls(
            goal=Goal.from_data({"name": data.get("goal"), "p99_ms": data.get("slo_ms")}),
            max_drop=float(data.get("max_drop", 0.01)),
            strict=bool(data.get("strict", False)),
            memory_limit_bytes=None if limit_bytes is None else int(limit_bytes),
            robust=None if robust is None else bool(robust),
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls.from_data)
