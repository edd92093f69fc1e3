"""Write docs/reference/command-line.md, python.md and metrics.md from the code.

    python scripts/reference.py

The command line is read from the typer app, the Python API from the source of what ``corewise.__all__`` names, and
the metrics from ``accuracy.metrics.METRICS``.
"""

import ast
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer.models

import corewise
from corewise.accuracy.metrics import AGAINST_REFERENCE, LOWER_IS_BETTER, METRICS
from corewise.cli import app
from corewise.cluster.applications import deployment
from corewise.common.references import find_reference
from corewise.pipeline.answers import ClassAnswer, Span
from corewise.pipeline.boxes import Detection
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.records.fidelity import Fidelity
from corewise.records.measurement import LoadRun, Measurement, Rates
from corewise.records.report import Choice
from corewise.records.trial import Trial

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples", "Source", "Note")
WIDTH = 100
PARTS = (Choice, Trial, Build, Plan, ElasticPlan, Fidelity, Measurement, Rates, LoadRun)
ABOUT = {
    "Answers": "What `Model.predict` returns for texts, photos and recordings, beside arrays.",
    "Parts of a report": "What `Report` is made of, as in `result.report.choice.plan`.",
}


def main() -> None:
    """Write all pages."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)


def pages() -> dict[str, str]:
    """File name to text."""
    return {"command-line.md": command_line(), "python.md": python(), "metrics.md": metrics()}


# --- the command line -------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, in the panels of its help."""
    shown = {info.name or info.callback.__name__: info.callback for info in app.registered_commands if not info.hidden}
    lines = [
        "# Command line",
        "",
        "Written by `scripts/reference.py` from the code. `corewise COMMAND --help` says the same.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#corewise-{name}) | {summary(callback.__doc__)} |" for name, callback in shown.items()),
        "",
        "Wrong input ends with one line on stderr and exit code 2, Ctrl-C with exit code 130, SIGTERM with 143. "
        "`serve` ends with 0 if every accepted request was answered.",
    ]
    for name, callback in shown.items():
        panels: dict[str, list[str]] = {}
        arguments = []
        for parameter in parameters(callback):
            if parameter.is_argument:
                arguments.append(parameter.name)
            panels.setdefault(parameter.panel, []).append(parameter.item)
        lines += ["", f"## corewise {name}", "", *paragraphs(callback.__doc__)]
        lines += ["", "```text", " ".join(["corewise", name, "[OPTIONS]", *arguments]), "```"]
        for panel, items in panels.items():
            lines += ["", f"**{panel}**", "", *items]
    return "\n".join(lines) + "\n"


class Parameter(NamedTuple):
    """An argument or option of a command."""

    name: str
    is_argument: bool
    panel: str
    item: str


def parameters(callback: Any) -> Iterator[Parameter]:
    """A command's arguments and options, from the annotations of its function."""
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, info = get_args(parameter.annotation)[:2]
        if info.hidden:
            continue
        is_argument = isinstance(info, typer.models.ArgumentInfo)
        choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
        typed = "" if kind is bool or info.metavar == "" else info.metavar or choices or name.upper()
        if is_argument:
            shown = typed
        else:
            given = (info.default, *(info.param_decls or ()))
            named = [word for word in given if isinstance(word, str) and word.startswith("-")]
            shown = ", ".join(named or (f"--{name.replace('_', '-')}",))
            shown += f" {typed}" if typed else ""
        # rich's markup has a backslash before a bracket that is none of its own.
        text = " ".join((info.help or "").split()).replace("\\[", "[")
        default = parameter.default
        if default is inspect.Parameter.empty:
            text += "" if is_argument else " Required."
        elif isinstance(info.show_default, str):
            text += f" [default: {info.show_default}]"
        elif "[default:" not in text and default is not None and default is not False:
            text += f" [default: {default:g}]" if isinstance(default, float) else f" [default: {default}]"
        panel = info.rich_help_panel or ("Arguments" if is_argument else "Options")
        yield Parameter(name=typed, is_argument=is_argument, panel=panel, item=f"- `{shown}`: {text}")


# --- the Python API ---------------------------------------------------------------------------------------------------


def python() -> str:
    """Every name in ``corewise.__all__``: functions, then values, then errors."""
    members = {name: getattr(corewise, name) for name in corewise.__all__ if not name.startswith("__")}
    kinds = {
        "Functions": {name: thing for name, thing in members.items() if inspect.isfunction(thing)},
        "Classes": {name: thing for name, thing in members.items() if inspect.isclass(thing) and not is_error(thing)},
        "Answers": {thing.__name__: thing for thing in (ClassAnswer, Span, Detection)},
        "Parts of a report": {thing.__name__: thing for thing in PARTS},
        "Errors": {name: thing for name, thing in members.items() if inspect.isclass(thing) and is_error(thing)},
    }
    lines = [
        "# Python",
        "",
        "Written by `scripts/reference.py` from the code. `import corewise` imports neither PyTorch nor an engine.",
    ]
    for kind, named in kinds.items():
        lines += ["", f"## {kind}", *(["", ABOUT[kind]] if kind in ABOUT else [])]
        for name, thing in named.items():
            lines += [
                "",
                f"### {name}",
                "",
                *(function(name, thing) if kind == "Functions" else described_class(thing)),
            ]
    lines += ["", "## corewise.cluster", "", "### deployment", "", *function("deployment", deployment)]
    lines += ["", "## Extras", "", "`pip install -e '.[EXTRA]'` in a clone, or `corewise[EXTRA]`:", "", *extras()]
    return "\n".join(lines) + "\n"


def is_error(thing: Any) -> bool:
    """Whether it is an exception."""
    return isinstance(thing, type) and issubclass(thing, Exception)


def extras() -> Iterator[str]:
    """Each extra with its packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, packages in project["optional-dependencies"].items():
        if packages:
            names = ", ".join(re.split(r"[<>=!~ ;]", package, maxsplit=1)[0] for package in packages)
            yield f"- `{name}`: {names}"


def function(name: str, thing: Any) -> list[str]:
    """A function's signature and docstring."""
    return [
        *signature(name, node_of(thing), vars(sys.modules[thing.__module__])),
        "",
        *docstring(inspect.getdoc(thing) or ""),
    ]


def described_class(thing: Any) -> list[str]:
    """A class's docstring, fields and public methods."""
    node = node_of(thing)
    lines = docstring(inspect.getdoc(thing) or "")
    fields = list(fields_of(node))
    if fields:
        lines += ["", *fields]
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            is_property = any("property" in ast.unparse(decorator) for decorator in method.decorator_list)
            text = ast.get_docstring(method) or ""
            if is_property:
                returns = f": {ast.unparse(method.returns)}" if method.returns else ""
                lines += ["", f"`{method.name}{returns}`: {plain(summary(text))}"]
            else:
                values = vars(sys.modules[thing.__module__])
                lines += ["", *signature(f"{thing.__name__}.{method.name}", method, values), "", *docstring(text)]
    return lines


def node_of(thing: Any) -> Any:
    """The definition in the source."""
    return ast.parse(inspect.getsource(thing)).body[0]


def fields_of(node: ast.ClassDef) -> Iterator[str]:
    """A dataclass's fields, each with the string that stands below it."""
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        default = f" = {ast.unparse(field.value)}" if field.value else ""
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = f": {plain(' '.join(str(following.value.value).split()))}"
        yield f"- `{field.target.id}: {ast.unparse(field.annotation)}{default}`{text}"


def signature(name: str, node: ast.FunctionDef, values: dict[str, Any]) -> list[str]:
    """The call as code, an argument a line where it is long; names of constants become their ``values``."""
    every = node.args
    positional = [argument for argument in every.args if argument.arg not in ("self", "cls")]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(every.defaults))
    arguments = [shown(*pair, values) for pair in zip(positional, [*missing, *every.defaults], strict=True)]
    if every.kwonlyargs:
        arguments += ["*", *(shown(*pair, values) for pair in zip(every.kwonlyargs, every.kw_defaults, strict=True))]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"
    return ["```py", line, "```"]


def shown(argument: ast.arg, default: ast.expr | None, values: dict[str, Any]) -> str:
    """``name: type = default``."""
    text = ast.unparse(argument)
    if default is None:
        return text
    value = ast.unparse(default)
    if isinstance(default, ast.Name | ast.Attribute):  # a constant: its value says more than its name
        value = repr(eval(value, values))
    return f"{text} = {value}" if argument.annotation else f"{text}={value}"


# --- the metrics ------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """Every built-in metric: what it is compared with, which value is better, and its docstring."""
    lines = [
        "# Metrics",
        "",
        "Written by `scripts/reference.py` from the code. `--metric NAME` (`metric=` in Python) chooses one. Without "
        "it, [the accuracy gate](../concepts/accuracy-gate.md#which-metric) takes the one that fits. Any other metric "
        "is [a function of your own](../guides/your-own-metric.md).",
        "",
        'N is the number of held-out samples and C the number of classes. "First array" is the model\'s first output. '
        "`ndcg` and `recall` take another number after the `@`, such as `recall@5`. For metrics of which a lower value "
        "is better, the drop is how much the value grows.",
        "",
        "| metric | compared with | better | what it is |",
        "|---|---|---|---|",
    ]
    functions = {name: find_reference(reference, corewise.MetricError, "metric") for name, reference in METRICS.items()}
    for name, function in functions.items():
        base = name.partition("@")[0]
        compared = "fp32" if base in AGAINST_REFERENCE else "labels"
        better = "lower" if base in LOWER_IS_BETTER else "higher"
        anchor = re.sub(r"[^\w-]", "", name)
        lines.append(f"| [`{name}`](#{anchor}) | {compared} | {better} | {plain(summary(function.__doc__))} |")
    for name, function in functions.items():
        lines += ["", f"## {name}", "", *docstring(inspect.getdoc(function) or "")]
    return "\n".join(lines) + "\n"


# --- docstrings -------------------------------------------------------------------------------------------------------


def docstring(text: str) -> list[str]:
    """A docstring as Markdown: its sections as lists, its examples as code."""
    lines: list[str] = []
    section = ""
    for block in re.split(r"\n\s*\n", text.strip()):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            section = head.rstrip(":")
            block = rest
            lines += ["", f"**{section}**"]
        elif not block.startswith(" "):
            section = ""
        lines += ["", *formatted(textwrap.dedent(block) if section else block, section)] if block.strip() else []
    return lines[1:] if lines[:1] == [""] else lines


def formatted(block: str, section: str) -> list[str]:
    """One block of a docstring."""
    if block.lstrip().startswith(">>>"):
        return ["```pycon", block.replace("  # doctest: +SKIP", ""), "```"]
    if section in ("Args", "Attributes", "Raises"):
        items = re.split(r"\n(?=\S)", block)
        return [f"- `{name}`: {plain(' '.join(words.split()))}" for name, _, words in (i.partition(":") for i in items)]
    if block.startswith("    "):
        return ["```py", inspect.cleandoc(block), "```"]
    if re.match(r"- ", block):
        return [plain(line) for line in block.splitlines()]
    return [plain(" ".join(block.split()))]


def paragraphs(text: str | None) -> list[str]:
    """Help text, a paragraph a line."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text or ""))
    lines: list[str] = []
    for block in blocks:
        lines += ["", " ".join(block.split())]
    return lines[1:]


def summary(text: str | None) -> str:
    """The first paragraph in one line."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(text or ""))[0].split())


def plain(text: str) -> str:
    """Markdown's single backticks in place of reStructuredText's double ones."""
    return text.replace("``", "`")


if __name__ == "__main__":
    main()
