"""A load that switches every two seconds between a lone client and a crowd, over HTTP: what is lost, and what is late.

    python -m bench elastic_switch ARTIFACT... [--rounds 2] [--seconds 40] [--shares 0.2 0.9 0.4 0.7] [--texts FILE]

Requests come at random times, at each of ``--shares`` of the better layout's saturated rate in turn, ``--every``
seconds each. ``corewise serve`` answers the same ones with the elastic plan and with each layout of it alone; these
take turns, in rounds, and the client is this process. Late is what takes longer than ``--slo`` x the p50 of a lone
client of the layout on all cores; the servers are not told.

Then the same trace is played in virtual time, each call taking its measured p50: which requests are late with the
elastic plan that the better layout answers in time, and the other way round. It is played as it was sent, and as dense
as the shares are of what the simulated calls could do, both without deadlines and with them.
Writes elastic-switch.json.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import cycle, islice
from math import ceil, inf
from pathlib import Path
from statistics import median
from typing import Any

from bench.elastic_curve import requests_of
from bench.elastic_loads import Served, of_wire, saturated_per_s
from bench.elastic_plans import ELASTIC, FIXED, Subject, add_artifacts, copies, subject_of
from bench.harness import add_results, alternate, say
from bench.servers import Server
from bench.wire import Load, Wire
from corewise.batching.simulate import simulate_trace
from corewise.common.stats import quantile
from corewise.runtime.loadgen import arrivals_s

CAPACITY_S = 3.0
MOST_SIMULATED = 20_000
"""Requests of a trace that are simulated."""
MAX_WAITING = 10**6


def trace(rates_per_s: Sequence[float], every_s: float, seconds: float, seed: int) -> list[float]:
    """Times of requests at random, at each of the rates in turn for so long."""
    phases = islice(cycle(rates_per_s), ceil(seconds / every_s))
    return [
        phase * every_s + time_s
        for phase, per_s in enumerate(phases)
        for time_s in arrivals_s(per_s, every_s, 1000 * seed + phase).tolist()
    ]


def facts(load: Load, slo_ms: float, shares: Sequence[float], every_s: float) -> dict[str, Any]:
    """What became of a trace: none is lost if all were answered, and rightly."""
    by_share: dict[float, list[float]] = {share: [] for share in shares}
    for due_s, ms in zip(load.due_s, load.latencies_ms, strict=True):
        by_share[shares[int(due_s / every_s) % len(shares)]].append(ms)
    return {
        **of_wire(load),
        "lost": load.offered - load.answered + load.wrong,
        "late": sum(ms > slo_ms for ms in load.latencies_ms),
        "by_share": {
            f"{share:.0%}": {"p50_ms": quantile(ms, 0.5), "p99_ms": quantile(ms, 0.99)}
            for share, ms in by_share.items()
            if ms
        },
    }


def simulated(subject: Subject, times_s: Sequence[float], slo_ms: float, *, told: bool) -> dict[str, Any]:
    """How many are late in virtual time, and whose; the queue may be told the deadlines."""
    late = {}
    for name, way in subject.ways.items():
        latencies_s = simulate_trace(
            way.table,
            times_s,
            service=way.service,
            instances=way.plan.instances,
            slo_ms=slo_ms if told else inf,
            max_batch=way.plan.batch,
            max_waiting=MAX_WAITING,
            wide=way.simulated,
        )
        late[name] = [1e3 * seconds > slo_ms for seconds in latencies_s]
    better = min(FIXED, key=lambda name: sum(late[name]))
    pairs = list(zip(late[ELASTIC], late[better], strict=True))
    return {
        "requests": len(times_s),
        "deadlines": told,
        "late": {name: sum(each) for name, each in late.items()},
        "better": better,
        "late_only_if_elastic": sum(ours and not theirs for ours, theirs in pairs),
        "late_only_in_better": sum(theirs and not ours for ours, theirs in pairs),
    }


def played(subject: Subject, times_s: Sequence[float], slo_ms: float, sent_per_s: float) -> list[dict[str, Any]]:
    """The simulations of a trace whose shares were of ``sent_per_s``."""
    denser = subject.simulated_per_s / sent_per_s
    return [
        {"trace": words, **simulated(subject, [time_s / by for time_s in times_s], slo_ms, told=told)}
        for words, by in (("as sent", 1.0), ("as dense as simulated calls allow", denser))
        for told in (False, True)
    ]


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """The trace of each round on all three servers, and in virtual time."""
    texts = options.texts.read_text().splitlines() if options.texts else []
    with ExitStack() as stack:
        folders = stack.enter_context(copies(subject))
        ports = {name: stack.enter_context(Server(folder)).port for name, folder in folders.items()}
        asked = requests_of(subject, ports[ELASTIC], texts)
        wires = {name: stack.enter_context(closing(Wire(port, *asked, None))) for name, port in ports.items()}
        served = {name: Served(wire, subject.crowd, CAPACITY_S) for name, wire in wires.items()}
        slo_ms = options.slo * served["wide"].idle()["p50_ms"]
        best_per_s = saturated_per_s({"saturated": {name: [served[name].saturated()] for name in FIXED}})
        rates_per_s = [share * best_per_s for share in options.shares]
        traces = [trace(rates_per_s, options.every, options.seconds, seed) for seed in range(options.rounds)]
        rounds = [alternate(1, {name: partial(wire.at, times_s) for name, wire in wires.items()}) for times_s in traces]
    tell = partial(facts, slo_ms=slo_ms, shares=options.shares, every_s=options.every)
    return {
        **subject.facts,
        "slo_ms": slo_ms,
        "best_per_s": best_per_s,
        "shares": options.shares,
        "every_s": options.every,
        "seconds": options.seconds,
        "texts": len(texts),
        "rounds": {name: [tell(loads[name][0]) for loads in rounds] for name in served},
        "simulated": [played(subject, times_s[:MOST_SIMULATED], slo_ms, best_per_s) for times_s in traces],
    }


def say_record(record: Mapping[str, Any]) -> None:
    """What was lost and late."""
    say(f"  late is more than {record['slo_ms']:.2f} ms; the shares are of {record['best_per_s']:.1f}/s")
    for name, rounds in record["rounds"].items():
        offered, lost, late = (sum(one[key] for one in rounds) for key in ("offered", "lost", "late"))
        shares = "; ".join(
            f"{share} p50 {median(one['by_share'][share]['p50_ms'] for one in rounds if share in one['by_share']):.2f}"
            for share in rounds[0]["by_share"]
        )
        say(f"  {name:8s} {lost} lost and {late} late of {offered}; in ms at {shares}")
    for each in record["simulated"]:
        for one in each:
            say(
                f"  simulated {one['trace']}, {'with' if one['deadlines'] else 'without'} deadlines: late "
                f"{', '.join(f'{count} {name}' for name, count in one['late'].items())} of {one['requests']}; "
                f"{one['late_only_if_elastic']} of them were in time in {one['better']}, and "
                f"{one['late_only_in_better']} the other way round"
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_artifacts(parser, rounds=2, seconds=40.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.9, 0.4, 0.7], metavar="SHARE")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds of each share (default: 2)")
    parser.add_argument("--slo", type=float, default=3.0, metavar="X", help="of a lone client's p50 (default: 3)")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a text a line, for an artifact that takes texts")


def main(options: argparse.Namespace) -> None:
    """Measure the artifacts; the results of others stay."""
    for folder in options.artifacts:
        subject = subject_of(folder)
        record = measure(subject, options)
        add_results(options.results / "elastic-switch.json", subject.name, record)
        say_record(record)
