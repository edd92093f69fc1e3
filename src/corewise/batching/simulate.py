"""Simulates a build under load in virtual time: the real policy, with random arrivals and measured call times.

A discrete-event simulation (Law, Simulation Modeling and Analysis, 2015, chapter 1) with Poisson arrivals. It differs
from a real load only in what the measurements do not contain: the runner's own time, and calls that slow each other
down.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import count
from math import ceil, inf, sqrt
from typing import NamedTuple

import numpy as np

from corewise.batching.elastic import ElasticPolicy
from corewise.batching.elastic_queue import ElasticTables, policy_of
from corewise.batching.latency import LatencyTable
from corewise.batching.partition import Part, Partitions
from corewise.batching.requests import Refused, Request
from corewise.common.stats import quantile
from corewise.records.measurement import SERVED, Measurement

Service = Callable[[int, np.random.Generator], float]
"""Draws the seconds, above 0, of a call with the given number of rows."""

REQUESTS = 2000
"""Requests of a simulation; their 99th percentile is the 20th slowest one."""
TRICKLE = 1e-3
"""The lowest rate that counts, as a share of the capacity."""
PRECISION = 0.005
_SPANS = 10
"""Least duration of a simulation in multiples of the SLO; in a shorter one, an ever-growing queue could be missed."""
_MOST_REQUESTS = 4000
_CAPACITY_DRAWS = 100


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Counts and latencies of the requests of one simulation."""

    rate_per_s: float
    p50_ms: float
    p99_ms: float
    """From arrival to answer, of the answered requests; 0 if none was answered."""
    answered: int
    refused: int
    """Refused at once, or dropped before they ran."""
    goodput_per_s: float
    """Answers in time per second, until the last answer."""


class Wide(NamedTuple):
    """What an elastic plan has beside its narrow instances: its tables, and how long its wide calls really take."""

    tables: ElasticTables
    service: Service


def simulate_load(
    curve: LatencyTable,
    *,
    service: Service,
    instances: int,
    rate_per_s: float,
    requests: int = REQUESTS,
    slo_ms: float = inf,
    max_batch: int,
    max_waiting: int,
    wide: Wide | None = None,
    seed: int = 0,
) -> Simulated:
    """Offer requests of one row, each due ``slo_ms`` after its arrival, to a policy with that latency table.

    Args:
        curve: What the policy decides by.
        service: How long the simulated calls really take.
        instances: How many calls run at the same time.
        rate_per_s: Arrivals, a Poisson process.
        requests: How many are sent.
        slo_ms: Milliseconds from a request's arrival to its deadline.
        max_batch: Most rows of a call.
        max_waiting: Most rows in the queue.
        wide: Of an elastic plan; the arguments above are then about its narrow calls, and the policy is an
            ``ElasticQueue``.
        seed: Two rates with the same seed have the same arrivals, closer together or further apart.
    """
    run = _Run(curve, service, instances, max_batch, max_waiting, seed, wide)
    run.play(run.arrivals_s(rate_per_s, requests), slo_ms / 1e3)
    return run.simulated(rate_per_s)


def simulate_trace(
    curve: LatencyTable,
    arrivals_s: Sequence[float],
    *,
    service: Service,
    instances: int,
    slo_ms: float = inf,
    max_batch: int,
    max_waiting: int,
    wide: Wide | None = None,
    seed: int = 0,
) -> list[float]:
    """As ``simulate_load``, for requests that arrive at the given times, which rise.

    Returns the seconds from each one's arrival to its answer; ``inf`` for those that were refused or dropped.
    """
    run = _Run(curve, service, instances, max_batch, max_waiting, seed, wide)
    run.play(arrivals_s, slo_ms / 1e3)
    return [run.latencies_s.get(number, inf) for number in range(len(arrivals_s))]


def most_rate(
    curve: LatencyTable,
    *,
    service: Service,
    instances: int,
    requests: int = REQUESTS,
    slo_ms: float,
    max_batch: int,
    max_waiting: int,
    seed: int = 0,
) -> float:
    """The highest rate per second, to half a percent, at which 99 % of all requests are answered within ``slo_ms``.

    The arguments are those of ``simulate_load``. At most ``capacity_per_s``; 0 if even the rate ``TRICKLE`` misses the
    SLO. Bisection on the logarithm of the rate, from above, because missed runs end early. Up to 4000 requests are
    simulated if fewer would last less than 10 SLOs.
    """
    most_per_s = capacity_per_s(service, instances=instances, max_batch=max_batch, seed=seed)
    if slo_ms < inf:
        requests = max(requests, min(_MOST_REQUESTS, ceil(_SPANS * slo_ms / 1e3 * most_per_s)))

    def holds(rate_per_s: float) -> bool:
        run = _Run(curve, service, instances, max_batch, max_waiting, seed)
        return run.play(run.arrivals_s(rate_per_s, requests), slo_ms / 1e3, may_miss=(1 - SERVED) * requests)

    low = high = most_per_s
    while not holds(low):
        low, high = low / 2, low
        if low < TRICKLE * most_per_s:
            return 0.0
    while high > (1 + PRECISION) * low:
        middle = sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def capacity_per_s(service: Service, *, instances: int, max_batch: int, seed: int = 0) -> float:
    """Rows per second if all instances run the batch with the highest rate, one call after the other."""
    rng = np.random.default_rng(seed)
    mean_s = [
        sum(service(rows, rng) for _ in range(_CAPACITY_DRAWS)) / _CAPACITY_DRAWS for rows in range(1, max_batch + 1)
    ]
    return instances * max(rows / seconds for rows, seconds in enumerate(mean_s, 1))


def service_of(measurements: Sequence[Measurement]) -> Service:
    """Draws a measured call of the nearest measured batch; between batches, scaled along the curve of the medians.

    Raises ``ValueError`` as ``LatencyTable.of`` does.
    """
    curve = LatencyTable.of(measurements, "p50_ms")
    measured_s = {m.plan.batch: [ms / 1e3 for ms in m.latencies_ms] for m in measurements}

    @cache
    def calls_s(rows: int) -> list[float]:
        nearest = min(measured_s, key=lambda batch: (abs(batch - rows), -batch))
        scale = curve.latency_ms(rows) / curve.latency_ms(nearest)
        return [seconds * scale for seconds in measured_s[nearest]]

    def draw(rows: int, rng: np.random.Generator) -> float:
        drawn = calls_s(rows)
        return drawn[int(rng.random() * len(drawn))]

    return draw


def simulate_calls(
    partitions: Partitions, *, rate_per_s: float, rows: int = 1, calls: int = REQUESTS, seed: int = 0
) -> Simulated:
    """Calls of ``rows`` at random times, as ``runtime.elastic`` runs them, each part as long as measured.

    None is refused, and none is late. Two rates with the same seed have the same arrivals.
    """
    gaps_s = np.random.default_rng([seed, 0]).exponential(size=calls) / rate_per_s
    return _play_calls(partitions, np.cumsum(gaps_s).tolist(), rows, calls)


def simulate_callers(partitions: Partitions, *, callers: int, rows: int = 1, calls: int = REQUESTS) -> Simulated:
    """As ``simulate_calls``, from ``callers`` that call again as soon as they are answered."""
    return _play_calls(partitions, [0.0] * callers, rows, calls)


def _play_calls(partitions: Partitions, arrivals_s: Sequence[float], rows: int, calls: int) -> Simulated:
    """Calls at the given times; while there were fewer than ``calls``, each answer brings another one at once."""
    policy, order = ElasticPolicy(partitions), count()
    # Time, tie-breaker, call, and the part of it that ends; ``None`` for its arrival.
    events: list[tuple[float, int, int, Part | None]] = [
        (at_s, next(order), k, None) for k, at_s in enumerate(arrivals_s)
    ]
    heapify(events)
    arrived_s, left = list(arrivals_s), [rows] * len(arrivals_s)
    latencies_s: list[float] = []
    now_s = 0.0
    while events:
        now_s, _, call, part = heappop(events)
        if part is None:
            policy.arrive(call, rows, now_s)
        else:
            policy.ended(part.threads, now_s)
            left[call] -= part.rows
            if not left[call]:
                latencies_s.append(now_s - arrived_s[call])
                if len(arrived_s) < calls:
                    policy.arrive(len(arrived_s), rows, now_s)
                    arrived_s.append(now_s)
                    left.append(rows)
        for start in policy.starts(now_s):
            heappush(events, (now_s + partitions.call_s(start.part), next(order), *start))
    per_s = len(latencies_s) / now_s
    return Simulated(
        rate_per_s=per_s,
        p50_ms=quantile(latencies_s, 0.5) * 1e3,
        p99_ms=quantile(latencies_s, 0.99) * 1e3,
        answered=len(latencies_s),
        refused=0,
        goodput_per_s=per_s,
    )


class _Run:
    """One simulation: a policy, and instances that it keeps busy as ``runner.Batcher`` does."""

    def __init__(
        self,
        curve: LatencyTable,
        service: Service,
        instances: int,
        max_batch: int,
        max_waiting: int,
        seed: int,
        wide: Wide | None = None,
    ) -> None:
        tables = None if wide is None else wide.tables
        self._policy = policy_of(curve, tables, max_batch=max_batch, max_waiting=max_waiting)
        self._services = [service] * instances + ([] if wide is None else [wide.service])
        self._gaps, self._calls = (np.random.default_rng([seed, which]) for which in (0, 1))
        for instance in range(len(self._services)):
            self._policy.finished(instance)
        self._ends: list[tuple[float, int, float, tuple[Request, ...]]] = []
        """End, instance, duration and requests of each running call."""
        self._arrivals_s: Sequence[float] = ()
        self.latencies_s: dict[int, float] = {}
        """Latencies of the answered requests, by their number."""
        self._lost = self._late = 0
        self._last_s = 0.0

    def arrivals_s(self, rate_per_s: float, requests: int) -> list[float]:
        """The times of a Poisson process."""
        times_s: list[float] = (np.cumsum(self._gaps.exponential(size=requests)) / rate_per_s).tolist()
        return times_s

    def play(self, arrivals_s: Sequence[float], slo_s: float, *, may_miss: float = inf) -> bool:
        """Run until all requests have ended, or more than ``may_miss`` are lost or late: then it returns false."""
        self._arrivals_s = arrivals_s
        for number, now_s in enumerate(arrivals_s):
            self._finish(now_s)
            decision = self._policy.offer(Request(id=number, deadline_s=now_s + slo_s), now_s)
            self._lost += len(decision.dropped) + isinstance(decision, Refused)
            self._start(now_s)
            if self._lost + self._late > may_miss:
                return False
        self._finish(inf)
        return self._lost + self._late <= may_miss

    def simulated(self, rate_per_s: float) -> Simulated:
        """The result."""
        latencies_s = list(self.latencies_s.values())
        return Simulated(
            rate_per_s=rate_per_s,
            p50_ms=quantile(latencies_s, 0.5) * 1e3 if latencies_s else 0.0,
            p99_ms=quantile(latencies_s, 0.99) * 1e3 if latencies_s else 0.0,
            answered=len(latencies_s),
            refused=self._lost,
            goodput_per_s=(len(latencies_s) - self._late) / self._last_s if self._last_s else 0.0,
        )

    def _finish(self, until_s: float) -> None:
        """End all calls due by then, and start waiting requests in their place, or where the policy looks again."""
        while self._ends and min(self._ends[0][0], self._policy.look_again_s) <= until_s:
            now_s = self._policy.look_again_s
            if self._ends[0][0] <= now_s:
                now_s, instance, took_s, requests = heappop(self._ends)
                self._last_s = now_s
                for request in requests:
                    self.latencies_s[request.id] = now_s - self._arrivals_s[request.id]
                    self._late += now_s > request.deadline_s
                self._policy.finished(instance, took_s)
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        while (instance := self._policy.turn(now_s)) is not None:
            batch = self._policy.next_batch(instance, now_s)
            self._lost += len(batch.dropped)
            if batch.requests:
                seconds = self._services[instance](len(batch.requests), self._calls)
                heappush(self._ends, (now_s + seconds, instance, seconds, batch.requests))
