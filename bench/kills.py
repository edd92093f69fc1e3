"""Kills of the engine process and of the server under load.

    python -m bench kills ARTIFACT [--kills 20] [--clients 8]

The engine is killed (SIGKILL) and stopped (SIGSTOP) in turn, and every fifth time the server itself is killed and
started again, as a supervisor would. No answer may be wrong or another request's; lost may be only what the killed
process had. Writes kills_NAME.json.
"""

import argparse
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from bench.harness import machine_facts, say, write_results
from bench.servers import Server, descendants, golden_rows
from bench.wire import Load, Wire, request
from corewise import artifact

BEFORE_S, RECOVERED_S, LEFT_S = (0.3, 1.0), 60.0, 5.0


def is_ready(port: int) -> bool:
    """Whether the server says so."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def engine_pids(server: Server) -> list[int]:
    """The processes of its model."""
    _, *others = descendants(server.process.pid)
    return [pid for pid in others if b"corewise.serving.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def strike(server: Server, wire: Wire, number: int, pause_s: float, clients: int) -> dict[str, Any]:
    """Kill or stop something under load; what became of the load, and how long it took until all was ready again."""
    found: dict[str, Any] = {}

    def hit() -> None:
        time.sleep(pause_s)
        start_s = time.monotonic()
        for pid in engine_pids(server):
            os.kill(pid, number)
        while is_ready(server.port) and time.monotonic() < start_s + RECOVERED_S:
            time.sleep(0.02)
        found["noticed_s"] = time.monotonic() - start_s
        while not is_ready(server.port) and time.monotonic() < start_s + RECOVERED_S:
            time.sleep(0.02)
        found["recovered_s"] = time.monotonic() - start_s

    hitting = threading.Thread(target=hit)
    hitting.start()
    loads: list[Load] = []
    while hitting.is_alive():
        loads.append(wire.closed(clients, 1.0))
    loads.append(wire.closed(clients, 0.5))
    counts = ("answered", "refused", "dropped", "failed", "wrong")
    return {**found, **{name: sum(getattr(load, name) for load in loads) for name in counts}}


def kill_server(server: Server, wire: Wire, pause_s: float, clients: int) -> dict[str, Any]:
    """Kill the server under load; none of its processes may stay."""
    family = descendants(server.process.pid)
    threading.Timer(pause_s, server.process.kill).start()
    wrong = answered = 0
    try:
        while server.process.poll() is None:
            load = wire.closed(clients, 0.5)
            answered, wrong = answered + load.answered, wrong + load.wrong
    except OSError:  # nobody listens any more
        pass
    server.process.wait()
    start_s = time.monotonic()
    while (left := sum(map(runs, family))) and time.monotonic() < start_s + LEFT_S:
        time.sleep(0.02)
    return {"answered": answered, "wrong": wrong, "left": left, "left_s": time.monotonic() - start_s}


def runs(pid: int) -> bool:
    """Whether the process is there and is more than an entry that nobody has read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> None:
    """Kill what there is, again and again."""
    sound = artifact.read(options.artifact)
    name, rows, expected = golden_rows(sound)
    pauses, strikes = random.Random(options.seed), []
    server = Server(options.artifact)
    try:
        for k in range(options.kills):
            wire = Wire(server.port, [request(name, row) for row in rows], expected, None)
            pause_s = pauses.uniform(*BEFORE_S)
            if k % 5 == 4:
                found = {"what": "server killed", **kill_server(server, wire, pause_s, options.clients)}
                server = Server(options.artifact)
            else:
                number = (signal.SIGKILL, signal.SIGSTOP)[k % 2]
                found = {"what": f"engine {number.name}", **strike(server, wire, number, pause_s, options.clients)}
            strikes.append(found)
            say(str(found))
    finally:
        server.process.terminate()
        server.process.wait(60)
    path = options.results / f"kills_{options.artifact.name.removesuffix('.cw')}.json"
    write_results(path, {"artifact": sound.manifest.model, "strikes": strikes, **machine_facts()})
