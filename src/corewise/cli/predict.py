"""``corewise predict``."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from corewise.cli.declare import argument, flag, grouped, option
from corewise.cli.environment import compute_on_usable_cores, settle_ray
from corewise.cli.options import ArtifactPath, RetuneTime, check_cluster
from corewise.cli.output import console
from corewise.cli.quantities import share, whole

if TYPE_CHECKING:
    from corewise.pipeline.parts import Parts
    from corewise.records.bulk import BulkProgress, OnProgress

Inputs = Annotated[
    list[str],
    argument(
        "INPUT...",
        panel="Inputs",
        help="Files of texts: .txt (one text per line), .csv, .tsv, .jsonl or .parquet. Or images, also in .tar, "
        ".tar.gz, .tar.bz2 and .tar.xz files. Or recordings: .wav, .flac, .ogg, .mp3 or .aiff. "
        "Or folders with such files in or below them, or patterns such as 'photos/*.jpg'. Each may be a path or a "
        "URL, such as 's3://BUCKET/photos/*.jpg'.",
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
            help="The column with the text.",
            default="text or sentence",
        ),
    ] = None
    pair: Annotated[
        str | None,
        option("--pair", panel="Texts", metavar="COLUMN", help="The column with the second text of a pair."),
    ] = None
    prompt: Annotated[
        str | None,
        option(
            "--prompt",
            panel="Texts",
            metavar="NAME",
            help="The name of the model's prompt that goes before each text.",
            default="the model's own default, if it has one",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PhotoOptions:
    """How images are answered."""

    top: Annotated[
        int | None,
        option(
            "--top",
            panel="Images",
            metavar="N",
            parse=whole(1),
            help="How many of the most probable classes to give for each image or recording.",
            default="5",
        ),
    ] = None
    score_threshold: Annotated[
        float | None,
        option(
            "--score-threshold",
            panel="Images",
            metavar="SCORE",
            parse=share("0.25"),
            help="For a detector: the lowest score of an object that is kept.",
            default="0.25 for YOLO and SSD, 0.5 for DETR",
        ),
    ] = None
    iou_threshold: Annotated[
        float | None,
        option(
            "--iou-threshold",
            panel="Images",
            metavar="IOU",
            parse=share("0.45"),
            help="For a YOLO or SSD detector: a box that overlaps a better one of its class by this much is dropped.",
            default="0.45",
        ),
    ] = None
    preprocess: Annotated[
        str | None,
        option(
            "--preprocess",
            panel="Images",
            metavar="FILE.py:FUNCTION",
            help="The function that prepared the images or recordings, if the artifact was made with one.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where the job runs."""

    ray: Annotated[
        str | None,
        option(
            "--ray",
            panel="Cluster",
            metavar="ADDRESS",
            help="A Ray cluster: auto (the one in RAY_ADDRESS, or else this machine's), HOST:PORT, ray://HOST:PORT, or "
            "local to start one here for this command.",
            default="none, this process",
        ),
    ] = None
    retune_s: RetuneTime = 30.0


@dataclass(frozen=True, kw_only=True)
class PredictOutput:
    """Where the answers go."""

    output: Annotated[
        str,
        option(
            "--output",
            "-o",
            panel="Output",
            metavar="OUT",
            help="A .parquet, .jsonl or .npy file that does not exist yet. A name without a suffix, a URL such as "
            "s3://BUCKET/vectors, and any name with --ray is a folder for Parquet files. Rows that cannot be answered "
            "go to a .failed.jsonl beside the file, or to files in the folder, with the reasons.",
        ),
    ]
    draw: Annotated[
        Path | None,
        option(
            "--draw",
            panel="Output",
            metavar="FOLDER",
            help="Also write each photo to this folder, with its boxes or its most probable classes drawn on it.",
            default="none",
        ),
    ] = None
    max_failed: Annotated[
        int | None,
        option(
            "--max-failed",
            panel="Output",
            metavar="N",
            parse=whole(0),
            help="Stop if more than N rows cannot be answered.",
            default="any number may fail",
        ),
    ] = None
    dry_run: Annotated[bool, flag("--dry-run", panel="Output", help="Only say what would run.")] = False
    quiet: Annotated[bool, flag("--quiet", panel="Output", help="Print nothing but errors.")] = False


@grouped
def command(
    artifact_path: ArtifactPath,
    inputs: Inputs,
    texts: TextColumns,
    photos: PhotoOptions,
    cluster: ClusterOptions,
    output: PredictOutput,
) -> None:
    """Run an artifact on files of texts, images or recordings: to vectors, classes, scores, spans or boxes.

    Texts are read as they are needed and run in batches of similar length on all instances. Images and recordings are
    decoded while the model runs. Finished parts are kept in OUT.parts, so that the same command resumes after an
    interruption.

    With --ray the parts run on the nodes of a cluster, each under the plan for its kind of machine, and the output is
    a folder of Parquet files.

    Example: corewise predict minilm.cw reviews.parquet --text body -o vectors.parquet
    """
    check_cluster(cluster)
    compute_on_usable_cores()
    if cluster.ray is not None:
        settle_ray(cluster.ray)
    from corewise.cluster.bulk import Bulk
    from corewise.report.bulk import outlook_line, result_lines
    from corewise.samples.texts import Columns

    bulk = Bulk.of(
        artifact_path,
        inputs,
        output.output,
        columns=Columns(texts.text, texts.pair),
        prompt=texts.prompt,
        top=photos.top,
        score_threshold=photos.score_threshold,
        iou_threshold=photos.iou_threshold,
        draw=output.draw,
        preprocess=photos.preprocess,
        ray=cluster.ray,
    )
    if output.dry_run:
        print(outlook_line(bulk.outlook()))
        return
    with _resumable(bulk.job.kept), _progress(output.quiet) as report:
        result = bulk.run(max_failed=output.max_failed, retune_s=cluster.retune_s, on_progress=report)
    if not output.quiet:
        for line in result_lines(result):
            print(line)


@contextmanager
def _progress(quiet: bool) -> Iterator["OnProgress"]:
    """Shows how far the job is on standard error: a bar on a terminal, elsewhere lines."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from corewise.report.bulk import ProgressLines

    screen = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeRemainingColumn())
    plain = ProgressLines(time.monotonic())
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task("", total=None, more="")

        def on_progress(progress: "BulkProgress") -> None:
            line = plain.line(progress, time.monotonic())
            bar.update(task, completed=progress.rows, total=progress.total, more=plain.more(progress))
            if line and not quiet and not screen.is_terminal:
                sys.stderr.write(f"{line}\n")

        yield on_progress


@contextmanager
def _resumable(kept: "Parts") -> Iterator[None]:
    """Say on Ctrl-C that finished parts are kept."""
    try:
        yield
    except KeyboardInterrupt:
        if kept.about.is_file():
            sys.stderr.write(f"corewise: finished parts are kept in {kept.folder}; the same command resumes\n")
        raise
