"""The command line: one file a command, and the only room that prints, exits or reads the environment."""

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from typing import Annotated, Any

import typer

from corewise._version import __version__
from corewise.cli import (
    bench,
    doctor,
    explain,
    loadtest,
    optimize,
    predict,
    renames,
    retune,
    serve,
    show,
    streams,
    verify,
)
from corewise.cli.declare import Group, add_command, flag
from corewise.common.errors import CorewiseError

app = typer.Typer(
    name="corewise",
    cls=Group,
    help="Make a PyTorch model run as fast on this CPU as the CPU allows, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (doctor, optimize, explain, show, verify, bench, predict, loadtest, retune, serve):
    add_command(app, module.__name__.rpartition(".")[2], module.command)

INTERRUPTED, TERMINATED = 130, 143


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, flag("--version", panel="Options", help="Print the version.")] = False) -> None:
    if version:
        print(f"corewise {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. What is wrong becomes one line on standard error and an exit code that is not 0."""
    streams.protect()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF data and the like, of one photo among many
    try:
        with _ended_by_sigterm():
            typed = sys.argv[1:]
            del sys.argv[1:]  # which files of users that parse their own arguments would take for theirs
            _run(typed)
    except streams.StreamFailed as failure:
        if failure.message:
            _complain(failure.message)
        sys.exit(failure.code)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end what runs as Ctrl-C does: no temporary folder is left, nor a process."""
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if received:
            sys.exit(TERMINATED)


def _run(typed: list[str]) -> None:
    arguments, renamed = renames.translate(typed)
    for warning in renamed:
        _complain(warning)
    try:
        app(arguments, prog_name="corewise")
    except CorewiseError as error:
        _complain(str(error))
        sys.exit(streams.FAILED)
    except OSError as error:
        _complain(_words(error))
        sys.exit(streams.FAILED)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(INTERRUPTED)
    finally:
        sys.stdout.flush()


def _words(error: OSError) -> str:
    """What the system refused: a name that is too long, a folder for temporary files, a connection."""
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
    if error.errno is None or isinstance(error, ConnectionError | TimeoutError):
        return what
    if error.filename is None and error.errno in (ENOSPC, EDQUOT):
        temporary = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
        return f"{what}; free space where this command writes and in {temporary}, or set TMPDIR to another folder"
    return f"{what}; check the path, its permissions and the free space there"


def _complain(text: str) -> None:
    """One line, whatever names of files it holds."""
    from corewise.report.numbers import clean

    sys.stderr.write(f"corewise: {clean(text)}\n")
