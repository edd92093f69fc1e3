"""How much any queue could gain by two thread layouts: the best schedule that knows all arrivals beforehand.

    python -m bench elastic_bound NAME --wide 1:0.80,2:1.41 --narrow 1:1.37,2:2.66 [--requests 1500]

``--wide`` and ``--narrow`` are the milliseconds of calls over their rows, of one instance on two cores and of two
instances of one. Requests of one row come at random times. Each layout alone, the elastic queue and the schedule of
least mean latency, found by a beam search over calls in order of arrival, answer the same ones. A schedule may wait
for later requests and leave cores idle. Writes elastic-bound.json: p50 and p99 of each and the mean
of the best schedule, over load.
"""

import argparse
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from bench.elastic_plans import exactly
from bench.harness import add_results, say
from corewise.batching import ElasticTables, LatencyTable
from corewise.batching.simulate import Wide, capacity_per_s, simulate_load
from corewise.common.stats import quantile

LOADS = (0.05, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.9)
BEAM = 60
STEP = 50
"""Of schedules whose cores are free at the same times, to 1 / STEP of the shortest call, the cheapest one stays."""


class Schedule(NamedTuple):
    """The first requests' calls: when each core is free, what their latencies sum up to, and the calls before."""

    first_s: float
    last_s: float
    cost_s: float
    before: "Schedule | None" = None
    rows: int = 0
    end_s: float = 0.0


def best_schedule(arrivals: Sequence[float], wide_s: Sequence[float], narrow_s: Sequence[float]) -> list[float]:
    """Latencies of the requests under it; ``wide_s`` and ``narrow_s`` are seconds for 0, 1, 2, ... rows."""
    count, grain_s = len(arrivals), min(wide_s[1], narrow_s[1]) / STEP
    by_state: list[dict[tuple[int, int], Schedule]] = [{} for _ in range(count + 1)]
    by_state[0][0, 0] = Schedule(0.0, 0.0, 0.0)

    def keep(done: int, found: Schedule) -> None:
        key = (round(found.first_s / grain_s), round(found.last_s / grain_s))
        known = by_state[done].get(key)
        if known is None or found.cost_s < known.cost_s:
            by_state[done][key] = found

    for done in range(count):
        now_s = arrivals[done]
        beam = sorted(
            by_state[done].values(),
            key=lambda one: one.cost_s + 0.7 * (max(one.first_s, now_s) + max(one.last_s, now_s) - 2 * now_s),
        )[:BEAM]
        by_state[done].clear()
        for one in beam:
            for rows in range(1, min(max(len(wide_s), len(narrow_s)) - 1, count - done) + 1):
                come_s, sum_s = arrivals[done + rows - 1], sum(arrivals[done : done + rows])
                if rows > 1 and come_s > one.last_s:
                    break
                if rows < len(wide_s):
                    end_s = max(one.last_s, come_s) + wide_s[rows]
                    keep(done + rows, Schedule(end_s, end_s, one.cost_s + rows * end_s - sum_s, one, rows, end_s))
                if rows < len(narrow_s):
                    end_s = max(one.first_s, come_s) + narrow_s[rows]
                    free_s = sorted((end_s, one.last_s))
                    keep(done + rows, Schedule(*free_s, one.cost_s + rows * end_s - sum_s, one, rows, end_s))
    last: Schedule | None = min(by_state[count].values(), key=lambda one: one.cost_s)
    latencies_s, done = [], count
    while last is not None and last.before is not None:
        latencies_s += [last.end_s - arrivals[k] for k in range(done - last.rows, done)]
        done, last = done - last.rows, last.before
    return latencies_s


def measure(wide: LatencyTable, narrow: LatencyTable, requests: int) -> dict[str, Any]:
    """All loads."""
    tables = ElasticTables(cores=2, threads=1, wide=wide, narrow=narrow, wide_slow=wide)
    most = {"wide": wide.points[-1][0], "narrow": narrow.points[-1][0]}
    most_per_s = max(
        capacity_per_s(exactly(table), instances=instances, max_batch=rows)
        for table, instances, rows in ((wide, 1, most["wide"]), (narrow, 2, most["narrow"]))
    )
    seconds = [
        [0.0, *(table.latency_ms(rows) / 1e3 for rows in range(1, table.points[-1][0] + 1))] for table in (wide, narrow)
    ]
    loads = {}
    for load in LOADS:
        told = {"rate_per_s": load * most_per_s, "requests": requests, "max_waiting": 10**6}
        runs = {
            "wide": simulate_load(wide, service=exactly(wide), instances=1, max_batch=most["wide"], **told),
            "narrow": simulate_load(narrow, service=exactly(narrow), instances=2, max_batch=most["narrow"], **told),
            "elastic": simulate_load(
                narrow,
                service=exactly(narrow),
                instances=2,
                max_batch=most["narrow"],
                wide=Wide(tables, exactly(wide)),
                **told,
            ),
        }
        gaps = np.random.default_rng([0, 0]).exponential(size=requests)  # as ``simulate_load`` draws them
        times_s = (np.cumsum(gaps) / (load * most_per_s)).tolist()
        latencies_ms = [1e3 * one for one in best_schedule(times_s, *seconds)]
        found = {name: {"p50_ms": run.p50_ms, "p99_ms": run.p99_ms} for name, run in runs.items()}
        found["best"] = {
            "p50_ms": quantile(latencies_ms, 0.5),
            "p99_ms": quantile(latencies_ms, 0.99),
            "mean_ms": fmean(latencies_ms),
        }
        loads[f"{load:.2f}"] = found
        told_ms = "  ".join(f"{name} {one['p50_ms']:.2f} / {one['p99_ms']:.2f}" for name, one in found.items())
        say(f"{load:4.0%}  {told_ms}  (p50 / p99 ms)")
    return {"wide": wide.points, "narrow": narrow.points, "most_per_s": most_per_s, "loads": loads}


def table_of(text: str) -> LatencyTable:
    """``1:0.80,2:1.41``."""
    pairs = (point.split(":") for point in text.split(","))
    return LatencyTable(points=tuple((int(rows), float(ms)) for rows, ms in pairs))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("name", metavar="NAME", help="of the tables, in the results")
    parser.add_argument("--wide", type=table_of, required=True, metavar="ROWS:MS,...")
    parser.add_argument("--narrow", type=table_of, required=True, metavar="ROWS:MS,...")
    parser.add_argument("--requests", type=int, default=1500)


def main(options: argparse.Namespace) -> None:
    """Find the bound."""
    found = measure(options.wide, options.narrow, options.requests)
    add_results(options.results / "elastic-bound.json", options.name, found)
