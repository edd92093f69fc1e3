"""What people type on the command line, as values. Raises ``InputError`` naming the option and an example."""

import string
from pathlib import Path

from corewise.common.errors import InputError

TIMES = {"": 1, "s": 1, "m": 60, "h": 3600}
SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZES |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def seconds(option: str, text: str) -> float:
    """``90s``, ``5m`` or ``1h``."""
    return _quantity(option, text, TIMES, "90s, 5m or 1h")


def size_bytes(option: str, text: str) -> int:
    """``500M`` or ``2GiB``."""
    return int(_quantity(option, text.upper(), SIZES, "500M or 2G"))


def address(option: str, text: str) -> tuple[str, int]:
    """``127.0.0.1:8000`` or ``[::1]:8000``."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise InputError(f"{option} is {text!r}", "give HOST:PORT, e.g. 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def floats(option: str, text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}", "give numbers with commas, e.g. .485,.456,.406") from error


def lines(path: Path | None) -> list[str]:
    """The lines of a text file that are not empty; none without a file."""
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "give a text file") from error


def _quantity(option: str, text: str, units: dict[str, int], example: str) -> float:
    """A number above 0 with a unit."""
    number = text.rstrip(string.ascii_letters)
    try:
        value = float(number) * units[text[len(number) :].strip()]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{option} is {text!r}", f"give e.g. {example}")
    return value
