"""HTTP connections as old and simple clients use them: HTTP/1.0 that stays open, and clients that close their side."""

import asyncio
import select
from pathlib import Path

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
GONE_S = (0.05, 0.5)
"""From the end of what a client sends to the first look whether it is gone, and between two looks."""


TCP_TABLES, UNIX_TABLE = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")), Path("/proc/self/net/unix")
ESTABLISHED, CONNECTED = "01", "03"
"""A connection's state in these tables, see proc_net_tcp.txt and proc(5)."""


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
