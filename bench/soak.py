"""What the server does with malformed requests, and whether its memory stays.

    python bench/soak.py ARTIFACT [--malformed 10000] [--minutes 10] [--clients 4]

First malformed requests (headers, lengths, shapes, datatypes, deep JSON, packed bombs, half-closed and reset
connections) beside a healthy client; then healthy clients alone for ``--minutes``, memory read every ten seconds.
Writes bench/results/soak_NAME.json.
"""

import argparse
import gzip
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from serving import Server  # noqa: E402
from wire import Wire, request  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402

ANSWER_S = 10.0
EVERY_S = 10.0
WARM_SHARE = 0.2
"""Of the soak, before its memory counts."""
BOMB = gzip.compress(bytes(200 * 2**20))
PATH = "/v2/models/bench/infer"


class Malformed:
    """Requests that no client should send, by a seed."""

    def __init__(self, name: str, row: np.ndarray, seed: int) -> None:
        self._random = random.Random(seed)
        self._name, self._row = name, row
        self._whole = request("bench", name, row)
        kinds = ("noise", "cut", "lengths", "split", "shapes", "datatypes", "data", "deep", "bomb", "packed", "chunks")
        self._kinds: dict[str, Callable[[], bytes]] = {kind: getattr(self, kind) for kind in (*kinds, "paths", "text")}

    def one(self) -> tuple[str, bytes]:
        """The kind, and what is sent."""
        kind = self._random.choice(list(self._kinds))
        return kind, self._kinds[kind]()

    def noise(self) -> bytes:
        """Some bytes of a sound request's headers are others."""
        broken = bytearray(self._whole)
        for _ in range(self._random.randint(1, 12)):
            broken[self._random.randrange(min(350, len(broken)))] = self._random.randrange(256)
        return bytes(broken)

    def cut(self) -> bytes:
        """A sound request that ends too early."""
        return self._whole[: self._random.randrange(1, len(self._whole))]

    def lengths(self) -> bytes:
        """A wrong Content-Length."""
        told = self._random.choice(["-1", "9" * 30, "1e3", "0x10", "", "3", "10, 10", "1\r\ncontent-length: 2"])
        return self._post(self._body({}), told)

    def split(self) -> bytes:
        """A wrong length of the JSON part."""
        told = self._random.choice(["-1", "0", "1", "9" * 30, "nan", "7", str(2**40)])
        return self._post(self._body({}), headers=f"inference-header-content-length: {told}\r\n")

    def shapes(self) -> bytes:
        """A shape that the model or nobody has."""
        wrong = [[-1, 3], [2**62, 2**62], [0], [], "x", [1.5], [[1]], [None], [1] * 500, [1, 3, 10**9, 10**9], {}, True]
        return self._post(self._body({"shape": self._random.choice(wrong)}))

    def datatypes(self) -> bytes:
        """A datatype that the model or nobody has."""
        wrong = ["FP16", "BYTES", "INT64", "FP128", "", 7, None, [], "x" * 10**5]
        return self._post(self._body({"datatype": self._random.choice(wrong)}))

    def data(self) -> bytes:
        """Data that are no numbers, too few, or lie about their size."""
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
        """A packing that is none."""
        kind = self._random.choice(["gzip", "deflate", "br", "x", "gzip, gzip"])
        return self._post(self._random.randbytes(100), headers=f"content-encoding: {kind}\r\n")

    def chunks(self) -> bytes:
        """Chunks of wrong sizes."""
        size = self._random.choice(["zz", "-5", "f" * 20, "5;" + "x" * 5000])
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        return f"{head}{size}\r\nhello\r\n0\r\n\r\n".encode()

    def paths(self) -> bytes:
        """A path or method that is not there."""
        path = self._random.choice(
            ["/../../etc/passwd", "/v2/models/%00/infer", "/" + "a" * 10**5, "/v2/models//infer"]
        )
        method = self._random.choice(["GET", "POST", "DELETE", "BREW", "CONNECT"])
        return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode()

    def text(self) -> bytes:
        """A body that is no JSON."""
        return self._post(self._random.choice([b"", b"\xff\xfe", b"NaN", b"null", b"{}", b'{"inputs": 7}', b"[1]"]))

    def _body(self, changed: dict[str, Any]) -> bytes:
        described = {"name": self._name, "datatype": "FP32", "shape": list(self._row.shape), "data": [0.0], **changed}
        return json.dumps({"inputs": [described]}).encode()

    def _post(self, body: bytes, length: str | None = None, headers: str = "") -> bytes:
        told = len(body) if length is None else length
        return f"POST {PATH} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {told}\r\n\r\n".encode() + body


def send(port: int, sent: bytes, end: str) -> str:
    """What came back: a status, ``closed``, ``silence``, or ``left`` where nobody waited for it."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as one:
            one.sendall(sent)
            if end == "reset":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "left"
            one.shutdown(socket.SHUT_WR)
            found = one.recv(4096)
    except TimeoutError:
        return "silence"
    except OSError:
        return "closed"
    return found[9:12].decode("latin-1") if found else "closed"


def malformed(server: Server, name: str, rows: list[np.ndarray], expected: list[np.ndarray], count: int) -> Any:
    """So many of them beside a healthy client."""
    made, choose = Malformed(name, rows[0], 0), random.Random(1)
    wire = Wire(server.port, [request("bench", name, row) for row in rows], expected, None)
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
            kind, sent = made.one()
            end = "reset" if choose.random() < 0.1 else "half-closed"
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


def main() -> None:
    """Run both on the artifact named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--malformed", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    found = artifact.read(options.artifact)
    inputs, outputs = found.golden()
    rows = [np.ascontiguousarray(row)[None] for row in inputs[0]]
    expected = [row.reshape(-1) for row in outputs[0]]
    name = found.manifest.inputs[0].name
    server = Server(options.artifact.resolve())
    try:
        result = {"artifact": found.manifest.model, "cpu": to_json(inspect_cpu())}
        result["malformed"] = malformed(server, name, rows, expected, options.malformed)
        print(json.dumps(result["malformed"], indent=1), flush=True)
        wire = Wire(server.port, [request("bench", name, row) for row in rows], expected, None)
        result["soak"] = soak(server, wire, options.clients, options.minutes)
        print(f"{options.minutes:g} minutes: {result['soak']['growth_bytes'] / 1e6:.1f} MB more after warm-up")
    finally:
        server.process.terminate()
        server.process.wait(60)
    path = HERE / "results" / f"soak_{options.artifact.name.removesuffix('.cw')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
