"""What several commands write: JSON, files, and reports on a terminal."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corewise.common.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console


def console(*, stderr: bool = False) -> "Console":
    """A console on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


def print_json(data: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(data, indent=2))


@contextmanager
def only_json(as_json: bool) -> Iterator[None]:
    """With ``as_json``, have what the user's own code prints meanwhile go to standard error."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def check_file(path: Path | None) -> None:
    """Raise ``OutputError`` where ``write_file`` could not write, before any work is done."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "this user may not write there"
    else:
        return
    raise OutputError(f"{path} cannot be written: {why}", "name another file")


def write_file(path: Path, text: str) -> None:
    """Write a text file. Raises ``OutputError``."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # names of files need not be UTF-8
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "name another file") from error
