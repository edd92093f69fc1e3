"""How a bulk job grows: rows and memory, nodes of a real Ray, and a simulation of a thousand nodes.

    python -m bench bulk_scale ARTIFACT INPUT [--nodes 1 2 4] [--rows 1000 10000 100000] [--no-simulation]

``predict`` on one Ray node of one CPU and on several such nodes, pinned to one core after the other (nodes beyond the
cores share them), with inputs of so many rows (INPUT's, again and again): rows/s between the first and the last rows
that are done, the driver's and the actors' largest memory, and what a start costs.

Then the real driver drives simulated nodes in virtual time: what the driver computes for a part takes as long as it
takes here, reading and packing a row and Ray's calls take what was measured here, and a node starts as one did
and answers as many rows/s, or as few as of a large model. ``knees`` says for each size of a part how many nodes the
driver keeps busy. Writes bulk_scale_NAME.json; jobs of other sizes stay in it, so that they can be made in pieces.
The simulation needs a job on one node, now or before; ``--nodes`` without numbers only simulates.
"""

import argparse
import heapq
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import machine_facts, read_results, say, write_results
from bench.servers import descendants
from corewise.cluster.crew import Node
from corewise.cluster.driving import Driver, parts_of_rows
from corewise.cluster.messages import Answered, Prepared, packed_rows
from corewise.machine.inspect import inspect_cpu
from corewise.pipeline.job import Job, folder_of, records
from corewise.pipeline.parts import Counts, Record
from corewise.records.build import Plan
from corewise.records.jsonable import to_json
from corewise.records.tuned import Machine, Tuned
from corewise.samples.texts import GUESSED

JOB = """
import json, resource, sys, time
import corewise
seen = []
def on_progress(progress):
    seen.append((time.monotonic(), progress.rows, progress.actors))
start = time.monotonic()
result = corewise.predict(*sys.argv[1:4], ray=sys.argv[4], retune_s=0, on_progress=on_progress)
done = [(at, rows) for at, rows, _ in seen if rows]
print(json.dumps({
    "wall_s": time.monotonic() - start,
    "ready_s": next(at for at, _, actors in seen if actors) - start,
    "first_part_s": done[0][0] - start,
    "per_s": (done[-1][1] - done[0][1]) / (done[-1][0] - done[0][0]) if len(done) > 1 else None,
    "rows": result.rows, "nodes": len(result.nodes),
    "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""
CALLS, PLAN = 2000, Plan(threads_per_instance=1)
LARGE_PER_S = 100.0
NODES = (1, 4, 16, 64, 256, 1000)
PART_ROWS = (64, 256, 1024, 4096, 16384)
BUSY = 0.9
PARTS_EACH = 12
"""Parts that each simulated node gets."""
SIZES = (1_000, 100_000, 1_000_000, 4_000_000)
"""Of calls that are measured, in bytes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--no-simulation", action="store_true")


@contextmanager
def cluster(nodes: int, log: Path) -> Iterator[tuple[str, list[int]]]:
    """So many Ray nodes of one CPU each, on cores in turn; the address, and the processes that bring them."""
    cores = sorted(os.sched_getaffinity(0))
    tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= tokens
    with socket.create_server(("127.0.0.1", 0)) as free:
        port, ray = free.getsockname()[1], str(Path(sys.executable).with_name("ray"))
    shared = ["--num-cpus=1", f"--object-store-memory={2**28}", "--disable-usage-stats", "--block"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(nodes):
            place = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
            if number:
                place = [f"--address=127.0.0.1:{port}"]
            with log.open("a") as file:
                pinned = ["taskset", "-c", str(cores[number % len(cores)]), ray, "start", *place, *shared]
                started.append(subprocess.Popen(pinned, stdout=file, stderr=subprocess.STDOUT))
            until = time.monotonic() + 90
            while log.read_text().count("Ray runtime started") <= number and time.monotonic() < until:
                time.sleep(0.1)
                if started[-1].poll() is not None:
                    raise SystemExit(log.read_text())
        yield f"127.0.0.1:{port}", [process.pid for process in started]
    finally:
        family = [pid for process in started for pid in descendants(process.pid)]
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(60)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


class Watch(threading.Thread):
    """The largest memory of an actor."""

    def __init__(self, heads: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._heads, self._over = heads, threading.Event()
        self.actor_mb = 0.0

    def run(self) -> None:
        while not self._over.wait(0.5):
            for pid in (pid for head in self._heads for pid in descendants(head)):
                with suppress(OSError, IndexError, StopIteration):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Answerer"):
                        status = Path(f"/proc/{pid}/status").read_text().splitlines()
                        rss = next(line for line in status if line.startswith("VmRSS"))
                        self.actor_mb = max(self.actor_mb, int(rss.split()[1]) / 1024)

    def stop(self) -> None:
        self._over.set()
        self.join()


def measure(artifact: Path, source: Path, address: str, heads: list[int], output: Path) -> dict[str, Any]:
    """One job, in a process of its own."""
    watch = Watch(heads)
    watch.start()
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(artifact), str(source), str(output), address],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    watch.stop()
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return {**json.loads(done.stdout.splitlines()[-1]), "actor_mb": watch.actor_mb}


def ray_costs(address: str) -> dict[str, Any]:
    """Seconds that Ray takes in the driver: to submit a call by its bytes, and to wait by the number of calls."""
    import ray

    from corewise.cluster.crew import RayCrew

    @ray.remote(num_cpus=0)
    class Idle:
        def answer(self, number: int, rows: str) -> str:
            return '{"value": {"rows": 1024, "failed": 0, "example": ""}}'

        def never(self) -> None:
            time.sleep(3600)

    ray.init(address, log_to_driver=False)
    crew, idle = RayCrew(None), Idle.remote()
    blocked = Idle.options(max_concurrency=1).remote()
    costs: dict[str, Any] = {"submit_s": {}}
    for size in SIZES:
        text = "x" * size
        ray.get(idle.answer.remote(0, text))
        start_s = time.perf_counter()
        calls = [crew.call(idle, "answer", number, text) for number in range(20)]
        costs["submit_s"][size] = (time.perf_counter() - start_s) / len(calls)
        ray.wait(calls, num_returns=len(calls))
    start_s = time.perf_counter()
    for call in calls:
        crew.result(call)
    costs["result_s"] = (time.perf_counter() - start_s) / len(calls)
    waiting, waits = [blocked.never.remote() for _ in range(CALLS)], {}
    for count in (1, 10, 100, 1000, CALLS):
        ended = idle.answer.remote(0, "")
        ray.wait([ended])
        among = [*waiting[: count - 1], ended]
        times = []
        for _ in range(10):
            start_s = time.perf_counter()
            crew.wait(among, 1.0)
            times.append(time.perf_counter() - start_s)
        waits[count] = median(times)
    ray.kill(blocked)
    ray.shutdown()
    return {**costs, "wait_s": waits}


def row_costs(source: Path) -> dict[str, float]:
    """Seconds of the driver for a row: to read it, and to pack it; and its bytes in a message."""
    job = Job(inputs=(source,), output=source, columns=GUESSED, prompt=None, artifact="")
    start_s = time.perf_counter()
    rows = list(records(job))
    read_s = time.perf_counter()
    packed = packed_rows(rows)
    packed_s = time.perf_counter()
    return {"read_s": (read_s - start_s) / len(rows), "pack_s": (packed_s - read_s) / len(rows),
            "row_bytes": len(packed) / len(rows)}  # fmt: skip


class SimulatedCrew:
    """Nodes in virtual time, which passes while the driver computes, while Ray is called, and while all wait."""

    grows = True

    def __init__(self, nodes: int, part_rows: int, per_s: float, start_s: float, costs: dict[str, Any]) -> None:
        self._part_rows = part_rows
        self._nodes = [Node(str(k), f"node{k}", 1) for k in range(nodes)]
        self._per_s, self._start_s, self._costs = per_s, start_s, costs
        self._virtual_s, self._real_s = 0.0, time.perf_counter()
        self._ends: list[tuple[float, int]] = []
        self._said: dict[int, str] = {}
        self._free_s: dict[str, float] = {}
        self._numbers = iter(range(10**9))
        self.busy_s = 0.0
        """What the driver and Ray's calls took of it."""

    def now_s(self) -> float:
        """The virtual clock, by which the driver's own computing counts as it is."""
        real_s = time.perf_counter()
        self._pass(real_s - self._real_s)
        self._real_s = real_s
        return self._virtual_s

    def _pass(self, seconds: float) -> None:
        self._virtual_s += seconds
        self.busy_s += seconds

    def nodes(self) -> list[Node]:
        return self._nodes

    def start(self, node: Node, task: str) -> str:
        return node.id

    def stop(self, actor: str) -> None:
        """It ends."""

    def call(self, actor: str, method: str, *arguments: Any) -> int:
        now_s, number = self.now_s(), next(self._numbers)
        size = self._part_rows * self._costs["row_bytes"] if method == "answer" else 0
        self._pass(between(size, self._costs["submit_s"]))
        if method == "answer":
            self._pass(self._part_rows * self._costs["pack_s"])
        machine = Machine(model="simulated", isa=(), usable_cores=1, hardware_threads=1, quota_cores=None)
        took_s, said = 0.0, None
        if method == "prepare":
            took_s, said = (
                self._start_s,
                Prepared(pid=1, machine=machine, plan=PLAN, source="untuned"),
            )
        elif method == "retune":
            took_s = arguments[0]
            said = Tuned(machine=machine, created="", goal="throughput", plan=PLAN, measurements=())
        elif method == "open":
            said = ()
        elif method == "beat":
            said = number
        else:
            took_s, said = self._part_rows / self._per_s, Answered(rows=self._part_rows, failed=0, example="")
        begin_s = now_s if method == "beat" else max(now_s, self._free_s.get(actor, 0.0))
        if method != "beat":
            self._free_s[actor] = begin_s + took_s
        heapq.heappush(self._ends, (begin_s + took_s, number))
        self._said[number] = json.dumps({"value": to_json(said)})
        self._real_s = time.perf_counter()  # what the simulation itself takes does not count
        return number

    def read(self, count: int) -> Iterator[Record]:
        """A record for each part, which takes as long as all of its rows."""
        for number in range(count):
            self._pass(self._part_rows * self._costs["read_s"])
            yield Record(number, "texts.txt", "", "", "")

    def wait(self, calls: Sequence[int], timeout_s: float) -> list[int]:
        now_s = self.now_s()
        self._pass(between(len(calls), self._costs["wait_s"]))
        if not self._ends:
            self._virtual_s += timeout_s
            return []
        if self._ends[0][0] > self._virtual_s:
            if self._ends[0][0] > now_s + timeout_s:
                self._virtual_s += timeout_s
                return []
            self._virtual_s = self._ends[0][0]
        ended = []
        while self._ends and self._ends[0][0] <= self._virtual_s:
            ended.append(heapq.heappop(self._ends)[1])
        self._real_s = time.perf_counter()
        return ended

    def result(self, call: int) -> str:
        self.now_s()
        self._pass(self._costs["result_s"])
        return self._said.pop(call)


def between(count: float, measured: dict[int, float]) -> float:
    """Seconds for any number, interpolated between those that were measured."""
    known = sorted(measured.items())
    below = max((one for one in known if one[0] <= count), default=known[0])
    above = min((one for one in known if one[0] >= count), default=known[-1])
    if above[0] == below[0]:
        return below[1]
    return below[1] + (above[1] - below[1]) * (count - below[0]) / (above[0] - below[0])


def simulate(nodes: int, part_rows: int, per_s: float, start_s: float, costs: dict[str, Any]) -> dict[str, Any]:
    """A job of a few parts for each node."""
    parts = nodes * PARTS_EACH
    count, crew = parts * part_rows, SimulatedCrew(nodes, part_rows, per_s, start_s, costs)
    progress: list[tuple[float, int]] = []
    driver = Driver(
        crew, "{}", folder_of(Path("out"), several=False), parts_of_rows(crew.read(parts), 1, {}), done=Counts(0, 0),
        total=count, max_failed=None, retune_s=30.0, on_tuned=lambda entry: "",
        on_progress=lambda told: progress.append((crew._virtual_s, told.rows)), clock=crew.now_s,
    )  # fmt: skip
    driver.run()
    first = next(at for at, rows in progress if rows)
    wall_s, ideal_s = progress[-1][0], count / (nodes * per_s)
    run_s = wall_s - first + part_rows / per_s
    return {
        "node_per_s": per_s,
        "nodes": nodes,
        "part_rows": part_rows,
        "rows": count,
        "wall_s": wall_s,
        "ready_s": first,
        "per_s": count / run_s,
        "efficiency": ideal_s / run_s,
        "driver_busy": crew.busy_s / wall_s,
        "driver_s_per_part": crew.busy_s / parts,
    }


def knees(simulated: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each rate of a node and size of a part, the most nodes tried that were busy for ``BUSY`` of their time."""
    found: dict[tuple[float, int], int] = {}
    for one in simulated:
        key = one["node_per_s"], one["part_rows"]
        found[key] = max(found.get(key, 0), one["nodes"] if one["efficiency"] >= BUSY else 0)
    return [{"node_per_s": per_s, "part_rows": rows, "most_nodes": nodes} for (per_s, rows), nodes in found.items()]


def main(options: argparse.Namespace) -> None:
    """Measure, then simulate."""
    artifact, lines = options.artifact.absolute(), options.input.read_text().splitlines()
    path = options.results / f"bulk_scale_{options.artifact.name.removesuffix('.cw')}.json"
    facts: dict[str, Any] = read_results(path)
    jobs = {(job["nodes"], job["rows"]): job for job in facts.get("jobs", ())}
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        for rows in options.rows:
            Path(name, f"{rows}.txt").write_text("\n".join(islice(cycle(lines), rows)) + "\n")
        for nodes in options.nodes:
            with cluster(nodes, Path(name) / f"log-{nodes}") as (address, heads):
                for rows in options.rows:
                    output = Path(name) / f"out-{nodes}-{rows}"
                    made = measure(artifact, Path(name, f"{rows}.txt"), address, heads, output)
                    cpu = inspect_cpu().model
                    jobs[nodes, rows] = {**made, "nodes": nodes, "actors": made["nodes"], "cpu": cpu}
                    say(f"{nodes} nodes: {made}")
                if nodes == 1:
                    facts["costs"] = {**ray_costs(address), **row_costs(Path(name, f"{max(options.rows)}.txt"))}
            facts |= {"jobs": [jobs[key] for key in sorted(jobs)], **machine_facts()}
            write_results(path, facts)
    if options.no_simulation:
        return
    costs = {key: in_numbers(value) for key, value in facts["costs"].items()}
    largest = max((job for (nodes, _), job in jobs.items() if nodes == 1), key=lambda job: job["rows"])
    facts["simulated"] = []
    for per_s, nodes, part_rows in product((largest["per_s"], LARGE_PER_S), NODES, PART_ROWS):
        facts["simulated"].append(simulate(nodes, part_rows, per_s, largest["ready_s"], costs))
        say(str(facts["simulated"][-1]))
    facts["knees"] = knees(facts["simulated"])
    for knee in facts["knees"]:
        say(str(knee))
    write_results(path, facts)


def in_numbers(cost: Any) -> Any:
    """A cost by numbers, which are strings in JSON."""
    return {float(count): seconds for count, seconds in cost.items()} if isinstance(cost, dict) else cost
