"""common.phrases: percent signs and articles, the same in every message."""

import re

import pytest
from places import ROOT

from corewise.common.phrases import percent, with_article

PERCENT = re.compile(r"%\}|\} ?%[ \"]")
ARTICLE = re.compile(r"\ban? \{(type\(|kind\b|name\b|noun\b)")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (percent(0.977, 1), "97.7 %"),
        (percent(0.005), "0 %"),
        (percent(0.07, signed=True), "+7 %"),
        (percent(-0.07, signed=True), "-7 %"),
        (with_article("list"), "a list"),
        (with_article("int"), "an int"),
        (with_article("uint8 array"), "a uint8 array"),
        (with_article("Embedding"), "an Embedding"),
        (with_article(""), "a "),
    ],
)
def test_phrases(said: str, text: str) -> None:
    assert said == text


@pytest.mark.parametrize("pattern", [PERCENT, ARTICLE], ids=["percent", "article"])
def test_no_room_has_a_form_of_its_own(pattern: re.Pattern[str]) -> None:
    phrases = ROOT / "src/corewise/common/phrases.py"
    found = {
        f"{path.name}:{number}: {line.strip()}"
        for path in (ROOT / "src").rglob("*.py")
        if path != phrases
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    }
    assert not found
