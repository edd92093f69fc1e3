"""Asks a server how it is, from a process of its own, while others load it: ``python -m bench.prober PORT SECONDS``.

On stdin comes one infer request, which is sent now and then too. Prints a JSON list of [when, kind, status, ms].
"""

import argparse
import json
import socket
import sys
import time

HEALTH = "/v2/health/live"
EVERY_S = 0.02
INFER_EACH = 5
"""One probe in so many is the infer request."""
PATIENCE_S = 20.0


class Line:
    """One connection, opened again where it was cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> int:
        """The status of the answer; 0 where there was none."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(("127.0.0.1", self._port), PATIENCE_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(request)
            received = b""
            while not _is_whole(received):
                part = self._socket.recv(1 << 16)
                if not part:
                    raise ConnectionError
                received += part
            return int(received[9:12])
        except OSError:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            return 0


def get(path: str) -> bytes:
    """A request without a body."""
    return f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode()


def _is_whole(received: bytes) -> bool:
    """Whether an answer is there to its end."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    _, counted, length = head.lower().partition(b"\r\ncontent-length:")
    # In chunks, as Ray Serve's proxy answers.
    return len(body) >= int(length.split(b"\r\n", 1)[0]) if counted else body.endswith(b"0\r\n\r\n")


def main() -> None:
    """Probe for a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--health", default=HEALTH, metavar="PATH")
    options = parser.parse_args()
    health = get(options.health)
    infer = sys.stdin.buffer.read()
    lines = {"health": Line(options.port), "infer": Line(options.port)}
    start_s, probes, number = time.monotonic(), [], 0
    while (now_s := time.monotonic()) < start_s + options.seconds:
        number += 1
        kind = "infer" if number % INFER_EACH == 0 else "health"
        status = lines[kind].ask(infer if kind == "infer" else health)
        probes.append([now_s, kind, status, (time.monotonic() - now_s) * 1e3])
        time.sleep(EVERY_S)
    json.dump(probes, sys.stdout)


if __name__ == "__main__":
    main()
