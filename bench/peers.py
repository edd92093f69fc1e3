"""Requests per second at one p99: corewise beside FastAPI, LitServe and Ray Serve, on one machine in one run.

    python bench/peers.py ARTIFACT [--slo-ms 500] [--seconds 15]

ARTIFACT is ResNet-50. Each server is loaded in turn by the same client on the same cores: a closed loop of 16 for its
capacity, then requests at random times (a Poisson process) at rates between which half and half is taken, for the
highest of which at least 99 % were answered right within ``--slo-ms``. LitServe and Ray Serve run eager PyTorch, and
once more the artifact. Servers that are not installed (``pip install litserve 'ray[serve]'``) are left out with the
reason. Writes bench/results/peers.json.
"""

import argparse
import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_servers import Model  # noqa: E402
from wire import Load, Wire, from_base64, from_raw, post, request  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.cpu import inspect  # noqa: E402
from corewise.values import to_json  # noqa: E402

CLIENTS = 16
HALVINGS = 4
GOOD_SHARE = 0.99
START_S = 120.0
PACKAGES = {"fastapi": "fastapi", "litserve": "litserve", "ray": "ray"}
SERVERS = (
    ("corewise", None, True),
    ("FastAPI, eager PyTorch", "fastapi", False),
    ("LitServe, eager PyTorch", "litserve", False),
    ("Ray Serve, eager PyTorch", "ray", False),
    ("LitServe, the artifact", "litserve", True),
    ("Ray Serve, the artifact", "ray", True),
)
"""As it is called, the module's name, whether it runs the artifact."""


class Server:
    """One of them in processes of its own."""

    def __init__(self, peer: str | None, folder: Path | None) -> None:
        self.port = _free_port()
        if peer is None:
            command = ["-m", "corewise.cli", "serve", f"bench={folder}", "--http", f"127.0.0.1:{self.port}", "--trust"]
        else:
            command = [str(HERE / "peer_servers.py"), peer, "--port", str(self.port)]
            command += [] if folder is None else ["--artifact", str(folder)]
        self._process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, start_new_session=True)

    def wait(self, ready: Callable[[], bool]) -> float:
        """Until it answers; the seconds."""
        start_s = time.monotonic()
        while time.monotonic() < start_s + START_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"it ended with {self._process.returncode}")
            try:
                if ready():
                    return time.monotonic() - start_s
            except OSError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"it did not answer in {START_S:g} s")

    def stop(self) -> None:
        """End it with all its processes."""
        family = _descendants(self._process.pid)
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        time.sleep(3)


def held(wire: Wire, capacity_per_s: float, seconds: float) -> tuple[float, list[dict[str, Any]]]:
    """The highest rate at which enough was right in time, and each load."""
    low, high, loads = 0.0, capacity_per_s, []
    for _ in range(HALVINGS):
        rate = (low + high) / 2 if loads else 0.9 * capacity_per_s
        found = wire.open(rate, seconds)
        good = found.in_time - found.wrong >= GOOD_SHARE * found.offered
        loads.append({"rate_per_s": rate, "good": good, **found.facts()})
        low, high = (rate, high) if good else (low, rate)
        if good and rate >= 0.9 * capacity_per_s:
            break
    return low, loads


def measure(
    peer: str | None, folder: Path | None, rows: list[np.ndarray], expected: list[np.ndarray], options: Any
) -> dict[str, Any]:
    """One server under all its loads."""
    server = Server(peer, folder)
    try:
        if peer is None:
            name = artifact.read(options.artifact).manifest.inputs[0].name
            limit_ms = options.slo_ms
            sent = [request("bench", name, row, limit_ms) for row in rows]
            plain = [request("bench", name, row) for row in rows]
        elif peer == "litserve":
            bodies = [json.dumps({"tensor": base64.b64encode(row.tobytes()).decode()}).encode() for row in rows]
            plain = sent = [post("/predict", body, "content-type: application/json\r\n") for body in bodies]
        else:
            plain = sent = [post("/predict", row.tobytes()) for row in rows]
        read = from_base64 if peer == "litserve" else from_raw

        def load(requests: list[bytes], run: Callable[[Wire], Load], slo_ms: float | None = None) -> Load:
            return run(Wire(server.port, requests, expected, slo_ms, read))

        ready_s = server.wait(lambda: load(plain, lambda wire: wire.closed(1, 0.2)).answered > 0)
        load(plain, lambda wire: wire.closed(CLIENTS, 3.0))
        capacity = load(plain, lambda wire: wire.closed(CLIENTS, options.seconds))
        wire = Wire(server.port, sent, expected, options.slo_ms, read)
        rate, loads = held(wire, capacity.answered / capacity.seconds, options.seconds)
    finally:
        server.stop()
    return {"ready_s": ready_s, "closed_loop": capacity.facts(), "held_per_s": rate, "loads": loads}


def _descendants(pid: int) -> list[int]:
    """The process and all that came from it and live."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    """Load each server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--slo-ms", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    inputs, outputs = artifact.read(options.artifact).golden()
    rows = [np.ascontiguousarray(row)[None] for row in inputs[0]]
    eager = Model(None)
    own = {True: [row.reshape(-1) for row in outputs[0]], False: [eager.run(row).reshape(-1) for row in rows]}
    result: dict[str, Any] = {"slo_ms": options.slo_ms, "cpu": to_json(inspect()), "versions": {}, "servers": {}}
    print(f"{'':28s} {'closed loop':>12s} {f'at p99 {options.slo_ms:g} ms':>16s}")
    for name, peer, packed in SERVERS:
        if peer is not None and importlib.util.find_spec(PACKAGES[peer]) is None:
            result["servers"][name] = {"left_out": f"{PACKAGES[peer]} is not installed"}
            print(f"{name:28s} not installed")
            continue
        if peer is not None:
            result["versions"][peer] = version(PACKAGES[peer])
        folder = options.artifact.resolve() if packed else None
        try:
            found = measure(peer, folder, rows, own[packed], options)
        except (RuntimeError, OSError) as error:
            result["servers"][name] = {"left_out": str(error)}
            print(f"{name:28s} {error}")
            continue
        result["servers"][name] = found
        print(f"{name:28s} {found['closed_loop']['answered_per_s']:10.1f}/s {found['held_per_s']:14.1f}/s", flush=True)
    path = HERE / "results" / "peers.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
