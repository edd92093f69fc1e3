"""The server's queue without a network: an elastic plan and its two layouts alone, from idle to saturated.

    python -m bench elastic_queue ARTIFACT... [--rounds 4] [--seconds 4]

Requests of one row share calls. Each way runs in a process with its engine and the sender, and they take turns, in
rounds: one client (idle), two full calls for each instance (saturated), and requests at random times at a third and two
thirds of the better layout's saturated rate. Writes elastic-queue.json: rate, p50 and p99 of each, and the elastic
plan's over those of the better layout. ``elastic_curve`` is the same over HTTP, with the client in its own process.
"""

import argparse
from typing import Any

from bench.elastic_loads import in_turns, over_the_better, queues, say_loads
from bench.elastic_plans import Subject, add_artifacts, subject_of
from bench.harness import add_results


def measure(subject: Subject, rounds: int, seconds: float) -> dict[str, Any]:
    """All loads on the three queues."""
    with queues(subject, seconds) as opened:
        loads = in_turns(rounds, opened)
    return {**subject.facts, "loads": loads, "over": over_the_better(loads)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_artifacts(parser, rounds=4, seconds=4.0)


def main(options: argparse.Namespace) -> None:
    """Measure the artifacts; the results of others stay."""
    for folder in options.artifacts:
        subject = subject_of(folder)
        record = measure(subject, options.rounds, options.seconds)
        add_results(options.results / "elastic-queue.json", subject.name, record)
        say_loads(record["loads"], record["over"])
