"""Load an artifact as its users would, through the batcher, and say what became of their requests."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from corewise import artifact
from corewise.artifact import tuned
from corewise.artifact.open import TIMEOUT_S, check_available, check_trusted, golden_samples
from corewise.machine.inspect import inspect
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import LoadRun
from corewise.runtime.client import Worker
from corewise.runtime.loadgen import LATE_MS, check_load
from corewise.runtime.worker import HOLDOUT


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """A load on an artifact's plan, and what admission went by."""

    run: LoadRun
    call_ms: float
    """How long a call of one request takes by the artifact's latency table (p99)."""
    notes: tuple[str, ...] = ()
    """What is to know about the plan on this machine."""


def load_test(
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
    """Load an artifact in a process of its own: at a rate (open loop), or by clients (closed loop).

    It runs the plan that ``loading.load`` runs, with the same numbers in the place of the plan's own. Requests are the
    golden inputs, one at a time. With ``slo_ms`` each must be answered within that time, and is refused where
    measurements say that it would not be.

    Raises ``InputError`` for what is no load or no plan, ``ArtifactError`` or ``EngineError`` where the artifact is not
    sound or does not fit this CPU, and ``CorewiseError`` where its engine cannot run such a plan.
    """
    check_load(rate_per_s=rate_per_s, clients=clients, duration_s=duration_s, slo_ms=slo_ms)
    cpu = inspect()
    found = artifact.read(Path(folder), cpu=cpu)
    fit = tuned.asked(found, cpu, threads_per_instance=threads_per_instance, instances=instances, batch=batch)
    build = found.manifest.build
    check_trusted(found, build.engine)
    check_available(build.engine, f"loading {folder}")
    curve, notes = tuned.usable_table(found, fit, cpu)
    with tempfile.TemporaryDirectory(prefix="corewise-") as name:
        samples = Path(name) / HOLDOUT
        golden_samples(found).save(samples)
        payload = str((found.folder / artifact.PAYLOAD).resolve())
        log, timeout_s = Path(name) / "log", TIMEOUT_S + 2 * duration_s
        with Worker(cpu=cpu, log=log, timeout_s=timeout_s) as worker:
            worker.call("open", "opening", folder=payload, build=to_json(build), plan=to_json(fit.plan))
            answer = worker.call(
                "load",
                "under load",
                samples=str(samples),
                plan=to_json(fit.plan),
                curve=to_json(curve),
                duration_s=duration_s,
                rate_per_s=rate_per_s,
                clients=clients,
                slo_ms=slo_ms,
            )
    return LoadTest(run=from_json(LoadRun, answer["load"]), call_ms=curve.latency_ms(1), notes=(*fit.warnings, *notes))


def words(found: LoadTest) -> tuple[str, ...]:
    """The load test in a few lines."""
    run = found.run
    if run.rate_per_s is not None:
        sent = f"{run.rate_per_s:g} requests/s, arriving at random"
    else:
        sent = f"{run.clients} client{'s' if run.clients != 1 else ''}, each sending when it has its answer"
    lines = [
        f"load      {sent}, for {run.duration_s:.1f} s on {run.plan.label}",
        f"requests  {run.offered} offered: {run.answered} answered, {run.refused} refused, {run.failed} failed",
    ]
    if run.answered:
        goodput = f", {run.goodput_per_s:.1f}/s of them in time" if run.slo_ms is not None else ""
        lines.append(
            f"answers   {run.answered / run.duration_s:.1f}/s{goodput}; p50 {_ms(run.p50_ms)}, p99 {_ms(run.p99_ms)}"
        )
    if run.refusal_p99_ms:
        lines.append(f"refusals  told within {_ms(run.refusal_p99_ms)} (p99)")
    lines.append(_verdict(found))
    if run.throttled:
        lines.append(f"note: the CPU quota stopped the process {run.throttled} times: the latencies are the quota's")
    if run.sender_late_p99_ms > LATE_MS:
        lines.append(
            f"note: the sender itself was late by {_ms(run.sender_late_p99_ms)} (p99): it needs time on the cores that"
            " compute, and latencies count it"
        )
    return (*lines, *(f"note: {note}" for note in found.notes))


def _verdict(found: LoadTest) -> str:
    run = found.run
    lost = [f"{count} {what}" for count, what in ((run.refused, "refused"), (run.failed, "failed")) if count]
    if not run.offered:
        return "no request came in that time: give it longer or a higher rate"
    if run.slo_ms is None:
        return "every request was answered" if run.held else f"not every request was answered: {', '.join(lost)}"
    slo = f"the SLO of {_ms(run.slo_ms)} (p99)"
    if run.held:
        refused = f", {run.refused} of {run.offered} refused" if run.refused else ", none refused"
        return f"{slo} held: the p99 was {_ms(run.p99_ms)}{refused}"
    if not run.answered and found.call_ms > run.slo_ms:
        return f"{slo} cannot hold: one call alone takes {_ms(found.call_ms)}, so every request was too urgent"
    late = [f"the p99 was {_ms(run.p99_ms)}"] if run.p99_ms > run.slo_ms else []
    return f"{slo} did not hold: {', '.join(late + lost)}"


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
