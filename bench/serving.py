"""What serving costs, whether the promised rate is held on the wire, and what an overload does.

    python -m bench serving ARTIFACT [--rate R --slo-ms 100] [--seconds 60]

ARTIFACT has one image input (``corewise optimize examples/resnet50.py:build ... --slo-ms 100``); rate and SLO are by
default what it promises. Client and server share the cores of one machine in one run:

- throughput: a closed loop that always has two full calls waiting, alternating with the same plan in process (rounds);
- latency: one client, one row, alternating with the session's own p50;
- the promised rate for ``--seconds``, then three times that, then three times what the closed loop did (which under a
  short SLO is far more than can be promised). Each answer is compared with its own input's.

Writes serving_NAME.json.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import alternate, machine_facts, say, starter, temporary_workspace, write_results
from bench.servers import Server, golden_rows
from bench.wire import Wire, request
from corewise import artifact
from corewise.artifact import Artifact, tuned
from corewise.artifact.open import golden_samples
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan
from corewise.records.cpu import Cpu

ROUNDS, ROUND_S, LATENCY_S, WARM_S = 5, 8.0, 2.0, 1.0
OVERLOAD = 3
Rounds = dict[str, list[float]]


def compare_in_process(sound: Artifact, plan: Plan, cpu: Cpu, wire: Wire) -> tuple[Rounds, Rounds]:
    """Throughput per second, and latency in milliseconds, in process and served, in alternating rounds."""
    clients = 2 * plan.batch * plan.instances
    single, payload = replace(plan, batch=1), (sound.folder / artifact.PAYLOAD).resolve()
    build = sound.manifest.build
    with temporary_workspace() as workspace:
        golden_samples(sound).save(workspace.holdout)
        with starter(workspace, cpu)(build) as worker:
            worker.open(payload, build, plan)
            worker.warm_up(workspace.holdout, plan.batch, WARM_S)
            wire.closed(clients, 2 * WARM_S)

            def served_per_s() -> float:
                load = wire.closed(clients, ROUND_S)
                return load.answered / load.seconds

            throughput = alternate(
                ROUNDS, {"in process": lambda: worker.run_round(ROUND_S).per_s, "served": served_per_s}
            )
            worker.warm_up(workspace.holdout, 1, WARM_S)
            latency = alternate(
                ROUNDS,
                {
                    "in process": lambda: worker.measure(workspace.holdout, single, LATENCY_S).p50_ms,
                    "served": lambda: wire.closed(1, LATENCY_S).facts()["p50_ms"],
                },
            )
    return throughput, latency


def measure(folder: Path, rate_per_s: float, slo_ms: float, seconds: float) -> dict[str, Any]:
    """Every load, beside the same plan in process."""
    cpu = inspect_cpu()
    sound = artifact.read(folder, cpu=cpu)
    plan = tuned.fit(sound, cpu).plan
    name, rows, expected = golden_rows(sound)
    with Server(folder) as server:
        plain = Wire(server.port, [request(name, row) for row in rows], expected, None)
        throughput, latency = compare_in_process(sound, plan, cpu, plain)
        capacity_per_s = median(throughput["served"])
        urgent = Wire(server.port, [request(name, row, slo_ms) for row in rows], expected, slo_ms)
        memory_before = server.memory_bytes()
        promised = urgent.open(rate_per_s, seconds).facts()
        overload = urgent.open(OVERLOAD * rate_per_s, seconds).facts()
        flood = urgent.open(OVERLOAD * capacity_per_s, seconds).facts()
        memory_after = server.memory_bytes()
    return {
        "artifact": sound.manifest.model,
        "plan": plan.label,
        "build": sound.manifest.build.label,
        **machine_facts(),
        "ready_s": server.ready_s,
        "throughput_per_s": throughput,
        "served_of_in_process": capacity_per_s / median(throughput["in process"]),
        "latency_ms": latency,
        "served_adds_ms": median(latency["served"]) - median(latency["in process"]),
        "slo_ms": slo_ms,
        "rate_per_s": rate_per_s,
        "promised": promised,
        "overload": overload,
        "flood": flood,
        "flood_goodput_of_capacity": flood["goodput_per_s"] / capacity_per_s,
        "overload_goodput_of_capacity": overload["goodput_per_s"] / capacity_per_s,
        "memory_bytes": [memory_before, memory_after],
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--rate", type=float, help="requests per second (default: what the artifact promises)")
    parser.add_argument("--slo-ms", type=float, help="default: that of the promise")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")


def main(options: argparse.Namespace) -> None:
    """Measure the artifact."""
    certified = artifact.read(options.artifact).report.choice.certified
    rate_per_s = options.rate or (certified.rate_per_s if certified else None)
    slo_ms = options.slo_ms or (certified.slo_ms if certified else None)
    if not rate_per_s or not slo_ms:
        sys.exit("the artifact promises nothing: give --rate and --slo-ms")
    result = measure(options.artifact, rate_per_s, slo_ms, options.seconds)
    write_results(options.results / f"serving_{options.artifact.name.removesuffix('.cw')}.json", result)
    promised = result["promised"]
    say(f"{result['build']}, {result['plan']}; ready in {result['ready_s']:.2f} s")
    say(f"  throughput served: {result['served_of_in_process']:.1%} of in process")
    say(f"  latency served: {result['served_adds_ms']:+.2f} ms")
    say(f"  {rate_per_s:.1f}/s promised: p99 {promised['p99_ms']:.1f} ms")
    say(f"    {promised['refused']} refused, {promised['wrong']} wrong")
    for base, name in (("that", "overload"), ("capacity", "flood")):
        load = result[name]
        say(f"  at {OVERLOAD}x {base}: {result[f'{name}_goodput_of_capacity']:.1%} of capacity in time")
        say(
            f"    refusals within {load['refusal_p99_ms'] or 0:.1f} ms (p99), "
            f"{load['wrong']} wrong, {load['failed']} failed"
        )
