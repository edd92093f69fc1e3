"""Commands and options that have a new name. Until the next version the old ones work, with a warning."""

from collections.abc import Sequence

COMMANDS = {"load": "loadtest"}
OPTIONS = {
    ("optimize", "--timeout-s"): ("--timeout", ""),
    ("loadtest", "--duration-s"): ("--duration", ""),
    ("retune", "--budget-s"): ("--budget", ""),
    ("serve", "--drain-s"): ("--drain", ""),
    ("serve", "--timeout-ms"): ("--timeout", "ms"),
}
"""Command and old option to the new option, and the unit of the old one where its numbers are not seconds."""


def translate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with new names in place of old ones, and a warning for each that was replaced."""
    position = next((n for n, text in enumerate(arguments) if not text.startswith("-")), None)
    if position is None:
        return list(arguments), []
    old_command = arguments[position]
    command = COMMANDS.get(old_command, old_command)
    translated = [*arguments[:position], command]
    warnings = [] if command == old_command else [_warning(f"the command {old_command}", command)]
    rest = iter(arguments[position + 1 :])
    for text in rest:
        old, equals, value = text.partition("=")
        if (command, old) not in OPTIONS:
            translated.append(text)
            continue
        new, unit = OPTIONS[command, old]
        given = value if equals else next(rest, None)
        translated += [new] if given is None else [new, f"{given}{unit}"]
        warnings.append(_warning(f"the option {old}", f"{new}, which takes times such as 30s or 5m"))
    return translated, warnings


def _warning(old: str, new: str) -> str:
    return f"warning: {old} will be removed in the next version; use {new}"
