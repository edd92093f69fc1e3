"""Counts and latencies of a model's requests: since the start, in the last minute, and second by second."""

import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from corewise.batching import Answer

K = TypeVar("K", int, str)

HISTORY_S = 900
"""How many seconds are kept."""
MINUTE_S = 60
COLUMNS = ("at", "answered", "refused", "failed", "p50_ms", "p99_ms", "queue_ms")
STEP = 1.05
"""Latencies are counted in buckets that grow by this factor: percentiles are exact to 2.5 %."""


@dataclass(slots=True)
class Spent:
    """How often something was done, and its total seconds."""

    times: float = 0
    seconds: float = 0.0

    def add(self, seconds: float, times: float = 1) -> None:
        """Once more, or in part: each time took so long."""
        self.times += times
        self.seconds += seconds * times

    @property
    def described(self) -> dict[str, int]:
        """As Triton's statistics have it."""
        return {"count": round(self.times), "ns": int(self.seconds * 1e9)}


@dataclass
class _Second:
    """What happened in one second."""

    at: int
    answered: int = 0
    rows: int = 0
    refused: int = 0
    failed: int = 0
    waited_s: float = 0.0
    busy_s: float = 0.0
    calls: Counter[int] = field(default_factory=Counter)
    """How many requests ran in calls of each number of rows."""
    layouts: Counter[str] = field(default_factory=Counter)
    """How many requests ran in calls of each thread layout."""
    latencies: Counter[int] = field(default_factory=Counter)
    """How many requests took ``STEP`` to the power of the key, in seconds."""

    @cached_property
    def figures(self) -> tuple[float, ...]:
        """The figures of a second that is over, in the order of ``COLUMNS``."""
        p50_ms, p99_ms = (_quantile_ms(self.latencies, share) for share in (0.5, 0.99))
        queue_ms = 1e3 * self.waited_s / max(1, self.answered)
        shown = (round(figure, 3) for figure in (p50_ms, p99_ms, queue_ms))
        return (self.at, self.answered, self.refused, self.failed, *shown)


@dataclass(frozen=True, kw_only=True)
class Recent:
    """Mean rates and latencies over some seconds."""

    rate_per_s: float
    rows_per_s: float
    p50_ms: float
    p99_ms: float
    queue_ms: float
    """Mean time in the queue."""
    refused_per_s: float
    failed_per_s: float
    busy: float
    """Mean number of calls that ran at a time."""
    batch_rows: dict[int, int]
    """How many requests ran in calls of each number of rows."""
    layouts: dict[str, int]
    """How many requests ran in calls of each thread layout."""


class Statistics:
    """Counts and latencies of one model's requests. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.started_s = clock()
        self._lock = threading.Lock()
        self._seconds: deque[_Second] = deque(maxlen=HISTORY_S + 1)
        self.success, self.fail, self.queue, self.infer = (Spent() for _ in range(4))
        self.by_rows: defaultdict[int, Spent] = defaultdict(Spent)
        """The calls of each number of rows; a call of several requests is counted in parts."""
        self.layouts: Counter[str] = Counter()
        """The requests that ran in calls of each thread layout."""
        self.rows = 0
        self.calls = 0.0
        self.last_s = 0.0

    def answered(self, answer: Answer, rows: int, took_s: float, layout: str = "") -> None:
        """A request was answered by a call of that thread layout."""
        with self._lock:
            self.success.add(took_s)
            self.queue.add(answer.waited_s)
            self.infer.add(answer.ran_s)
            calls = rows / answer.batch_rows
            self.by_rows[answer.batch_rows].add(answer.ran_s, calls)
            self.rows += rows
            self.calls += calls
            self.last_s = self._clock()
            second = self._second()
            second.answered += 1
            second.rows += rows
            second.waited_s += answer.waited_s
            second.busy_s += answer.ran_s * calls
            second.calls[answer.batch_rows] += 1
            second.layouts[layout] += 1
            self.layouts[layout] += 1
            second.latencies[round(math.log(max(took_s, 1e-6), STEP))] += 1

    def not_served(self) -> None:
        """A request was refused or dropped."""
        with self._lock:
            self._second().refused += 1

    def failed(self, took_s: float) -> None:
        """A request's call failed."""
        with self._lock:
            self.fail.add(took_s)
            self._second().failed += 1

    def recent(self, window_s: int = MINUTE_S) -> Recent:
        """The last ``window_s`` whole seconds, or all since the start. The second in progress is left out."""
        with self._lock:
            now = int(self._clock())
            seconds = [each for each in self._seconds if now - window_s <= each.at < now]
        latencies, calls = _sum(each.latencies for each in seconds), _sum(each.calls for each in seconds)
        span_s = max(1, min(window_s, now - int(self.started_s)))
        answered = sum(each.answered for each in seconds)
        return Recent(
            rate_per_s=answered / span_s,
            rows_per_s=sum(each.rows for each in seconds) / span_s,
            p50_ms=_quantile_ms(latencies, 0.5),
            p99_ms=_quantile_ms(latencies, 0.99),
            queue_ms=1e3 * sum(each.waited_s for each in seconds) / max(1, answered),
            refused_per_s=sum(each.refused for each in seconds) / span_s,
            failed_per_s=sum(each.failed for each in seconds) / span_s,
            busy=sum(each.busy_s for each in seconds) / span_s,
            batch_rows=dict(sorted(calls.items())),
            layouts=dict(_sum(each.layouts for each in seconds)),
        )

    def history(self, since: int = 0) -> dict[str, list[float]]:
        """The seconds after ``since`` (Unix time) in which anything happened, as columns, the oldest first."""
        with self._lock:
            now = int(self._clock())
            seconds = [each for each in self._seconds if max(since, now - HISTORY_S - 1) < each.at < now]
        rows = [each.figures for each in seconds]
        return {name: [row[k] for row in rows] for k, name in enumerate(COLUMNS)}

    def described(self) -> dict[str, Any]:
        """The fields of Triton's extension ``statistics``: nanoseconds, and milliseconds since 1970.

        Reading requests and writing answers is not measured on its own: its time is 0.
        """
        with self._lock:
            nothing = Spent(times=self.success.times)
            parts = {
                "success": self.success,
                "fail": self.fail,
                "queue": self.queue,
                "compute_input": nothing,
                "compute_infer": self.infer,
                "compute_output": nothing,
                "cache_hit": Spent(),
                "cache_miss": Spent(),
            }
            return {
                "last_inference": int(self.last_s * 1e3),
                "inference_count": self.rows,
                "execution_count": round(self.calls),
                "inference_stats": {name: spent.described for name, spent in parts.items()},
                "batch_stats": [
                    {
                        "batch_size": rows,
                        "compute_input": Spent(times=spent.times).described,
                        "compute_infer": spent.described,
                        "compute_output": Spent(times=spent.times).described,
                    }
                    for rows, spent in sorted(self.by_rows.items())
                ],
            }

    def _second(self) -> _Second:
        now = int(self._clock())
        if not self._seconds or self._seconds[-1].at != now:
            self._seconds.append(_Second(now))
        return self._seconds[-1]


def _sum(counters: Iterable[Counter[K]]) -> Counter[K]:
    total: Counter[K] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _quantile_ms(latencies: Mapping[int, int], share: float) -> float:
    """The quantile of counted latencies; 0 if there are none."""
    left = math.ceil(share * sum(latencies.values()))
    for bucket in sorted(latencies):
        left -= latencies[bucket]
        if left <= 0:
            return float(1e3 * STEP**bucket)
    return 0.0
