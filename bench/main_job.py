"""The main job: optimize within a budget, then race the artifact against the engines used by hand.

    python bench/main_job.py [resnet50 mobilenet_v2 minilm_128 vit_s resnet20] [--objective latency] [--rounds 12]

Whoever uses an engine by hand takes its defaults, and here also the faster of two batches (for latency, 1).
Writes bench/results/main_job_MODEL.json (latency_MODEL.json): the machine, the report's summary, and every contender's
rate in every alternating round; and at last the geometric means over the five models. Needs the data folder
(COREWISE_DATA or ../shared/data). vit_s has random weights, so its accuracy gate lets all pass.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from hand import CONTENDERS, engine_build  # noqa: E402
from subjects import FIVE, ROOT, SUBJECTS, prepare, starter  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.common.errors import CorewiseError  # noqa: E402
from corewise.common.stats import ratio_interval  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Plan  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.runtime.race import Contender, ContenderFailed, race  # noqa: E402
from corewise.runtime.worker import HOLDOUT  # noqa: E402

RESULTS = HERE / "results"
BATCHES = (4, 32)
NAMES = {"throughput": "main_job", "latency": "latency"}
"""How the files of an objective's results begin."""


def optimize(model: str, output: Path, objective: str, budget: str) -> dict[str, Any]:
    """Run the command that a user types and return its summary."""
    subject = SUBJECTS[model]
    command = [sys.executable, "-m", "corewise.cli", "optimize", subject.model, *subject.options]
    if "--max-drop" not in command:
        command += ["--max-drop", "0.01"]
    command += ["--objective", objective, "--budget", budget, "-o", str(output), "--json"]
    print("$", " ".join(command[2:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def by_hand(
    model: str, work: Path, batches: tuple[int, ...], start: Any, threads: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every contender, built and at its fastest batch; and of those that cannot do the model the reasons."""
    contenders, failed = {}, {}
    for name in CONTENDERS:
        build = engine_build(name, SUBJECTS[model].model)
        payload = work / "hand" / build.engine.replace(":", "_")
        payload.mkdir(parents=True)
        arguments = {"build": to_json(build), "folder": str(payload)}
        try:
            with start(build) as worker:
                worker.call("build", "building", material=str(work), **arguments)
                rates = {}
                for batch in batches:
                    plan = Plan(threads_per_instance=threads, batch=batch)
                    worker.call("open", "opening", plan=to_json(plan), **arguments)
                    worker.call("enter_race", "running", samples=str(work / HOLDOUT), batch=batch, budget_s=0.5)
                    rates[plan] = worker.call("round", "running", budget_s=0.5)["per_s"]
        except CorewiseError as error:
            failed[name] = str(error)[:300]
            print(f"  {name}: {error}"[:200], flush=True)
            continue
        contenders[name] = Contender(build=build, plan=max(rates, key=lambda one: rates[one]), payload=payload)
    return contenders, failed


def run(model: str, objective: str, budget: str, rounds: int) -> dict[str, Any]:
    """Optimize one model and race the result."""
    cpu = inspect_cpu()
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as name:
        work = Path(name)
        output = work / f"{model}.cw"
        summary = optimize(model, output, objective, budget)
        made = artifact.read(output)
        plan = made.manifest.plan
        prepare(work, SUBJECTS[model], cpu)
        start = starter(work)
        batches = (1,) if objective == "latency" else BATCHES
        contenders, failed = by_hand(model, work, batches, start, cpu.usable_cores)
        contenders["corewise"] = Contender(build=made.manifest.build, plan=plan, payload=output / artifact.PAYLOAD)
        try:
            done = race(tuple(contenders.values()), samples=str(work / HOLDOUT), start=start, rounds=rounds)
        except ContenderFailed as fell:
            sys.exit(f"{fell.build.engine} fell: {fell}")
    rates = dict(zip(contenders, (one.per_s for one in done.rates), strict=True))
    ratios = {name: ratio_interval(rates["corewise"], per_s) for name, per_s in rates.items() if name != "corewise"}
    return {
        "model": model,
        "objective": objective,
        "budget": budget,
        "cpu": to_json(cpu),
        "versions": to_json(made.manifest.versions),
        "summary": summary,
        "plans": {name: one.plan.label for name, one in contenders.items()},
        "rates_per_s": to_json(rates),
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
        "failed": failed,
    }


def geometric_means(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of corewise's speed over each contender's, over the models that it can do."""
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for result in results:
        for name, ratio in result["ratios"].items():
            ratios[name][result["model"]] = ratio["value"]
        best = min(result["ratios"].values(), key=lambda ratio: ratio["value"])
        ratios["the fastest of them"][result["model"]] = best["value"]
    return {name: {"geometric_mean": geometric_mean(found.values()), "models": found} for name, found in ratios.items()}


def main() -> None:
    """Run the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(FIVE), help=", ".join(SUBJECTS))
    parser.add_argument("--objective", choices=tuple(NAMES), default="throughput")
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if unknown := set(options.models) - set(SUBJECTS):
        parser.error(f"there is no model {', '.join(unknown)}")
    stem = NAMES[options.objective]
    for model in options.models:
        result = run(model, options.objective, options.budget, options.rounds)
        path = RESULTS / f"{stem}_{model}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{model}: {result['summary']['reason']}")
        for name, per_s in result["rates_per_s"].items():
            ratio = result["ratios"].get(name)
            told = f"corewise is {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
            print(f"  {name:36s} {median(per_s):8.1f}/s  {result['plans'][name]:26s} {told}")
        print(f"written to {path}", flush=True)
    files = [RESULTS / f"{stem}_{model}.json" for model in FIVE]
    found = [json.loads(path.read_text()) for path in files if path.exists()]
    means = geometric_means([one for one in found if one.get("objective") == options.objective])
    (RESULTS / f"{stem}_means.json").write_text(json.dumps(means, indent=1) + "\n")
    print(f"\n{'geometric means of corewise over':40s}")
    for name, one in means.items():
        print(f"  {name:36s} {one['geometric_mean']:.2f}x of {len(one['models'])} models")


if __name__ == "__main__":
    main()
