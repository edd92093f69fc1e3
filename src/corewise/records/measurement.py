"""Speeds: of one build under one plan, under load, and in alternating rounds."""

from dataclasses import dataclass

from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.reason import Reason

SERVED = 0.99
"""Share of all requests that must be answered within an SLO."""
MOST_LATENCIES = 200
"""Latencies that a measurement keeps."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed of one build under one plan: all instances at work, each starting a call when its last one is done."""

    plan: Plan
    latencies_ms: tuple[float, ...]
    """Wall time of the timed calls in the order taken, instance by instance, thinned out to ``MOST_LATENCIES``."""
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
    """The process's memory with all instances open, after the calls; 0 if the kernel does not say."""
    why: Reason | None = None
    """What made the search measure this plan."""
    warning: str = ""
    """Set if the plan has more threads than can compute at once."""
    times: int = 1
    """How many measurements it pools."""
    rejected: Reason | None = None
    """Why the plan may not be chosen."""


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """The outcome of requests sent to one build under one plan through the batcher.

    Latencies count from when a request was due to be sent, so a sender that is held up hides nothing (coordinated
    omission).
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
    """Answered within the deadline; without a deadline, all that were answered."""
    p50_ms: float
    p99_ms: float
    """Latency of the answered requests; 0 if none was answered."""
    refusal_p99_ms: float
    """Time until the refusal of a request; 0 if none was refused at once."""
    slo_ms: float | None = None
    """The deadline of each request; ``None`` for none."""
    throttled: int = 0
    """As ``Measurement.throttled``."""
    sender_late_p99_ms: float = 0.0
    """p99 of the delay of the sender itself; with more than a few milliseconds the load differs from the request."""
    certified: bool = False
    """Whether this load confirmed the rate that the build is certified for."""
    elastic: ElasticPlan | None = None
    """In a search for an SLO: the elastic plan that was open, whose narrow layout is ``plan``."""

    @property
    def goodput_per_s(self) -> float:
        """Answers in time per second."""
        return self.in_time / self.duration_s

    @property
    def met(self) -> bool:
        """Whether none failed and 99 % of all were answered in time; without an SLO, all.

        A refused request counts as late: refusing most requests would keep the p99 of the answered ones low.
        """
        needed = self.offered if self.slo_ms is None else SERVED * self.offered
        return self.offered > 0 and self.failed == 0 and self.in_time >= needed


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One contender's items per second in each round of an alternating race."""

    build: Build
    plan: Plan
    per_s: tuple[float, ...]
    throttled: int = 0
    """As ``Measurement.throttled``, over all rounds."""


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """A load on an artifact's plan, and the call time that admission used."""

    run: LoadRun
    call_ms: float
    """How long a call of one request takes by the artifact's latency table (p99)."""
    notes: tuple[str, ...] = ()
    """Facts about the plan on this machine."""
    elastic: ElasticPlan | None = None
    """The layouts that were open, if these were two."""
