"""The rate that an SLO plan promises, held for a minute; three times that rate; and three times the capacity.

    python -m bench slo [resnet50] [--slo-ms 100] [--budget 5m]

Optimizes for the SLO as a user does, then puts the artifact under load as ``corewise loadtest`` does: the promised
rate for 60 s; then, in four alternating rounds, its capacity (a closed loop that always has a full batch waiting),
three times the promised rate for 15 s, and for 15 s three times the capacity, which under a short SLO is far more than
can be promised. What is answered in time is compared with the capacity just before and just after, because the
machine's speed drifts. Writes slo_MODEL.json.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import machine_facts, optimize, say, temporary_workspace, write_results
from bench.subjects import SUBJECTS, add_models
from corewise import artifact, loadtest
from corewise.records.jsonable import to_json
from corewise.records.measurement import LoadRun
from corewise.report.reasons import sentence

LOAD_S, CAPACITY_S, OVERLOAD_S = 60.0, 10.0, 15.0
OVERLOAD, ROUNDS = 3, 4


def answered_per_s(run: LoadRun) -> float:
    """What was answered in a second."""
    return run.answered / run.duration_s


def facts(run: LoadRun) -> dict[str, Any]:
    """The load's record with what follows from it."""
    return {**to_json(run), "goodput_per_s": run.goodput_per_s, "held": run.met}


def load_rounds(
    folder: Path, rate_per_s: float, clients: int, slo_ms: float
) -> tuple[list[LoadRun], list[LoadRun], list[LoadRun]]:
    """The capacity before, between and after the rounds; the overloads; and the floods of each round."""

    def capacity() -> LoadRun:
        return loadtest(folder, clients=clients, duration_s=CAPACITY_S).run

    def overload(per_s: float) -> LoadRun:
        return loadtest(folder, rate_per_s=OVERLOAD * per_s, duration_s=OVERLOAD_S, slo_ms=slo_ms).run

    capacities, overloads, floods = [capacity()], [], []
    for _ in range(ROUNDS):
        overloads.append(overload(rate_per_s))
        floods.append(overload(answered_per_s(capacities[-1])))
        capacities.append(capacity())
    return capacities, overloads, floods


def measure(model: str, slo_ms: float, budget: str, keep: Path | None) -> dict[str, Any]:
    """Optimize and load; the artifact goes into ``keep``."""
    subject = SUBJECTS[model]
    with temporary_workspace() as workspace:
        output = (keep or workspace.folder) / f"{model}.cw"
        summary = optimize(output, subject.model, *subject.options, "--slo-ms", str(slo_ms), "--budget", budget)
        sound = artifact.read(output)
        choice, plan = sound.report.choice, sound.manifest.plan
        if choice.certified is None or choice.certified.rate_per_s is None:
            sys.exit(f"nothing is promised: {sentence(choice.reason)}")
        rate_per_s = choice.certified.rate_per_s
        promised = loadtest(output, rate_per_s=rate_per_s, duration_s=LOAD_S, slo_ms=slo_ms).run
        capacities, overloads, floods = load_rounds(output, rate_per_s, 2 * plan.batch * plan.instances, slo_ms)
    around = [(answered_per_s(before) + answered_per_s(after)) / 2 for before, after in pairwise(capacities)]

    def shares(runs: list[LoadRun]) -> list[float]:
        return [run.goodput_per_s / capacity_per_s for run, capacity_per_s in zip(runs, around, strict=True)]

    return {
        "model": model,
        "slo_ms": slo_ms,
        **machine_facts(),
        "summary": summary,
        "plan": plan.label,
        "promised_per_s": rate_per_s,
        "capacity_per_s": [answered_per_s(run) for run in capacities],
        "capacity": [facts(run) for run in capacities],
        "promised": facts(promised),
        "overload": [facts(run) for run in overloads],
        "overload_goodput_of_capacity": shares(overloads),
        "flood": [facts(run) for run in floods],
        "flood_goodput_of_capacity": shares(floods),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, ("resnet50",))
    parser.add_argument("--slo-ms", type=float, default=100.0)
    parser.add_argument("--budget", default="5m", help="of each search")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the artifact stays")


def main(options: argparse.Namespace) -> None:
    """Measure the models."""
    for model in options.models:
        result = measure(model, options.slo_ms, options.budget, options.keep)
        write_results(options.results / f"slo_{model}.json", result)
        say(f"{model}: {result['summary']['reason']}")
        promised, capacity_per_s = result["promised"], median(result["capacity_per_s"])
        say(f"  promised {result['promised_per_s']:.1f}/s of {capacity_per_s:.1f}/s, {result['plan']}")
        say(f"  held for {LOAD_S:g} s: {promised['held']}")
        say(f"    p99 {promised['p99_ms']:.1f} ms, {promised['refused']} refused")
        for base, name in (("that", "overload"), ("capacity", "flood")):
            shares = ", ".join(f"{share:.0%}" for share in result[f"{name}_goodput_of_capacity"])
            refusal_ms, p99_ms = (max(run[key] for run in result[name]) for key in ("refusal_p99_ms", "p99_ms"))
            say(f"  at {OVERLOAD}x {base}: {shares} of capacity in time")
            say(f"    refusals within {refusal_ms:.2f} ms (p99), answers {p99_ms:.1f} ms")
