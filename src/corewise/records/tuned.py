"""Plans that were measured on the machines that run an artifact."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from corewise.records.build import ElasticPlan, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import GoalName
from corewise.records.measurement import LoadRun, Measurement


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine as far as plans depend on it: the CPU, and what this process may use of it."""

    model: str
    isa: tuple[str, ...]
    usable_cores: int
    hardware_threads: int
    quota_cores: float | None

    @classmethod
    def of(cls, cpu: Cpu) -> "Machine":
        """The machine with that CPU, under those limits."""
        return cls(
            model=cpu.model,
            isa=cpu.isa,
            usable_cores=cpu.usable_cores,
            hardware_threads=len(cpu.affinity),
            quota_cores=cpu.quota_cores,
        )

    @property
    def label(self) -> str:
        """``AMD EPYC 7763 (2 cores, 4 hardware threads, a quota of 1.5)``."""
        quota = "" if self.quota_cores is None else f", a quota of {self.quota_cores:g}"
        return f"{self.model} ({self.usable_cores} cores, {self.hardware_threads} hardware threads{quota})"

    def against(self, other: "Machine") -> tuple[str, str]:
        """The labels of this machine and the other, with the instruction sets if the labels are equal otherwise."""
        if self.label != other.label:
            return self.label, other.label
        return f"{self.label} with {' '.join(self.isa)}", f"{other.label} with {' '.join(other.isa)}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The plan for one machine, and the latency table that it was chosen from."""

    machine: Machine
    created: str
    goal: GoalName
    plan: Plan
    measurements: tuple[Measurement, ...]
    elastic: ElasticPlan | None = None
    """What runs in place of the plan; ``None`` where one layout is as good."""

    @property
    def label(self) -> str:
        """``runs 1 thread x 2, batch 8: tuned on this kind of machine, AMD EPYC 7763 (...), on 2026-03-14``."""
        plan = f"{self.elastic.label}, depending on the load" if self.elastic else self.plan.label
        return f"runs {plan}: tuned on this kind of machine, {self.machine.label}, on {self.created[:10]}"


@dataclass(frozen=True, kw_only=True)
class LoadPoint:
    """Latencies of requests at one load, simulated; each of the elastic, the wide and the narrow plan."""

    load: float
    """Share of the most that the fixed plan does."""
    p50_ms: tuple[float, float, float]
    p99_ms: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Duel:
    """Real loads of single requests at one rate, in turns: on the elastic plan, and on the layout it would replace."""

    load: float
    """As in ``LoadPoint``."""
    elastic: tuple[LoadRun, ...]
    fixed: tuple[LoadRun, ...]

    @property
    def all_answered(self) -> bool:
        """Whether no request failed or was refused."""
        return all(0 < run.answered == run.offered for run in (*self.elastic, *self.fixed))

    @property
    def p50_ms(self) -> tuple[float, float]:
        """The median of the rounds' p50: elastic, fixed."""
        return self._medians("p50_ms")

    @property
    def p99_ms(self) -> tuple[float, float]:
        """The median of the rounds' p99: elastic, fixed."""
        return self._medians("p99_ms")

    def _medians(self, figure: str) -> tuple[float, float]:
        elastic, fixed = (median(getattr(run, figure) for run in runs) for runs in (self.elastic, self.fixed))
        return elastic, fixed


@dataclass(frozen=True, kw_only=True)
class Elasticity:
    """An elastic plan beside its two layouts alone, simulated with their measured times."""

    plan: ElasticPlan
    pays: bool
    """Whether it is never worse than the fixed plan and somewhere better: simulated, and then under real load."""
    curve: tuple[LoadPoint, ...]
    saturated_per_s: tuple[float, float, float]
    """Rows per second of full batches from as many callers as there are instances: elastic, wide, narrow."""
    memory_bytes: int
    """Upper bound on the memory of a process with both open, the sum of both alone; 0 if the kernel does not say."""
    measurements: tuple[Measurement, ...] = ()
    """What ``optimize`` took for it beside the winner's."""
    duels: tuple[Duel, ...] = ()
    """Real loads beside the fixed layout; none if it was no better in simulation."""
    load: LoadRun | None = None
    """For an SLO: the certified rate on the elastic plan, which has to meet it too; or its own, if that is higher."""

    @property
    def chosen(self) -> ElasticPlan | None:
        """The plan, if it pays."""
        return self.plan if self.pays else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The new plan's rate over the old plan's, in an alternating race."""

    ratio: float
    low: float
    high: float
    """The 95 % confidence interval."""
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Retuned:
    """The plan found for this machine, and how it compares with the one used so far."""

    folder: Path
    entry: Tuned
    old: Plan
    best: Plan
    """The fastest plan measured; the entry's unless the race did not show that it is faster than the old one."""
    old_per_s: float | None
    """Items per second in the race, or as measured if there was none; ``None`` if it does not run here."""
    best_per_s: float
    comparison: Comparison | None
    """``None`` if there was no race."""
    tried: int
    """Plans measured."""
    notes: tuple[str, ...]
    wall_s: float
    elasticity: Elasticity | None = None
    """``None`` where there is one thread, or no time was left to measure both layouts."""

    @property
    def kept(self) -> bool:
        """Whether the old plan stays."""
        return self.entry.plan == self.old
