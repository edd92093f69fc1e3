"""One server process: its ports, its signals, and its end."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
from typing import TYPE_CHECKING, Any

from corewise.common.errors import InputError
from corewise.serving import addresses, admin, memory, memory_limit, web_server
from corewise.serving.addresses import Address
from corewise.serving.admin import Repository
from corewise.serving.app import RequestLog
from corewise.serving.connections import HANDSHAKE_S, Room, count_open
from corewise.serving.gate import Gate, RequestIds
from corewise.serving.host import Host, Options, for_pages
from corewise.serving.served import Source
from corewise.serving.tokens import Tokens

if TYPE_CHECKING:
    from corewise.serving.rpc_connections import Shares

log = logging.getLogger("corewise.serve")

MOST_STREAMS = 1024
"""On one gRPC connection."""
ADMIN_CONNECTIONS = 16
OTHER_FILES = 128
"""Of the process, beside connections."""
SWITCH_S = 0.0005
"""After so long a thread lets others run: Python's 5 ms would be added to what an engine or an event loop waits for."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """The ports that it got, or the unix sockets."""

    http: int | Path | None
    grpc: int | Path | None
    admin: int | Path | None
    admin_grpc: int | Path | None = None
    notes: tuple[str, ...] = ()


def serve(
    sources: Sequence[Source], options: Options, on_event: Callable[[str, Any], None] = lambda what, value: None
) -> bool:
    """Serve until SIGTERM or SIGINT; whether all that was accepted was answered by then.

    ``on_event`` is called with ``("listening", Listening)``, ``("ready", Models)`` and ``("draining", None)``. SIGHUP
    reloads all models. Raises what opening the models raises, and ``InputError`` for an address that is taken or
    options that do not fit together.
    """
    memory.tune()
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=_fastest_loop) as runner:
        return runner.run(_Server(sources, options, on_event).run())


def _fastest_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _Server:
    def __init__(self, sources: Sequence[Source], options: Options, on_event: Callable[[str, Any], None]) -> None:
        if options.http is None and options.grpc is None:
            raise InputError("the server has no port", "give --http or --grpc")
        if (options.certificate is None) != (options.key is None):
            raise InputError("TLS needs a certificate and its key", "give both or neither")
        self.options, self.on_event = options, on_event
        self.host = Host(sources, options, Tokens(options.tokens))
        self.models, self.metrics, self.limits = self.host.models, self.host.metrics, self.host.limits
        self.front, self.guard = self.host.front, self.host.guard
        self.repository = Repository(self.models)
        self.shares: Shares | None = None
        """Of the connections over gRPC."""
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
        app, ids = self.host.app(), RequestIds()
        bound = {name: addresses.bound(address) for name, address in self._web_addresses.items()}
        webs = []
        if "http" in bound:
            web_app = for_pages(RequestLog(app.asgi, self.models, ids, self.front), self.options.cors_origins)
            room = Room(most, self.limits.client_share)
            config = web_server.config(web_app, room, certificate=self.options.certificate, key=self.options.key)
            config.on_refused = partial(self.metrics.connection_refused, "http")
            config.arrived_s = self.front.arrived_s
            config.gate = Gate(self.models, self.metrics, self.limits, self.host.tokens, self.front, ids)
            http = web_server.Http(config)
            self.metrics.watch_connections("http", most, lambda: len(http.server_state.connections))
            webs.append((http, bound["http"]))
        if "admin" in bound:
            config = web_server.config(admin.web(self.repository), Room(ADMIN_CONNECTIONS, 1.0))
            webs.append((web_server.Http(config), bound["admin"]))
        rpc, rpc_port = await self._rpc(most)
        if rpc_port is not None:
            self.metrics.watch_connections("grpc", most, partial(count_open, rpc_port))
        admin_rpc, admin_rpc_port = None, None
        if self.options.admin_grpc is not None:
            admin_rpc, admin_rpc_port = await admin.start_rpc(
                self.options.admin_grpc, self.repository, self.models, self.metrics
            )
        tasks = [asyncio.ensure_future(made.serve(sockets=[where])) for made, where in webs]
        places = {name: self._place(name, where) for name, where in bound.items()}
        self.on_event(
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
            await self._end([made for made, _ in webs], tasks, [each for each in (rpc, admin_rpc) if each is not None])

    async def _live(self, rpc: Any) -> bool:
        """Open the models, serve until the server is stopped, and finish what was accepted; whether all was."""
        opening = asyncio.ensure_future(asyncio.to_thread(self.models.open))
        stopping = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            self._is_open = True
            self.guard.start()
            self.on_event("ready", self.models)
            await stopping
            await asyncio.sleep(self.options.grace_s)
            if rpc is not None:
                # GOAWAY: calls that came are answered, and clients make their next ones elsewhere.
                self._later.append(asyncio.ensure_future(rpc.stop(self.options.drain_s)))
                await asyncio.sleep(web_server.LINGER_S)
            self.models.draining = True
        else:
            await opening
        self.on_event("draining", None)
        return await asyncio.to_thread(self.models.drain, self.options.drain_s)

    async def _end(
        self, webs: Sequence[web_server.Http], tasks: Sequence["asyncio.Future[None]"], rpcs: Sequence[Any]
    ) -> None:
        # Before nobody listens there any more: then the path may be that of the next server.
        for address in self._web_addresses.values():
            if isinstance(address, Path):  # gRPC removes its own
                with suppress(OSError):
                    address.unlink()
        for made in webs:
            made.should_exit = True
        for each in rpcs:
            await each.stop(web_server.LAST_WORDS_S)
        await asyncio.gather(*tasks, return_exceptions=True)
        self.models.close(0.0)
        self.guard.close()
        if self.shares is not None:
            self.shares.close()
        self.front.close()
        await asyncio.to_thread(self.host.traces.close)
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
        from corewise.serving.rpc_connections import METADATA_BYTES, Overfull, Shares

        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self.limits.message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.max_metadata_size", METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", METADATA_BYTES),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1e3)),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.max_allowed_incoming_connections", most_connections),
            ]
        )
        refused = partial(self.metrics.connection_refused, "grpc")
        self.shares = Shares(most_connections, self.limits.client_share, refused)
        service = self.host.service()
        methods = rpc_extensions.list_methods(self.models, self.metrics, service.model_infer, self.front, self.limits)
        extensions = rpc_extensions.Handlers(methods, self.metrics, self.host.tokens, self.limits)
        server.add_generic_rpc_handlers((Overfull(self.shares), service.handler, extensions))
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
        if isinstance(self.options.grpc, Path):
            return server, self.options.grpc
        self.shares.start(got)
        return server, int(got)

    def _stop(self) -> None:
        if self.stopping.is_set():
            log.warning("stopped twice: what is not answered yet is lost")
            for served in self.models.served:
                self._later.append(asyncio.ensure_future(asyncio.to_thread(served.remote.close)))
        self.stopping.set()
        self.models.stopping = True
        if not self._is_open:
            self.models.draining = True


def _allowed_connections(ports: int, most: int) -> int:
    """Each port's share of what open files there are, after the soft limit, which is for select, was raised."""
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = ports * most + OTHER_FILES
    if soft != RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == RLIM_INFINITY else min(hard, wanted)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    allowed = most if soft == RLIM_INFINITY else min(most, (soft - OTHER_FILES) // ports)
    if allowed < 1:
        raise InputError(f"the process may have only {soft} open files", f"allow {wanted}, e.g. with ulimit -n")
    return allowed
