"""The values that travel between the parts: frozen, keyword-only, JSON-able.

``to_json`` and ``from_json`` are the only way in and out: what was read from a file is validated
against the types below, so a damaged journal or manifest is an error and never a strange value.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

Scalar = str | int | float | bool
Precision = Literal["fp32", "bf16", "int8", "int8-dynamic"]
State = Literal["ok", "failed", "rejected", "pruned"]
Goal = Literal["throughput", "latency", "slo"]
SERVED = 0.99
"""So many of all requests are answered within an SLO that holds."""


@dataclass(frozen=True, kw_only=True)
class LogicalCpu:
    """One hardware thread: its number, and the core, socket and NUMA node it belongs to."""

    cpu: int
    core: int
    socket: int
    node: int


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One cache of the CPU; ``shared_by`` counts the hardware threads that use it."""

    level: int
    kind: Literal["data", "instruction", "unified"]
    size_bytes: int
    shared_by: int


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """This machine's CPU and what this process may use of it (see ``cpu.inspect``)."""

    architecture: str
    vendor: str
    model: str
    isa: tuple[str, ...]
    """The extensions that matter for inference, e.g. ``("avx2", "avx512", "avx512_vnni")``."""
    cpus: tuple[LogicalCpu, ...]
    caches: tuple[Cache, ...]
    affinity: tuple[int, ...]
    """Hardware threads that this process may run on (affinity and cpuset)."""
    quota_cores: float | None
    """CPU time per wall time that the cgroup allows, in cores; ``None`` is unlimited."""
    memory_bytes: int
    memory_limit_bytes: int | None

    @property
    def usable_cpus(self) -> tuple[int, ...]:
        """The hardware threads worth a compute thread: one per physical core, within affinity and quota."""
        allowed = set(self.affinity)
        first_of_core: dict[tuple[int, int], int] = {}
        for cpu in self.cpus:
            if cpu.cpu in allowed:
                first_of_core.setdefault((cpu.socket, cpu.core), cpu.cpu)
        cpus = sorted(first_of_core.values()) or sorted(allowed)
        if self.quota_cores is not None:
            cpus = cpus[: max(1, int(self.quota_cores))]
        return tuple(cpus)

    @property
    def usable_cores(self) -> int:
        """min(affinity, cpuset, quota) in physical cores; at least 1."""
        return max(1, len(self.usable_cpus))

    def has(self, extension: str) -> bool:
        """Whether the CPU has the ISA extension, by its name in ``isa``."""
        return extension in self.isa

    @property
    def int8_dot(self) -> bool:
        """Whether int8 products accumulate in 32 bits (VNNI, AVX-VNNI, AMX, DotProd, I8MM).

        Without it x86 adds pairs of u8 x s8 products in 16 bits, which saturates: 7-bit ranges are
        used instead.
        """
        return any(self.has(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"))

    @property
    def bf16(self) -> bool:
        """Whether the CPU multiplies bf16 in hardware."""
        return any(self.has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, numpy dtype name and shape of one input or output; ``None`` is a dynamic dimension.

    Dimension 0 is always the batch.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


IGNORED = "ignored"
"""The option of builds that names layers to stay in floating point, separated by spaces (``quantize.placement``)."""
RETURNED = "returned"
"""The option of builds that give so many layers back to floating point, those that cost most accuracy first."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is expensive to make: an engine's payload at one precision with its options."""

    engine: str
    precision: Precision
    options: tuple[tuple[str, Scalar], ...] = ()
    """Sorted (name, value) pairs, e.g. ``(("backend", "onednn"), ("reduce_range", True))``."""

    @property
    def label(self) -> str:
        """One word for people and folders: ``torch-int8/int8/backend=onednn``."""
        return "/".join((self.engine, self.precision, *(f"{name}={value}" for name, value in self.options)))

    def option(self, name: str, default: Scalar) -> Scalar:
        """The option's value, or ``default``."""
        return dict(self.options).get(name, default)

    def with_option(self, name: str, value: Scalar) -> "Build":
        """The build with that option's value."""
        return replace(self, options=tuple(sorted({**dict(self.options), name: value}.items())))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a build is run. One build is measured under many plans."""

    threads_per_instance: int
    instances: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.threads_per_instance, self.instances, self.batch) < 1:
            raise ValueError(f"there is no plan of {self.label}: threads, instances and batch are 1 or more")

    @property
    def label(self) -> str:
        """``2 threads x 1, batch 16``."""
        return f"{self.threads_per_instance} threads x {self.instances}, batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A candidate against fp32 on the holdout: the metric's paired drop and how close the outputs are."""

    metric: str
    samples: int
    baseline_value: float
    value: float
    drop: float
    """baseline_value - value: positive is worse."""
    drop_low: float
    drop_high: float
    """The 95 % confidence interval of the paired drop."""
    sqnr_db: float
    """10 log10(signal power / error power) over all floating outputs; capped at 200 for equal ones."""
    cosine: float
    """Mean over samples of the cosine between fp32's and the candidate's outputs."""
    agreement: float | None
    """Share of samples with fp32's top-1 answer; ``None`` where outputs are no class scores."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed of one build under one plan: all its instances at work, each starting a call when its last one is done."""

    plan: Plan
    latencies_ms: tuple[float, ...]
    """Wall time of the timed calls in the order taken, instance by instance; of more than 200, every second, third, ...
    one."""
    throughput_per_s: float
    """Items per second at the median call; of several instances together, over all calls."""
    p50_ms: float
    p99_ms: float
    spread: float
    """Interquartile range over median of the call times: above 0.1 the machine was noisy."""
    throttled: int = 0
    """Growth of the cgroup's ``nr_throttled`` while measuring: above 0 the figures are too low."""
    memory_per_instance_bytes: int = 0
    """What the second instance added to the process's memory, running; 0 for one instance."""
    memory_bytes: int = 0
    """The process's memory with all instances open, after the calls; 0 where the kernel does not tell."""
    why: str = ""
    """What made the search measure this plan, in words."""
    rejected: str = ""
    """Why the plan is no choice, e.g. for its memory; empty where it is one."""


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """What became of requests that were sent to one build under one plan through the batcher.

    Latencies count from when a request was due to be sent, so that a sender that is held up hides nothing
    (coordinated omission).
    """

    plan: Plan
    rate_per_s: float | None
    """Requests per second that were due, arriving at random (a Poisson process); ``None`` for a closed loop."""
    clients: int | None
    """Senders that each wait for their answer before they send again; ``None`` for an open loop."""
    duration_s: float
    offered: int
    answered: int
    refused: int
    """Refused at once, or dropped before they ran."""
    failed: int
    """Answered with an error."""
    in_time: int
    """Answered within the deadline, of those answered; all of them where there was none."""
    p50_ms: float
    p99_ms: float
    """Of the answered ones; 0 where none was."""
    refusal_p99_ms: float
    """How long those refused at once waited to hear of it; 0 where none was."""
    slo_ms: float | None = None
    """The deadline that each request had; ``None`` for none."""
    throttled: int = 0
    """As ``Measurement.throttled``."""
    sender_late_p99_ms: float = 0.0
    """How late the sender itself was, of 99 % of the requests: a few milliseconds and the load was another one."""
    promised: bool = False
    """Whether it was held to confirm a rate, which the build then promises."""

    @property
    def goodput_per_s(self) -> float:
        """Answers in time per second."""
        return self.in_time / self.duration_s

    @property
    def held(self) -> bool:
        """Whether none failed and 99 % of all were answered in time; without an SLO, all.

        Who is refused is not served in time either: a p99 of the answered ones alone could be held by refusing most.
        """
        wanted = self.offered if self.slo_ms is None else SERVED * self.offered
        return self.offered > 0 and self.failed == 0 and self.in_time >= wanted


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an opened int8 payload was seen to run: proof that it did not silently stay in fp32."""

    layers: int
    """Convolutions and linears in the program, and those products of two activations that were quantized."""
    int8: int
    """How many of them ran in int8."""
    kernels: tuple[tuple[str, int], ...]
    """How often each kernel runs a layer, by the runtime's names, e.g. ``(("Convolution/u8", 53),)``; sorted."""
    fell_back: tuple[str, ...] = ()
    """Layers that the payload quantizes and that ran in fp32 all the same, as far as the runtime tells."""

    @classmethod
    def tally(cls, ran: Sequence[tuple[str, bool]], fell_back: Sequence[str] = ()) -> "Receipt":
        """The receipt of layers given as (kernel, whether it is int8)."""
        kernels = Counter(kernel for kernel, _ in ran)
        return cls(
            layers=len(ran),
            int8=sum(int8 for _, int8 in ran),
            kernels=tuple(sorted(kernels.items())),
            fell_back=tuple(fell_back),
        )

    @property
    def words(self) -> str:
        """``int8: 53 of 54 convolutions and linears, 0 fell back``."""
        return f"int8: {self.int8} of {self.layers} convolutions and linears, {len(self.fell_back)} fell back"


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


@dataclass(frozen=True, kw_only=True)
class Loser:
    """A trial that was not chosen, and why."""

    build: Build
    state: State
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The winner, how much faster than the baseline it is, and why each other trial lost."""

    winner: Build
    plan: Plan
    throughput_per_s: float
    baseline_throughput_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    reason: str
    losers: tuple[Loser, ...]
    warnings: tuple[str, ...] = ()
    promise: LoadRun | None = None
    """For the goal ``slo``: the load that was held. ``None`` also where nothing meets the SLO."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What turns an RGB image into a model's input: pixels in 0..1, resized, cropped, normalised.

    ``resize`` is the length of the shorter side, ``crop`` of the centred square; NCHW float32 comes out.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    function: str | None = None
    """The user's ``module:function`` (PIL image -> array) that does it instead of all the above."""


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """Where the samples came from and how they were split."""

    source: str
    fingerprint: str
    calibration: int
    holdout: int
    seed: int
    labelled: bool
    preprocess: Preprocess | None = None


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One contender's items per second in each round of an alternating run."""

    build: Build
    plan: Plan
    per_s: tuple[float, ...]
    throttled: int = 0
    """As ``Measurement.throttled``, over all rounds."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known about one optimization; what ``show`` prints and the artifact keeps."""

    model: str
    created: str
    versions: dict[str, str]
    cpu: Cpu
    objective: Objective
    samples: SampleFacts
    trials: tuple[Trial, ...]
    finals: tuple[Rates, ...]
    choice: Choice
    wall_s: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()
    """Facts about the model that limited the search, e.g. why it could not be exported."""

    @property
    def winner(self) -> Trial:
        """The chosen build's trial."""
        return next(trial for trial in self.trials if trial.build == self.choice.winner)


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_json(value: Any) -> Any:
    """A value above (or a tuple, list or dict of them) as plain JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return value


def from_json(kind: type[T], data: Any) -> T:
    """Plain JSON data as a value of ``kind``.

    Raises ``ValueError`` (pydantic's ``ValidationError``) where the data does not fit the types.
    """
    adapter: TypeAdapter[T] = _adapter(cast(Hashable, kind))
    return adapter.validate_python(data)
