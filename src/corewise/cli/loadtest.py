"""``corewise loadtest``."""

from dataclasses import dataclass
from typing import Annotated

from corewise.cli.declare import grouped, option
from corewise.cli.options import ArtifactPath, AsJson
from corewise.cli.output import print_json
from corewise.cli.quantities import above_zero, duration, whole
from corewise.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The requests that are sent."""

    rate_per_s: Annotated[
        float | None,
        option(
            "--rate",
            panel="Load",
            metavar="PER_SECOND",
            parse=above_zero("30"),
            help="Requests per second, sent at random times, however long the answers take.",
        ),
    ] = None
    clients: Annotated[
        int | None,
        option(
            "--clients",
            panel="Load",
            metavar="N",
            parse=whole(1),
            help="Instead of --rate: how many clients send, each of which waits for its answer first.",
        ),
    ] = None
    duration_s: Annotated[
        float,
        option(
            "--duration",
            panel="Load",
            metavar="TIME",
            parse=duration,
            help="How long to send, e.g. 10s or 2m.",
            default="10s",
        ),
    ] = 10.0
    slo_ms: Annotated[
        float | None,
        option(
            "--slo-ms",
            panel="Load",
            metavar="MS",
            parse=above_zero("200"),
            help="Latency limit of each request. One that is predicted to miss it is refused at once.",
            default="no limit",
        ),
    ] = None

    def check(self) -> None:
        """Raise ``InputError`` unless exactly one kind of load is given."""
        if (self.rate_per_s is None) == (self.clients is None):
            what = (
                "neither --rate nor --clients is given"
                if self.rate_per_s is None
                else "--rate and --clients are both given"
            )
            raise InputError(
                what,
                "give one of them: --rate for random arrivals, or --clients for clients that wait for their answers",
            )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What replaces the artifact's own plan."""

    threads: Annotated[
        int | None,
        option(
            "--threads",
            panel="Plan",
            metavar="N",
            parse=whole(1),
            help="Threads of each instance.",
            default="as in the artifact's plan",
        ),
    ] = None
    instances: Annotated[
        int | None,
        option(
            "--instances",
            panel="Plan",
            metavar="N",
            parse=whole(1),
            help="How many instances run calls at the same time.",
            default="as in the plan",
        ),
    ] = None
    batch: Annotated[
        int | None,
        option(
            "--batch",
            panel="Plan",
            metavar="N",
            parse=whole(1),
            help="Most requests that share one call.",
            default="as in the plan",
        ),
    ] = None


@grouped
def command(artifact_path: ArtifactPath, load: LoadOptions, plan: PlanOptions, as_json: AsJson = False) -> None:
    """Send requests to an artifact as users would, and report how many were answered in time.

    Each request is one sample. Requests are batched dynamically and run by the instances of the artifact's plan, as
    corewise serve does it.

    Example: corewise loadtest model.cw --clients 16 --duration 30s
    """
    from corewise.artifact.under_load import loadtest
    from corewise.records.jsonable import to_json
    from corewise.report.lines import load_test_lines

    load.check()
    outcome = loadtest(
        artifact_path,
        rate_per_s=load.rate_per_s,
        clients=load.clients,
        duration_s=load.duration_s,
        slo_ms=load.slo_ms,
        threads_per_instance=plan.threads,
        instances=plan.instances,
        batch=plan.batch,
    )
    if as_json:
        print_json({**to_json(outcome), "held": outcome.run.met, "goodput_per_s": outcome.run.goodput_per_s})
        return
    for line in load_test_lines(outcome):
        print(line)
