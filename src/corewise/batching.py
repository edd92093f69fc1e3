"""Requests to batches, under deadlines: a pure policy that decides, and a runner that has it drive real instances.

The policy knows no threads and no clock: time is an argument, so the search simulates with the same decisions that
the server makes. Deadlines say when, priorities say who yields when there is not time for all (RED, robust earliest
deadline first: Buttazzo and Stankovic 1993). Admission plays the schedule through with the measured latencies: what is
accepted makes its deadline as long as calls take no longer than measured, nobody cancels, no instance dies and nothing
of higher priority comes.
"""

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import accumulate, count, pairwise
from math import ceil, inf, isnan
from time import monotonic
from typing import Literal, NamedTuple, Self, TypeVar

import numpy as np

from corewise.errors import CorewiseError, EngineError, InputError
from corewise.values import Measurement

T = TypeVar("T")
Reason = Literal[
    "too large", "too urgent", "queue full", "overloaded", "no instance", "draining", "expired", "displaced"
]
WORDS: dict[Reason, str] = {
    "too large": "it has more rows than a call may have; send it in parts",
    "too urgent": "even an idle instance would miss its deadline; give it more time",
    "queue full": "the queue is full; try again later",
    "overloaded": "it, or one that waits, would miss its deadline; try again later",
    "no instance": "no instance of the model is running; try again later",
    "draining": "the server is stopping; ask another one",
    "expired": "it waited until it could no longer make its deadline; try again later",
    "displaced": "one of higher priority took its time; try again later",
}
"""Why a request is not served. ``expired`` and ``displaced`` befall only accepted ones; no instance, draining both."""

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""One instance, as ``engines.Session.run``: arrays in and out with the batch as dimension 0; one thread calls it."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Milliseconds of one call over its batch, as (batch, ms): batches rise, and no larger one is faster."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points))
        if not self.points or not rising or self.points[0][0] < 1 or not 0 < self.points[0][1] < inf:
            raise ValueError(f"a latency table rises in batch and time, from above 0; this one is {self.points}")

    @classmethod
    def of(cls, measurements: Sequence[Measurement], figure: Literal["p50_ms", "p99_ms"] = "p99_ms") -> Self:
        """The table of measurements of one build that differ only in the batch.

        By p99 nearly all that is admitted is in time; by p50 more is admitted, and the last ones are often late. What
        noise made faster than a smaller batch counts as slow as that. Raises ``ValueError`` where there is none, or
        threads or instances differ.
        """
        if len({(m.plan.threads_per_instance, m.plan.instances) for m in measurements}) != 1:
            raise ValueError("a latency table needs measurements with the same threads and instances")
        ordered = sorted((m.plan.batch, float(getattr(m, figure))) for m in measurements)
        slowest = accumulate((ms for _, ms in ordered), max)
        return cls(points=tuple({batch: ms for (batch, _), ms in zip(ordered, slowest, strict=True)}.items()))

    def latency_ms(self, rows: int) -> float:
        """Of a call with ``rows`` items, interpolated; below the table its first, above in proportion to its last."""
        batches, ms = zip(*self.points, strict=True)
        return float(np.interp(rows, batches, ms)) * max(1.0, rows / float(batches[-1]))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the policy knows of a request. Only requests of equal ``group`` share a batch."""

    id: int
    deadline_s: float
    """When its answer must be there, on the clock of ``now_s``; ``inf`` where that does not matter."""
    priority: int = 0
    """The higher one displaces the lower one where there is not time or room for both."""
    group: Hashable = None
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A request that was accepted and will not be served."""

    request: Request
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request waits; ``dropped`` no longer do."""

    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The request may not wait. It might after ``retry_after_s`` if nothing else came; ``None``: that will not help."""

    reason: Reason
    retry_after_s: float | None = None
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an instance runs now, the most urgent first, and when that should end; no requests where none waits."""

    requests: tuple[Request, ...]
    end_s: float
    dropped: tuple[Dropped, ...] = ()


class _Place(NamedTuple):
    """A place in the queue; places sort by deadline, priority and arrival."""

    deadline_s: float
    yields: int
    arrival: int
    request: Request
    room_s: float = 0.0
    """The call it needs time for: one with those of its group ahead of it, shared among the idle instances.

    If admission asked only for the smallest call that is in time, an overloaded queue would fill up with requests that
    leave time for nothing but small, wasteful calls: goodput fell to 58 % of capacity.
    """


class _Plan(NamedTuple):
    """A schedule played through, up to the first call that one more request at the end of the queue might join."""

    free_s: list[float]
    rest: list[_Place]
    late_s: float
    """By how much the calls so far are late at most; below 0 where all are early."""


class Policy:
    """The queue, and until when each instance is busy. Not thread-safe; ``now_s`` never goes back.

    ``max_batch`` and ``max_waiting`` count rows: of a call, and of the queue. Raises ``ValueError`` unless
    1 <= max_batch <= max_waiting.
    """

    def __init__(self, curve: Curve, *, max_batch: int, max_waiting: int) -> None:
        if not 1 <= max_batch <= max_waiting:
            raise ValueError(f"1 <= max_batch <= max_waiting does not hold for {max_batch} and {max_waiting}")
        self.draining = False
        """Set it to refuse all offers."""
        self.waiting_rows = 0
        self.next_expiry_s = inf
        """``expire`` drops nothing before this time."""
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._seconds = [0.0, *(curve.latency_ms(rows) / 1e3 for rows in range(1, max_batch + 1))]
        self._waiting: list[_Place] = []
        self._arrivals = count()
        self._end_s: dict[int, float | None] = {}
        """When each instance's call should end; ``None`` while it is idle."""
        self._plan: _Plan | None = None
        """Of what waits, good until ``_plan_until_s`` or any change; most requests come to the end of the queue."""
        self._plan_until_s = -inf

    @property
    def instances(self) -> int:
        """How many instances there are, idle or busy."""
        return len(self._end_s)

    def finished(self, instance: int) -> None:
        """An instance's call has ended, or a new instance has come."""
        self._end_s[instance] = self._plan = None

    def leave(self, instance: int) -> None:
        """An instance is gone, and whatever it was running with it."""
        del self._end_s[instance]
        self._plan = None

    def offer(self, request: Request, now_s: float) -> Accepted | Refused:
        """Let the request wait if it and all others that do, but for lower priorities, should make their deadlines."""
        expired = self.expire(now_s)
        if (never := self._never(request, now_s)) is not None:
            return Refused(reason=never, dropped=expired)
        place = _Place(request.deadline_s, -request.priority, next(self._arrivals), request)
        displaced: list[_Place] = []
        fit = self._fit(place, displaced, now_s)
        if isinstance(fit, Refused):
            lower = sorted(
                (p for p in self._waiting if p.yields > place.yields),
                key=lambda p: (p.yields, p.deadline_s, p.arrival),
                reverse=True,
            )
            fits = bisect_left(
                range(len(lower)), True, key=lambda i: not isinstance(self._fit(place, lower[: i + 1], now_s), Refused)
            )
            displaced = lower[: fits + 1]
            if fits == len(lower) or isinstance(fit := self._fit(place, displaced, now_s), Refused):
                return Refused(reason=fit.reason, retry_after_s=fit.retry_after_s, dropped=expired)
        dropped = expired + self._drop(displaced, "displaced")
        place, self._plan = fit
        self._plan_until_s = min(self._free_s(now_s))
        insort(self._waiting, place)
        self.waiting_rows += request.rows
        self.next_expiry_s = min(self.next_expiry_s, request.deadline_s - self._seconds[request.rows])
        return Accepted(dropped=dropped)

    def next_batch(self, instance: int, now_s: float) -> Batch:
        """What the idle instance runs now: the most urgent request and those of its group that follow it.

        Never empty while one waits that can make its deadline: nothing waits for company. As many as a call may have,
        but no more than let the most urgent one be in time, nor than its share where other instances are idle too.
        """
        dropped = self.expire(now_s)
        if not self._waiting:
            return Batch(requests=(), end_s=now_s, dropped=dropped)
        taken, self._waiting, _ = self._split(self._waiting, now_s, self._free_s(now_s))
        rows = _rows(taken)
        self.waiting_rows -= rows
        end_s = self._end_s[instance] = now_s + self._seconds[rows]
        self._plan = None
        return Batch(requests=tuple(place.request for place in taken), end_s=end_s, dropped=dropped)

    def cancel(self, request_id: int) -> None:
        """Free the request's place if it has one."""
        self._drop([place for place in self._waiting if place.request.id == request_id], "expired")

    def expire(self, now_s: float) -> tuple[Dropped, ...]:
        """Drop what would be late even if it ran alone and now."""
        if now_s < self.next_expiry_s:
            return ()
        late = [place for place in self._waiting if now_s + self._seconds[place.request.rows] > place.deadline_s]
        dropped = self._drop(late, "expired")
        starts = (place.deadline_s - self._seconds[place.request.rows] for place in self._waiting)
        self.next_expiry_s = min(starts, default=inf)
        return dropped

    def drop_all(self, reason: Reason) -> tuple[Dropped, ...]:
        """Drop all that wait."""
        return self._drop(self._waiting, reason)

    def _never(self, request: Request, now_s: float) -> Reason | None:
        """Why it is refused whatever waits."""
        if self.draining:
            return "draining"
        if request.rows > self._max_batch:
            return "too large"
        if not self._end_s:
            return "no instance"
        return "too urgent" if now_s + self._seconds[request.rows] > request.deadline_s else None

    def _fit(self, place: _Place, without: list[_Place], now_s: float) -> tuple[_Place, _Plan] | Refused:
        """The place with its room, and the plan with it, if the places to displace were gone."""
        free_s = self._free_s(now_s)
        if self.waiting_rows - _rows(without) + place.request.rows > self._max_waiting:
            return Refused(reason="queue full", retry_after_s=max(min(free_s) - now_s, self._seconds[1]))
        gone = {other.arrival for other in without}
        others = [other for other in self._waiting if other.arrival not in gone] if gone else self._waiting
        position = bisect_left(others, place)
        ahead, idle = 0, max(1, _idle(free_s, now_s))
        for other in reversed(others[:position]):
            if ahead >= self._max_batch * idle:
                break
            ahead += other.request.rows * (other.request.group == place.request.group)
        rows = max(place.request.rows, ceil((ahead + place.request.rows) / idle))
        place = place._replace(room_s=self._seconds[min(rows, self._max_batch)])
        if gone or position < len(others):
            plan = _Plan(free_s, [*others[:position], place, *others[position:]], -inf)
        else:
            if self._plan is None or now_s > self._plan_until_s:
                self._plan_until_s = min(free_s)
                self._plan, _ = self._play(_Plan(free_s, others, -inf))
            plan = self._plan._replace(rest=[*self._plan.rest, place])
        plan, late_s = self._play(plan)
        return (place, plan) if late_s <= 0 else Refused(reason="overloaded", retry_after_s=late_s)

    def _play(self, plan: _Plan) -> tuple[_Plan, float]:
        """Go on with a plan, as ``next_batch`` will if nothing else comes; and how late the latest call is."""
        free_s, rest, late_s = plan
        free_s = list(free_s)
        heapify(free_s)
        settled = None
        while rest:
            start_s = free_s[0]
            taken, left, full = self._split(rest, start_s, free_s)
            if not full and settled is None:
                settled = _Plan(list(free_s), rest, late_s)
            needs_s = self._seconds[_rows(taken)]
            late_s = max(late_s, start_s + max(needs_s, taken[0].room_s) - taken[0].deadline_s)
            heapreplace(free_s, start_s + needs_s)
            rest = left
        return settled or _Plan(free_s, [], late_s), late_s

    def _split(
        self, waiting: list[_Place], now_s: float, free_s: list[float]
    ) -> tuple[list[_Place], list[_Place], bool]:
        """What an instance takes of a queue that is not empty; what is left; whether more at its end change nothing."""
        head = waiting[0]
        most = bisect_right(self._seconds, head.deadline_s, key=lambda seconds: now_s + seconds) - 1
        if (idle := _idle(free_s, now_s)) > 1:
            most = min(most, ceil(_rows(waiting) / idle))
        rows = 0
        taken: list[_Place] = []
        left: list[_Place] = []
        for i, place in enumerate(waiting):
            if place.request.group != head.request.group:
                left.append(place)
            elif taken and rows + place.request.rows > most:  # and nobody of its group overtakes it
                return taken, left + waiting[i:], idle <= 1
            else:
                taken.append(place)
                rows += place.request.rows
        return taken, left, idle <= 1 and rows >= most

    def _free_s(self, now_s: float) -> list[float]:
        """When each instance will be free. A call that is overdue is taken to need as long again as it is overdue."""
        return [now_s if end_s is None else max(end_s, 2 * now_s - end_s) for end_s in self._end_s.values()]

    def _drop(self, places: list[_Place], reason: Reason) -> tuple[Dropped, ...]:
        if not places:
            return ()
        gone = {place.arrival for place in places}
        self._waiting = [place for place in self._waiting if place.arrival not in gone]
        self.waiting_rows -= _rows(places)
        self._plan = None
        return tuple(Dropped(request=place.request, reason=reason) for place in places)


def _rows(places: list[_Place]) -> int:
    return sum(place.request.rows for place in places)


def _idle(free_s: list[float], now_s: float) -> int:
    return sum(free <= now_s for free in free_s)


class NotServed(CorewiseError):
    """No instance ran the request: it was refused at once or dropped later."""

    def __init__(self, reason: Reason, retry_after_s: float | None = None) -> None:
        super().__init__("the request is not served", WORDS[reason])
        self.reason = reason
        self.retry_after_s = retry_after_s


class CallFailed(CorewiseError):
    """The call that the request was part of raised ``__cause__``."""


class InstanceDied(CorewiseError):
    """What an instance raises when it can run no more."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A request's own rows of the outputs, where its time went, and the rows of the whole call."""

    outputs: list[np.ndarray]
    waited_s: float
    ran_s: float
    batch_rows: int


class _Job(NamedTuple):
    inputs: Sequence[np.ndarray]
    submitted_s: float
    future: "Future[Answer]"


class Batcher:
    """Runs requests on instances as a fresh policy decides, with one thread for each instance.

    ``reopen(i)`` makes instance ``i`` anew, in its thread, after it raised ``InstanceDied``; without it, or where it
    raises, the others go on alone. Done callbacks of futures run in these threads: they must be short.
    """

    def __init__(
        self, instances: Sequence[Run], policy: Policy, *, reopen: Callable[[int], Run | None] = lambda instance: None
    ) -> None:
        self._policy = policy
        self._reopen = reopen
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._losses = threading.Condition(self._lock)
        self._jobs: dict[int, _Job] = {}
        """Those that wait, by request."""
        self._lost: list[tuple[_Job, Reason]] = []
        """Those that were dropped and have not been told."""
        self._wake_s = inf
        self._closed = False
        self._ids = count()
        for i in range(len(instances)):
            policy.finished(i)
        self._threads = [threading.Thread(target=self._serve, args=item, daemon=True) for item in enumerate(instances)]
        self._teller = threading.Thread(target=self._tell, daemon=True)
        for thread in (*self._threads, self._teller):
            thread.start()

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._policy.waiting_rows

    @property
    def instances(self) -> int:
        """How many instances live."""
        return self._policy.instances

    def submit(self, inputs: Sequence[np.ndarray], *, timeout_s: float = inf, priority: int = 0) -> "Future[Answer]":
        """Queue one request: arrays of as many rows each (dimension 0), at least 1, which must not change any more.

        Calls are shared by requests of the same dtypes and other dimensions. Cancelling the future frees its place.
        The future raises ``NotServed`` where the request was dropped, ``CallFailed`` where its call failed. Raises
        ``NotServed`` at once where it is refused, and ``InputError`` for inputs that are no batch.
        """
        rows = {array.shape[:1] for array in inputs}
        if len(rows) != 1 or rows & {(), (0,)} or isnan(timeout_s):
            raise InputError(
                f"inputs of shapes {[array.shape for array in inputs]} within {timeout_s} s are no request",
                "give every input the same first dimension of at least 1, and a time",
            )
        with self._lock:
            now_s = monotonic()
            request = Request(
                id=next(self._ids),
                deadline_s=now_s + timeout_s,
                priority=priority,
                group=tuple((array.dtype.str, array.shape[1:]) for array in inputs),
                rows=len(inputs[0]),
            )
            decision = self._policy.offer(request, now_s)
            self._lose(decision.dropped)
            if isinstance(decision, Refused):
                raise NotServed(decision.reason, decision.retry_after_s)
            future: Future[Answer] = Future()
            self._jobs[request.id] = _Job(inputs, now_s, future)
            self._work.notify()
            if self._policy.next_expiry_s < self._wake_s:
                self._losses.notify()
        future.add_done_callback(lambda done: self._left(request.id) if done.cancelled() else None)
        return future

    def close(self, drain_s: float = inf) -> bool:
        """Refuse what comes, finish for ``drain_s`` at most what was accepted, and drop what waits then.

        Whether all was finished: where not, calls that still run are left to end by themselves.
        """
        until_s = monotonic() + drain_s
        with self._lock:
            self._policy.draining = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(min(max(0.0, until_s - monotonic()), threading.TIMEOUT_MAX))
        with self._lock:
            dropped = self._policy.drop_all("draining")
            self._closed = True
            self._lose(dropped)
        self._teller.join()
        return not dropped and not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self, instance: int, run: Run | None) -> None:
        """The life of an instance's thread."""
        while run is not None and (jobs := self._take(instance)):
            started_s = monotonic()
            answers, error = _caught(_call, run, jobs)
            ran_s, rows = monotonic() - started_s, sum(len(job.inputs[0]) for job in jobs)
            for job, outputs in zip(jobs, answers or [[]] * len(jobs), strict=True):
                if error is None:
                    waited_s = started_s - job.submitted_s
                    job.future.set_result(Answer(outputs=outputs, waited_s=waited_s, ran_s=ran_s, batch_rows=rows))
                else:
                    failure = CallFailed(f"the call with this request failed: {error!r}")
                    failure.__cause__ = error
                    job.future.set_exception(failure)
            if isinstance(error, InstanceDied):
                run = self._replace(instance)
            else:
                with self._lock:
                    self._policy.finished(instance)

    def _take(self, instance: int) -> list[_Job]:
        """The instance's next call as soon as there is one; empty when there will be none."""
        with self._lock:
            while True:
                batch = self._policy.next_batch(instance, monotonic())
                self._lose(batch.dropped)
                taken = [self._jobs.pop(request.id) for request in batch.requests]
                if jobs := [job for job in taken if job.future.set_running_or_notify_cancel()]:
                    return jobs
                if taken:
                    self._policy.finished(instance)
                elif self._policy.draining:
                    return []
                else:
                    self._work.wait()

    def _replace(self, instance: int) -> Run | None:
        """The dead instance's successor. Until there is one, admission counts on the others only."""
        with self._lock:
            self._policy.leave(instance)
        run, _ = _caught(self._reopen, instance)
        with self._lock:
            if run is not None:
                self._policy.finished(instance)
            elif not self._policy.instances:
                self._lose(self._policy.drop_all("no instance"))
        return run

    def _left(self, request_id: int) -> None:
        """Its future was cancelled."""
        with self._lock:
            self._policy.cancel(request_id)
            self._jobs.pop(request_id, None)

    def _lose(self, dropped: Sequence[Dropped]) -> None:
        self._lost += [(self._jobs.pop(one.request.id), one.reason) for one in dropped]
        if self._lost or self._closed:
            self._losses.notify()

    def _tell(self) -> None:
        """The life of the thread that drops requests in time, and tells all that were dropped."""
        done = False
        while not done:
            with self._lock:
                self._wake_s = self._policy.next_expiry_s
                if not self._lost and not self._closed:
                    self._losses.wait(min(max(0.0, self._wake_s - monotonic()), threading.TIMEOUT_MAX))
                self._lose(self._policy.expire(monotonic()))
                lost, self._lost = self._lost, []
                done = self._closed
            for job, reason in lost:  # without the lock, for it runs the futures' callbacks
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(NotServed(reason))


def _call(run: Run, jobs: list[_Job]) -> list[list[np.ndarray]]:
    """Run the jobs as one batch: each one's rows of every output."""
    columns = zip(*(job.inputs for job in jobs), strict=True)
    outputs = run(jobs[0].inputs if len(jobs) == 1 else [np.concatenate(column) for column in columns])
    ends = [0, *accumulate(len(job.inputs[0]) for job in jobs)]
    if any(len(output) != ends[-1] for output in outputs):
        raise EngineError(f"outputs of {[len(output) for output in outputs]} rows for {ends[-1]} rows of input")
    return [[output[start:stop] for output in outputs] for start, stop in pairwise(ends)]


def _caught(call: Callable[..., T], *args: object) -> tuple[T | None, BaseException | None]:
    """What a call returned and what it raised; SystemExit too, for nobody may be left without an answer."""
    try:
        return call(*args), None
    except BaseException as error:  # noqa: BLE001 - the request boundary: whatever an instance raises is its batch's answer
        return None, error
