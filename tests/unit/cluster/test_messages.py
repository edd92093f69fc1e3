"""cluster.messages: what crosses is JSON, and comes out as it went in."""

import pytest

from corewise.cluster.messages import answer, answering, packed_rows, unpacked_rows
from corewise.common.errors import CorewiseError, MissingExtra, OutputError
from corewise.pipeline.parts import Record
from corewise.samples.archives import Slice


def test_rows_cross_as_they_are_and_a_problem_without_its_value() -> None:
    rows = [
        Record(0, "a.csv", "line 2", "grün \ud83d", ""),
        Record(1, "a.csv", "line 3", ("one", "two"), ""),
        Record(4, "c.tar/d.jpg", "", Slice("c.tar", 512, 3), ""),
        Record(2, "b\udcff.csv", "row 0", "\udc80", "is no UTF-8 at character 0"),
    ]
    crossed = packed_rows(rows)
    assert crossed.isascii()
    assert unpacked_rows(crossed) == [*rows[:3], rows[3]._replace(value=None)]


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(OutputError("full", "free space"), OutputError), (MissingExtra("ray", "ray", "it"), CorewiseError)],
)
def test_an_error_of_ours_crosses_and_says_where_it_was(raised: CorewiseError, kind: type[CorewiseError]) -> None:
    @answering
    def fails() -> int:
        raise raised

    with pytest.raises(kind) as caught:
        answer(int, fails(), "node a")
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.fix) == (f"node a: {raised.what}", raised.fix)


def test_a_file_that_a_node_cannot_use_is_an_error_of_ours() -> None:
    @answering
    def fails() -> int:
        raise PermissionError(13, "Permission denied", "/a")

    with pytest.raises(OutputError, match=r"^node a: /a cannot be used there: Permission denied; let Ray's user"):
        answer(int, fails(), "node a")


def test_a_value_of_another_type_is_none() -> None:
    @answering
    def says() -> str:
        return "many"

    with pytest.raises(ValueError, match="int"):
        answer(int, says(), "node a")
    assert answer(str, says(), "node a") == "many"
