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
from corewise.serving.connections import Room
from corewise.serving.gate import Gate, RequestIds
from corewise.serving.host import Host, Options, for_pages
from corewise.serving.served import Source
from corewise.serving.tokens import Tokens

if TYPE_CHECKING:
    from corewise.serving.rpc_connections import RpcPort

log = logging.getLogger("corewise.serve")

ADMIN_CONNECTIONS = 16
RPC_FILES = 3
"""Open files of a gRPC connection, which is passed on to gRPC's library."""
OTHER_FILES = 128
"""Open files of the process beside connections."""
SWITCH_S = 0.0005
"""How long a thread runs before it lets others run: Python's 5 ms would add to the waits of an engine or event loop."""


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
        self.stopping = asyncio.Event()
        self._is_open = False
        self._later: list[asyncio.Future[None]] = []
        """What signals began; kept, for the loop itself holds them only weakly."""

    async def run(self) -> bool:
        files = (self.options.http is not None) + RPC_FILES * (self.options.grpc is not None)
        most = _allowed_connections(files, self.limits.connections)
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
        rpcs = {}
        if self.options.grpc is not None:
            rpcs["grpc"] = self._rpc(self.options.grpc, most)
            self.metrics.watch_connections("grpc", most, lambda: len(rpcs["grpc"].clients))
        if self.options.admin_grpc is not None:
            where, room = self.options.admin_grpc, Room(ADMIN_CONNECTIONS, 1.0)
            rpcs["admin_grpc"] = admin.rpc_port(where, room, self.repository, self.models, self.metrics)
        for rpc in rpcs.values():
            await rpc.start()
        tasks = [asyncio.ensure_future(made.serve(sockets=[where])) for made, where in webs]
        places = {name: self._place(name, where) for name, where in bound.items()}
        places |= {name: rpc.place for name, rpc in rpcs.items()}
        self.on_event(
            "listening",
            Listening(
                http=places.get("http"),
                admin=places.get("admin"),
                grpc=places.get("grpc"),
                admin_grpc=places.get("admin_grpc"),
                notes=memory_limit.notes(self.options.limits, self.limits),
            ),
        )
        try:
            return await self._live(rpcs.get("grpc"))
        finally:
            await self._end([made for made, _ in webs], tasks, list(rpcs.values()))

    async def _live(self, rpc: "RpcPort | None") -> bool:
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
        self, webs: Sequence[web_server.Http], tasks: Sequence["asyncio.Future[None]"], rpcs: Sequence["RpcPort"]
    ) -> None:
        # Before nobody listens there any more: then the path may be that of the next server.
        for address in self._web_addresses.values():
            if isinstance(address, Path):
                with suppress(OSError):
                    address.unlink()
        for made in webs:
            made.should_exit = True
        for each in rpcs:
            await each.stop(web_server.LAST_WORDS_S)
        await asyncio.gather(*tasks, return_exceptions=True)
        self.models.close(0.0)
        self.guard.close()
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

    def _rpc(self, address: Address, most_connections: int) -> "RpcPort":
        from corewise.serving import rpc_extensions
        from corewise.serving.rpc_connections import RpcPort, secured

        certificate, key = self.options.certificate, self.options.key
        service = self.host.service()
        methods = rpc_extensions.list_methods(self.models, self.metrics, service.model_infer, self.front, self.limits)
        extensions = rpc_extensions.Handlers(methods, self.metrics, self.host.tokens, self.limits)
        return RpcPort(
            address,
            (service.handler, extensions),
            Room(most_connections, self.limits.client_share),
            self.front.budget,
            message_bytes=self.limits.message_bytes,
            on_refused=partial(self.metrics.connection_refused, "grpc"),
            tls=None if certificate is None or key is None else secured(certificate, key),
        )

    def _stop(self) -> None:
        if self.stopping.is_set():
            log.warning("stopped twice: what is not answered yet is lost")
            for served in self.models.served:
                self._later.append(asyncio.ensure_future(asyncio.to_thread(served.remote.close)))
        self.stopping.set()
        self.models.stopping = True
        if not self._is_open:
            self.models.draining = True


def _allowed_connections(files: int, most: int) -> int:
    """How many each port may have, if one on each takes ``files`` open files together.

    The soft limit on open files, which is for select, is raised.
    """
    soft, hard = getrlimit(RLIMIT_NOFILE)
    wanted = files * most + OTHER_FILES
    if soft != RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == RLIM_INFINITY else min(hard, wanted)
        setrlimit(RLIMIT_NOFILE, (soft, hard))
    allowed = most if soft == RLIM_INFINITY else min(most, (soft - OTHER_FILES) // files)
    if allowed < 1:
        raise InputError(f"the process may have only {soft} open files", f"allow {wanted}, e.g. with ulimit -n")
    return allowed
