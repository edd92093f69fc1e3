"""Which requests run together and when, and which are refused. Pure.

The policy uses no threads and no clock: time is an argument, so a simulation makes the same decisions as the server.
Requests run by deadline, and under overload those of lower priority are dropped first (RED, robust earliest deadline
first: Buttazzo and Stankovic 1993). Admission plays the schedule through with the measured latencies: an accepted
request meets its deadline if calls take no longer than measured, no instance dies and no request of higher priority
arrives. If other programs slow calls down, admission scales the latencies by the slowdown of the last calls.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Hashable
from heapq import heapify, heapreplace
from itertools import count
from math import ceil, inf
from typing import NamedTuple

from corewise.batching.latency import LatencyTable
from corewise.batching.requests import ACCEPTED, Accepted, Batch, Dropped, Reason, Refused, Request

REMEMBERED, RARE = 32, 4
"""The slowdown of calls is the fourth largest of the last 32: fewer slow calls may be chance."""
LONG = 64
"""A queue of this many requests or more is not played through for one that no schedule could answer in time."""


class Place(NamedTuple):
    """A place in the queue; places sort by deadline, priority and arrival."""

    deadline_s: float
    yields: int
    arrival: int
    request: Request
    room_s: float = 0.0
    """Time of the call that it is expected to run in, with the requests of its group ahead of it.

    If admission required only the smallest call to be in time, an overloaded queue would fill up with requests that
    leave time only for small, inefficient calls: goodput fell to 58 % of capacity.
    """


class _Plan(NamedTuple):
    """A schedule played through, up to the first call that one more request at the end of the queue might join."""

    free_s: list[float]
    rest: list[Place]
    late_s: float
    """The most that a call so far is late; below 0 if all are early."""


Fit = tuple[Place, _Plan | None]
"""A place with its room, and the plan with it if there is one."""


class Policy:
    """The queue, and until when each instance is busy. Not thread-safe; ``now_s`` never goes back.

    Args:
        curve: How long calls take by their rows (p99).
        max_batch: Most rows of a call.
        max_waiting: Most rows in the queue.
        shared: Whether requests share calls; else each call has one request only.

    Raises:
        ValueError: Not 1 <= max_batch <= max_waiting.
    """

    def __init__(self, curve: LatencyTable, *, max_batch: int, max_waiting: int, shared: bool = True) -> None:
        if not 1 <= max_batch <= max_waiting:
            raise ValueError(f"1 <= max_batch <= max_waiting does not hold for {max_batch} and {max_waiting}")
        self.draining = False
        """Set it to refuse all offers."""
        self.waiting_rows = 0
        self.next_expiry_s = inf
        """``expire`` drops nothing before this time."""
        self.look_again_s = inf
        """When the last ``turn`` is to be asked again, even if nothing happens until then."""
        self.margin_s = 0.0
        """A request is admitted only if its answer is expected this long before its deadline."""
        self.slowness = 1.0
        """Predicted duration of calls over their measured duration; at least 1."""
        self._max_batch, self._max_waiting, self._shared = max_batch, max_waiting, shared
        self._measured_s = [0.0, *(curve.latency_ms(rows) / 1e3 for rows in range(1, max_batch + 1))]
        self._least_s = self._measured_s
        """Duration of a call that is alone, by its rows, as measured."""
        self._row_s = min(seconds / rows for rows, seconds in enumerate(self._measured_s) if rows)
        """Duration of a row in the most efficient call, as measured."""
        self._most_row_s = max(seconds / rows for rows, seconds in enumerate(self._measured_s) if rows)
        """Duration of a row in the least efficient call, as measured."""
        self._seconds = self._measured_s
        """``_measured_s`` times ``slowness``."""
        self._times = deque([1.0] * REMEMBERED, REMEMBERED)
        """Duration of the last calls over their measured duration."""
        self._waiting: list[Place] = []
        self._yields: Counter[int] = Counter()
        """Number of waiting requests by negated priority."""
        self._kinds: Counter[tuple[Hashable, int]] = Counter()
        """Number of waiting requests by group and rows."""
        self._arrivals = count()
        self._end_s: dict[int, float | None] = {}
        """When each instance's call should end; ``None`` while it is idle."""
        self._rows: dict[int, int] = {}
        """Rows in each instance's current call."""
        self._plan: _Plan | None = None
        """The schedule of the queue, valid until ``_plan_until_s`` or a change; most requests extend its end."""
        self._plan_until_s = -inf

    @property
    def instances(self) -> int:
        """How many instances there are, idle or busy."""
        return len(self._end_s)

    def finished(self, instance: int, took_s: float | None = None) -> None:
        """An instance's call has ended, after ``took_s`` if it succeeded; or a new instance is ready."""
        rows = self._rows.pop(instance, 0)
        if took_s is not None and rows:
            self._note_slowness(took_s / self._measured_s[rows])
        self._end_s[instance] = self._plan = None

    def leave(self, instance: int) -> None:
        """An instance is gone, with its current call."""
        del self._end_s[instance]
        self._rows.pop(instance, None)
        self._plan = None

    def offer(self, request: Request, now_s: float) -> Accepted | Refused:
        """Queue the request if it and all waiting requests of its priority or higher should meet their deadlines."""
        expired = self.expire(now_s)
        if (never := self._never(request, now_s)) is not None:
            return Refused(reason=never, dropped=expired)
        place = Place(request.deadline_s, -request.priority, next(self._arrivals), request)
        displaced: list[Place] = []
        fit = self._fit(place, displaced, now_s)
        if isinstance(fit, Refused):
            if place.yields >= max(self._yields, default=place.yields):
                return Refused(reason=fit.reason, retry_after_s=fit.retry_after_s, dropped=expired)
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
        self._put(place)
        return Accepted(dropped=dropped) if dropped else ACCEPTED

    def expected_s(self, now_s: float, ahead_rows: int = 0) -> float:
        """About how long a row that came now would take, behind all that wait and ``ahead_rows`` more."""
        free_s = self._free_s(now_s)
        if not free_s:
            return 0.0
        calls, rest = divmod(self.waiting_rows + ahead_rows, self._max_batch if self._shared else 1)
        busy_s = sum(max(0.0, free - now_s) for free in free_s)
        busy_s += calls * self._seconds[self._max_batch if self._shared else 1]
        return busy_s / len(free_s) + self._seconds[rest + 1]

    def turn(self, now_s: float) -> int | None:
        """The idle instance that ``next_batch`` is for; ``None`` if nothing waits, or nothing can start now."""
        if not self._waiting:
            return None
        return next((instance for instance, end_s in self._end_s.items() if end_s is None), None)

    def next_batch(self, instance: int, now_s: float) -> Batch:
        """The next call of an idle instance: the most urgent request and those of its group that follow it.

        No request waits for others to join it. A call has at most ``max_batch`` rows, fewer if the most urgent request
        would be late otherwise, and only a share of the queue if other instances are idle too.
        """
        dropped = self.expire(now_s)
        if not self._waiting:
            return Batch(requests=(), end_s=now_s, dropped=dropped)
        taken, left, _ = self._split(self._waiting, now_s, self._free_s(now_s))
        rows = self._rows[instance] = self._take(taken, left)
        end_s = self._end_s[instance] = now_s + self._seconds[rows]
        return Batch(requests=tuple(place.request for place in taken), end_s=end_s, dropped=dropped)

    def cancel(self, request_id: int) -> None:
        """Free the request's place if it has one."""
        self._drop([place for place in self._waiting if place.request.id == request_id], "expired")

    def expire(self, now_s: float) -> tuple[Dropped, ...]:
        """Drop requests that would be late even if they ran now, alone and as fast as measured."""
        if now_s < self.next_expiry_s:
            return ()
        late = [place for place in self._waiting if now_s + self._least_s[place.request.rows] > place.deadline_s]
        dropped = self._drop(late, "expired")
        starts = (place.deadline_s - self._least_s[place.request.rows] for place in self._waiting)
        self.next_expiry_s = min(starts, default=inf)
        return dropped

    def drop_all(self, reason: Reason) -> tuple[Dropped, ...]:
        """Drop all that wait."""
        return self._drop(self._waiting, reason)

    def slow_down(self, slowness: float) -> None:
        """Expect calls to take ``slowness`` times as long as measured."""
        self.slowness = slowness
        self._seconds = [slowness * seconds for seconds in self._measured_s]

    def _never(self, request: Request, now_s: float) -> Reason | None:
        """Why the request is refused even if the queue is empty; ``None`` if it is not."""
        if self.draining:
            return "draining"
        if request.rows > self._max_batch:
            return "too large"
        if not self._end_s:
            return "no instance"
        return "too urgent" if now_s + self._least_s[request.rows] > request.deadline_s else None

    def _fit(self, place: Place, without: list[Place], now_s: float) -> Fit | Refused:
        """How it fits if the places to displace were gone."""
        free_s = self._free_s(now_s)
        request = place.request
        if self.waiting_rows - _rows(without) + request.rows > self._max_waiting:
            return Refused(reason="queue full", retry_after_s=max(min(free_s) - now_s, self._seconds[1]))
        gone = {other.arrival for other in without}
        others = [other for other in self._waiting if other.arrival not in gone] if gone else self._waiting
        rows = self.waiting_rows - _rows(without) + request.rows
        if len(others) >= LONG and (late_s := self._least_late_s(place, others, rows, free_s, now_s)) > 0:
            return Refused(reason="overloaded", retry_after_s=late_s)
        idle = _idle(free_s, now_s)
        if not others and idle:
            # An instance starts it at once: it may be in time, and its duration updates ``slowness``.
            return place._replace(room_s=self._seconds[request.rows]), None
        position = bisect_left(others, place)
        ahead, idle = 0, max(1, idle)
        k = position
        while self._shared and k > 0 and ahead < self._max_batch * idle:
            k -= 1
            other = others[k].request
            if other.group == request.group:
                ahead += other.rows
        call_rows = max(request.rows, -(-(ahead + request.rows) // idle))
        room_s = self._seconds[min(call_rows, self._max_batch)]
        place = Place(place.deadline_s, place.yields, place.arrival, request, room_s)
        first_s = min(place.deadline_s, others[0].deadline_s) if others else place.deadline_s
        if self._most_late_s(first_s, rows, free_s) <= 0:
            return place, None
        is_alike = (
            self._shared
            and request.rows == 1
            and (not self._kinds or (len(self._kinds) == 1 and (request.group, 1) in self._kinds))
        )
        play = self._play_alike if is_alike else self._play
        if gone or position < len(others):
            plan = _Plan(free_s, [*others[:position], place, *others[position:]], -inf)
        else:
            if self._plan is None or now_s > self._plan_until_s:
                self._plan_until_s = min(free_s)
                self._plan, _ = play(_Plan(free_s, others, -inf))
            plan = _Plan(self._plan.free_s, [*self._plan.rest, place], self._plan.late_s)
        plan, late_s = play(plan)
        late_s += self.margin_s
        return (place, plan) if late_s <= 0 else Refused(reason="overloaded", retry_after_s=late_s)

    def _least_late_s(self, place: Place, others: list[Place], rows: int, free_s: list[float], now_s: float) -> float:
        """The least by which the last call would be late if every call of all rows were as efficient as can be."""
        least_s = rows * self._row_s * self.slowness
        end_s = (sum([max(now_s, free) for free in free_s]) + least_s) / len(free_s)
        return end_s + self.margin_s - max(place.deadline_s, others[-1].deadline_s)

    def _most_late_s(self, first_s: float, rows: int, free_s: list[float], room_s: float = 0.0) -> float:
        """The most by which a call would be late if every call were as inefficient as can be.

        ``first_s`` is the earliest deadline. If none would be late, the schedule need not be played through.
        """
        # No instance is idle while something waits, so the last call begins before this, and no call is longer.
        last_s = (sum(free_s) + rows * self._most_row_s * self.slowness) / len(free_s)
        return last_s + max(self._seconds[-1], room_s) + self.margin_s - first_s

    def _play_alike(self, plan: _Plan, rooms: tuple[Place, ...] | None = None) -> tuple[_Plan, float]:
        """``_play`` for requests of one row and one group, call by call instead of request by request."""
        free_s, rest, late_s = plan
        free_s = list(free_s)
        heapify(free_s)
        settled = None
        start, end, idle, before_s = 0, len(rest), 0, -inf
        full_s = self._seconds[self._max_batch]
        while start < end:
            start_s, head = free_s[0], rest[start]
            most = self._max_batch
            if start_s + full_s > head.deadline_s:
                most = bisect_right(self._seconds, head.deadline_s, key=lambda seconds: start_s + seconds) - 1
            # All that are free then are looked through for the first of them only.
            idle, before_s = idle - 1 if start_s == before_s else _idle_of_heap(free_s), start_s
            if idle > 1:
                most = min(most, ceil((end - start) / idle))
            rows = max(1, min(most, end - start))
            if settled is None and (idle > 1 or (rows == end - start and rows < most)):
                settled = _Plan(list(free_s), rest[start:], late_s)
            needs_s = self._seconds[rows]
            room_s = head.room_s if rooms is None or head in rooms else 0.0
            late_s = max(late_s, start_s + max(needs_s, room_s) - head.deadline_s)
            heapreplace(free_s, start_s + needs_s)
            start += rows
        return settled or _Plan(free_s, [], late_s), late_s

    def _play(self, plan: _Plan, rooms: tuple[Place, ...] | None = None) -> tuple[_Plan, float]:
        """Play a plan to its end as ``next_batch`` will if no request comes, and how late the latest call is.

        Only the rooms of ``rooms`` count, if they are given.
        """
        free_s, rest, late_s = plan
        free_s = list(free_s)
        heapify(free_s)
        settled = None
        while rest:
            start_s = free_s[0]
            taken, left, full = self._split(rest, start_s, free_s)
            if not full and settled is None:
                settled = _Plan(list(free_s), rest, late_s)
            needs_s, head = self._seconds[_rows(taken)], taken[0]
            room_s = head.room_s if rooms is None or head in rooms else 0.0
            late_s = max(late_s, start_s + max(needs_s, room_s) - head.deadline_s)
            heapreplace(free_s, start_s + needs_s)
            rest = left
        return settled or _Plan(free_s, [], late_s), late_s

    def _late_s(self, waiting: list[Place], free_s: list[float], new: Place | None = None) -> float:
        """How late the latest call of those that wait is if no request comes; below 0 if all are early.

        Only the room of a new one counts: that of the others was for the calls they were then expected in.
        """
        rows, first = _rows(waiting), waiting[0]
        if (late_s := self._most_late_s(first.deadline_s, rows, free_s, new.room_s if new else 0.0)) <= 0:
            return late_s - self.margin_s
        is_alike = rows == len(waiting) and all(place.request.group == first.request.group for place in waiting)
        play = self._play_alike if self._shared and is_alike else self._play
        return play(_Plan(free_s, waiting, -inf), (new,) if new else ())[1]

    def _split(self, waiting: list[Place], now_s: float, free_s: list[float]) -> tuple[list[Place], list[Place], bool]:
        """Split a queue that is not empty: the next call, the rest, and whether the call stays if the queue grows."""
        head = waiting[0]
        if not self._shared:
            return waiting[:1], waiting[1:], _idle(free_s, now_s) <= 1
        most = bisect_right(self._seconds, head.deadline_s, key=lambda seconds: now_s + seconds) - 1
        if (idle := _idle(free_s, now_s)) > 1 and len(waiting) < most * idle:
            most = min(most, ceil(_rows(waiting) / idle))
        taken, left, is_cut = cut(waiting, most)
        return taken, left, idle <= 1 and (is_cut or _rows(taken) >= most)

    def _free_s(self, now_s: float) -> list[float]:
        """When each instance will be free. An overdue call is expected to need as long again as it is overdue."""
        return [now_s if end_s is None else max(end_s, 2 * now_s - end_s) for end_s in self._end_s.values()]

    def _put(self, place: Place) -> None:
        """Have it wait."""
        request = place.request
        insort(self._waiting, place)
        self._yields[place.yields] += 1
        self._kinds[request.group, request.rows] += 1
        self.waiting_rows += request.rows
        self.next_expiry_s = min(self.next_expiry_s, request.deadline_s - self._least_s[request.rows])

    def _drop(self, places: list[Place], reason: Reason) -> tuple[Dropped, ...]:
        if not places:
            return ()
        gone = {place.arrival for place in places}
        self._waiting = [place for place in self._waiting if place.arrival not in gone]
        self.waiting_rows -= _rows(places)
        self._forget(places)
        self._plan = None
        return tuple(Dropped(request=place.request, reason=reason) for place in places)

    def _take(self, taken: list[Place], left: list[Place]) -> int:
        """Leave only ``left`` in the queue; the rows of what was taken."""
        rows = _rows(taken)
        self._waiting = left
        self.waiting_rows -= rows
        self._forget(taken)
        self._plan = None
        return rows

    def _note_slowness(self, ratio: float) -> None:
        """Note the ratio of a call's time to its measured time."""
        self._times.append(ratio)
        slowness = max(1.0, sorted(self._times)[-RARE])
        if slowness != self.slowness:
            self.slow_down(slowness)

    def _forget(self, places: list[Place]) -> None:
        for place in places:
            kind = (place.request.group, place.request.rows)
            self._yields[place.yields] -= 1
            self._kinds[kind] -= 1
            if not self._yields[place.yields]:
                del self._yields[place.yields]
            if not self._kinds[kind]:
                del self._kinds[kind]


def cut(waiting: list[Place], most: int) -> tuple[list[Place], list[Place], bool]:
    """The first request and those of its group that follow, of ``most`` rows or one request; the rest; whether some of
    the group are in it."""
    head, rows = waiting[0], 0
    taken: list[Place] = []
    left: list[Place] = []
    for i, place in enumerate(waiting):
        if place.request.group != head.request.group:
            left.append(place)
        elif taken and rows + place.request.rows > most:  # no later request of its group overtakes it
            return taken, left + waiting[i:], True
        else:
            taken.append(place)
            rows += place.request.rows
    return taken, left, False


def _rows(places: list[Place]) -> int:
    return sum([place.request.rows for place in places])


def _idle(free_s: list[float], now_s: float) -> int:
    return len([free for free in free_s if free <= now_s])


def _idle_of_heap(free_s: list[float]) -> int:
    """How many are free when the first is."""
    return _idle(free_s, free_s[0]) if free_s[0] in free_s[1:3] else 1
