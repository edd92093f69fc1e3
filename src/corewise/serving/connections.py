"""HTTP connections: a few new ones at a time, and kept as old and simple clients use them.

Such clients want HTTP/1.0 to stay open, or close their side after their request.
"""

import asyncio
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from ssl import SSLContext

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
GONE_S = (0.05, 0.5)
"""From the end of what a client sends to the first look whether it is gone, and between two looks."""


PER_ROUND = 8
"""New connections in one round of the event loop: about a millisecond."""
PAUSE_S = 0.5
"""Until the next try if the process may open no more files."""
TCP_TABLES, UNIX_TABLE = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")), Path("/proc/self/net/unix")
ESTABLISHED, CONNECTED = "01", "03"
"""A connection's state in these tables, see proc_net_tcp.txt and proc(5)."""


class Acceptor:
    """Takes new connections from a socket that listens, a few in each round of the event loop.

    uvloop and asyncio take all that wait at once: the requests of other clients, and health checks, would wait for
    a thousand new connections.
    """

    def __init__(
        self, listening: socket.socket, make: Callable[[], asyncio.Protocol], tls: SSLContext | None = None
    ) -> None:
        """``make`` makes the protocol of each connection. Called in the event loop."""
        self._listening, self._make, self._tls = listening, make, tls
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        listening.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Take what waits, and no more."""
        self._stop()
        while self._take():
            pass
        self._stop()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for: connections end on their own."""

    def _listen(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    def _stop(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listening)

    def _accept(self) -> None:
        for _ in range(PER_ROUND):
            if not self._take():
                return

    def _take(self) -> bool:
        """Take one connection; whether there may be more."""
        try:
            connection, _ = self._listening.accept()
        except ConnectionAbortedError:
            return True
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # no file is left, or no memory: others have to end first
            self._stop()
            self._pause = self._loop.call_later(PAUSE_S, self._listen)
            return False
        opening = self._loop.create_task(self._open(connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            # Otherwise each answer waits 40 ms for the acknowledgement of its own headers.
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(self._make, connection, ssl=self._tls)
        except OSError:  # gone already, or a handshake that is none
            connection.close()


def count_open(place: int | Path) -> int:
    """Connections of this machine's kernel to a port, or to a unix socket; those that nobody accepted yet included.

    For gRPC, whose library does not tell how many it holds, nor how many it refused.
    """
    if isinstance(place, Path):
        rows = [line.split(None, 7) for line in _lines(UNIX_TABLE)]
        return sum(len(row) > 7 and row[5] == CONNECTED and row[7] == str(place) for row in rows)
    port = f":{place:04X}"
    rows = [line.split(None, 4) for table in TCP_TABLES for line in _lines(table)]
    return sum(row[1].endswith(port) and row[3] == ESTABLISHED for row in rows)


def _lines(table: Path) -> list[str]:
    """The rows of a table; none if there is no such kind of socket."""
    try:
        return table.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return []


class Connection(HttpToolsProtocol):
    """uvicorn's, which closes each connection of HTTP/1.0, and each whose client will send no more."""

    _looking: asyncio.TimerHandle | None = None

    def on_headers_complete(self) -> None:
        """Keep a connection of HTTP/1.0 if its client wants that."""
        super().on_headers_complete()
        if self.cycle is not None and self.parser.get_http_version() == "1.0" and self.parser.should_keep_alive():
            self.cycle.keep_alive = True

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer a client that closed its side after a whole request, unless it closed the connection.

        Both look the same until something is sent: a client that is gone refuses an interim answer. TLS has no
        half-closed connections.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.scheme == "https":
            return None
        cycle.keep_alive = False
        if not (self.pipeline or cycle.response_started) and cycle.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
        self._look_later(GONE_S[0])
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _look_later(self, pause_s: float) -> None:
        self._looking = self.loop.call_later(pause_s, self._look)

    def _look(self) -> None:
        connection = self.transport.get_extra_info("socket")
        if connection is None or self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        if poll.poll(0):  # POLLHUP or POLLERR: the other side is closed both ways
            self.transport.abort()
        else:
            self._look_later(GONE_S[1])
