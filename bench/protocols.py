"""A small model over HTTP and over gRPC, beside the same plan in process: what is left of its throughput.

    python -m bench protocols ARTIFACT [--clients 16] [--rounds 5] [--seconds 4]

ARTIFACT has one float32 input. In each round the model runs in process (``Worker.run_round``), then closed loops of
``--clients`` send one golden row a request over HTTP with binary tensors, and over gRPC. The client, one thread that
sends prepared bytes, shares the cores with the server; how many of them each took is recorded. Each answer is compared
with its own input's. Writes protocols_NAME.json.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import alternate, machine_facts, say, starter, temporary_workspace, write_results
from bench.overload import cpu_s
from bench.servers import Server, golden_rows
from bench.wire import Wire, request
from bench.wire_grpc import GrpcConnection, message
from corewise import artifact
from corewise.artifact import tuned
from corewise.artifact.open import golden_samples
from corewise.machine.inspect import inspect_cpu

WARM_S = 2.0


class Loads:
    """Closed loops against a server, and what they cost."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self._server, self._options = server, options
        self.cores: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.failed = self.wrong = 0

    def per_s(self, name: str, wire: Wire) -> Callable[[], float]:
        """What runs one."""

        def run() -> float:
            before_s, start_s = cpu_s(self._server.process.pid), time.monotonic()
            load = wire.closed(self._options.clients, self._options.seconds)
            took_s = time.monotonic() - start_s
            used_s = cpu_s(self._server.process.pid)
            self.cores[name].append({each: (used_s[each] - before_s[each]) / took_s for each in used_s})
            self.failed += load.failed + load.refused + load.dropped
            self.wrong += load.wrong
            return load.answered / load.seconds

        return run


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    cpu = inspect_cpu()
    sound = artifact.read(folder, cpu=cpu)
    plan, build = tuned.fit(sound, cpu).plan, sound.manifest.build
    name, rows, expected = golden_rows(sound)
    with Server(folder, "--grpc", "127.0.0.1:0") as server, temporary_workspace() as workspace:
        http = Wire(server.port, [request(name, row) for row in rows], expected, None)
        messages = [message(name, row) for row in rows]
        rpc = Wire(server.ports["grpc"], messages, expected, None, make=GrpcConnection)
        golden_samples(sound).save(workspace.holdout)
        with starter(workspace, cpu)(build) as worker:
            worker.open((sound.folder / artifact.PAYLOAD).resolve(), build, plan)
            worker.warm_up(workspace.holdout, plan.batch, WARM_S)
            for wire in (http, rpc):
                wire.closed(options.clients, WARM_S)
            loads = Loads(server, options)
            per_s = alternate(
                options.rounds,
                {
                    "in process": lambda: worker.run_round(options.seconds).per_s,
                    "http": loads.per_s("http", http),
                    "grpc": loads.per_s("grpc", rpc),
                },
            )
    in_process = median(per_s["in process"])
    return {
        "artifact": sound.manifest.model,
        "build": build.label,
        "plan": plan.label,
        "clients": options.clients,
        **machine_facts(),
        "per_s": per_s,
        "of_in_process": {side: median(per_s[side]) / in_process for side in ("http", "grpc")},
        "cores_used": loads.cores,
        "failed": loads.failed,
        "wrong": loads.wrong,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")


def main(options: argparse.Namespace) -> None:
    """Measure the artifact."""
    found = measure(options.artifact, options)
    for side, rates in found["per_s"].items():
        of_it = found["of_in_process"].get(side)
        used = found["cores_used"].get(side, [{}])[-1]
        cores = ", ".join(f"{name} {cores:.2f}" for name, cores in used.items())
        say(f"{side:10s} {median(rates):8.0f}/s" + (f" {of_it:6.1%} of in process; cores: {cores}" if of_it else ""))
    say(f"failed {found['failed']}, wrong {found['wrong']}")
    write_results(options.results / f"protocols_{options.artifact.name.removesuffix('.cw')}.json", found)
