"""gRPC's connections on their way to its library, which takes them itself, tells of none, and is open to all at first.

HTTP/2's limits bind a client once it has acknowledged them (RFC 9113, section 6.5.3). Until then the library lets a
call have 16 MiB of metadata, of which a byte on the wire may name 46 (RFC 7541), and each entry takes a hundred in
memory. So the library listens where only this process comes, and connections are passed on to it from here: those that
have a seat, each from its client's acknowledgement on, which goes before all that came earlier.
"""

import asyncio
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any, cast

import grpc

from corewise.common.errors import InputError
from corewise.serving import addresses
from corewise.serving.addresses import Address, client_of
from corewise.serving.budget import Budget
from corewise.serving.connections import HANDSHAKE_S, Acceptor, Room, Seat
from corewise.serving.protocol import NoRoom
from corewise.serving.web_server import HEALTH_S, UNREAD_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, GOAWAY = 4, 7
ACK = 1
HEAD_BYTES, FRAME_BYTES = 9, 2**14
"""A frame's header, and the longest content of a frame from a client that knows no other limit."""
HELD_BYTES = 80 * 1024
"""What a client may send before it acknowledges: a window of data is 64 KiB."""
METADATA_BYTES = 16 * 1024
"""The metadata of a call; HTTP/2 counts 32 bytes more for each entry."""
STREAMS = 1024
"""Calls of one connection at a time."""
CALM = 11
"""HTTP/2's code for ``ENHANCE_YOUR_CALM``."""


def _frame(kind: int, content: bytes = b"") -> bytes:
    """A frame that is about the connection (RFC 9113, section 4.1)."""
    return len(content).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + content


REFUSAL = _frame(SETTINGS) + _frame(
    GOAWAY,
    bytes(4)
    + CALM.to_bytes(4, "big")
    + b"there are too many connections, in all or from your address; try again later",
)
"""What a connection beyond the limits is told."""


class Greeting:
    """What a client sends until it has acknowledged the server's settings."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._settings_end = 0
        """Where its own settings end, with which it begins."""
        self._at = len(PREFACE)
        """Where the first frame begins that is not whole yet."""

    @property
    def is_http2(self) -> bool:
        """Whether it has begun as HTTP/2 does."""
        return len(self._held) >= len(PREFACE)

    def add(self, data: bytes) -> bytes | None:
        """All of it once it is whole, with the acknowledgement directly behind the client's own settings.

        Raises ``ValueError`` if it is none, or too long.
        """
        held = self._held
        held += data
        if not PREFACE.startswith(held[: len(PREFACE)]):
            raise ValueError("this is not HTTP/2")
        while len(held) >= self._at + HEAD_BYTES:
            length, kind, flags = (
                int.from_bytes(held[self._at : self._at + 3], "big"),
                held[self._at + 3],
                held[self._at + 4],
            )
            if length > FRAME_BYTES or not (self._settings_end or (kind == SETTINGS and not flags & ACK)):
                raise ValueError("it begins with no settings, or has too long a frame")
            end = self._at + HEAD_BYTES + length
            if kind == SETTINGS and flags & ACK and not length:
                acknowledged = held[self._at : end]
                return bytes(
                    held[: self._settings_end] + acknowledged + held[self._settings_end : self._at] + held[end:]
                )
            self._at = end
            self._settings_end = self._settings_end or end
        if len(held) > HELD_BYTES:
            raise ValueError("it acknowledges nothing")
        return None


class _Library(asyncio.Protocol):
    """The library's side of a connection."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self.data_received = client.transport.write  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client.attach(cast(asyncio.Transport, transport))

    def pause_writing(self) -> None:
        _pause(self._client.transport)

    def resume_writing(self) -> None:
        _resume(self._client.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.transport.close()


class _Client(asyncio.Protocol):
    """The client's side, from which nothing is passed on before its greeting is whole."""

    transport: asyncio.Transport

    def __init__(self, port: "RpcPort", seat: Seat) -> None:
        self._port, self._seat = port, seat
        self._loop = asyncio.get_running_loop()
        self._greeting = Greeting()
        self._whole: bytes | None = None
        self._is_known = False
        """Whether the library was told of it: what says nothing takes none of its memory."""
        self._library: asyncio.Transport | None = None
        self._limit: asyncio.TimerHandle | None = None
        """The end of a connection that greets too slowly, or that is only for a health check."""
        self._unread: asyncio.TimerHandle | None = None
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._name = client_of(peer[0]) if isinstance(peer, tuple) else ""
        self._booking = self._port.budget.booking(self._name)
        self._limit = self._loop.call_later(HEALTH_S if self._seat.is_extra else HANDSHAKE_S, self.transport.abort)
        self._port.clients.add(self)

    def attach(self, library: asyncio.Transport) -> None:
        """The library has taken the connection."""
        self._library = library
        if self.transport.is_closing():
            library.close()
        elif self._whole is not None:
            _resume(self.transport)
            self._pass_on(library, self._whole)

    def data_received(self, data: bytes) -> None:
        try:
            self._booking.add(len(data))
            self._whole = self._greeting.add(data)
        except (ValueError, NoRoom):
            self.transport.abort()
            return
        if self._greeting.is_http2 and not self._is_known:
            self._is_known = True
            self._port.connect(self, self._name)
        if self._whole is None:
            return
        if self._library is None:
            _pause(self.transport)
        else:
            self._pass_on(self._library, self._whole)

    def _pass_on(self, library: asyncio.Transport, whole: bytes) -> None:
        """Pass on the greeting, and from now on whatever comes."""
        if self._limit is not None and not self._seat.is_extra:
            self._limit.cancel()
        self._booking.clear()
        self._greeting, self._whole = Greeting(), None
        library.write(whole)
        self.data_received = library.write  # type: ignore[method-assign]
        self.transport.set_protocol(self)  # uvloop remembers what it calls

    def pause_writing(self) -> None:
        if self._library is not None:
            _pause(self._library)
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._unread = self._loop.call_later(UNREAD_S, self._end_if_unread)

    def resume_writing(self) -> None:
        self._look_no_more()
        if self._library is not None:
            _resume(self._library)

    def _end_if_unread(self) -> None:
        """Drop the connection of a client that reads nothing."""
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes >= self._unread_bytes:
            self.transport.abort()
        else:
            self._unread_bytes = left_bytes
            self._unread = self._loop.call_later(UNREAD_S, self._end_if_unread)

    def _look_no_more(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_no_more()
        if self._limit is not None:
            self._limit.cancel()
        self._booking.clear()
        self._seat.leave()
        self._port.clients.discard(self)
        if self._library is not None:
            self._library.close()


def _pause(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.pause_reading()


def _resume(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        transport.resume_reading()


class RpcPort:
    """One address at which gRPC is answered. Used from one event loop."""

    def __init__(
        self,
        address: Address,
        handlers: Sequence[Any],
        room: Room,
        budget: Budget,
        *,
        message_bytes: int,
        on_refused: Callable[[], None] = lambda: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listen there; nobody is answered yet. Raises ``InputError`` if that is not possible."""
        self.budget = budget
        self.clients: set[_Client] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._numbers, self._secret = count(), os.urandom(8).hex()
        self._address, self._listening = address, addresses.bound(address)
        self.place = address if isinstance(address, Path) else int(self._listening.getsockname()[1])
        """The port that it got, or the unix socket."""
        sizes = [(f"grpc.{name}max_metadata_size", METADATA_BYTES) for name in ("", "absolute_")]
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", STREAMS),
                *sizes,
            ]
        )
        self._server.add_generic_rpc_handlers(tuple(handlers))
        with ExitStack() as undo:
            undo.enter_context(self._listening)
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="corewise-", ignore_cleanup_errors=True)
                """Which other users cannot enter."""
                undo.callback(self._folder.cleanup)
                self._path = str(Path(self._folder.name) / "grpc")
                self._server.add_insecure_port(f"unix:{self._path}")
            except (OSError, RuntimeError) as error:
                raise InputError(f"gRPC has no folder for a socket: {error}", "set TMPDIR to a short path") from error
            undo.pop_all()
        self._room, self._on_refused, self._tls = room, on_refused, tls
        self._acceptor: Acceptor | None = None

    async def start(self) -> None:
        """Answer."""
        await self._server.start()
        self._acceptor = Acceptor(
            self._listening,
            lambda seat: _Client(self, seat),
            self._room,
            on_refused=self._on_refused,
            tls=self._tls,
            refusal=REFUSAL,
        )

    def connect(self, client: _Client, name: str) -> None:
        """Have the library take a connection, to which its other side is named as the client is."""
        opening = asyncio.ensure_future(self._connect(client, f"\0{self._secret}/{next(self._numbers)}/{name}"))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _connect(self, client: _Client, name: str) -> None:
        try:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.setblocking(False)
            made.bind(name)
            made.connect(self._path)
            await asyncio.get_running_loop().create_unix_connection(lambda: _Library(client), sock=made)
        except OSError:  # the library has stopped, or no file is left
            client.transport.abort()

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, tell clients to go elsewhere, and end when all calls are answered, or after that."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
            if isinstance(self._address, Path):
                # Before nobody listens there any more: then the path may be that of the next server.
                with suppress(OSError):
                    self._address.unlink()
            self._listening.close()
        await self._server.stop(grace_s)
        self._folder.cleanup()


def secured(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS for gRPC. Raises ``InputError`` for files that are none."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        made.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"TLS cannot use {certificate} and {key}: {error}", "give PEM files") from error
    made.set_alpn_protocols(["h2"])
    return made
