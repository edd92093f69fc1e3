"""Load tests of an artifact, through the batcher."""

import tempfile
from pathlib import Path

from corewise.artifact import PAYLOAD, read, tuned
from corewise.artifact.open import TIMEOUT_S, check_available, check_trusted, golden_samples, needs_model
from corewise.common.errors import ArtifactError
from corewise.machine.inspect import inspect_cpu
from corewise.records.measurement import LoadTest
from corewise.runtime.client import Worker
from corewise.runtime.loadgen import check_load
from corewise.runtime.workspace import Workspace


def loadtest(
    folder: str | Path,
    *,
    rate_per_s: float | None = None,
    clients: int | None = None,
    duration_s: float = 10.0,
    slo_ms: float | None = None,
    threads_per_instance: int | None = None,
    instances: int | None = None,
    batch: int | None = None,
) -> LoadTest:
    """Load-test an artifact in a process of its own: at a rate (open loop) or with clients (closed loop).

    Each request is one row of the golden inputs.

    Args:
        folder: the artifact.
        rate_per_s: requests per second, sent at random times without waiting for answers.
        clients: number of senders, each of which waits for its answer before it sends again; give this or
            ``rate_per_s``.
        duration_s: seconds to send for.
        slo_ms: milliseconds within which each request must be answered; a request that is predicted to be late is
            refused. Default: no limit.
        threads_per_instance: threads of each instance. Default: those of the plan that ``load`` runs.
        instances: calls that run at the same time. Default: the plan's.
        batch: most requests in a call. Default: the plan's.

    Returns:
        How many requests were answered, refused and failed, and their latencies.

    Raises:
        InputError: a number is out of range, or both ``rate_per_s`` and ``clients`` are given, or neither.
        ArtifactError: the artifact is damaged or does not fit this CPU.
        EngineError: its engine is not installed.
        CorewiseError: its engine cannot run such a plan.

    Example:
        >>> import corewise
        >>> test = corewise.loadtest("model.cw", clients=1, duration_s=0.2)
        >>> test.run.failed
        0
    """
    check_load(rate_per_s=rate_per_s, clients=clients, duration_s=duration_s, slo_ms=slo_ms)
    cpu = inspect_cpu()
    artifact = read(Path(folder), cpu=cpu)
    fit = tuned.asked(artifact, cpu, threads_per_instance=threads_per_instance, instances=instances, batch=batch)
    build = artifact.manifest.build
    check_trusted(artifact, build.engine)
    check_available(build.engine, f"loading {folder}")
    if needs_model(artifact):
        raise ArtifactError(
            f"{folder} holds the weights of a model that could not be exported, but not its code",
            "a load test needs a model that can be exported",
        )
    fit, tables = tuned.for_requests(artifact, fit)
    table, notes = tuned.usable_table(artifact, fit, cpu)
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        workspace = Workspace(Path(name))
        golden_samples(artifact).save(workspace.holdout)
        with Worker(cpu=cpu, log=workspace.folder / "log", timeout_s=TIMEOUT_S + 2 * duration_s) as worker:
            wide = None if fit.elastic is None else fit.elastic.wide
            worker.open((artifact.folder / PAYLOAD).resolve(), build, fit.plan, wide)
            run = worker.load(
                workspace.holdout,
                fit.plan,
                table,
                duration_s=duration_s,
                rate_per_s=rate_per_s,
                clients=clients,
                slo_ms=slo_ms,
                elastic=tables,
            )
    call_ms = min(one.latency_ms(1) for one in (table, *((tables.wide_slow,) if tables else ())))
    return LoadTest(run=run, call_ms=call_ms, notes=(*fit.warnings, *notes), elastic=fit.elastic)
