"""The sentences and figures of a report, for every format that people read. Pure; plain one-line strings.

Text from outside (paths, options, an engine's error) goes through ``clean`` before it is shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from corewise.machine.inspect import cpu_list
from corewise.machine.layouts import assign, limited_by_quota
from corewise.records.build import Build, Receipt
from corewise.records.cpu import Cpu
from corewise.records.events import Stage, StageStarted, TrialStep
from corewise.records.goal import Goal, Slo
from corewise.records.measurement import LoadRun, Measurement, Rates
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import AudioPreprocess, Preprocess, Report, TokenFacts
from corewise.records.trial import Fidelity, State, Trial
from corewise.records.tuned import Elasticity
from corewise.report.numbers import (
    clean,
    counted,
    duration,
    figure,
    interval,
    megabytes,
    milliseconds,
    rate,
    size,
    three_digits,
    times,
)
from corewise.report.reasons import sentence

LOAD_NOTE = (
    "p50 and p99 in ms of requests at random times, simulated from the measured calls; the load is a share of what the "
    "plan's layout answers when it is saturated."
)
SPEED_NOTE = "Speeds are from each trial's best plan; afterwards the finalists ran in turns."

_NOTHING = ""
_IN_HEADLINE = {
    ReasonKind.NEAR_CHANCE: "fp32 itself is near chance: check the labels and the preprocessing",
    ReasonKind.MIXES_BATCH: "the model mixes the rows of a batch, so each row runs in a call of its own",
    ReasonKind.BASELINE_DIFFERS: "the baseline answers otherwise than the model itself",
}
_OF_MODEL = (
    ReasonKind.ONLY_EAGER,
    ReasonKind.FIXED_BATCH,
    ReasonKind.MIXES_BATCH,
    ReasonKind.KEEPS_STATE,
    ReasonKind.BASELINE_DIFFERS,
)
_NAMED = 3


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
    text = f"{times(choice.speedup)} faster than eager PyTorch {interval(choice.speedup_low, choice.speedup_high)}"
    text += contradiction(report)
    if choice.certified:
        text = f"{_certified(choice.certified)}; {text}"
    return f"{text}, {_against(fidelity)}" if fidelity else text


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


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """The story from the winner down to the versions, as (heading, sentence)."""
    fidelity = report.winner.fidelity
    yield "winner", clean(report.choice.winner.label)
    yield "plan", report.choice.plan.label
    yield "threads", _threads(report)
    if report.choice.elasticity is not None:
        yield "layouts", layouts(report, report.choice.elasticity)
    if certified := report.choice.certified:
        yield "certified", f"{_certified(certified)}, seen for {duration(certified.duration_s)}"
    yield "why", said(report.choice.reason)
    yield "speed", _speed(report)
    if fidelity:
        yield "accuracy", _accuracy(fidelity)
        yield "outputs", _closeness(fidelity)
        if fidelity.worst_group:
            yield "groups", _groups(fidelity)
        if fidelity.basis != "named":
            yield "judged", _judged(fidelity)
    if repair := _repair(report):
        yield "repair", repair
    if memory := _memory(report):
        yield "memory", memory
    if report.winner.receipt:
        yield "receipt", receipt(report.winner.receipt)
    yield "goal", _goal(report)
    yield "cost", _cost(report)
    yield "samples", _samples(report)
    if report.samples.tokens:
        yield "texts", texts(report.samples.tokens)
    if report.samples.preprocess:
        yield "images", images(report.samples.preprocess)
    if report.samples.audio:
        yield "recordings", recordings(report.samples.audio)
    yield "machine", _machine(report.cpu)
    yield "versions", clean(", ".join(f"{name} {version}" for name, version in report.versions.items()))
    yield "created", clean(report.created)


def layouts(report: Report, found: Elasticity) -> str:
    """Whether two layouts stay open, and what that does for single requests."""
    fixed = 1 if report.choice.plan.instances == 1 else 2
    shown = (found.curve[0], min(found.curve, key=lambda point: abs(point.load - 2 / 3)))
    pairs = ((point.load, *(milliseconds(point.p50_ms[k]) for k in (0, fixed))) for point in shown)
    figures = ", ".join(
        f"at {load:.0%} of the saturated rate {ours} instead of {theirs}" for load, ours, theirs in pairs
    )
    if found.pays:
        memory = f"; at most {megabytes(found.memory_bytes)}" if found.memory_bytes else ""
        return f"{found.plan.label}, depending on the load: simulated p50 {figures}{memory}"
    if found.load is None and found.duels:
        return f"one, because {duel_verdict(found)}"
    if found.load is not None:
        return f"one, because an elastic plan does not meet the certified rate: {load(found.load)}"
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
        told.append(f"at {duel.load:.0%} of the saturated rate {figures}")
    return f"an elastic plan is slower under real load: {'; '.join(told)}"


def load_columns(found: Elasticity) -> tuple[str, ...]:
    """The headings of ``load_rows``: the load, then the elastic plan and each of its layouts alone."""
    return ("load", "elastic", found.plan.wide.layout_label, found.plan.narrow.layout_label)


def load_rows(found: Elasticity) -> Iterator[tuple[str, ...]]:
    """``67%``, then p50 and p99 in ms of each."""
    for point in found.curve:
        pairs = zip(point.p50_ms, point.p99_ms, strict=True)
        yield f"{point.load:.0%}", *(f"{three_digits(p50)} / {three_digits(p99)}" for p50, p99 in pairs)


def texts(tokens: TokenFacts) -> str:
    """How long the samples' texts are, and what padding them costs, sorted and as they come."""
    lengths = f"median {tokens.median} tokens, 95 % have up to {tokens.p95}, the longest {tokens.longest}"
    cut = f"; {100 * tokens.cut:.1f} % were cut at {tokens.most}" if tokens.cut else ""
    padding = f"{100 * tokens.padding:.0f} % of the model's input is padding"
    return f"{lengths}{cut}; {padding}, or {100 * tokens.padding_unsorted:.0f} % without sorting by length"


def _repair(report: Report) -> str:
    """What it cost to put layers back that were too inaccurate in int8; empty where the winner has none."""
    trial = report.winner
    options = trial.build.quantization
    broken_build = trial.build.with_quantization(replace(options, reverted_layers=0))
    broken = next((other for other in report.trials if other.build == broken_build), None)
    if not options.reverted_layers or broken is None or not broken.verified_per_s:
        return ""
    layers = "1 layer is" if options.reverted_layers == 1 else f"{options.reverted_layers} layers are"
    speeds = f"{rate(trial.verified_per_s, 'items')} against {rate(broken.verified_per_s, 'items')} of that build"
    why = "because the build with all layers in int8 was rejected"
    return f"{layers} back in floating point, {why}; while verifying it ran at {speeds}"


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
    named, more = ", ".join(record.fell_back[:_NAMED]), len(record.fell_back) - _NAMED
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
    """``55/s met, p99 81 ms``, with the numbers of refused and failed requests if there are any."""
    offered = rate(run.rate_per_s) if run.rate_per_s is not None else f"{run.clients} clients"
    counts = {"refused": run.refused, "failed": run.failed}
    lost = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{offered} {'met' if run.met else 'missed'}, p99 {milliseconds(run.p99_ms)}{lost}"


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


def _against(fidelity: Fidelity) -> str:
    return f"{clean(fidelity.metric)} {score(fidelity.value)} against {score(fidelity.baseline_value)}"


def _accuracy(fidelity: Fidelity) -> str:
    text = f"{_against(fidelity)}: drop {_drop(fidelity)} on {fidelity.samples} held-out samples"
    if fidelity.shift is None:
        return text
    return f"{text}, {_drop(fidelity.shift)} under shift ({fidelity.shift.samples} samples)"


def _drop(fidelity: Fidelity) -> str:
    return f"{score(fidelity.drop)} [{score(fidelity.drop_low)}, {score(fidelity.drop_high)}]"


def _closeness(fidelity: Fidelity) -> str:
    text = f"SQNR {fidelity.sqnr_db:.1f} dB, cosine {fidelity.cosine:.4f}"
    return text if fidelity.agreement is None else f"{text}, {fidelity.agreement:.1%} of the top-1 answers equal fp32's"


def _groups(fidelity: Fidelity) -> str:
    """How near the groups of output channels come to their floors, under shift too."""
    count = f"{len(fidelity.groups)} group{'s' if len(fidelity.groups) > 1 else ''} of channels"
    text = f"{count}; closest to its floor: {_worst_group(fidelity)}"
    if fidelity.shift is not None and fidelity.shift.worst_group is not None:
        text += f"; under shift {_worst_group(fidelity.shift)}"
    return clean(text)


def _worst_group(fidelity: Fidelity) -> str:
    group = fidelity.worst_group
    assert group is not None
    return f"{group.name}, {group.sqnr_db:.1f} dB of at least {group.floor_db:g}"


def _judged(fidelity: Fidelity) -> str:
    """What decided where the user named no metric, and how to name one."""
    if fidelity.basis == "labels":
        return clean(f"by {fidelity.metric}, which fits the labels; name another metric with --metric")
    if fidelity.basis == "answers":
        return "by whether top-1 answers equal fp32's, because there are no labels and no metric was named (--metric)"
    known = ", ".join(fidelity.suggested_metrics)
    fitting = f"{known} fit such outputs, and so does one of your own" if known else "name one of your own"
    return clean(f"by how close outputs are to fp32's, because no metric was named; {fitting} (--metric)")


def _speed(report: Report) -> str:
    choice, goal = report.choice, report.requirements.goal
    best = goal.best(report.winner)
    text = race_figure(choice.throughput_per_s, goal)
    if not won_by_baseline(report):
        text += f" against {race_figure(choice.baseline_throughput_per_s, goal)}"
    if report.finals:
        rounds = len(report.finals[0].per_s)
        text += f", {len(report.finals)} finalists in {rounds} alternating rounds"
    if goal.single_items and best:
        text += f"; in its trial p50 {three_digits(best.p50_ms)} ms, p99 {three_digits(best.p99_ms)} ms"
    return text


def _threads(report: Report) -> str:
    """The hardware threads of the plan's instances, and the settings of their threads."""
    plan = report.choice.plan
    given = [cpu_list(cpus) for cpus in assign(report.cpu, plan.threads_per_instance, plan.instances)]
    if limited_by_quota(report.cpu) or not all(given):
        placement = "not pinned"
    elif report.choice.winner.engine == "openvino":
        placement = "pinned by OpenVINO"
    elif plan.instances == 1:
        placement = f"pinned to CPU {given[0]}"
    else:
        more = f" and {len(given) - _NAMED} more" if len(given) > _NAMED else ""
        placement = f"one instance each on CPU {', '.join(given[:_NAMED])}{more}"
    return f"{placement}; denormals are zeros, operators run one after the other"


def _memory(report: Report) -> str:
    """The memory of the chosen plan's process; empty if it was not measured."""
    choice = report.choice
    best = next((measurement for measurement in report.winner.measurements if measurement.plan == choice.plan), None)
    if best is None or not best.memory_bytes:
        return ""
    text = f"{megabytes(best.memory_bytes)} for the process that runs it"
    if choice.plan.instances > 1:
        text += f", including {megabytes(best.memory_per_instance_bytes)} for each instance after the first"
    return text


def _certified(load: LoadRun) -> str:
    return f"{rate(load.rate_per_s or 0.0, 'requests')} with p99 {milliseconds(load.p99_ms)}"


def _goal(report: Report) -> str:
    requirements, fidelity = report.requirements, report.winner.fidelity
    metric = clean(fidelity.metric) if fidelity else "accuracy"
    goal: str = requirements.goal.name
    if isinstance(requirements.goal, Slo):
        goal = f"most requests per second with p99 <= {requirements.goal.p99_ms:g} ms"
    if requirements.memory_limit_bytes is not None:
        goal += f" in {size(requirements.memory_limit_bytes)} of memory"
    text = f"{goal}; {metric} may drop by {requirements.max_drop:g} at most"
    if requirements.strict:
        text += ", counting the upper end of the drop's interval"
    return f"{text}, also on samples unlike those that calibrated" if requirements.robust else text


def over_budget(report: Report) -> str:
    """Why the search took longer than its budget; empty if it did not."""
    return next((said(note) for note in report.notes if note.kind == ReasonKind.OVER_BUDGET), "")


def _cost(report: Report) -> str:
    winner = report.winner
    return (
        f"{duration(report.wall_s)} and {size(report.peak_memory_bytes)} at the peak for {len(report.trials)} trials; "
        f"the winner was built in {duration(winner.build_s)} and takes {size(winner.payload_bytes)}"
    )


def _samples(report: Report) -> str:
    samples = report.samples
    labels = "with labels" if samples.labelled else "without labels"
    counts = f"{samples.calibration} to calibrate, {samples.holdout} held out"
    return f"{clean(samples.source)} {labels}: {counts}, seed {samples.seed}"


def images(preprocess: Preprocess) -> str:
    """How images become inputs."""
    if preprocess.function is not None:
        return clean(f"prepared by {preprocess.function}")
    crop, resize, how = preprocess.crop, preprocess.resize, preprocess.interpolation
    fit = {
        "crop": f"the shorter side resized to {resize} ({how}), the middle {crop} x {crop} cut out",
        "squash": f"resized to {resize} x {resize} ({how}), the middle {crop} x {crop} cut out",
        "letterbox": f"the longer side resized to {crop} ({how}), the rest of {crop} x {crop} filled with grey",
        "keep": f"the shorter side resized to {resize} ({how}), the longer one to {preprocess.longest} at most",
    }[preprocess.fit]
    if preprocess.fit == "squash" and crop == resize:
        fit = f"resized to {resize} x {resize} ({how})"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    order = ", blue first" if preprocess.bgr else ""
    origin = f", as {preprocess.origin} says" if preprocess.origin else ""
    least = f"; large JPEGs are decoded at a smaller scale, at least {preprocess.sharpness:.4g} times that size"
    decoded = least if preprocess.decode == "scaled" else ""
    normalized = "; the engine normalizes them" if preprocess.dtype == "uint8" else ""
    return clean(f"{fit}, mean {mean}, std {std}{order}{origin}{decoded}{normalized}")


def recordings(preprocess: AudioPreprocess) -> str:
    """How recordings become inputs."""
    if preprocess.seconds is None:
        length = "of their own length"
    else:
        length = f"cut to {preprocess.seconds:.4g} s" + (", shorter ones padded" if preprocess.pads else "")
    if preprocess.function is not None:
        return clean(f"one channel of {preprocess.rate_hz} Hz, {length}, prepared by {preprocess.function}")
    normalized = ", mean 0 and variance 1" if preprocess.normalize else ""
    shape = ", shape (1, frames)" if preprocess.layout == "channels" else ""
    origin = f", as {preprocess.origin} says" if preprocess.origin else ""
    return clean(f"one channel of {preprocess.rate_hz} Hz, {length}{normalized}{shape}{origin}")


def _machine(cpu: Cpu) -> str:
    cores = len({(logical.socket, logical.core) for logical in cpu.cpus})
    usable = f"{cpu.usable_cores} of {cores} cores usable" if cores else f"{cpu.usable_cores} usable cores"
    memory = cpu.memory_limit_bytes or cpu.memory_bytes
    known = (cpu.model, cpu.architecture, usable, " ".join(cpu.isa), f"{size(memory)} memory")
    return clean(", ".join(fact for fact in known if fact))
