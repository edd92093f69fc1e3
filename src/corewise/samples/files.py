"""Samples from image folders, array files and users' functions."""

import csv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import MissingExtra, SamplesError
from corewise.common.references import call_reference, find_reference, guard
from corewise.records.report import Preprocess
from corewise.samples.data import Array, Samples
from corewise.samples.python import collect, from_python, unstack

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocessor = Callable[["Image"], Any]
Transform = Callable[["Image", str], Any]
"""An image and its name, for messages, to the model's input."""

LABEL_KEYS = ("labels", "label", "y")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def read(
    reference: str, preprocess: Preprocess | None = None, preprocess_function: str | Preprocessor | None = None
) -> Samples:
    """The samples that ``reference`` names. Raises ``SamplesError``.

    - a folder of images: with ``labels.csv`` (columns ``file`` and ``label``, files relative to the folder), or with
      one folder for each class (sorted names are classes 0, 1, ...), or images alone, which have no labels;
    - ``.npz`` or ``.safetensors``: ``labels`` (``label``, ``y``) and ``groups`` are what they say, a single other array
      is the model's positional input, several are keyword inputs; uint8 arrays (N, H, W, 3 or 1) are images;
    - ``module:function`` or ``file.py:function``: what the function returns goes through ``from_python``.

    An image becomes the input by ``preprocess``, or by ``preprocess_function`` (itself or its reference), which takes
    an RGB PIL image and returns the input, without batch dimension.
    """
    path = Path(reference)
    preprocess = preprocess or Preprocess()
    if path.is_dir():
        transform, used = _transform(preprocess, preprocess_function)
        items = ((transform(_open_image(file), str(file)), label) for file, label in _list_images(path))
        return collect(items, source=reference, preprocess=used)
    if path.suffix in (".npz", ".safetensors"):
        if not path.is_file():
            raise SamplesError(f"there is no file {reference}", "check the path")
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
        return _from_arrays(arrays, reference, *_transform(preprocess, preprocess_function))
    if ":" in reference:
        return from_python(call_reference(reference, SamplesError, "samples function"), source=reference)
    raise SamplesError(
        f"there are no samples at {reference}",
        "give a folder of images, an .npz or .safetensors file, or module:function",
    )


def _list_images(folder: Path) -> list[tuple[Path, int | None]]:
    """The folder's image files with their labels."""
    if (folder / "labels.csv").is_file():
        return list(_list_labelled(folder))
    images = _images_in(folder)
    classes = [(child, files) for child in sorted(folder.iterdir()) if child.is_dir() and (files := _images_in(child))]
    if images and classes:
        raise SamplesError(
            f"{folder} has images beside the folder {classes[0][0].name}", "use either class folders or a flat folder"
        )
    if len(classes) == 1:
        raise SamplesError(
            f"{folder} has the single class folder {classes[0][0].name}",
            f"give {classes[0][0]} for images without labels, or write {folder / 'labels.csv'}",
        )
    if not images and not classes:
        raise SamplesError(
            f"there are no images in {folder}", f"give images ({' '.join(IMAGE_SUFFIXES)}), class folders or labels.csv"
        )
    return [(file, None) for file in images] + [(file, n) for n, (_, files) in enumerate(classes) for file in files]


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def _list_labelled(folder: Path) -> Iterator[tuple[Path, int]]:
    table = folder / "labels.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SamplesError(f"{table} cannot be read: {error}", "save it as CSV in UTF-8") from error
    if rows and not {"file", "label"} <= set(rows[0]):
        raise SamplesError(f"{table} has the columns {', '.join(map(str, rows[0]))}", "name two of them file and label")
    for line, row in enumerate(rows, start=2):
        label = (row["label"] or "").strip()
        if not label.isdecimal():
            raise SamplesError(f"{table} line {line}: the label {label!r} is no integer", "number the classes from 0")
        file = folder / (row["file"] or "")
        if not file.is_file():
            raise SamplesError(
                f"{table} line {line}: there is no file {row['file']!r}", f"name files relative to {folder}"
            )
        yield file, int(label)


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "optimize", "reading images") from None
    return Image


def _open_image(file: Path) -> "Image":
    pil = _pil()
    try:
        image: Image = pil.open(file)
        with image:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, pil.DecompressionBombError) as error:
        raise SamplesError(f"the image {file} cannot be decoded: {error}", "replace or remove it") from error


def _transform(preprocess: Preprocess, function: str | Preprocessor | None) -> tuple[Transform, Preprocess]:
    """What makes an image a model's input, and the ``Preprocess`` that says so."""
    if function is not None:
        chosen = (
            find_reference(function, SamplesError, "preprocess function") if isinstance(function, str) else function
        )

        def call(image: "Image", name: str) -> Any:
            with guard(SamplesError, f"the preprocess function failed on {name}"):
                return chosen(image.convert("RGB"))

        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        return call, Preprocess(function=name)
    channels = len(preprocess.mean)
    if channels not in (1, 3) or len(preprocess.std) != channels or 0 in preprocess.std:
        raise SamplesError(
            f"mean {preprocess.mean} and std {preprocess.std} do not fit",
            "give 3 numbers each for RGB or 1 for grey, std not 0",
        )
    if not 1 <= preprocess.crop <= preprocess.resize:
        raise SamplesError(
            f"crop {preprocess.crop} does not fit into resize {preprocess.resize}", "choose crop between 1 and resize"
        )
    return lambda image, name: _normalised(image, preprocess), preprocess


def image_array(image: "Image", preprocess: Preprocess) -> NDArray[np.float32]:
    """One image as a model's input, float32 (3, crop, crop), as ``read`` makes it.

    Raises ``SamplesError`` where ``preprocess`` is a function of the user's, which is not run for strangers' images.
    """
    if preprocess.function is not None:
        raise SamplesError(f"images are prepared by {preprocess.function}, which is not here", "send tensors")
    return _normalised(image, preprocess)


def _normalised(image: "Image", preprocess: Preprocess) -> NDArray[np.float32]:
    """(C, crop, crop) as torchvision's Resize, CenterCrop, ToTensor, Normalize make it of a PIL image."""
    image = image.convert("L" if len(preprocess.mean) == 1 else "RGB")
    short, crop = min(image.size), preprocess.crop
    if short != preprocess.resize:
        size = [preprocess.resize * side // short for side in image.size]
        image = image.resize((size[0], size[1]), _pil().Resampling[preprocess.interpolation.upper()])
    left, top = (round((side - crop) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32).reshape(crop, crop, -1)
    mean, std = np.array(preprocess.mean, np.float32), np.array(preprocess.std, np.float32)
    scaled = (pixels / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _read_npz(path: Path) -> dict[str, Array]:
    key = ""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                arrays[key] = archive[key]
            return arrays
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        place = f"the array {key!r} of {path}" if key else str(path)
        raise SamplesError(f"{place} cannot be read: {error}", "write numbers with numpy.savez") from error


def _read_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise SamplesError(f"{path} cannot be read: {error}", "write it with safetensors.numpy.save_file") from error


def _from_arrays(arrays: dict[str, Array], source: str, transform: Transform, preprocess: Preprocess) -> Samples:
    labels = next((arrays.pop(key) for key in LABEL_KEYS if key in arrays), None)
    groups = arrays.pop("groups", None)
    if not arrays:
        raise SamplesError(f"{source} has no inputs", "add an array beside labels and groups")
    has_images = any(_is_image(array[0]) for array in arrays.values() if array.ndim and len(array))

    def prepared(inputs: Any, name: str) -> Any:
        if isinstance(inputs, dict):
            return {key: prepared(value, f"{key} of {name}") for key, value in inputs.items()}
        if not _is_image(inputs):
            return inputs
        return transform(_pil().fromarray(inputs.squeeze(-1) if inputs.shape[2] == 1 else inputs), name)

    stacked = unstack(arrays if len(arrays) > 1 else next(iter(arrays.values())), labels, source)
    items = ((prepared(inputs, f"sample {number}"), label) for number, (inputs, label) in enumerate(stacked))
    return collect(items, groups=groups, source=source, preprocess=preprocess if has_images else None)


def _is_image(array: Array) -> bool:
    return array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] in (1, 3)
