"""The artifact: a directory with everything needed to run and check one optimized model.

    manifest.json        build, plan, signature, required CPU features, sha256 and size of every other file
    payload/             the engine's own files
    reference/           the fp32 program, for ``bench --against`` and for checking drift
    tokenizer.json       a Hugging Face tokenizer, if one was given
    golden.safetensors   a few inputs with this payload's outputs
    packed/              the same of the program that answers several texts in one row, if that is faster
    report.json, .md     every trial, and why this one won; report.html is the same with charts
    tuned.json           plans that corewise retune found for other machines; not in the manifest (see ``tuned``)

An artifact is written to a temporary folder and renamed, so it is complete or absent. ``read`` checks every hash before
anything is opened and never unpickles.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from corewise.common.errors import ArtifactError, OutputError
from corewise.common.nested import Structure
from corewise.engines import Session
from corewise.pipeline.calls import CostTable
from corewise.records.build import Build, ElasticPlan, Plan, TensorSpec
from corewise.records.cpu import Cpu
from corewise.records.jsonable import from_json, to_json
from corewise.records.pipeline import PACKED_INPUTS, Packing, PhotoPlan, TextPipeline
from corewise.records.ranges import InputRange, SeenRanges
from corewise.records.report import AudioPreprocess, Preprocess, Report
from corewise.records.schema_1 import upgrade_report
from corewise.samples.images import restore_pixels

SCHEMA = 2
"""Schema 2 stores reasons as data. Reports of schema 1, which stores sentences, can be read too."""
READABLE = (1, SCHEMA)
MANIFEST = "manifest.json"
PAYLOAD = "payload"
REFERENCE = "reference/program.pt2"
GOLDEN = "golden.safetensors"
PACKED = "packed"
"""Has a ``PAYLOAD`` and a ``GOLDEN`` of its own."""
TOKENIZER = "tokenizer.json"
REPORT = "report.json"
REPORT_TEXT = "report.md"
REPORT_PAGE = "report.html"
TUNED = "tuned.json"
TUNED_NEW = "tuned.json.new"
"""``TUNED`` while it is written. A killed writer leaves it behind, so ``read`` ignores it."""
MIN_SQNR_DB = {"fp32": 50.0, "bf16": 25.0, "int8": 20.0, "int8-dynamic": 20.0}
"""The least SQNR of golden outputs on another machine, whose kernels may round differently."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """Hash and size of one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json`` without its digest."""

    schema: int
    model: str
    created: str
    versions: dict[str, str]
    architecture: str
    needs: tuple[str, ...]
    build: Build
    plan: Plan
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: dict[str, Any]
    output_structure: dict[str, Any]
    preprocess: Preprocess | None
    files: dict[str, FileFacts]
    labels: tuple[str, ...] | None = None
    """Names of the classes, in the order of the scores."""
    input_ranges: tuple[InputRange, ...] | None = None
    """The range of each input; ``None`` in artifacts of versions without ranges."""
    pipeline: TextPipeline | None = None
    """How texts become inputs and outputs answers; ``None`` if the model takes tensors only, and in older artifacts."""
    photos: PhotoPlan | None = None
    """The fastest plan from files of photos to answers, on the machine of the report, if it was searched."""
    seen_ranges: SeenRanges | None = None
    """What inputs and outputs were like in the search (``watch``); ``None`` in artifacts of versions without it."""
    call_costs: CostTable | None = None
    """What calls of texts cost under ``plan``; ``None`` where that was not measured, and in older artifacts."""
    audio: AudioPreprocess | None = None
    """How recordings become the input; ``None`` if the model was not made from any, and in older artifacts."""
    elastic: ElasticPlan | None = None
    """Two layouts that are open in place of ``plan``; ``None`` where one is as good, and in older artifacts."""
    packing: Packing | None = None
    """How ``PACKED`` answers several texts in one row; ``None`` where that is not faster, and in older artifacts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedFiles:
    """What becomes the folder ``PACKED``."""

    payload: Path
    inputs: Sequence[np.ndarray]
    """Golden ones, with the payload's ``outputs``."""
    outputs: Sequence[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A checked artifact on disk."""

    folder: Path
    manifest: Manifest

    @property
    def report(self) -> Report:
        """The report that was saved with it. Raises ``ArtifactError`` if it does not fit its schema."""
        try:
            data = json.loads((self.folder / REPORT).read_text())
            return from_json(Report, upgrade_report(data) if self.manifest.schema == 1 else data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{self.folder / REPORT} cannot be read: {_first_line(error)}", REBUILD) from error

    @property
    def input_structure(self) -> Structure:
        """How a call's arguments hold the input tensors."""
        return Structure.from_data(self.manifest.input_structure)

    @property
    def output_structure(self) -> Structure:
        """How the model's result holds the output tensors."""
        return Structure.from_data(self.manifest.output_structure)

    def golden(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The golden inputs and outputs, flat. Raises ``ArtifactError`` if the file does not have them."""
        return _read_golden(self.folder / GOLDEN, len(self.manifest.inputs))

    def packed_golden(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Those of the packed program. Raises ``ArtifactError`` as ``golden``."""
        return _read_golden(self.folder / PACKED / GOLDEN, len(PACKED_INPUTS))


REBUILD = "copy the artifact again, or make it again with corewise optimize"


def read(folder: Path, *, cpu: Cpu | None = None) -> Artifact:
    """Check an artifact and return it without opening its payload.

    Raises ``ArtifactError`` if it is missing, foreign, of a newer schema, truncated or altered, or if ``cpu`` is given
    and lacks a feature that the payload needs.
    """
    manifest = _manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    extra = sorted(present - set(manifest.files) - {MANIFEST, TUNED, TUNED_NEW})
    if extra:
        raise ArtifactError(f"{folder / extra[0]} is not in the manifest", "remove it, or copy the artifact again")
    artifact = Artifact(folder=folder, manifest=manifest)
    check_files(artifact)
    if cpu is not None:
        _check_cpu(folder, manifest, cpu)
    return artifact


def check_files(artifact: Artifact, part: str = "") -> None:
    """Raise ``ArtifactError`` if a file of the artifact, or of its folder ``part``, is missing or altered."""
    for name, facts in artifact.manifest.files.items():
        if name.startswith(f"{part}/" if part else ""):
            _check_file(artifact.folder, name, facts)


def write(
    folder: Path,
    *,
    manifest: Callable[[dict[str, FileFacts]], Manifest],
    payload: Path,
    reference: Path | None,
    golden: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    tokenizer: Path | bytes | None = None,
    packed: PackedFiles | None = None,
    report: Report,
    report_text: str,
    report_page: str,
) -> None:
    """Write an artifact at ``folder``, complete or not at all.

    Raises ``OutputError`` if ``folder`` exists or cannot be written, or if the disk is full.
    """
    check_output(folder)
    try:
        with _beside(folder) as name:
            made = Path(name) / folder.name
            made.mkdir()
            shutil.copytree(payload, made / PAYLOAD)
            if reference is not None:
                (made / REFERENCE).parent.mkdir()
                shutil.copyfile(reference, made / REFERENCE)
            if tokenizer is not None:
                (made / TOKENIZER).write_bytes(tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes())
            _write_golden(made / GOLDEN, *golden)
            if packed is not None:
                shutil.copytree(packed.payload, made / PACKED / PAYLOAD)
                _write_golden(made / PACKED / GOLDEN, packed.inputs, packed.outputs)
            (made / REPORT).write_text(json.dumps(to_json(report), indent=1))
            # Names of files, which need not be UTF-8, are written as on a terminal.
            (made / REPORT_TEXT).write_text(report_text, encoding="utf-8", errors="replace")
            (made / REPORT_PAGE).write_text(report_page, encoding="utf-8", errors="replace")
            files = {
                path.relative_to(made).as_posix(): FileFacts(sha256=_sha256(path), size_bytes=path.stat().st_size)
                for path in sorted(made.rglob("*"))
                if path.is_file()
            }
            content = to_json(manifest(files))
            content["digest"] = digest(content)
            (made / MANIFEST).write_text(json.dumps(content, indent=1))
            for path in made.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # Often another user serves it, and some libraries write 0600.
                _sync(path)
            made.rename(folder)
    except OSError as error:
        raise OutputError(
            f"the artifact {folder} cannot be written: {getattr(error, 'strerror', None) or error}",
            "free space or choose another place, and run the same command: finished trials are kept",
        ) from error


def check_output(folder: Path) -> None:
    """Raise ``OutputError`` unless an artifact can be written at ``folder``; called before the work starts."""
    try:
        if folder.exists() or folder.is_symlink():
            raise OutputError(f"{folder} exists already", "remove it or give another name with -o")
        if not folder.parent.is_dir():
            raise OutputError(f"there is no folder {folder.parent}", "create it or give another place with -o")
        with _beside(folder):
            pass
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:  # engines take names in UTF-8 only
        raise OutputError(f"{folder} has a name that is not UTF-8", "give another place with -o") from error
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}", "give another place with -o") from error


def _beside(folder: Path) -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder from which an artifact can be renamed to ``folder``."""
    return tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)


def check_golden(artifact: Artifact, session: Session) -> float:
    """Run the golden inputs and return the SQNR (dB) against the golden outputs.

    Raises ``ArtifactError`` if it is below ``MIN_SQNR_DB`` of the precision.
    """
    inputs, expected = artifact.golden()
    pixels = golden_pixels(artifact)
    return _checked_golden(artifact, session, [given for given in (inputs, pixels) if given], expected)


def check_packed_golden(artifact: Artifact, session: Session) -> float:
    """``check_golden`` of the packed program. Raises as it does."""
    inputs, expected = artifact.packed_golden()
    return _checked_golden(artifact, session, [inputs], expected)


def _checked_golden(
    artifact: Artifact, session: Session, given: Sequence[list[np.ndarray]], expected: Sequence[np.ndarray]
) -> float:
    answers = [session.run(inputs) for inputs in given]
    for outputs in answers:
        if [array.shape for array in outputs] != [array.shape for array in expected]:
            raise ArtifactError(f"{artifact.folder} gives outputs of other shapes than when it was made", REBUILD)
    # Not min(), which may pass over NaN.
    sqnr_db = float(np.min([_sqnr_db(outputs, expected) for outputs in answers]))
    least_db = MIN_SQNR_DB[artifact.manifest.build.precision]
    if not sqnr_db >= least_db:
        raise ArtifactError(
            f"the golden outputs of {artifact.folder} have an SQNR of {sqnr_db:.1f} dB here, below the required "
            f"{least_db:g} dB",
            "this CPU or these packages compute differently: make it again here with corewise optimize",
        )
    return sqnr_db


def golden_pixels(artifact: Artifact) -> list[np.ndarray]:
    """The pixels of the golden inputs, (N, crop, crop, C); nothing for a payload that takes none."""
    preprocess = artifact.manifest.preprocess
    if preprocess is None or preprocess.dtype != "uint8":
        return []
    (inputs,), _ = artifact.golden()
    pixels = restore_pixels(inputs, preprocess)
    if pixels is None:
        raise ArtifactError(f"the golden inputs of {artifact.folder} are not images", REBUILD)
    return [pixels]


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        missing = "is a file, not an artifact" if folder.exists() else "does not exist"
        what = "is not an artifact: it has no manifest.json" if folder.is_dir() else missing
        raise ArtifactError(f"{folder} {what}", "give a folder that corewise optimize wrote")
    try:
        content = json.loads(path.read_text())
        signed = content.pop("digest")
        schema = content["schema"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a manifest of corewise: {_first_line(error)}", REBUILD) from error
    if schema not in READABLE:
        raise ArtifactError(
            f"{path} has schema {schema!r}, this corewise reads {', '.join(map(str, READABLE))}",
            "use the corewise that wrote it",
        )
    if signed != digest(content):
        raise ArtifactError(f"{path} was altered after it was written", REBUILD)
    try:
        manifest = from_json(Manifest, content)
        for structure in (manifest.input_structure, manifest.output_structure):
            Structure.from_data(structure)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} does not fit its schema: {_first_line(error)}", REBUILD) from error
    for name in (GOLDEN, REPORT):
        if name not in manifest.files:
            raise ArtifactError(f"{path} does not list {name}", REBUILD)
    return manifest


def _check_file(folder: Path, name: str, facts: FileFacts) -> None:
    parts = PurePosixPath(name)
    path = folder / parts
    if "\0" in name or ".." in parts.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"the manifest of {folder} names {name!r}, which is outside the folder", REBUILD)
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} is {'a link' if path.is_symlink() else 'missing'}", REBUILD)
    size = path.stat().st_size
    if size != facts.size_bytes:
        raise ArtifactError(f"{path} is truncated or altered: {size} bytes instead of {facts.size_bytes}", REBUILD)
    if _sha256(path) != facts.sha256:
        raise ArtifactError(f"{path} was altered: its sha256 is not the one in the manifest", REBUILD)


def _check_cpu(folder: Path, manifest: Manifest, cpu: Cpu) -> None:
    again = "make it again on this machine with corewise optimize"
    if manifest.architecture != cpu.architecture:
        raise ArtifactError(f"{folder} was made for {manifest.architecture}, this CPU is {cpu.architecture}", again)
    lacking = [need for need in manifest.needs if not satisfies(cpu, need)]
    if lacking:
        raise ArtifactError(f"{folder} needs a CPU with {', '.join(lacking)}, which {cpu.model} lacks", again)


def satisfies(cpu: Cpu, need: str) -> bool:
    """Whether the CPU has the feature, by its name in ``Engine.needs``."""
    return {"int8_dot": cpu.int8_dot, "bf16": cpu.bf16}.get(need, cpu.has(need))


def _read_golden(path: Path, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The ``count`` inputs and the outputs in a file. Raises ``ArtifactError`` if it does not have them."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        inputs = [tensors[f"input.{k}"] for k in range(count)]
        return inputs, [tensors[f"output.{k}"] for k in range(len(tensors) - count)]
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} has no golden outputs: {_first_line(error)}", REBUILD) from error


def _write_golden(path: Path, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    from safetensors.numpy import save

    tensors = {f"input.{k}": np.ascontiguousarray(array) for k, array in enumerate(inputs)}
    tensors.update({f"output.{k}": np.ascontiguousarray(array) for k, array in enumerate(outputs)})
    # Not save_file, which lets only this user read the file.
    path.write_bytes(save(tensors))


def _sqnr_db(outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Signal over error of the finite values of ``expected``, at most 200; NaN if the other values differ."""
    signal = noise = 0.0
    for ours, theirs in zip(outputs, expected, strict=True):
        finite = np.isfinite(theirs)
        if not np.array_equal(ours[~finite], theirs[~finite]):
            return float("nan")
        exact = theirs[finite].astype(np.float64)
        signal += float(np.square(exact).sum())
        noise += float(np.square(ours[finite].astype(np.float64) - exact).sum())
    if not noise < float("inf"):
        return float("nan")
    return 200.0 if noise == 0 else min(200.0, 10 * float(np.log10(max(signal, 1e-300) / noise)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(folder: Path) -> str:
    """The sha256 of the artifact's manifest, which holds the sha256 of each of its files."""
    return _sha256(folder / MANIFEST)


def digest(content: dict[str, Any]) -> str:
    """The sha256 of JSON data, stored beside it to detect changes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
