"""What is seen of requests from outside: figures for Prometheus at ``/metrics``, and spans."""

import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect

from corewise.batching import Answer, NotServed
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError
from corewise.serving.served import Served
from corewise.serving.traces import Traces

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, models: Models, traces: Traces) -> None:
        self._traces = traces
        self._registry = CollectorRegistry()
        labels = ["model", "version"]
        self._requests = Counter(
            "corewise_requests",
            "Requests by what became of them.",
            [*labels, "protocol", "outcome"],
            registry=self._registry,
        )
        self._took = Histogram(
            "corewise_request_seconds",
            "From a request's arrival to its answer.",
            labels,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._waited = Histogram(
            "corewise_queue_seconds",
            "From a request's arrival to the start of its call.",
            labels,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._rows = Histogram(
            "corewise_call_rows",
            "Rows of the call that a request ran in.",
            labels,
            buckets=ROWS,
            registry=self._registry,
        )
        self._registry.register(_Gauges(models))

    @contextmanager
    def request(
        self, served: Served, protocol: str, headers: Mapping[str, str]
    ) -> Iterator[Callable[[Answer], Answer]]:
        """Count a request by what becomes of it in the body, which passes its answer through what it is given."""
        labels = (served.name, served.version)
        started_s, outcome = time.monotonic(), "failed"
        with self._traces.span(f"infer {served.name}", headers) as note:

            def answered(answer: Answer) -> Answer:
                self._took.labels(*labels).observe(time.monotonic() - started_s)
                self._waited.labels(*labels).observe(answer.waited_s)
                self._rows.labels(*labels).observe(answer.batch_rows)
                note("corewise.queue_ms", answer.waited_s * 1e3)
                note("corewise.call_ms", answer.ran_s * 1e3)
                note("corewise.call_rows", answer.batch_rows)
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
                self._requests.labels(*labels, protocol, outcome).inc()
                note("corewise.model_version", served.version)
                note("corewise.outcome", outcome)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is so now."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        ready = GaugeMetricFamily("corewise_ready", "Whether the model answers.", labels=labels)
        waiting = GaugeMetricFamily("corewise_queue_rows", "Rows that wait.", labels=labels)
        slowness = GaugeMetricFamily("corewise_call_slowness", "Calls' time over the measured one.", labels=labels)
        restarts = GaugeMetricFamily("corewise_engine_restarts", "How often its process died.", labels=labels)
        agreement = GaugeMetricFamily("corewise_shadow_agreement", "Answers with fp32's highest score.", labels=labels)
        drift = GaugeMetricFamily("corewise_shadow_sqnr_db", "Answers against fp32's, on a sample.", labels=labels)
        for served in self._models.served:
            key = [served.name, served.version]
            ready.add_metric(key, float(served.ready))
            waiting.add_metric(key, served.waiting_rows)
            slowness.add_metric(key, served.slowness)
            restarts.add_metric(key, served.remote.restarts)
            if served.shadow is not None and served.shadow.compared:
                drift.add_metric(key, served.shadow.sqnr_db)
                if served.shadow.agreement is not None:
                    agreement.add_metric(key, served.shadow.agreement)
        return (ready, waiting, slowness, restarts, drift, agreement)
