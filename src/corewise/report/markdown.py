"""A report as GitHub Markdown: the ``report.md`` of an artifact."""

import re
from collections.abc import Iterable, Iterator

from corewise.records.report import Report
from corewise.report import elasticity, numbers, story, words


def render(report: Report) -> str:
    """The report's story in GitHub Flavored Markdown, ending with a newline."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {_escape(numbers.clean(report.model))}"
    yield from ("", f"**{_escape(words.headline(report))}**", "")
    yield from (f"- {heading}: {_escape(text)}" for heading, text in story.facts(report))
    yield from ("", "## Trials", "", *_table(report))
    yield from ("", words.SPEED_NOTE)
    if (found := report.choice.elasticity) is not None:
        yield from ("", "## Latency over load", "", _row(elasticity.load_columns(found)), "|--:|--:|--:|--:|")
        yield from (*map(_row, elasticity.load_rows(found)), "", elasticity.LOAD_NOTE)
    losers = (f"**{_escape(label)}** ({state}): {_escape(reason)}" for label, state, reason in words.losers(report))
    yield from _section("Why the others lost", losers)
    yield from _section("Warnings", map(_escape, words.warnings(report)))
    yield from _section("Notes", map(_escape, words.notes(report)))


def _table(report: Report) -> Iterator[str]:
    goal, base = report.requirements.goal, words.baseline(report.trials)
    yield _row(words.columns(goal))
    yield "|---|---|--:|--:|--:|--:|---|"
    for trial in report.trials:
        row = words.row(trial, base, goal, chosen=trial.build == report.choice.winner)
        engine = f"{row.engine} ({row.options})" if row.options else row.engine
        state = f"**{row.state}**" if row.state == "chosen" else row.state
        yield _row((_escape(engine), row.precision, row.value, row.drop, row.speed, row.speedup, state))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _section(title: str, items: Iterable[str]) -> Iterator[str]:
    lines = [f"- {item}" for item in items]
    if lines:
        yield from ("", f"## {title}", "", *lines)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell too; an underscore within a word needs no escape."""
    return re.sub(r"[\\`*\[<>|~&]|^[-+#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
