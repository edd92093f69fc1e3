"""cli: what is typed becomes values, each error names its flag, and every option has its place in the help."""

import dataclasses
import re
from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from corewise.accuracy.metrics import METRICS
from corewise.cli import _words, app, quantities
from corewise.cli.declare import add_command, grouped, option
from corewise.cli.renames import COMMANDS, OPTIONS, translate
from corewise.common.errors import InputError

PROGRAM = typer.main.get_command(app)
OPTIONS_OF = [(name, param) for name, command in PROGRAM.commands.items() for param in command.params]


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("1h", 3600), ("500ms", 0.5), ("600", 600), ("0.5", 0.5), ("1.5m", 90), ("1e2", 100)],
)
def test_durations(text, seconds):
    assert quantities.duration("--budget", text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "5x", "m", "nan", "inf", "1e999", "5 minutes", "5,5m"])
def test_what_is_no_duration_is_refused_by_the_name_that_was_typed(text):
    with pytest.raises(InputError, match=r"^--budget is .*; give a time above 0: 90s, 5m or 1h$"):
        quantities.duration("--budget", text)


def test_some_durations_may_be_zero():
    assert quantities.duration_or_zero("--drain", "0") == 0
    with pytest.raises(InputError, match="--drain is -1; give a time"):
        quantities.duration_or_zero("--drain", "-1")


def test_spans():
    assert quantities.span("--replicas", "2-8") == quantities.Span(2, 8)
    assert quantities.span("--replicas", "3") == quantities.Span(3, 3)
    for text in ("", "0", "0-2", "3-2", "2-", "-2", "two", "1-2-3", "1.5"):
        with pytest.raises(InputError, match=r"^--replicas is .*; give a number or two, e.g. 2 or 2-8$"):
            quantities.span("--replicas", text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("500M", 500e6), ("2G", 2e9), ("2g", 2e9), ("64MiB", 64 * 2**20), ("1Ki", 1024), ("1.5k", 1500), ("123", 123)],
)
def test_sizes(text, size):
    assert quantities.size("--memory-limit", text) == size


@pytest.mark.parametrize("text", ["", "0", "0.5", "-2G", "2T", "G", "nan", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"^--memory-limit is .*; give a size: 500M, 2G or 64MiB$"):
        quantities.size("--memory-limit", text)


@given(st.floats(1e-3, 1e6), st.sampled_from(sorted(quantities.TIMES_S)))
def test_a_duration_is_its_number_times_its_unit(number, unit):
    assert quantities.duration("--budget", f"{number!r}{unit}") == pytest.approx(number * quantities.TIMES_S[unit])


@pytest.mark.parametrize(
    ("parse", "good", "value", "bad", "message"),
    [
        (quantities.whole(1), "12", 12, ["0", "-3", "1.5", "x", ""], "give a whole number, 1 or more"),
        (quantities.above_zero("30"), "2.5", 2.5, ["0", "-1", "nan", "inf", "x"], "give a number above 0, e.g. 30"),
        (quantities.zero_or_more("0.01"), "0", 0.0, ["-1", "nan", "inf", "x"], "give 0 or more, e.g. 0.01"),
        (quantities.share("0.01"), "1", 1.0, ["1.01", "-0.1", "nan"], "give a number from 0 to 1, e.g. 0.01"),
        (quantities.choice("a", "b", "c"), "b", "b", ["d", ""], "give a, b or c"),
        (quantities.numbers, ".5,1", (0.5, 1.0), ["a,b", "", "1,", "nan,1", "inf"], "give numbers with commas"),
        (quantities.address, "[::1]:80", ("::1", 80), ["80", ":80", "h:x", "h:99999"], "give HOST:PORT"),
    ],
)
def test_values(parse, good, value, bad, message):
    assert parse("--flag", good) == value
    for text in bad:
        with pytest.raises(InputError) as raised:
            parse("--flag", text)
        assert str(raised.value).startswith(f"--flag is {text or chr(39) * 2}; {message}")


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "param"), OPTIONS_OF, ids=[f"{name} {param.name}" for name, param in OPTIONS_OF])
def test_every_option_has_a_panel_a_help_text_and_says_what_to_type(command, param):
    assert param.rich_help_panel
    assert param.help
    assert param.help.partition(r" \[default")[0].endswith(".")
    assert param.metavar is not None
    assert "<" not in param.metavar
    assert bool(param.metavar) != bool(getattr(param, "is_flag", False))


@pytest.mark.parametrize("name", PROGRAM.commands)
@pytest.mark.parametrize("width", ["80", "120"])
def test_the_help_shows_no_types_of_python(name, width):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": width, "TERMINAL_WIDTH": width})
    assert shown.exit_code == 0
    assert not re.search(r"<\w|list\[", shown.output)
    assert max(map(len, shown.output.splitlines())) <= int(width)


def test_the_help_of_metric_lists_every_built_in_one():
    (param,) = (param for name, param in OPTIONS_OF if name == "optimize" and "--metric" in param.opts)
    listed = set(re.split(r"[\s,;]+", param.help))
    assert set(METRICS) <= listed


def test_defaults_that_the_help_spells_out_are_the_defaults():
    spelled = {"10m": quantities.duration, "10s": quantities.duration, "30s": quantities.duration}
    spelled |= {
        "1s": quantities.duration_or_zero,
        "60s": quantities.duration,
        "64MiB": quantities.size,
        "0": quantities.duration_or_zero,
        "20ms": quantities.duration,
        "1": quantities.span,
    }
    seen = set()
    for _, param in OPTIONS_OF:
        text = re.search(r"\[default: (.*)\]$", param.help)
        if text and param.default is not None:
            seen.add(text[1])
            assert spelled[text[1]]("", text[1]) == param.default
    assert seen == set(spelled)


def test_the_panels_of_optimize_and_serve():
    def panels(name):
        return list(dict.fromkeys(param.rich_help_panel for param in PROGRAM.commands[name].params))

    assert panels("optimize") == ["Model", "Samples", "Images", "Recordings", "Texts", "Goal", "Limits", "Output"]
    assert panels("serve") == ["Artifacts", "Ports", "Requests", "Security", "Logs", "Cluster"]


@pytest.mark.parametrize(
    ("typed", "option"),
    [
        (["predict", "m.cw", "t.txt", "-o", "o.jsonl", "--retune", "0"], "--retune"),
        (["serve", "m.cw", "--replicas", "2-8"], "--replicas"),
        (["serve", "m.cw", "--cpus", "2"], "--cpus"),
        (["serve", "m.cw", "--scale-at", "1s"], "--scale-at"),
        (["serve", "m.cw", "--route", "/m"], "--route"),
        (["serve", "m.cw", "--no-surge"], "--no-surge"),
    ],
)
def test_an_option_of_a_cluster_is_refused_without_one(typed, option):
    error = CliRunner().invoke(app, typed).exception
    assert isinstance(error, InputError)
    assert str(error) == f"{option} is for a cluster; give --ray ADDRESS too, or leave out {option}"


def test_fields_of_option_groups_become_options_and_come_back_as_values():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wanted:
        size: Annotated[int, option("--size", panel="P", metavar="SIZE", parse=quantities.size, help="How large.")]
        names: Annotated[list[str] | None, option("--name", panel="P", metavar="NAME", help="Names.")] = None

    received = []

    @grouped
    def command(wanted: Wanted, more: Annotated[str, option("--more", panel="P", metavar="X", help="More.")] = "m"):
        """One.

        Two lines
        of one paragraph.
        """
        received.append((wanted, more))

    program = typer.Typer()
    add_command(program, "try", command)
    arguments = ["--size", "2k", "--name", "a", "--name", "b"]
    CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert received == [(Wanted(size=2000, names=["a", "b"]), "m")]
    assert "Two lines of one paragraph." in CliRunner().invoke(program, ["--help"]).output


# --- what the system refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(36, "File name too long", "x" * 9), f"{'x' * 9}: File name too long; check the path"),
        (FileNotFoundError(2, "No usable temporary directory found"), "No usable temporary directory found; check"),
        (
            OSError(28, "No space left on device"),
            "No space left on device; free space where this command writes and in",
        ),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused$"),
        (OSError("HTTPSConnectionPool: no route"), "HTTPSConnectionPool: no route$"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, words):
    assert re.match(words, _words(error))


# --- old names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "translated"),
    [
        ("load a.cw --rate 5 --duration-s 2", "loadtest a.cw --rate 5 --duration 2"),
        ("retune a.cw --budget-s=30 --json", "retune a.cw --budget 30 --json"),
        ("optimize m --timeout-s 5", "optimize m --timeout 5"),
        ("serve a.cw --drain-s 0.2 --timeout-ms 500", "serve a.cw --drain 0.2 --timeout 500ms"),
        ("retune a.cw --budget-s", "retune a.cw --budget"),
        ("--version", "--version"),
        ("", ""),
    ],
)
def test_old_names_work_and_warn(typed, translated):
    arguments, warnings = translate(typed.split())
    assert arguments == translated.split()
    olds = [text.partition("=")[0] for text in typed.split() if text.partition("=")[0] not in arguments]
    numbers = [text for text in olds if not text.isdecimal()]
    assert len(warnings) == len(numbers)
    for old, warning in zip(numbers, warnings, strict=True):
        assert old in warning
        assert "will be removed in the next version; use " in warning


def test_new_names_are_not_touched():
    typed = ["optimize", "load", "--samples", "x.npz", "--budget", "5m", "--drain-s", "3"]
    assert translate(typed) == (typed, [])


def test_every_new_name_exists():
    assert set(COMMANDS.values()) <= set(PROGRAM.commands)
    for (command, old), (new, _) in OPTIONS.items():
        names = {name for param in PROGRAM.commands[command].params for name in param.opts}
        assert new in names
        assert old not in names
