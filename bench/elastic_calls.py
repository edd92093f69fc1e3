"""A model that is called in process: an elastic plan and its two layouts alone, from idle to saturated.

    python -m bench elastic_calls ARTIFACT... [--rounds 3] [--seconds 3]

``corewise.load`` opens each artifact three times in one process: with its elastic plan, and with each layout of it.
They take turns, in rounds: one caller of single items (idle), two callers for each instance (saturated), single items
at random times at a third and two thirds of the better layout's saturated rate, and one caller of batches for all
instances. Writes elastic-calls.json: rate, p50 and p99 of each, and the elastic plan's over those of the better layout.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import corewise
from bench.elastic_loads import Figures, in_turns, of_run, over_the_better, say_loads
from bench.elastic_plans import Subject, add_artifacts, copies, subject_of
from bench.harness import add_results, alternate
from corewise.common.stats import quantile
from corewise.records.build import Plan
from corewise.runtime.loadgen import closed_loop, open_loop

Run = Callable[[Sequence[np.ndarray]], Any]
CALLERS = 64
"""Threads that call; more requests than that wait in their queue."""


class Calls:
    """An opened model, called by threads of this process."""

    def __init__(self, model: Any, subject: Subject, callers: ThreadPoolExecutor, seconds: float) -> None:
        self.seconds = seconds
        # Flat, because what is measured is the session: arguments may be nested in any way.
        self._run: Run = model._session.run
        self._plan: Plan = subject.elastic.narrow
        self._callers = callers
        golden, _ = subject.artifact.golden()
        self._single = [array[:1] for array in golden]
        rows = np.resize(np.arange(len(golden[0])), self._plan.batch * self._plan.instances)
        self._batch = [np.ascontiguousarray(array[rows]) for array in golden]

    def warm(self) -> None:
        """Engines compile for a size when they first meet it."""
        for rows in range(1, len(self._batch[0]) + 1):
            self._run([array[:rows] for array in self._batch])

    def idle(self) -> Figures:
        """Single items, one after the other."""
        return self._alone(self._single)

    def batches(self) -> Figures:
        """As many rows as all instances take, one call after the other."""
        return self._alone(self._batch)

    def saturated(self) -> Figures:
        """Two callers for each instance."""
        clients = 2 * self._plan.instances
        return of_run(
            closed_loop(self._submit, plan=self._plan, clients=clients, duration_s=self.seconds, refusal=OSError)
        )

    def at_rate(self, per_s: float) -> Figures:
        """Single items at random times."""
        return of_run(
            open_loop(self._submit, plan=self._plan, rate_per_s=per_s, duration_s=self.seconds, refusal=OSError)
        )

    def _alone(self, inputs: Sequence[np.ndarray]) -> Figures:
        """One caller, without the threads of the others."""
        times_s, end_s = [], time.monotonic() + self.seconds
        while time.monotonic() < end_s or not times_s:
            start_s = time.perf_counter()
            self._run(inputs)
            times_s.append(time.perf_counter() - start_s)
        return {
            "per_s": len(inputs[0]) / median(times_s),
            "p50_ms": 1e3 * quantile(times_s, 0.5),
            "p99_ms": 1e3 * quantile(times_s, 0.99),
        }

    def _submit(self, _: int) -> Any:
        return self._callers.submit(self._run, self._single)


def measure(subject: Subject, rounds: int, seconds: float) -> dict[str, Any]:
    """All loads on the three models."""
    with ExitStack() as stack:
        callers = stack.enter_context(ThreadPoolExecutor(CALLERS))
        folders = stack.enter_context(copies(subject))
        models = {name: stack.enter_context(corewise.load(folder)) for name, folder in folders.items()}
        opened = {name: Calls(model, subject, callers, seconds) for name, model in models.items()}
        for one in opened.values():
            one.warm()
        loads = {
            **in_turns(rounds, opened),
            "batches": alternate(rounds, {name: partial(one.batches) for name, one in opened.items()}),
        }
    return {**subject.facts, "loads": loads, "over": over_the_better(loads)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_artifacts(parser, rounds=3, seconds=3.0)


def main(options: argparse.Namespace) -> None:
    """Measure the artifacts; the results of others stay."""
    for folder in options.artifacts:
        subject = subject_of(folder)
        record = measure(subject, options.rounds, options.seconds)
        add_results(options.results / "elastic-calls.json", subject.name, record)
        say_loads(record["loads"], record["over"])
