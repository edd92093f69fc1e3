"""What Prometheus reads at ``/metrics``."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corewise.batching import Answer
from corewise.serving.models import Models

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
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

    def ended(self, model: str, version: str, protocol: str, outcome: str) -> None:
        """A request came to its end: ``ok``, ``invalid``, ``failed``, ``cancelled`` or why it was not served."""
        self._requests.labels(model, version, protocol, outcome).inc()

    def answered(self, model: str, version: str, answer: Answer, took_s: float) -> None:
        """A request was answered."""
        self._took.labels(model, version).observe(took_s)
        self._waited.labels(model, version).observe(answer.waited_s)
        self._rows.labels(model, version).observe(answer.batch_rows)

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
        restarts = GaugeMetricFamily("corewise_engine_restarts", "How often its process died.", labels=labels)
        drift = GaugeMetricFamily("corewise_shadow_sqnr_db", "Answers against fp32's, on a sample.", labels=labels)
        for served in self._models.served:
            key = [served.name, served.version]
            ready.add_metric(key, float(served.ready))
            waiting.add_metric(key, served.waiting_rows)
            restarts.add_metric(key, served.remote.restarts)
            if served.shadow is not None and served.shadow.compared:
                drift.add_metric(key, served.shadow.sqnr_db)
        return (ready, waiting, restarts, drift)
