"""Ends of futures handed to an event loop, with one wake-up for all that end together, or when a client is gone."""

import asyncio
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect

PER_ROUND = 16
"""Ends that are delivered in one round of the loop: each is an answer to write, and health checks must not wait for
all."""


class Waiters:
    """What a client's requests wait for: futures of its event loop, which end when it disconnects, or has already."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[Any]] = set()
        self._is_gone = False

    def add(self, future: "asyncio.Future[Any]") -> None:
        """Wait for this one too."""
        if self._is_gone:
            future.set_exception(ClientDisconnect())
        else:
            self._waiting.add(future)

    def discard(self, future: "asyncio.Future[Any]") -> None:
        """Wait for it no more."""
        self._waiting.discard(future)

    def disconnect(self) -> None:
        """The client is gone."""
        self._is_gone = True
        for future in self._waiting:
            if not future.done():
                future.set_exception(ClientDisconnect())


class Deliveries:
    """Hands the ends of threads' futures to one event loop.

    ``asyncio.wrap_future`` wakes the loop once for each future, a system call each; the requests of a batch end
    together. ``wait`` is called in the loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._is_called = False

    def wait(self, future: "Future[Any]") -> "asyncio.Future[Any]":
        """A future of the loop that ends as the given one does, which is cancelled if the other ends before it."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(partial(self._note, waiter))
        waiter.add_done_callback(lambda _: future.cancel())
        return waiter

    def _note(self, waiter: "asyncio.Future[Any]", future: "Future[Any]") -> None:
        self._ended.append((waiter, future))
        if not self._is_called and self._loop is not None:
            self._is_called = True
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # first: a future that ends from here on schedules the next call
        ended = self._ended
        for _ in range(min(PER_ROUND, len(ended))):
            _hand_over(*ended.popleft())
        if ended and not self._is_called and self._loop is not None:
            self._is_called = True
            self._loop.call_soon(self._deliver)


def _hand_over(waiter: "asyncio.Future[Any]", future: "Future[Any]") -> None:
    if waiter.done():
        return
    if future.cancelled():
        waiter.cancel()
    elif (error := future.exception()) is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(future.result())
