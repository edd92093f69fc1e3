"""A span for each request, for OpenTelemetry, whose environment variables say where spans go and which are sampled.

https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from corewise.common.errors import MissingExtra

LAST_SPANS_S = 2.0

Note = Callable[[str, str | float], None]
"""Sets an attribute of the span."""


class Traces:
    """Records nothing."""

    is_on = False

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Note]:
        """A span around the body of the ``with``, in the trace that the request's ``headers`` name."""
        yield lambda attribute, value: None

    def close(self) -> None:
        """Send the remaining spans."""


class OpenTelemetry(Traces):
    """Sends spans by OTLP over HTTP, in a thread of its own."""

    is_on = True

    def __init__(self) -> None:
        """Raises ``MissingExtra``."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingExtra(error.name or "opentelemetry-sdk", "traces", "serving with --traces") from error
        # The environment takes precedence over the name given here.
        resource = Resource.create({SERVICE_NAME: "corewise"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("corewise.serve")
        self._extract = TraceContextTextMapPropagator().extract
        self._kind = trace.SpanKind.SERVER

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Note]:
        """A span around the body of the ``with``, in the trace that the request's ``headers`` name."""
        parent = self._extract(headers)
        # Refusals raise as well: recording each stack would cost time when it is scarce.
        quiet = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span(name, parent, kind=self._kind, **quiet) as span:
            yield span.set_attribute

    def close(self) -> None:
        """Send the remaining spans, within ``LAST_SPANS_S``: a dead collector must not keep the server alive."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(LAST_SPANS_S)
