"""Phrases that messages and reports of all rooms are made of. Pure."""

from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160


def percent(share: float, digits: int = 0, *, signed: bool = False) -> str:
    """``97.7 %``, or ``+7 %``.

    Example:
        >>> percent(0.977, 1), percent(0.07, signed=True)
        ('97.7 %', '+7 %')
    """
    return f"{share:{'+' if signed else ''}.{digits}%}".replace("%", " %")


def with_article(noun: str) -> str:
    """``a list``, ``an int``, ``a uint8 array``. Names in code that begin with a u are spoken as *you* begins.

    Example:
        >>> [with_article(noun) for noun in ("list", "int", "uint8 array", "IoU threshold")]
        ['a list', 'an int', 'a uint8 array', 'an IoU threshold']
    """
    return f"an {noun}" if noun[:1].lower() in [*"aeio"] else f"a {noun}"


def shown(value: Any, most: int = 40) -> str:
    """The beginning of a value's ``repr`` in one line, also if that fails or would be very long.

    Example:
        >>> shown({"text": None}), shown([[0] * 10**6], 12)
        ("{'text': None}", '[[0, 0, 0, 0')
    """
    return _SHORT.repr(value)[:most].replace("\n", " ")
