"""Whether the search finds the plan that an exhaustive sweep finds, and in how much of its time.

    python bench/plans.py [resnet50 mobilenet_v2 minilm_128 vit_s resnet20] [--rounds 12]

For each model one int8 build is made; then the search of plans runs on it as ``optimize`` runs it, and a sweep over
1 to 2 threads a core x 1 to 2 instances a core x 7 batches, both with the same measurement. The plans that either calls
the fastest are raced, alternating, with the sweep's next two, for among many plans the fastest measured is partly luck.
Writes bench/results/plans.json: every measurement, both times, and the ratios with their 95 % intervals.
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import FIVE, SUBJECTS, TIMEOUT_S, prepare  # noqa: E402

from corewise.common.errors import CorewiseError  # noqa: E402
from corewise.common.stats import ratio_interval  # noqa: E402
from corewise.engines import qdq  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Plan  # noqa: E402
from corewise.records.cpu import Cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.records.measurement import Measurement  # noqa: E402
from corewise.runtime.race import Contender, race  # noqa: E402
from corewise.search.candidates import shapes  # noqa: E402
from corewise.search.plans import BATCHES, PlanRequest, drive, strategy  # noqa: E402
from corewise.search.trial import SearchContext, measured  # noqa: E402

ENGINES = {"resnet50": "openvino", "mobilenet_v2": "openvino", "minilm_128": "onnxruntime", "vit_s": "onnxruntime"}
"""Of the build whose plans are searched; else openvino."""
RESULTS = HERE / "results" / "plans.json"


def sweep(cpu: Cpu) -> list[Plan]:
    """Every plan of up to two threads a core."""
    most = 2 * cpu.usable_cores
    return [
        Plan(threads_per_instance=threads, instances=instances, batch=batch)
        for threads, instances, batch in product(range(1, most + 1), range(1, most + 1), BATCHES)
        if threads * instances <= most
    ]


def row(one: Measurement) -> dict[str, Any]:
    """A measurement without its single calls."""
    return {"plan": to_json(one.plan), "per_s": one.throughput_per_s, "p50_ms": one.p50_ms, "why": one.why}


def run(model: str, rounds: int) -> dict[str, Any]:
    """Both ways on one build, and the race of what they found."""
    cpu = inspect_cpu()
    name = ENGINES.get(model, "openvino")
    build = qdq.int8(name, cpu)
    with tempfile.TemporaryDirectory(prefix="corewise-plans-") as folder:
        work = Path(folder)
        prepare(work, SUBJECTS[model], cpu)
        (work / "logs").mkdir()
        setting = SearchContext(
            folder=work,
            plan=Plan(threads_per_instance=cpu.usable_cores),
            cpu=cpu,
            timeout_s=TIMEOUT_S,
            verify=lambda outputs: sys.exit("nothing is verified here"),
            tell=lambda event: None,
        )
        payload = setting.payload(build)
        payload.mkdir(parents=True)
        with setting.worker(build) as worker:
            worker.call("build", "building", material=str(work), build=to_json(build), folder=str(payload))

        started_s = time.monotonic()
        found: list[Measurement] = []  # a plan that was measured twice is there twice, the second time with both
        with setting.worker(build) as worker:

            def measure(wanted: PlanRequest) -> Measurement:
                return measured(build, setting, worker, wanted.plan, wanted.why)

            for one in drive(strategy("throughput", shapes(cpu, build)), (), measure):
                if isinstance(one, Measurement):
                    found.append(one)
        search_s, started_s = time.monotonic() - started_s, time.monotonic()
        swept, unable = [], {}
        with setting.worker(build) as worker:
            for plan in sweep(cpu):
                try:
                    swept.append(measured(build, setting, worker, plan))
                except CorewiseError as error:  # e.g. OpenVINO, for more instances than cores
                    unable[plan.label] = str(error)
        sweep_s = time.monotonic() - started_s

        last = {one.plan: one for one in found}
        chosen = max(last.values(), key=lambda one: one.throughput_per_s).plan
        ranked = [one.plan for one in sorted(swept, key=lambda one: -one.throughput_per_s)]
        rivals = [plan for plan in ranked if plan != chosen][:3]
        contenders = [Contender(build=build, plan=plan, payload=payload) for plan in (chosen, *rivals)]
        done = race(contenders, samples=setting.holdout, start=setting.worker, rounds=rounds)
    ours, *theirs = (one.per_s for one in done.rates)
    ratios = [ratio_interval(ours, per_s) for per_s in theirs]
    return {
        "build": build.label,
        "cpu": to_json(cpu),
        "search": {"seconds": search_s, "plans": [row(one) for one in found], "chosen": chosen.label},
        "sweep": {"seconds": sweep_s, "plans": [row(one) for one in swept], "unable": unable, "best": ranked[0].label},
        "time_share": search_s / sweep_s,
        "race": {
            plan.label: {"per_s": list(per_s), "chosen_over_it": ratio._asdict()}
            for plan, per_s, ratio in zip(rivals, theirs, ratios, strict=True)
        }
        | {chosen.label: {"per_s": list(ours)}},
        "chosen_over_the_best": min(ratios, key=lambda ratio: ratio.value)._asdict(),
    }


def main() -> None:
    """Run the models named on the command line; rows of others in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(FIVE), help=", ".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.models:
        found = results[model] = run(model, options.rounds)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        searched, swept = found["search"], found["sweep"]
        print(f"\n{model}, {found['build']}")
        print(f"  search  {len(searched['plans']):3d} plans, {searched['seconds']:5.0f} s: {searched['chosen']}")
        print(f"  sweep   {len(swept['plans']):3d} plans, {swept['seconds']:5.0f} s: {swept['best']}")
        for label, one in found["race"].items():
            print(f"  race    {label:28s} {median(one['per_s']):8.1f}/s")
        ratio = found["chosen_over_the_best"]
        told = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of the best"
        print(f"  {told}, in {found['time_share']:.0%} of the time", flush=True)


if __name__ == "__main__":
    main()
