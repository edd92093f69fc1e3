"""What a module keeps between calls, what of it a call changed, and the line of code that changes it."""

import ast
import inspect
import linecache
import textwrap
from collections import deque
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corewise.records.behaviour import Origin

CONSTANTS = (type(None), bool, int, float, str)
DEEPEST = 4
"""Containers and objects within each other that are looked into; a cache is a dict of lists of tensors at most."""
OWN = frozenset(vars(nn.Module())) | {"config"}
"""The attributes of ``nn.Module`` itself; a configuration is none of the state."""

State = Mapping[str, Any]
"""By their names: buffers and attributes as ``kept_state`` copies them, and the versions of parameters."""


def kept_state(module: nn.Module) -> dict[str, Any]:
    """A copy of what a module keeps between calls: its mode, buffers, and the values and containers in attributes."""
    kept: dict[str, Any] = {}
    for path, part in module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if name not in OWN}
        for name, value in {"training": part.training, **part._buffers, **attributes}.items():
            kept[f"{path}.{name}" if path else name] = _copied(value, 0)
    for name, parameter in module.named_parameters():
        kept[name] = _Version(parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
    return kept


def changed_names(before: State, after: State) -> list[str]:
    """The names whose values differ, tensors first."""
    names = [name for name in after if name not in before or not _equal(before[name], after[name])]
    return sorted(names, key=lambda name: not isinstance(after[name], Tensor))


def restore_state(module: nn.Module, kept: State) -> None:
    """Put back what calls changed, apart from parameters and modules that they added."""
    now = kept_state(module)
    for name in {**now, **kept}:
        path, dot, attribute = name.rpartition(".")
        stayed = all(f"{path}{dot}training" in state for state in (now, kept))
        if not stayed or any(isinstance(state.get(name), _Version) for state in (now, kept)):
            continue
        if name in now and name in kept and _equal(kept[name], now[name]):
            continue
        part = module.get_submodule(path)
        if name not in kept:
            delattr(part, attribute)
        else:
            setattr(part, attribute, _put_back(getattr(part, attribute, None), kept[name]))


def changing_line(module: nn.Module, name: str) -> Origin | None:
    """The line of a module's own methods, other than ``__init__``, that changes ``self.<name>``."""
    path, _, attribute = name.rpartition(".")
    return find_line(module.get_submodule(path), lambda method: _line_that_changes(method, attribute))


def find_line(module: nn.Module, line_in: Callable[[Any], int]) -> Origin | None:
    """The line of a module's own methods whose number ``line_in`` finds; it returns 0 where a method has none."""
    for method in _own_methods(type(module)):
        if number := line_in(method):
            file = method.__code__.co_filename
            return Origin(operation="", where=f"{file}:{number}", code=linecache.getline(file, number).strip())
    return None


def _own_methods(kind: type) -> list[Any]:
    """The methods of a module's classes but torch's: forward, what it calls, and the others, such as a reset."""
    owners = takewhile(lambda owner: not owner.__module__.startswith("torch."), kind.__mro__)
    methods = [value for owner in owners for value in vars(owner).values() if inspect.isfunction(value)]
    called = {name for method in methods if method.__name__ == "forward" for name in method.__code__.co_names}
    ranks = {"forward": 0} | dict.fromkeys(called - {"forward"}, 1)
    return sorted(
        (method for method in methods if method.__name__ != "__init__"),
        key=lambda method: ranks.get(method.__name__, 2),
    )


class _Version(NamedTuple):
    """Stands for a parameter, whose values may need much memory: torch counts the changes of each tensor."""

    address: int
    changes: int


class _Attributes(dict[str, Any]):
    """Those of an object that is neither a tensor nor a module."""

    def __init__(self, owner: Any, copies: dict[str, Any]) -> None:
        super().__init__(copies)
        self.owner = owner


def _copied(value: Any, depth: int) -> Any:
    """A copy with the tensors, constants and containers in ``value``; anything else is the thing itself."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        return value.detach().clone() if plain else value
    if depth > DEEPEST or isinstance(value, nn.Module | type):
        return value
    if isinstance(value, dict):
        return {key: _copied(part, depth + 1) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_copied(part, depth + 1) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    if isinstance(value, list | deque):
        return [_copied(part, depth + 1) for part in value]
    if isinstance(value, set):
        return set(value)
    if type(value).__module__.partition(".")[0] in ("builtins", "torch", "numpy") or not hasattr(value, "__dict__"):
        return value
    return _Attributes(value, {name: _copied(part, depth + 1) for name, part in vars(value).items()})


def _equal(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        same_kind = before.shape == after.shape and before.dtype == after.dtype
        return same_kind and bool(((before == after) | ((before != before) & (after != after))).all())
    if type(before) is not type(after):
        return False
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_equal(value, after[key]) for key, value in before.items())
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(_equal, before, after))
    return isinstance(before, (*CONSTANTS, set)) and bool(before == after)


def _put_back(current: Any, copy: Any) -> Any:
    """``current`` with what ``copy`` holds, changed in place where others may hold it too."""
    if isinstance(current, Tensor) and isinstance(copy, Tensor) and current.shape == copy.shape:
        with torch.no_grad():
            return current.copy_(copy)
    if isinstance(current, dict) and isinstance(copy, dict):
        named = {key: _put_back(current.get(key), part) for key, part in copy.items()}
        current.clear()
        current.update(named)
    elif isinstance(current, list | deque) and isinstance(copy, list):
        values = [_put_back(None, part) for part in copy]
        current.clear()
        current.extend(values)
    elif isinstance(current, set) and isinstance(copy, set):
        current.clear()
        current.update(copy)
    elif isinstance(copy, _Attributes):
        for name, part in copy.items():
            setattr(copy.owner, name, _put_back(getattr(copy.owner, name, None), part))
        return copy.owner
    else:
        return copy
    return current


def _line_that_changes(method: Any, attribute: str) -> int:
    """The number of the first line of a method that changes ``self.<attribute>``; 0 where none does."""
    try:
        lines, start = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return 0
    own = f"{method.__code__.co_varnames[0]}.{attribute}" if method.__code__.co_argcount else ""
    statements = [part for part in ast.walk(tree) if isinstance(part, ast.stmt) and _changes(part, own)]
    return min((start + statement.lineno - 1 for statement in statements), default=0)


def _changes(statement: ast.stmt, own: str) -> bool:
    """Whether a simple statement stores to ``own``, as ``self.cache``, or calls one of its methods that change it."""
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = statement.targets
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
        targets = [statement.target]
    else:
        targets = []
    if any(_is_own(part, own) for target in targets for part in ast.walk(target)):
        return True
    if not isinstance(statement, ast.Expr | ast.Assign):
        return False
    calls = (part for part in ast.walk(statement) if isinstance(part, ast.Call))
    changing = (call.func for call in calls if isinstance(call.func, ast.Attribute) and _is_changing(call.func.attr))
    return any(_is_own(part, own) for function in changing for part in ast.walk(function.value))


def _is_own(part: ast.AST, own: str) -> bool:
    return (
        isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and f"{part.value.id}.{part.attr}" == own
    )


def _is_changing(method: str) -> bool:
    is_in_place = method.endswith("_") and not method.startswith("_")
    return is_in_place or method in ("append", "appendleft", "extend", "add", "update", "pop", "insert", "setdefault")
