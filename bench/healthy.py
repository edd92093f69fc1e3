"""Healthy clients beside an attack, in a process of their own: how long health checks and sound requests take.

    python -m bench.healthy PORT ARTIFACT

Asks until its standard input is closed, then prints what became of it as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench.servers import golden_rows
from bench.wire import Wire, request
from corewise import artifact
from corewise.common.stats import quantile

PAUSE_S = 0.02
HEALTH = b"GET /v2/health/ready HTTP/1.1\r\nhost: bench\r\n\r\n"


class Healthy:
    """The process; ``facts`` ends it."""

    def __init__(self, port: int, folder: Path) -> None:
        command = [sys.executable, "-m", "bench.healthy", str(port), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun

    def facts(self) -> dict[str, Any]:
        """What became of it."""
        printed, _ = self._process.communicate(timeout=60)
        found: dict[str, Any] = json.loads(printed)
        return found


def probe(port: int, over: threading.Event) -> dict[str, Any]:
    """Ask for health until it is over, each time on a new connection, as probes do."""
    import socket

    took_ms: list[float] = []
    failed = 0
    while not over.wait(PAUSE_S):
        start_s = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(HEALTH)
                failed += not connection.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            failed += 1
        took_ms.append((time.monotonic() - start_s) * 1e3)
    return {
        "asked": len(took_ms),
        "failed": failed,
        "p50_ms": quantile(took_ms, 0.5) if took_ms else None,
        "p99_ms": quantile(took_ms, 0.99) if took_ms else None,
        "max_ms": max(took_ms, default=None),
    }


def main(port: int, folder: Path) -> None:
    name, rows, expected = golden_rows(artifact.read(folder))
    over, health = threading.Event(), {}
    probing = threading.Thread(target=lambda: health.update(probe(port, over)))
    probing.start()
    print("begun", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    answered = refused = failed = wrong = 0
    took_ms: list[float] = []
    wire = Wire(port, [request(name, row) for row in rows], expected, None)
    while not over.is_set():
        try:
            load = wire.open(50, 0.4)
        except OSError:  # nobody listens any more
            failed += 1
            time.sleep(PAUSE_S)
            continue
        answered, refused, wrong = answered + load.answered, refused + load.refused, wrong + load.wrong
        failed += load.failed + load.dropped
        took_ms += load.latencies_ms
    probing.join()
    sound = {"answered": answered, "refused": refused, "failed": failed, "wrong": wrong}
    sound |= {"p50_ms": quantile(took_ms, 0.5), "p99_ms": quantile(took_ms, 0.99)} if took_ms else {}
    print(json.dumps({"health": health, "sound": sound}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
