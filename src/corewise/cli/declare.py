"""How commands and their options are declared.

A command takes its options as frozen dataclasses, one for each panel of its help; ``grouped`` makes one option of each
field, for typer, and puts them together again.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from corewise.cli.quantities import Parse


def option(*names: str, panel: str, metavar: str, help: str, parse: Parse[Any] | None = None, default: str = "") -> Any:
    """An option in a panel of the help. ``parse`` makes its value from its name and the typed text.

    ``default`` says in the help what happens without the option, where the value alone would not.
    """
    return typer.Option(
        *names,
        rich_help_panel=panel,
        metavar=metavar,
        help=rf"{help} \[default: {default}]" if default else help,
        show_default=not default,
        parser=None if parse is None else lambda value: parse(names[-1], str(value)),
    )


def flag(name: str, *, panel: str, help: str) -> Any:
    """An option without a value."""
    return option(name, panel=panel, metavar="", help=help)


def argument(metavar: str, *, panel: str, help: str) -> Any:
    """An argument without a flag."""
    return typer.Argument(metavar=metavar, rich_help_panel=panel, help=help)


class Command(TyperCommand):
    """A command with plain help."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, the last of which is ``--help``."""
        return _plain(super().get_params(ctx))


class Group(TyperGroup):
    """The group of all commands, with plain help."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, the last of which is ``--help``."""
        return _plain(super().get_params(ctx))


def _plain(parameters: Any) -> Any:
    """Parameters whose help shows what to type and not Python's types, with ``--help`` in the last panel."""
    *others, help_option = parameters
    help_option.metavar, help_option.rich_help_panel = "", others[-1].rich_help_panel
    for parameter in parameters:
        shown = "" if parameter.param_type_name == "argument" else parameter.metavar
        parameter.display_type_rich = lambda ctx, shown=shown: shown
    return parameters


def add_command(app: typer.Typer, name: str, command: Callable[..., None]) -> None:
    """Give the program a command. Its docstring is the help, of which typer would keep each line's end."""
    paragraphs = (command.__doc__ or "").split("\n\n")
    app.command(name, cls=Command, help="\n\n".join(" ".join(text.split()) for text in paragraphs))(command)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its parameters that are dataclasses as parameters of their own."""
    parameters = inspect.signature(command).parameters.values()
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    groups = {name: group for name, group in annotations.items() if isinstance(group, type) and is_dataclass(group)}

    @wraps(command)
    def ungrouped(**given: Any) -> None:
        values = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **values)

    spread: list[inspect.Parameter] = []
    for parameter in parameters:
        if parameter.name in groups:
            spread.extend(map(_parameter, fields(groups[parameter.name])))
        else:
            spread.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    ungrouped.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    return ungrouped


def _parameter(field: "Field[Any]") -> inspect.Parameter:
    """The parameter that holds a field's value."""
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
