"""What a small budget finds of what a large one does.

    python -m bench small_budget [MODEL ...] [--budgets 20s,60s,5m] [--rounds 12]

Each model is optimized from nothing under each budget. Then the artifacts race each other and eager PyTorch, in
alternating rounds. Writes small_budget.json: for every budget the winner, its plan, the seconds that it took and its
rates, and the ratio of each budget's winner to that of the largest and to eager PyTorch, with 95 % intervals. A budget
under which nothing was found counts as eager PyTorch, with the message. Run it on a quiet machine.

DistilBERT, EfficientNet-Lite0 and the U-Net have random weights: of their gates only the floors hold.
"""

import argparse
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import TIMEOUT_S, add_results, optimize, ratio_data, ratio_words, say, starter, temporary_workspace
from bench.subjects import SUBJECTS, Subject, add_models, prepare
from corewise import artifact
from corewise.cli.quantities import duration
from corewise.common.stats import ratio_interval
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.measurement import Rates
from corewise.runtime.race import Contender, run_race
from corewise.runtime.workspace import Workspace

SIX = ("mobilenet_v2", "resnet50", "minilm", "distilbert", "efficientnet_lite0", "unet")
EAGER = Build(engine="eager", precision="fp32")
"""The baseline."""


def search(subject: Subject, budget: str, output: Path) -> dict[str, Any]:
    """One search as a user runs it; its winner, or why there is none."""
    drop = () if "--max-drop" in subject.options else ("--max-drop", "0.01")
    start_s = time.monotonic()
    try:
        summary = optimize(output, subject.model, *subject.options, *drop, "--budget", budget)
    except subprocess.CalledProcessError as error:
        return {"budget": budget, "wall_s": time.monotonic() - start_s, "exit_code": error.returncode}
    manifest = artifact.read(output).manifest
    return {
        "budget": budget,
        "wall_s": time.monotonic() - start_s,
        "exit_code": 0,
        "winner": manifest.build.label,
        "plan": manifest.plan.label,
        "summary": summary,
    }


def race(workspace: Workspace, subject: Subject, found: dict[str, Path], rounds: int) -> tuple[Rates, ...]:
    """Eager PyTorch, then the artifacts that were found, in alternating rounds."""
    cpu = inspect_cpu()
    prepare(workspace, subject, cpu)
    start = starter(workspace, cpu, TIMEOUT_S)
    eager = workspace.empty_payload(EAGER)
    with start(EAGER) as worker:
        worker.build(workspace, EAGER, eager)
    contenders = [Contender(build=EAGER, plan=Plan(threads_per_instance=cpu.usable_cores, batch=4), payload=eager)]
    for folder in found.values():
        manifest = artifact.read(folder).manifest
        contenders.append(
            Contender(build=manifest.build, plan=manifest.plan, payload=(folder / artifact.PAYLOAD).absolute())
        )
    return run_race(contenders, samples=workspace.holdout, start=start, rounds=rounds).rates


def measure(model: str, budgets: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Search under each budget, and race what was found."""
    subject = SUBJECTS[model]
    with temporary_workspace() as workspace:
        outputs = {budget: workspace.folder / f"{budget}.cw" for budget in budgets}
        searches = {budget: search(subject, budget, output) for budget, output in outputs.items()}
        found = {budget: output for budget, output in outputs.items() if searches[budget]["exit_code"] == 0}
        eager, *raced = race(workspace, subject, found, rounds)
    rates = dict.fromkeys(budgets, eager) | dict(zip(found, raced, strict=True))
    largest = rates[max(budgets, key=partial(duration, "--budgets"))]
    for budget, record in searches.items():
        record["per_s"] = list(rates[budget].per_s)
        record["of_the_largest"] = ratio_data(ratio_interval(rates[budget].per_s, largest.per_s))
        record["over_eager"] = ratio_data(ratio_interval(rates[budget].per_s, eager.per_s))
    cpu = inspect_cpu()
    return {"cpu": cpu.model, "isa": list(cpu.isa), "eager_per_s": list(eager.per_s), "searches": searches}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, SIX)
    parser.add_argument("--budgets", default="20s,60s,5m", help="comma-separated, as --budget takes them")
    parser.add_argument("--rounds", type=int, default=12)


def main(options: argparse.Namespace) -> None:
    """Measure the models; the results of others in the file stay."""
    budgets = tuple(options.budgets.split(","))
    for model in options.models:
        record = measure(model, budgets, options.rounds)
        add_results(options.results / "small_budget.json", model, record)
        say(f"\n{model}")
        for budget, found in record["searches"].items():
            winner = found.get("winner", "nothing found, so eager")
            say(f"  {budget:>5s}  {found['wall_s']:4.0f} s  {ratio_words(found['of_the_largest'])} of the largest, ")
            say(f"         {ratio_words(found['over_eager'])} over eager: {winner}")
