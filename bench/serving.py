"""What serving costs, whether a promise is held on the wire, and what an overload does.

    python bench/serving.py ARTIFACT [--rate R --slo-ms 100] [--seconds 60]

ARTIFACT has one image input (``corewise optimize examples/resnet50.py:build ... --slo-ms 100``); rate and SLO are by
default what it promises. In one run on one machine, client and server sharing its cores:

- throughput: a closed loop that always has two full calls waiting, alternating with the same plan in process (rounds);
- latency: one client, one row, alternating with the session's own p50;
- the promised rate for ``--seconds``, then three times that, then three times what the closed loop did (which under a
  short SLO is far more than can be promised), each answer compared with its own input's.

Writes bench/results/serving_NAME.json.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import starter  # noqa: E402
from wire import Wire, request  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.artifact import tuned  # noqa: E402
from corewise.artifact.open import golden_samples  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.worker import HOLDOUT  # noqa: E402

ROUNDS, ROUND_S = 5, 8.0
OVERLOAD = 3


class Server:
    """``corewise serve`` in a process of its own, ready."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "corewise.cli", "serve", f"bench={folder}", "--http", "127.0.0.1:0", "--trust"]
        started_s = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        stream = self.process.stdout
        threading.Thread(target=lambda: [lines.put(line) for line in stream], daemon=True).start()
        self.port = int(lines.get(timeout=60).rsplit(" ", 1)[1])
        while not lines.get(timeout=120).startswith("ready:"):
            pass
        self.ready_s = time.monotonic() - started_s

    def memory_bytes(self) -> int:
        """Resident, of the server and its engine process."""
        pids = [self.process.pid]
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(path.read_text().rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    pids.append(int(path.parent.name))
            except OSError:
                continue
        sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
        return sum(int(text.split("Pss:")[1].split()[0]) * 1024 for text in sizes)


def run(folder: Path, rate_per_s: float, slo_ms: float, seconds: float) -> dict[str, Any]:
    """All of it."""
    cpu = inspect_cpu()
    found = artifact.read(folder, cpu=cpu)
    plan, build = tuned.fit(found, cpu).plan, found.manifest.build
    inputs, outputs = found.golden()
    rows = [np.ascontiguousarray(inputs[0][k : k + 1]) for k in range(len(inputs[0]))]
    expected = [outputs[0][k].reshape(-1) for k in range(len(rows))]
    name = found.manifest.inputs[0].name
    server = Server(folder.resolve())
    try:
        plain = [request("bench", name, row) for row in rows]
        urgent = [request("bench", name, row, slo_ms) for row in rows]
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            golden_samples(found).save(work / HOLDOUT)
            about = {"folder": str((folder / artifact.PAYLOAD).resolve()), "build": to_json(build)}
            with starter(work)(build) as worker:
                clients = 2 * plan.batch * plan.instances
                wire = Wire(server.port, plain, expected, None)
                throughput: dict[str, list[float]] = {"in process": [], "served": []}
                worker.call("open", "opening", plan=to_json(plan), **about)
                worker.call("enter_race", "warming", samples=str(work / HOLDOUT), batch=plan.batch, budget_s=1.0)
                wire.closed(clients, 2.0)
                for _ in range(ROUNDS):
                    throughput["in process"].append(worker.call("round", "running", budget_s=ROUND_S)["per_s"])
                    load = wire.closed(clients, ROUND_S)
                    throughput["served"].append(load.answered / load.seconds)
                latency: dict[str, list[float]] = {"in process": [], "served": []}
                worker.call("enter_race", "warming", samples=str(work / HOLDOUT), batch=1, budget_s=1.0)
                one = {"samples": str(work / HOLDOUT), "plan": {**to_json(plan), "batch": 1}}
                for _ in range(ROUNDS):
                    answer = worker.call("measure", "running", budget_s=2.0, **one)
                    latency["in process"].append(answer["measurement"]["p50_ms"])
                    latency["served"].append(wire.closed(1, 2.0).facts()["p50_ms"])
        wire = Wire(server.port, urgent, expected, slo_ms)
        before = server.memory_bytes()
        kept = wire.open(rate_per_s, seconds).facts()
        over = wire.open(OVERLOAD * rate_per_s, seconds).facts()
        flood = wire.open(OVERLOAD * median(throughput["served"]), seconds).facts()
        after = server.memory_bytes()
    finally:
        server.process.terminate()
        server.process.wait(60)
    return {
        "artifact": found.manifest.model,
        "plan": plan.label,
        "build": build.label,
        "cpu": to_json(cpu),
        "ready_s": server.ready_s,
        "throughput_per_s": throughput,
        "served_of_in_process": median(throughput["served"]) / median(throughput["in process"]),
        "latency_ms": latency,
        "served_adds_ms": median(latency["served"]) - median(latency["in process"]),
        "slo_ms": slo_ms,
        "rate_per_s": rate_per_s,
        "promised": kept,
        "overload": over,
        "flood": flood,
        "flood_goodput_of_capacity": flood["goodput_per_s"] / median(throughput["served"]),
        "overload_goodput_of_capacity": over["goodput_per_s"] / median(throughput["served"]),
        "memory_bytes": [before, after],
    }


def main() -> None:
    """Run it on the artifact named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--slo-ms", type=float)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    promise = artifact.read(options.artifact).report.choice.promise
    rate_per_s = options.rate or (promise.rate_per_s if promise else None)
    slo_ms = options.slo_ms or (promise.slo_ms if promise else None)
    if not rate_per_s or not slo_ms:
        parser.error("the artifact promises nothing: give --rate and --slo-ms")
    result = run(options.artifact, rate_per_s, slo_ms, options.seconds)
    path = HERE / "results" / f"serving_{options.artifact.name.removesuffix('.cw')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    kept, over = result["promised"], result["overload"]
    print(f"{result['build']}, {result['plan']}; ready in {result['ready_s']:.2f} s ({os.cpu_count()} cores)")
    print(f"  throughput served: {result['served_of_in_process']:.1%} of in process")
    print(f"  latency served: {result['served_adds_ms']:+.2f} ms")
    print(
        f"  {rate_per_s:.1f}/s promised: p99 {kept['p99_ms']:.1f} ms, {kept['refused']} refused, {kept['wrong']} wrong"
    )
    for what, load in (("that", over), ("capacity", result["flood"])):
        share = load["goodput_per_s"] / median(result["throughput_per_s"]["served"])
        told = f"refusals within {load['refusal_p99_ms'] or 0:.1f} ms (p99)"
        told += f", {load['wrong']} wrong, {load['failed']} failed"
        print(f"  at {OVERLOAD}x {what}: {share:.1%} of capacity in time, {told}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
