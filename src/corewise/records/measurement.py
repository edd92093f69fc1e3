"""Speeds: of one build under one plan, under load, and in alternating rounds."""

from dataclasses import dataclass

from corewise.records.build import Build, Plan

SERVED = 0.99
"""So many of all requests are answered within an SLO that holds."""


MOST_LATENCIES = 200
"""Latencies that a measurement keeps."""


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
class Rates:
    """One contender's items per second in each round of an alternating run."""

    build: Build
    plan: Plan
    per_s: tuple[float, ...]
    throttled: int = 0
    """As ``Measurement.throttled``, over all rounds."""
