"""The main job: optimize within a budget, then race the artifact against the engines used by hand.

    python -m bench main_job [resnet50 mobilenet_v2 minilm_128 vit_s resnet20] [--objective latency] [--rounds 12]

An engine used by hand has its defaults, and here also the faster of two batches (for latency, 1). Writes
main_job_MODEL.json (latency_MODEL.json): the machine, the report's summary, and every contender's rate in every
alternating round; and at last the geometric means over the five models. Needs the data folder (COREWISE_DATA or
../shared/data). vit_s has random weights, so its accuracy gate lets every build pass.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from bench import by_hand
from bench.harness import (
    machine_facts,
    optimize,
    ratio_data,
    read_results,
    say,
    starter,
    temporary_workspace,
    write_results,
)
from bench.subjects import FIVE, SUBJECTS, Subject, add_models, prepare
from corewise import artifact
from corewise.common.errors import CorewiseError
from corewise.common.stats import ratio_interval
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.jsonable import to_json
from corewise.runtime.race import Contender, ContenderFailed, run_race
from corewise.runtime.workspace import Workspace

BATCHES = (4, 32)
STEMS = {"throughput": "main_job", "latency": "latency"}
"""How the files of an objective's results begin."""
CHOOSE_S = 0.5


def optimize_options(subject: Subject, objective: str, budget: str) -> tuple[str, ...]:
    """What ``corewise optimize`` is given beside the model."""
    drop = () if "--max-drop" in subject.options else ("--max-drop", "0.01")
    return (*subject.options, *drop, "--objective", objective, "--budget", budget)


def at_fastest_batch(workspace: Workspace, build: Build, batches: Sequence[int], cpu: Cpu) -> Contender:
    """Build a contender and choose its batch. Raises ``CorewiseError`` if it cannot run the model."""
    payload = workspace.empty_payload(build)
    rates = {}
    with starter(workspace, cpu)(build) as worker:
        worker.build(workspace, build, payload)
        for batch in batches:
            plan = Plan(threads_per_instance=cpu.usable_cores, batch=batch)
            worker.open(payload, build, plan)
            worker.warm_up(workspace.holdout, batch, CHOOSE_S)
            rates[plan] = worker.run_round(CHOOSE_S).per_s
    return Contender(build=build, plan=max(rates, key=lambda plan: rates[plan]), payload=payload)


def contenders_by_hand(
    workspace: Workspace, model: str, batches: Sequence[int], cpu: Cpu
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every contender that can run the model, and why each other one cannot."""
    contenders, failed = {}, {}
    for name in by_hand.CONTENDERS:
        try:
            build = by_hand.engine_build(name, SUBJECTS[model].model)
            contenders[name] = at_fastest_batch(workspace, build, batches, cpu)
        except CorewiseError as error:
            failed[name] = str(error)[:300]
            say(f"  {name}: {error}"[:200])
    return contenders, failed


def measure(model: str, objective: str, budget: str, rounds: int) -> dict[str, Any]:
    """Optimize one model and race the result."""
    cpu, subject = inspect_cpu(), SUBJECTS[model]
    with temporary_workspace() as workspace:
        output = workspace.folder / f"{model}.cw"
        summary = optimize(output, subject.model, *optimize_options(subject, objective, budget))
        manifest = artifact.read(output).manifest
        prepare(workspace, subject, cpu)
        contenders, failed = contenders_by_hand(workspace, model, (1,) if objective == "latency" else BATCHES, cpu)
        contenders["corewise"] = Contender(build=manifest.build, plan=manifest.plan, payload=output / artifact.PAYLOAD)
        try:
            race = run_race(
                tuple(contenders.values()), samples=workspace.holdout, start=starter(workspace, cpu), rounds=rounds
            )
        except ContenderFailed as error:
            sys.exit(f"a contender failed in the race: {error}")
    rates = {name: list(contender.per_s) for name, contender in zip(contenders, race.rates, strict=True)}
    return {
        "model": model,
        "objective": objective,
        "budget": budget,
        **machine_facts(),
        "versions": to_json(manifest.versions),
        "summary": summary,
        "plans": {name: contender.plan.label for name, contender in contenders.items()},
        "rates_per_s": rates,
        "ratios": {
            name: ratio_data(ratio_interval(rates["corewise"], per_s))
            for name, per_s in rates.items()
            if name != "corewise"
        },
        "failed": failed,
    }


def geometric_means(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of corewise's speed over each contender's, over the models that it can do."""
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        for name, ratio in result["ratios"].items():
            ratios[name][result["model"]] = ratio["value"]
        best = min(result["ratios"].values(), key=lambda ratio: ratio["value"])
        ratios["the fastest of them"][result["model"]] = best["value"]
    return {
        name: {"geometric_mean": geometric_mean(models.values()), "models": models} for name, models in ratios.items()
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, FIVE)
    parser.add_argument("--objective", choices=tuple(STEMS), default="throughput")
    parser.add_argument("--budget", default="5m", help="of each search")
    parser.add_argument("--rounds", type=int, default=12)


def main(options: argparse.Namespace) -> None:
    """Measure the models, then the means over all that have results."""
    stem = STEMS[options.objective]
    for model in options.models:
        result = measure(model, options.objective, options.budget, options.rounds)
        write_results(options.results / f"{stem}_{model}.json", result)
        say(f"\n{model}: {result['summary']['reason']}")
        for name, per_s in result["rates_per_s"].items():
            say(f"  {name:36s} {median(per_s):8.1f}/s  {result['plans'][name]:26s} {_ratio(result, name)}")
    write_means(options.results, stem)


def write_means(folder: Path, stem: str) -> None:
    """The geometric means over the five models, as far as they have results."""
    results = [result for model in FIVE if (result := read_results(folder / f"{stem}_{model}.json"))]
    if not results:
        return
    means = geometric_means(results)
    write_results(folder / f"{stem}_means.json", means)
    say(f"\n{'geometric means of corewise over':40s}")
    for name, mean in means.items():
        say(f"  {name:36s} {mean['geometric_mean']:.2f}x of {len(mean['models'])} models")


def _ratio(result: dict[str, Any], name: str) -> str:
    ratio = result["ratios"].get(name)
    return f"corewise is {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
