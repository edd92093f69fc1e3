"""Requests as operators see them: figures for Prometheus at ``/metrics``, spans, and refusals in the log.

Names and labels follow https://prometheus.io/docs/practices/naming/: base units, counters that end in ``_total``,
label values without spaces and from a small set.
"""

import platform
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect

from corewise._version import __version__
from corewise.batching import Answer, NotServed
from corewise.serving.logs import RefusalLog
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served
from corewise.serving.traces import Note, Traces

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_ID = 256
"""Characters of a request's id that are kept."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TurnedAway = Literal["unauthenticated", "unknown path", "unknown method", "unknown model"]
"""Why a request reached no model."""


class Metrics:
    """Counters and histograms of one server, in a registry of its own. Thread-safe."""

    def __init__(self, models: Models, traces: Traces) -> None:
        self._traces = traces
        self._refusals = RefusalLog()
        self._registry = CollectorRegistry()
        labels = ["model", "version"]
        self._requests = Counter(
            "corewise_requests",
            "Requests by what became of them.",
            [*labels, "protocol", "outcome"],
            registry=self._registry,
        )
        self._turned_away = Counter(
            "corewise_turned_away_requests",
            "Requests that reached no model: without a token, or for a path, method or model that there is not.",
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
            "corewise_queue_seconds", "From a request's arrival to the start of its call.", SECONDS
        )
        self._rows = self._histogram("corewise_call_rows", "Rows of the call that a request ran in.", ROWS)
        self._calls: dict[tuple[str, str], tuple[Histogram, Histogram, Histogram]] = {}
        """Each model's three histograms: finding them by their labels takes longer."""
        about = {"version": __version__, "python": platform.python_version()}
        Info("corewise_build", "The version of this server.", registry=self._registry).info(about)
        ProcessCollector(registry=self._registry)
        self._registry.register(_Models(models))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, about, ["model", "version"], buckets=buckets, registry=self._registry)

    @contextmanager
    def request(
        self, served: Served, protocol: str, headers: Mapping[str, str], request_id: str = ""
    ) -> Iterator[Callable[[Answer], Answer]]:
        """Count a request by its outcome; the body of the ``with`` passes its answer through the given function."""
        labels = (served.name, served.version)
        request_id = request_id[:MOST_ID]
        started_s, outcome = time.monotonic(), "failed"
        with self._traces.span(f"infer {served.name}", headers) as note:

            def answered(answer: Answer) -> Answer:
                self._observe(labels, answer, time.monotonic() - started_s)
                _note_call(note, answer)
                return answer

            try:
                yield answered
                outcome = "ok"
            except ProtocolError:
                outcome = "invalid"
                raise
            except NotServed as refused:
                outcome = refused.reason
                raise
            except (ClientDisconnect, CancelledError):
                outcome = "cancelled"
                raise
            finally:
                if outcome not in ("ok", "failed", "cancelled"):
                    self._refusals.add(outcome, request_id)
                self._requests.labels(*labels, protocol, outcome.replace(" ", "_")).inc()
                note("corewise.model_version", served.version)
                note("corewise.outcome", outcome)
                if request_id:
                    note("corewise.request_id", request_id)

    def _observe(self, labels: tuple[str, str], answer: Answer, took_s: float) -> None:
        histograms = self._calls.get(labels)
        if histograms is None:
            histograms = self._took.labels(*labels), self._waited.labels(*labels), self._rows.labels(*labels)
            self._calls[labels] = histograms
        for histogram, value in zip(histograms, (took_s, answer.waited_s, answer.batch_rows), strict=True):
            histogram.observe(value)

    def turned_away(self, protocol: str, reason: TurnedAway, request_id: str = "") -> None:
        """Count a request that reached no model."""
        self._refusals.add(reason, request_id)
        self._turned_away.labels(protocol, reason.replace(" ", "_")).inc()

    def connection_refused(self, protocol: str) -> None:
        """Count a connection beyond the limit."""
        self._refusals.add("too many connections")
        self._connections.labels(protocol).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Log what was refused since the last line."""
        self._refusals.close()


def _note_call(note: Note, answer: Answer) -> None:
    note("corewise.queue_ms", answer.waited_s * 1e3)
    note("corewise.call_ms", answer.ran_s * 1e3)
    note("corewise.call_rows", answer.batch_rows)


class _Models(Collector):
    """The current state of each model."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        ready = GaugeMetricFamily("corewise_ready", "Whether the model answers.", labels=labels)
        waiting = GaugeMetricFamily("corewise_queue_rows", "Rows that wait.", labels=labels)
        slowness = GaugeMetricFamily("corewise_call_slowness", "Calls' time over the measured one.", labels=labels)
        restarts = CounterMetricFamily("corewise_engine_restarts", "How often its process was replaced.", labels=labels)
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
            if (found := served.ranges.outside) is not None:
                checks.add_metric(key, found.checks)
                outside.add_metric(key, found.outside)
                expected.add_metric(key, found.expected_share)
            if served.shadow is not None and served.shadow.compared:
                drift.add_metric(key, served.shadow.sqnr_db)
                if served.shadow.agreement is not None:
                    agreement.add_metric(key, served.shadow.agreement)
        return (ready, waiting, slowness, restarts, drift, agreement, checks, outside, expected)
