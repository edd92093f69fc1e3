"""README's chart: corewise beside eager PyTorch and the engines used by hand, from bench/results/main_job_*.json.

    python bench/readme_picture.py

Writes docs/images/speed-light.svg and speed-dark.svg. Each column is a contender's items per second over eager
PyTorch's, both from the same alternating run, with the 95 % interval of that ratio. ONNX Runtime's is the faster of
fp32 and its static int8, OpenVINO's the faster of its two performance hints.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from corewise.common.stats import ratio_interval
from corewise.report.charts import Column, columns
from corewise.report.numbers import rate

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"


class Series(NamedTuple):
    """A contender of the chart: the fastest of ``names`` on each model."""

    label: str
    key: str
    names: tuple[str, ...]
    light: str
    dark: str


MODELS = {
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "resnet20": "ResNet-20",
    "minilm_128": "MiniLM, 128 tokens",
    "vit_s": "ViT-S",
}
SERIES = (
    Series("eager PyTorch", "eager", ("eager",), "#aeb6bf", "#5d6873"),
    Series("torch.compile", "compile", ("torch.compile",), "#8b95a1", "#7b8794"),
    Series(
        "ONNX Runtime",
        "onnxruntime",
        ("ONNX Runtime fp32", "ONNX Runtime int8 (quantize_static)"),
        "#d9a514",
        "#c9971a",
    ),
    Series(
        "OpenVINO + NNCF int8",
        "openvino",
        ("OpenVINO int8 (NNCF), LATENCY", "OpenVINO int8 (NNCF), THROUGHPUT"),
        "#b04a00",
        "#f2a33a",
    ),
    Series("corewise", "corewise", ("corewise",), "#0069a8", "#5bb8ee"),
)
INK = {"light": ("#17202a", "#566270"), "dark": ("#e7ebef", "#a2adb8")}
FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"
LEGEND_HEIGHT = 52


def results() -> dict[str, dict[str, Any]]:
    """Each model's committed figures."""
    return {model: json.loads((RESULTS / f"main_job_{model}.json").read_text()) for model in MODELS}


def group(result: dict[str, Any]) -> list[Column]:
    """One model's columns; a contender that cannot run the model has none."""
    rates: dict[str, list[float]] = result["rates_per_s"]
    drawn = []
    for series in SERIES:
        able = [name for name in series.names if name in rates]
        if not able:
            continue
        name = max(able, key=lambda name: median(rates[name]))
        ratio = ratio_interval(rates[name], rates["eager"])
        drawn.append(
            Column(
                value=ratio.value,
                interval=None if name == "eager" else (ratio.low, ratio.high),
                text=f"{ratio.value:.1f}",
                series=series.key,
                tip=f"{name}: {rate(median(rates[name]), 'items')}, {ratio.value:.2f} times eager "
                f"[{ratio.low:.2f}, {ratio.high:.2f}]",
            )
        )
    return drawn


def chart(found: dict[str, dict[str, Any]], scheme: str) -> str:
    """The whole picture as one SVG file in ``light`` or ``dark``."""
    ink, soft = INK[scheme]
    colour = {series.key: getattr(series, scheme) for series in SERIES}
    plot = columns(
        "speed",
        "Speed over eager PyTorch on two cores of an AMD Zen 4",
        "Columns for five models: eager PyTorch is 1; corewise is the fastest on each.",
        [(MODELS[model], group(result)) for model, result in found.items()],
    )
    width, height = (float(number) for number in plot.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    style = (
        f"text{{font:12px {FONT};fill:{ink}}}.figure{{font-size:11px}}.group{{font-size:13px;font-weight:600}}"
        f".soft{{fill:{soft}}}.axis{{stroke:{soft}}}.interval{{stroke:{ink};stroke-opacity:.55;fill:none}}"
        + "".join(f".{key} .bar{{fill:{value}}}" for key, value in colour.items())
        + ".corewise .figure{font-weight:700}"
    )
    inner = plot.replace("<svg ", f'<svg y="{LEGEND_HEIGHT}" width="{width:g}" height="{height:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + LEGEND_HEIGHT:g}" '
        f'width="{width:g}" height="{height + LEGEND_HEIGHT:g}"><style>{style}</style>{legend(SERIES)}{inner}</svg>\n'
    )


def legend(shown: Sequence[Series]) -> str:
    """What is drawn, and which colour is whose."""
    title = "Times the throughput of eager PyTorch on two cores of an AMD Zen 4, with 95 % intervals"
    parts, left = [f'<text class="soft" x="0" y="14">{title}</text>'], 0.0
    for series in shown:
        parts.append(
            f'<g class="{series.key}"><rect class="bar" x="{left:.0f}" y="26" width="11" height="11" rx="2"/>'
            f'<text x="{left + 16:.0f}" y="36">{series.label}</text></g>'
        )
        left += 16 + 6.6 * len(series.label) + 18
    return "".join(parts)


def main() -> None:
    """Write both pictures."""
    IMAGES.mkdir(exist_ok=True)
    found = results()
    for scheme in INK:
        (IMAGES / f"speed-{scheme}.svg").write_text(chart(found, scheme))


if __name__ == "__main__":
    main()
