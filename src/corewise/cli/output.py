"""What several commands write: JSON, files, and reports on a terminal."""

import json
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


def check_file(path: Path | None) -> None:
    """Raise ``OutputError`` where ``write_file`` could not write, before any work is done."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise OutputError(f"{path} cannot be written: {why}", "name another file")


def write_file(path: Path, text: str) -> None:
    """Write a text file. Raises ``OutputError``."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # names of files need not be UTF-8
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "name another file") from error
