"""Runs the user's functions by ``module:name`` reference, and turns what they raise into one line with its place."""

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from corewise.common.errors import CorewiseError
from corewise.common.phrases import with_article

OURS = (str(Path(__file__).parents[1]), "<")
INSTALLED = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
TORCH = tuple(str(Path(folder) / "torch") for folder in INSTALLED)


class guard:
    """Turn any exception of its body into ``error``: "<what>: <type>: <first line> (<file>:<line>)".

    Corewise's own errors pass through. ``SystemExit`` is caught as well: a script that exits when it is imported
    must not end us.
    """

    def __init__(self, error: type[CorewiseError], what: str, fix: str = "correct the code there") -> None:
        self.error = error
        self.what = what
        self.fix = fix

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        if isinstance(raised, Exception | SystemExit) and not isinstance(raised, CorewiseError):
            raise self.error(f"{self.what}: {describe(raised)}", self.fix) from raised


def describe(error: BaseException) -> str:
    """Type, first line of the message and place: ``ValueError: bad width (model.py:12)``."""
    first = str(error).strip().partition("\n")[0]
    place = where(error)
    return f"{type(error).__name__}{': ' if first else ''}{first}{f' ({place})' if place else ''}"


def where(error: BaseException) -> str:
    """``file:line`` where the error was raised, in the user's own code if it passed through there."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    return place(traceback.extract_tb(error.__traceback__))


def place(frames: Iterable[traceback.FrameSummary]) -> str:
    """``file:line`` of ``own_frame``; empty if there is none."""
    frame = own_frame(frames)
    return f"{frame.filename}:{frame.lineno}" if frame else ""


def own_frame(frames: Iterable[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame in the user's own code, else in a library of models, else the innermost outside corewise."""
    foreign = [frame for frame in frames if not frame.filename.startswith(OURS)]
    own = [frame for frame in foreign if not frame.filename.startswith(INSTALLED)]
    library = [frame for frame in foreign if not frame.filename.startswith(TORCH)]
    return next(reversed(own or library or foreign), None)


def call_reference(
    reference: str,
    error: type[CorewiseError],
    purpose: str,
    is_value: Callable[[Any], bool] = lambda found: False,
) -> Any:
    """What the function that ``module:function`` or ``path/to/file.py:function`` names returns.

    ``purpose`` says what the function is, e.g. "model factory". If ``is_value`` says of what is found there that it is
    what a function would return, such as a model, it is taken as it is. Raises ``error`` where the module or function
    is missing or either of them raises.
    """
    with called_reference(reference, error, purpose, is_value) as made:
        return made


@contextmanager
def called_reference(
    reference: str,
    error: type[CorewiseError],
    purpose: str,
    is_value: Callable[[Any], bool] = lambda found: False,
) -> Iterator[Any]:
    """What ``call_reference`` returns, to be read here: a generator may import the siblings of its file only now."""
    with _found(reference, error, purpose, is_value) as found:
        made = found
        if not is_value(found):
            with guard(error, f"{purpose} {reference} failed"):
                made = found()
        yield made


def find_reference(reference: str, error: type[CorewiseError], purpose: str) -> Any:
    """The function that ``module:function`` or ``path/to/file.py:function`` names, without calling it."""
    with _found(reference, error, purpose) as function:
        return function


def reference_to(function: Any) -> str:
    """``module:function`` of a function; of another callable, such as a composed transform, its class."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


@contextmanager
def _found(
    reference: str,
    error: type[CorewiseError],
    purpose: str,
    is_value: Callable[[Any], bool] = lambda found: False,
) -> Iterator[Any]:
    """The function, while its folder is on ``sys.path`` so that it can import its siblings, as scripts can."""
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise error(
            f"{purpose} {reference!r} does not name a function", "write module:function or path/to/file.py:function"
        )
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = _import_file(place, error, purpose) if place.endswith(".py") else _import(place, error, purpose)
        found = getattr(module, name, None)
        if not callable(found) and not is_value(found):
            others = [other for other in vars(module) if other != name]
            similar = get_close_matches(name, others, n=1)
            what = f": {name} is {with_article(type(found).__name__)}" if hasattr(module, name) else ""
            fix = "name a function that returns it" if what else "check its name"
            raise error(f"{place} has no function {name!r}{what}", f"did you mean {similar[0]!r}?" if similar else fix)
        yield found
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _import(name: str, error: type[CorewiseError], purpose: str) -> ModuleType:
    with guard(error, f"the module {name} of the {purpose} cannot be imported"):
        return importlib.import_module(name)


def _import_file(file: str, error: type[CorewiseError], purpose: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise error(f"{purpose}: there is no file {file}", "check the path")
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    # A file may be called like a module that is already imported (test.py, random.py).
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise error(f"{purpose}: {file} is no Python file", "give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with guard(error, f"{file} of the {purpose} cannot be imported"):
            spec.loader.exec_module(module)
    except error as failed:
        del sys.modules[name]
        if "attempted relative import" in failed.what:
            fix = f"name it by its package, from the folder above that: package.{path.stem}:function"
            raise error(failed.what, fix) from failed
        raise
    return module
