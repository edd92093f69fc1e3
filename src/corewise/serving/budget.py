"""The bytes that requests of all protocols hold together, and each client's share of them."""

import threading
from collections.abc import Callable, Iterable
from typing import Self

import numpy as np

from corewise.serving.protocol import Limits, NoRoom


class Budget:
    """Books bytes when they have arrived, never because a request claims them. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self._total_bytes = limits.bodies_bytes
        self._client_share = limits.client_share
        self._used_bytes = 0
        self._by_client: dict[str, int] = {}
        self._lock = threading.Lock()
        self._room: Callable[[int], int] | None = None
        self._step_bytes = self._looked_bytes = 0
        self.total_booked_bytes = 0
        """Since the start."""

    def watch(self, room: Callable[[int], int], step_bytes: int) -> None:
        """Ask ``room`` how much may be booked in all, given what is booked, whenever ``step_bytes`` more were."""
        self._room, self._step_bytes = room, step_bytes
        self.look()

    def look(self) -> None:
        """Ask now."""
        with self._lock:
            self._look()

    def booking(self, client: str) -> "Booking":
        """What one request of the client at that address holds, until the ``with`` ends."""
        return Booking(self, client)

    def book(self, client: str, size_bytes: int) -> None:
        """Book bytes. Raises ``NoRoom`` where there is no room for them."""
        with self._lock:
            if self.total_booked_bytes + size_bytes > self._looked_bytes + self._step_bytes:
                self._look()
            held_bytes = self._by_client.get(client, 0) + size_bytes
            if held_bytes > self._total_bytes * self._client_share:
                raise NoRoom("requests from your address hold too many bytes already")
            if self._used_bytes + size_bytes > self._total_bytes:
                raise NoRoom("requests hold too many bytes of the server's memory already")
            self._used_bytes += size_bytes
            self.total_booked_bytes += size_bytes
            self._by_client[client] = held_bytes

    def release(self, client: str, size_bytes: int) -> None:
        """Give bytes back."""
        with self._lock:
            self._used_bytes -= size_bytes
            held_bytes = self._by_client.get(client, 0) - size_bytes
            if held_bytes:
                self._by_client[client] = held_bytes
            else:
                self._by_client.pop(client, None)

    def _look(self) -> None:
        if self._room is not None:
            self._looked_bytes = self.total_booked_bytes
            self._total_bytes = self._room(self._used_bytes)


class Booking:
    """What one request holds: a context manager that gives it back."""

    __slots__ = ("_budget", "_client", "size_bytes")

    def __init__(self, budget: Budget, client: str) -> None:
        self._budget, self._client = budget, client
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Give all of it back."""
        self._budget.release(self._client, self.size_bytes)
        self.size_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Book more bytes. Raises ``NoRoom`` where there is no room for them."""
        self._budget.book(self._client, size_bytes)
        self.size_bytes += size_bytes

    def cover(self, arrays: Iterable[np.ndarray]) -> None:
        """Book what arrays need beyond what is booked: numbers in JSON are shorter than in memory, photos much more."""
        more_bytes = sum(array.nbytes for array in arrays) - self.size_bytes
        if more_bytes > 0:
            self.add(more_bytes)
