"""What there is to say about an elastic plan: why it won or lost, and its latency over the load. Pure."""

from collections.abc import Iterator

from corewise.common.phrases import percent
from corewise.records.report import Report
from corewise.records.tuned import Elasticity
from corewise.report.numbers import megabytes, milliseconds, three_digits
from corewise.report.words import load

LOAD_NOTE = (
    "p50 and p99 in ms of requests at random times, simulated from the measured calls; the load is a share of what the "
    "plan's layout answers when it is saturated."
)


def layouts(report: Report, found: Elasticity) -> str:
    """Whether two layouts stay open, and what that does for single requests."""
    fixed = 1 if report.choice.plan.instances == 1 else 2
    shown = (found.curve[0], min(found.curve, key=lambda point: abs(point.load - 2 / 3)))
    figures = ", ".join(
        f"at {percent(point.load)} of the saturated rate {milliseconds(point.p50_ms[0])} instead of "
        f"{milliseconds(point.p50_ms[fixed])}"
        for point in shown
    )
    if found.pays:
        memory = f"; at most {megabytes(found.memory_bytes)}" if found.memory_bytes else ""
        more = "; more requests/s are met than by one layout" if found.load and found.load.certified else ""
        return f"{found.plan.label}, depending on the load: simulated p50 {figures}{memory}{more}"
    if found.load is None and found.duels:
        return f"one, because {duel_verdict(found)}"
    if found.load is not None:
        return f"one, because an elastic plan does not meet the certified rate: {load(found.load)}"
    if not report.requirements.within_memory(found.memory_bytes):
        return f"one, because both together may need {megabytes(found.memory_bytes)}, more than the memory limit"
    return f"one, because an elastic plan is not better: simulated p50 {figures}"


def duel_verdict(found: Elasticity) -> str:
    """Why real load rejected the elastic plan, with its figures beside the fixed layout's."""
    if not all(duel.all_answered for duel in found.duels):
        return "requests failed or were refused under real load"
    told = []
    for duel in found.duels:
        pairs = (("p50", duel.p50_ms), ("p99", duel.p99_ms))
        figures = ", ".join(
            f"{name} {milliseconds(ours)} against {milliseconds(theirs)}" for name, (ours, theirs) in pairs
        )
        told.append(f"at {percent(duel.load)} of the saturated rate {figures}")
    return f"an elastic plan is slower under real load: {'; '.join(told)}"


def load_columns(found: Elasticity) -> tuple[str, ...]:
    """The headings of ``load_rows``: the load, then the elastic plan and each of its layouts alone."""
    return ("load", "elastic", found.plan.wide.layout_label, found.plan.narrow.layout_label)


def load_rows(found: Elasticity) -> Iterator[tuple[str, ...]]:
    """``67 %``, then p50 and p99 in ms of each: ``41.0 / 97.2``."""
    for point in found.curve:
        pairs = zip(point.p50_ms, point.p99_ms, strict=True)
        yield percent(point.load), *(f"{three_digits(p50)} / {three_digits(p99)}" for p50, p99 in pairs)
