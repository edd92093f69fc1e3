"""A report on a terminal, how a search ends on it, and the display of a search while it runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from corewise.records.events import (
    BuildsLeftUntried,
    EarlierTrialsUnused,
    Event,
    LoadEnded,
    PlansTuned,
    RaceRound,
    StageStarted,
    TrialEnded,
    TrialStarted,
    TrialStep,
)
from corewise.records.goal import Goal, Throughput
from corewise.records.measurement import Rates
from corewise.records.reason import ReasonKind
from corewise.records.report import Report
from corewise.records.trial import State, Trial
from corewise.report import elasticity, story, words
from corewise.report.numbers import clean, duration, interval, milliseconds, rate, times

Mode = Literal["live", "plain", "quiet"]
THROUGHPUT = Throughput()

# A mark and a word beside the colour: not everyone and not every terminal tells colours apart.
_STATES = {
    "chosen": ("✓", "bold green"),
    "ok": ("·", "green"),
    "rejected": ("✗", "magenta"),
    "failed": ("!", "bold red"),
    "pruned": ("-", "dim"),
}

_NOTES = (("packing", ReasonKind.PACKS_TEXTS), ("time", ReasonKind.OVER_BUDGET))
"""Notes that the last lines of a search repeat, each with its heading."""

_LABEL = 40
"""Most columns of a label where a loser and its reason share one line of a terminal."""


def render(report: Report) -> RenderableType:
    """The report for a terminal of 80 columns or more; give it to ``rich.console.Console.print``."""
    return Group(
        Text(clean(report.model), "bold"),
        Text(words.headline(report), _headline_style(report)),
        Text(),
        _facts(story.facts(report)),
        Text(),
        _trials(report),
        Text(words.SPEED_NOTE, "dim"),
        *_loads(report),
        *_section("why the others lost, the fastest first", (_loser(*loser) for *loser, _ in _ranked_losers(report))),
        *_section("warnings", (_item("!", "bold yellow", Text(text)) for text in words.warnings(report))),
        *_section("notes", (_item("-", "dim", Text(text)) for text in words.notes(report))),
    )


def overview(report: Report, *, cut: bool) -> RenderableType:
    """One line for each loser, the fastest first, and the warnings: what precedes ``conclusion``.

    ``cut`` ends the losers' lines at the edge of the terminal. Those of a file or a pipe stay whole; print them with
    ``crop=False``.
    """
    return Group(
        *_section("the other builds, the fastest first", _loser_lines(report, cut)),
        *_section("warnings", (_item("!", "bold yellow", Text(text)) for text in words.warnings(report))),
    )


def conclusion(report: Report, *, saved: str, next_command: str) -> RenderableType:
    """The last lines of a search: the winner, its speed and accuracy, where it is saved, and what to type next."""
    return Group(
        Text(),
        _facts(_results(report), style=_headline_style(report)),
        _facts((("saved", saved), ("next", next_command))),
    )


def trials_table(goal: Goal) -> Table:
    """An empty table for the rows of ``trial_row``; options go to lines of their own, so that 80 columns hold it."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)
    for name in words.columns(goal):
        if name == "engine":
            table.add_column(Text(name), overflow="fold", min_width=12)
        else:
            table.add_column(Text(name), no_wrap=True, justify="left" if name in ("precision", "state") else "right")
    return table


def trial_row(trial: Trial, baseline: Trial | None, *, goal: Goal, chosen: bool = False) -> tuple[Text, ...]:
    """A trial's cells in ``trials_table``, while the search runs and after it; the speed-up is over ``baseline``."""
    row = words.row(trial, baseline, goal, chosen=chosen)
    engine = Text(row.engine, "bold" if chosen else "")
    if row.options:
        engine.append(f"\n{row.options}", "dim")
    figures = (Text(cell, "bold" if chosen else "") for cell in (row.value, row.drop, row.speed, row.speedup))
    return (engine, Text(row.precision), *figures, _state(row.state))


class Progress:
    """Shows the events of one search on a console. It is a context manager, and is called with each event.

    ``live`` keeps a table of trials on a terminal, with the running step below it. The table disappears when the
    search ends well, because the report repeats it, and stays when an exception ends the search. ``plain`` prints one
    line, however long, for each stage and each ended trial, without colours. ``quiet`` prints nothing.
    """

    def __init__(
        self,
        console: Console,
        mode: Mode,
        *,
        goal: Goal = THROUGHPUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._mode = mode
        self._board = _Board(goal, clock)
        # Once a second is enough for a clock, and the display shares the CPU that is being measured.
        self._live = Live(self._board, console=console, refresh_per_second=1, vertical_overflow="crop")

    def __enter__(self) -> Self:
        if self._mode == "live":
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.finish()
        self._live.transient = kind is None
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        line = self._board.take(event)
        if self._mode == "live":
            self._live.refresh()
        lasts = isinstance(event, BuildsLeftUntried | EarlierTrialsUnused)
        stays = self._mode == "plain" or (self._mode == "live" and lasts)
        if stays and line:
            self._console.print(Text(line), soft_wrap=True)


class _Board:
    """What is known so far, drawn to fit the terminal: as many of the last trials as fit, and the running step."""

    def __init__(self, goal: Goal, clock: Callable[[], float]) -> None:
        self._goal = goal
        self._clock = clock
        self._trials: list[Trial] = []
        self._started: TrialStarted | None = None
        self._now = ""
        self._since = clock()

    def take(self, event: Event) -> str:
        """Remember the event. Returns its line for the mode ``plain``; empty for an event that gets none."""
        match event:
            case StageStarted():
                self._begin(words.stage(event))
                return self._now
            case TrialStarted(build):
                self._started = event
                self._begin(clean(build.label))
            case TrialStep():
                self._now = self._numbered(words.step(event))
            case LoadEnded(build, load):
                self._now = clean(f"{build.label}: {words.load(load)}")
            case TrialEnded(trial, resumed):
                return self._end(trial, resumed)
            case BuildsLeftUntried(reason) | EarlierTrialsUnused(reason):
                return words.said(reason)
            case PlansTuned(trial):
                return self._tuned(trial)
            case RaceRound(number, rounds, rates):
                standings = _standings(rates, self._goal)
                self._now = "\n".join((f"race, round {number} of {rounds}", *standings))
                return f"race of {rounds} rounds: {'; '.join(standings)}" if number == rounds else ""
        return ""

    def finish(self) -> None:
        """Remove the running step."""
        self._now = ""

    def _begin(self, text: str) -> None:
        self._now = self._numbered(text)
        self._since = self._clock()

    def _end(self, trial: Trial, resumed: bool) -> str:
        # A trial that was ok ends once more where it fails under shift.
        self._trials = [*(known for known in self._trials if known.build != trial.build), trial]
        line = self._numbered(words.ended(trial, words.baseline(self._trials), self._goal))
        self._started = None
        self._now = ""
        if trial.untried:  # one line names them all
            return ""
        return f"{line} (resumed)" if resumed else line

    def _tuned(self, trial: Trial) -> str:
        self._trials = [trial if known.build == trial.build else known for known in self._trials]
        self._now = ""
        return words.loaded(trial) if trial.loads else words.tuned(trial)

    def _numbered(self, text: str) -> str:
        return f"{self._started.number}/{self._started.total} {text}" if self._started else text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = console.render_lines(self._status(), options, pad=False) if self._now else []
        drawn = console.render_lines(self._table(), options, pad=False) if self._trials else []
        header, body = drawn[:1], drawn[1:]
        cursor = 1
        room = max(console.height - len(header) - len(now) - cursor, 1)
        for line in (*header, *body[-room:], *now):
            yield from line
            yield Segment.line()

    def _status(self) -> Text:
        elapsed = duration(int(self._clock() - self._since))
        return Text.assemble(("▸ ", "bold cyan"), (f"{elapsed}  ", "dim"), self._now)

    def _table(self) -> Table:
        table = trials_table(self._goal)
        base = words.baseline(self._trials)
        for trial in self._trials:
            table.add_row(*trial_row(trial, base, goal=self._goal))
        return table


def _headline_style(report: Report) -> str:
    return "bold" if words.won_by_baseline(report) else "bold green"


def _facts(facts: Iterable[tuple[str, str]], style: str = "") -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    # As wide as "versions", so that grids below each other align.
    grid.add_column(no_wrap=True, min_width=8)
    grid.add_column(overflow="fold")
    for heading, text in facts:
        grid.add_row(Text(heading, "bold"), Text(text, style))
    return grid


def _results(report: Report) -> Iterator[tuple[str, str]]:
    """The few facts that matter most, each with its heading."""
    choice, facts = report.choice, dict(story.facts(report))
    yield "winner", f"{facts['winner']}, {choice.plan.label}"
    if words.won_by_baseline(report):
        yield "speed", words.headline(report)
    else:
        speeds = (choice.throughput_per_s, choice.baseline_throughput_per_s)
        ours, eager = (_speed(per_s, report.requirements.goal) for per_s in speeds)
        ratio = f"{times(choice.speedup)} {interval(choice.speedup_low, choice.speedup_high)}"
        doubt = words.contradiction(report)
        yield "speed", f"{ratio} as fast as eager PyTorch{doubt}: {ours} against {eager}"
    if "layouts" in facts:
        yield "layouts", facts["layouts"].partition(":")[0]
    yield from ((heading, facts[heading]) for heading in _accuracy_facts(report) if heading in facts)
    if (preprocess := report.samples.preprocess) and preprocess.origin:
        yield "images", facts["images"]
    if report.samples.audio:
        yield "recordings", facts["recordings"]
    for heading, kind in _NOTES:
        if text := words.note(report, kind):
            yield heading, text
    yield from (("model", text) for text in words.behaviour(report))


def _accuracy_facts(report: Report) -> tuple[str, ...]:
    """The headings of what is known about its accuracy: in detail where no metric and no labels decided."""
    fidelity = report.winner.fidelity
    closeness = fidelity is not None and fidelity.basis == "outputs" and not words.won_by_baseline(report)
    return ("certified", "accuracy", *(("groups", "judged") if closeness else ()))


def _ranked_losers(report: Report) -> list[tuple[str, State, str, float]]:
    """Label, state, reason and speed of the losers, the fastest first; a speed of 0 was not measured."""
    trials = {clean(trial.build.label): trial for trial in report.trials}
    losers = [(*loser, _per_s(trials.get(loser[0]), report.requirements.goal)) for loser in words.losers(report)]
    return sorted(losers, key=lambda loser: -loser[3])


def _loser_lines(report: Report, cut: bool) -> Iterator[Text]:
    goal, losers = report.requirements.goal, _ranked_losers(report)
    speeds = [_speed(per_s, goal) if per_s else "" for *_, per_s in losers]
    labels = [Text(label) for label, *_ in losers]
    for label in labels:
        label.truncate(_LABEL if cut else len(label), overflow="ellipsis")
    speed_width, label_width = max(map(len, speeds), default=0), max(map(len, labels), default=0)
    for speed, label, (_, state, reason, _) in zip(speeds, labels, losers, strict=True):
        mark, style = _STATES[state]
        label.pad_right(label_width - len(label))
        why = reason if state == "ok" else f"{state}: {reason}"
        line = Text.assemble((f"{mark} ", style), f"{speed:>{speed_width}}  ", label, "  ", (why, "dim"))
        line.no_wrap, line.overflow = True, "ellipsis" if cut else "ignore"
        yield line


def _per_s(trial: Trial | None, goal: Goal) -> float:
    """A trial's own speed, as ``_speed`` takes it; 0 if it was not measured."""
    best = goal.best(trial) if trial else None
    if best is None:
        return 0.0
    return 1e3 / best.p50_ms if goal.single_items else best.throughput_per_s


def _standings(rates: Sequence[Rates], goal: Goal) -> list[str]:
    """The contenders' median speeds so far, each with its build and plan, the fastest first."""
    raced = sorted(
        ((median(contender.per_s), contender) for contender in rates if contender.per_s), key=lambda pair: -pair[0]
    )
    return [
        f"{_speed(per_s, goal)} {clean(contender.build.label)}, {contender.plan.label}" for per_s, contender in raced
    ]


def _speed(per_s: float, goal: Goal) -> str:
    """A rate in words; for latency it is 1/latency, as in the race."""
    return milliseconds(goal.figure(per_s)) if goal.single_items else rate(per_s)


def _trials(report: Report) -> Table:
    goal, base = report.requirements.goal, words.baseline(report.trials)
    table = trials_table(goal)
    for trial in report.trials:
        table.add_row(*trial_row(trial, base, goal=goal, chosen=trial.build == report.choice.winner))
    return table


def _loads(report: Report) -> tuple[RenderableType, ...]:
    """Latency over load, where an elastic plan was judged."""
    found = report.choice.elasticity
    if found is None:
        return ()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in elasticity.load_columns(found):
        table.add_column(Text(name), no_wrap=True, justify="right")
    for cells in elasticity.load_rows(found):
        table.add_row(*cells)
    return (*_section("latency over load", (table,)), Text(elasticity.LOAD_NOTE, "dim"))


def _section(title: str, items: Iterable[RenderableType]) -> tuple[RenderableType, ...]:
    rows = tuple(items)
    return (Text(), Text(title, "bold"), *rows) if rows else ()


def _loser(label: str, state: str, reason: str) -> Table:
    mark, style = _STATES[state]
    why = reason if state == "ok" else f"{state}: {reason}"
    return _item(mark, style, Text.assemble((label, "bold"), f"\n{why}"))


def _item(mark: str, style: str, text: Text) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style), text)
    return grid


def _state(state: str) -> Text:
    mark, style = _STATES[state]
    return Text(f"{mark} {state}", style)
