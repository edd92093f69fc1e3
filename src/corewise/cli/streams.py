"""Standard output and standard error that take any text, and whose failures are no tracebacks."""

import codecs
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO, cast

PLAIN = {"✓": "+", "✗": "x", "·": ".", "▸": ">", "→": "->", "…": "..."}
"""What stands for corewise's own signs where a terminal's encoding lacks them."""
BROKEN_PIPE = 141
"""The exit code of a program that SIGPIPE ends."""
FAILED = 2
"""The exit code for whatever is wrong with the input or the output."""


class StreamFailed(SystemExit):
    """A standard stream cannot be written: the program ends, whatever it was doing.

    Not an ``OSError``, which a search would take for a full disk, nor a ``CorewiseError``, which it would take for the
    failure of a candidate. The message is empty for a closed pipe, because the reader wanted no more.
    """

    def __init__(self, name: str, error: OSError) -> None:
        closed = isinstance(error, BrokenPipeError)
        super().__init__(BROKEN_PIPE if closed else FAILED)
        self.message = "" if closed else f"{name} cannot be written: {error.strerror}"


def protect() -> None:
    """Guard ``sys.stdout`` and ``sys.stderr``."""
    codecs.register_error("corewise-plain", _plain)
    for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, attribute)
        if stream is None:  # closed by whoever started this process
            setattr(sys, attribute, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="corewise-plain")
            setattr(sys, attribute, cast(TextIO, _Guarded(stream, name)))


def takes_more(stream: TextIO) -> bool:
    """Whether a line can be written to it without waiting for whoever reads it: a pipe may be full."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is no file
        return True
    return bool(poll.poll(0))


class _Guarded:
    """A text stream that raises ``StreamFailed`` where it cannot be written, once."""

    def __init__(self, stream: TextIOWrapper, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        with self._guard():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._guard():
            self._stream.flush()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffer goes nowhere, or the interpreter's last flush would fail again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            raise StreamFailed(self._name, error) from error


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces what an encoding lacks: corewise's signs by similar ones, all else by question marks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
