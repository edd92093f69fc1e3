"""samples.folders: a folder that cannot be read is an error, wherever it is: nobody would miss its files."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from corewise.common.errors import SamplesError
from corewise.samples.folders import list_files, read_folder
from corewise.samples.tables import READERS

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a file, and with one below it that this process cannot read. Not ``tmp_path``, which is its owner's."""
    list_files([__file__], [".py"], "files")  # imports what it needs
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        made.chmod(0o755)
        (made / "a.txt").write_text("a\n")
        (made / "a.png").touch()
        for closed in ("closed", "lost+found"):
            (made / closed).mkdir()
        (made / "closed" / "b.txt").write_text("b\n")
        (made / "closed").chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read all
            os.seteuid(NOBODY)
        try:
            yield made
        finally:
            os.seteuid(user)
            (made / "closed").chmod(0o755)


def test_a_folder_below_that_cannot_be_read_is_named(folder: Path) -> None:
    what = r"closed cannot be read: Permission denied; check the path and its permissions$"
    with pytest.raises(SamplesError, match=what):
        list_files([folder], READERS, "files of texts")
    with pytest.raises(SamplesError, match=what):
        list_files([folder / "closed"], READERS, "files of texts")
    with pytest.raises(SamplesError, match=r"b\.txt cannot be read: Permission denied|there is no file .*b\.txt"):
        list_files([folder / "closed" / "b.txt"], READERS, "files of texts")
    with pytest.raises(SamplesError, match=what):
        read_folder(folder)


def test_what_a_file_system_keeps_for_itself_is_no_input(folder: Path) -> None:
    os.seteuid(os.getuid())
    (folder / "closed").chmod(0o755)
    (folder / "lost+found" / "c.txt").write_text("c\n")
    assert [path.name for path in list_files([folder], READERS, "files of texts")] == ["a.txt", "b.txt"]
