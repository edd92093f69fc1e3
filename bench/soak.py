"""What the server does with malformed requests, and whether its memory stays.

    python -m bench soak ARTIFACT [--malformed 10000] [--minutes 10] [--clients 4]

First malformed requests (headers, lengths, shapes, datatypes, deep JSON, packed bombs, half-closed and reset
connections) beside a healthy client; then healthy clients alone for ``--minutes``, memory read every ten seconds.
Writes soak_NAME.json.
"""

import argparse
import gzip
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import machine_facts, say, write_results
from bench.servers import Server, golden_rows
from bench.wire import INFER, Wire, request
from corewise import artifact

ANSWER_S = 10.0
EVERY_S = 10.0
WARM_SHARE = 0.2
"""Of the soak, before its memory counts."""
BOMB = gzip.compress(bytes(200 * 2**20))


class Malformed:
    """Requests that no client should send, by a seed."""

    def __init__(self, name: str, row: np.ndarray, seed: int) -> None:
        self._random = random.Random(seed)
        self._name, self._row = name, row
        self._sound = request(name, row)
        kinds = ("noise", "cut", "lengths", "split", "shapes", "datatypes", "data", "deep", "bomb", "packed", "chunks")
        self._kinds: dict[str, Callable[[], bytes]] = {kind: getattr(self, kind) for kind in (*kinds, "paths", "text")}

    def choose(self) -> tuple[str, bytes]:
        """The kind, and what is sent."""
        kind = self._random.choice(list(self._kinds))
        return kind, self._kinds[kind]()

    def noise(self) -> bytes:
        """A sound request with some bytes of its headers changed."""
        broken = bytearray(self._sound)
        for _ in range(self._random.randint(1, 12)):
            broken[self._random.randrange(min(350, len(broken)))] = self._random.randrange(256)
        return bytes(broken)

    def cut(self) -> bytes:
        """A sound request that ends too early."""
        return self._sound[: self._random.randrange(1, len(self._sound))]

    def lengths(self) -> bytes:
        """A wrong Content-Length."""
        told = self._random.choice(["-1", "9" * 30, "1e3", "0x10", "", "3", "10, 10", "1\r\ncontent-length: 2"])
        return self._post(self._body({}), told)

    def split(self) -> bytes:
        """A wrong length of the JSON part."""
        told = self._random.choice(["-1", "0", "1", "9" * 30, "nan", "7", str(2**40)])
        return self._post(self._body({}), headers=f"inference-header-content-length: {told}\r\n")

    def shapes(self) -> bytes:
        """A shape that the model does not take, or that is no shape."""
        wrong = [[-1, 3], [2**62, 2**62], [0], [], "x", [1.5], [[1]], [None], [1] * 500, [1, 3, 10**9, 10**9], {}, True]
        return self._post(self._body({"shape": self._random.choice(wrong)}))

    def datatypes(self) -> bytes:
        """A datatype that the model does not take, or that does not exist."""
        wrong = ["FP16", "BYTES", "INT64", "FP128", "", 7, None, [], "x" * 10**5]
        return self._post(self._body({"datatype": self._random.choice(wrong)}))

    def data(self) -> bytes:
        """Data that is not numbers, too short, or not of the size that it says."""
        wrong: list[Any] = [[], ["a"], [None], [1e400], [[[]]], "x", {"a": 1}, [True, "b"], [10**400]]
        size = {"parameters": {"binary_data_size": self._random.choice([-1, 2**63, "x", 5, 0])}}
        return self._post(self._body(self._random.choice([{"data": self._random.choice(wrong)}, size])))

    def deep(self) -> bytes:
        """JSON nested deeper than any parser likes."""
        return self._post(self._random.choice([b"[", b'{"a":']) * self._random.randrange(10, 200_000))

    def bomb(self) -> bytes:
        """200 MB of zeros, packed."""
        return self._post(BOMB, headers="content-encoding: gzip\r\n")

    def packed(self) -> bytes:
        """A body that is not packed as it says."""
        kind = self._random.choice(["gzip", "deflate", "br", "x", "gzip, gzip"])
        return self._post(self._random.randbytes(100), headers=f"content-encoding: {kind}\r\n")

    def chunks(self) -> bytes:
        """Chunks of wrong sizes."""
        size = self._random.choice(["zz", "-5", "f" * 20, "5;" + "x" * 5000])
        head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        return f"{head}{size}\r\nhello\r\n0\r\n\r\n".encode()

    def paths(self) -> bytes:
        """A path or method that does not exist."""
        path = self._random.choice(
            ["/../../etc/passwd", "/v2/models/%00/infer", "/" + "a" * 10**5, "/v2/models//infer"]
        )
        method = self._random.choice(["GET", "POST", "DELETE", "BREW", "CONNECT"])
        return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode()

    def text(self) -> bytes:
        """A body that is not JSON."""
        return self._post(self._random.choice([b"", b"\xff\xfe", b"NaN", b"null", b"{}", b'{"inputs": 7}', b"[1]"]))

    def _body(self, changed: dict[str, Any]) -> bytes:
        described = {"name": self._name, "datatype": "FP32", "shape": list(self._row.shape), "data": [0.0], **changed}
        return json.dumps({"inputs": [described]}).encode()

    def _post(self, body: bytes, length: str | None = None, headers: str = "") -> bytes:
        told = len(body) if length is None else length
        return f"POST {INFER} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {told}\r\n\r\n".encode() + body


def send(port: int, sent: bytes, end: str) -> str:
    """What came back: a status, ``closed``, ``silence``, or ``left`` if nothing was waited for."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
            connection.sendall(sent)
            if end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "left"
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
    except TimeoutError:
        return "silence"
    except OSError:
        return "closed"
    return answer[9:12].decode("latin-1") if answer else "closed"


def malformed(server: Server, name: str, rows: list[np.ndarray], expected: list[np.ndarray], count: int) -> Any:
    """Send ``count`` malformed requests beside a healthy client."""
    requests, endings = Malformed(name, rows[0], 0), random.Random(1)
    wire = Wire(server.port, [request(name, row) for row in rows], expected, None)
    wire.closed(1, 3.0)
    before = server.memory_bytes()
    running, healthy = threading.Event(), []
    running.set()

    def client() -> None:
        while running.is_set():
            healthy.append(wire.closed(1, 1.0))

    beside = threading.Thread(target=client)
    beside.start()
    became: dict[str, Counter[str]] = {}
    try:
        for _ in range(count):
            kind, sent = requests.choose()
            end = "reset" if endings.random() < 0.1 else "half-closed"
            became.setdefault(kind, Counter())[send(server.port, sent, end)] += 1
    finally:
        running.clear()
        beside.join()
    time.sleep(2)
    latencies = [value for load in healthy for value in load.latencies_ms]
    return {
        "sent": count,
        "became": {kind: dict(counts) for kind, counts in became.items()},
        "memory_bytes": [before, server.memory_bytes()],
        "beside": {
            "answered": sum(load.answered for load in healthy),
            "failed": sum(load.failed + load.wrong + load.refused for load in healthy),
            "p99_ms": float(np.quantile(latencies, 0.99)),
        },
        "alive": server.process.poll() is None,
    }


def soak(server: Server, wire: Wire, clients: int, minutes: float) -> Any:
    """Healthy clients, and the memory over time."""
    end_s, memory, answered, failed = time.monotonic() + minutes * 60, [], 0, 0
    while time.monotonic() < end_s:
        load = wire.closed(clients, EVERY_S)
        answered += load.answered
        failed += load.failed + load.wrong + load.refused
        memory.append(server.memory_bytes())
    warm = memory[int(len(memory) * WARM_SHARE) :]
    return {
        "minutes": minutes,
        "answered": answered,
        "failed": failed,
        "memory_bytes": memory,
        "growth_bytes": max(warm[-3:]) - min(warm[:3]),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--malformed", type=int, default=10_000, help="how many malformed requests")
    parser.add_argument("--minutes", type=float, default=10.0, help="of healthy load")
    parser.add_argument("--clients", type=int, default=4)


def main(options: argparse.Namespace) -> None:
    """Run both on the artifact."""
    sound = artifact.read(options.artifact)
    name, rows, expected = golden_rows(sound)
    result = {"artifact": sound.manifest.model, **machine_facts()}
    with Server(options.artifact) as server:
        result["malformed"] = malformed(server, name, rows, expected, options.malformed)
        say(json.dumps(result["malformed"], indent=1))
        wire = Wire(server.port, [request(name, row) for row in rows], expected, None)
        result["soak"] = soak(server, wire, options.clients, options.minutes)
    say(f"{options.minutes:g} minutes: {result['soak']['growth_bytes'] / 1e6:.1f} MB more after warm-up")
    write_results(options.results / f"soak_{options.artifact.name.removesuffix('.cw')}.json", result)
