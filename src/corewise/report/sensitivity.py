"""The output of ``corewise explain`` as a terminal table, JSON, and a self-contained SVG."""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from corewise.common.phrases import percent
from corewise.quantize.explanation import Explanation
from corewise.report import numbers

if TYPE_CHECKING:
    from corewise.quantize.sensitivity import LayerSensitivity

SHOWN = 20
BAR = 10
EIGHTHS = " ▏▎▍▌▋▊▉"
FIRST = 5


def data(explanation: Explanation) -> dict[str, Any]:
    """The object that ``corewise explain --json`` prints.

    ``layers`` are in the order in which they run. Errors are error power over signal power at the outputs, ``*_db`` the
    same as signal over error in dB; ``saves_ms`` is ``None`` if it was not measured.
    """
    return {
        "model": explanation.model,
        "samples": explanation.samples,
        "calibration": explanation.calibration,
        "measured": explanation.measured,
        "weight_bits": explanation.weight_bits,
        "sqnr_db": explanation.sqnr_db,
        "error": explanation.layers[0].everything,
        "notes": list(explanation.notes),
        "timing": explanation.timing,
        "kept": dict(explanation.kept),
        "order_of_return": list(explanation.returning),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "error_alone": layer.alone,
                "alone_db": layer.alone_db,
                "error_all_but_it": layer.without,
                "all_but_it_db": layer.without_db,
                "multiply_adds": layer.multiply_adds,
                "multiply_adds_share": explanation.share(layer),
                "saves_ms": layer.saves_ms,
            }
            for layer in explanation.layers
        ],
    }


def render(explanation: Explanation, *, everything: bool = False) -> RenderableType:
    """The explanation for a terminal of 80 columns or more: the worst layers, or with ``everything`` all of them."""
    rows = explanation.worst_first if everything else explanation.worst_first[:SHOWN]
    hidden = len(explanation.layers) - len(rows)
    return Group(
        Text(numbers.clean(explanation.model), "bold"),
        Text(_headline(explanation), "bold"),
        Text(),
        _facts(explanation),
        Text(),
        _table(explanation, rows),
        *([Text(f"and {hidden} more with smaller errors: --all shows them", "dim")] if hidden else []),
        Text("alone: only this layer in int8; all but it: every other one. More dB is less error.", "dim"),
        Text(),
        Text.assemble(("first to return to floating point: ", "bold"), _named(explanation.returning)),
        *_section("stay in floating point", (f"{numbers.clean(name)}: {why}" for name, why in explanation.kept)),
    )


def _headline(explanation: Explanation) -> str:
    count = len(explanation.layers)
    layers = f"all {count} layers" if count > 1 else "its one layer"
    return f"{explanation.sqnr_db:.1f} dB with {layers} in int8, on {explanation.measured} samples"


def _facts(explanation: Explanation) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for heading, text in (
        ("samples", f"{explanation.samples}: {explanation.calibration} calibrated, {explanation.measured} measured"),
        ("weights", f"{explanation.weight_bits} bits"),
        ("corrections", "; ".join(explanation.notes)),
        ("time", explanation.timing),
    ):
        grid.add_row(Text(heading, "bold"), Text(numbers.clean(text)))
    return grid


def _table(explanation: Explanation, rows: Sequence["LayerSensitivity"]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column(Text("layer"), overflow="fold", min_width=12)
    table.add_column(Text("kind"), no_wrap=True)
    table.add_column(Text("alone\ndB"), no_wrap=True, justify="right")
    table.add_column(Text("all but\nit dB"), no_wrap=True, justify="right")
    table.add_column(Text("multiply-\nadds"), no_wrap=True, justify="right")
    if explanation.timed:
        table.add_column(Text("saves\nms"), no_wrap=True, justify="right")
    table.add_column(Text("error alone"), no_wrap=True)
    most = explanation.worst_first[0].alone
    for layer in rows:
        times = [_ms(layer.saves_ms)] if explanation.timed else []
        table.add_row(
            Text(numbers.clean(layer.name)),
            Text("conv" if layer.kind == "convolution" else layer.kind),
            Text(f"{layer.alone_db:.1f}"),
            Text(f"{layer.without_db:.1f}"),
            Text(percent(explanation.share(layer), 1)),
            *map(Text, times),
            Text(_bar(layer.alone / most if most else 0.0), "red"),
        )
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bar(part: float) -> str:
    """A bar of ``part`` of the full width; at least one eighth of a character."""
    eighths = max(1, round(part * BAR * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _named(names: Sequence[str]) -> str:
    listed = ", ".join(map(numbers.clean, names[:FIRST]))
    return f"{listed}, ..." if len(names) > FIRST else listed


def _section(title: str, items: Iterable[str]) -> Iterator[Text]:
    for index, item in enumerate(items):
        if not index:
            yield Text()
            yield Text(title, "bold")
        yield Text(f"- {item}")


# The figure. Lengths are in pixels.
_LINE = 18
_TOP = 96
_BOTTOM = 52
_PANEL = 420
_SIDE = 200
_GAP = 36
_CHARACTER = 6.7
_LONGEST = 44
_ALONE, _WITHOUT, _TIME, _LOSS, _INK, _GRID = "#c8374a", "#1b6ca8", "#4c956c", "#e09f3e", "#222222", "#dddddd"


def svg(explanation: Explanation) -> str:
    """The explanation as one self-contained SVG image with a line for each layer, the worst on top.

    The left panel shows signal over error with only that layer in int8 and with all others in int8, against all layers
    in int8. The right panel shows the time the layer saves or, if it was not measured, its multiply-adds.
    """
    rows = explanation.worst_first
    names = [_shortened(numbers.clean(layer.name)) for layer in rows]
    left = 24 + round(_CHARACTER * max(map(len, names)))
    decibels = [value for layer in rows for value in (layer.alone_db, layer.without_db)] + [explanation.sqnr_db]
    finite = [value for value in decibels if value < 200] or [0.0]
    db = _Axis(min(finite), max(finite), left, _PANEL)
    costs = [_cost(explanation, layer) for layer in rows]
    side = _Axis(min(0.0, *costs), max(0.0, *costs), left + _PANEL + _GAP, _SIDE)
    title = f"{numbers.clean(explanation.model)}: {_headline(explanation)}"
    width, height = max(left + _PANEL + _GAP + _SIDE, round(8.3 * len(title))) + 24, _TOP + _LINE * len(rows) + _BOTTOM
    foot = _TOP + _LINE * len(rows)
    cost = "ms that int8 saves for a batch" if explanation.timed else "multiply-adds, millions an item"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 24, title, 'font-size="15" font-weight="600"'),
        *_legend(explanation),
        *db.drawn(foot, "signal over error at the output, dB (right is better)"),
        *side.drawn(foot, cost),
    ]
    line, zero = db.at(explanation.sqnr_db), side.at(0.0)
    parts += [
        f'<line x1="{line}" y1="{_TOP}" x2="{line}" y2="{foot}" stroke="{_INK}" stroke-dasharray="4 3"/>',
        f'<line x1="{zero}" y1="{_TOP}" x2="{zero}" y2="{foot}" stroke="#999999"/>',
    ]
    for index, (layer, name, value) in enumerate(zip(rows, names, costs, strict=True)):
        y = _TOP + _LINE * index + _LINE // 2
        a, b = db.at(layer.alone_db), db.at(layer.without_db)
        end = side.at(value)
        about = f"{layer.name} ({layer.kind}): alone {layer.alone_db:.1f} dB, all but it {layer.without_db:.1f} dB, "
        about += f"{layer.multiply_adds:,} multiply-adds"
        about += f", saves {layer.saves_ms:.3f} ms" if layer.saves_ms is not None else ""
        parts += [
            f"<g><title>{escape(numbers.clean(about))}</title>",
            _text(left - 12, y + 4, name, 'text-anchor="end" font-family="ui-monospace, monospace" font-size="11"'),
            f'<line x1="{min(a, b)}" y1="{y}" x2="{max(a, b)}" y2="{y}" stroke="#bbbbbb"/>',
            f'<circle cx="{a}" cy="{y}" r="4.5" fill="{_ALONE}"/>',
            f'<circle cx="{b}" cy="{y}" r="3.5" fill="white" stroke="{_WITHOUT}" stroke-width="2"/>',
            f'<rect x="{min(zero, end)}" y="{y - 5}" width="{round(abs(end - zero), 1)}" height="10" '
            f'fill="{_TIME if value >= 0 else _LOSS}"/></g>',
        ]
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Values along x, from a round one at ``left`` to another ``length`` further right."""

    def __init__(self, low: float, high: float, left: float, length: float) -> None:
        span = max(high - low, 1e-9 + abs(high) * 1e-6)
        step = 10.0 ** math.floor(math.log10(span / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
        self._low, self._high = math.floor(low / step) * step, math.ceil(high / step) * step
        if self._low == self._high:
            self._high += step
        self.ticks = [self._low + step * k for k in range(round((self._high - self._low) / step) + 1)]
        self._left, self._length = left, length

    def at(self, value: float) -> float:
        """The x of a value; those beyond the ends stand at the ends."""
        part = (value - self._low) / (self._high - self._low)
        return round(self._left + self._length * min(1.0, max(0.0, part)), 1)

    def drawn(self, foot: float, label: str) -> Iterator[str]:
        """Grid lines from the top to ``foot``, figures and the label below."""
        for tick in self.ticks:
            x = self.at(tick)
            yield f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{foot}" stroke="{_GRID}"/>'
            yield _text(x, foot + 16, f"{tick:.6g}", 'text-anchor="middle" font-size="11"')
        yield _text(self._left + self._length / 2, foot + 36, label, 'text-anchor="middle"')


def _legend(explanation: Explanation) -> Iterator[str]:
    y = 50
    yield f'<circle cx="18" cy="{y}" r="4.5" fill="{_ALONE}"/>'
    yield _text(30, y + 4, "this layer alone in int8")
    yield f'<circle cx="188" cy="{y}" r="3.5" fill="white" stroke="{_WITHOUT}" stroke-width="2"/>'
    yield _text(200, y + 4, "every layer but this one")
    yield f'<line x1="356" y1="{y}" x2="380" y2="{y}" stroke="{_INK}" stroke-dasharray="4 3"/>'
    yield _text(388, y + 4, f"every layer: {explanation.sqnr_db:.1f} dB")
    note = f"{explanation.weight_bits}-bit weights, {explanation.calibration} calibration samples"
    yield _text(12, y + 28, f"{note}. A blue ring right of the dashed line: returning the layer wins accuracy back.")


def _cost(explanation: Explanation, layer: "LayerSensitivity") -> float:
    return layer.saves_ms or 0.0 if explanation.timed else layer.multiply_adds / 1e6


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x}" y="{y}" {attributes}>{escape(text)}</text>'
