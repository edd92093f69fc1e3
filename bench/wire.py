"""A client that costs little: one thread, prepared requests, many connections. HTTP/1.1 with binary tensors."""

import base64
import json
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from corewise.common.stats import quantile
from corewise.runtime.loadgen import arrivals_s

MODEL = "bench"
"""What a server calls the artifact."""
INFER = f"/v2/models/{MODEL}/infer"
MOST_CONNECTIONS = 2000
"""corewise has 2,048 for one address."""


def request(name: str, row: np.ndarray, timeout_ms: float | None = None) -> bytes:
    """A complete infer request with one float32 row."""
    return infer([(name, "FP32", row)], timeout_ms)


def infer(tensors: Sequence[tuple[str, str, np.ndarray]], timeout_ms: float | None = None) -> bytes:
    """An infer request with (name, datatype, array) tensors: texts in JSON, numbers in binary."""
    described, tail = [], b""
    for name, datatype, array in tensors:
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if datatype == "BYTES":
            tensor["data"] = array.tolist()
        else:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            tail += array.tobytes()
        described.append(tensor)
    text = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    limit = f"x-request-timeout-ms: {timeout_ms:g}\r\n" if timeout_ms else ""
    return post(INFER, text + tail, f"{limit}inference-header-content-length: {len(text)}\r\n")


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """Any request with a body."""
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


Read = Callable[[bytes, int], np.ndarray]


def from_raw(body: bytes, size: int) -> np.ndarray:
    """The float32 values that the body ends with, ``size`` bytes of them."""
    return np.frombuffer(body[-size:], np.float32)


def from_base64(body: bytes, size: int) -> np.ndarray:
    """The values in a JSON string."""
    return np.frombuffer(base64.b64decode(json.loads(body)), np.float32)


@dataclass
class Load:
    """What became of the requests."""

    seconds: float = 0.0
    offered: int = 0
    answered: int = 0
    refused: int = 0
    """At once."""
    dropped: int = 0
    """Accepted, and given up when their time was over."""
    failed: int = 0
    wrong: int = 0
    in_time: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    due_s: list[float] = field(default_factory=list)
    """Of each of these requests, from the start of the load."""
    refusals_ms: list[float] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """As numbers."""
        return {
            "seconds": self.seconds,
            "offered": self.offered,
            "answered": self.answered,
            "refused": self.refused,
            "dropped": self.dropped,
            "failed": self.failed,
            "wrong": self.wrong,
            "answered_per_s": self.answered / self.seconds,
            "goodput_per_s": self.in_time / self.seconds,
            "p50_ms": quantile(self.latencies_ms, 0.5) if self.latencies_ms else None,
            "p99_ms": quantile(self.latencies_ms, 0.99) if self.latencies_ms else None,
            "refusal_p99_ms": quantile(self.refusals_ms, 0.99) if self.refusals_ms else None,
        }


class Connection:
    """One request at a time over HTTP."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.out = memoryview(b"")
        self.received = b""
        self.k = 0
        self.due_s = 0.0
        self.is_busy = False

    def begin(self, request: bytes) -> None:
        """Put a request into ``out``."""
        self.out = memoryview(request)

    def answer(self) -> tuple[int, bytes] | None:
        """Status and body, once they are complete."""
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = self.received[:end].lower()
        name = b"\r\ncontent-length:"  # not that of the JSON part
        if name not in head:  # in chunks, as Ray Serve's proxy refuses; they are short and not looked into
            if not self.received.endswith(b"\r\n0\r\n\r\n"):
                return None
            body, self.received = self.received[end + 4 :], b""
            return int(head[9:12]), body
        size = int(head[head.index(name) + len(name) :].split(b"\r\n", 1)[0])
        if len(self.received) < end + 4 + size:
            return None
        body, self.received = self.received[end + 4 : end + 4 + size], b""
        return int(head[9:12]), body


class Wire:
    """Sends prepared requests to a server, and checks that each answer is its own."""

    def __init__(
        self,
        port: int,
        requests: list[bytes],
        expected: list[np.ndarray],
        slo_ms: float | None,
        read: Read = from_raw,
        make: Callable[[int], Connection] = Connection,
    ) -> None:
        """``make`` connects to a port."""
        self._make = make
        self._port, self._requests, self._expected, self._slo_ms = port, requests, expected, slo_ms
        self._read = read
        self._norms = [float(np.linalg.norm(one)) for one in expected]
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        """By their file descriptors; each is watched from its first request to its end."""
        self._free: deque[Connection] = deque()
        self._busy = 0
        self._sent = 0
        """Of all loads: each goes on where the connection before ended."""
        self._load, self._start_s = Load(), 0.0

    def close(self) -> None:
        """Close the connections that are free."""
        for connection in self._connections.values():
            connection.socket.close()
        self._connections.clear()
        self._free.clear()
        self._poll.close()

    def closed(self, clients: int, seconds: float) -> Load:
        """``clients`` senders, each with its next request when it has its answer."""
        start_s = self._begin()
        for _ in range(clients):
            self._send(time.monotonic())
        while time.monotonic() < start_s + seconds:
            for _ in range(self._step(0.05)):
                self._send(time.monotonic())
        return self._finish(start_s)

    def open(self, rate_per_s: float, seconds: float, seed: int = 0) -> Load:
        """A Poisson process, as ``at``."""
        return self.at(arrivals_s(rate_per_s, seconds, seed).tolist())

    def at(self, times_s: Sequence[float]) -> Load:
        """Requests at these times, in order; latencies count from when a request was due."""
        start_s = self._begin()
        for time_s in times_s:
            due_s = start_s + time_s
            while (ahead_s := due_s - time.monotonic()) > 0:
                self._step(ahead_s)
            self._send(due_s)
            self._step(0)
        return self._finish(start_s)

    def _begin(self) -> float:
        self._load, self._start_s = Load(), time.monotonic()
        return self._start_s

    def _finish(self, start_s: float) -> Load:
        end_s = time.monotonic() + 30
        while self._busy and time.monotonic() < end_s:
            self._step(0.05)
        self._load.failed += self._busy
        self._load.seconds = time.monotonic() - start_s
        return self._load

    def _send(self, due_s: float) -> None:
        k, self._sent = self._sent, self._sent + 1
        self._load.offered += 1
        if not self._free:
            if self._busy >= MOST_CONNECTIONS:
                self._load.failed += 1
                return
            self._connect()
        connection = self._free.popleft()
        connection.k, connection.due_s, connection.is_busy = k, due_s, True
        connection.begin(self._requests[k % len(self._requests)])
        self._busy += 1
        self._push(connection)
        if connection.out:
            self._poll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _connect(self) -> None:
        made = self._make(self._port)
        self._connections[made.socket.fileno()] = made
        self._poll.register(made.socket, select.EPOLLIN)
        self._free.append(made)

    def _push(self, connection: Connection) -> None:
        """Send what goes without waiting."""
        try:
            connection.out = connection.out[connection.socket.send(connection.out) :]
        except BlockingIOError:
            return
        except OSError:  # seen when it is read from
            connection.out = memoryview(b"")

    def _step(self, wait_s: float) -> int:
        """Go on with what can go on; how many requests ended."""
        ended = 0
        for number, events in self._poll.poll(wait_s):
            connection = self._connections[number]
            if events & select.EPOLLOUT:
                self._push(connection)
                if not connection.out:
                    self._poll.modify(number, select.EPOLLIN)
            if events & ~select.EPOLLOUT:
                ended += self._receive(connection)
        return ended

    def _receive(self, connection: Connection) -> bool:
        """Read what came; whether a request ended."""
        try:
            received = connection.socket.recv(1 << 18)
        except OSError:
            received = b""
        if not received:
            self._end(connection)
        connection.received += received
        answer = connection.answer() if received else (0, b"")
        if answer is None or not connection.is_busy:
            return False
        connection.is_busy = False
        self._busy -= 1
        self._count(connection, *answer)
        if received:
            self._free.append(connection)
        return True

    def _end(self, connection: Connection) -> None:
        """The server closed it, maybe between two requests."""
        del self._connections[connection.socket.fileno()]
        self._poll.unregister(connection.socket)
        connection.socket.close()
        if not connection.is_busy:
            self._free.remove(connection)

    def _count(self, connection: Connection, status: int, body: bytes) -> None:
        took_ms = (time.monotonic() - connection.due_s) * 1e3
        load = self._load
        if status == 200:
            load.answered += 1
            load.latencies_ms.append(took_ms)
            load.due_s.append(connection.due_s - self._start_s)
            load.in_time += self._slo_ms is None or took_ms <= self._slo_ms
            number = connection.k % len(self._expected)
            expected = self._expected[number]
            off = self._read(body, expected.nbytes) - expected
            # Calls of other sizes round differently; another request's answer is far away.
            load.wrong += not off.dot(off) <= (0.1 * self._norms[number]) ** 2
        elif status == 503 and b"it waited" in body:
            load.dropped += 1
        elif status == 503:
            load.refused += 1
            load.refusals_ms.append(took_ms)
        else:
            load.failed += 1
