"""``corewise optimize``."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from corewise.cli.declare import flag, grouped, option
from corewise.cli.environment import compute_on_usable_cores
from corewise.cli.options import AsJson, AudioOptions, ImageOptions, ModelReference, SampleOptions, TextOptions, reader
from corewise.cli.output import console, only_json, print_json
from corewise.cli.quantities import above_zero, choice, duration, size, zero_or_more
from corewise.common.errors import InputError
from corewise.records.goal import GOALS, Goal, GoalName, Slo, Throughput, parse_goal

if TYPE_CHECKING:
    from rich.console import Console

    from corewise.records.report import Report

SERVED_BY_ALL = ("openvino", "onnxruntime")
"""Engines whose artifacts ``corewise serve`` opens without more packages or trust."""


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What is best, and how much accuracy it may cost."""

    metric: Annotated[
        str | None,
        option(
            "--metric",
            panel="Goal",
            metavar="METRIC",
            help="top1, top5, f1, auc, map, miou, psnr, ssim, mae, rmse, pearson, spearman, ndcg@10, wer or cer "
            "against labels; agreement, detections, recall@10, cosine or concordance with fp32; or "
            "FILE.py:FUNCTION(outputs, labels) that returns a score where higher is better.",
            default="the one that fits the labels, else closeness to fp32",
        ),
    ] = None
    max_drop: Annotated[
        float,
        option(
            "--max-drop",
            panel="Goal",
            metavar="SCORE",
            parse=zero_or_more("0.01 for one point of top-1"),
            help="How much of the metric may be lost.",
        ),
    ] = 0.01
    strict: Annotated[
        bool,
        flag(
            "--strict",
            panel="Goal",
            help="Compare --max-drop with the upper end of the drop's 95 % interval, not with its estimate.",
        ),
    ] = False
    robust: Annotated[
        bool | None,
        option(
            "--robust/--no-robust",
            panel="Goal",
            metavar="",
            help="Also judge int8 on samples unlike those that calibrated it, with a second build calibrated without "
            "them.",
            default="for texts and embeddings",
        ),
    ] = None
    objective: Annotated[
        GoalName | None,
        option(
            "--objective",
            panel="Goal",
            metavar="GOAL",
            parse=choice(*GOALS),
            help="throughput (items per second), latency (of a single item), or slo (requests per second within "
            "--slo-ms).",
            default="throughput, or slo with --slo-ms",
        ),
    ] = None
    slo_ms: Annotated[
        float | None,
        option(
            "--slo-ms",
            panel="Goal",
            metavar="MS",
            parse=above_zero("100"),
            help="Latency limit: find the most requests per second with 99 % of them answered within it.",
        ),
    ] = None

    end_to_end: Annotated[
        bool | None,
        option(
            "--end-to-end/--no-end-to-end",
            panel="Goal",
            metavar="",
            help="Also find the fastest plan from files of photos to answers, which corewise predict uses: how many "
            "threads decode beside which instances.",
            default="for folders of photos",
        ),
    ] = None

    def chosen(self) -> Goal:
        """The objective, or the one that ``--slo-ms`` implies. Raises ``InputError`` where the two do not fit."""
        if self.objective is None:
            return Throughput() if self.slo_ms is None else Slo(p99_ms=self.slo_ms)
        if self.objective == "slo" and self.slo_ms is None:
            raise InputError("--objective slo needs --slo-ms", "add --slo-ms with a number of milliseconds, e.g. 100")
        if self.objective != "slo" and self.slo_ms is not None:
            raise InputError(f"--slo-ms does not go with --objective {self.objective}", "leave out one of them")
        return parse_goal(self.objective, slo_ms=self.slo_ms)


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What the search may use and try."""

    budget_s: Annotated[
        float | None,
        option(
            "--budget",
            panel="Limits",
            metavar="TIME",
            parse=duration,
            help="Time for the search, e.g. 90s, 5m or 1h. A short one judges with fewer samples. Below a minute, the "
            "race at its end may take longer.",
            default="no limit",
        ),
    ] = None
    memory_limit_bytes: Annotated[
        int | None,
        option(
            "--memory-limit",
            panel="Limits",
            metavar="SIZE",
            parse=size,
            help="The most memory that the process that runs the winner may use, e.g. 500M or 2G.",
            default="no limit",
        ),
    ] = None
    timeout_s: Annotated[
        float,
        option(
            "--timeout",
            panel="Limits",
            metavar="TIME",
            parse=duration,
            help="Longest time for one step of a trial.",
            default="10m",
        ),
    ] = 600.0
    engines: Annotated[
        list[str] | None,
        option(
            "--engine",
            panel="Limits",
            metavar="ENGINE",
            help="Try only this engine besides eager, which is the baseline; it is an error if it cannot be tried. "
            "Repeat it for several.",
            default="torch-int8, openvino and onnxruntime",
        ),
    ] = None
    ignored: Annotated[
        list[str] | None,
        option(
            "--ignore",
            panel="Limits",
            metavar="LAYER",
            help="Never run this layer in int8: a name that corewise explain lists, or a regular expression. Repeat it "
            "for several.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is saved and printed."""

    folder: Annotated[
        Path,
        option("--output", "-o", panel="Output", metavar="FOLDER", help="Where to save the artifact; must not exist."),
    ]
    labels: Annotated[
        Path | None,
        option(
            "--labels",
            panel="Output",
            metavar="FILE",
            help="Names of the classes, one per line, which the artifact keeps for its answers.",
            default="those that the model brings, if any",
        ),
    ] = None
    verbose: Annotated[
        bool, flag("--verbose", panel="Output", help="Print the whole report, with every trial and all notes.")
    ] = False
    quiet: Annotated[bool, flag("--quiet", panel="Output", help="Print nothing but errors.")] = False
    as_json: AsJson = False

    def class_names(self) -> tuple[str, ...] | None:
        """The names in ``--labels``. Raises ``SamplesError`` if they cannot be read."""
        from corewise.samples import read_class_names

        return None if self.labels is None else read_class_names(self.labels)

    def check(self) -> None:
        """Raise ``InputError`` for what could not be saved, before any work is done."""
        from corewise import artifact

        artifact.check_output(self.folder)


@grouped
def command(
    model: ModelReference,
    samples: SampleOptions,
    images: ImageOptions,
    audio: AudioOptions,
    texts: TextOptions,
    goal: GoalOptions,
    limits: LimitOptions,
    output: OutputOptions,
) -> None:
    """Quantize and compile a model in several ways, verify each, and save the fastest that is accurate enough.

    Finished trials are kept in FOLDER.work until the artifact is saved, so that the same command resumes.

    Example: corewise optimize model.py:build --samples photos --max-drop 0.01 --budget 5m -o model.cw
    """
    from corewise.report.terminal import Progress
    from corewise.search.optimization import DEFAULT_ENGINES, optimize

    output.check()
    texts.check()
    objective, labels = goal.chosen(), output.class_names()
    read = reader(model, samples, images, audio)
    compute_on_usable_cores()
    screen = console(stderr=output.as_json)
    mode: Literal["live", "plain", "quiet"] = "live" if screen.is_terminal else "plain"
    folder = output.folder.absolute()  # the user's code may change the working directory
    work = folder.with_name(f"{folder.name}.work")
    with (
        Progress(screen, "quiet" if output.quiet else mode, goal=objective) as progress,
        _resumable(output.folder.with_name(work.name)),
        only_json(output.as_json),
    ):
        result = optimize(
            model,
            read,
            metric=goal.metric,
            max_drop=goal.max_drop,
            strict=goal.strict,
            robust=goal.robust,
            objective=objective,
            budget_s=limits.budget_s,
            memory_limit_bytes=limits.memory_limit_bytes,
            engines=tuple(limits.engines) if limits.engines else DEFAULT_ENGINES,
            ignored=tuple(limits.ignored or ()),
            calibration=samples.calibration,
            seed=samples.seed,
            class_names=labels,
            tokenizer=texts.tokenizer,
            pooling=texts.pooling,
            end_to_end=goal.end_to_end,
            timeout_s=limits.timeout_s,
            work=work,
            on_event=progress,
        )
        result.save(folder)
    result.workspace.remove()
    _conclude(result.report, output, screen)


def _conclude(report: "Report", output: OutputOptions, screen: "Console") -> None:
    """Print what was found, as the options ask for it."""
    from corewise.report.summary import summarize
    from corewise.report.terminal import conclusion, overview, render

    if output.as_json:
        print_json(summarize(report))
    elif not output.quiet:
        screen.print(render(report) if output.verbose else overview(report, cut=screen.is_terminal), crop=False)
        command = "serve" if report.choice.winner.engine in SERVED_BY_ALL else "show"
        folder = str(output.folder)
        screen.print(conclusion(report, saved=folder, next_command=f"corewise {command} {shlex.quote(folder)}"))


@contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Say on Ctrl-C that finished trials are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if work.is_dir():
            sys.stderr.write(f"corewise: finished trials are kept in {work}; the same command resumes\n")
        raise
