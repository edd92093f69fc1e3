"""``corewise bench``."""

from statistics import median
from typing import Annotated

from corewise.cli.declare import option
from corewise.cli.options import ArtifactPath, AsJson
from corewise.cli.output import print_json


def command(
    artifact_path: ArtifactPath,
    against: Annotated[
        str,
        option(
            "--against",
            panel="Rival",
            metavar="ENGINE",
            help="The engine that runs the fp32 program: eager, openvino, onnxruntime or inductor.",
        ),
    ] = "eager",
    as_json: AsJson = False,
) -> None:
    """Race an artifact against its own fp32 program in alternating rounds.

    Prints the rates and their ratio with its 95 % confidence interval.
    """
    from corewise.artifact.open import bench
    from corewise.records.jsonable import to_json
    from corewise.report.numbers import rate

    run = bench(artifact_path, against=against)
    if as_json:
        print_json({"rates": to_json(run.rates), "ratio": run.ratio._asdict()})
        return
    for rates in run.rates:
        print(f"{rate(median(rates.per_s)):>10}  {rates.build.label}, {rates.plan.label}")
    ratio, rounds = run.ratio, len(run.rates[0].per_s)
    print(f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] over {rounds} alternating rounds")
