"""What a job's driver and its actors say to each other: JSON in strings, whatever carries them.

Ray pickles what it carries. So that no value of ours depends on it, nothing but strings and numbers crosses: records
are validated against their types when they arrive, and an error is a value too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from corewise._version import __version__
from corewise.common.errors import (
    ArtifactError,
    CorewiseError,
    EngineError,
    InputError,
    OutputError,
    SamplesError,
    SourceError,
)
from corewise.pipeline.parts import Record
from corewise.pipeline.photos import ImageAsk
from corewise.records.build import Plan
from corewise.records.bulk import PlanSource
from corewise.records.jsonable import from_json, to_json
from corewise.records.tuned import Machine
from corewise.samples.archives import Slice

T = TypeVar("T")

KINDS = (SourceError, SamplesError, OutputError, InputError, ArtifactError, EngineError, CorewiseError)
"""The errors that cross as they are; others cross as the nearest of these."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all actors of a job are told."""

    version: str
    """The version of the driver's corewise."""
    artifact: Path
    identity: str
    output: str
    """The folder's path or URL."""
    job: str
    """The sha256 of the file in the output that says which job it is."""
    several: bool
    prompt: str | None
    ask: ImageAsk | None
    preprocess: str | None
    seen: tuple[str, ...]
    """Some of the inputs that the actors read themselves, to see whether they can."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An actor has looked at its machine and found all that it needs: it would run this plan."""

    pid: int
    machine: Machine
    plan: Plan
    source: PlanSource


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A part is written."""

    rows: int
    failed: int
    example: str
    cut: int = 0


def packed(value: Any) -> str:
    """A record as a message."""
    return json.dumps(to_json(value))


def unpacked(kind: type[T], text: str) -> T:
    """The record of a message, of that type."""
    return from_json(kind, json.loads(text))


def unpacked_alike(kind: type[T], text: str) -> T:
    """``unpacked`` of a record with the version of corewise that packed it; in others it has other fields.

    Raises ``EngineError`` if that is not this version.
    """
    theirs = json.loads(text)["version"]
    if theirs != __version__:
        raise EngineError(f"it has corewise {__version__}", f"install {theirs}, as where the command runs")
    return unpacked(kind, text)


def packed_rows(rows: Sequence[Record]) -> str:
    """Rows as a message. A row with a problem is sent without its value, which may be no text."""
    return json.dumps([record._replace(value=None) if record.problem else record for record in rows])


def unpacked_rows(text: str) -> list[Record]:
    """The rows of a message; a pair of texts is a tuple again, and four values are a part of a tar file."""
    rows = [Record(*row) for row in json.loads(text)]
    return [row._replace(value=_of_list(row.value)) if isinstance(row.value, list) else row for row in rows]


def _of_list(values: list[Any]) -> tuple[str, str] | Slice:
    if len(values) == len(Slice._fields):
        path, start, size_bytes, compressed = values
        return Slice(str(path), int(start), int(size_bytes), bool(compressed))
    first, second = values
    return str(first), str(second)


def answering(method: Callable[..., Any]) -> Callable[..., str]:
    """A method whose value, or whose error of ours or of a file, becomes a message that ``answer`` reads."""

    @wraps(method)
    def call(*arguments: Any) -> str:
        try:
            return json.dumps({"value": to_json(method(*arguments))})
        except CorewiseError as error:
            return refusal(error)
        except OSError as error:
            what = f"{error.filename or 'a file'} cannot be used there: {error.strerror or error}"
            return refusal(OutputError(what, "let Ray's user read and write it"))

    return call


def refusal(error: CorewiseError) -> str:
    """An error of ours as the message of a method that raises it."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind in KINDS)
    return json.dumps({"error": kind, "what": error.what, "fix": error.fix})


def answer(kind: type[T], text: str, place: str) -> T:
    """The value that an ``answering`` method returned; raises its error, which then says where it happened."""
    told = json.loads(text)
    if "error" in told:
        kinds = {kind.__name__: kind for kind in KINDS}
        raise kinds[told["error"]](f"{place}: {told['what']}", told["fix"])
    return from_json(kind, told["value"])
