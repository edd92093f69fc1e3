"""Each client's share of the gRPC connections, which gRPC's own library does not limit.

It takes connections itself and shows none of them. But they are sockets of this process: those that one address has
beyond its share are shut down, which the library takes for the client's end.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
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
BARRED_S = 10.0


class Shares:
    """Keeps the connections to a port within their shares: the older ones stay. Used from one event loop."""

    def __init__(self, most: int, client_share: float, on_refused: Callable[[], None]) -> None:
        """``on_refused`` is called for each connection that is shut down."""
        self._most, self._most_of_client = most, max(1, int(most * client_share))
        self._on_refused = on_refused
        self._known: dict[int, str] = {}
        """Client by inode of the connections of the last look, the oldest first."""
        self._barred: dict[str, float] = {}
        """Until when clients have no connection."""
        self._hurry = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def start(self, port: int) -> None:
        """Look at the connections to this port, until it is closed."""
        self._keeper = asyncio.create_task(self._keep(port))

    def bar(self, client: str) -> None:
        """Shut down all connections of a client, and its new ones for a while; nothing for a unix socket's."""
        if client:
            self._barred[client] = monotonic() + BARRED_S
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
            self._barred = {client: until_s for client, until_s in self._barred.items() if until_s > monotonic()}
            refused = await asyncio.to_thread(self._look, port, frozenset(self._barred))
            pause_s = SHORTLY_S if refused else LOOK_S
            for _ in range(refused):
                self._on_refused()

    def _look(self, port: int, barred: Collection[str]) -> int:
        """Shut down what is too much; how many connections that were."""
        try:
            handles = [int(name) for name in os.listdir("/proc/self/fd")]
        except OSError:  # no file is left to look with
            return 0
        if len(handles) <= self._most_of_client and not barred:  # as nearly always: no address can have too many
            self._known = {}
            return 0
        clients, where = {}, {}
        for handle in handles:
            with _tcp(handle) as one, suppress(OSError):  # it listens, or is gone
                if one is not None and one.getsockname()[1] == port:
                    inode = os.fstat(one.fileno()).st_ino
                    clients[inode], where[inode] = client_of(one.getpeername()[0]), handle
        seats = Seats(self._most, self._most_of_client)
        ordered = [inode for inode in self._known if inode in clients]
        ordered += [inode for inode in clients if inode not in self._known]
        welcome = [inode for inode in ordered if clients[inode] not in barred]
        self._known = {inode: clients[inode] for inode in welcome if seats.take(clients[inode])}
        refused = clients.keys() - self._known
        for inode in refused:
            with _tcp(where[inode]) as one, suppress(OSError):
                if one is not None and os.fstat(one.fileno()).st_ino == inode:
                    one.shutdown(socket.SHUT_RDWR)
        return len(refused)


@contextmanager
def _tcp(handle: int) -> Iterator[socket.socket | None]:
    """The TCP socket with that handle of this process, by a handle of its own, as others may close theirs."""
    found = None
    with suppress(OSError):  # it is closed
        copy = os.dup(handle)
        try:
            found = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
    if found is None:
        yield None
        return
    with found:
        yield found if found.family in (socket.AF_INET, socket.AF_INET6) else None


class Overfull(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The first handler there: refuses calls with more metadata than may be, which gRPC let through.

    Its limit does not count an entry that names an earlier one (HPACK, RFC 7541), a byte each: a frame of 16 KiB
    becomes 2 MB. Nobody does so by chance, so the client is barred.
    """

    def __init__(self, shares: Shares) -> None:
        async def refuse(requests: AsyncIterator[bytes], context: Any) -> None:
            shares.bar(messages.client_of(context))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the call has too much metadata")

        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def service(self, details: Any) -> Any:
        """What refuses the call; otherwise ``None``, which leaves it to the next handler."""
        return self._refusal if len(details.invocation_metadata) * ENTRY_BYTES > METADATA_BYTES else None
