"""Folders of images or recordings: which files are samples, in which order, with which labels."""

import csv
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from glob import glob
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corewise.common.errors import SamplesError
from corewise.samples.audio import AUDIO_SUFFIXES
from corewise.samples.drawing import draw
from corewise.samples.image_files import HEIC_HINT, HEIC_SUFFIXES, image_suffixes
from corewise.samples.labels import stack_labels
from corewise.samples.places import Place, RemotePath, matching, place_of, without_twins
from corewise.samples.raw import NAMED, NOUNS, RawKind, RawSamples
from corewise.samples.texts import number_or_text

LABELS_FILE = "labels.csv"
HIDDEN = (".", "__MACOSX", "lost+found")
"""Names that begin so are no samples: what file managers, archives and file systems add."""
PART = re.compile(
    r"(train|training|val|valid|validation|dev|test|testing|eval)([ _-]?(set|data|images|imgs|\d+))?"
    r"|images|imgs|masks|labels|annotations",
    re.IGNORECASE,
)
"""Names of folders that hold class folders, or one kind of file of each sample, and are no classes themselves."""
TARGETS = ("masks", "labels", "annotations")


def list_images(places: Iterable[str | Place]) -> list[Place]:
    """``list_files`` of images, among them HEIC photos that cannot be read here."""
    return list_files(places, {*image_suffixes(), *HEIC_SUFFIXES}, "images")


def list_files(places: Iterable[str | Place], suffixes: Collection[str], noun: str) -> list[Place]:
    """The files that places name, in that order: files, all files of these kinds below folders, and patterns.

    Args:
        places: Paths, URLs, or patterns such as ``photos/*.jpg``, in which ``**`` stands for folders below. Of
            folders, hidden files do not count.
        suffixes: Of the files that count in folders.
        noun: What they are called.

    Raises:
        SamplesError: A place has none or cannot be read, or a file is named twice.
    """
    try:
        return without_twins(_files(places, suffixes, noun))
    except OSError as error:
        raise _unreadable(error, "the inputs") from error


def _files(places: Iterable[str | Place], suffixes: Collection[str], noun: str) -> list[Place]:
    found: list[Place] = []
    for typed in places:
        place = place_of(typed)
        if place.is_file():
            found.append(place)
        elif (below := _in_folder(place)) or (isinstance(place, Path) and place.is_dir()):
            files = [file for file in below if _suffix(file.name) in suffixes]
            if not files:
                raise SamplesError(f"there are no {noun} in {typed}", f"give a folder of {noun}")
            found += files
        elif named := _named_by(place):
            found += named
        else:
            raise SamplesError(f"there is no file {typed}", "check the path or the pattern")
    return found


def _unreadable(error: OSError, place: object) -> SamplesError:
    return SamplesError(
        f"{error.filename or place} cannot be read: {error.strerror}", "check the path and its permissions"
    )


def _named_by(pattern: Place) -> list[Place]:
    """The files that a pattern names."""
    if isinstance(pattern, RemotePath):
        return list(matching(pattern))
    return [Path(name) for name in sorted(glob(str(pattern), recursive=True)) if os.path.isfile(name)]


def _in_folder(folder: Place) -> list[Place]:
    """The files below it that are not hidden."""
    if isinstance(folder, Path):
        return [folder / name for name in _below(folder)] if folder.is_dir() else []
    start = len(folder.url) + 1
    return [file for file in folder.files() if not any(map(_hidden, file.url[start:].split("/")))]


def _hidden(name: str) -> bool:
    return name.startswith(HIDDEN)


class _Listing(NamedTuple):
    """A folder's samples as paths below it, with a label each or none at all, and what other files there are."""

    paths: list[str]
    labels: list[int | float] | None
    others: Counter[str]
    classes: tuple[str, ...] = ()
    """The names of class folders, in the order of their numbers."""


def read_folder(
    folder: Path, *, max_samples: int | None = None, seed: int = 0, allow_empty: bool = False
) -> RawSamples:
    """The images or recordings of a folder; none is opened.

    Where the folder has a ``labels.csv`` (columns ``file`` and ``label``, files relative to the folder), its files.
    Else class folders are read as torchvision's ``ImageFolder`` reads them: their sorted names are the classes 0, 1,
    ..., and all files below them count. Else the folder's own files, without labels. Hidden files and folders never
    count.

    Args:
        folder: The folder.
        max_samples: Draw at most this many.
        seed: Seed of the draw.
        allow_empty: Let a class folder without files keep its number; otherwise it is an error.

    Raises:
        SamplesError: Naming what is wrong with the folder or its ``labels.csv``.
    """
    try:
        listing = _labelled(folder) if (folder / LABELS_FILE).is_file() else _listed(folder, allow_empty)
    except OSError as error:
        raise _unreadable(error, folder) from error
    kinds: set[RawKind] = {"audio" if _suffix(path) in AUDIO_SUFFIXES else "image" for path in listing.paths}
    if len(kinds) != 1:
        what = "both images and recordings" if kinds else "no samples"
        raise SamplesError(f"there are {what} in {folder}", "give a folder of images or one of recordings")
    kind = kinds.pop()
    chosen, drawn = draw(len(listing.paths), max_samples, seed, noun=NOUNS[kind])
    names = [listing.paths[index] for index in chosen]
    labels = None if listing.labels is None else [listing.labels[index] for index in chosen]
    return RawSamples(
        kind=kind,
        items=[folder / name for name in names],
        labels=None if labels is None else stack_labels(labels, names.__getitem__, str(folder)),
        source=str(folder),
        numbers=np.array(chosen, np.int64),
        names=names,
        notes=(*_skipped(listing.others, kind), *_order(listing.classes), *drawn),
    )


def _listed(folder: Path, allow_empty: bool) -> _Listing:
    others: Counter[str] = Counter()
    children = sorted(child for child in folder.iterdir() if not child.name.startswith(HIDDEN))
    own = _usable([child.name for child in children if not child.is_dir()], others)
    classes = {child.name: _usable(_below(child), others) for child in children if child.is_dir()}
    filled = [name for name, paths in classes.items() if paths]
    if own and filled:
        raise SamplesError(
            f"{folder} has images beside the folder {filled[0]}", "use either class folders or a flat folder"
        )
    if not own and not filled:
        raise SamplesError(
            f"there are no images in {folder}{_holding(others)}",
            f"{HEIC_HINT} .heic"
            if any(suffix in others for suffix in HEIC_SUFFIXES)
            else "give images, recordings, class folders or labels.csv",
        )
    if own:
        return _Listing(own, None, others)
    if len(classes) == 1:
        raise SamplesError(
            f"{folder} has the single class folder {filled[0]}",
            f"give {folder / filled[0]} for images without labels, or write {folder / LABELS_FILE}",
        )
    if all(map(PART.fullmatch, filled)):
        named = ", ".join(filled[:NAMED]) + (f" and {len(filled) - NAMED:,} more" if len(filled) > NAMED else "")
        inputs = [name for name in filled if name.lower() not in TARGETS] or filled
        raise SamplesError(
            f"the folders {named} of {folder} look like parts of a data set, not like classes",
            f"give one of them, e.g. {folder / inputs[0]}, or name the classes in {folder / LABELS_FILE}",
        )
    empty = [name for name in classes if name not in filled]
    if empty and not allow_empty:
        beside: Counter[str] = Counter()
        _usable(_below(folder / empty[0]), beside)
        raise SamplesError(
            f"the class folder {folder / empty[0]} {f'has no images{_holding(beside)}' if beside else 'is empty'}",
            f"remove it if the model has no such class, else number the classes in {folder / LABELS_FILE}",
        )
    paths = [f"{name}/{path}" for name in classes for path in classes[name]]
    labels: list[int | float] = [number for number, name in enumerate(classes) for _ in classes[name]]
    return _Listing(paths, labels, others, tuple(classes))


def _below(folder: Path) -> Iterator[str]:
    """The files below a class folder, in torchvision's order; links are followed, hidden ones and circles are not.

    Raises ``OSError`` for a folder that cannot be read: its files would be missed without a word.
    """
    seen: set[str] = set()
    levels: list[tuple[str, list[str]]] = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(HIDDEN)]
        if real not in seen:
            levels.append((parent, files))
        seen.add(real)
    for parent, files in sorted(levels):
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _raise(error: OSError) -> None:
    raise error


def _usable(paths: Iterator[str] | list[str], others: Counter[str]) -> list[str]:
    """Images and recordings; the suffixes of the rest are counted."""
    usable = []
    for path in paths:
        suffix = _suffix(path)
        if suffix in AUDIO_SUFFIXES or suffix in image_suffixes():
            usable.append(path)
        else:
            others[suffix or "without a suffix"] += 1
    return usable


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _holding(others: Counter[str]) -> str:
    """What a folder holds instead of images: ``: it holds 3 .heic, 1 .txt``."""
    return ": it holds " + ", ".join(f"{count} {suffix}" for suffix, count in others.most_common()) if others else ""


def _skipped(others: Counter[str], kind: RawKind) -> tuple[str, ...]:
    """A sentence for the report about the files that are no samples."""
    if not others:
        return ()
    named = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
    advice = f"; {HEIC_HINT} .heic" if any(suffix in others for suffix in HEIC_SUFFIXES) else ""
    return (f"{sum(others.values())} files are not {NOUNS[kind]} that can be read here: {named}{advice}",)


def _order(classes: tuple[str, ...]) -> tuple[str, ...]:
    """A sentence for the report where class folders are numbers and their order as text, torchvision's, is another."""
    if not classes or not all(name.isdecimal() for name in classes):
        return ()
    moved = next((number for number, name in enumerate(classes) if int(name) != number), None)
    if moved is None:
        return ()
    return (
        f"class folders are numbered in the order of their names as text, as torchvision does: {classes[moved]} is "
        f"class {moved}",
    )


def _labelled(folder: Path) -> _Listing:
    table = folder / LABELS_FILE
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SamplesError(f"{table} cannot be read: {error}", "save it as CSV in UTF-8") from error
    if not rows:
        raise SamplesError(f"there are no samples in {table}", "give a line for each file")
    if not {"file", "label"} <= set(reader.fieldnames or ()):
        names = ", ".join(map(str, reader.fieldnames or ()))
        raise SamplesError(f"{table} has the columns {names}", "name two of them file and label")
    paths: dict[str, int] = {}
    labels: list[int | float] = []
    for line, row in rows:
        cell = (row["label"] or "").strip()
        label = number_or_text(cell)
        if isinstance(label, str) or not -inf < label < inf:
            raise SamplesError(f"{table} line {line}: the label {cell!r} is not a number", "number the classes from 0")
        path = row["file"] or ""
        if not (folder / path).is_file():
            raise SamplesError(f"{table} line {line}: there is no file {path!r}", f"name files relative to {folder}")
        if path in paths:  # calibration and holdout would share it
            raise SamplesError(
                f"{table} line {line}: {path!r} has a label in line {paths[path]} already", "name each file once"
            )
        paths[path] = line
        labels.append(label)
    return _Listing(list(paths), labels, Counter())
