"""``corewise predict``."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from corewise.cli.environment import compute_on_usable_cores
from corewise.cli.options import ArtifactPath, argument, flag, grouped, option
from corewise.cli.output import console
from corewise.cli.quantities import whole
from corewise.common.errors import InputError

if TYPE_CHECKING:
    from corewise.pipeline.job import Job, OnRows

Inputs = Annotated[
    list[Path],
    argument(
        "INPUT...",
        panel="Inputs",
        help="Files of texts: .txt (a text a line), .csv, .tsv, .jsonl or .parquet. Or images: files, folders (with "
        "those below) or patterns such as 'photos/*.jpg'.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class TextColumns:
    """Which texts are answered."""

    text: Annotated[
        str | None,
        option(
            "--text",
            panel="Texts",
            metavar="COLUMN",
            help="The column that is the text.",
            default="text or sentence",
        ),
    ] = None
    pair: Annotated[
        str | None,
        option("--pair", panel="Texts", metavar="COLUMN", help="The column that is the second text of a pair."),
    ] = None
    prompt: Annotated[
        str | None,
        option(
            "--prompt",
            panel="Texts",
            metavar="NAME",
            help="The model's prompt that goes before each text, by its name.",
            default="the model's own default, if it has one",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PhotoOptions:
    """How images are answered."""

    top: Annotated[
        int | None,
        option(
            "--top", panel="Images", metavar="N", parse=whole(1), help="Name the N most probable classes.", default="5"
        ),
    ] = None
    preprocess: Annotated[
        str | None,
        option(
            "--preprocess",
            panel="Images",
            metavar="FILE.py:FUNCTION",
            help="The function that prepared the samples, for an artifact that was made with one.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PredictOutput:
    """Where the answers go."""

    output: Annotated[
        Path,
        option(
            "--output",
            "-o",
            panel="Output",
            metavar="FILE",
            help="A .parquet, .jsonl or .npy file; must not exist. Rows that cannot be answered go to a .failed.jsonl "
            "beside it, with their reasons.",
        ),
    ]
    quiet: Annotated[bool, flag("--quiet", panel="Output", help="Print nothing but errors.")] = False


@grouped
def command(
    artifact_path: ArtifactPath, inputs: Inputs, texts: TextColumns, photos: PhotoOptions, output: PredictOutput
) -> None:
    """Answer all texts of files, or all images, with an artifact: vectors, classes, scores or spans.

    Texts are read as they are needed and run in batches of similar length on all instances. Images are decoded while
    the model runs. Finished parts are kept in FILE.parts, so that the same command resumes after an interruption.
    """
    from corewise import artifact
    from corewise.artifact.open import load
    from corewise.pipeline import TOP
    from corewise.pipeline.job import Done, Job, check_job, count_rows, run_job
    from corewise.samples.folders import list_images
    from corewise.samples.texts import Columns

    compute_on_usable_cores()
    found = artifact.read(artifact_path)
    images = found.manifest.preprocess is not None and found.manifest.pipeline is None
    job = Job(
        inputs=tuple(list_images(inputs) if images else inputs),
        output=output.output,
        columns=Columns(texts.text, texts.pair),
        prompt=texts.prompt,
        artifact=artifact.identity(found.folder),
        top=(photos.top or TOP) if images else None,
    )
    check_job(job)
    start = time.monotonic()
    with load(artifact_path, preprocess=photos.preprocess, photos=images) as model, _resumable(job):
        runner = model.images if images else model.texts
        if runner is None and images:
            raise InputError(f"{artifact_path} was made with a function that prepares images", "give --preprocess")
        if runner is None:
            raise InputError(f"{artifact_path} takes tensors only", "make it again from st:, hf: or with --tokenizer")
        with _progress(len(job.inputs) if images else count_rows(job.inputs), output.quiet) as on_rows:
            done: Done = run_job(job, runner, on_rows=on_rows)
    if not output.quiet:
        print(_outcome(job, done.rows, done.resumed, done.failed, time.monotonic() - start))


def _outcome(job: "Job", rows: int, resumed: int, failed: int, seconds: float) -> str:
    from corewise.report.numbers import duration, rate

    speed = rate((rows - resumed) / seconds) if rows > resumed else "0/s"
    parts = [f"{rows:,} rows to {job.output} in {duration(seconds)} ({speed})"]
    if resumed:
        parts.append(f"{resumed:,} were done before")
    if failed:
        parts.append(f"{failed:,} set aside in {job.failed}")
    return "; ".join(parts)


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator["OnRows"]:
    """Shows how many rows are done, how fast, and for how long it will go on, on a terminal's standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")
        begun: list[tuple[float, int]] = []

        def on_rows(rows: int) -> None:
            begun.append((time.monotonic(), rows))
            (first_s, first), (last_s, last) = begun[0], begun[-1]
            speed = f"{(last - first) / (last_s - first_s):,.0f}/s" if last > first else ""
            bar.update(task, completed=rows, total=max(total, rows), rate=speed)

        yield on_rows


@contextmanager
def _resumable(job: "Job") -> Iterator[None]:
    """Say on Ctrl-C that finished parts are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if job.parts.is_dir():
            sys.stderr.write(f"corewise: finished parts are kept in {job.parts}; the same command resumes\n")
        raise
