"""HTTP connections: a few new ones at a time, not all for one client, and kept as old and simple clients use them.

Such clients want HTTP/1.0 to stay open, offer an upgrade to HTTP/2, or close their side after their request.
"""

import asyncio
import select
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from ssl import SSLContext

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from corewise.serving import refusals
from corewise.serving.addresses import client_of
from corewise.serving.refusals import on_wire

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JOINED_BYTES = 2**16
"""Longer parts are not copied."""
GONE_S = (0.05, 0.5)
"""From the end of what a client sends to the first look whether it is gone, and between two looks."""
HEALTH_CONNECTIONS = 16
"""Beyond the limit, for health checks, which a crowd must not keep out."""
HANDSHAKE_S = 10.0
"""How long the TLS handshake may take."""
PER_ROUND = 8
"""New connections in one round of the event loop: about a millisecond."""
PAUSE_S = 0.5
"""The time until the next try if the process may open no more files."""
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""A connection whose client is gone without a word ends after two minutes: it has a seat, and maybe a stream."""


FULL = refusals.plain(
    refusals.NOT_NOW,
    "there are too many connections, in all or from your address; try again later",
    [(b"retry-after", b"1"), (b"connection", b"close")],
)
"""The answer to a connection beyond the limits, which is closed."""


class Seats:
    """The number of all connections, and of those of one client, whose name is empty for a unix socket."""

    def __init__(self, most: int, most_of_client: int) -> None:
        self._most, self._most_of_client = most, most_of_client
        self._taken: Counter[str] = Counter()
        self._total = 0

    def take(self, client: str) -> bool:
        """Take one, if there is one for that client."""
        if self._total >= self._most or (client and self._taken[client] >= self._most_of_client):
            return False
        self._total += 1
        self._taken[client] += 1
        return True

    def give_back(self, client: str) -> None:
        """Give one back."""
        self._total -= 1
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]


class Seat:
    """One connection's."""

    def __init__(self, seats: Seats, client: str, *, is_extra: bool) -> None:
        self._seats: Seats | None = seats
        self._client = client
        self.is_extra = is_extra
        """Whether it is for health checks only."""

    def leave(self) -> None:
        """Give it back, once."""
        if self._seats is not None:
            self._seats.give_back(self._client)
            self._seats = None


class Room:
    """What connections a port may have: ``most``, ``client_share`` of them from one address, and some extra ones."""

    def __init__(self, most: int, client_share: float) -> None:
        self._seats, self._extra = (
            Seats(count, max(1, int(count * client_share))) for count in (most, HEALTH_CONNECTIONS)
        )

    def seat(self, client: str) -> Seat | None:
        """A seat for a connection of that client; ``None`` if it has to be refused."""
        if self._seats.take(client):
            return Seat(self._seats, client, is_extra=False)
        return Seat(self._extra, client, is_extra=True) if self._extra.take(client) else None


class Acceptor:
    """Takes new connections from a socket that listens, a few in each round of the event loop.

    uvloop and asyncio take all that wait at once: the requests of other clients, and health checks, would wait for
    a thousand new connections. One without a seat is answered and closed before anything is made for it.
    """

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[[Seat], asyncio.Protocol],
        room: Room,
        *,
        on_refused: Callable[[], None] = lambda: None,
        tls: SSLContext | None = None,
        refusal: bytes = on_wire(*FULL),
    ) -> None:
        """``make`` makes the protocol of each connection, which gives its seat back. Called in the event loop."""
        self._listening, self._make, self._tls, self._refusal = listening, make, tls, refusal
        self._room, self._on_refused = room, on_refused
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
            connection, address = self._listening.accept()
        except ConnectionAbortedError:
            return True
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # no file is left, or no memory: others have to end first
            self._stop()
            self._pause = self._loop.call_later(PAUSE_S, self._listen)
            return False
        connection.setblocking(False)
        seat = self._room.seat(client_of(address[0]) if isinstance(address, tuple) else "")
        if seat is None:
            self._refuse(connection)
            return True
        opening = self._loop.create_task(self._open(connection, seat))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        return True

    def _refuse(self, connection: socket.socket) -> None:
        self._on_refused()
        with connection, suppress(OSError):
            if self._tls is None:
                connection.send(self._refusal)
                connection.recv(1 << 16)  # what is left unread makes the kernel drop the answer

    async def _open(self, connection: socket.socket, seat: Seat) -> None:
        if connection.family != socket.AF_UNIX:
            with suppress(OSError):
                # Otherwise each answer waits 40 ms for the acknowledgement of its own headers.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, number in KEEPALIVE.items():
                    connection.setsockopt(socket.IPPROTO_TCP, option, number)
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make(seat),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
            )
        except OSError:  # gone already, or a handshake that is none
            connection.close()
            seat.leave()


class _Joined:
    """What uvicorn writes an answer to: its head goes with its body, so that the client wakes once.

    What is written to a connection that is gone is dropped: uvloop's transports raise what uvicorn does not expect.
    """

    __slots__ = ("_head", "_transport", "_waits", "is_closing")

    def __init__(self, transport: asyncio.Transport, *, waits: bool) -> None:
        """``waits`` is whether the answer has a body."""
        self._transport, self.is_closing = transport, transport.is_closing
        self._head, self._waits = b"", waits

    def write(self, data: bytes) -> None:
        """Write, or keep the head until the next call."""
        if self.is_closing():
            return
        if self._head and len(data) <= JOINED_BYTES:
            data, self._head = self._head + data, b""
        elif self._head:
            self._flush()
        elif self._waits and data != CONTINUE:
            self._head, self._waits = data, False
            return
        self._transport.write(data)

    def close(self) -> None:
        """Write what is left, and close."""
        if not self.is_closing():
            self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)


class Connection(HttpToolsProtocol):
    """uvicorn's, but for what it closes or drops.

    It closes each connection of HTTP/1.0, and each whose client will send no more. It drops the body of a request that
    offers an upgrade, and would read one that comes later as the next request. And it would read the next request as
    the body of one that was answered before its client was told to send that (``Expect: 100-continue``).
    """

    _looking: asyncio.TimerHandle | None = None
    _would_keep = False
    """Whether the connection stays open, if the body comes that the client is told to send."""

    def data_received(self, data: bytes) -> None:
        """Read what came."""
        self._unset_keepalive_if_required()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _go_on(self, rest: bytes) -> None:
        """Read a request again as if it offered no upgrade (RFC 9110, section 7.8), and ``rest``, which came after it.

        The parser, which takes offers for agreed, has read nothing of it but its head.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        headers = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._feed(b"".join((b"%b %b HTTP/%b\r\n" % (method, self.url, version), *headers, b"\r\n", rest)))

    def on_headers_complete(self) -> None:
        """Keep a connection of HTTP/1.0 if its client wants that."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return
        super().on_headers_complete()
        has_body = self.parser.get_method() != b"HEAD"
        self.cycle.transport = _Joined(self.transport, waits=has_body)  # type: ignore[assignment]
        if self.parser.get_http_version() == "1.0" and self.parser.should_keep_alive():
            # Old proxies do not know chunks: to them the body may end elsewhere (RFC 9112, section 6.1).
            self.cycle.keep_alive = all(name != b"transfer-encoding" for name, _ in self.headers)
        if self.expect_100_continue:
            self._would_keep, self.cycle.keep_alive = self.cycle.keep_alive, False

    def on_message_complete(self) -> None:
        """The request is whole, unless it will be read again."""
        if self.parser.should_upgrade():
            return
        if self.expect_100_continue and not self.cycle.response_started:
            self.cycle.keep_alive = self._would_keep
        super().on_message_complete()

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

    def send_400_response(self, msg: str) -> None:
        """Say that this is no request, to a client that is there."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _cut_off(self) -> None:
        """Drop the connection at once, and what would be sent."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.abort()

    def _look_later(self, pause_s: float) -> None:
        self._looking = self.loop.call_later(pause_s, self._look)

    def _look(self) -> None:
        connection = self.transport.get_extra_info("socket")
        if connection is None or self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(connection.fileno(), 0)
        if poll.poll(0):  # POLLHUP or POLLERR: the other side is closed both ways
            self._cut_off()
        else:
            self._look_later(GONE_S[1])
