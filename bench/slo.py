"""The rate that an SLO plan promises, held for a minute; three times that rate; and three times the capacity.

    python bench/slo.py [resnet50] [--slo-ms 100] [--budget 5m]

Optimizes for the SLO as a user does, then puts the artifact under load as ``corewise load`` does: the promised rate
for 60 s; then in four alternating rounds its capacity (a closed loop that always has a full batch waiting), three times
the promised rate for 15 s, and for 15 s three times the capacity, which under a short SLO is far more than can be
promised. What is done in time is compared with the capacity just before and just after, for the machine's speed drifts.
Writes bench/results/slo_MODEL.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from subjects import ROOT, SUBJECTS  # noqa: E402

from corewise import artifact  # noqa: E402
from corewise.artifact.loadtest import load_test  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.jsonable import to_json  # noqa: E402
from corewise.records.measurement import LoadRun  # noqa: E402

LOAD_S, CAPACITY_S, OVERLOAD_S = 60.0, 10.0, 15.0
OVERLOAD, ROUNDS = 3, 4


def per_s(run: LoadRun) -> float:
    """What was answered in a second."""
    return run.answered / run.duration_s


def facts(run: LoadRun) -> dict[str, Any]:
    """The load's record with what follows from it."""
    return {**to_json(run), "goodput_per_s": run.goodput_per_s, "held": run.held}


def run(model: str, slo_ms: float, budget: str, keep: Path | None) -> dict[str, Any]:
    """Optimize and load; the artifact goes into ``keep``."""
    subject = SUBJECTS[model]
    with tempfile.TemporaryDirectory(prefix="corewise-slo-") as name:
        output = (keep or Path(name)) / f"{model}.cw"
        command = [sys.executable, "-m", "corewise.cli", "optimize", subject.model, *subject.options, "--slo-ms"]
        command += [str(slo_ms), "--budget", budget, "-o", str(output), "--json"]
        print("$", " ".join(command[2:]), flush=True)
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found = artifact.read(output)
        promise = found.report.choice.promise
        if promise is None or promise.rate_per_s is None:
            sys.exit(f"nothing is promised: {found.report.choice.reason}")
        plan = found.manifest.plan
        clients = 2 * plan.batch * plan.instances

        def capacity() -> LoadRun:
            return load_test(output, clients=clients, duration_s=CAPACITY_S).run

        def overload(rate_per_s: float) -> LoadRun:
            return load_test(output, rate_per_s=OVERLOAD * rate_per_s, duration_s=OVERLOAD_S, slo_ms=slo_ms).run

        kept = load_test(output, rate_per_s=promise.rate_per_s, duration_s=LOAD_S, slo_ms=slo_ms).run
        most, over, flood = [capacity()], [], []
        for _ in range(ROUNDS):
            over.append(overload(promise.rate_per_s))
            flood.append(overload(per_s(most[-1])))
            most.append(capacity())
    around = [(per_s(a) + per_s(b)) / 2 for a, b in pairwise(most)]
    return {
        "model": model,
        "slo_ms": slo_ms,
        "cpu": to_json(inspect_cpu()),
        "summary": json.loads(done.stdout),
        "plan": plan.label,
        "promised_per_s": promise.rate_per_s,
        "capacity_per_s": [per_s(one) for one in most],
        "capacity": [facts(one) for one in most],
        "promised": facts(kept),
        "overload": [facts(one) for one in over],
        "overload_goodput_of_capacity": [one.goodput_per_s / whole for one, whole in zip(over, around, strict=True)],
        "flood": [facts(one) for one in flood],
        "flood_goodput_of_capacity": [one.goodput_per_s / whole for one, whole in zip(flood, around, strict=True)],
    }


def main() -> None:
    """Run the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet50"])
    parser.add_argument("--slo-ms", type=float, default=100.0)
    parser.add_argument("--budget", default="5m")
    parser.add_argument("--keep", type=Path, help="folder for the artifact")
    options = parser.parse_args()
    for model in options.models:
        found = run(model, options.slo_ms, options.budget, options.keep)
        path = HERE / "results" / f"slo_{model}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{model}: {found['summary']['reason']}")
        kept, capacity = found["promised"], median(found["capacity_per_s"])
        print(f"  promised {found['promised_per_s']:.1f}/s of {capacity:.1f}/s, {found['plan']}")
        print(f"  held for {LOAD_S:g} s: {kept['held']}; p99 {kept['p99_ms']:.1f} ms, refused {kept['refused']}")
        for what, name in (("that", "overload"), ("capacity", "flood")):
            shares = ", ".join(f"{share:.0%}" for share in found[f"{name}_goodput_of_capacity"])
            refusal_ms, p99_ms = (max(one[key] for one in found[name]) for key in ("refusal_p99_ms", "p99_ms"))
            told = f"{shares} of capacity in time; refusals within {refusal_ms:.2f} ms (p99), answers {p99_ms:.1f} ms"
            print(f"  at {OVERLOAD}x {what}: {told}", flush=True)


if __name__ == "__main__":
    main()
