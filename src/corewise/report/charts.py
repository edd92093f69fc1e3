"""Charts as inline SVG, drawn by hand: points and lines between two axes, bars, and groups of columns.

An SVG of the first two kinds is 360 units wide, a phone's width, so that its text is readable there. It holds figures
and the keys of builds (``1``, ``2``), never names: names are in the HTML beside it, where they can wrap. The page sets
the colours by the class of each mark's role; each role also has its own shape.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, Self

Role = Literal["chosen", "baseline", "other", "rejected"]

_WIDTH, _HEIGHT = 360, 258
_LEFT, _RIGHT, _TOP, _FOOT = 44, 334, 14, 230
_CHARACTER, _LINE = 7.8, 13.0
_BAR = 36
_COLUMN, _GAP, _COLUMNS_HEIGHT = 29, 22, 230
_GRIDS = ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,))
_MOST_TICKS = 7


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale from ``low`` to ``high`` with ticks at round values; values that cannot stand on it are not ``held``."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool

    @classmethod
    def linear(cls, values: Iterable[float]) -> Self:
        """From a round value at or below the least of the values to one at or above the greatest."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        span = max(max(finite) - min(finite), 1e-9, abs(max(finite)) * 1e-6)
        step = 10.0 ** math.floor(math.log10(span / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= _MOST_TICKS - 2)
        first, last = math.floor(min(finite) / step + 1e-9), math.ceil(max(finite) / step - 1e-9)
        ticks = tuple(round(step * k, 12) for k in range(first, max(last, first + 1) + 1))
        return cls(low=ticks[0], high=ticks[-1], ticks=ticks, log=False)

    @classmethod
    def logarithmic(cls, values: Iterable[float]) -> Self:
        """A logarithmic scale a little beyond the values; those of zero and below are left out."""
        positive = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
        low, high = min(positive) / 1.12, max(positive) * 1.12
        if high / low < 5:
            ticks = tuple(tick for tick in cls.linear((low, high)).ticks if low <= tick <= high)
            return cls(low=low, high=high, ticks=ticks, log=True)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for grid in _GRIDS:
            rungs = (step * 10.0**decade for decade in decades for step in grid)
            ticks = tuple(rung for rung in rungs if low <= rung <= high)
            if len(ticks) <= _MOST_TICKS:
                break
        return cls(low=low, high=high, ticks=_few(ticks), log=True)

    @classmethod
    def counts(cls, values: Iterable[int]) -> Self:
        """A logarithmic scale with a tick at each of the counts (batches, threads) there are, which are above zero."""
        ticks = tuple(float(value) for value in sorted(set(values)) if value > 0) or (1.0,)
        margin = (ticks[-1] / ticks[0]) ** 0.06 if len(ticks) > 1 else 2.0
        return cls(low=ticks[0] / margin, high=ticks[-1] * margin, ticks=_few(ticks), log=True)

    def held(self, value: float) -> bool:
        """Whether the value can be drawn."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def part(self, value: float) -> float:
        """Where the value stands: 0 is ``low``, 1 is ``high``; those beyond the ends stand at the ends."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        position = math.log(value) if self.log else value
        return min(1.0, max(0.0, (position - low) / (high - low)))


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point: the build's role and key, its tooltip, and the ends of a vertical interval through it."""

    x: float
    y: float
    role: Role
    key: str
    tip: str
    labelled: bool = True
    faint: bool = False
    ringed: bool = False
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """Straight pieces between points; ``style`` is a role or ``guide``, which is dashed."""

    points: tuple[tuple[float, float], ...]
    style: Role | Literal["guide"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of ``bars``: its length, the single values behind it, and its figure in words."""

    value: float
    values: tuple[float, ...]
    role: Role
    key: str
    text: str


def plot(
    name: str,
    title: str,
    description: str,
    *,
    x: Axis,
    y: Axis,
    marks: Sequence[Mark],
    lines: Sequence[Line] = (),
    floor: float | None = None,
    ceiling: float | None = None,
) -> str:
    """Marks and lines in a frame; what is below ``floor`` or above ``ceiling`` is shaded.

    ``name`` makes ids unique in the page. Marks and lines with values that their axis cannot hold are left out. Those
    of the chosen build are on top.
    """

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _LEFT + (_RIGHT - _LEFT) * x.part(point[0]), _FOOT - (_FOOT - _TOP) * y.part(point[1])

    seen = [mark for mark in marks if x.held(mark.x) and y.held(mark.y)]
    seen.sort(key=lambda mark: (not mark.faint, mark.role == "chosen", mark.ringed))
    parts = [*_frame(x, y)]
    for limit in (floor, ceiling):
        if limit is not None and y.held(limit):
            edge = at((x.low, limit))[1]
            top, foot = (edge, _FOOT) if limit is floor else (_TOP, edge)
            parts.append(
                f'<rect class="shade" x="{_LEFT}" y="{top:.1f}" width="{_RIGHT - _LEFT}" height="{foot - top:.1f}"/>'
                f'<line class="floor" x1="{_LEFT}" y1="{edge:.1f}" x2="{_RIGHT}" y2="{edge:.1f}"/>'
            )
    for line in sorted(lines, key=lambda line: line.style == "chosen"):
        points = [at(point) for point in line.points if x.held(point[0]) and y.held(point[1])]
        if len(points) > 1:
            joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline class="{line.style}" points="{joined}"/>')
    whiskers = []
    for mark in seen:
        parts.append(f'<g class="{mark.role}{" faint" if mark.faint else ""}"><title>{escape(mark.tip)}</title>')
        if mark.interval and all(y.held(end) for end in mark.interval):
            (a, low), (_, high) = at((mark.x, mark.interval[0])), at((mark.x, mark.interval[1]))
            whiskers.append((a - 1, high, a + 1, low))
            parts.append(f'<path class="interval" d="M{a - 4:.1f} {low:.1f}h8m-4 0V{high:.1f}m-4 0h8"/>')
        parts.append(_shape(*at((mark.x, mark.y)), mark.role, mark.ringed) + "</g>")
    parts += _labels([(mark, at((mark.x, mark.y))) for mark in seen], whiskers)
    return _svg(name, title, description, _HEIGHT, parts)


def bars(name: str, title: str, description: str, rows: Sequence[Bar]) -> str:
    """One line for each row: the key, a bar from zero to ``value``, a dot for each of ``values``, and the figure."""
    finite = [value for row in rows for value in (row.value, *row.values) if math.isfinite(value)]
    longest = max(finite, default=0.0) or 1.0
    left, room = 28, _WIDTH - 28 - 8 - _CHARACTER * max((len(row.text) for row in rows), default=0)

    def at(value: float) -> float:
        return left + room * min(1.0, max(0.0, value / longest))

    parts = []
    for index, row in enumerate(rows):
        if not math.isfinite(row.value):
            continue
        y = _BAR * index + _BAR / 2
        end = at(max(row.value, *(value for value in row.values if math.isfinite(value)))) if row.values else at(0)
        parts.append(
            f'<g class="{row.role}">{_text(left - 12, y + 4, row.key, "end")}'
            f'<rect class="bar" x="{left}" y="{y - 11:.1f}" width="{at(row.value) - left:.1f}" height="22" rx="3"/>'
        )
        dots = (value for value in row.values if math.isfinite(value))
        parts += (f'<circle class="dot" cx="{at(value):.1f}" cy="{y:.1f}" r="2.5"/>' for value in dots)
        parts.append(f"{_text(end + 8, y + 4, row.text)}</g>")
    return _svg(name, title, description, _BAR * len(rows), parts)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One upright bar of a group: its height, the ends of its interval, its figure, and the class that colours it."""

    value: float
    interval: tuple[float, float] | None
    text: str
    series: str
    tip: str


def columns(name: str, title: str, description: str, groups: Sequence[tuple[str, Sequence[Column]]]) -> str:
    """Groups of columns side by side, each with its name below; all stand on one scale from zero."""
    tops = [end for _, group in groups for column in group for end in (column.value, *(column.interval or ()))]
    highest = max(tops, default=0.0) or 1.0
    floor, room = _COLUMNS_HEIGHT - 26, _COLUMNS_HEIGHT - 26 - 20
    width = sum(len(group) for _, group in groups) * _COLUMN + (len(groups) - 1) * _GAP
    parts, left = [], 0.0
    for label, group in groups:
        for k, column in enumerate(group):
            x, height = left + k * _COLUMN, room * column.value / highest
            middle, top = x + _COLUMN / 2, floor - height
            parts.append(f'<g class="{column.series}"><title>{escape(column.tip)}</title>')
            parts.append(
                f'<rect class="bar" x="{x + 2:.1f}" y="{top:.1f}" width="{_COLUMN - 4}" height="{height:.1f}" rx="2"/>'
            )
            if column.interval:
                low, high = (floor - room * end / highest for end in column.interval)
                parts.append(f'<path class="interval" d="M{middle:.1f} {low:.1f}V{high:.1f}"/>')
                top = min(top, high)
            parts.append(f"{_text(middle, top - 5, column.text, 'middle', 'figure')}</g>")
        wide = len(group) * _COLUMN
        parts.append(f'<line class="axis" x1="{left:.1f}" y1="{floor}" x2="{left + wide:.1f}" y2="{floor}"/>')
        parts.append(_text(left + wide / 2, floor + 19, label, "middle", "group"))
        left += wide + _GAP
    return _svg(name, title, description, _COLUMNS_HEIGHT, parts, width)


def _svg(name: str, title: str, description: str, height: float, parts: Iterable[str], width: float = _WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _frame(x: Axis, y: Axis) -> Iterator[str]:
    for tick in y.ticks:
        at = _FOOT - (_FOOT - _TOP) * y.part(tick)
        yield f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{_RIGHT}" y2="{at:.1f}"/>'
        yield _text(_LEFT - 8, at + 4, _figure(tick), "end", "tick")
    for tick in x.ticks:
        at = _LEFT + (_RIGHT - _LEFT) * x.part(tick)
        yield f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_FOOT}"/>'
        yield _text(at, _FOOT + 18, _figure(tick), "middle", "tick")


def _shape(x: float, y: float, role: Role, ringed: bool) -> str:
    if role == "baseline":
        return f'<rect class="mark" x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    if role == "rejected":
        return f'<path class="mark" d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9"/>'
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>' if ringed else ""
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{5.5 if role == "chosen" else 4}"/>{ring}'


_Box = tuple[float, float, float, float]


def _labels(marks: Sequence[tuple[Mark, tuple[float, float]]], whiskers: Sequence[_Box]) -> Iterator[str]:
    """Each labelled mark's key beside it, on the first side where it covers no mark, no interval and no other key."""
    taken = [*((x - 6, y - 6, x + 6, y + 6) for _, (x, y) in marks), *whiskers]
    for mark, (x, y) in reversed(marks):
        if not mark.labelled:
            continue
        wide, away = _CHARACTER * len(mark.key), 11.0 if mark.ringed else 8.0
        places = [
            (x + away, y - _LINE / 2),
            (x - wide / 2, y - away - _LINE),
            (x - away - wide, y - _LINE / 2),
            (x - wide / 2, y + away),
            (x + away - 2, y - away - _LINE + 4),
            (x + away - 2, y + away - 4),
            (x + away + wide, y - _LINE / 2),
            (x - away - 2 * wide, y - _LINE / 2),
        ]
        boxes = [(a, b, a + wide, b + _LINE) for a, b in places]
        free = (box for box in boxes if box[0] > _LEFT and box[2] < _WIDTH and box[1] > 0 and box[3] < _FOOT)
        box = next((box for box in free if not any(map(_overlap, [box] * len(taken), taken))), boxes[0])
        taken.append(box)
        yield f'<g class="{mark.role}">{_text(box[0], box[1] + _LINE - 2, mark.key, "start", "tag")}</g>'


def _overlap(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "value") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _few(ticks: tuple[float, ...]) -> tuple[float, ...]:
    return ticks[:: math.ceil(len(ticks) / _MOST_TICKS)]


def _figure(value: float) -> str:
    """``0.915``, ``20``, ``50k``: a tick's short figure."""
    for least, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / scale:.4g}{letter}"
    return f"{value:.6g}"
