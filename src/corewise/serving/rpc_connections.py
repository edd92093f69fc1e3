"""Each client's share of the gRPC connections, which gRPC's own library does not limit.

It takes connections itself and shows none of them. But they are sockets of this process: those that one address has
beyond its share are shut down, which the library takes for the client's end.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from corewise.serving.addresses import client_of
from corewise.serving.connections import Seats

PAUSE_S, BUSY_PAUSE_S = 0.5, 0.05
"""From one look to the next, and after one that found too many."""


class Shares:
    """Keeps the connections to a port within their shares: the older ones stay. Used from one event loop."""

    def __init__(self, port: int, most: int, client_share: float, on_refused: Callable[[], None]) -> None:
        """``on_refused`` is called for each connection that is shut down."""
        self._port, self._most, self._on_refused = port, most, on_refused
        self._most_of_client = max(1, int(most * client_share))
        self._known: dict[int, str] = {}
        """Client by inode of the connections of the last look, the oldest first."""
        self._keeper = asyncio.ensure_future(self._keep())

    def close(self) -> None:
        """Look no more."""
        self._keeper.cancel()

    async def _keep(self) -> None:
        pause_s = PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            refused = await asyncio.to_thread(self._look)
            pause_s = BUSY_PAUSE_S if refused else PAUSE_S
            for _ in range(refused):
                self._on_refused()

    def _look(self) -> int:
        """Shut down what is beyond the shares; how many connections that were."""
        handles = [int(name) for name in os.listdir("/proc/self/fd")]
        if len(handles) <= self._most_of_client:  # as nearly always: no address can have too many
            self._known = {}
            return 0
        clients, where = {}, {}
        for handle in handles:
            with _socket(handle) as one, suppress(OSError):  # gone, or it listens
                if one is not None and one.getsockname()[1] == self._port:
                    inode = os.fstat(one.fileno()).st_ino
                    clients[inode], where[inode] = client_of(one.getpeername()[0]), handle
        seats = Seats(self._most, self._most_of_client)
        ordered = [inode for inode in self._known if inode in clients]
        ordered += [inode for inode in clients if inode not in self._known]
        self._known = {inode: clients[inode] for inode in ordered if seats.take(clients[inode])}
        refused = clients.keys() - self._known
        for inode in refused:
            with _socket(where[inode]) as one, suppress(OSError):
                if one is not None and os.fstat(one.fileno()).st_ino == inode:
                    one.shutdown(socket.SHUT_RDWR)
        return len(refused)


@contextmanager
def _socket(handle: int) -> Iterator[socket.socket | None]:
    """What a handle of this process is, if it is a socket of TCP, by a handle of its own: another may close its."""
    found = None
    try:
        copy = os.dup(handle)
        try:
            found = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
    except OSError:  # it was closed
        pass
    if found is None:
        yield None
        return
    with found:
        yield found if found.family in (socket.AF_INET, socket.AF_INET6) else None
