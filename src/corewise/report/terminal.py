"""A report on a terminal, and the display of a search while it runs."""

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from corewise.records.events import (
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
from corewise.records.report import Report
from corewise.records.trial import Trial
from corewise.report import numbers, words

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


def render(report: Report) -> RenderableType:
    """The report for a terminal of 80 columns or more; give it to ``rich.console.Console.print``."""
    return Group(
        Text(numbers.clean(report.model), "bold"),
        Text(words.headline(report), "bold" if words.won_by_baseline(report) else "bold green"),
        Text(),
        _facts(report),
        Text(),
        _trials(report),
        Text(words.SPEED_NOTE, "dim"),
        *_section("why the others lost", (_loser(*loser) for loser in words.losers(report))),
        *_section("warnings", (_item("!", "bold yellow", Text(text)) for text in words.warnings(report))),
        *_section("notes", (_item("-", "dim", Text(text)) for text in words.notes(report))),
    )


def trials_table(goal: Goal) -> Table:
    """An empty table for the rows of ``trial_row``; 80 columns hold it, for options go to lines of their own."""
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
    """Shows the events of one search on a console; a context manager and a listener.

    ``live`` keeps a table of trials on a terminal with what runs now below it, and removes it when the search ends
    well, for the report repeats it; when an exception ends the search, the table of what was done stays. ``plain``
    prints one line, however long, per stage and ended trial, without colours. ``quiet`` prints nothing.
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
        elif self._mode == "plain" and line:
            self._console.print(Text(line), soft_wrap=True)


class _Board:
    """What is known so far, drawn to fit the terminal: the last trials where not all fit, and what runs now."""

    def __init__(self, goal: Goal, clock: Callable[[], float]) -> None:
        self._goal = goal
        self._clock = clock
        self._trials: list[Trial] = []
        self._started: TrialStarted | None = None
        self._now = ""
        self._since = clock()

    def take(self, event: Event) -> str:
        """Remember the event; the line that tells it where nothing can be redrawn, empty where none is worth it."""
        match event:
            case StageStarted():
                self._begin(words.stage(event))
                return self._now
            case TrialStarted(build):
                self._started = event
                self._begin(numbers.clean(build.label))
            case TrialStep():
                self._now = self._numbered(words.step(event))
            case LoadEnded(build, load):
                self._now = f"{build.label}: {words.load(load)}"
            case TrialEnded(trial, resumed):
                return self._end(trial, resumed)
            case PlansTuned(trial):
                return self._tuned(trial)
            case RaceRound(round, rounds, rates):
                self._now = f"alternating run, round {round} of {rounds}: {words.finals(rates, self._goal)}"
                return self._now if round == rounds else ""
        return ""

    def finish(self) -> None:
        """Nothing runs any more."""
        self._now = ""

    def _begin(self, text: str) -> None:
        self._now = self._numbered(text)
        self._since = self._clock()

    def _end(self, trial: Trial, resumed: bool) -> str:
        self._trials.append(trial)
        line = self._numbered(words.ended(trial, words.baseline(self._trials), self._goal))
        self._started = None
        self._now = ""
        return f"{line} (resumed)" if resumed else line

    def _tuned(self, trial: Trial) -> str:
        self._trials = [trial if one.build == trial.build else one for one in self._trials]
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
        elapsed = numbers.duration(int(self._clock() - self._since))
        return Text.assemble(("▸ ", "bold cyan"), (f"{elapsed}  ", "dim"), self._now)

    def _table(self) -> Table:
        table = trials_table(self._goal)
        base = words.baseline(self._trials)
        for trial in self._trials:
            table.add_row(*trial_row(trial, base, goal=self._goal))
        return table


def _facts(report: Report) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for heading, text in words.facts(report):
        grid.add_row(Text(heading, "bold"), Text(text))
    return grid


def _trials(report: Report) -> Table:
    goal, base = report.requirements.goal, words.baseline(report.trials)
    table = trials_table(goal)
    for trial in report.trials:
        table.add_row(*trial_row(trial, base, goal=goal, chosen=trial.build == report.choice.winner))
    return table


def _section(title: str, items: Iterable[RenderableType]) -> tuple[RenderableType, ...]:
    found = tuple(items)
    return (Text(), Text(title, "bold"), *found) if found else ()


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
