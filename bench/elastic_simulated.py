"""Elastic plans on machines that are not here: published times divided, and how long decisions take.

    python -m bench elastic_simulated

Divides batches of BERT on 16, 32 and 64 cores by published times, and times the decisions of ``corewise.load`` and of
the server's queue. Writes elastic-simulated.json.
"""

import argparse
import time
from itertools import count
from math import inf
from statistics import median
from typing import Any

import numpy as np

from bench.harness import say, write_results
from bench.published import alone_s, bert_partitions
from corewise.batching import ElasticPolicy, ElasticQueue, ElasticTables, Partitions, Request
from corewise.common.stats import quantile

DECISIONS, WAITING, CORES = 200, 1000, 64


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
    """What the command line takes: nothing of its own."""


def main(options: argparse.Namespace) -> None:
    """Simulate."""
    record = simulate()
    write_results(options.results / "elastic-simulated.json", record)
    for cores, gains in record["alone_over_divided"].items():
        say(f"{cores} cores: " + ", ".join(f"{gain:.2f}x at batch {rows}" for rows, gain in gains.items()))
    say(f"a decision takes {record['decision_us']['median']:.0f} us, p99 {record['decision_us']['p99']:.0f} us")
    for queue, times_us in record["queue_us"].items():
        words = (f"{name} {us['median']:.0f} us, p99 {us['p99']:.0f} us" for name, us in times_us.items())
        say(f"{queue}: {'; '.join(words)}")
