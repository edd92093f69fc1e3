"""A queue of requests whose calls run on a few cores each, or one at a time on all of them. Pure.

The instance with all cores is wide, the others are narrow. A request that is alone runs wide; a crowd runs narrow, in
calls that requests share.
"""

from bisect import bisect_right
from dataclasses import dataclass
from math import inf

from corewise.batching.elastic import Arrivals
from corewise.batching.latency import LatencyTable
from corewise.batching.partition import Partitions
from corewise.batching.policy import LONG, Fit, Place, Policy, cut
from corewise.batching.requests import Accepted, Batch, Refused, Request
from corewise.batching.rounds import Rounds

SOON = 0.2
"""How long a free core may wait for the last busy one, as a share of a narrow call of one row. Then all are free, and a
wide call can begin."""
FEW = 2
"""It waits only if at most this many requests wait for each narrow instance: with more, the rate counts and not the
latency."""


@dataclass(frozen=True, kw_only=True)
class ElasticTables:
    """The measured times of an elastic plan's calls, by their rows."""

    cores: int
    threads: int
    """Threads of each narrow instance."""
    wide: LatencyTable
    """The medians (p50): the policy decides by them and by those of ``narrow``."""
    narrow: LatencyTable
    wide_slow: LatencyTable
    """The p99 of wide calls, by which requests are admitted; ``Policy`` has its own table of the narrow ones."""

    @property
    def instances(self) -> int:
        """How many narrow instances there are. Their numbers begin at 0, and the wide one's comes after theirs."""
        return self.cores // self.threads

    @property
    def partitions(self) -> Partitions:
        """The best division of any number of rows and cores among both layouts."""
        return Partitions({self.threads: self.narrow, self.cores: self.wide}, self.cores)


def _rounds(tables: ElasticTables, most_wide: int, most_narrow: int, shared: bool) -> Rounds:
    """The process that decides how rounds of such calls begin."""
    wide_s, narrow_s = (
        [0.0, *(table.latency_ms(rows) / 1e3 for rows in range(1, most + 1))]
        for table, most in ((tables.wide, most_wide), (tables.narrow, most_narrow))
    )
    return Rounds(wide_s, narrow_s, instances=tables.instances, shared=shared)


class _WideCalls(Policy):
    """Plays wide calls through, one after the other; nothing waits in it."""

    def late_s(self, waiting: list[Place], free_s: float, new: Place | None) -> float:
        """How late the latest call would be if an instance were free at ``free_s``."""
        return self._late_s(waiting, [free_s], new)


class ElasticQueue(Policy):
    """A policy for narrow instances and a wide one, which runs only while no other does.

    A request is accepted if all would be in time in narrow calls, or all in wide ones; a call starts only if all that
    wait are in time in one of these ways after it. When all cores are free, ``Rounds`` says by the recent rate of
    arrivals how to begin. No core that a request could use stays idle while it waits, except in the moment in which the
    last narrow call should end, or before a wide call that is the only one in time.
    """

    def __init__(
        self, curve: LatencyTable, tables: ElasticTables, *, max_batch: int, max_waiting: int, shared: bool = True
    ) -> None:
        super().__init__(curve, max_batch=max_batch, max_waiting=max_waiting, shared=shared)
        most = tables.wide_slow.points[-1][0]
        self._wide_s = [0.0, *(tables.wide_slow.latency_ms(rows) / 1e3 for rows in range(1, max(most, max_batch) + 1))]
        """Duration of a wide call by its rows, as measured (p99)."""
        self._most_wide = most
        self._wide_calls = _WideCalls(
            tables.wide_slow, max_batch=most, max_waiting=max(most, max_waiting), shared=shared
        )
        self._rounds = _rounds(tables, most, max_batch, shared)
        self._rounds_apart = _rounds(tables, most, max_batch, shared=False) if shared else self._rounds
        """For requests of several kinds, which share no call."""
        self._crowd_rows = self._rounds.wide_rows_of_crowd
        self._narrow_s = self._rounds.narrow_s
        self._least_s = [min(pair) for pair in zip(self._measured_s, self._wide_s, strict=False)]
        self._lately = Arrivals(tables.wide.latency_ms(1) / 1e3)
        self.wide = tables.instances
        """The number of the wide instance."""
        self._is_wide_open = False
        self._wide_rows = 0
        self._wide_end_s: float | None = None
        """When its call should end; ``None`` while it is idle."""
        self._began_s: dict[int, float] = {}
        """When each instance's call began."""
        self._pace = 1.0
        """Duration of the last narrow call over its measured median. What slowed it down slows those beside it too."""
        self._decided: tuple[float, int] | None = None
        """When ``turn`` decided last, and the rows of its wide call; ``next_batch`` uses it if nothing has changed."""

    def finished(self, instance: int, took_s: float | None = None) -> None:
        """As of ``Policy``; when a wide call has ended, all narrow instances are idle."""
        if took_s is not None and instance in self._began_s:
            self._lately.reach(self._began_s[instance] + took_s, is_busy=True)
            if rows := self._rows.get(instance):
                self._pace = took_s / self._narrow_s[rows]
        self._began_s.pop(instance, None)
        if instance != self.wide:
            super().finished(instance, took_s)
            self._end_s[instance] = self._wide_end_s  # it may have been opened again while a wide call runs
            return
        if took_s is not None and self._wide_rows:
            self._note_slowness(took_s / self._wide_s[self._wide_rows])
        self._end_wide()
        self._is_wide_open = True

    def cancel(self, request_id: int) -> None:
        """As of ``Policy``."""
        self._decided = None
        super().cancel(request_id)

    def leave(self, instance: int) -> None:
        """An instance is gone, with its current call."""
        self._decided = None
        self._began_s.pop(instance, None)
        if instance != self.wide:
            super().leave(instance)
            return
        self._end_wide()
        self._is_wide_open = False

    def slow_down(self, slowness: float) -> None:
        """As of ``Policy``, the wide calls too."""
        super().slow_down(slowness)
        self._wide_calls.slow_down(slowness)

    def offer(self, request: Request, now_s: float) -> Accepted | Refused:
        """As of ``Policy``."""
        self._reach(now_s)
        self._decided = None
        if self._is_busy:
            self._lately.note()
        return super().offer(request, now_s)

    def expected_s(self, now_s: float, ahead_rows: int = 0) -> float:
        """As of ``Policy``; a row that would be alone runs wide."""
        if self._is_wide_open and not (self._is_busy or ahead_rows):
            return self.slowness * self._wide_s[1]
        return super().expected_s(now_s, ahead_rows)

    def turn(self, now_s: float) -> int | None:
        """As of ``Policy``: the wide instance if the next call is to have all cores."""
        self.look_again_s = self._held_until_s(now_s)
        if self._wide_end_s is not None or self.look_again_s < inf:
            return None
        self._decided = now_s, self._rows_of_wide_call(now_s)
        return self.wide if self._decided[1] else super().turn(now_s)

    def next_batch(self, instance: int, now_s: float) -> Batch:
        """As of ``Policy``."""
        self._reach(now_s)
        batch = self._wide_batch(now_s) if instance == self.wide else super().next_batch(instance, now_s)
        if batch.requests:
            self._began_s[instance] = now_s
        return batch

    def _wide_batch(self, now_s: float) -> Batch:
        dropped = self.expire(now_s)
        known, self._decided = self._decided, None
        most = known[1] if known and known[0] == now_s and not dropped else self._rows_of_wide_call(now_s)
        if not most:
            return Batch(requests=(), end_s=now_s, dropped=dropped)
        taken, left = self._cut(most)
        self._wide_rows = self._take(taken, left)
        end_s = self._wide_end_s = now_s + self.slowness * self._wide_s[self._wide_rows]
        self._end_s = dict.fromkeys(self._end_s, end_s)
        return Batch(requests=tuple(place.request for place in taken), end_s=end_s, dropped=dropped)

    def _held_until_s(self, now_s: float) -> float:
        """Until when cores stay idle although something waits, so that a wide call can begin; ``inf`` if they do not.

        They wait if the narrow calls that run should end in a moment. Without that, calls would begin at different
        times, all cores would never be free together, and the wide instance would stay idle as long as the load lasts.
        They also wait if what waits would be late in narrow calls but not in wide ones.
        """
        is_any_idle = len(self._rows) < len(self._end_s)
        if not (self._waiting and self._rows and is_any_idle and self._is_wide_open):
            return inf
        has_deadlines = self._waiting[0].deadline_s < inf
        if has_deadlines and len(self._waiting) > LONG:
            return inf
        moment_s, free_s = SOON * self._narrow_s[1], self._free_s(now_s)
        if has_deadlines and self._late_s(self._waiting, free_s) > 0:
            if self._late_wide_s(self._waiting, max(free_s)) > 0:
                return inf
            return max(now_s + moment_s, *(end_s for end_s in self._end_s.values() if end_s is not None))
        if len(self._waiting) > FEW * len(self._end_s):
            return inf
        end_s = max(
            self._began_s[instance] + self._pace * self._narrow_s[rows] for instance, rows in self._rows.items()
        )
        # A call may take longer than it should, so the wait ends a moment after that.
        if not end_s - moment_s <= now_s < end_s + moment_s:
            return inf
        if has_deadlines and not self._are_in_time(self._waiting, max(free_s)):
            return inf
        return end_s + moment_s

    @property
    def _is_busy(self) -> bool:
        return bool(self._waiting) or any(end_s is not None for end_s in self._end_s.values())

    def _reach(self, now_s: float) -> None:
        self._lately.reach(now_s, is_busy=self._is_busy)

    def _end_wide(self) -> None:
        if self._wide_end_s is not None:
            self._end_s = dict.fromkeys(self._end_s)
        self._wide_end_s, self._wide_rows, self._plan = None, 0, None

    def _rows_of_wide_call(self, now_s: float) -> int:
        """Most rows of the wide call that should start now; 0 if a narrow one should, or none."""
        is_free = self._is_wide_open and self._end_s and all(end_s is None for end_s in self._end_s.values())
        if not (self._waiting and is_free):
            return 0
        head = self._waiting[0].request
        if head.rows > self._most_wide:
            return 0
        alike = head.rows
        if self._shared:
            alike = sum(each * count for (group, each), count in self._kinds.items() if group == head.group)
        return self._wide_by_deadline(head, alike, now_s, self._wide_by_latency(head, alike))

    def _wide_by_latency(self, head: Request, alike: int) -> int:
        """Most rows of the wide call that lowers the mean latency; 0 if narrow ones do.

        ``alike`` rows of those that wait can share a call with the most urgent request, ``head``.
        """
        waiting, per_s = len(self._waiting), self._lately.per_s
        if self._is_crowd(alike):
            return max(head.rows, self._crowd_rows) if 0 < self._crowd_rows <= alike else 0
        if alike < self.waiting_rows:
            calls = len({group for group, _ in self._kinds}) if self._shared else waiting
            rows = min(alike, self._most_wide)
            counted = min(rows, self._max_batch)  # narrow calls may take fewer
            return rows if self._rounds_apart.wide_requests(calls, counted, per_s) else 0
        # The rows of a request stay together; those of several are counted as if these were of one size.
        each = -(-alike // waiting)
        requests = self._rounds.wide_requests(waiting, each, per_s)
        if requests == waiting:
            return alike
        return max(head.rows, requests * each) if requests else 0

    def _is_crowd(self, alike: int) -> bool:
        """Whether so many requests wait that only the rate counts: more than a few, and full calls for all instances.

        Small wide calls in turn have the lower mean latency, and often the lower rate. Clients that wait for their
        answers ask less then, so that they seem to be in time, and the crowd stays.
        """
        instances = len(self._end_s)
        if not self._shared or len(self._waiting) <= FEW * instances:
            return False
        return alike < self.waiting_rows or alike >= self._max_batch * instances

    def _wide_by_deadline(self, head: Request, alike: int, now_s: float, most: int) -> int:
        """``most``, the rows that lower the mean latency, unless only other rows, or narrow calls (0), are in time."""
        if head.deadline_s == inf:
            return most
        if len(self._waiting) > LONG:  # so many were accepted only because narrow calls are in time
            return 0
        left_s = (head.deadline_s - now_s) / self.slowness
        in_time = min(bisect_right(self._wide_s, left_s) - 1, self._most_wide)
        for tried in (most, 0, alike):
            rows = min(tried, in_time)
            if not tried and self._late_s(self._waiting, [now_s] * len(self._end_s)) <= 0:
                return 0
            if tried and rows >= head.rows and self._rest_is_in_time(rows, now_s):
                return rows
        # A request that was accepted for an idle instance may be late. A narrow call is cut to what is in time.
        if self._measured_s[head.rows] <= left_s:
            return 0
        return min(alike, in_time) if in_time >= head.rows else most

    def _rest_is_in_time(self, most: int, now_s: float) -> bool:
        """Whether all that a wide call of ``most`` rows leaves would be in time after it."""
        taken, left = self._cut(most)
        return self._are_in_time(left, now_s + self.slowness * self._wide_s[sum(place.request.rows for place in taken)])

    def _are_in_time(self, waiting: list[Place], free_s: float) -> bool:
        """Whether all would be in time in narrow calls, or all in wide ones, if these began at ``free_s``."""
        return (
            not waiting
            or min(self._late_s(waiting, [free_s] * len(self._end_s)), self._late_wide_s(waiting, free_s)) <= 0
        )

    def _late_wide_s(self, waiting: list[Place], free_s: float, new: Place | None = None) -> float:
        """As ``_late_s``, in wide calls one after the other; ``inf`` if not all can share them."""
        if not self._is_wide_open or len({place.request.group for place in waiting}) > 1:
            return inf
        if max(place.request.rows for place in waiting) > self._most_wide:
            return inf
        return self._wide_calls.late_s(waiting, free_s, new)

    def _fit(self, place: Place, without: list[Place], now_s: float) -> Fit | Refused:
        """As of ``Policy``; if some would be late in narrow calls, all may be in time in wide ones."""
        fit = super()._fit(place, without, now_s)
        if not isinstance(fit, Refused) or fit.reason != "overloaded" or len(self._waiting) - len(without) >= LONG:
            return fit
        gone = {other.arrival for other in without}
        others = [other for other in self._waiting if other.arrival not in gone]
        rows = sum(other.request.rows for other in others if self._shared) + place.request.rows
        place = place._replace(room_s=self.slowness * self._wide_s[min(rows, self._most_wide)])
        late_s = self._late_wide_s(sorted([*others, place]), max(self._free_s(now_s)), place)
        return (place, None) if late_s + self.margin_s <= 0 else fit

    def _cut(self, most: int) -> tuple[list[Place], list[Place]]:
        """What a wide call of at most ``most`` rows takes of the queue, and what it leaves."""
        if not self._shared:
            return self._waiting[:1], self._waiting[1:]
        taken, left, _ = cut(self._waiting, most)
        return taken, left


def policy_of(
    curve: LatencyTable, tables: ElasticTables | None, *, max_batch: int, max_waiting: int, shared: bool = True
) -> Policy:
    """The policy of a plan.

    Args:
        curve: How long the plan's calls take by their rows (p99); for an elastic plan, its narrow ones.
        tables: The tables of an elastic plan; ``None`` for a plan with one layout.
        max_batch: Most rows of a call; for an elastic plan, of a narrow one.
        max_waiting: Most rows in the queue.
        shared: Whether requests share calls.
    """
    limits = {"max_batch": max_batch, "max_waiting": max_waiting}
    if tables is None:
        return Policy(curve, **limits, shared=shared)
    return ElasticQueue(curve, tables, **limits, shared=shared)
