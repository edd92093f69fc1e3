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
"""Share of a narrow call of one row that a core waits for the others, so that a round begins on all."""
FEW = 2
"""A core waits while at most this many requests for each narrow instance wait; more are a crowd, in which only the
rate counts."""


@dataclass(frozen=True, kw_only=True)
class ElasticTables:
    """The measured times of an elastic plan's calls, over their rows."""

    cores: int
    threads: int
    """Threads of each narrow instance."""
    wide: LatencyTable
    """The median (p50), as of ``narrow``: the policy decides by them."""
    narrow: LatencyTable
    wide_slow: LatencyTable
    """The p99, by which requests are admitted. That of narrow calls is the policy's own table."""

    @property
    def instances(self) -> int:
        """How many narrow instances there are, whose numbers begin at 0; the wide one has the number after theirs."""
        return self.cores // self.threads

    @property
    def partitions(self) -> Partitions:
        """The best division of all cores for any number of rows."""
        return Partitions({self.threads: self.narrow, self.cores: self.wide}, self.cores)


def _rounds(tables: ElasticTables, most_wide: int, most_narrow: int, shared: bool) -> Rounds:
    """How rounds of such calls begin."""
    wide_s, narrow_s = (
        [0.0, *(table.latency_ms(rows) / 1e3 for rows in range(1, most + 1))]
        for table, most in ((tables.wide, most_wide), (tables.narrow, most_narrow))
    )
    return Rounds(wide_s, narrow_s, instances=tables.instances, shared=shared)


class _WideCalls(Policy):
    """Plays wide calls through, one after the other; nothing waits in it."""

    def late_s(self, waiting: list[Place], free_s: float, new: Place | None) -> float:
        """How late the latest call is."""
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
        """Duration of the last narrow call over its measured median: that of one that began beside it is alike."""
        self._decided: tuple[float, int] | None = None
        """When ``turn`` decided last, if nothing has changed since, and the rows of its wide call."""

    def finished(self, instance: int, took_s: float | None = None) -> None:
        """As of ``Policy``; the end of a wide call leaves all narrow instances idle."""
        if took_s is not None and instance in self._began_s:
            self._lately.reach(self._began_s[instance] + took_s, is_busy=True)
            if rows := self._rows.get(instance):
                self._pace = took_s / self._narrow_s[rows]
        self._began_s.pop(instance, None)
        if instance != self.wide:
            super().finished(instance, took_s)
            self._end_s[instance] = self._wide_end_s  # opened again while a wide call runs
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
        self.look_again_s = self._until_about_free_s(now_s)
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

    def _until_about_free_s(self, now_s: float) -> float:
        """The time until which requests are kept for all cores, because narrow calls should end soon; else ``inf``.

        It is also kept if it would be late in narrow calls but not in wide ones. Calls that begin at different times
        would keep the wide instance idle for as long as the load lasts. Calls may take longer than they should, so the
        wait is short.
        """
        if not self._rows or len(self._rows) == len(self._end_s) or not self._is_wide_open:
            return inf
        if not self._waiting:
            return inf
        moment_s, is_due = SOON * self._narrow_s[1], self._waiting[0].deadline_s < inf
        if is_due and len(self._waiting) > LONG:
            return inf
        if is_due and self._late_s(self._waiting, self._free_s(now_s)) > 0:
            last_s = max(end_s for end_s in self._end_s.values() if end_s is not None)
            is_late = self._late_wide_s(self._waiting, max(self._free_s(now_s))) > 0
            return inf if is_late else max(now_s + moment_s, last_s)
        if len(self._waiting) > FEW * len(self._end_s):
            return inf
        end_s = max(
            self._began_s[instance] + self._pace * self._narrow_s[rows] for instance, rows in self._rows.items()
        )
        if not end_s - moment_s <= now_s < end_s + moment_s:
            return inf
        if is_due and not self._are_in_time(self._waiting, max(self._free_s(now_s))):
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
        rows = head.rows
        if self._shared:
            rows = sum(each * count for (group, each), count in self._kinds.items() if group == head.group)
        if rows < self.waiting_rows:  # calls of several kinds are a crowd
            return 0
        # The rows of a request stay together; those of several are counted as if these were of one size.
        each = -(-rows // len(self._waiting))
        requests = self._rounds.wide_requests(len(self._waiting), each, self._lately.per_s)
        most = rows if requests == len(self._waiting) else max(head.rows, requests * each) if requests else 0
        return self._wide_by_deadline(head, rows, now_s, most)

    def _wide_by_deadline(self, head: Request, rows: int, now_s: float, most: int) -> int:
        """``most``, or what the deadlines make of it: what leaves all in time, if anything does."""
        if head.deadline_s == inf:
            return most
        if len(self._waiting) > LONG:  # so many were accepted only because narrow calls are in time
            return 0
        left_s = (head.deadline_s - now_s) / self.slowness
        in_time = min(bisect_right(self._wide_s, left_s) - 1, self._most_wide)
        for wish in (most, 0, rows):
            taken = min(wish, in_time)
            if not wish and self._late_s(self._waiting, [now_s] * len(self._end_s)) <= 0:
                return 0
            if wish and taken >= head.rows and (taken >= rows or self._rest_is_in_time(taken, now_s)):
                return taken
        # A request that was accepted for an idle instance may be late. A narrow call is cut to what is in time.
        if self._measured_s[head.rows] <= left_s:
            return 0
        return min(rows, in_time) if in_time >= head.rows else most

    def _rest_is_in_time(self, most: int, now_s: float) -> bool:
        """Whether all that a wide call of ``most`` rows leaves would be in time after it."""
        taken, left = self._cut(most)
        return self._are_in_time(left, now_s + self.slowness * self._wide_s[sum(place.request.rows for place in taken)])

    def _are_in_time(self, waiting: list[Place], free_s: float) -> bool:
        """Whether all would be in time in narrow calls, or else in wide ones, if they began when all cores are free."""
        return (
            not waiting
            or min(self._late_s(waiting, [free_s] * len(self._end_s)), self._late_wide_s(waiting, free_s)) <= 0
        )

    def _late_wide_s(self, waiting: list[Place], free_s: float, new: Place | None = None) -> float:
        """As ``_late_s``, in wide calls one after the other; ``inf`` where not all can share them."""
        if not self._is_wide_open or len({place.request.group for place in waiting}) > 1:
            return inf
        if max(place.request.rows for place in waiting) > self._most_wide:
            return inf
        return self._wide_calls.late_s(waiting, free_s, new)

    def _fit(self, place: Place, without: list[Place], now_s: float) -> Fit | Refused:
        """As of ``Policy``; where one would be late in narrow calls, in wide ones if all are in time there."""
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
    """The policy of a plan, by its latencies (p99).

    Args:
        curve: Of the plan's calls; of an elastic plan, of the narrow ones.
        tables: Of an elastic plan; ``None`` for a plan with one layout.
        max_batch: Most rows of a call; of an elastic plan, of a narrow one.
        max_waiting: Most rows in the queue.
        shared: Whether requests share calls.
    """
    limits = {"max_batch": max_batch, "max_waiting": max_waiting}
    if tables is None:
        return Policy(curve, **limits, shared=shared)
    return ElasticQueue(curve, tables, **limits, shared=shared)
