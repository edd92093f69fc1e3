"""The lines that ``loadtest`` and ``retune`` print. Pure."""

from corewise.common.phrases import percent
from corewise.records.goal import GOALS
from corewise.records.measurement import LoadTest
from corewise.records.tuned import Elasticity, Retuned
from corewise.report.elasticity import duel_verdict
from corewise.report.numbers import counted, duration, figure, interval, megabytes, milliseconds, rate, times

LATE_MS = 5.0
"""If the sender's p99 delay is above this, the requests no longer arrive as a Poisson process."""


def load_test_lines(test: LoadTest) -> tuple[str, ...]:
    """A load test in a few lines."""
    run = test.run
    if run.rate_per_s is not None:
        sent = f"{run.rate_per_s:g} requests/s, arriving at random"
    else:
        sent = f"{run.clients} client{'s' if run.clients != 1 else ''}, each waiting for its answer before it sends"
    lines = [
        f"load      {sent}, for {run.duration_s:.1f} s on {(test.elastic or run.plan).label}",
        f"requests  {run.offered} offered: {run.answered} answered, {run.refused} refused, {run.failed} failed",
    ]
    if run.answered:
        goodput = f", {rate(run.goodput_per_s)} in time" if run.slo_ms is not None else ""
        latencies = f"p50 {milliseconds(run.p50_ms)}, p99 {milliseconds(run.p99_ms)}"
        lines.append(f"answers   {rate(run.answered / run.duration_s)}{goodput}; {latencies}")
    if run.refusal_p99_ms:
        lines.append(f"refusals  answered within {milliseconds(run.refusal_p99_ms)} (p99)")
    lines.append(_verdict(test))
    if run.throttled:
        lines.append(f"note: the CPU quota stopped the process {run.throttled} times, which makes latencies longer")
    if run.sender_late_p99_ms > LATE_MS:
        lines.append(
            f"note: the sender was late by {milliseconds(run.sender_late_p99_ms)} (p99): it shares the cores that "
            "compute, and latencies include its delay"
        )
    return (*lines, *(f"note: {note}" for note in test.notes))


def _verdict(test: LoadTest) -> str:
    run = test.run
    lost = [f"{count} {what}" for count, what in ((run.refused, "refused"), (run.failed, "failed")) if count]
    if not run.offered:
        return "no request was sent in that time: give a longer duration or a higher rate"
    if run.slo_ms is None:
        return "every request was answered" if run.met else f"not every request was answered: {', '.join(lost)}"
    slo = f"the SLO of {milliseconds(run.slo_ms)} (p99)"
    if run.met:
        refused = f", {run.refused} of {run.offered} refused" if run.refused else ", none refused"
        return f"{slo} was met: the p99 was {milliseconds(run.p99_ms)}{refused}"
    if not run.answered and test.call_ms > run.slo_ms:
        return f"{slo} cannot be met: one call alone takes {milliseconds(test.call_ms)}, so every request was refused"
    late = [f"the p99 was {milliseconds(run.p99_ms)}"] if run.p99_ms > run.slo_ms else []
    return f"{slo} was missed: {', '.join(late + lost)}"


def retuned_lines(retuned: Retuned) -> tuple[str, ...]:
    """Both plans and speeds, the outcome of the race, and notes."""
    lines = [f"old plan  {retuned.old.label:32s} {_speed(retuned, retuned.old_per_s)}"]
    if retuned.best != retuned.old:
        lines.append(f"new plan  {retuned.best.label:32s} {_speed(retuned, retuned.best_per_s)}")
    comparison = retuned.comparison
    if comparison is not None:
        ratio = f"{times(comparison.ratio)} {interval(comparison.low, comparison.high)}"
        if retuned.kept:
            verdict = "the old plan is as good and stays"
        else:
            verdict = "the new plan is faster" if comparison.low > 1 else "the new plan keeps the limits"
        lines.append(f"{ratio} over {comparison.rounds} alternating rounds: {verdict}")
    elif retuned.kept:
        lines.append("no other plan tried is faster: the old plan stays")
    lines.append(
        f"{counted(retuned.tried, 'plan')} measured in {duration(retuned.wall_s)} on {retuned.entry.machine.label}"
    )
    if retuned.elasticity is not None:
        lines += elasticity_lines(retuned.elasticity)
    elif retuned.entry.plan.threads_per_instance * retuned.entry.plan.instances == 1:
        lines.append("one layout: a plan of one thread has no cores to divide")
    else:
        lines.append("one layout: there was no time to measure an elastic plan, or it does not run here")
    return (*lines, *(f"note: {note}" for note in retuned.notes))


def elasticity_lines(elasticity: Elasticity) -> tuple[str, ...]:
    """An elastic plan beside its two layouts alone: latency over load, the most items per second, and the verdict."""
    wide, narrow = elasticity.plan.wide, elasticity.plan.narrow
    names = ("elastic", wide.layout_label, narrow.layout_label)
    rows: list[tuple[str, ...]] = [("simulated p50 of requests", *names)]
    rows += [
        (f"  at {percent(point.load)} of the fixed plan's load", *(milliseconds(ms) for ms in point.p50_ms))
        for point in elasticity.curve
    ]
    rows.append((f"batches of {narrow.batch}, saturated", *(rate(per_s) for per_s in elasticity.saturated_per_s)))
    if elasticity.pays:
        memory = f", in at most {megabytes(elasticity.memory_bytes)}" if elasticity.memory_bytes else ""
        verdict = f"both are opened, {elasticity.plan.label}{memory}: a call that is alone takes all cores"
    elif elasticity.duels:
        verdict = f"one layout: {duel_verdict(elasticity)}"
    else:
        verdict = "one layout: an elastic plan is not better"
    return (*(f"{head:34s}{''.join(f'{cell:>18s}' for cell in cells)}" for head, *cells in rows), verdict)


def _speed(retuned: Retuned, per_s: float | None) -> str:
    if per_s is None:
        return "does not run here"
    return figure(1e3 / per_s, "ms") if GOALS[retuned.entry.goal].single_items else rate(per_s)
