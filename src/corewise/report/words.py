"""What terminal, Markdown and HTML say alike: headline, rows, reasons, progress. Pure; plain one-line strings.

Text from outside (paths, options, an engine's error) goes through ``clean`` before it is shown.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from corewise.records.build import Build, Receipt
from corewise.records.events import Stage, StageStarted, TrialStep
from corewise.records.goal import Goal
from corewise.records.measurement import LoadRun, Measurement, Rates
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Report
from corewise.records.trial import Fidelity, State, Trial
from corewise.report.numbers import (
    clean,
    counted,
    figure,
    interval,
    milliseconds,
    rate,
    three_digits,
    times,
)
from corewise.report.reasons import sentence

SPEED_NOTE = "Speeds are from each trial's best plan; afterwards the finalists ran in turns."

_NOTHING = ""
_IN_HEADLINE = {
    ReasonKind.NEAR_CHANCE: "fp32 itself is near chance: check the labels and the preprocessing",
    ReasonKind.MIXES_BATCH: "the model mixes the rows of a batch, so each row runs in a call of its own",
    ReasonKind.BASELINE_DIFFERS: "the baseline's answers differ from the model's own",
}
_OF_MODEL = (
    ReasonKind.ONLY_EAGER,
    ReasonKind.FIXED_BATCH,
    ReasonKind.MIXES_BATCH,
    ReasonKind.KEEPS_STATE,
    ReasonKind.BASELINE_DIFFERS,
)
NAMED = 3
"""How many layers or instances are named before "and 5 more"."""


class Row(NamedTuple):
    """One trial as the cells of a table; a cell without a figure is empty."""

    engine: str
    options: str
    precision: str
    value: str
    drop: str
    speed: str
    speedup: str
    state: str
    """The trial's state, or "chosen"."""


def columns(goal: Goal) -> tuple[str, ...]:
    """The headings of a ``Row`` whose options are below the engine."""
    speed = "p50/p99 ms" if goal.single_items else goal.unit
    return ("engine", "precision", "accuracy", "drop", speed, "speedup", "state")


def row(trial: Trial, baseline: Trial | None, goal: Goal, *, chosen: bool = False) -> Row:
    """A trial's figures: accuracy on the holdout, its best speed in its own trial, and that over the baseline's."""
    fidelity, best = trial.fidelity, goal.best(trial)
    ratio = speedup(trial, baseline, goal)
    return Row(
        engine=clean(trial.build.engine),
        options=options(trial.build),
        precision=trial.build.precision,
        value=score(fidelity.value) if fidelity else _NOTHING,
        drop=score(fidelity.drop) if fidelity else _NOTHING,
        speed=_speed_figures(best, goal) if best else _NOTHING,
        speedup=times(ratio) if ratio else _NOTHING,
        state="chosen" if chosen else trial.state,
    )


def baseline(trials: Sequence[Trial]) -> Trial | None:
    """The trial that all others are compared with: the first one of eager PyTorch in fp32."""
    return next((t for t in trials if (t.build.engine, t.build.precision) == ("eager", "fp32")), None)


def speedup(trial: Trial, baseline: Trial | None, goal: Goal) -> float | None:
    """The ratio to the baseline's speed, each measured in its own trial; ``None`` if either was not measured."""
    ours, theirs = goal.best(trial), goal.best(baseline) if baseline else None
    if ours is None or theirs is None:
        return None
    if goal.single_items:
        return theirs.p50_ms / ours.p50_ms
    return ours.throughput_per_s / theirs.throughput_per_s


def headline(report: Report) -> str:
    """The whole result in one sentence, with what makes it doubtful or unusual."""
    kinds = {reason.kind for reason in (*report.choice.warnings, *report.notes)}
    return "; ".join((_result(report), *(text for kind, text in _IN_HEADLINE.items() if kind in kinds)))


def _result(report: Report) -> str:
    choice, fidelity = report.choice, report.winner.fidelity
    if won_by_baseline(report):
        speed = race_figure(choice.throughput_per_s, report.requirements.goal)
        if len(report.trials) == 1:
            return f"nothing but the baseline was tried: eager PyTorch in fp32 at {speed}"
        return f"nothing beat the baseline, eager PyTorch in fp32 at {speed}"
    ratio = f"{times(choice.speedup)} {interval(choice.speedup_low, choice.speedup_high)}"
    text = f"{ratio} as fast as eager PyTorch{contradiction(report)}"
    if choice.certified:
        text = f"{certified_rate(choice.certified)}; {text}"
    return f"{text}, {against(fidelity)}" if fidelity else text


def contradiction(report: Report) -> str:
    """`` in the race but 3.62x in trials`` for a speed-up that trials deny; else empty."""
    for reason in report.choice.warnings:
        if reason.kind == ReasonKind.RACE_CONTRADICTS:
            return f" in the race but {times(float(str(reason.details['alone_ratio'])))} in trials"
    return ""


def won_by_baseline(report: Report) -> bool:
    """Whether the chosen build is the baseline itself."""
    base = baseline(report.trials)
    return base is not None and base.build == report.choice.winner


def behaviour(report: Report) -> Iterator[str]:
    """What is unusual about the model, and what was lost by it."""
    yield from (said(note) for note in report.notes if note.kind in _OF_MODEL)


def losers(report: Report) -> Iterator[tuple[str, State, str]]:
    """Label, state and reason of each trial that was not chosen."""
    for loser in report.choice.losers:
        yield clean(loser.build.label), loser.state, said(loser.reason)


def warnings(report: Report) -> tuple[str, ...]:
    """Doubts about the choice."""
    return tuple(map(said, report.choice.warnings))


def notes(report: Report) -> Iterator[str]:
    """What limited the search, the engines' remarks about their builds, and the losers' int8 receipts."""
    yield from map(said, report.notes)
    for trial in report.trials:
        if trial.receipt and trial.build != report.choice.winner:
            yield clean(f"{trial.build.label}: {receipt(trial.receipt)}")
        for note in trial.notes:
            yield clean(f"{trial.build.label}: {note}")
        if trial.loads:
            yield loaded(trial)
        if trial.tuned:
            yield tuned(trial)


def receipt(record: Receipt) -> str:
    """``int8: 51 of 54 convolutions and linears, 1 fell back (conv1)``; at most three names."""
    named, more = ", ".join(record.fell_back[:NAMED]), len(record.fell_back) - NAMED
    return clean(f"{record.words} ({named}{f' and {more} more' if more > 0 else ''})" if named else record.words)


def ended(trial: Trial, baseline: Trial | None, goal: Goal) -> str:
    """One line about a trial that has just ended."""
    label = clean(trial.build.label)
    if trial.state != "ok":
        return f"{label}: {trial.state}: {said(trial.reason)}"
    parts: list[str] = [trial.state]
    if trial.fidelity:
        parts.append(f"{clean(trial.fidelity.metric)} {score(trial.fidelity.value)} (drop {drops(trial.fidelity)})")
    if best := goal.best(trial):
        ratio = speedup(trial, baseline, goal)
        figures = _speed_figures(best, goal)
        speed = f"p50/p99 {figures} ms" if goal.single_items else f"{figures} items/s"
        parts.append(f"{speed} ({times(ratio)} eager)" if ratio else speed)
    return f"{label}: {', '.join(parts)}"


def tuned(trial: Trial) -> str:
    """One line about a trial whose plans were searched."""
    assert trial.tuned is not None
    line = f"{trial.build.label}: {counted(len(trial.measurements), 'plan')} measured; {sentence(trial.tuned)}"
    if trial.failed_plans:
        first = trial.failed_plans[0]
        line += (
            f"; {counted(len(trial.failed_plans), 'plan')} did not run, {first.plan.label}: {sentence(first.reason)}"
        )
    return clean(line)


def loaded(trial: Trial) -> str:
    """One line about a trial that was put under load."""
    line = f"{trial.build.label}: under load: {', '.join(map(load, trial.loads))}"
    return clean(f"{line}; it ended early: {sentence(trial.load_failure)}" if trial.load_failure else line)


def said(reason: Reason) -> str:
    """The reason's sentence, safe to show."""
    return clean(sentence(reason))


def stage(event: StageStarted) -> str:
    """``searching the plans of openvino/int8``."""
    build, plan = event.build.label if event.build else "", event.plan.label if event.plan else ""
    match event.stage:
        case Stage.TUNING_PLANS:
            return clean(f"searching the plans of {build}")
        case Stage.UNDER_SHIFT | Stage.FROM_FILES:
            return clean(f"{event.stage.value}: {build}")
        case Stage.LOADING:
            return clean(f"putting {build} under load, {plan}")
        case Stage.MEASURING_PLAN:
            return f"measuring {plan}"
        case Stage.RACING:
            return (
                f"racing {plan or counted(event.count, 'contender')} against the {'old plan' if plan else 'baseline'}"
            )
        case Stage.QUANTIZING:
            return f"quantizing with {event.samples} samples"
        case Stage.QUANTIZING_LAYERS:
            return f"quantizing {event.count} layers one by one, {event.samples} samples"
        case _:
            return event.stage.value


def step(event: TrialStep) -> str:
    """``openvino/int8: measuring, 2 threads x 1, batch 16``."""
    plan = f", {event.plan.label}" if event.plan else ""
    return clean(f"{event.build.label}: {event.step.value}{plan}")


def load(run: LoadRun) -> str:
    """``55/s met, p99 81 ms``, with the numbers of refused and failed requests if there are any.

    A search says of which loads two layouts were open.
    """
    offered = rate(run.rate_per_s) if run.rate_per_s is not None else f"{run.clients} clients"
    counts = {"refused": run.refused, "failed": run.failed}
    lost = "".join(f", {count} {what}" for what, count in counts.items() if count)
    both = "" if run.elastic is None else " by an elastic plan"
    return f"{offered} {'met' if run.met else 'missed'}{both}, p99 {milliseconds(run.p99_ms)}{lost}"


def finals(rates: Sequence[Rates], goal: Goal) -> str:
    """The finalists' median rates so far, the fastest first."""
    ranked = sorted(
        ((median(r.per_s), clean(f"{r.build.label} ({r.plan.label})")) for r in rates if r.per_s), reverse=True
    )
    return ", ".join(f"{label} {race_figure(per_s, goal)}" for per_s, label in ranked)


def options(build: Build) -> str:
    """``backend=onednn, reduce_range``: the value ``True`` is left out."""
    return clean(", ".join(name if value is True else f"{name}={value}" for name, value in build.options))


def score(value: float) -> str:
    """A metric's value with four decimals, as in the gate's reasons."""
    # Adding zero turns the -0.0 of a tiny negative drop into 0.0.
    return f"{round(value, 4) + 0.0:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def drops(fidelity: Fidelity) -> str:
    """``0.0033``, or ``0.0033, 0.0210 under shift``: the drop, and that on samples unlike those that calibrated."""
    drop = score(fidelity.drop)
    return drop if fidelity.shift_drop is None else f"{drop}, {score(fidelity.shift_drop)} under shift"


def race_figure(per_s: float, goal: Goal) -> str:
    """A rate of the race: ``87.3 items/s``; for latency, whose rates are 1/latency, ``11.5 ms``."""
    return figure(goal.figure(per_s), goal.unit)


def _speed_figures(best: Measurement, goal: Goal) -> str:
    if goal.single_items:
        return f"{three_digits(best.p50_ms)}/{three_digits(best.p99_ms)}"
    return three_digits(best.throughput_per_s)


def against(fidelity: Fidelity) -> str:
    """``top1 0.9300 against 0.9233``."""
    return f"{clean(fidelity.metric)} {score(fidelity.value)} against {score(fidelity.baseline_value)}"


def certified_rate(load: LoadRun) -> str:
    """``47.5 requests/s with p99 72 ms``."""
    return f"{rate(load.rate_per_s or 0.0, 'requests')} with p99 {milliseconds(load.p99_ms)}"


def note(report: Report, kind: ReasonKind) -> str:
    """The report's note of that kind; empty if it has none."""
    return next((said(reason) for reason in report.notes if reason.kind == kind), "")
