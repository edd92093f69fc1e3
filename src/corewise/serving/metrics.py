"""Requests as operators see them: figures for Prometheus at ``/metrics``, spans, and refusals in the log.

Names and labels follow https://prometheus.io/docs/practices/naming/: base units, counters that end in ``_total``,
label values without spaces and from a small set.
"""

import platform
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect

from corewise._version import __version__
from corewise.batching import Answer, NotServed
from corewise.common.errors import CorewiseError
from corewise.serving.logs import RefusalLog
from corewise.serving.models import Models
from corewise.serving.protocol import MOST_ID, NoRoom, ProtocolError
from corewise.serving.served import Served
from corewise.serving.tallies import Count, Histogram, Tally
from corewise.serving.traces import Note, Traces

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TurnedAway = Literal["unauthenticated", "unknown path", "unknown method", "unknown model"]
"""Why a request reached no model; or what became of one whose body names the model, before that was read."""


class Metrics:
    """Counters and histograms of one server, in a registry of its own. Used from one event loop."""

    def __init__(self, models: Models, traces: Traces) -> None:
        self._traces = traces
        self._refusals = RefusalLog()
        self._registry = CollectorRegistry()
        labels = ["model", "version"]
        self._requests = Count("corewise_requests", "Requests by outcome.", [*labels, "protocol", "outcome"])
        self._registry.register(self._requests)
        self._tokenized = Count(
            "corewise_tokenizer_requests",
            "Requests that the tokenizer alone answers, by outcome.",
            [*labels, "outcome"],
        )
        self._registry.register(self._tokenized)
        self._turned_away = Counter(
            "corewise_turned_away_requests",
            "Requests that reached no model: without a token, for an unknown path, method or model, or refused before "
            "their model was known.",
            ["protocol", "reason"],
            registry=self._registry,
        )
        self._connections = Counter(
            "corewise_refused_connections",
            "Connections beyond the limit.",
            ["protocol"],
            registry=self._registry,
        )
        self._took = self._histogram("corewise_request_seconds", "From a request's arrival to its answer.", SECONDS)
        self._waited = self._histogram(
            "corewise_queue_seconds", "From a request's place in the queue to the start of its call.", SECONDS
        )
        self._rows = self._histogram("corewise_call_rows", "Rows of the call that a request ran in.", ROWS)
        self._calls: dict[tuple[str, str], tuple[Tally, Tally, Tally]] = {}
        """Each model's three."""
        about = {"version": __version__, "python": platform.python_version()}
        Info("corewise_build", "The version of this server.", registry=self._registry).info(about)
        ProcessCollector(registry=self._registry)
        self._open_connections = _Connections()
        self._registry.register(self._open_connections)
        self._registry.register(_Models(models))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, about, ["model", "version"], buckets)
        self._registry.register(made)
        return made

    @property
    def is_traced(self) -> bool:
        """Whether requests become spans, which need their headers."""
        return self._traces.is_on

    def request(
        self,
        served: Served,
        protocol: str,
        headers: Mapping[str, str],
        request_id: str = "",
        arrived_s: float | None = None,
    ) -> "Observed":
        """Count a request by its outcome; the body of the ``with`` passes its answer through the given function.

        ``headers`` are looked at only if requests are traced. It arrived at ``arrived_s`` on the monotonic clock, or
        now.
        """
        return Observed(self, served, protocol, headers, request_id[:MOST_ID], arrived_s or time.monotonic())

    def count(self, served: Served, protocol: str, outcome: str, request_id: str) -> None:
        """A request ended so."""
        self._requests.counts[served.name, served.version, protocol, self._logged(outcome, request_id)] += 1

    def _logged(self, outcome: str, request_id: str) -> str:
        """The label of an outcome, which is in the log if it is a refusal."""
        if outcome in ("ok", "failed", "cancelled"):
            return outcome
        self._refusals.add(outcome, request_id)
        return outcome.replace(" ", "_")

    @contextmanager
    def tokenizer_request(self, served: Served, request_id: str = "") -> Iterator[None]:
        """Count a request that the model's tokenizer alone answers."""
        outcome = "ok"
        try:
            yield
        except BaseException as error:
            outcome = _outcome(error)
            raise
        finally:
            label = self._logged(outcome, request_id[:MOST_ID])
            self._tokenized.counts[served.name, served.version, label] += 1

    @contextmanager
    def unnamed_request(self, protocol: str, request_id: str = "") -> Iterator[None]:
        """Count a request that ends before it is known which model it is for; unknown models are counted elsewhere."""
        try:
            yield
        except CorewiseError as error:
            if not _is_unknown(error):
                label = self._logged(_outcome(error), request_id[:MOST_ID])
                self._turned_away.labels(protocol, label).inc()
            raise

    def observe(self, served: Served, answer: Answer, took_s: float) -> None:
        """A request was answered."""
        labels = (served.name, served.version)
        tallies = self._calls.get(labels)
        if tallies is None:
            tallies = self._calls[labels] = (self._took.of(labels), self._waited.of(labels), self._rows.of(labels))
        took, waited, rows = tallies
        took.add(took_s)
        waited.add(answer.waited_s)
        rows.add(answer.batch_rows)

    def span(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[Note]:
        """A span around the body of the ``with``."""
        return self._traces.span(name, headers)

    def turned_away(self, protocol: str, reason: TurnedAway, request_id: str = "") -> None:
        """Count a request that reached no model."""
        self._refusals.add(reason, request_id)
        self._turned_away.labels(protocol, reason.replace(" ", "_")).inc()

    def connection_refused(self, protocol: str) -> None:
        """Count a connection beyond the limit."""
        self._refusals.add("too many connections")
        self._connections.labels(protocol).inc()

    def watch_connections(self, protocol: str, most: int, count: Callable[[], int]) -> None:
        """Show how many connections a port has, of ``most``. ``count`` may be called from any thread."""
        self._open_connections.watched[protocol] = (most, count)

    def text(self) -> bytes:
        """In Prometheus' text format. May be called from another thread than the event loop's."""
        return generate_latest(self._registry)

    def families(self) -> Iterable[Metric]:
        """All figures, for another place than ``/metrics``."""
        return self._registry.collect()

    def close(self) -> None:
        """Log what was refused since the last line."""
        self._refusals.close()


class _Connections(Collector):
    """How many connections each port has, and how many it may have."""

    def __init__(self) -> None:
        self.watched: dict[str, tuple[int, Callable[[], int]]] = {}
        """Each protocol's limit, and what counts."""

    def collect(self) -> Iterable[Metric]:
        """As the registry has it."""
        held = GaugeMetricFamily("corewise_open_connections", "Connections that are open.", labels=["protocol"])
        limit = GaugeMetricFamily("corewise_connections_limit", "How many there may be.", labels=["protocol"])
        for protocol, (most, count) in self.watched.items():
            held.add_metric([protocol], count())
            limit.add_metric([protocol], most)
        return (held, limit)


class Observed:
    """A request on its way, as a context manager: what became of it is counted, and its span ended."""

    __slots__ = ("_arrived_s", "_headers", "_metrics", "_note", "_protocol", "_request_id", "_served", "_span")

    def __init__(
        self,
        metrics: Metrics,
        served: Served,
        protocol: str,
        headers: Mapping[str, str],
        request_id: str,
        arrived_s: float,
    ) -> None:
        self._metrics, self._served, self._protocol = metrics, served, protocol
        self._headers, self._request_id, self._arrived_s = headers, request_id, arrived_s
        self._span: AbstractContextManager[Note] | None = None
        self._note: Note | None = None

    def __enter__(self) -> "Observed":
        if self._metrics.is_traced:
            self._span = self._metrics.span(f"infer {self._served.name}", self._headers)
            self._note = self._span.__enter__()
        return self

    def __call__(self, answer: Answer) -> Answer:
        """Its answer, noted."""
        self._metrics.observe(self._served, answer, time.monotonic() - self._arrived_s)
        if self._note is not None:
            self._note("corewise.queue_ms", answer.waited_s * 1e3)
            self._note("corewise.call_ms", answer.ran_s * 1e3)
            self._note("corewise.call_rows", answer.batch_rows)
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = "ok" if error is None else _outcome(error)
        if not _is_unknown(error):  # the model was unloaded meanwhile
            self._metrics.count(self._served, self._protocol, outcome, self._request_id)
        if self._note is None or self._span is None:
            return
        self._note("corewise.model_version", self._served.version)
        self._note("corewise.outcome", outcome)
        if self._request_id:
            self._note("corewise.request_id", self._request_id)
        self._span.__exit__(kind, error, trace)


def _is_unknown(error: BaseException | None) -> bool:
    """Whether a request ended because there is no such model: it is counted once, with those turned away."""
    return isinstance(error, ProtocolError) and error.status == 404


def _outcome(error: BaseException) -> str:
    """What became of a request that ended with an error."""
    if isinstance(error, NoRoom):  # the server's own shortage: the request may be sent again
        return "no room"
    if isinstance(error, ProtocolError):
        return "invalid"
    if isinstance(error, NotServed):
        return error.reason
    return "cancelled" if isinstance(error, ClientDisconnect | CancelledError) else "failed"


class _Models(Collector):
    """The current state of each model."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        ready = GaugeMetricFamily("corewise_ready", "Whether the model answers.", labels=labels)
        waiting = GaugeMetricFamily("corewise_queue_rows", "Rows that wait.", labels=labels)
        slowness = GaugeMetricFamily("corewise_call_slowness", "Time of calls over the measured time.", labels=labels)
        restarts = CounterMetricFamily("corewise_engine_restarts", "How often its process was replaced.", labels=labels)
        layouts = CounterMetricFamily(
            "corewise_layout_requests", "Requests by the thread layout of their call.", labels=[*labels, "layout"]
        )
        agreement = GaugeMetricFamily("corewise_shadow_agreement", "Answers with fp32's highest score.", labels=labels)
        drift = GaugeMetricFamily("corewise_shadow_sqnr_db", "Answers against fp32's, on a sample.", labels=labels)
        checks = CounterMetricFamily(
            "corewise_range_checks", "Extremes of rows compared with the ranges of the search.", labels=labels
        )
        outside = CounterMetricFamily("corewise_range_misses", "Extremes outside of these ranges.", labels=labels)
        expected = GaugeMetricFamily(
            "corewise_range_misses_expected_ratio", "Their share for samples like the search's.", labels=labels
        )
        for served in self._models.served:
            key = [served.name, served.version]
            ready.add_metric(key, float(served.ready))
            waiting.add_metric(key, served.waiting_rows)
            slowness.add_metric(key, served.slowness)
            restarts.add_metric(key, served.remote.restarts)
            for layout, count in served.statistics.layouts.copy().items():
                layouts.add_metric([*key, layout], count)
            if (found := served.ranges.outside) is not None:
                checks.add_metric(key, found.checks)
                outside.add_metric(key, found.outside)
                expected.add_metric(key, found.expected_share)
            if served.shadow is not None and served.shadow.compared:
                drift.add_metric(key, served.shadow.sqnr_db)
                if served.shadow.agreement is not None:
                    agreement.add_metric(key, served.shadow.agreement)
        return (ready, waiting, slowness, restarts, layouts, drift, agreement, checks, outside, expected)
