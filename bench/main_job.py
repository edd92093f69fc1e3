"""The main job on real models: optimize, then race the artifact against the engines used by hand.

    python bench/main_job.py resnet50 [mobilenet_v2 resnet20 minilm] [--rounds 12]

Writes bench/results/main_job_MODEL.json: the machine, the report's summary, and every contender's rate in every
alternating round. Needs the data folder (COREWISE_DATA or ../shared/data).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT / "examples"))

from hand import CONTENDERS, engine_build  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.cpu import inspect  # noqa: E402
from corewise.engines import Material  # noqa: E402
from corewise.errors import CorewiseError  # noqa: E402
from corewise.race import Contender, Fell, race  # noqa: E402
from corewise.samples import read, split  # noqa: E402
from corewise.stats import ratio_interval  # noqa: E402
from corewise.trial import Worker  # noqa: E402
from corewise.values import Build, Plan, Preprocess, to_json  # noqa: E402
from corewise.worker import CALIBRATION, HOLDOUT, PROGRAM, write_material  # noqa: E402

PHOTOS = str(DATA / "imagenet-photos")
RESNET_MEAN = "0.48501961,0.45795686,0.40760392"
RESNET_STD = "0.00392157,0.00392157,0.00392157"
MODELS = {
    "resnet50": ("--samples", PHOTOS, "--metric", "top1", "--mean", RESNET_MEAN, "--std", RESNET_STD),
    "mobilenet_v2": ("--samples", PHOTOS, "--metric", "top1"),
    "resnet20": ("--samples", str(DATA / "cifar10.npz"), "--metric", "top1", "--resize", "32", "--crop", "32"),
    "minilm": ("--samples", "examples/minilm.py:samples", "--metric", "examples/minilm.py:spearman"),
}
TIMEOUT_S = 900.0


def optimize(model: str, output: Path) -> dict:
    """Run the command that a user types and return its summary."""
    command = [sys.executable, "-m", "corewise.cli", "optimize", f"examples/{model}.py:build", *MODELS[model]]
    command += ["--max-drop", "0.01", "-o", str(output), "--json"]
    print("$", " ".join(command[2:]), flush=True)
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)


def samples_of(model: str):
    """The calibration part and the holdout, split as ``optimize`` splits them."""
    options = dict(zip(MODELS[model][::2], MODELS[model][1::2], strict=True))
    preprocess = Preprocess()
    if model == "resnet50":
        mean, std = (tuple(float(part) for part in text.split(",")) for text in (RESNET_MEAN, RESNET_STD))
        preprocess = Preprocess(mean=mean, std=std)
    if model == "resnet20":
        preprocess = Preprocess(resize=32, crop=32)
    data = read(options["--samples"], preprocess)
    return split(data, calibration=min(200, len(data) * 2 // 5), seed=0)


def by_hand(model: str, work: Path, plan: Plan, start) -> tuple[list[Contender], dict[str, str]]:
    """Build every contender; those that cannot do the model are returned with their reasons."""
    contenders, failed = [], {}
    for name in CONTENDERS:
        build = engine_build(name, f"{ROOT}/examples/{model}.py:build")
        payload = work / "hand" / build.engine.replace(":", "_")
        payload.mkdir(parents=True)
        try:
            with start(build) as worker:
                arguments = {"build": to_json(build), "folder": str(payload)}
                worker.call("build", "building", material=str(work), **arguments)
                worker.call("open", "opening", plan=to_json(plan), **arguments)
                worker.call("enter_race", "running", samples=str(work / HOLDOUT), batch=plan.batch, budget_s=0.1)
        except CorewiseError as error:
            failed[name] = str(error)[:300]
            print(f"  {name}: {error}"[:200], flush=True)
            continue
        contenders.append(Contender(build=build, plan=plan, payload=payload))
    return contenders, failed


def run(model: str, rounds: int) -> dict:
    """Optimize one model and race the result."""
    cpu = inspect()
    with tempfile.TemporaryDirectory(prefix="corewise-bench-") as name:
        work = Path(name)
        output = work / f"{model}.cw"
        summary = optimize(model, output)
        made = artifact.read(output)
        calibrating, holdout = samples_of(model)
        (work / PROGRAM).symlink_to(output / artifact.REFERENCE)
        calibrating.save(work / CALIBRATION)
        holdout.save(work / HOLDOUT)
        about = {"inputs": made.manifest.inputs, "outputs": made.manifest.outputs}
        write_material(
            work,
            Material(
                program=work / PROGRAM,
                operators={},
                calibration=calibrating,
                cpu=cpu,
                cache=work / "cache",
                **about,
            ),
        )

        def start(build: Build) -> Worker:
            return Worker(cpu=cpu, log=work / "log", timeout_s=TIMEOUT_S)

        plan = made.manifest.plan
        hand, failed = by_hand(model, work, plan, start)
        ours = Contender(build=made.manifest.build, plan=plan, payload=output / artifact.PAYLOAD)
        try:
            done = race((ours, *hand), samples=str(work / HOLDOUT), start=start, rounds=rounds)
        except Fell as fell:
            sys.exit(f"{fell.build.engine} fell: {fell}")
    names = {engine_build(key, "").engine: key for key in CONTENDERS}
    rates = {names.get(one.build.engine, "corewise"): one.per_s for one in done.rates}
    ratios = {name: ratio_interval(rates["corewise"], per_s) for name, per_s in rates.items() if name != "corewise"}
    return {
        "model": model,
        "cpu": to_json(cpu),
        "versions": to_json(made.manifest.versions),
        "summary": summary,
        "plan": to_json(plan),
        "rates_per_s": to_json(rates),
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
        "failed": failed,
    }


def main() -> None:
    """Run the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"there is no model {', '.join(unknown)}")
    for model in options.models:
        result = run(model, options.rounds)
        path = HERE / "results" / f"main_job_{model}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{model}: {result['summary']['reason']}")
        for name, per_s in result["rates_per_s"].items():
            ratio = result["ratios"].get(name)
            told = f"corewise is {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
            print(f"  {name:36s} {median(per_s):8.1f}/s  {told}")
        print(f"written to {path}", flush=True)


if __name__ == "__main__":
    main()
