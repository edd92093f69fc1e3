"""``corewise serve``."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from corewise.cli.environment import quiet_grpc, settle_ray
from corewise.cli.options import RetuneTime, argument, check_cluster, flag, grouped, option
from corewise.cli.quantities import (
    Span,
    address,
    choice,
    duration,
    duration_or_zero,
    lines,
    origin,
    share,
    size,
    span,
    whole,
)
from corewise.cli.streams import StreamFailed, takes_more
from corewise.common.errors import CorewiseError, InputError, MissingExtra

if TYPE_CHECKING:
    from corewise.serving.host import Options
    from corewise.serving.server import Listening

LogLevel = Literal["debug", "info", "warning", "error"]

PACKAGES = ("starlette", "uvicorn", "httptools", "grpc", "grpc_health", "grpc_reflection")
"""What the extra serve installs."""
ONE = Span(1, 1)


@dataclass(frozen=True, kw_only=True)
class PortOptions:
    """Where the server listens."""

    http: Annotated[
        str,
        option("--http", panel="Ports", metavar="ADDRESS", help="Where HTTP listens: HOST:PORT, unix:PATH, or none."),
    ] = "127.0.0.1:8000"
    grpc: Annotated[
        str | None,
        option(
            "--grpc",
            panel="Ports",
            metavar="ADDRESS",
            help="Where gRPC listens: HOST:PORT or unix:PATH.",
            default="no gRPC",
        ),
    ] = None
    admin: Annotated[
        str | None,
        option(
            "--admin",
            panel="Ports",
            metavar="ADDRESS",
            help="Where models can be loaded and unloaded over HTTP, by anyone who can reach it.",
            default="nowhere",
        ),
    ] = None
    admin_grpc: Annotated[
        str | None,
        option("--admin-grpc", panel="Ports", metavar="ADDRESS", help="The same over gRPC.", default="nowhere"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request may take."""

    timeout_s: Annotated[
        float,
        option(
            "--timeout",
            panel="Requests",
            metavar="TIME",
            parse=duration,
            help="Time limit of requests that set none themselves, e.g. 500ms or 1m.",
            default="60s",
        ),
    ] = 60.0
    queue: Annotated[
        int,
        option(
            "--queue",
            panel="Requests",
            metavar="ROWS",
            parse=whole(1),
            help="The most rows that may wait for each model.",
        ),
    ] = 1024
    max_body_bytes: Annotated[
        int,
        option(
            "--max-body",
            panel="Requests",
            metavar="SIZE",
            parse=size,
            help="Largest body of a request, unpacked, e.g. 64MiB.",
            default="64MiB",
        ),
    ] = 64 * 2**20
    memory_bytes: Annotated[
        int | None,
        option(
            "--memory-limit",
            panel="Requests",
            metavar="SIZE",
            parse=size,
            help="Memory of the server and its engines together, e.g. 1GiB: requests get what the models leave.",
            default="the cgroup's limit, or the machine's memory",
        ),
    ] = None
    shadow: Annotated[
        float,
        option(
            "--shadow",
            panel="Requests",
            metavar="SHARE",
            parse=share("0.01"),
            help="Share of the requests, from 0 to 1, that fp32 answers too, to watch for drift.",
            default="0",
        ),
    ] = 0.0
    check_finite: Annotated[
        bool, flag("--check-finite", panel="Requests", help="Refuse inputs with NaN or infinities (400).")
    ] = False
    grace_s: Annotated[
        float,
        option(
            "--grace",
            panel="Requests",
            metavar="TIME",
            parse=duration_or_zero,
            help="On SIGTERM, how long the server still answers new requests while it reports that it is not ready.",
            default="1s",
        ),
    ] = 1.0
    drain_s: Annotated[
        float,
        option(
            "--drain",
            panel="Requests",
            metavar="TIME",
            parse=duration_or_zero,
            help="After that, how long accepted requests may take to finish.",
            default="30s",
        ),
    ] = 30.0


@dataclass(frozen=True, kw_only=True)
class SecurityOptions:
    """Who may call, and which artifacts may be opened."""

    token_file: Annotated[
        Path | None,
        option(
            "--token-file",
            panel="Security",
            metavar="FILE",
            help="Bearer tokens, one per line. Requests without a valid token are refused.",
        ),
    ] = None
    tls_cert: Annotated[
        Path | None,
        option("--tls-cert", panel="Security", metavar="FILE", help="PEM certificate chain for HTTP and gRPC."),
    ] = None
    tls_key: Annotated[
        Path | None, option("--tls-key", panel="Security", metavar="FILE", help="PEM key of --tls-cert.")
    ] = None
    trust: Annotated[
        bool, flag("--trust", panel="Security", help="Open artifacts whose payload is code (inductor, torch-int8).")
    ] = False
    trust_file: Annotated[
        Path | None,
        option(
            "--trust-file",
            panel="Security",
            metavar="FILE",
            help="Open such artifacts only if this file has the sha256 of their manifest, one per line.",
        ),
    ] = None

    cors_origins: Annotated[
        list[str] | None,
        option(
            "--cors-origin",
            panel="Security",
            metavar="ORIGIN",
            help="Let pages of this origin, e.g. https://example.org, call the server; * for any. May be repeated.",
            default="none",
        ),
    ] = None

    def tokens(self) -> tuple[str, ...]:
        """The accepted tokens; empty where none is needed. Raises ``InputError`` for a file without any."""
        tokens = tuple(lines(self.token_file))
        if self.token_file is not None and not tokens:
            raise InputError(f"--token-file {self.token_file} holds no token", "write one token on each line")
        return tokens


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What the server records."""

    log_level: Annotated[
        LogLevel,
        option(
            "--log-level",
            panel="Logs",
            metavar="LEVEL",
            parse=choice(*get_args(LogLevel)),
            help="debug, info, warning or error; debug logs every request.",
        ),
    ] = "info"
    traces: Annotated[
        bool,
        flag(
            "--traces",
            panel="Logs",
            help="Send a span of each request to OpenTelemetry, at OTEL_EXPORTER_OTLP_ENDPOINT.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ClusterServeOptions:
    """On which cluster, and how much of it."""

    ray: Annotated[
        str | None,
        option(
            "--ray",
            panel="Cluster",
            metavar="ADDRESS",
            help="Serve on a Ray cluster, under Ray Serve: auto (the one in RAY_ADDRESS, or else this machine's), "
            "HOST:PORT, or local to start one here for this command.",
            default="none, this process",
        ),
    ] = None
    replicas: Annotated[
        Span,
        option(
            "--replicas",
            panel="Cluster",
            metavar="N or MIN-MAX",
            parse=span,
            help="How many processes serve each artifact on the cluster. With MIN-MAX, the number follows the queue.",
            default="1",
        ),
    ] = ONE
    cpus: Annotated[
        int | None,
        option(
            "--cpus",
            panel="Cluster",
            metavar="N",
            parse=whole(1),
            help="CPUs of each replica.",
            default="as many as the artifact's plan has threads",
        ),
    ] = None
    queue_s: Annotated[
        float,
        option(
            "--scale-at",
            panel="Cluster",
            metavar="TIME",
            parse=duration,
            help="Start more replicas if requests wait longer than this in the queue on average.",
            default="20ms",
        ),
    ] = 0.02
    retune_s: RetuneTime = 30.0
    route: Annotated[
        str | None,
        option(
            "--route",
            panel="Cluster",
            metavar="/PATH",
            help="The prefix of all paths of an artifact on the cluster.",
            default="/, or /NAME for several artifacts",
        ),
    ] = None
    no_surge: Annotated[
        bool,
        flag(
            "--no-surge",
            panel="Cluster",
            help="In an update, stop each replica before its successor starts; for clusters without free CPUs.",
        ),
    ] = False


@grouped
def command(
    artifacts: Annotated[
        list[str],
        argument(
            "ARTIFACT",
            panel="Artifacts",
            help="Folders that corewise optimize wrote, or NAME=FOLDER or NAME@VERSION=FOLDER.",
        ),
    ],
    ports: PortOptions,
    requests: RequestOptions,
    security: SecurityOptions,
    logs: LogOptions,
    cluster: ClusterServeOptions,
) -> None:
    """Serve artifacts over HTTP and gRPC with the Open Inference Protocol v2, under the plans that were measured.

    Requests are batched dynamically; one that is predicted to miss its deadline is refused at once (503). On SIGTERM
    the server finishes the accepted requests and ends. On SIGHUP it opens the artifacts again and replaces each one
    whose checks pass.

    With --ray each artifact is an application of Ray Serve, until this command ends. Run the command again with another
    artifact of the same name to replace the replicas one by one.
    """
    check_cluster(cluster)
    if any(find_spec(name) is None for name in PACKAGES):
        raise MissingExtra("starlette", "serve", "serving")
    quiet_grpc()
    from corewise.serving.logs import to_stderr
    from corewise.serving.served import Source
    from corewise.serving.server import serve

    options = _server_options(ports, requests, security, logs)
    to_stderr(logs.log_level)
    if cluster.ray is not None:
        _serve_on_ray(artifacts, options, cluster)
        return
    if not serve([Source.of(text) for text in artifacts], options, _Announcer()):
        raise CorewiseError(
            f"not every accepted request was answered in {requests.drain_s:g} s", "give a longer --drain"
        )


def _serve_on_ray(artifacts: list[str], options: "Options", cluster: ClusterServeOptions) -> None:
    assert cluster.ray is not None
    settle_ray(cluster.ray)
    from corewise.cluster.applications import Scale
    from corewise.cluster.serving import serve_on_ray
    from corewise.serving.served import Source

    scale = Scale(
        replicas=(cluster.replicas.least, cluster.replicas.most),
        cpus=cluster.cpus,
        queue_s=cluster.queue_s,
        drain_s=options.drain_s,
        retune_s=cluster.retune_s,
        surge=not cluster.no_surge,
    )
    sources = [Source.of(text) for text in artifacts]
    serve_on_ray(cluster.ray, sources, options, scale, route=cluster.route, on_event=_print_cluster_event)


def _print_cluster_event(what: str, value: Any) -> None:
    with suppress(StreamFailed):
        if what == "listening":
            for name, route in value.applications.items():
                print(f"deploying: {name} at {value.http}{route.rstrip('/')}/v2/models/{name}")
            if value.grpc is not None:
                print(f"deploying: gRPC on port {value.grpc}, to the application in the metadata 'application'")
        elif what == "ready":
            for replica in value:
                if replica["notes"]:
                    print(f"note: {replica['node']}: {replica['notes']}")
                print(f"ready: {replica['model']}, {replica['plan']}, {replica['node']}")
        elif what == "replaced":
            print(f"replaced: {value} was deployed again or deleted by another command")
        elif what == "draining":
            print("draining: accepted requests are finished, new ones are refused")
        else:
            print(f"note: {value}")
        print(end="", flush=True)


def _server_options(
    ports: PortOptions, requests: RequestOptions, security: SecurityOptions, logs: LogOptions
) -> "Options":
    from corewise.serving.host import Options
    from corewise.serving.protocol import Limits
    from corewise.serving.served import Trust

    if (security.tls_cert is None) != (security.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together", "give both or neither")
    return Options(
        http=None if ports.http == "none" else _address("--http", ports.http),
        grpc=None if ports.grpc is None else _address("--grpc", ports.grpc),
        admin=None if ports.admin is None else _address("--admin", ports.admin),
        admin_grpc=None if ports.admin_grpc is None else _address("--admin-grpc", ports.admin_grpc),
        limits=Limits(timeout_s=requests.timeout_s, body_bytes=requests.max_body_bytes),
        max_waiting=requests.queue,
        tokens=security.tokens(),
        certificate=security.tls_cert,
        key=security.tls_key,
        trust=Trust(everything=security.trust, digests=frozenset(lines(security.trust_file))),
        shadow=requests.shadow,
        grace_s=requests.grace_s,
        drain_s=requests.drain_s,
        memory_bytes=requests.memory_bytes,
        cors_origins=tuple(origin("--cors-origin", text) for text in security.cors_origins or ()),
        traces=logs.traces,
        check_finite=requests.check_finite,
    )


def _address(option: str, text: str) -> tuple[str, int] | Path:
    path = text.removeprefix("unix:")
    return address(option, text) if path == text else Path(path).absolute()


class _Announcer:
    """Prints what the server reports. The ports are printed when all artifacts are open, because one may be refused."""

    def __init__(self) -> None:
        self._listening: Listening | None = None

    def __call__(self, what: str, value: Any) -> None:
        # The server goes on where nobody reads this any more.
        with suppress(StreamFailed):
            if what == "listening":
                self._listening = value
            elif what == "ready":
                self._print_ready(value.served)
            elif takes_more(sys.stdout):  # otherwise the end would wait for whoever reads this
                print("draining: accepted requests are finished, new ones are refused", flush=True)

    def _print_ready(self, served: Any) -> None:

        ports = {name: getattr(self._listening, name) for name in ("http", "grpc", "admin", "admin_grpc")}
        named = (
            f"{name.replace('_', '-')} " + (f"at unix:{place}" if isinstance(place, Path) else f"on port {place}")
            for name, place in ports.items()
            if place
        )
        print("listening: " + ", ".join(named))
        for note in getattr(self._listening, "notes", ()):
            print(f"note: {note}")
        for model in served:
            for note in model.notes:
                print(f"note: {note}")
            build = model.manifest.build
            plan = model.plan_label
            print(f"ready: {model.name}, version {model.version}: {build.engine} {build.precision}, {plan}")
        print(end="", flush=True)
