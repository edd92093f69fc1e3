"""Records as plain JSON data and back.

``to_json`` and ``from_json`` are the only way in and out: data read from a file or a socket is validated against the
types of the records, so a damaged journal or manifest is an error and never a strange value.
"""

import dataclasses
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_json(value: Any) -> Any:
    """A record (or a tuple, list or dict of records) as plain JSON data; a record may bring its own ``to_data``."""
    if hasattr(value, "to_data"):
        return value.to_data()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[T], data: Any) -> T:
    """Plain JSON data as a value of ``kind``.

    Raises ``ValueError`` (pydantic's ``ValidationError``) if the data does not fit the types.
    """
    adapter: TypeAdapter[T] = _adapter(cast(Hashable, kind))
    return adapter.validate_python(data)
