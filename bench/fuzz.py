"""Twenty thousand malformed requests over HTTP and gRPC beside a healthy client.

    python -m bench fuzz ARTIFACT [--requests 20000] [--seed 0]

No answer may be an error of the server's own, none may take ten seconds, the memory has to come back to within 50 MB,
and the healthy client must not notice. Writes fuzz_NAME.json.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from bench.fuzzing import Model, Outcomes, Sender, bodies, messages, spoiled
from bench.harness import machine_facts, say, write_results
from bench.healthy import Healthy
from bench.servers import Server, golden_rows
from bench.wire import MODEL, request
from corewise import artifact

ALONE_S = 3.0
AFTER_S = 4.0
WARM_UP = 200
"""Requests before the memory counts."""


def drive(send: Callable[[Any], None], strategy: SearchStrategy[Any], count: int, first: int) -> None:
    """Send ``count`` examples of a strategy."""

    @seed(first)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def sent(example: Any) -> None:
        send(example)

    sent()


def fuzz(model: Model, http_port: int, grpc_target: str, count: int, first: int) -> Outcomes:
    """Send ``count`` requests: half over HTTP, some of which are none, and half over gRPC."""
    outcomes = Outcomes()
    sender = Sender(http_port, grpc_target, outcomes)
    try:
        drive(sender.over_http, bodies(model), count * 4 // 10, first)
        drive(sender.over_wire, spoiled(request(model.input, model.row)), count // 10, first)
        drive(sender.over_grpc, messages(model), count - count // 2, first)
    finally:
        sender.close()
    return outcomes


def run(server: Server, folder: Path, count: int, first: int) -> dict[str, Any]:
    """Fuzz a server beside a healthy client, after that client was alone."""
    name, rows, _ = golden_rows(artifact.read(folder))
    model = Model(name=MODEL, input=name, row=rows[0])
    target = f"127.0.0.1:{server.ports['grpc']}"
    fuzz(model, server.port, target, WARM_UP, first + 1)
    alone = Healthy(server.port, folder)
    time.sleep(ALONE_S)
    before_it = alone.facts()
    before_bytes = server.memory_bytes()
    beside, start_s = Healthy(server.port, folder), time.monotonic()
    outcomes = fuzz(model, server.port, target, count, first)
    seconds, beside_it = time.monotonic() - start_s, beside.facts()
    time.sleep(AFTER_S)
    return {
        "requests": count,
        "seconds": seconds,
        "became": {kind: dict(counts) for kind, counts in outcomes.counts.items()},
        "broken": outcomes.broken[:20],
        "memory_bytes": {"before": before_bytes, "after": server.memory_bytes()},
        "healthy": {"alone": before_it, "beside": beside_it},
        "alive": server.process.poll() is None,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> None:
    """Fuzz a server of the artifact."""
    with Server(options.artifact, "--grpc", "127.0.0.1:0") as server:
        found = run(server, options.artifact, options.requests, options.seed)
    for line in found["broken"]:
        say(line)
    mb = {key: round(value / 1e6, 1) for key, value in found["memory_bytes"].items()}
    say(f"{found['became']}; MB {mb}; healthy {found['healthy']}")
    name = options.artifact.name.removesuffix(".cw")
    write_results(options.results / f"fuzz_{name}.json", {**found, **machine_facts()})
