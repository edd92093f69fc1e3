"""Latency over load of several servers as one SVG file: the p50 beside the p99, in the report's own charts."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from bench.elastic_loads import Loads
from corewise.report.charts import Axis, Line, Mark, Role, plot

STYLE = """
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#17202a}.tick{font-size:11px;fill:#566270}
.grid{stroke:#e9ecf0}g text{fill:currentColor}.chosen{color:#0069a8}.baseline{color:#b04a00}.other{color:#626d79}
.rejected{color:#a03878}polyline{fill:none;stroke:currentColor;stroke-width:1.5}polyline.chosen{stroke-width:3}
.mark{fill:currentColor;stroke:#fff;stroke-width:1}.rejected .mark{stroke:currentColor;stroke-width:2}
.title{font-size:13px;font-weight:600}.chosen text{font-weight:700}.ground{fill:#fff}
"""
"""The colours of the report's page in the light."""
WIDTH, HEIGHT = 360, 258
"""Of a chart."""
HEAD, GAP, LINE = 30, 12, 17
"""Heights of the headings and of a line of the legend; between charts."""


class Series(NamedTuple):
    """A server in the picture."""

    name: str
    key: str
    role: Role
    words: str = ""
    """The name for the reader."""


def picture(series: Sequence[Series], loads: Loads, shares: Mapping[str, float]) -> str:
    """The whole file: the p50 and the p99 at each share, the median of the rounds, of those that were loaded."""
    shown = [one for one in series if any(one.name in loads[load] for load in shares)]
    panels = (_panel(figure, shown, loads, shares, k * (WIDTH + GAP)) for k, figure in enumerate(("p50", "p99")))
    foot = HEAD + HEIGHT + 2 * GAP
    legend = (
        f'<g class="{one.role}"><text x="8" y="{foot + LINE * k}">{one.key}  {one.words or one.name}</text></g>'
        for k, one in enumerate(shown)
    )
    width, height = 2 * WIDTH + GAP, foot + LINE * len(shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect class="ground" width="{width}" height="{height}"/>'
        f"{''.join(panels)}{''.join(legend)}</svg>\n"
    )


def _panel(figure: str, shown: Sequence[Series], loads: Loads, shares: Mapping[str, float], left: float) -> str:
    """One figure of all servers over load."""
    marks, lines = list[Mark](), list[Line]()
    for one in shown:
        points = _points(figure, one.name, loads, shares)
        lines.append(Line(points=tuple(points), style=one.role))
        marks += [
            Mark(
                x=x,
                y=y,
                role=one.role,
                key=one.key,
                tip=f"{one.words or one.name} at {x:.0f} %: {y:.2f} ms",
                labelled=(x, y) == points[-1],
            )
            for x, y in points
        ]
    drawn = plot(
        figure,
        f"{figure} over load",
        "Milliseconds from when a request was due to its answer.",
        x=Axis.linear((0.0, 100.0)),
        y=Axis.logarithmic(mark.y for mark in marks),
        marks=marks,
        lines=lines,
    )
    placed = drawn.replace("<svg ", f'<svg x="{left}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    title = f"{figure} in ms, over % of the saturated rate"
    return f'<text class="title" x="{left + 8}" y="20">{title}</text>{placed}'


def _points(figure: str, name: str, loads: Loads, shares: Mapping[str, float]) -> list[tuple[float, float]]:
    """Of one server, as (percent, milliseconds), where it answered."""
    rounds = {share: [run[f"{figure}_ms"] for run in loads[load].get(name, ())] for load, share in shares.items()}
    return [(100 * share, median(values)) for share, values in rounds.items() if values and all(values)]
