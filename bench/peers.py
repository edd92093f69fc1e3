"""Requests per second at one p99: corewise beside FastAPI, LitServe and Ray Serve, on one machine in one run.

    python bench/peers.py ARTIFACT [--slo-ms 500] [--seconds 15]

ARTIFACT is ResNet-50. Each server is loaded in turn by the same client on the same cores: a closed loop of 16 for its
capacity, then requests at random times (a Poisson process) at rates in steps of a sixteenth of that (bisection), for
the highest at which all answers were right and at least 99 % of the requests were answered within ``--slo-ms``.
LitServe and Ray Serve run eager PyTorch, and once more the artifact. Servers that are not installed (``pip install
litserve 'ray[serve]'``) are left out with the reason. Writes bench/results/peers.json.
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
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_servers import Model  # noqa: E402
from wire import Load, Wire, from_base64, from_raw, post, request  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.records.measurement import SERVED  # noqa: E402

CLIENTS = 16
HALVINGS = 4
REQUESTS, LONGEST_S = 200, 40.0
"""A load has at least so many requests, or is so long: a p99 of fewer is chance."""
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
            script = ["peer_litserve.py"] if peer == "litserve" else ["peer_servers.py", peer]
            command = [str(HERE / script[0]), *script[1:], "--port", str(self.port)]
            command += [] if folder is None else ["--artifact", str(folder)]
        # Ray's workers find the model by it.
        paths = [str(HERE.parent / "examples"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

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
    """The highest rate of those tried at which enough was right in time, and each load."""
    low, high, loads = 0.0, capacity_per_s, []
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        found = wire.open(rate, min(LONGEST_S, max(seconds, REQUESTS / rate)))
        good = not found.wrong and found.in_time >= SERVED * found.offered
        loads.append({"rate_per_s": rate, "good": good, **found.facts()})
        low, high = (rate, high) if good else (low, rate)
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

        def load(requests: list[bytes], run: Callable[[Wire], Load]) -> Load:
            with closing(Wire(server.port, requests, expected, None, read)) as wire:
                return run(wire)

        ready_s = server.wait(lambda: load(plain, lambda wire: wire.closed(1, 0.2)).answered > 0)
        load(plain, lambda wire: wire.closed(CLIENTS, 3.0))
        capacity = load(plain, lambda wire: wire.closed(CLIENTS, options.seconds))
        with closing(Wire(server.port, sent, expected, options.slo_ms, read)) as wire:
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
    result: dict[str, Any] = {"slo_ms": options.slo_ms, "cpu": to_json(inspect_cpu()), "versions": {}, "servers": {}}
    path = HERE / "results" / "peers.json"
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
        except (RuntimeError, OSError, ValueError) as error:
            result["servers"][name] = {"left_out": str(error)}
            print(f"{name:28s} {error}")
            continue
        result["servers"][name] = found
        print(f"{name:28s} {found['closed_loop']['answered_per_s']:10.1f}/s {found['held_per_s']:14.1f}/s", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
