"""One server process: its ports, its signals, and its end."""

import asyncio
import gc
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from corewise.common.errors import InputError
from corewise.machine.inspect import inspect_cpu
from corewise.serving import addresses, admin, memory, memory_limit
from corewise.serving.addresses import Address
from corewise.serving.admin import Repository
from corewise.serving.app import OPEN_TO_ALL, App, RequestLog
from corewise.serving.connections import Acceptor, Connection, count_open
from corewise.serving.front import Front
from corewise.serving.gate import Gate, RequestIds
from corewise.serving.infer import ARRIVED, GONE, WHOLE
from corewise.serving.memory_limit import Guard
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits
from corewise.serving.served import Served, Source, Trust
from corewise.serving.tokens import Tokens
from corewise.serving.traces import OpenTelemetry, Traces

log = logging.getLogger("corewise.serve")

HEADERS_S = 10.0
"""How long a request's headers may take to come, and a connection may stay without a first request."""
HEADERS_BYTES = 64 * 1024
HEADER_BYTES = 32
"""What each header counts beside its own bytes: tens of thousands of tiny ones would take megabytes."""
FIRST_BODY_BYTES = 256 * 1024
"""What may come in one piece with the end of the headers."""
KEEP_ALIVE_S = 75
MOST_STREAMS = 1024
"""On one gRPC connection."""
MOST_PIPELINED = 64
"""Requests of one HTTP connection that wait for the answers to those before them, or that come in one piece."""
MOST_CHUNKS, CHUNK_BYTES = 4096, 256
"""A chunked body may have so many chunks, and one more for each so many bytes: each costs as much as a kilobyte."""
HEALTH_CONNECTIONS, HEALTH_S = 16, 2.0
"""So many more, each so long, for health checks, which a crowd must not keep out."""
ADMIN_CONNECTIONS = 16
OTHER_FILES = 128
"""Of the process, beside connections."""
FULL = JSONResponse(
    {"error": "there are too many connections; try again later"}, 503, {"retry-after": "1", "connection": "close"}
)
FULL_BYTES = b"\r\n".join(
    (
        b"HTTP/1.1 503 Service Unavailable",
        *(b"%s: %s" % header for header in FULL.raw_headers),
        b"",
        bytes(FULL.body),
    )
)
"""The bytes on the wire, for connections beyond the limit: uvicorn reads no request of theirs."""
EXPOSED_HEADERS = ("x-request-id", "retry-after", "inference-header-content-length")
"""Which pages of other origins may read, where --cors-origin allows them."""
LINGER_S = 0.2
"""From the last new connection to the end of those without a request."""
SWITCH_S = 0.0005
"""After so long a thread lets others run: Python's 5 ms would be added to what an engine or an event loop waits for."""
LAST_WORDS_S = 2.0
"""For answers that are on their way when all work is done."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a server."""

    http: Address | None = ("127.0.0.1", 8000)
    grpc: Address | None = None
    admin: Address | None = None
    """Loads and unloads models for whoever can reach it: keep it on loopback."""
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
    """Of the server and its engines together; by default the cgroup's limit, or the machine's memory."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; ``*`` for all."""
    traces: bool = False
    check_finite: bool = False


@dataclass(frozen=True, kw_only=True)
class Listening:
    """The ports that it got, or the unix sockets."""

    http: int | Path | None
    grpc: int | Path | None
    admin: int | Path | None
    admin_grpc: int | Path | None = None
    notes: tuple[str, ...] = ()


def serve(
    sources: Sequence[Source], options: Options, tell: Callable[[str, Any], None] = lambda what, value: None
) -> bool:
    """Serve until SIGTERM or SIGINT; whether all that was accepted was answered by then.

    ``tell`` is called with ``("listening", Listening)``, ``("ready", Models)`` and ``("draining", None)``. SIGHUP
    reloads all models. Raises what opening the models raises, and ``InputError`` for an address that is taken or
    options that do not fit together.
    """
    memory.tune()
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=_fastest_loop) as runner:
        return runner.run(_Server(sources, options, tell).run())


def _fastest_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _Server:
    def __init__(self, sources: Sequence[Source], options: Options, tell: Callable[[str, Any], None]) -> None:
        if options.http is None and options.grpc is None:
            raise InputError("the server has no port", "give --http or --grpc")
        if (options.certificate is None) != (options.key is None):
            raise InputError("TLS needs a certificate and its key", "give both or neither")
        self.options, self.tell = options, tell
        start = partial(
            Served,
            trust=options.trust,
            max_waiting=options.max_waiting,
            shadow=options.shadow,
            check_finite=options.check_finite,
        )
        self.models = Models(sources, start)
        self.repository = Repository(self.models)
        self.traces = OpenTelemetry() if options.traces else Traces()
        self.metrics = Metrics(self.models, self.traces)
        cpu = inspect_cpu()
        memory_bytes = options.memory_bytes or memory_limit.machine_bytes(cpu.memory_limit_bytes, cpu.memory_bytes)
        self.limits = memory_limit.fit(options.limits, memory_bytes)
        self.front = Front(self.limits, options.max_waiting)
        self.guard = Guard(self.limits, memory_bytes, self.front.budget, self.models.engine_pids)
        self.stopping = asyncio.Event()
        self._is_open = False
        self._later: list[asyncio.Future[None]] = []
        """What signals began; kept, for the loop itself holds them only weakly."""

    async def run(self) -> bool:
        ports = sum(one is not None for one in (self.options.http, self.options.grpc))
        most = _allowed_connections(ports, self.limits.connections)
        loop = asyncio.get_running_loop()
        self.front.watch_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(
            signal.SIGHUP, lambda: self._later.append(asyncio.ensure_future(self.repository.reload_all()))
        )
        tokens, ids = Tokens(self.options.tokens), RequestIds()
        app = App(self.models, self.metrics, self.limits, tokens, self.front)
        bound = {name: addresses.bound(address) for name, address in self._web_addresses.items()}
        web = []
        if "http" in bound:
            web_app = _for_pages(RequestLog(app.asgi, self.models, ids), self.options)
            config = _config(web_app, self.options, most)
            config.on_refused = partial(self.metrics.connection_refused, "http")
            config.arrived_s = self.front.arrived_s
            config.gate = Gate(self.models, self.metrics, self.limits, tokens, self.front, ids)
            http = _Http(config)
            self.metrics.watch_connections("http", most, lambda: len(http.server_state.connections))
            web.append((http, bound["http"]))
        if "admin" in bound:
            web.append((_Http(_config(admin.web(self.repository), Options(), ADMIN_CONNECTIONS)), bound["admin"]))
        rpc, rpc_port = await self._rpc(most)
        if rpc_port is not None:
            self.metrics.watch_connections("grpc", most, partial(count_open, rpc_port))
        admin_rpc, admin_rpc_port = None, None
        if self.options.admin_grpc is not None:
            admin_rpc, admin_rpc_port = await admin.start_rpc(
                self.options.admin_grpc, self.repository, self.models, self.metrics
            )
        tasks = [asyncio.ensure_future(made.serve(sockets=[where])) for made, where in web]
        places = {name: self._place(name, where) for name, where in bound.items()}
        self.tell(
            "listening",
            Listening(
                http=places.get("http"),
                admin=places.get("admin"),
                grpc=rpc_port,
                admin_grpc=admin_rpc_port,
                notes=memory_limit.notes(self.options.limits, self.limits),
            ),
        )
        try:
            return await self._live(rpc)
        finally:
            await self._end([made for made, _ in web], tasks, [each for each in (rpc, admin_rpc) if each is not None])

    async def _live(self, rpc: Any) -> bool:
        """Open the models, serve until the server is stopped, and finish what was accepted; whether all was."""
        opening = asyncio.ensure_future(asyncio.to_thread(self.models.open))
        stopping = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            self._is_open = True
            # All that is here now stays: the collector need not look through it again and again.
            gc.collect()
            gc.freeze()
            self.guard.start()
            self.tell("ready", self.models)
            await stopping
            await asyncio.sleep(self.options.grace_s)
            if rpc is not None:
                # GOAWAY: calls that came are answered, and clients make their next ones elsewhere.
                self._later.append(asyncio.ensure_future(rpc.stop(self.options.drain_s)))
                await asyncio.sleep(LINGER_S)
            self.models.draining = True
        else:
            await opening
        self.tell("draining", None)
        return await asyncio.to_thread(self.models.drain, self.options.drain_s)

    async def _end(self, web: Sequence["_Http"], tasks: Sequence["asyncio.Future[None]"], rpcs: Sequence[Any]) -> None:
        for made in web:
            made.should_exit = True
        for each in rpcs:
            await each.stop(LAST_WORDS_S)
        await asyncio.gather(*tasks, return_exceptions=True)
        for address in self._web_addresses.values():
            if isinstance(address, Path):  # gRPC removes its own
                address.unlink(missing_ok=True)
        self.models.close(0.0)
        self.guard.close()
        self.front.close()
        await asyncio.to_thread(self.traces.close)
        self.metrics.close()

    @property
    def _web_addresses(self) -> dict[str, Address]:
        given = {"http": self.options.http, "admin": self.options.admin}
        return {name: address for name, address in given.items() if address is not None}

    def _place(self, name: str, where: socket.socket) -> int | Path:
        address = self._web_addresses[name]
        return address if isinstance(address, Path) else int(where.getsockname()[1])

    async def _rpc(self, most_connections: int) -> tuple[Any, int | Path | None]:
        if self.options.grpc is None:
            return None, None
        import grpc

        from corewise.serving import rpc_extensions
        from corewise.serving.rpc import Service

        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self.limits.message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.max_metadata_size", HEADERS_BYTES),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.max_allowed_incoming_connections", most_connections),
            ]
        )
        tokens = Tokens(self.options.tokens)
        service = Service(self.models, self.metrics, self.limits, tokens, self.front)
        methods = rpc_extensions.list_methods(self.models, service.model_infer, self.front, self.limits)
        extensions = rpc_extensions.Handlers(methods, self.metrics, tokens, self.limits)
        server.add_generic_rpc_handlers((service.handler, extensions))
        if isinstance(self.options.grpc, Path):
            addresses.remove_stale(self.options.grpc)
        target = addresses.shown(self.options.grpc)
        try:
            if self.options.certificate is not None and self.options.key is not None:
                pair = (self.options.key.read_bytes(), self.options.certificate.read_bytes())
                got = server.add_secure_port(target, grpc.ssl_server_credentials([pair]))
            else:
                got = server.add_insecure_port(target)
        except (RuntimeError, OSError) as error:
            raise InputError(f"gRPC cannot listen on {target}: {error}", "give another --grpc HOST:PORT") from error
        await server.start()
        return server, self.options.grpc if isinstance(self.options.grpc, Path) else int(got)

    def _stop(self) -> None:
        if self.stopping.is_set():
            log.warning("stopped twice: what is not answered yet is lost")
            for served in self.models.served:
                self._later.append(asyncio.ensure_future(asyncio.to_thread(served.remote.close)))
        self.stopping.set()
        self.models.stopping = True
        if not self._is_open:
            self.models.draining = True


class _Http(uvicorn.Server):
    """uvicorn, whose signals are the server's to handle."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and take new connections a few at a time."""
        make = partial(_Patient, self.config, self.server_state, {})
        self.servers = [Acceptor(each, make, self.config.ssl) for each in sockets or ()]  # type: ignore[misc]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, but let requests arrive first whose connections are new."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


class _Config(uvicorn.Config):
    """uvicorn's, with how many connections there may be."""

    most_connections = Limits.connections
    on_refused: Callable[[], None] = staticmethod(lambda: None)
    arrived_s: Callable[[], float] = staticmethod(time.monotonic)
    """When bytes that are read now came, on the monotonic clock."""
    gate: Gate | None = None
    """Answers some requests by their headers."""


class _Patient(Connection):
    """uvicorn's protocol with an end to its patience: with headers that do not come, and that do not end."""

    _refused = _crowded = _is_answered = False
    """The last: whether this request was answered by its headers."""
    _is_begun = False
    """Whether headers have begun that have not ended."""
    _waiting: asyncio.TimerHandle | None = None
    _pieced = 0
    """Requests in the piece of data that is parsed now."""
    _chunks = _chunk_bytes = 0
    """Of this request's body."""
    _header_bytes = 0
    _fed_bytes = 0
    """Since the headers began: the parser reports a header only when it is complete."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        assert isinstance(self.config, _Config)
        self._arrived_s, self._gate = self.config.arrived_s, self.config.gate
        self._gone: set[asyncio.Future[Any]] = set()
        over = len(self.connections) - self.config.most_connections
        if over > HEALTH_CONNECTIONS:
            self._refused = True
            self.config.on_refused()
            transport.write(FULL_BYTES)
            transport.close()
            return
        if over > 0:
            self._crowded = True
            self.app = _only_health(self.app)
        self._wait(HEALTH_S if self._crowded else HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._come()
        super().connection_lost(exc)
        for waiter in self._gone:
            if not waiter.done():
                waiter.set_exception(ClientDisconnect())

    def data_received(self, data: bytes) -> None:
        if self._refused:  # what came with the end of TLS' handshake
            return
        self._pieced = 0
        super().data_received(data)
        if self._is_begun:
            self._wait(HEADERS_S)
        self._fed_bytes = 0 if self._waiting is None else self._fed_bytes + len(data)
        if self._fed_bytes > HEADERS_BYTES + FIRST_BODY_BYTES and not self.transport.is_closing():
            self.send_400_response("the headers are too long")
        # uvicorn ends its own patience with any byte between requests, and begins it anew only with an answer.
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._waiting is None and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        self._header_bytes = self._chunks = self._chunk_bytes = 0
        self._is_begun, self._is_answered = True, False
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[ARRIVED], scope[GONE] = self._arrived_s(), self._gone

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + HEADER_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_begun = False
        self._come()
        self._pieced += 1
        if self._pieced > MOST_PIPELINED or len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()
            raise ValueError("the client sends requests and waits for no answers")
        if self._gate is not None and self._answers_early(self._gate):
            return
        super().on_headers_complete()
        if self._crowded and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._chunks += 1
        self._chunk_bytes += len(body)
        if self._chunks > MOST_CHUNKS + self._chunk_bytes // CHUNK_BYTES:
            raise ValueError("the chunks are too small")
        if not self._is_answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_answered:
            return
        super().on_message_complete()
        self.scope[WHOLE] = True  # type: ignore[literal-required]

    def _answers_early(self, gate: Gate) -> bool:
        """Whether the gate had an answer, which is written; what comes of the request's body is dropped."""
        if self.cycle is not None and not self.cycle.response_complete:  # answers come in the order of requests
            return False
        if self._crowded or self.flow.write_paused or self.transport.is_closing():
            return False
        if self.parser.get_http_version() != "1.1":
            return False
        stays_open = self.parser.should_keep_alive()
        answer = gate.answer(
            self.parser.get_method(),
            self.url,
            self.headers,
            client=self.client[0] if self.client else "",
            arrived_s=self.scope[ARRIVED],  # type: ignore[literal-required]
            stays_open=stays_open,
        )
        if answer is None:
            return False
        self._is_answered = True
        self.transport.write(answer)
        if not stays_open:
            self.transport.close()
        return True

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADERS_BYTES:
            raise ValueError("the headers are too long")

    def _wait(self, seconds: float) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(seconds, self.transport.close)

    def _come(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _only_health(app: Any) -> ASGIApp:
    """The app for a connection too many."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_health = scope["path"] in OPEN_TO_ALL
        await (app if is_health else FULL)(scope, receive, send)

    return answer


def _allowed_connections(ports: int, most: int) -> int:
    """Each port's share of what open files there are, after the soft limit, which is for select, was raised."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = ports * most + OTHER_FILES
    if soft != RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == RLIM_INFINITY else min(hard, wanted)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    allowed = most if soft == RLIM_INFINITY else min(most, (soft - OTHER_FILES) // ports)
    if allowed < 1:
        raise InputError(f"the process may have only {soft} open files", f"allow {wanted}, e.g. by ulimit -n")
    return allowed


def _config(app: Any, options: Options, most_connections: int) -> _Config:
    secure: dict[str, Any] = {}
    if options.certificate is not None and options.key is not None:
        secure = {"ssl_certfile": str(options.certificate), "ssl_keyfile": str(options.key)}
    config = _Config(
        app,
        http=_Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        # Warnings are of requests that are none: who sends them must not fill the log. They are answered with 400.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
        **secure,
    )
    config.most_connections = most_connections
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"TLS cannot use {options.certificate} and {options.key}: {error}", "give PEM files"
        ) from error
    return config


def _for_pages(app: ASGIApp, options: Options) -> ASGIApp:
    """The app with CORS for pages of the origins that may call it (https://fetch.spec.whatwg.org/#http-cors-protocol).

    Preflights are answered without a token, as browsers send none.
    """
    if not options.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=options.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )
