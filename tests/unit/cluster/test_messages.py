"""cluster.messages: what crosses is JSON, and comes out as it went in."""

import json
import re
from pathlib import Path

import pytest

from corewise._version import __version__
from corewise.cluster.actor import Answerer, _check_readable
from corewise.cluster.messages import (
    Prepared,
    Task,
    answer,
    answering,
    packed_rows,
    unpacked_alike,
    unpacked_rows,
)
from corewise.cluster.replica import Replica
from corewise.common.errors import CorewiseError, EngineError, MissingExtra, OutputError, SamplesError
from corewise.pipeline.parts import Record
from corewise.samples.archives import Slice
from corewise.samples.places import place_of

pytest.importorskip("fsspec")
BUCKET = "fsspec+memory://bucket"


def test_a_record_of_another_version_is_not_read() -> None:
    """It has other fields, which would be told as errors of types."""
    theirs = json.dumps({"version": "0.0.1", "color": "red"})
    with pytest.raises(EngineError, match=rf"it has corewise {re.escape(__version__)}; install 0\.0\.1, as where the"):
        unpacked_alike(Task, theirs)
    with pytest.raises(EngineError, match=r"^node a: it has corewise .*; install 0\.0\.1"):
        answer(Prepared, Answerer(theirs).prepare(1), "node a")
    with pytest.raises(EngineError, match=r"it has corewise .*; install 0\.0\.1"):
        str(Replica(theirs)._settings)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone.jpg", r"there is no input .*gone\.jpg there; put the inputs into a folder that all nodes share"),
        (f"{BUCKET}/gone.jpg", r"there is no input fsspec\+memory://bucket/gone\.jpg there; put the inputs into"),
    ],
)
def test_a_node_that_does_not_see_the_inputs_takes_no_part(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(SamplesError, match=what):
        _check_readable(place_of(name if "://" in name else tmp_path / name))
    (tmp_path / "here.jpg").touch()
    _check_readable(tmp_path / "here.jpg")


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
