"""``corewise predict``: one job, on this machine or on a Ray cluster, from its check to its result."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from corewise.artifact import Artifact, identity, read
from corewise.artifact.open import load_for_bulk
from corewise.artifact.photos import images_of
from corewise.artifact.recordings import audio_of
from corewise.artifact.texts import text_pipeline
from corewise.cluster.actor import runner_of
from corewise.cluster.connection import check_address, require_ray
from corewise.cluster.distributed import record_result, run_on_ray
from corewise.cluster.messages import packed_rows
from corewise.common.errors import InputError, OutputError
from corewise.pipeline import TOP, ImageAsk, check_top
from corewise.pipeline.job import Job, check_job, count_rows, records, run_job
from corewise.pipeline.parts import Counts
from corewise.records.bulk import BulkOutlook, BulkProgress, BulkResult, OnProgress
from corewise.records.pipeline import ImagePipeline, TextPipeline
from corewise.samples.archives import is_archive
from corewise.samples.audio import AUDIO_SUFFIXES
from corewise.samples.folders import list_files, list_images
from corewise.samples.places import Place, RemotePath, place_of, real_name
from corewise.samples.tables import READERS
from corewise.samples.texts import Columns
from corewise.search.retuning import BUDGET_S

FIRST = 64
"""Texts whose size is looked at."""
Kind = Literal["images", "recordings", "texts"]
MEANT_FOR: dict[str, tuple[Kind, ...]] = {
    "text": ("texts",),
    "pair": ("texts",),
    "prompt": ("texts",),
    "top": ("images", "recordings"),
    "score_threshold": ("images",),
    "iou_threshold": ("images",),
    "draw": ("images",),
    "preprocess": ("images", "recordings"),
}
"""The options that have a meaning for some kinds only."""


def predict(
    folder: str | Path,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    text: str | None = None,
    pair: str | None = None,
    prompt: str | None = None,
    top: int | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    draw: str | Path | None = None,
    preprocess: str | None = None,
    max_failed: int | None = None,
    ray: str | None = None,
    retune_s: float = BUDGET_S,
    on_progress: OnProgress = lambda progress: None,
) -> BulkResult:
    """Run an artifact on files of texts, images or recordings and write the answers, here or on a cluster.

    The same call resumes after an interruption: finished parts are kept, and each row is answered once.

    Args:
        folder: the artifact. With ``ray`` all nodes must see the artifact, the output and input images under the same
            paths.
        inputs: files of texts, images or recordings, folders of them, or patterns; as paths, or as URLs such as
            ``"s3://bucket/reviews/*.parquet"``.
        output: a ``.parquet``, ``.jsonl`` or ``.npy`` file that does not exist yet. A name without a suffix, a URL, and
            any name with ``ray`` is a folder of Parquet files.
        text: the column with the text. Default: text or sentence.
        pair: the column with the second text of a pair.
        prompt: the name of the model's prompt that goes before each text.
        top: for images and recordings, how many of the most probable classes to give. Default: 5.
        score_threshold: for a detector, the lowest score of an object that is kept. Default: 0.25 for YOLO and SSD, 0.5
            for DETR.
        iou_threshold: for a YOLO or SSD detector, the overlap with a better box of its class at which a box is dropped.
            Default: 0.45.
        draw: a folder for the photos with their boxes or most probable classes drawn on them; not with ``ray``.
        preprocess: the function that prepared the samples, as ``FILE.py:FUNCTION``, if the artifact was made with one.
        max_failed: the most rows that may be set aside; more of them end the job. Default: any number.
        ray: a cluster to run on: ``"auto"`` (this machine's, or the one that this process is connected to),
            ``"HOST:PORT"``, ``"ray://HOST:PORT"``, or ``"local"`` to start one. Default: none, this process.
        retune_s: seconds to search for a plan on each kind of machine for which the artifact has none; 0 skips the
            search.
        on_progress: called with a ``BulkProgress`` as parts are done.

    Returns:
        How many rows there were, how many of them were set aside, and on a cluster what ran where.

    Raises:
        InputError: an input, a column or the output is wrong, or more rows failed than ``max_failed``.
        ArtifactError: the artifact is damaged or does not fit the CPUs.
        EngineError: the engine fails or is not installed, or the cluster does not answer or is not safe.
        MissingExtra: Ray is not installed.

    Example:
        >>> import corewise
        >>> result = corewise.predict("texts.cw", "texts.txt", "vectors.parquet")
        >>> result.rows, result.failed
        (3, 0)
    """
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    bulk = Bulk.of(
        Path(folder), given, output, columns=Columns(text, pair), prompt=prompt, top=top,
        score_threshold=score_threshold, iou_threshold=iou_threshold, draw=None if draw is None else Path(draw),
        preprocess=preprocess, ray=ray,
    )  # fmt: skip
    return bulk.run(max_failed=max_failed, retune_s=retune_s, on_progress=on_progress)


@dataclass(frozen=True, kw_only=True)
class Bulk:
    """A job that was checked as far as it can be without running it."""

    artifact: Artifact
    job: Job
    ray: str | None

    @classmethod
    def of(
        cls,
        folder: Path,
        inputs: Iterable[str | Path],
        output: str | Path,
        *,
        columns: Columns,
        prompt: str | None,
        top: int | None,
        score_threshold: float | None,
        iou_threshold: float | None,
        draw: Path | None,
        preprocess: str | None,
        ray: str | None,
    ) -> "Bulk":
        """Check what is asked, with the arguments of ``predict``; nothing is written."""
        if ray is not None:
            check_address(ray)
            require_ray()
            folder = folder.absolute()
        artifact = read(folder)
        kind = _kind_of(artifact)
        ask = ImageAsk(top=TOP if top is None else top, score_threshold=score_threshold, iou_threshold=iou_threshold)
        options = {
            **columns._asdict(),
            "prompt": prompt,
            "draw": draw,
            "preprocess": preprocess,
            **asdict(ask),
            "top": top,
        }
        _check_foreign(folder, kind, options)
        if kind == "texts":
            _check_pairs(artifact, columns.pair)
        else:
            _check_media(artifact, ask, top, preprocess)
        places, out = list(inputs), place_of(output)
        paths = _listed(kind, places)
        if kind == "texts":
            _check_apart(out, places, paths)
        in_folder = ray is not None or isinstance(out, RemotePath) or not out.suffix
        if ray is not None and draw is not None:
            raise InputError("--draw does not go with --ray", "leave out one of them")
        if draw is not None:
            _check_drawings(draw, places, paths)
        job = Job(
            # In a folder parts say the same, whether they were made here or by nodes.
            inputs=tuple(path.absolute() if in_folder else path for path in paths),
            output=out.absolute() if in_folder else out,
            columns=columns,
            prompt=prompt,
            artifact=identity(folder),
            ask=None if kind == "texts" else ask,
            drawings=draw,
            preprocess=_seen_by_all(preprocess) if in_folder else preprocess,
            folder=in_folder,
            answer_bytes=_answer_bytes(artifact, kind),
        )
        check_job(job)
        if kind == "texts":
            job = replace(job, row_bytes=_row_bytes(job))
        return cls(artifact=artifact, job=job, ray=ray)

    def outlook(self) -> BulkOutlook:
        """What ``run`` would do. Raises ``OutputError`` if the output is another job's."""
        kept, facts = self.job.kept, self.job.facts()
        kept.check_same(facts)
        finished = kept.finished() if kept.same(facts) else {}
        return BulkOutlook(
            inputs=len(self.job.inputs),
            rows=self._rows(),
            done_rows=sum(counts.rows for counts in finished.values()),
            output=str(self.job.output),
            archives=None if self.job.ask is None else sum(map(is_archive, self.job.inputs)),
        )

    def run(self, *, max_failed: int | None, retune_s: float, on_progress: OnProgress) -> BulkResult:
        """Run it; the arguments are those of ``predict``, as is what it returns and raises."""
        start_s = time.monotonic()
        if self.ray is None:
            result = self._run_here(max_failed, on_progress)
        else:
            result = run_on_ray(
                self.ray,
                self.artifact.folder,
                self.job,
                preprocess=self.job.preprocess,
                total=self._total(),
                max_failed=max_failed,
                retune_s=retune_s,
                on_progress=on_progress,
            )
        result = replace(result, wall_s=time.monotonic() - start_s)
        return record_result(self.job.kept, result) if self.job.folder else result

    def _run_here(self, max_failed: int | None, on_progress: OnProgress) -> BulkResult:
        total = self._total()

        def on_rows(done: Counts) -> None:
            most = None if total is None else max(total, done.rows)
            on_progress(BulkProgress(rows=done.rows, total=most, failed=done.failed))

        job, folder = self.job, self.artifact.folder
        with load_for_bulk(folder, preprocess=job.preprocess, photos=job.ask is not None) as model:
            runner = runner_of(model, self.artifact.folder)
            done = run_job(self.job, runner, max_failed=max_failed, on_rows=on_rows)
        return BulkResult(
            output=str(self.job.output),
            failed_in=str(self.job.failed),
            rows=done.rows,
            resumed=done.resumed,
            failed=done.failed,
            wall_s=0.0,
            cut=done.cut,
        )

    def _total(self) -> int | None:
        """About how many rows there are; ``None`` with tar files, which have any number of images."""
        return None if self.job.ask is not None and any(map(is_archive, self.job.inputs)) else self._rows()

    def _rows(self) -> int:
        return len(self.job.inputs) if self.job.ask is not None else count_rows(self.job.inputs)


def _seen_by_all(preprocess: str | None) -> str | None:
    """A reference to a function that means the same on all nodes, whatever folder they work in."""
    file, _, function = (preprocess or "").rpartition(":")
    return f"{Path(file).absolute()}:{function}" if file.endswith(".py") else preprocess


def _kind_of(artifact: Artifact) -> Kind:
    """What an artifact answers. Raises ``InputError`` if it takes tensors only."""
    manifest = artifact.manifest
    if manifest.preprocess is not None and manifest.pipeline is None:
        return "images"
    if audio_of(artifact) is not None:
        return "recordings"
    if text_pipeline(artifact) is None:
        raise InputError(f"{artifact.folder} takes tensors only", "make it again from st:, hf: or with --tokenizer")
    return "texts"


def _listed(kind: Kind, places: Sequence[str | Path]) -> list[Place]:
    """The files of a kind that places name. Raises ``SamplesError`` as ``list_files``."""
    if kind == "images":
        return list_images(places)
    if kind == "texts":
        return list_files(places, READERS, "files of texts")
    paths = list_files(places, AUDIO_SUFFIXES, "recordings")
    for path in paths:
        if is_archive(path):
            raise InputError(f"{path} is a tar file, and only images are read from tar files", "unpack it")
    return paths


def _check_foreign(folder: Path, kind: Kind, options: Mapping[str, object]) -> None:
    """Raise ``InputError`` for an option that has no meaning for the items that the artifact takes."""
    for name, value in options.items():
        if value is not None and kind not in MEANT_FOR.get(name, (kind,)):
            option = name.replace("_", "-")
            raise InputError(f"--{option} has no meaning for {kind}, which {folder} takes", f"leave out --{option}")


def _check_media(artifact: Artifact, ask: ImageAsk, top: int | None, preprocess: str | None) -> None:
    """Raise ``InputError`` without the function that prepares images or recordings, and for options that do not fit."""
    pipeline = images_of(artifact) or audio_of(artifact)
    if pipeline is None:
        return
    if pipeline.preprocess.function is not None and preprocess is None:
        noun = "images" if isinstance(pipeline, ImagePipeline) else "recordings"
        raise InputError(f"{artifact.folder} was made with a function that prepares {noun}", "give --preprocess")
    ask.thresholds(pipeline.head)
    check_top(pipeline, top)


def _answer_bytes(artifact: Artifact, kind: Kind) -> int:
    """About how large the answer to an item is; 0 for all but vectors and maps, as others are small."""
    pipeline = text_pipeline(artifact) if kind == "texts" else images_of(artifact) or audio_of(artifact)
    if pipeline is None or pipeline.task != "vectors":
        return 0
    _, (first, *_) = artifact.golden()
    if isinstance(pipeline, TextPipeline) and first.ndim == 3:  # of each token, and texts may be longer than these
        return first[:1, :1].nbytes * pipeline.max_length
    return first[:1].nbytes


def _row_bytes(job: Job) -> int:
    """About how large a text is in a message to a node, by the first ones. Raises as ``records``."""
    first = list(islice(records(job), FIRST))
    return len(packed_rows(first)) // max(1, len(first))


def _check_drawings(draw: Path, places: Iterable[str | Path], paths: Iterable[Place]) -> None:
    """Raise ``OutputError`` for a folder whose drawings would be inputs of the same command, or replace some."""
    folder = draw.resolve()
    within = any(folder.is_relative_to(Path(place).resolve()) for place in places if Path(place).is_dir())
    if within or folder in {parent.resolve() for parent in {path.parent for path in paths if isinstance(path, Path)}}:
        raise OutputError(f"{draw} is among the inputs", "give another folder with --draw")


def _check_apart(output: Place, places: Iterable[str | Path], paths: Iterable[Place]) -> None:
    """Raise ``OutputError`` for an output in a folder of inputs, or with inputs in it: it would be one itself."""
    folder = f"{output.resolve()}/"
    for place in map(place_of, places):
        if folder.startswith(f"{place.resolve()}/") and not place.is_file():
            raise OutputError(f"{output} is among the inputs in {place}", "give another name with -o")
    if any(real_name(path).startswith(folder) for path in paths):
        raise OutputError(f"{output} has inputs in it", "give another name with -o")


def _check_pairs(artifact: Artifact, column: str | None) -> None:
    """Raise ``InputError`` unless the column of second texts is given for a model of pairs, and for no other."""
    pipeline, folder = text_pipeline(artifact), artifact.folder
    takes_pairs = pipeline is not None and pipeline.pairs
    if takes_pairs and column is None:
        raise InputError(f"{folder} takes pairs of texts", "say which column is the second text: --pair COLUMN")
    if column is not None and not takes_pairs:
        raise InputError(f"{folder} takes single texts", "leave out --pair")
