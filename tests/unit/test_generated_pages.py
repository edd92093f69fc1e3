"""Pages and pictures that are made from the code and from committed figures are current."""

import importlib.util
import re
from inspect import cleandoc
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from corewise.report.charts import Column, columns


def script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["command-line.md", "python.md", "metrics.md"])
def test_the_reference_is_current(page: str) -> None:
    made = script("scripts/reference.py").pages()[page]
    assert (ROOT / "docs" / "reference" / page).read_text() == made, "run python scripts/reference.py"


def test_a_section_whose_only_item_has_two_lines_is_one_item() -> None:
    text = """Does it.

    Raises:
        InputError: the first line
            and the second.

    Returns:
        A number of
        rows.
    """
    shown = script("scripts/reference.py").docstring(cleandoc(text))
    assert shown[shown.index("**Raises**") :] == [
        "**Raises**",
        "",
        "- `InputError`: the first line and the second.",
        "",
        "**Returns**",
        "",
        "A number of rows.",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chart_shows_the_committed_figures(scheme: str) -> None:
    picture = script("bench/readme_picture.py")
    made = picture.chart(picture.results(), scheme)
    assert (picture.IMAGES / f"speed-{scheme}.svg").read_text() == made, "run python bench/readme_picture.py"


def test_columns_are_as_high_as_their_values() -> None:
    values = (1.0, 2.5, 10.0)
    group = [Column(value=value, interval=None, text=f"{value:g}", series="a", tip="<&>") for value in values]
    drawn = columns("name", "title", "what it is", [("one & two", group), ("none", []), ("three", group[:1])])
    heights = [float(height) for height in re.findall(r'<rect class="bar"[^>]* height="([\d.]+)"', drawn)]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2.5, 10, 1], rel=0.01)
    assert "<&>" not in drawn
    assert "one &amp; two" in drawn
