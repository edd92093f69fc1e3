"""An elastic plan and its two layouts alone: idle, at a third and two thirds of the load, saturated, and in batches.

    python -m bench elastic ARTIFACT... [--rounds 5] [--seconds 5]
    python -m bench elastic --simulate

Each artifact is retuned first. Then ``corewise.load`` opens it three times in one process: as ``retune`` found it, and
with each layout of its elastic plan. They take turns, in rounds: one caller of single items (idle), two callers for
each instance (saturated), single items at random times at a third and two thirds of the best layout's saturated rate,
and one caller of batches for all instances. Then the server's queue has the same loads of requests, which share calls,
in a process for each of the three ways. Writes elastic.json: p50 and p99 of each, and retune's simulated curve.

``--simulate`` divides batches of BERT on 16, 32 and 64 cores, by published times, and times the policy's decisions
and those of the server's queue.
Writes elastic-simulated.json.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import corewise
from bench.harness import add_results, alternate, say, write_results
from bench.published import alone_s, bert_partitions
from corewise.artifact import PAYLOAD, Artifact, read, tuned
from corewise.artifact.open import golden_samples
from corewise.batching import ElasticPolicy, ElasticQueue, ElasticTables, LatencyTable, Partitions, Request
from corewise.common.stats import quantile
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import ElasticPlan, Plan
from corewise.records.jsonable import to_json
from corewise.records.measurement import LoadRun, Measurement
from corewise.runtime.client import Worker
from corewise.runtime.loadgen import closed_loop, open_loop

Run = Callable[[Sequence[np.ndarray]], Any]
CALLERS = 64
"""Threads that call; more requests than that wait in their queue."""
LOADS = {"a third": 1 / 3, "two thirds": 2 / 3}
DECISIONS, WAITING, CORES = 200, 1000, 64


class Contender:
    """An artifact opened one way."""

    def __init__(self, run: Run, plan: ElasticPlan, golden: Sequence[np.ndarray], callers: ThreadPoolExecutor) -> None:
        self._run, self._plan, self._callers = run, plan, callers
        self._single = [array[:1] for array in golden]
        rows = np.resize(np.arange(len(golden[0])), plan.narrow.batch * plan.narrow.instances)
        self._batch = [np.ascontiguousarray(array[rows]) for array in golden]

    def warm(self) -> None:
        """Engines compile for a size when they first meet it."""
        for rows in range(1, len(self._batch[0]) + 1):
            self._run([array[:rows] for array in self._batch])

    def alone(self, inputs: Sequence[np.ndarray], seconds: float) -> dict[str, float]:
        """One caller, without the threads of the others."""
        times_s, end_s = [], time.monotonic() + seconds
        while time.monotonic() < end_s or not times_s:
            start_s = time.perf_counter()
            self._run(inputs)
            times_s.append(time.perf_counter() - start_s)
        return {
            "per_s": len(inputs[0]) / median(times_s),
            "p50_ms": 1e3 * quantile(times_s, 0.5),
            "p99_ms": 1e3 * quantile(times_s, 0.99),
        }

    def idle(self, seconds: float) -> dict[str, float]:
        """Single items, one after the other."""
        return self.alone(self._single, seconds)

    def batches(self, seconds: float) -> dict[str, float]:
        """As many rows as all instances take, one call after the other."""
        return self.alone(self._batch, seconds)

    def saturated(self, seconds: float) -> dict[str, float]:
        """Two callers for each instance."""
        clients = 2 * self._plan.narrow.instances
        run = closed_loop(self._submit, plan=self._plan.narrow, clients=clients, duration_s=seconds, refusal=OSError)
        return _figures(run)

    def at_rate(self, per_s: float, seconds: float) -> dict[str, float]:
        """Single items at random times."""
        return _figures(
            open_loop(self._submit, plan=self._plan.narrow, rate_per_s=per_s, duration_s=seconds, refusal=OSError)
        )

    def _submit(self, _: int) -> Any:
        return self._callers.submit(self._run, self._single)


def _figures(run: LoadRun) -> dict[str, float]:
    return {
        "per_s": run.answered / run.duration_s,
        "p50_ms": run.p50_ms,
        "p99_ms": run.p99_ms,
        "failed": run.failed,
        "sender_late_p99_ms": run.sender_late_p99_ms,
    }


def queued(
    artifact: Artifact, elastic: ElasticPlan, measured: Sequence[Measurement], rounds: int, seconds: float
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """The loads on the server's queue, of requests of one row."""
    cpu, build, payload = inspect_cpu(), artifact.manifest.build, (artifact.folder / PAYLOAD).resolve()
    tables = tuned.elastic_tables(elastic, measured)
    loads: dict[str, dict[str, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corewise-bench-")))
        golden_samples(artifact).save(samples := folder / "golden.safetensors")
        ways: dict[str, Callable[..., dict[str, float]]] = {}
        for name, plan in (("elastic", elastic.narrow), ("wide", elastic.wide), ("narrow", elastic.narrow)):
            worker = stack.enter_context(Worker(cpu=cpu, log=folder / f"{name}.log", timeout_s=600.0))
            worker.open(payload, build, plan, elastic.wide if name == "elastic" else None)
            table = LatencyTable.of([m for m in measured if m.plan.layout_label == plan.layout_label])
            both = tables if name == "elastic" else None
            ways[name] = partial(_load, worker, samples, plan, table, duration_s=seconds, elastic=both)
        crowd = 2 * elastic.narrow.instances * elastic.narrow.batch
        for load, told in (("idle", {"clients": 1}), ("saturated", {"clients": crowd})):
            loads[load] = alternate(rounds, {name: partial(way, **told) for name, way in ways.items()})
        best_per_s = max(median(run["per_s"] for run in loads["saturated"][name]) for name in ("wide", "narrow"))
        for load, share in LOADS.items():
            told = {"rate_per_s": share * best_per_s}
            loads[load] = alternate(rounds, {name: partial(way, **told) for name, way in ways.items()})
    return loads


def _load(worker: Worker, *about: Any, **load: Any) -> dict[str, float]:
    return _figures(worker.load(*about, **load))


def measure(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Retune an artifact, and all loads on all three ways to open it."""
    retuned = corewise.retune(folder)
    if retuned.elasticity is None:
        return {"elasticity": None}
    cpu, elastic = inspect_cpu(), retuned.elasticity.plan
    artifact = read(folder, cpu=cpu)
    golden, _ = artifact.golden()
    fit = tuned.fit(artifact, cpu)
    with ExitStack() as stack:
        callers = stack.enter_context(ThreadPoolExecutor(CALLERS))
        opened = {"elastic": stack.enter_context(corewise.load(folder))}
        for name, plan in (("wide", elastic.wide), ("narrow", elastic.narrow)):
            opened[name] = stack.enter_context(corewise.load(folder, **_numbers(plan)))
        contenders = {
            name: Contender(partial(_call, model), elastic, golden, callers) for name, model in opened.items()
        }
        for contender in contenders.values():
            contender.warm()
        loads: dict[str, dict[str, list[dict[str, float]]]] = {}
        for load in ("idle", "batches", "saturated"):
            loads[load] = alternate(
                rounds, {name: partial(getattr(one, load), seconds) for name, one in contenders.items()}
            )
        best_per_s = max(median(run["per_s"] for run in loads["saturated"][name]) for name in ("wide", "narrow"))
        for load, share in LOADS.items():
            loads[load] = alternate(
                rounds,
                {name: partial(one.at_rate, share * best_per_s, seconds) for name, one in contenders.items()},
            )
    return {
        "elasticity": to_json(retuned.elasticity),
        "opened": fit.elastic is not None,
        "loads": loads,
        "queued": queued(artifact, elastic, retuned.entry.measurements, rounds, seconds),
    }


def _numbers(plan: Plan) -> dict[str, int]:
    return {"threads_per_instance": plan.threads_per_instance, "instances": plan.instances, "batch": plan.batch}


def _call(model: Any, inputs: Sequence[np.ndarray]) -> Any:
    # Flat, because what is measured is the session: arguments may be nested in any way.
    return model._session.run(inputs)


def simulate() -> dict[str, Any]:
    """Published times divided, and how long decisions take at most."""
    gains = {
        cores: {
            rows: alone_s(partitions, rows) / partitions.seconds(cores, rows)
            for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256)
        }
        for cores, partitions in ((cores, bert_partitions(cores)) for cores in (16, 32, 64))
    }
    return {
        "alone_over_divided": gains,
        "decision_us": decision_us(bert_partitions(CORES)),
        "queue_us": {
            f"{waiting} waiting, {words}": queue_us(bert_partitions(CORES), waiting, due_s)
            for waiting in (20, 60, WAITING)
            for words, due_s in (("no deadlines", inf), ("deadlines far off", 60.0), ("deadlines near", 1.0))
        },
    }


def decision_us(partitions: Partitions) -> dict[str, float]:
    """Median and slowest microseconds in which the policy starts one call of many that wait, by its rows."""
    times_us = []
    for number in range(DECISIONS):
        policy = ElasticPolicy(partitions)
        for call in range(WAITING):
            policy.arrive(call, 1 + number % 256, 0.0)
        policy.free = partitions.threads[number % len(partitions.threads)]
        start_s = time.perf_counter()
        started = policy.starts(0.0)
        times_us.append(1e6 * (time.perf_counter() - start_s) / len({start.call for start in started}))
    return {"median": median(times_us), "p99": quantile(times_us, 0.99)}


def queue_us(partitions: Partitions, waiting: int, due_s: float) -> dict[str, dict[str, float]]:
    """Microseconds in which the server's queue accepts a request, and starts a call, on as many cores as there are.

    The queue is filled up to ``waiting`` requests; then half of the calls end, and others start.
    """
    cores = partitions.cores
    narrow, wide = partitions.tables[1], partitions.tables[cores]
    tables = ElasticTables(cores=cores, threads=1, wide=wide, narrow=narrow, wide_slow=wide)
    queue = ElasticQueue(narrow, tables, max_batch=8, max_waiting=4 * waiting)
    for instance in range(cores + 1):
        queue.finished(instance)
    random, now_s, numbers, running = np.random.default_rng(0), 0.0, count(), list[int]()
    accept_us, start_us = list[float](), list[float]()
    for _ in range(DECISIONS):
        now_s += 0.01
        ended = running if queue.wide in running else running[::2]
        for instance in ended:
            queue.finished(instance)
        running = [instance for instance in running if instance not in ended]
        for _ in range(waiting - queue.waiting_rows):
            request = Request(id=next(numbers), deadline_s=now_s + due_s * random.uniform(0.9, 1.1))
            start_s = time.perf_counter()
            queue.offer(request, now_s)
            accept_us.append(1e6 * (time.perf_counter() - start_s))
        while True:
            start_s = time.perf_counter()
            if (instance := queue.turn(now_s)) is not None:
                queue.next_batch(instance, now_s)
            start_us.append(1e6 * (time.perf_counter() - start_s))
            if instance is None:
                break
            running.append(instance)
    return {
        name: {"median": median(times_us), "p99": quantile(times_us, 0.99)}
        for name, times_us in (("accept", accept_us), ("start", start_us))
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load in each round")
    parser.add_argument("--simulate", action="store_true", help="simulate machines that are not here instead")


def main(options: argparse.Namespace) -> None:
    """Measure the artifacts, or simulate."""
    if options.simulate:
        record = simulate()
        write_results(options.results / "elastic-simulated.json", record)
        for cores, gains in record["alone_over_divided"].items():
            say(f"{cores} cores: " + ", ".join(f"{gain:.2f}x at batch {rows}" for rows, gain in gains.items()))
        say(f"a decision takes {record['decision_us']['median']:.0f} us, p99 {record['decision_us']['p99']:.0f} us")
        for queue, times_us in record["queue_us"].items():
            words = (f"{name} {us['median']:.0f} us, p99 {us['p99']:.0f} us" for name, us in times_us.items())
            say(f"{queue}: {'; '.join(words)}")
    for folder in options.artifacts:
        record = measure(folder, options.rounds, options.seconds)
        add_results(options.results / "elastic.json", folder.name.removesuffix(".cw"), record)
        say(f"\n{folder}: " + ("elastic" if record.get("opened") else "one layout is as good, or none was measured"))
        for way in ("loads", "queued"):
            for load, contenders in record.get(way, {}).items():
                for name, runs in contenders.items():
                    p50_ms, p99_ms, per_s = (median(run[key] for run in runs) for key in ("p50_ms", "p99_ms", "per_s"))
                    say(f"  {way} {load:10s} {name:8s} {per_s:8.1f}/s  p50 {p50_ms:7.2f} ms  p99 {p99_ms:7.2f} ms")
