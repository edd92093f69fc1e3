"""``corewise retune``."""

from typing import Annotated

from corewise.cli.declare import option
from corewise.cli.options import ArtifactPath, AsJson, ModelOfArtifact, load_model
from corewise.cli.output import console, only_json, print_json
from corewise.cli.quantities import duration


def command(
    artifact_path: ArtifactPath,
    model: ModelOfArtifact = None,
    budget_s: Annotated[
        float,
        option(
            "--budget",
            panel="Limits",
            metavar="TIME",
            parse=duration,
            help="Time for the search and the race, e.g. 30s or 2m.",
            default="30s",
        ),
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Find the best plan for this machine or container, and keep it beside the artifact's own.

    Measures the artifact's build with other threads, instances and batches, and races the best plan against the one
    used so far. Then it finds out by simulation and real load whether an elastic plan is better, under which a call
    that is alone takes all cores and calls from many threads share them. Plans for other machines stay as they are.
    """
    from corewise.artifact import TUNED, tuned
    from corewise.records.jsonable import to_json
    from corewise.report.lines import retuned_lines
    from corewise.report.terminal import Progress
    from corewise.search.retuning import find_plan

    screen = console(stderr=True)
    with Progress(screen, "live" if screen.is_terminal else "quiet") as progress, only_json(as_json):
        retuned = find_plan(artifact_path, budget_s=budget_s, model=load_model(model), on_event=progress)
    if as_json:
        print_json({**to_json(retuned), "kept": retuned.kept})
    else:
        for line in retuned_lines(retuned):
            print(line)
    tuned.write(retuned.folder, retuned.entry)
    if not as_json:
        print(f"saved {retuned.folder / TUNED}")
