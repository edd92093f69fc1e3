"""Loads on the ways that ``elastic_plans`` tells: from idle to saturated in turns, and what came of them.

Whatever is loaded is a ``Loaded``: here the server's queue in a process with its engine, and a server over HTTP.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from bench.elastic_plans import ELASTIC, FIXED, Subject, Way
from bench.harness import TIMEOUT_S, alternate, ratio_data, ratio_words, say
from bench.wire import Load, Wire
from corewise.artifact.open import golden_samples
from corewise.common.stats import ratio_interval
from corewise.records.measurement import LoadRun
from corewise.runtime.client import Worker

Figures = dict[str, Any]
Loads = dict[str, dict[str, list[Figures]]]
"""By the load and by whoever had it, a figure for each round."""
SHARES = {"a third": 1 / 3, "two thirds": 2 / 3}
"""Loads at random times, as shares of what the better layout does when it is saturated."""
OVERRUN = 1.5
"""A load that lasts so many times as long as it should was too much."""
CALLS = {"per_s": max, "p50_ms": min, "p99_ms": min}
"""What a load tells, and which is better."""


class Loaded(Protocol):
    """Something that answers requests of one row."""

    seconds: float
    """How long each load lasts."""

    def idle(self) -> Figures:
        """One client, one request after the other."""
        ...

    def saturated(self) -> Figures:
        """More clients than it can answer at a time."""
        ...

    def at_rate(self, per_s: float) -> Figures:
        """Requests at random times."""
        ...


def in_turns(
    rounds: int,
    ways: Mapping[str, Loaded],
    others: Mapping[str, Loaded] | None = None,
    shares: Mapping[str, float] = SHARES,
) -> Loads:
    """All loads on the three ways, and those at random times on others too. Who is overrun gets no further rate."""
    loads: Loads = {
        load: alternate(rounds, {name: getattr(one, load) for name, one in ways.items()})
        for load in ("idle", "saturated")
    }
    best_per_s, able = saturated_per_s(loads), {**ways, **(others or {})}
    for load, share in sorted(shares.items(), key=lambda pair: pair[1]):
        loads[load] = alternate(rounds, {name: partial(one.at_rate, share * best_per_s) for name, one in able.items()})
        able = {
            name: one
            for name, one in able.items()
            if all(run["seconds"] < OVERRUN * one.seconds for run in loads[load][name])
        }
    return loads


def saturated_per_s(loads: Loads) -> float:
    """What the better layout does when it is saturated."""
    return max(median(run["per_s"] for run in loads["saturated"][name]) for name in FIXED)


def of_run(run: LoadRun) -> Figures:
    """What corewise's load generator says."""
    return {
        "per_s": run.answered / run.duration_s,
        "p50_ms": run.p50_ms,
        "p99_ms": run.p99_ms,
        "failed": run.failed,
        "sender_late_p99_ms": run.sender_late_p99_ms,
        "seconds": run.duration_s,
    }


def of_wire(load: Load) -> Figures:
    """What the benchmarks' client says."""
    facts = load.facts()
    return {"per_s": facts["answered_per_s"], **facts}


def over_the_better(loads: Loads) -> dict[str, dict[str, Any]]:
    """For each load the elastic plan's figures over those of the layout that is better in each of them."""
    found: dict[str, dict[str, Any]] = {}
    for load, by_name in loads.items():
        found[load] = {}
        for key, better_of in CALLS.items():
            values = {name: [run[key] for run in by_name.get(name, ())] for name in (ELASTIC, *FIXED)}
            known = {name: rounds for name, rounds in values.items() if rounds and all(rounds)}
            layouts = [name for name in FIXED if name in known]
            if layouts and ELASTIC in known:
                better = better_of(layouts, key=lambda name: median(known[name]))
                ratio = ratio_interval(known[ELASTIC], known[better])
                found[load][key] = {"layout": better, **ratio_data(ratio)}
    return found


def say_loads(loads: Loads, over: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each load and whoever had it, and one for the elastic plan over the better layout."""
    for load, by_name in loads.items():
        for name, runs in by_name.items():
            told = {key: [run[key] for run in runs if run[key] is not None] for key in CALLS}
            per_s, p50_ms, p99_ms = (median(values) if values else 0.0 for values in told.values())
            say(f"  {load:12s} {name:24s} {per_s:9.1f}/s  p50 {p50_ms:8.2f} ms  p99 {p99_ms:8.2f} ms")
        words = (f"{key} {ratio_words(ratio)} of {ratio['layout']}'s" for key, ratio in over.get(load, {}).items())
        say(f"  {load:12s} elastic: {'; '.join(words)}")


class Queue:
    """The server's queue, in one process with the engine and the sender."""

    def __init__(self, worker: Worker, samples: Path, way: Way, crowd: int, seconds: float) -> None:
        self.seconds = seconds
        self._worker, self._samples, self._way, self._crowd = worker, samples, way, crowd

    def idle(self) -> Figures:
        """As of ``Loaded``."""
        return of_run(self.load(clients=1, duration_s=self.seconds))

    def saturated(self) -> Figures:
        """As of ``Loaded``."""
        return of_run(self.load(clients=self._crowd, duration_s=self.seconds))

    def at_rate(self, per_s: float) -> Figures:
        """As of ``Loaded``."""
        return of_run(self.load(rate_per_s=per_s, duration_s=self.seconds))

    def load(self, way: Way | None = None, **told: Any) -> LoadRun:
        """As of ``Client``; ``way`` has other batches of the same layouts."""
        way = way or self._way
        return self._worker.load(self._samples, way.plan, way.table, elastic=way.tables, **told)


@contextmanager
def queues(subject: Subject, seconds: float) -> Iterator[dict[str, Queue]]:
    """The queue of each way, in a process each."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corewise-bench-")))
        golden_samples(subject.artifact).save(samples := folder / "golden.safetensors")
        opened = {}
        for name, way in subject.ways.items():
            worker = stack.enter_context(Worker(cpu=subject.cpu, log=folder / f"{name}.log", timeout_s=TIMEOUT_S))
            worker.open(subject.payload, subject.artifact.manifest.build, way.plan, way.wide)
            opened[name] = Queue(worker, samples, way, subject.crowd, seconds)
        yield opened


class Served:
    """A server over HTTP, loaded by a client in this process."""

    def __init__(self, wire: Wire, crowd: int, seconds: float) -> None:
        """Makes connections, and has calls of many sizes run."""
        self.wire, self.seconds = wire, seconds
        self._crowd = crowd
        wire.closed(crowd, min(1.0, seconds))

    def idle(self) -> Figures:
        """As of ``Loaded``."""
        return of_wire(self.wire.closed(1, self.seconds))

    def saturated(self) -> Figures:
        """As of ``Loaded``."""
        return of_wire(self.wire.closed(self._crowd, self.seconds))

    def at_rate(self, per_s: float) -> Figures:
        """As of ``Loaded``."""
        return of_wire(self.wire.open(per_s, self.seconds))
