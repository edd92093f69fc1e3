"""docs/troubleshooting.md explains messages that corewise really prints."""

import re
from pathlib import Path

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
REFUSAL = re.compile(r"^- \*([^*]+):\* ", re.MULTILINE)
SOURCE = "\n".join(path.read_text() for path in sorted(Path(ROOT / "src").rglob("*.py")))
TEXT = re.sub(r'"\s*f?"', "", SOURCE)
"""The source with strings that go on in the next line as one."""


@pytest.mark.parametrize("message", ROW.findall(PAGE))
def test_a_message_of_the_table_is_printed(message: str) -> None:
    assert message in TEXT


def test_the_reasons_of_503_are_the_queues() -> None:
    start = PAGE.index("## The server refuses requests with 503")
    reasons = REFUSAL.findall(PAGE[start : PAGE.index("\n## ", start)])
    assert len(reasons) == 4
    assert [reason for reason in reasons if reason not in TEXT] == []
