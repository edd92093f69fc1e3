"""The story of a report from the winner down to the versions, a sentence each. Pure."""

from collections.abc import Iterator
from dataclasses import replace

from corewise.common.phrases import percent
from corewise.machine.inspect import cpu_list
from corewise.machine.layouts import assign, limited_by_quota
from corewise.records.cpu import Cpu
from corewise.records.goal import Slo
from corewise.records.report import AudioPreprocess, Preprocess, Report, TokenFacts
from corewise.records.trial import Fidelity
from corewise.report.elasticity import layouts
from corewise.report.numbers import clean, duration, megabytes, rate, size, three_digits
from corewise.report.words import NAMED, against, certified_rate, race_figure, receipt, said, score, won_by_baseline


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """The story from the winner down to the versions, as (heading, sentence)."""
    fidelity = report.winner.fidelity
    yield "winner", clean(report.choice.winner.label)
    yield "plan", report.choice.plan.label
    yield "threads", _threads(report)
    if report.choice.elasticity is not None:
        yield "layouts", layouts(report, report.choice.elasticity)
    if certified := report.choice.certified:
        yield "certified", f"{certified_rate(certified)}, seen for {duration(certified.duration_s)}"
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


def texts(tokens: TokenFacts) -> str:
    """How long the samples' texts are, and what padding them costs, sorted and as they come."""
    lengths = f"median {tokens.median} tokens, 95 % have up to {tokens.p95}, the longest {tokens.longest}"
    cut = f"; {percent(tokens.cut, 1)} were cut at {tokens.most}" if tokens.cut else ""
    padding = f"{percent(tokens.padding)} of the model's input is padding"
    return f"{lengths}{cut}; {padding}, or {percent(tokens.padding_unsorted)} without sorting by length"


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


def _accuracy(fidelity: Fidelity) -> str:
    text = f"{against(fidelity)}: drop {_drop(fidelity)} on {fidelity.samples} held-out samples"
    if fidelity.shift is None:
        return text
    return f"{text}, {_drop(fidelity.shift)} under shift ({fidelity.shift.samples} samples)"


def _drop(fidelity: Fidelity) -> str:
    return f"{score(fidelity.drop)} [{score(fidelity.drop_low)}, {score(fidelity.drop_high)}]"


def _closeness(fidelity: Fidelity) -> str:
    text = f"SQNR {fidelity.sqnr_db:.1f} dB, cosine {fidelity.cosine:.4f}"
    equal = fidelity.agreement
    return text if equal is None else f"{text}, {percent(equal, 1)} of the top-1 answers equal fp32's"


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
        more = f" and {len(given) - NAMED} more" if len(given) > NAMED else ""
        placement = f"one instance each on CPU {', '.join(given[:NAMED])}{more}"
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
