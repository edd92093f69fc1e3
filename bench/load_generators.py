"""corewise's own load generator beside MLPerf's and NVIDIA's: whether they report the same of the same system.

    python -m bench load_generators ARTIFACT --perf-analyzer BINARY [--rate 100] [--rounds 3] [--seconds 5]

ARTIFACT has one float32 input and takes no files, because perf_analyzer sends all inputs that the server names.
``mlcommons-loadgen`` (``pip install mlcommons-loadgen``) sends to the queue that ``corewise loadtest`` sends to, in the
same process: SingleStream beside a closed loop of one client, and Server beside an open loop of ``--rate`` requests per
second. ``perf_analyzer`` (in the wheel of tritonclient 2.50.0; it needs libb64 and libcudart) sends over HTTP to
``corewise serve``, beside the client of the other benchmarks: one client, and the rate. All take turns. Writes
load_generators.json: rate, p50 and p99 of each, and their ratios to corewise's.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.harness import add_results, alternate, say, versions
from bench.servers import Server, golden_rows
from bench.wire import MODEL, Load, Wire, request
from corewise import artifact
from corewise.artifact import PAYLOAD, tuned
from corewise.batching import Batcher, NotServed, policy_of
from corewise.engines import engine
from corewise.machine.inspect import inspect_cpu
from corewise.records.measurement import LoadRun
from corewise.runtime.instances import open_layouts
from corewise.runtime.loadgen import Submit, closed_loop, open_loop

MAX_WAITING = 4096
WINDOWS = 3
MS_PER_NS, MS_PER_US = 1e-6, 1e-3
Figures = dict[str, float]


def of_run(run: LoadRun) -> Figures:
    """What corewise's generator says."""
    return {"per_s": run.answered / run.duration_s, "p50_ms": run.p50_ms, "p99_ms": run.p99_ms}


def of_wire(load: Load) -> Figures:
    """What the benchmarks' client says."""
    facts = load.facts()
    return {"per_s": facts["answered_per_s"], "p50_ms": facts["p50_ms"], "p99_ms": facts["p99_ms"]}


def mlperf(submit: Submit, samples: int, seconds: float, rate_per_s: float | None = None) -> Figures:
    """A run of MLPerf's generator: Server at a rate, else SingleStream."""
    import mlperf_loadgen as loadgen

    number = count()

    def issue(queries: list[Any]) -> None:
        for query in queries:
            done = partial(lambda id_, future: answered(id_), query.id)
            submit(next(number)).add_done_callback(done)

    def answered(id_: int) -> None:
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(id_, 0, 0)])

    settings = loadgen.TestSettings()
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.scenario = loadgen.TestScenario.SingleStream if rate_per_s is None else loadgen.TestScenario.Server
    settings.min_duration_ms = settings.max_duration_ms = int(1e3 * seconds)
    settings.min_query_count = 1
    if rate_per_s is not None:
        settings.server_target_qps = rate_per_s
        settings.server_target_latency_ns = 10**10
    with tempfile.TemporaryDirectory() as folder:
        output = loadgen.LogOutputSettings()
        output.outdir = folder
        logs = loadgen.LogSettings()
        logs.log_output = output
        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(samples, samples, lambda rows: None, lambda rows: None)
        loadgen.StartTestWithLogSettings(system, library, settings, logs)
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
        lines = (Path(folder) / "mlperf_log_summary.txt").read_text().splitlines()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    rate = told.get("Completed samples per second") or told["QPS w/ loadgen overhead"]
    p50_ms, p99_ms = (MS_PER_NS * float(told[f"{q} percentile latency (ns)"]) for q in ("50.00", "99.00"))
    return {"per_s": float(rate), "p50_ms": p50_ms, "p99_ms": p99_ms}


def perf_analyzer(binary: Path, port: int, seconds: float, rate_per_s: float | None = None) -> Figures:
    """A run of NVIDIA's generator: at a rate, else one client."""
    load = ["--concurrency-range", "1"]
    if rate_per_s is not None:
        load = ["--request-rate-range", f"{rate_per_s:g}", "--request-distribution", "poisson"]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        # It wants three windows that agree; how much they differ, the rounds tell.
        interval = ["--measurement-interval", f"{1e3 * seconds / WINDOWS:.0f}"]
        windows = [*interval, "--max-trials", str(WINDOWS), "--stability-percentage", "999"]
        command = [str(binary), "-m", MODEL, "-u", f"127.0.0.1:{port}", "-i", "http", *load, *windows, "-f", str(table)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 5 * seconds)
        if done.returncode:
            sys.exit(f"perf_analyzer: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        with table.open() as file:
            row = next(csv.DictReader(file))
    p50_ms, p99_ms = (MS_PER_US * float(row[f"{q} latency"]) for q in ("p50", "p99"))
    return {"per_s": float(row["Inferences/Second"]), "p50_ms": p50_ms, "p99_ms": p99_ms}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all generators."""
    cpu = inspect_cpu()
    found = artifact.read(options.artifact, cpu=cpu)
    fit, tables = tuned.for_requests(found, tuned.fit(found, cpu))
    table, _ = tuned.usable_table(found, fit, cpu)
    build, plan = found.manifest.build, fit.plan
    name, rows, expected = golden_rows(found)
    seconds, rate_per_s = options.seconds, options.rate
    with ExitStack() as stack:
        wide = None if fit.elastic is None else fit.elastic.wide
        payload = (found.folder / PAYLOAD).resolve()
        instances = stack.enter_context(open_layouts(engine(build.engine), payload, build, plan, cpu, wide))
        policy = policy_of(table, tables, max_batch=plan.batch, max_waiting=MAX_WAITING)
        runs = [partial(instances.run, number) for number in range(len(instances))]
        for run in runs:
            for size in range(1, plan.batch + 1):
                run([np.concatenate([rows[k % len(rows)] for k in range(size)])])
        batcher = stack.enter_context(Batcher(runs, policy))

        def submit(k: int) -> Any:
            return batcher.submit([rows[k % len(rows)]], timeout_s=inf)

        told = {"plan": plan, "duration_s": seconds, "refusal": NotServed}
        alone = alternate(
            options.rounds,
            {
                "corewise": lambda: of_run(closed_loop(submit, clients=1, **told)),
                "mlperf": lambda: mlperf(submit, len(rows), seconds),
            },
        )
        served = alternate(
            options.rounds,
            {
                "corewise": lambda: of_run(open_loop(submit, rate_per_s=rate_per_s, **told)),
                "mlperf": lambda: mlperf(submit, len(rows), seconds, rate_per_s),
            },
        )
    loads: dict[str, dict[str, list[Figures]]] = {"SingleStream": alone, "Server": served}
    if options.perf_analyzer is not None:
        requests = [request(name, row) for row in rows]
        loads |= over_http(options, requests, expected)
    return {
        "plan": plan.label,
        "rate_per_s": rate_per_s,
        "loads": loads,
        "of_corewise": {load: of_corewise(runs) for load, runs in loads.items()},
        "generators": versions(("mlcommons_loadgen", "tritonclient")),
    }


def over_http(options: argparse.Namespace, requests: list[Any], expected: Any) -> dict[str, dict[str, list[Figures]]]:
    """The rounds against a live server, beside perf_analyzer's."""
    seconds, rate_per_s = options.seconds, options.rate
    with Server(options.artifact) as server:
        wire = Wire(server.port, requests, expected, None)
        wire.closed(1, 1.0)
        triton: Callable[..., Figures] = partial(perf_analyzer, options.perf_analyzer, server.port, seconds)
        return {
            "HTTP, one client": alternate(
                options.rounds,
                {"corewise": lambda: of_wire(wire.closed(1, seconds)), "perf_analyzer": triton},
            ),
            "HTTP, at a rate": alternate(
                options.rounds,
                {
                    "corewise": lambda: of_wire(wire.open(rate_per_s, seconds)),
                    "perf_analyzer": lambda: triton(rate_per_s),
                },
            ),
        }


def of_corewise(runs: dict[str, list[Figures]]) -> Figures:
    """The medians of the other generator over those of corewise's."""
    mine, theirs = runs["corewise"], next(found for name, found in runs.items() if name != "corewise")
    return {key: median(one[key] for one in theirs) / median(one[key] for one in mine) for key in mine[0]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--perf-analyzer", type=Path, metavar="BINARY", help="without it MLPerf's generator alone")
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")


def main(options: argparse.Namespace) -> None:
    """Measure the artifact."""
    found = measure(options)
    for load, runs in found["loads"].items():
        for name, each in runs.items():
            per_s, p50_ms, p99_ms = (median(one[key] for one in each) for key in ("per_s", "p50_ms", "p99_ms"))
            say(f"{load:18s} {name:14s} {per_s:8.1f}/s  p50 {p50_ms:7.3f} ms  p99 {p99_ms:7.3f} ms")
        say(
            f"{load:18s} over corewise   "
            + ", ".join(f"{key} {value:.3f}" for key, value in found["of_corewise"][load].items())
        )
    add_results(options.results / "load_generators.json", options.artifact.name.removesuffix(".cw"), found)
