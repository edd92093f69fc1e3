"""Whether the search finds the plan that an exhaustive sweep finds, and in how much of its time.

    python -m bench plans [resnet50 mobilenet_v2 minilm_128 vit_s resnet20] [--rounds 12]

Each model gets one int8 build. The search of plans runs on it as ``optimize`` runs it, and so does a sweep over 1 to 2
threads a core x 1 to 2 instances a core x 7 batches, with the same measurement. Then the plan that the search chose is
raced, alternating, against the sweep's three fastest, because among many plans the one that was measured to be the
fastest was partly lucky. Writes plans.json: every measurement, both times, and the ratios with their 95 % intervals.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

from bench.harness import TIMEOUT_S, add_results, ratio_data, ratio_words, say, temporary_workspace
from bench.subjects import FIVE, SUBJECTS, add_models, prepare
from corewise.common.errors import CorewiseError
from corewise.common.stats import ratio_interval
from corewise.engines import qdq
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Throughput
from corewise.records.jsonable import to_json
from corewise.records.measurement import Measurement
from corewise.records.reason import Reason
from corewise.report.reasons import sentence
from corewise.runtime.race import Contender, run_race
from corewise.search.candidates import layouts
from corewise.search.plans import BATCHES, PlanRequest, drive, strategy
from corewise.search.trial import SearchContext, measure_plan

ENGINES = {"minilm_128": "onnxruntime", "vit_s": "onnxruntime"}
"""The engine of the build whose plans are searched; openvino for other models."""
SWEPT = Reason.text("the sweep")
RIVALS = 3


def sweep_plans(cpu: Cpu) -> list[Plan]:
    """Every plan of up to two threads a core."""
    most = 2 * cpu.usable_cores
    return [
        Plan(threads_per_instance=threads, instances=instances, batch=batch)
        for threads, instances, batch in product(range(1, most + 1), range(1, most + 1), BATCHES)
        if threads * instances <= most
    ]


def search(build: Build, context: SearchContext) -> tuple[list[Measurement], float]:
    """What the search measured, and its seconds. A plan that was measured twice is listed twice, then pooled."""
    start_s = time.monotonic()
    with context.client(build) as client:

        def measure_next(request: PlanRequest) -> Measurement:
            return measure_plan(build, context, client, request.plan, Reason.of(request.why))

        steps = drive(strategy(Throughput(), layouts(context.cpu, build)), (), measure_next)
        measurements = [step for step in steps if isinstance(step, Measurement)]
    return measurements, time.monotonic() - start_s


def sweep(build: Build, context: SearchContext) -> tuple[list[Measurement], dict[str, str], float]:
    """What the sweep measured, which plans failed and why, and its seconds."""
    start_s = time.monotonic()
    measurements, failed = [], {}
    with context.client(build) as client:
        for plan in sweep_plans(context.cpu):
            try:
                measurements.append(measure_plan(build, context, client, plan, SWEPT))
            except CorewiseError as error:  # e.g. OpenVINO, for more instances than cores
                failed[plan.label] = str(error)
    return measurements, failed, time.monotonic() - start_s


def fastest_first(measurements: Sequence[Measurement]) -> list[Plan]:
    """The plans by their last measurement."""
    last = {measurement.plan: measurement for measurement in measurements}
    return sorted(last, key=lambda plan: -last[plan].throughput_per_s)


def row(measurement: Measurement) -> dict[str, Any]:
    """A measurement without its single calls."""
    return {
        "plan": to_json(measurement.plan),
        "per_s": measurement.throughput_per_s,
        "p50_ms": measurement.p50_ms,
        "why": sentence(measurement.why) if measurement.why else "",
    }


def race_plans(build: Build, plans: Sequence[Plan], context: SearchContext, rounds: int) -> dict[str, Any]:
    """The first plan, which the search chose, against the others."""
    payload = context.workspace.payload(build)
    race = run_race(
        [Contender(build=build, plan=plan, payload=payload) for plan in plans],
        samples=context.workspace.holdout,
        start=context.client,
        rounds=rounds,
    )
    chosen, *rivals = race.rates
    ratios = [ratio_interval(chosen.per_s, rates.per_s) for rates in rivals]
    return {
        "race": {
            rates.plan.label: {"per_s": list(rates.per_s), "chosen_over_it": ratio_data(ratio)}
            for rates, ratio in zip(rivals, ratios, strict=True)
        }
        | {chosen.plan.label: {"per_s": list(chosen.per_s)}},
        "chosen_over_the_best": ratio_data(min(ratios, key=lambda ratio: ratio.value)),
    }


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Both ways on one build, and the race of what they found."""
    cpu = inspect_cpu()
    build = qdq.int8(ENGINES.get(model, "openvino"), cpu)
    with temporary_workspace() as workspace:
        prepare(workspace, SUBJECTS[model], cpu)
        context = SearchContext(
            workspace=workspace,
            plan=Plan(threads_per_instance=cpu.usable_cores),
            cpu=cpu,
            timeout_s=TIMEOUT_S,
            verify=lambda outputs: sys.exit("nothing is verified here"),
            on_event=lambda event: None,
        )
        with context.client(build) as client:
            client.build(workspace, build, workspace.empty_payload(build))
        searched, search_s = search(build, context)
        swept, failed, sweep_s = sweep(build, context)
        chosen, ranked = fastest_first(searched)[0], fastest_first(swept)
        rivals = [plan for plan in ranked if plan != chosen][:RIVALS]
        race = race_plans(build, (chosen, *rivals), context, rounds)
    return {
        "build": build.label,
        "search": {"seconds": search_s, "plans": [row(step) for step in searched], "chosen": chosen.label},
        "sweep": {
            "seconds": sweep_s,
            "plans": [row(step) for step in swept],
            "unable": failed,
            "best": ranked[0].label,
        },
        "time_share": search_s / sweep_s,
        **race,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, FIVE)
    parser.add_argument("--rounds", type=int, default=12)


def main(options: argparse.Namespace) -> None:
    """Measure the models; the results of others in the file stay."""
    for model in options.models:
        record = measure(model, options.rounds)
        add_results(options.results / "plans.json", model, record)
        searched, swept = record["search"], record["sweep"]
        say(f"\n{model}, {record['build']}")
        say(f"  search  {len(searched['plans']):3d} plans, {searched['seconds']:5.0f} s: {searched['chosen']}")
        say(f"  sweep   {len(swept['plans']):3d} plans, {swept['seconds']:5.0f} s: {swept['best']}")
        for label, rates in record["race"].items():
            say(f"  race    {label:28s} {median(rates['per_s']):8.1f}/s")
        ratio = ratio_words(record["chosen_over_the_best"])
        say(f"  {ratio} of the best, in {record['time_share']:.0%} of the time")
