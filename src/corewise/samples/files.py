"""Samples from what a reference names: a folder, a file, or a user's function."""

import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from corewise.common.errors import SamplesError
from corewise.common.references import called_reference
from corewise.records.report import Preprocess
from corewise.samples.data import Samples, sample_name
from corewise.samples.drawing import MAX_SAMPLES
from corewise.samples.folders import read_folder
from corewise.samples.image_files import is_image
from corewise.samples.images import ImageReader, Preprocessor
from corewise.samples.labels import stack_labels
from corewise.samples.python import RAW_FIXES, raw_from_python, unstack
from corewise.samples.raw import NOUNS, RawSamples
from corewise.samples.stored import Array
from corewise.samples.tables import READERS, read_table
from corewise.samples.tensors import Item, collect, number_groups
from corewise.samples.texts import Columns

LABEL_KEYS = ("labels", "label", "y")
FILE_SUFFIXES = (*READERS, ".npz", ".safetensors")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
BROKEN = (OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for bytes that are no whole archive of arrays."""
MOST_THREADS = 16
"""Threads that decode; more of them would hold more images than a small container has memory for."""


def read(
    reference: str,
    preprocess: Preprocess | None = None,
    preprocess_function: str | Preprocessor | None = None,
    *,
    tensorize: Callable[[Any], Any] | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    allow_empty: bool = False,
    spool: Path | None = None,
) -> Samples:
    """The samples that ``reference`` names, as tensors.

    Args:
        reference: As ``read_raw`` takes it.
        preprocess: How images become inputs: float32 (C, crop, crop); ImageNet's usual way by default.
        preprocess_function: Does it instead: itself or its reference. Takes an RGB PIL image, returns one input.
        tensorize: Makes one sample's inputs of a text, a pair of texts or a recording's path (see
            ``RawSamples.tensors``); without it such samples are an error.
        text: As ``read_raw`` takes it, as are the other arguments.

    Raises:
        SamplesError: Naming what is wrong and where.
        OutputError: Where the temporary file cannot be written.
        MissingExtra: Where Pillow, pyarrow or soundfile is needed and not installed.
    """
    reader = ImageReader(preprocess or Preprocess(), preprocess_function)
    gathered = read_raw(
        reference,
        text=text,
        pair=pair,
        label=label,
        max_samples=max_samples,
        seed=seed,
        allow_empty=allow_empty,
        spool=spool,
    )
    if isinstance(gathered, Samples):
        return gathered
    if tensorize is not None:
        return gathered.tensors(tensorize, spool=spool)
    if gathered.kind != "image":
        raise SamplesError(f"there are {NOUNS[gathered.kind]} in {reference}", RAW_FIXES[gathered.kind])
    return image_samples(gathered, reader, spool=spool)


def read_leaving_texts(
    reference: str,
    preprocess: Preprocess | None = None,
    preprocess_function: str | Preprocessor | None = None,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Samples | RawSamples:
    """As ``read``; texts, pairs of texts and recordings stay as they are, for the model's pipeline."""
    reader = ImageReader(preprocess or Preprocess(), preprocess_function)
    gathered = read_raw(reference, text=text, pair=pair, label=label, max_samples=max_samples, seed=seed)
    if isinstance(gathered, Samples) or gathered.kind != "image":
        return gathered
    return image_samples(gathered, reader)


def image_samples(images: RawSamples, reader: ImageReader, *, spool: Path | None = None) -> Samples:
    """Samples of what ``reader`` makes of images; several threads decode where it allows them."""
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0))) if reader.threads_allowed else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF data and the like
        samples = images.tensors(reader, preprocess=reader.preprocess, spool=spool, threads=threads)
    return replace(samples, notes=(*samples.notes, *reader.notes()))


def check_reference(reference: str) -> None:
    """Raise ``SamplesError`` for what ``read_raw`` could not read by its name alone; nothing is opened or imported."""
    path = Path(reference)
    if path.is_dir():
        return
    if path.suffix.lower() in FILE_SUFFIXES:
        if not path.is_file():
            raise SamplesError(f"there is no file {reference}", "check the path")
    elif ":" not in reference:
        if path.is_file() and path.suffix.lower() in PACKED:
            raise SamplesError(f"{reference} is compressed", "unpack it")
        raise SamplesError(
            f"{reference} is not a file of samples" if path.is_file() else f"there are no samples at {reference}",
            f"give a folder of images or recordings, a file ({', '.join(FILE_SUFFIXES)}), or file.py:function",
        )


def read_raw(
    reference: str,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    allow_empty: bool = False,
    spool: Path | None = None,
) -> Samples | RawSamples:
    """The samples that ``reference`` names, raw where they are raw.

    Args:
        reference: One of

            - a folder of images or recordings (see ``read_folder``);
            - a file of texts: ``.txt``, ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` (see ``read_table``);
            - ``.npz`` or ``.safetensors``: ``labels`` (``label``, ``y``) and ``groups`` are what they say, a single
              other array is the model's positional input, several are keyword inputs; uint8 arrays (N, H, W, 3 or 1)
              are images;
            - ``module:function`` or ``file.py:function``: what the function returns, or the list, dataset or loader of
              that name, goes through ``raw_from_python``.
        text: The column of a table, or key of a dict, that is the text.
        pair: The one that is the second text of a pair.
        label: The one that is the label.
        max_samples: Draw at most this many; by default 2,000 of what a folder or file of texts holds, else all.
        seed: Seed of the draw.
        allow_empty: Let an empty class folder keep its number.
        spool: Folder for a temporary file that keeps what is large; the system's by default.

    Raises:
        SamplesError: Naming what is wrong and where.
        MissingExtra: Where Pillow or pyarrow is needed and not installed.
    """
    check_reference(reference)
    path = Path(reference)
    columns = Columns(text, pair, label)
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in FILE_SUFFIXES:
        options: dict[str, Any] = {"text": text, "pair": pair, "label": label, "max_samples": max_samples, "seed": seed}
        with called_reference(reference, SamplesError, "samples function", _are_samples) as made:
            return raw_from_python(made, source=reference, spool=spool, **options)
    if any(columns) and (path.is_dir() or suffix not in READERS):
        raise SamplesError(f"{reference} has no columns of texts", "leave out --text, --pair and --label")
    most = MAX_SAMPLES if max_samples is None else max_samples
    if path.is_dir():
        folder = read_folder(path, max_samples=most, seed=seed, allow_empty=allow_empty)
        return replace(folder, source=reference)
    if suffix in READERS:
        return replace(read_table(path, columns, max_samples=most, seed=seed), source=reference)
    arrays = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    return _from_arrays(arrays, reference).draw(max_samples, seed)


def _are_samples(value: Any) -> bool:
    """Whether a value that a file gives a name holds samples, as a list, a dataset or a loader does."""
    return not callable(value) and (hasattr(value, "__iter__") or hasattr(value, "__getitem__"))


def _read_npz(path: Path) -> dict[str, Array]:
    key = ""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                arrays[key] = archive[key]
            return arrays
    except BROKEN as error:
        place = f"the array {key!r} of {path}" if key else str(path)
        raise SamplesError(f"{place} cannot be read: {error}", "write numbers with numpy.savez") from error


def _read_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise SamplesError(f"{path} cannot be read: {error}", "write it with safetensors.numpy.save_file") from error


def _from_arrays(arrays: dict[str, Array], source: str) -> Samples | RawSamples:
    labels = next((arrays.pop(key) for key in LABEL_KEYS if key in arrays), None)
    groups = arrays.pop("groups", None)
    if not arrays:
        raise SamplesError(f"{source} has no inputs", "add an array beside labels and groups")
    pairs = list(unstack(arrays if len(arrays) > 1 else next(iter(arrays.values())), labels, source))
    if groups is not None and len(groups) != len(pairs):
        raise SamplesError(f"{source} has {len(groups)} groups for {len(pairs)} samples", "give one for each sample")
    if not any(array.ndim and len(array) and is_image(array[0]) for array in arrays.values()):
        belongs = [None] * len(pairs) if groups is None else groups
        items = (
            Item(number, inputs, label, group=group)
            for number, ((inputs, label), group) in enumerate(zip(pairs, belongs, strict=True))
        )
        return collect(items, source=source)
    return RawSamples(
        kind="image",
        items=[inputs for inputs, _ in pairs],
        labels=stack_labels([label for _, label in pairs], sample_name, source),
        groups=None if groups is None else number_groups(list(groups)),
        source=source,
    )
