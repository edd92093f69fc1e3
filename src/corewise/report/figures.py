"""The charts of a report, with captions and tables. Pure; all text except the SVG is plain."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from corewise.common.phrases import percent
from corewise.records.build import Build, Plan
from corewise.records.fidelity import Fidelity
from corewise.records.measurement import Measurement
from corewise.records.report import Report
from corewise.records.trial import Trial
from corewise.report import charts, elasticity, numbers, words
from corewise.report.charts import Axis, Bar, Line, Mark, Role


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart, the names of its axes (upright, level) if any, and its table, whose rows are a build and its cells."""

    title: str
    caption: str
    svg: str
    axes: tuple[str, str] | None
    columns: tuple[str, ...]
    rows: tuple[tuple[Build, tuple[str, ...]], ...]


class Builds:
    """The builds of a report in the order tried, with the key and role of each."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.baseline = words.baseline(report.trials)
        self.trials: dict[Build, Trial] = {}
        for trial in report.trials:
            self.trials.setdefault(trial.build, trial)
        self._keys = {build: str(number) for number, build in enumerate(self.trials, 1)}

    def role(self, build: Build) -> Role:
        """``rejected`` for every build whose trial is not ok."""
        if build == self.report.choice.winner:
            return "chosen"
        if self.baseline and build == self.baseline.build:
            return "baseline"
        trial = self.trials.get(build)
        return "other" if trial and trial.state == "ok" else "rejected"

    def key(self, build: Build) -> str:
        """The build's number in the order tried; ``?`` if the report has no trial of it."""
        return self._keys.get(build, "?")

    def measured(self) -> Iterator[tuple[Build, Measurement]]:
        """Every measurement that can be drawn, with its build."""
        for build, trial in self.trials.items():
            yield from (
                (build, measurement)
                for measurement in trial.measurements
                if measurement.p50_ms > 0 and measurement.throughput_per_s > 0
            )

    def is_plan(self, build: Build, plan: Plan) -> bool:
        """Whether this is the chosen build under the chosen plan."""
        return build == self.report.choice.winner and plan == self.report.choice.plan

    def mark(self, build: Build, measurement: Measurement, x: float, y: float) -> Mark:
        """A measurement as a point."""
        return Mark(
            x=x,
            y=y,
            role=self.role(build),
            key=self.key(build),
            tip=_tip(build, measurement),
            ringed=self.is_plan(build, measurement.plan),
        )


def won(builds: Builds) -> Iterator[Figure]:
    """What was won: the race, and all that was measured by latency, by batch, and by threads where these differ."""
    yield from _finals(builds)
    yield from _frontier(builds)
    yield from _batches(builds)
    yield from _threads(builds)
    yield from _loads(builds)


def cost(builds: Builds) -> Iterator[Figure]:
    """What it cost: accuracy over speed, with the gate."""
    goal, fidelity = builds.report.requirements.goal, builds.report.winner.fidelity
    marks, rows = [], []
    for build, trial in builds.trials.items():
        ratio = words.speedup(trial, builds.baseline, goal) or _verified(trial, builds.baseline)
        if trial.fidelity is None or not ratio:
            continue
        value = trial.fidelity.value
        # The interval is the paired drop's, so it hangs from the baseline's value.
        ends = _after(trial.fidelity, trial.fidelity.drop_high), _after(trial.fidelity, trial.fidelity.drop_low)
        low, high = min(ends), max(ends)
        score = f"{words.score(value)} [{words.score(low)}, {words.score(high)}]"
        shift = "" if trial.fidelity.shift_drop is None else words.score(trial.fidelity.shift_drop)
        rows.append((build, (numbers.times(ratio), score, words.score(trial.fidelity.drop), shift)))
        marks.append(
            Mark(
                x=ratio,
                y=value,
                role=builds.role(build),
                key=builds.key(build),
                tip=f"{numbers.clean(build.label)}: {score} at {numbers.times(ratio)}",
                ringed=build == builds.report.choice.winner,
                interval=(low, high),
            )
        )
    if fidelity is None or not marks:
        return
    metric, limit = numbers.clean(fidelity.metric), _after(fidelity, builds.report.requirements.max_drop)
    error = fidelity.lower_is_better
    title = "Error over speed" if error else "Accuracy over speed"
    shifted = any(cells[-1] for _, cells in rows)
    yield Figure(
        title=title,
        caption="Vertical lines are the drop's 95 % interval; builds in the shaded area lose more than allowed. "
        "A cross is a rejected build; its speed was measured while verifying.",
        svg=charts.plot(
            "accuracy",
            title,
            f"The {'highest' if error else 'lowest'} {metric} allowed is {words.score(limit)}; the figures are in the "
            "table.",
            x=Axis.logarithmic(mark.x for mark in marks),
            y=Axis.linear([limit, *(value for mark in marks for value in (mark.y, *(mark.interval or ())))]),
            marks=marks,
            floor=None if error else limit,
            ceiling=limit if error else None,
        ),
        axes=(metric, "times the baseline's speed"),
        columns=("build", "speedup", metric, "drop", *(("drop under shift",) if shifted else ())),
        rows=tuple((build, cells if shifted else cells[:-1]) for build, cells in rows),
    )


def _after(fidelity: Fidelity, drop: float) -> float:
    """The metric's value after such a drop: of an error, above fp32's."""
    return fidelity.baseline_value + (drop if fidelity.lower_is_better else -drop)


def _finals(builds: Builds) -> Iterator[Figure]:
    goal = builds.report.requirements.goal
    unit, better = goal.unit, "shorter" if goal.single_items else "longer"
    finals = [rates for rates in builds.report.finals if rates.per_s and min(rates.per_s) > 0]
    finals.sort(key=lambda rates: -median(rates.per_s))
    bars, rows = [], []
    for rates in finals:
        text = words.race_figure(median(rates.per_s), goal)
        values = tuple(goal.figure(per_s) for per_s in rates.per_s)
        role, key = builds.role(rates.build), builds.key(rates.build)
        bars.append(Bar(value=median(values), values=values, role=role, key=key, text=text))
        rounds = f"{numbers.three_digits(min(values))} to {numbers.three_digits(max(values))}"
        rows.append((rates.build, (rates.plan.label, numbers.three_digits(median(values)), rounds)))
    title = "The race"
    if bars:
        yield Figure(
            title=title,
            caption=f"A bar ends at the median of the rounds, which are the dots; {better} is better.",
            svg=charts.bars("finals", title, f"Medians: {words.finals(finals, goal)}", bars),
            axes=None,
            columns=("build", "plan", f"median, {unit}", f"rounds, {unit}"),
            rows=tuple(rows),
        )


def _frontier(builds: Builds) -> Iterator[Figure]:
    measured = list(builds.measured())
    if not measured:
        return
    best: list[tuple[Build, Measurement]] = []
    for build, measurement in sorted(measured, key=lambda run: (run[1].p50_ms, -run[1].throughput_per_s)):
        accurate = builds.trials[build].state == "ok"
        if accurate and (not best or measurement.throughput_per_s > best[-1][1].throughput_per_s):
            best.append((build, measurement))
    marks = []
    for build, measurement in measured:
        on_it = (build, measurement) in best
        labelled = on_it or measurement == builds.report.requirements.goal.best(builds.trials[build])
        mark = builds.mark(build, measurement, measurement.p50_ms, measurement.throughput_per_s)
        marks.append(replace(mark, labelled=labelled, faint=not on_it))
    throttled = any(measurement.throttled for _, measurement in measured)
    title = "Throughput over latency"
    yield Figure(
        title=title,
        caption="Every measured plan; further up and left is better. The line joins the plans that no other plan beats "
        "in both.",
        svg=charts.plot(
            "frontier",
            title,
            "None beats " + "; ".join(_tip(build, measurement) for build, measurement in best),
            x=Axis.logarithmic(mark.x for mark in marks),
            y=Axis.logarithmic(mark.y for mark in marks),
            marks=marks,
            lines=[
                Line(
                    points=tuple((measurement.p50_ms, measurement.throughput_per_s) for _, measurement in best),
                    style="guide",
                )
            ],
        ),
        axes=("items/s", "ms for a call at the median"),
        columns=("build", "plan", "items/s", "p50 ms", "p99 ms", "spread", *(("throttled",) if throttled else ())),
        rows=tuple(
            (
                build,
                (
                    f"{measurement.plan.label}{' (chosen)' if builds.is_plan(build, measurement.plan) else ''}",
                    *map(numbers.three_digits, (measurement.throughput_per_s, measurement.p50_ms, measurement.p99_ms)),
                    percent(measurement.spread, 1),
                    *((f"{measurement.throttled} times",) if throttled else ()),
                ),
            )
            for build, measurement in measured
        ),
    )


def _batches(builds: Builds) -> Iterator[Figure]:
    by_build = _best_by(builds, lambda plan: plan.batch, lambda measurement: measurement.p50_ms)
    batches = sorted({batch for fastest in by_build.values() for batch in fastest})
    if len(batches) < 2:
        return
    marks = [
        replace(
            builds.mark(build, measurement, batch, measurement.p50_ms),
            labelled=batch == max(fastest),
            interval=(measurement.p50_ms, max(measurement.p50_ms, measurement.p99_ms)),
        )
        for build, fastest in by_build.items()
        for batch, measurement in fastest.items()
    ]
    title = "Latency over batch"
    yield Figure(
        title=title,
        caption="The median time of a call, with a line up to p99, for the fastest plan of each batch.",
        svg=charts.plot(
            "latency",
            title,
            f"Milliseconds for a call of {', '.join(map(str, batches))} items; the figures are in the table.",
            x=Axis.counts(batches),
            y=Axis.logarithmic(end for mark in marks for end in mark.interval or ()),
            marks=marks,
            lines=[
                Line(
                    points=tuple((batch, measurement.p50_ms) for batch, measurement in fastest.items()),
                    style=builds.role(build),
                )
                for build, fastest in by_build.items()
            ],
        ),
        axes=("ms for a call", "items in a call"),
        columns=("p50 / p99, ms", *(f"batch {batch}" for batch in batches)),
        rows=_pivot(
            by_build,
            batches,
            lambda measurement: " / ".join(map(numbers.three_digits, (measurement.p50_ms, measurement.p99_ms))),
        ),
    )


def _threads(builds: Builds) -> Iterator[Figure]:
    by_build = _best_by(
        builds,
        lambda plan: plan.threads_per_instance * plan.instances,
        lambda measurement: -measurement.throughput_per_s,
    )
    by_build = {build: best for build, best in by_build.items() if len(best) > 1}
    counts = sorted({threads for best in by_build.values() for threads in best})
    if not by_build:
        return
    marks = [
        replace(builds.mark(build, measurement, threads, measurement.throughput_per_s), labelled=threads == max(best))
        for build, best in by_build.items()
        for threads, measurement in best.items()
    ]
    leader = by_build.get(builds.report.choice.winner) or next(iter(by_build.values()))
    fewest, first = next(iter(leader.items()))
    ideal = tuple((threads, first.throughput_per_s * threads / fewest) for threads in leader)
    title = "Throughput over threads"
    yield Figure(
        title=title,
        caption="The best plan for each number of threads in all instances; the dashed line is perfect scaling.",
        svg=charts.plot(
            "threads",
            title,
            f"Items per second with {', '.join(map(str, counts))} threads; the figures are in the table.",
            x=Axis.counts(counts),
            y=Axis.logarithmic([*(mark.y for mark in marks), ideal[-1][1]]),
            marks=marks,
            lines=[
                Line(points=ideal, style="guide"),
                *(
                    Line(
                        points=tuple((threads, measurement.throughput_per_s) for threads, measurement in best.items()),
                        style=builds.role(build),
                    )
                    for build, best in by_build.items()
                ),
            ],
        ),
        axes=("items/s", "threads"),
        columns=("items/s", *(f"{threads} threads" for threads in counts)),
        rows=_pivot(by_build, counts, lambda measurement: numbers.three_digits(measurement.throughput_per_s)),
    )


def _loads(builds: Builds) -> Iterator[Figure]:
    """Latency over load of the elastic plan and of each of its layouts alone."""
    choice = builds.report.choice
    found = choice.elasticity
    if found is None:
        return
    names = elasticity.load_columns(found)[1:]
    marks, lines = [], []
    for k, name in enumerate(names):
        role: Role = "chosen" if k == (0 if found.pays else 1 if choice.plan.instances == 1 else 2) else "other"
        points = [(100 * point.load, point.p50_ms[k], point.p99_ms[k]) for point in found.curve]
        marks += [
            Mark(
                x=load,
                y=p50_ms,
                role=role,
                key="ABC"[k],
                tip=f"{name} at {percent(load / 100)}: "
                f"p50 {numbers.milliseconds(p50_ms)}, p99 {numbers.milliseconds(p99_ms)}",
                labelled=load == points[-1][0],
                interval=(p50_ms, max(p50_ms, p99_ms)),
            )
            for load, p50_ms, p99_ms in points
        ]
        lines.append(Line(points=tuple((load, p50_ms) for load, p50_ms, _ in points), style=role))
    title = "Latency over load"
    keys = "; ".join(f"{key}: {name}" for key, name in zip("ABC", names, strict=True))
    yield Figure(
        title=title,
        caption="The median of requests at random times, with a line up to p99, simulated from the measured calls. "
        f"{keys}.",
        svg=charts.plot(
            "loads",
            title,
            f"{keys}; the figures are in the table.",
            x=Axis.linear((0.0, 100.0)),
            y=Axis.logarithmic(end for mark in marks for end in mark.interval or ()),
            marks=marks,
            lines=lines,
        ),
        axes=("ms for a request", "% of the saturated rate"),
        columns=("p50 / p99, ms", *elasticity.load_columns(found)),
        rows=tuple((choice.winner, cells) for cells in elasticity.load_rows(found)),
    )


_Pivot = Mapping[Build, Mapping[int, Measurement]]


def _best_by(builds: Builds, group: Callable[[Plan], int], cost: Callable[[Measurement], float]) -> _Pivot:
    """The measurement of least cost of each build in each group; groups ascend."""
    by_build: dict[Build, dict[int, Measurement]] = {}
    for build, measurement in builds.measured():
        kept = by_build.setdefault(build, {}).setdefault(group(measurement.plan), measurement)
        if cost(measurement) < cost(kept):
            by_build[build][group(measurement.plan)] = measurement
    return {build: dict(sorted(groups.items())) for build, groups in by_build.items()}


def _pivot(
    by_build: _Pivot, groups: Sequence[int], figure: Callable[[Measurement], str]
) -> tuple[tuple[Build, tuple[str, ...]], ...]:
    return tuple(
        (build, tuple(figure(best[group]) if group in best else "" for group in groups))
        for build, best in by_build.items()
    )


def _verified(trial: Trial, baseline: Trial | None) -> float | None:
    """The ratio to the baseline's speed while verifying, for a trial that was not measured."""
    return trial.verified_per_s / baseline.verified_per_s if baseline and baseline.verified_per_s else None


def _tip(build: Build, measurement: Measurement) -> str:
    rate = numbers.rate(measurement.throughput_per_s, "items")
    p50, p99 = numbers.milliseconds(measurement.p50_ms), numbers.milliseconds(measurement.p99_ms)
    return f"{numbers.clean(build.label)}, {measurement.plan.label}: {rate}, p50 {p50}, p99 {p99}"
