"""docs/structure.md tells the same floors as the layer test."""

import re

from places import ROOT
from test_layers import LAYERS

PAGE = ROOT / "docs" / "structure.md"
ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| ", re.MULTILINE)


def test_the_page_and_the_layer_test_tell_the_same_floors() -> None:
    told = [(int(floor), room) for floor, room in ROW.findall(PAGE.read_text())]
    enforced = [(len(LAYERS) - level, room) for level, rooms in enumerate(LAYERS) for room in rooms]
    assert sorted(told) == sorted(enforced)
    assert [floor for floor, _ in told] == sorted((floor for floor, _ in told), reverse=True)
