"""imports: users' functions are found beside their siblings, and what they raise becomes one line."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from corewise.common.errors import MetricError, SourceError
from corewise.common.references import call_reference, describe, find_reference, guard, reference_to


@pytest.fixture(autouse=True)
def _unchanged_path() -> Any:
    before = list(sys.path)
    yield
    assert sys.path == before


def test_a_file_is_imported_once_and_may_have_the_name_of_any_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def one(): return 1\ndef two(): return 2\n")
    one = find_reference(f"{tmp_path}/json.py:one", SourceError, "model")
    two = find_reference(f"{tmp_path}/json.py:two", SourceError, "model")
    assert one.__globals__ is two.__globals__
    assert call_reference(f"{tmp_path}/json.py:two", SourceError, "model") == 2
    assert "dumps" in vars(sys.modules["json"])


def test_siblings_can_be_imported_when_the_function_runs(tmp_path: Path) -> None:
    (tmp_path / "corewise_late.py").write_text("VALUE = 5\n")
    (tmp_path / "caller.py").write_text("def made():\n    import corewise_late\n    return corewise_late.VALUE\n")
    assert call_reference(f"{tmp_path}/caller.py:made", SourceError, "model") == 5


def test_a_file_that_failed_can_be_corrected_and_imported(tmp_path: Path) -> None:
    file = tmp_path / "corewise_fixed.py"
    file.write_text("raise OSError\n")
    with pytest.raises(SourceError, match=r"cannot be imported: OSError \(.*corewise_fixed.py:1\)"):
        find_reference(f"{file}:made", SourceError, "model")
    file.write_text("def made(): return 'corrected'\n")
    assert call_reference(f"{file}:made", SourceError, "model") == "corrected"


def test_what_is_there_and_no_function_is_named(tmp_path: Path) -> None:
    file = tmp_path / "corewise_values.py"
    file.write_text("made = [1, 2]\n")
    what = f"{file} has no function 'made': made is a list; name a function that returns it"
    with pytest.raises(SourceError) as caught:
        find_reference(f"{file}:made", SourceError, "model")
    assert str(caught.value) == what
    is_list = lambda found: isinstance(found, list)  # noqa: E731
    assert call_reference(f"{file}:made", SourceError, "samples", is_list) == [1, 2]


def test_a_file_of_a_package_is_named_by_its_package(tmp_path: Path) -> None:
    (tmp_path / "corewise_part.py").write_text("from .other import made\n")
    with pytest.raises(SourceError, match=r"attempted relative import.*package\.corewise_part:function"):
        find_reference(f"{tmp_path}/corewise_part.py:made", SourceError, "model")


def test_callables_that_are_no_functions_are_named_by_their_class() -> None:
    assert reference_to(partial(print)) == "functools:partial"
    assert reference_to(describe) == "corewise.common.references:describe"


@pytest.mark.parametrize("reference", ["", "module", ":function", "module:"])
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(SourceError, match=r"does not name a function; write module:function"):
        find_reference(reference, SourceError, "model factory")


def test_guard_names_error_and_place_and_lets_our_own_errors_and_interrupts_pass() -> None:
    with pytest.raises(SourceError) as caught, guard(SourceError, "the factory failed"):
        raise ValueError("first\nsecond")
    line = caught.traceback[0].lineno + 2
    assert str(caught.value) == f"the factory failed: ValueError: first ({__file__}:{line}); correct the code there"
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(MetricError, match="ours"), guard(SourceError, "the factory failed"):
        raise MetricError("ours")
    with pytest.raises(KeyboardInterrupt), guard(SourceError, "the factory failed"):
        raise KeyboardInterrupt
    with pytest.raises(SourceError, match="SystemExit: 1"), guard(SourceError, "the factory failed"):
        raise SystemExit(1)


def test_the_place_is_in_the_users_code_even_where_a_library_raised() -> None:
    with pytest.raises(OSError, match="nowhere") as caught:
        Path("/nowhere/at/all").read_text()
    assert describe(caught.value).startswith("FileNotFoundError: [Errno 2]")
    assert f"({__file__}:" in describe(caught.value)
