"""Each client's share of the gRPC connections, which gRPC's own library does not limit.

It takes connections itself and shows none of them. But they are sockets of this process: those that one address has
beyond its share are shut down, which the library takes for the client's end.
"""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc

from corewise.serving import messages
from corewise.serving.addresses import client_of
from corewise.serving.connections import Seats

METADATA_BYTES = 16 * 1024
"""Of a gRPC call, each entry with ``ENTRY_BYTES`` more than it has."""
ENTRY_BYTES = 32
LOOK_S, SHORTLY_S = 0.5, 0.05
"""From one look at all connections to the next, and after one that found too many."""

Peer = tuple[str, int]
"""A client, and the port of its connection."""


class Shares:
    """Keeps the connections to a port within their shares: the older ones stay. Used from one event loop."""

    def __init__(self, most: int, client_share: float, on_refused: Callable[[], None]) -> None:
        """``on_refused`` is called for each connection that is shut down."""
        self._most, self._most_of_client = most, max(1, int(most * client_share))
        self._on_refused = on_refused
        self._peers: dict[int, Peer | None] = {}
        """Of this process's sockets by inode, the oldest first; ``None`` if it is no connection to the port."""
        self._shut: set[int] = set()
        """Inodes of connections that were shut down, which the library has not closed yet."""
        self._unwelcome: set[Peer] = set()
        self._hurry = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def start(self, port: int) -> None:
        """Look at the connections to this port, until it is closed."""
        self._keeper = asyncio.create_task(self._keep(port))

    def end(self, peer: Peer) -> None:
        """Shut down this connection; that of a unix socket stays."""
        self._unwelcome.add(peer)
        self._hurry.set()

    def close(self) -> None:
        """Look no more."""
        if self._keeper is not None:
            self._keeper.cancel()

    async def _keep(self, port: int) -> None:
        pause_s = LOOK_S
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), pause_s)
            self._hurry.clear()
            unwelcome, self._unwelcome = self._unwelcome, set()
            refused = await asyncio.to_thread(self._look, port, unwelcome)
            pause_s = SHORTLY_S if refused else LOOK_S
            for _ in range(refused):
                self._on_refused()

    def _look(self, port: int, unwelcome: Collection[Peer]) -> int:
        """Shut down what is unwelcome or too much; how many connections that were."""
        try:
            where = _sockets()
        except OSError:  # no file is left to look with
            return 0
        self._peers = {inode: peer for inode, peer in self._peers.items() if inode in where}
        self._shut &= where.keys()
        for inode in sorted(where.keys() - self._peers.keys()):  # they grow, but for each CPU apart
            with _opened(inode, where[inode]) as one:
                if one is not None:
                    self._peers[inode] = _peer(one, port)
        seats, refused = Seats(self._most, self._most_of_client), 0
        for inode, peer in self._peers.items():
            if peer is None or inode in self._shut or (peer not in unwelcome and seats.take(peer[0])):
                continue
            with _opened(inode, where[inode]) as one, suppress(OSError):  # its client is gone
                if one is not None:
                    self._shut.add(inode)
                    refused += 1
                    one.shutdown(socket.SHUT_RDWR)
        return refused


def _sockets() -> dict[int, int]:
    """The sockets of this process: their handles by inode."""
    found = {}
    for handle in map(int, os.listdir("/proc/self/fd")):
        try:
            status = os.fstat(handle)
        except OSError:  # it is closed
            continue
        if stat.S_ISSOCK(status.st_mode):
            found[status.st_ino] = handle
    return found


@contextmanager
def _opened(inode: int, handle: int) -> Iterator[socket.socket | None]:
    """The socket, by a handle of its own, as others may close theirs; ``None`` if that happened, or none is left."""
    found = None
    with suppress(OSError):
        copy = os.dup(handle)
        try:
            found = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
    if found is None:
        yield None
        return
    with found:
        yield found if os.fstat(found.fileno()).st_ino == inode else None


def _peer(one: socket.socket, port: int) -> Peer | None:
    """The client of a socket, if it is a connection to the port."""
    if one.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # it listens, or its client is gone
            if one.getsockname()[1] == port:
                host, from_port, *_ = one.getpeername()
                return client_of(host), from_port
    return None


class Overfull(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The first handler there: refuses calls with more metadata than may be, which gRPC let through.

    Its limit does not count an entry that names an earlier one (HPACK, RFC 7541), a byte each: a frame of 16 KiB
    becomes 2 MB. Nobody does so by chance, so the connection is shut down.
    """

    def __init__(self, shares: Shares) -> None:
        async def refuse(requests: AsyncIterator[bytes], context: Any) -> None:
            shares.end(messages.peer_of(context))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the call has too much metadata")

        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def service(self, details: Any) -> Any:
        """What refuses the call; otherwise ``None``, which leaves it to the next handler."""
        return self._refusal if len(details.invocation_metadata) * ENTRY_BYTES > METADATA_BYTES else None
