"""Load generators, open loop and closed loop, for anything that takes requests.

``submit(k)`` sends request k = 0, 1, ... and returns its future. An open loop sends at times drawn beforehand, without
waiting for answers; a closed loop waits for answers and so slows down with the system under load (Schroeder, Wierman
and Harchol-Balter, NSDI 2006). Latencies count from the time a request was due, not from the time it was sent, so
delays of the sender are included (coordinated omission; Tene, 2013).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from math import inf
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

from corewise.common.errors import InputError
from corewise.common.stats import quantile
from corewise.records.build import Plan
from corewise.records.measurement import LoadRun

Submit = Callable[[int], "Future[Any]"]
Clock = Callable[[], float]
Check = Callable[[int, Any], bool]
"""Whether the result of request k is right. It runs in the thread that answers: it must be short and never raise."""

PATIENCE_S = 30.0
"""How long to wait for answers after the last request."""
BACKOFF_S = 0.01
"""How long a client of a closed loop waits after a refusal before it sends again."""
OVERRUN = 2.0
"""A sender that cannot keep up stops after this multiple of the duration and leaves the rest unsent."""
MOST_REQUESTS = 10_000_000
MOST_CLIENTS = 100_000
_POLL_S = 0.002


def open_loop(
    submit: Submit,
    *,
    plan: Plan,
    rate_per_s: float,
    duration_s: float,
    seed: int = 0,
    slo_ms: float | None = None,
    refusal: type[Exception],
    check: Check | None = None,
    patience_s: float = PATIENCE_S,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadRun:
    """Send ``rate_per_s`` requests a second for ``duration_s`` from this thread, at random times (a Poisson process).

    ``submit`` raises ``refusal`` where a request is refused at once, and its future where it is dropped later; a future
    that raises anything else, is cancelled, gives what ``check`` denies, or nothing within ``patience_s`` of the last
    request, has failed. What else ``submit`` raises is raised. Where the sender did not keep up with its own times,
    ``LoadRun.sender_late_p99_ms`` tells, and it stops after ``OVERRUN`` times the duration.

    Raises ``InputError`` for what is no load.
    """
    check_load(rate_per_s=rate_per_s, duration_s=duration_s, slo_ms=slo_ms)
    times_s = arrivals_s(rate_per_s, duration_s, seed)
    ledger = _Ledger(submit, refusal=refusal, check=check, clock=clock)
    start_s = clock()
    for k, due_s in enumerate((start_s + times_s).tolist()):
        if clock() > start_s + OVERRUN * duration_s:
            break
        while (ahead_s := due_s - clock()) > 0:
            sleep(ahead_s)
        ledger.send(k, due_s)
    ledger.settle(patience_s, sleep)
    return ledger.run(plan=plan, rate_per_s=rate_per_s, clients=None, duration_s=duration_s, slo_ms=slo_ms)


def closed_loop(
    submit: Submit,
    *,
    plan: Plan,
    clients: int,
    duration_s: float,
    slo_ms: float | None = None,
    refusal: type[Exception],
    check: Check | None = None,
    patience_s: float = PATIENCE_S,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> LoadRun:
    """Have ``clients`` each send a request as soon as they have the answer to their last one, for ``duration_s``.

    All send from this thread; one that was refused waits for ``BACKOFF_S`` first. Otherwise as ``open_loop``; a request
    is due when its client is ready to send it.
    """
    check_load(clients=clients, duration_s=duration_s, slo_ms=slo_ms)
    ready_s: SimpleQueue[float] = SimpleQueue()
    ledger = _Ledger(submit, refusal=refusal, check=check, clock=clock, ready=ready_s.put)
    start_s = clock()
    end_s = start_s + duration_s
    due_s = [start_s] * clients
    k = 0
    while (now_s := clock()) < end_s:
        wait_s = min(due_s[0] if due_s else inf, end_s) - now_s
        if wait_s <= 0:
            ledger.send(k, heappop(due_s))
            k += 1
        elif ledger.waiting or not ready_s.empty():
            with suppress(Empty):
                heappush(due_s, ready_s.get(timeout=wait_s))
        else:
            sleep(wait_s)
    ledger.settle(patience_s, sleep)
    return ledger.run(plan=plan, rate_per_s=None, clients=clients, duration_s=duration_s, slo_ms=slo_ms)


def arrivals_s(rate_per_s: float, duration_s: float, seed: int) -> np.ndarray:
    """The times of a Poisson process within ``duration_s``, sorted (N,)."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, duration_s, rng.poisson(rate_per_s * duration_s)))


def check_load(
    *,
    rate_per_s: float | None = None,
    clients: int | None = None,
    duration_s: float,
    slo_ms: float | None = None,
) -> None:
    """Raise ``InputError`` unless this is a load: either a rate or clients, all figures above 0 and finite."""
    if (rate_per_s is None) == (clients is None):
        raise InputError(
            "a load needs either a rate or clients", "give requests per second, or how many clients send at a time"
        )
    figures = {"rate": rate_per_s, "number of clients": clients, "duration": duration_s, "SLO": slo_ms}
    for name, figure in figures.items():
        if figure is not None and not 0 < figure < inf:
            raise InputError(f"the {name} is {figure:g}", "give a number above 0")
    if rate_per_s is not None and rate_per_s * duration_s > MOST_REQUESTS:
        raise InputError(
            f"{rate_per_s:g} requests per second for {duration_s:g} s are more than one sender can send",
            f"stay below {MOST_REQUESTS:,} requests",
        )
    if clients is not None and clients > MOST_CLIENTS:
        raise InputError(f"{clients:,} clients are more than one sender can simulate", f"give at most {MOST_CLIENTS:,}")


class _Ledger:
    """The outcome of each request, recorded once; under a lock, because futures end in other threads."""

    def __init__(
        self,
        submit: Submit,
        *,
        refusal: type[Exception],
        check: Check | None,
        clock: Clock,
        ready: Callable[[float], None] = lambda at_s: None,
    ) -> None:
        self._submit, self._refusal, self._check, self._clock = submit, refusal, check, clock
        self._ready = ready
        """Called with the time at which the client of an ended request may send again."""
        self._lock = Lock()
        self._due_s: dict[int, float] = {}
        """When the unfinished requests were due."""
        self._latencies_ms: list[float] = []
        self._refusals_ms: list[float] = []
        self._late_ms: list[float] = []
        self._refused = self._failed = 0
        self._start_s = self._last_s = clock()

    @property
    def waiting(self) -> int:
        """How many requests have not ended."""
        with self._lock:
            return len(self._due_s)

    def send(self, k: int, due_s: float) -> None:
        """Send request ``k`` now."""
        self._late_ms.append((self._clock() - due_s) * 1e3)
        try:
            future = self._submit(k)
        except self._refusal:
            now_s = self._clock()
            self._refusals_ms.append((now_s - due_s) * 1e3)
            self._ready(now_s + BACKOFF_S)
            return
        with self._lock:
            self._due_s[k] = due_s
        future.add_done_callback(partial(self._ended, k))

    def settle(self, patience_s: float, sleep: Callable[[float], None]) -> None:
        """Wait for unfinished requests; those that do not end in time have failed."""
        until_s = self._clock() + patience_s
        while self.waiting and self._clock() < until_s:
            sleep(_POLL_S)
        with self._lock:
            self._failed += len(self._due_s)
            self._due_s.clear()

    def run(
        self, *, plan: Plan, rate_per_s: float | None, clients: int | None, duration_s: float, slo_ms: float | None
    ) -> LoadRun:
        """The whole load. Its duration includes the time until the last answer."""
        latencies_ms = self._latencies_ms
        return LoadRun(
            plan=plan,
            rate_per_s=rate_per_s,
            clients=clients,
            duration_s=max(duration_s, self._last_s - self._start_s),
            offered=len(self._late_ms),
            answered=len(latencies_ms),
            refused=self._refused + len(self._refusals_ms),
            failed=self._failed,
            in_time=sum(ms <= (inf if slo_ms is None else slo_ms) for ms in latencies_ms),
            p50_ms=_quantile(latencies_ms, 0.5),
            p99_ms=_quantile(latencies_ms, 0.99),
            refusal_p99_ms=_quantile(self._refusals_ms, 0.99),
            slo_ms=slo_ms,
            sender_late_p99_ms=_quantile(self._late_ms, 0.99),
        )

    def _ended(self, k: int, future: "Future[Any]") -> None:
        now_s = self._clock()
        error = None if future.cancelled() else future.exception()
        refused = isinstance(error, self._refusal)
        ok = not future.cancelled() and error is None and (self._check is None or self._check(k, future.result()))
        with self._lock:
            due_s = self._due_s.pop(k, None)
            if due_s is None:  # it was given up
                return
            self._last_s = max(self._last_s, now_s)
            if ok:
                self._latencies_ms.append((now_s - due_s) * 1e3)
            elif refused:
                self._refused += 1
            else:
                self._failed += 1
            self._ready(now_s + BACKOFF_S if refused else now_s)


def _quantile(values: Sequence[float], q: float) -> float:
    return quantile(values, q) if values else 0.0
