"""Nested inputs and outputs as a flat list of arrays, and back.

Engines know flat lists of tensors; models take and return dicts, tuples, dataclasses. ``flatten`` splits a
value into its arrays (``leaves``) and a ``Structure``, a plain tree that fits into JSON; ``unflatten`` puts
them together again. Needs neither torch nor numpy: a leaf is anything with ``.shape`` and ``.dtype``.
"""

import dataclasses
import re
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from corewise.common.errors import InputError
from corewise.common.phrases import with_article

Kind = Literal["leaf", "constant", "dict", "list", "tuple", "object"]
Key = str | int
Path = tuple[Key, ...]

KINDS = ("leaf", "constant", "dict", "list", "tuple", "object")
CONSTANTS = (type(None), bool, int, float, str)


class Record(dict[str, Any]):
    """Stands in for a dataclass whose class is not imported: ``r["x"]``, ``r.x``, and ``r[0]`` for the first field."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"no field {name!r}; there are {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)


@dataclass(frozen=True)
class Structure:
    """A nested value without its arrays.

    ``type`` is the class as ``module:qualname`` (empty for plain containers), ``keys`` names the ``children``
    (indices in lists and tuples, fields in objects and namedtuples), ``value`` is a constant's.
    """

    kind: Kind
    type: str = ""
    keys: Path = ()
    children: tuple["Structure", ...] = ()
    value: bool | int | float | str | None = None

    def to_data(self) -> dict[str, Any]:
        """This structure as plain JSON data."""
        return {
            "kind": self.kind,
            "type": self.type,
            "keys": list(self.keys),
            "children": [child.to_data() for child in self.children],
            "value": self.value,
        }

    @classmethod
    def from_data(cls, data: Any) -> "Structure":
        """The structure in data from ``to_data``; raises ``ValueError`` if the data is not one."""
        if not isinstance(data, dict) or set(data) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("a structure is an object with kind, type, keys, children and value")
        keys, children = data["keys"], data["children"]
        if data["kind"] not in KINDS or not isinstance(data["type"], str) or not isinstance(data["value"], CONSTANTS):
            raise ValueError(f"{data['kind']!r} of type {data['type']!r} is not a structure")
        if not isinstance(keys, list) or not isinstance(children, list) or len(keys) != len(children):
            raise ValueError("a structure has one key for each child")
        if not all(isinstance(key, str | int) for key in keys):
            raise ValueError("the keys of a structure are strings and integers")
        return cls(data["kind"], data["type"], tuple(keys), tuple(map(cls.from_data, children)), data["value"])


def flatten(value: Any, name: str = "value") -> tuple[list[Any], Structure]:
    """The arrays of ``value``, depth first, and the structure around them.

    Raises ``InputError`` for anything that is not an array, a constant or a known container; its message calls
    ``value`` by ``name``.
    """
    if _is_leaf(value):
        return [value], Structure("leaf")
    if type(value) in CONSTANTS:
        return [], Structure("constant", value=value)
    kind, class_name, items = _open(value, name)
    leaves: list[Any] = []
    children = []
    for key, item in items.items():
        below, child = flatten(item, _below(name, key))
        leaves += below
        children.append(child)
    return leaves, Structure(kind, class_name, tuple(items), tuple(children))


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The value that has this structure and these leaves.

    Classes are looked up among the modules already imported, never imported: an absent dataclass comes back as
    ``Record``, an absent namedtuple as a namedtuple of the same fields. Raises ``ValueError`` for a wrong number
    of leaves.
    """
    rest = iter(leaves)
    try:
        value = _build(structure, rest)
    except StopIteration:
        raise ValueError(f"{len(leaves)} leaves are too few for the structure") from None
    if next(rest, rest) is not rest:
        raise ValueError(f"{len(leaves)} leaves are too many for the structure")
    return value


def match(structure: Structure, value: Any, name: str = "inputs") -> list[Any]:
    """The leaves of ``value``, which must have this structure (classes aside), in the structure's order.

    Raises ``InputError`` naming the path where it differs, e.g. ``inputs["mask"]``.
    """
    if structure.kind == "leaf":
        if not _is_leaf(value):
            raise InputError(f"{name} is {_describe(value)}, but a tensor is expected", "give a tensor or an array")
        return [value]
    if structure.kind == "constant":
        if type(value) is not type(structure.value) or value != structure.value:
            raise InputError(
                f"{name} is {_describe(value)}, but {structure.value!r} is expected",
                "constants are fixed by the samples that the model was optimized with",
            )
        return []
    if _is_leaf(value) or type(value) in CONSTANTS:
        raise InputError(f"{name} is {_describe(value)}, but {with_article(structure.kind)} is expected")
    kind, _, items = _open(value, name)
    if kind != structure.kind:
        raise InputError(f"{name} is {_describe(value)}, but {with_article(structure.kind)} is expected")
    for key in items:
        if key not in structure.keys:
            raise InputError(f"{_below(name, key)} is not expected", f"give {_listing(structure.keys)}")
    leaves: list[Any] = []
    for key, child in zip(structure.keys, structure.children, strict=True):
        if key not in items:
            raise InputError(f"{_below(name, key)} is missing", f"give {_listing(structure.keys)}")
        leaves += match(child, items[key], _below(name, key))
    return leaves


def match_call(structure: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """``match`` for the arguments of a call, whose structure is that of the pair (args, kwargs).

    Where the samples were dicts, the call may also be ``fast(a_dict)``, or ``fast(ids, mask)``: values without a name
    take those of the samples' keys, in the samples' order. Constants of the samples may be left out.
    """
    positional, keyword = structure.children
    if keyword.keys and not positional.keys:
        args, kwargs = (), _named(keyword, args, kwargs)
    return match(positional, tuple(args), "inputs") + match(keyword, dict(kwargs), "inputs")


def _named(keyword: Structure, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """All arguments of a call by their names in the samples, which were dicts."""
    expected = dict(zip(keyword.keys, keyword.children, strict=True))
    names = [name for name, child in expected.items() if child.kind != "constant"]
    first = args[0] if len(args) == 1 else None
    if isinstance(first, Mapping) and not _is_first_value(expected, names, first):
        args, kwargs = (), {**first, **kwargs}
    if len(args) > len(names):
        raise InputError(
            f"there are {len(args)} inputs by position, more than the model has", f"give {_listing(tuple(names))}"
        )
    given = dict(zip(names, args, strict=False))
    for name in given:
        if name in kwargs:
            raise InputError(f"{_below('inputs', name)} is given twice, by position and by name", "give it once")
    constants = {name: child.value for name, child in expected.items() if child.kind == "constant"}
    return {**constants, **given, **kwargs}


def _is_first_value(expected: Mapping[Key, Structure], names: Sequence[Key], given: Mapping[Any, Any]) -> bool:
    """Whether a dict is the value of the first name, which is a dict itself, and not a dict of all names."""
    return bool(names) and expected[names[0]].kind == "dict" and not given.keys() <= expected.keys()


def leaf_names(structure: Structure, default: str = "output") -> tuple[str, ...]:
    """A tensor name for each leaf: its keys joined (``logits``, ``states_0``), or ``output_0`` where it has none."""
    return _unique([_join(path) or f"{default}_{i}" for i, path in enumerate(_paths(structure))])


def input_names(structure: Structure, parameters: Sequence[str] = ()) -> tuple[str, ...]:
    """A tensor name for each leaf of a call's (args, kwargs).

    ``parameters`` names the positional arguments; those it does not name are ``input_0``, ``input_1``, ...
    """
    names = []
    for i, (where, argument, *rest) in enumerate(_paths(structure)):
        if where == 0 and isinstance(argument, int) and argument < len(parameters):
            argument = parameters[argument]
        names.append(_join((argument, *rest)) or f"input_{i}")
    return _unique(names)


def _is_leaf(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type)


def _open(value: Any, name: str) -> tuple[Kind, str, dict[Key, Any]]:
    """A container's kind, its class where that must come back, and its items."""
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise InputError(f"{name} has the key {key!r}", "use strings as keys")
        return "dict", _class_name(value) if isinstance(value, OrderedDict) else "", dict(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "tuple", _class_name(value), dict(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return "list" if isinstance(value, list) else "tuple", "", dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields: dict[Key, Any] = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return "object", _class_name(value), fields
    raise InputError(
        f"{name} is {_describe(value)}, which is not a tensor",
        "use tensors and numbers in tuples, lists, dicts, namedtuples or dataclasses",
    )


def _build(structure: Structure, leaves: Iterator[Any]) -> Any:
    if structure.kind == "leaf":
        return next(leaves)
    if structure.kind == "constant":
        return structure.value
    values = [_build(child, leaves) for child in structure.children]
    if structure.kind == "list":
        return values
    if structure.kind == "tuple":
        return _namedtuple(structure)._make(values) if structure.type else tuple(values)
    items: dict[Any, Any] = dict(zip(structure.keys, values, strict=True))
    if not structure.type:
        return items
    class_ = _imported_class(structure.type)
    if class_ is OrderedDict:
        return OrderedDict(items)
    if class_ is not None and set(structure.keys) <= _init_fields(class_):
        return class_(**items)
    return Record(items)


def _namedtuple(structure: Structure) -> Any:
    class_: Any = _imported_class(structure.type)
    if class_ is not None and issubclass(class_, tuple) and getattr(class_, "_fields", None) == structure.keys:
        return class_
    return _new_namedtuple(structure.type, structure.keys)


@cache
def _new_namedtuple(class_name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(re.sub(r"\W", "_", class_name.rpartition(".")[2].rpartition(":")[2]) or "Fields", fields)


def _imported_class(name: str) -> type | None:
    """The class that ``module:qualname`` names, if its module is imported.

    Attributes are read from ``vars``: a module's own ``__getattr__`` may import.
    """
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def _init_fields(class_: type) -> set[str]:
    # Only dataclasses are called: a name in an artifact must not be able to call any other class.
    if not dataclasses.is_dataclass(class_):
        return set()
    return {field.name for field in dataclasses.fields(class_) if field.init}


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _paths(structure: Structure, above: Path = ()) -> Iterator[Path]:
    if structure.kind == "leaf":
        yield above
    for key, child in zip(structure.keys, structure.children, strict=True):
        yield from _paths(child, (*above, key))


def _join(path: Path) -> str:
    """The path from its first name on: ``states_0`` for ``(0, "states", 0)``; nothing where it has no name."""
    first = next((i for i, key in enumerate(path) if isinstance(key, str)), len(path))
    return re.sub(r"\W", "_", "_".join(map(str, path[first:])))


def _unique(names: list[str]) -> tuple[str, ...]:
    taken: list[str] = []
    for name in names:
        repeats = 0
        candidate = name
        while candidate in taken:
            repeats += 1
            candidate = f"{name}_{repeats}"
        taken.append(candidate)
    return tuple(taken)


def _below(name: str, key: Key) -> str:
    return f'{name}["{key}"]' if isinstance(key, str) else f"{name}[{key}]"


def _describe(value: Any) -> str:
    if type(value) in CONSTANTS:
        return repr(value)
    return "a tensor" if _is_leaf(value) else with_article(type(value).__name__)


def _listing(keys: Path) -> str:
    if keys and not any(isinstance(key, str) for key in keys):  # "give 0, 1" is no advice
        return "one value" if len(keys) == 1 else f"{len(keys)} values"
    return ", ".join(str(key) for key in keys) or "nothing"
