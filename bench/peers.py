"""Requests per second at one p99: corewise beside FastAPI, LitServe and Ray Serve, on one machine in one run.

    python -m bench peers ARTIFACT [--slo-ms 500] [--seconds 15]

ARTIFACT is ResNet-50. Each server is loaded in turn by the same client on the same cores: a closed loop of 16 for its
capacity, then requests at random times (a Poisson process) at rates in steps of a sixteenth of that (bisection), for
the highest at which all answers were right and at least 99 % of the requests were answered within ``--slo-ms``.
LitServe and Ray Serve run eager PyTorch, and once more the artifact. Servers that are not installed (``pip install
litserve 'ray[serve]'``) are left out with the reason. Writes peers.json.
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
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import ROOT, machine_facts, say, versions, write_results
from bench.peer_servers import Model
from bench.servers import START_S, descendants, golden_rows, serve_command
from bench.wire import Load, Wire, from_base64, from_raw, post, request
from corewise import artifact
from corewise.records.measurement import SERVED

CLIENTS = 16
HALVINGS = 4
REQUESTS, LONGEST_S = 200, 40.0
"""A load has at least ``REQUESTS``, or lasts ``LONGEST_S``: a p99 of fewer is chance."""
SERVERS = (
    ("corewise", None, True),
    ("FastAPI, eager PyTorch", "fastapi", False),
    ("LitServe, eager PyTorch", "litserve", False),
    ("Ray Serve, eager PyTorch", "ray", False),
    ("LitServe, the artifact", "litserve", True),
    ("Ray Serve, the artifact", "ray", True),
)
"""Name, package (``None`` for corewise itself), and whether it runs the artifact."""


class Peer:
    """One of the servers, in processes of its own."""

    def __init__(self, package: str | None, folder: Path | None, python: str = sys.executable) -> None:
        """``python`` runs peers that are installed elsewhere (``python_with``)."""
        self.port = free_port()
        if package is None:
            assert folder is not None
            command = serve_command(folder, self.port)
        else:
            module = ["bench.peer_litserve"] if package == "litserve" else ["bench.peer_servers", package]
            command = [python, "-m", *module, "--port", str(self.port)]
            command += [] if folder is None else ["--artifact", str(folder)]
        # Ray's workers and LitServe's import this package by it.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def wait(self, ready: Callable[[], bool]) -> float:
        """Until it answers; the seconds."""
        start_s = time.monotonic()
        while time.monotonic() < start_s + START_S:
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}")
            try:
                if ready():
                    return time.monotonic() - start_s
            except OSError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"it did not answer in {START_S:g} s")

    def stop(self) -> None:
        """End it with all its processes."""
        family = descendants(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        time.sleep(3)


def find_held_rate(wire: Wire, capacity_per_s: float, seconds: float) -> tuple[float, list[dict[str, Any]]]:
    """The highest rate of those tried at which enough was right in time, and each load."""
    low, high, loads = 0.0, capacity_per_s, []
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        load = wire.open(rate, min(LONGEST_S, max(seconds, REQUESTS / rate)))
        good = not load.wrong and load.in_time >= SERVED * load.offered
        loads.append({"rate_per_s": rate, "good": good, **load.facts()})
        low, high = (rate, high) if good else (low, rate)
    return low, loads


def requests_for(package: str | None, name: str, rows: list[np.ndarray], slo_ms: float) -> tuple[list[bytes], ...]:
    """The rows as requests of that server, without a deadline and, for corewise, with one."""
    if package is None:
        return [request(name, row) for row in rows], [request(name, row, slo_ms) for row in rows]
    if package == "litserve":
        bodies = [json.dumps({"tensor": base64.b64encode(row.tobytes()).decode()}).encode() for row in rows]
        sent = [post("/predict", body, "content-type: application/json\r\n") for body in bodies]
    else:
        sent = [post("/predict", row.tobytes()) for row in rows]
    return sent, sent


def measure(
    package: str | None,
    folder: Path | None,
    requests: tuple[list[bytes], ...],
    expected: list[np.ndarray],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One server under all its loads."""
    plain, urgent = requests
    read = from_base64 if package == "litserve" else from_raw
    server = Peer(package, folder)

    def load(run: Callable[[Wire], Load]) -> Load:
        with closing(Wire(server.port, plain, expected, None, read)) as wire:
            return run(wire)

    try:
        ready_s = server.wait(lambda: load(lambda wire: wire.closed(1, 0.2)).answered > 0)
        load(lambda wire: wire.closed(CLIENTS, 3.0))
        capacity = load(lambda wire: wire.closed(CLIENTS, options.seconds))
        with closing(Wire(server.port, urgent, expected, options.slo_ms, read)) as wire:
            rate_per_s, loads = find_held_rate(wire, capacity.answered / capacity.seconds, options.seconds)
    finally:
        server.stop()
    return {"ready_s": ready_s, "closed_loop": capacity.facts(), "held_per_s": rate_per_s, "loads": loads}


def python_with(package: str, place: Path) -> str:
    """The Python of an environment in ``place`` that has a package and all that this one has; made if it is not there.

    Raises ``RuntimeError`` if the package does not install.
    """
    python, whole = place / "bin" / "python", place / ".complete"
    if not whole.exists():
        say(f"making the environment {place} for {package}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
        (site,) = place.glob("lib/python*/site-packages")
        (site / "here.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), package]
        ended = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ended.returncode:
            raise RuntimeError(f"{package} does not install: {ended.stdout.strip().splitlines()[-1]}")
        whole.touch()
    return str(python)


def version_in(place: Path, package: str) -> str:
    """The version of a package in such an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([str(place / "bin" / "python"), "-c", code], text=True).strip()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="ResNet-50")
    parser.add_argument("--slo-ms", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load, at least")


def main(options: argparse.Namespace) -> None:
    """Load each server."""
    name, rows, golden = golden_rows(artifact.read(options.artifact))
    eager = Model(None)
    expected = {True: golden, False: [eager.run(row).reshape(-1) for row in rows]}
    servers: dict[str, Any] = {}
    facts = machine_facts()
    facts["versions"] |= versions(sorted({package for _, package, _ in SERVERS if package}))
    say(f"{'':28s} {'closed loop':>12s} {f'at p99 {options.slo_ms:g} ms':>16s}")
    for label, package, packed in SERVERS:
        folder = options.artifact.resolve() if packed else None
        requests = requests_for(package, name, rows, options.slo_ms)
        try:
            if package is not None and importlib.util.find_spec(package) is None:
                raise RuntimeError(f"{package} is not installed")
            record = measure(package, folder, requests, expected[packed], options)
        except (RuntimeError, OSError, ValueError) as error:
            servers[label] = {"left_out": str(error)}
            say(f"{label:28s} {error}")
        else:
            servers[label] = record
            capacity_per_s = record["closed_loop"]["answered_per_s"]
            say(f"{label:28s} {capacity_per_s:10.1f}/s {record['held_per_s']:14.1f}/s")
        write_results(options.results / "peers.json", {"slo_ms": options.slo_ms, **facts, "servers": servers})
