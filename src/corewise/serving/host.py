"""What answers requests, whatever carries them here: models in service, and all that lies between them and a port."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from corewise.machine.inspect import inspect_cpu
from corewise.serving import memory_limit
from corewise.serving.addresses import Address
from corewise.serving.app import App
from corewise.serving.front import Front
from corewise.serving.memory_limit import Guard
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits
from corewise.serving.served import Served, Source, Trust
from corewise.serving.tokens import Tokens
from corewise.serving.traces import OpenTelemetry, Traces

if TYPE_CHECKING:
    from corewise.serving.rpc import Service

EXPOSED_HEADERS = ("x-request-id", "retry-after", "inference-header-content-length")
"""Which pages of other origins may read, where --cors-origin allows them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a server."""

    http: Address | None = ("127.0.0.1", 8000)
    grpc: Address | None = None
    admin: Address | None = None
    """Anyone who can reach it can load and unload models: keep it on loopback."""
    admin_grpc: Address | None = None
    """The same over gRPC."""
    limits: Limits = field(default_factory=Limits)
    max_waiting: int = 1024
    tokens: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    trust: Trust = field(default_factory=Trust)
    shadow: float = 0.0
    grace_s: float = 1.0
    """From the end of readiness to the first refusal: connections in use end with their next answer, none is cut."""
    drain_s: float = 30.0
    memory_bytes: int | None = None
    """Memory of the server and its engines together; by default the cgroup's limit, or the machine's memory."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; ``*`` for all."""
    traces: bool = False
    check_finite: bool = False


class Host:
    """The models of one process, and what their requests share. Used from one event loop."""

    def __init__(self, sources: Sequence[Source], options: Options, tokens: Tokens) -> None:
        """Nothing is opened yet. Raises ``InputError`` where two models have one name and version."""
        start = partial(
            Served,
            trust=options.trust,
            max_waiting=options.max_waiting,
            shadow=options.shadow,
            check_finite=options.check_finite,
        )
        self.models = Models(sources, start)
        self.traces = OpenTelemetry() if options.traces else Traces()
        self.metrics = Metrics(self.models, self.traces)
        cpu = inspect_cpu()
        memory_bytes = options.memory_bytes or memory_limit.machine_bytes(cpu.memory_limit_bytes, cpu.memory_bytes)
        self.limits = memory_limit.fit(options.limits, memory_bytes)
        self.front = Front(self.limits, options.max_waiting)
        self.guard = Guard(self.limits, memory_bytes, self.front.budget, self.models.engine_pids)
        self.tokens = tokens

    def app(self) -> App:
        """What answers over HTTP."""
        return App(self.models, self.metrics, self.limits, self.tokens, self.front)

    def service(self) -> "Service":
        """What answers over gRPC."""
        from corewise.serving.rpc import Service

        return Service(self.models, self.metrics, self.limits, self.tokens, self.front)


def for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The app with CORS for pages of the origins that may call it (https://fetch.spec.whatwg.org/#http-cors-protocol).

    Preflights are answered without a token, as browsers send none.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )
