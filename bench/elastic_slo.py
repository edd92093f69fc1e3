"""The rate that an SLO is certified for: of an elastic plan, over that of the better of its layouts.

    python -m bench elastic_slo ARTIFACT... [--rounds 2] [--budget 80] [--slo 3]

The SLO is a p99 of ``--slo`` x the p50 of a lone client of the layout on all cores. The rates are found and certified
as a search does it (``search/slo.py``): rates are put on the server's queue with deadlines, up to the highest one that
is met, and nine tenths of that once more for half a minute. In each round the layouts are searched together, best
first, and then the elastic plan, each in ``--budget`` seconds. Writes elastic-slo.json: the certified rates, all loads,
and the ratio of the rates.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench.elastic_loads import Queue, queues
from bench.elastic_plans import ELASTIC, FIXED, Subject, add_artifacts, subject_of
from bench.harness import add_results, alternate, ratio_data, ratio_words, say
from corewise.common.stats import ratio_interval
from corewise.records.jsonable import to_json
from corewise.records.measurement import LoadRun
from corewise.search import slo
from corewise.search.budget import Budget

IDLE_S = 3.0


def contenders(subject: Subject, names: Sequence[str], slo_ms: float) -> dict[str, slo.Contender]:
    """The ways that meet a rate in simulation. The elastic plan is expected to do what its better layout does."""
    build, found = subject.artifact.manifest.build, {}
    for name in FIXED:
        table = slo.worthwhile([m for m in subject.table(subject.ways[name].plan) if m.p99_ms <= slo_ms])
        if table and (rate_per_s := slo.simulated(table, slo_ms)) > 0:
            found[name] = slo.Contender(build=build, table=table, simulated_per_s=rate_per_s)
    if "narrow" in found:
        expected_per_s = max(one.simulated_per_s for one in found.values())
        found[ELASTIC] = slo.Contender(build=build, table=found["narrow"].table, simulated_per_s=expected_per_s)
    return {name: one for name, one in found.items() if name in names}


def certified(
    subject: Subject, opened: Mapping[str, Queue], names: Sequence[str], slo_ms: float, budget_s: float
) -> dict[str, Any]:
    """The highest rate that one of the ways is certified for, and the loads that it took."""
    found, budget, loads = contenders(subject, names, slo_ms), Budget(total_s=budget_s), list[tuple[str, LoadRun]]()

    def load(contender: slo.Contender, rate_per_s: float, least_s: float) -> LoadRun:
        name = next(name for name, one in found.items() if one is contender)
        run = opened[name].load(
            subject.way(name, contender.table[-1].plan.batch),
            rate_per_s=rate_per_s,
            duration_s=slo.load_s(rate_per_s, least_s, budget.left_s()),
            slo_ms=slo_ms,
        )
        loads.append((name, run))
        say(f"  {name:8s} {rate_per_s:8.1f}/s for {run.duration_s:4.1f} s: {'met' if run.met else 'missed'}")
        return run

    best = slo.climb(list(found.values()), load, partial(slo.simulated, slo_ms=slo_ms), budget.ended)
    name, last = loads[-1] if best is not None else (None, None)
    return {
        "way": name,
        "rate_per_s": None if last is None else last.rate_per_s,
        "batch": None if last is None else last.plan.batch,
        "loads": [{"way": way, **to_json(run)} for way, run in loads],
    }


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """The rates of all rounds."""
    with queues(subject, IDLE_S) as opened:
        slo_ms = options.slo * opened["wide"].idle()["p50_ms"]
        say(f"  the SLO is a p99 of {slo_ms:.2f} ms")
        sides = {"fixed": FIXED, ELASTIC: (ELASTIC,)}
        rounds = alternate(
            options.rounds,
            {side: partial(certified, subject, opened, names, slo_ms, options.budget) for side, names in sides.items()},
        )
    rates = {side: [one["rate_per_s"] for one in found] for side, found in rounds.items()}
    known = None not in [*rates["fixed"], *rates[ELASTIC]]
    over = ratio_data(ratio_interval(rates[ELASTIC], rates["fixed"])) if known else None
    return {**subject.facts, "slo_ms": slo_ms, "rounds": rounds, "rates_per_s": rates, "elastic_over_fixed": over}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_artifacts(parser, rounds=2)
    parser.add_argument("--budget", type=float, default=80.0, metavar="S", help="of each search (default: 80)")
    parser.add_argument("--slo", type=float, default=3.0, metavar="X", help="of a lone client's p50 (default: 3)")


def main(options: argparse.Namespace) -> None:
    """Measure the artifacts; the results of others stay."""
    for folder in options.artifacts:
        subject = subject_of(folder)
        record = measure(subject, options)
        add_results(options.results / "elastic-slo.json", subject.name, record)
        for side, rates_per_s in record["rates_per_s"].items():
            say(f"  {side:8s} " + ", ".join("none" if rate is None else f"{rate:.1f}/s" for rate in rates_per_s))
        if record["elastic_over_fixed"]:
            say(f"  the elastic plan's over the better layout's: {ratio_words(record['elastic_over_fixed'])}")
