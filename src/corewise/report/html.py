"""A report as one HTML page that needs nothing else: the ``report.html`` of an artifact.

Its sections are the gain, the cost, why the others lost, and how it was measured. It has no script, no font and no
network access (its content security policy forbids them); charts are inline SVG with their figures in tables. Each
build is numbered in the order tried.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources

from corewise.records.build import Build
from corewise.records.report import Report
from corewise.report import figures, numbers, story, words
from corewise.report.figures import Builds, Figure

_WON = ("plan", "layouts", "why", "speed")
_COST = ("accuracy", "outputs", "groups", "judged", "receipt", "cost")
_TOP = ("winner",)
"""The headings of ``story.facts`` by the section that shows them; all others are about how it was measured."""

_MARKS = {"chosen": "✓", "ok": "·", "rejected": "✗", "failed": "!", "pruned": "-"}


def render(report: Report) -> str:
    """The page as text, ending with a newline. Text from users and engines is escaped."""
    page = _Page(report)
    model, headline = escape(numbers.clean(report.model)), escape(words.headline(report))
    style = resources.files("corewise.report").joinpath("html.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{model}: {headline}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="brand">corewise report</p>
<h1>{model}</h1>
<p class="headline">{headline}</p>
{page.summary()}
</header>
<main>
{page.sections()}</main>
</body>
</html>
"""


class _Page:
    """The parts of one report's page."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.builds = Builds(report)
        self.facts = dict(story.facts(report))
        self.names = Counter((trial.build.engine, trial.build.precision) for trial in report.trials if trial.fidelity)

    def summary(self) -> str:
        """The chosen build and the figures that matter most."""
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd><strong>{escape(figure)}</strong> <span>{escape(more)}</span></dd></div>"
            for name, figure, more in self._tiles()
        )
        winner = f"{self._key(self.report.choice.winner)} <span>{_label(self.facts['winner'])}</span>"
        return f'<p class="winner">{winner}</p>\n<dl class="tiles">{tiles}</dl>'

    def sections(self) -> str:
        """All sections of the page that have content."""
        report = self.report
        rest = [heading for heading in self.facts if heading not in (*_TOP, *_WON, *_COST)]
        sections = (
            ("Warnings", "warnings", _list(words.warnings(report))),
            ("What was won", "beside", self._facts(_WON) + self._figures(figures.won(self.builds))),
            ("What it cost", "beside", self._facts(_COST) + self._figures(figures.cost(self.builds))),
            ("Why the others lost", "lost", self._losers() + self._trials()),
            ("How it was measured", "measured", self._facts(rest)),
            ("Notes", "notes", _list(words.notes(report))),
        )
        return "".join(
            f'<section class="{kind}">\n<h2>{title}</h2>\n{content}</section>\n'
            for title, kind, content in sections
            if content
        )

    def _tiles(self) -> Iterator[tuple[str, str, str]]:
        report, winner, base = self.report, self.report.winner, self.builds.baseline
        won, goal = not words.won_by_baseline(report), report.requirements.goal
        against = (
            f"against {words.race_figure(report.choice.baseline_throughput_per_s, goal)}" if won else "the baseline"
        )
        yield "speed", words.race_figure(report.choice.throughput_per_s, goal), against
        if fidelity := winner.fidelity:
            yield numbers.clean(fidelity.metric), words.score(fidelity.value), f"drop {words.score(fidelity.drop)}"
        if winner.payload_bytes:
            theirs = f"against {numbers.size(base.payload_bytes)}" if won and base and base.payload_bytes else ""
            yield "payload", numbers.size(winner.payload_bytes), theirs
        yield "found in", numbers.duration(report.wall_s), f"{len(report.trials)} trials"

    def _facts(self, headings: Iterable[str]) -> str:
        items = "".join(
            f"<div><dt>{escape(heading)}</dt><dd>{escape(self.facts[heading])}</dd></div>"
            for heading in headings
            if heading in self.facts
        )
        return f'<dl class="facts">{items}</dl>\n'

    def _losers(self) -> str:
        losers = zip(self.report.choice.losers, words.losers(self.report), strict=True)
        items = "".join(
            f"<li>{self._key(loser.build)}"
            f"<div><b>{_label(label)}</b> {_state(state)}<p>{escape(reason)}</p></div></li>\n"
            for loser, (label, state, reason) in losers
        )
        return f'<ul class="losers">\n{items}</ul>\n' if items else ""

    def _trials(self) -> str:
        goal, rows = self.report.requirements.goal, []
        for trial in self.report.trials:
            row = words.row(trial, self.builds.baseline, goal, chosen=trial.build == self.report.choice.winner)
            figures = (row.precision, row.value, row.drop, row.speed, row.speedup)
            name = self._name(trial.build, row.engine, row.options)
            rows.append((trial.build, name, (*map(escape, figures), _state(row.state))))
        table = self._table(words.columns(goal), rows)
        return f'<h3>All trials</h3>\n{table}<p class="aside">{escape(words.SPEED_NOTE)}</p>\n'

    def _figures(self, charts: Iterable[Figure]) -> str:
        return "".join(map(self._figure, charts))

    def _figure(self, figure: Figure) -> str:
        """The chart with its title, legend and table."""
        drawn = {build for build, _ in figure.rows}
        legend = "".join(f"<li>{self._short(build)}</li>" for build in self.builds.trials if build in drawn)
        rows = [(build, self._short(build), tuple(map(escape, cells))) for build, cells in figure.rows]
        chart = figure.svg
        if figure.axes:
            upright, level = map(escape, figure.axes)
            chart = f'<p class="axis">{upright}</p>\n{chart}\n<p class="axis level">{level}</p>'
        return f"""<figure>
<figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.caption)}</p></figcaption>
{chart}
<ul class="legend">{legend}</ul>
<details><summary>The figures</summary>
{self._table(figure.columns, rows)}</details>
</figure>
"""

    def _table(self, columns: Sequence[str], rows: Iterable[tuple[Build, str, Sequence[str]]]) -> str:
        """Rows of a build, its name and its cells, both HTML.

        A phone shows each row as a card, which makes browsers forget that it is a row: hence the roles.
        """
        head = "".join(f'<th role="columnheader" scope="col">{escape(column)}</th>' for column in columns)
        body = ""
        for build, name, cells in rows:
            chosen = ' class="chosen"' if build == self.report.choice.winner else ""
            body += f'<tr role="row"{chosen}><th role="rowheader" scope="row">{name}</th>'
            for column, cell in zip(columns[1:], cells, strict=True):
                body += f'<td role="cell" data-column="{escape(column)}">{cell}</td>'
            body += "</tr>\n"
        return (
            f'<table role="table">\n<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
            f'<tbody role="rowgroup">\n{body}</tbody>\n</table>\n'
        )

    def _short(self, build: Build) -> str:
        """Key, engine and precision; options only if another build has the same name."""
        twins = self.names[build.engine, build.precision] > 1
        return self._name(
            build, numbers.clean(f"{build.engine} {build.precision}"), words.options(build) if twins else ""
        )

    def _name(self, build: Build, name: str, options: str) -> str:
        role = self.builds.role(build)
        more = f" <small>{escape(options)}</small>" if options else ""
        tag = f" <em>{role}</em>" if role in ("chosen", "baseline") else ""
        return f'<span class="build {role}">{self._key(build)}<span>{escape(name)}{more}{tag}</span></span>'

    def _key(self, build: Build) -> str:
        return f'<b class="key {self.builds.role(build)}">{self.builds.key(build)}</b>'


def _list(items: Iterable[str]) -> str:
    content = "".join(f"<li>{escape(item)}</li>\n" for item in items)
    return f"<ul>\n{content}</ul>\n" if content else ""


def _label(label: str) -> str:
    """A build's label, which may break between its parts."""
    return re.sub("[/,]", r"\g<0><wbr>", escape(label))


def _state(state: str) -> str:
    return f'<span class="state {state}">{_MARKS[state]} {state}</span>'
