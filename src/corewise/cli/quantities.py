"""The text of an option as a value: numbers, durations, sizes, addresses. An error names the option as it was typed."""

import shlex
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TypeVar

from corewise.common.errors import InputError

Value = TypeVar("Value")
Parse = Callable[[str, str], Value]
"""Makes a value from an option's name and its text. Raises ``InputError``."""

TIMES_S = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZES_BYTES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "kb": 1e3, "mb": 1e6, "gb": 1e9}
SIZES_BYTES |= {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}


def duration(option: str, text: str) -> float:
    """``90s``, ``5m``, ``1h``, ``500ms`` or plain seconds: seconds above 0."""
    return _quantity(option, text, TIMES_S, lambda value: value > 0, "a time above 0: 90s, 5m or 1h")


def duration_or_zero(option: str, text: str) -> float:
    """A duration as ``duration`` reads it, in seconds, or 0."""
    return _quantity(option, text, TIMES_S, lambda value: value >= 0, "a time: 0, 30s or 5m")


def size(option: str, text: str) -> int:
    """``500M``, ``2G``, ``64MiB`` or plain bytes: bytes, 1 or more."""
    return int(_quantity(option, text, SIZES_BYTES, lambda value: value >= 1, "a size: 500M, 2G or 64MiB"))


def whole(least: int) -> Parse[int]:
    """Parses whole numbers, ``least`` or more."""

    def parse(option: str, text: str) -> int:
        if not _is_whole(text) or int(text) < least:
            raise _wrong(option, text, f"a whole number, {least} or more")
        return int(text)

    return parse


@dataclass(frozen=True)
class Span:
    """From the least to the most. No tuple, for which typer would take two words."""

    least: int
    most: int

    def __str__(self) -> str:
        """As it is typed: typer parses defaults too."""
        return f"{self.least}-{self.most}"


def span(option: str, text: str) -> Span:
    """``2-8``, or ``2`` for 2 to 2: whole numbers, 1 or more."""
    least, dash, most = text.partition("-")
    most = most if dash else least
    if not (_is_whole(least) and _is_whole(most) and 1 <= int(least) <= int(most)):
        raise _wrong(option, text, "a number or two, e.g. 2 or 2-8")
    return Span(int(least), int(most))


def above_zero(example: str) -> Parse[float]:
    """Parses finite numbers above 0."""
    return _number(lambda value: 0 < value < inf, f"a number above 0, e.g. {example}")


def zero_or_more(example: str) -> Parse[float]:
    """Parses finite numbers of 0 or more."""
    return _number(lambda value: 0 <= value < inf, f"0 or more, e.g. {example}")


def share(example: str) -> Parse[float]:
    """Parses numbers from 0 to 1."""
    return _number(lambda value: 0 <= value <= 1, f"a number from 0 to 1, e.g. {example}")


def choice(*names: str) -> Parse[str]:
    """Parses one of these names."""

    def parse(option: str, text: str) -> str:
        if text not in names:
            raise _wrong(option, text, f"{', '.join(names[:-1])} or {names[-1]}")
        return text

    return parse


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Finite numbers with commas between them."""
    try:
        parsed = tuple(float(part) for part in text.split(","))
    except ValueError:
        parsed = (inf,)
    if not all(map(isfinite, parsed)):
        raise _wrong(option, text, "numbers with commas, e.g. .485,.456,.406")
    return parsed


def address(option: str, text: str) -> tuple[str, int]:
    """``127.0.0.1:8000`` or ``[::1]:8000``."""
    host, _, port = text.rpartition(":")
    if not host or not _is_whole(port) or not 0 <= int(port) <= 65535:
        raise _wrong(option, text, "HOST:PORT, e.g. 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def origin(option: str, text: str) -> str:
    """A page's origin, ``https://example.org:8443``, or ``*``."""
    scheme, _, rest = text.partition("://")
    if text != "*" and (scheme not in ("http", "https") or not rest or set("/?#@ ") & set(rest)):
        raise _wrong(option, text, "an origin without a path, e.g. https://example.org, or *")
    return text


def lines(path: Path | None) -> list[str]:
    """The lines of a text file that are not empty; none without a file."""
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"{path} cannot be read: {why}", "give a text file") from error


def _number(fits: Callable[[float], bool], wanted: str) -> Parse[float]:
    def parse(option: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise _wrong(option, text, wanted)
        return value

    return parse


def _quantity(option: str, text: str, units: Mapping[str, float], fits: Callable[[float], bool], wanted: str) -> float:
    """A finite number that fits, times its unit."""
    number = text.rstrip(string.ascii_letters)
    try:
        value = float(number) * units[text[len(number) :].lower()]
    except (ValueError, KeyError):
        value = float("nan")
    if not fits(value) or value == inf:
        raise _wrong(option, text, wanted)
    return value


def _is_whole(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal()


def _wrong(option: str, text: str, wanted: str) -> InputError:
    return InputError(f"{option} is {shlex.quote(text)}", f"give {wanted}")
