"""Decoded images as a model takes them: resized, cropped and normalized.

``image_files`` decodes, and ``image_geometry`` says how large things become.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import SamplesError
from corewise.common.references import find_reference, guard, reference_to
from corewise.records.report import Preprocess
from corewise.samples.image_files import DIM_KEY, SIZE_KEY, decoded, in_mode, is_image, is_pil, open_image, pillow
from corewise.samples.image_geometry import LONGEST, resized_size

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocessor = Callable[["Image"], Any]


def image_array(image: "Image", preprocess: Preprocess) -> NDArray[Any]:
    """One image as a model's input.

    As torchvision's Resize, CenterCrop, ToTensor and Normalize make it of a PIL image.

    Args:
        image: What ``open_image`` returned, or another PIL image.
        preprocess: How it is resized, cropped and normalised.

    Returns:
        float32 (C, crop, crop) of as many channels as ``preprocess.mean`` has; uint8 (crop, crop, C), not normalised,
        where ``preprocess.dtype`` says so. Where ``preprocess.fit`` is ``keep``, of the image's own shape.

    Raises:
        SamplesError: Where ``preprocess`` is a function of the user's, which is not run for strangers' images.
    """
    if preprocess.function is not None:
        raise SamplesError(f"images are prepared by {preprocess.function}, which is not available", "send tensors")
    image = in_mode(image, "L" if len(preprocess.mean) == 1 else "RGB")
    if preprocess.fit == "crop":
        image = _without_far_ends(image)
    if preprocess.fit == "letterbox":
        image = _boxed(image, preprocess)
    elif preprocess.fit == "keep":
        image = image.resize(resized_size(image.size, preprocess), _method(preprocess))
    else:
        image = _resized_middle(image, preprocess)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if preprocess.bgr:
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(pixels) if preprocess.dtype == "uint8" else normalize_pixels(pixels, preprocess)


def normalize_pixels(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Pixels, uint8 (..., H, W, C), as float32 (..., C, H, W), normalised."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32)
    planes /= np.float32(255)
    planes -= mean
    planes /= std
    return planes


def restore_pixels(planes: NDArray[np.float32], preprocess: Preprocess) -> NDArray[np.uint8] | None:
    """The pixels of which ``normalize_pixels`` made ``planes``; ``None`` where it did not make them.

    Example:
        >>> pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        >>> bool((restore_pixels(normalize_pixels(pixels, Preprocess()), Preprocess()) == pixels).all())
        True
    """
    if planes.dtype != np.float32 or planes.ndim < 3 or planes.shape[-3] != len(preprocess.mean):
        return None
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    levels = np.rint((planes * std + mean) * 255)
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 255):
        return None
    pixels = np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), -3, -1))
    return pixels if np.array_equal(normalize_pixels(pixels, preprocess), planes) else None


def _resized_middle(image: "Image", preprocess: Preprocess) -> "Image":
    """The middle of the resized image; only what it shows is computed, which some values round differently."""
    crop, (width, height) = preprocess.crop, resized_size(image.size, preprocess)
    method = _method(preprocess)
    if (width, height) == image.size:
        return _centre(image, crop, crop)
    if preprocess.interpolation == "nearest":  # rounding would choose other pixels
        return _centre(image.resize((width, height), method), crop, crop)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + crop) * across, (top + crop) * down)
    inside = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return image.resize((crop, crop), method, inside)


def _boxed(image: "Image", preprocess: Preprocess) -> "Image":
    """The whole image in the middle of a grey square."""
    width, height = resized_size(image.size, preprocess)
    square = pillow().new(image.mode, (preprocess.crop, preprocess.crop), (preprocess.fill,) * len(image.getbands()))
    small = image.resize((width, height), _method(preprocess))
    square.paste(small, ((preprocess.crop - width) // 2, (preprocess.crop - height) // 2))
    return square  # type: ignore[no-any-return]


def _method(preprocess: Preprocess) -> Any:
    """Pillow's name for how to resize."""
    return pillow().Resampling[preprocess.interpolation.upper()]


class ImageReader:
    """Makes inputs of images: paths, bytes, PIL images, uint8 arrays, and dicts of inputs with such arrays.

    ``function`` is the user's own: it, or a reference to it, takes an RGB PIL image and returns the input. ``dim``
    names images that came out almost black.
    """

    def __init__(self, preprocess: Preprocess, function: str | Preprocessor | None = None) -> None:
        """Raises ``SamplesError`` where the numbers do not fit each other, or there is no such function."""
        self.dim: list[str] = []
        self.preprocess = preprocess
        self._function: Preprocessor | None = None
        if function is None:
            _check(preprocess)
            return
        chosen = (
            find_reference(function, SamplesError, "preprocess function") if isinstance(function, str) else function
        )
        name = function if isinstance(function, str) else reference_to(function)
        self._function = chosen
        self.preprocess = Preprocess(function=name)

    def sized(self, item: Any) -> tuple[Any, tuple[int, int]]:
        """The input that is made of one image, and the width and height of the whole image, upright."""
        if isinstance(item, Path | bytes):
            opened = open_image(item, preprocess=self.preprocess)
            return self._input(opened, f"{item}" if isinstance(item, Path) else "an image"), opened.info[SIZE_KEY]
        upright = decoded(item)
        return self._input(upright, "an image"), upright.size

    def __call__(self, item: Any) -> Any:
        """One sample's inputs."""
        if isinstance(item, dict):
            return {name: self(value) for name, value in item.items()}
        if isinstance(item, Path | bytes):
            opened = open_image(item, preprocess=self.preprocess)
            return self._input(opened, f"{item}" if isinstance(item, Path) else "an image")
        return self._input(decoded(item), "an image") if is_image(item) or is_pil(item) else item

    def _input(self, image: "Image", name: str) -> Any:
        if image.info.get(DIM_KEY):
            self.dim.append(name)
        if self._function is None:
            return image_array(image, self.preprocess)
        with guard(SamplesError, f"the preprocess function failed on {name}"):
            return self._function(image.convert("RGB"))

    @property
    def threads_allowed(self) -> bool:
        """Whether several threads may call it: a user's function need not stand that."""
        return self._function is None

    def notes(self) -> tuple[str, ...]:
        """A sentence for the report about images that come out almost black."""
        if not self.dim:
            return ()
        return (
            f"{len(self.dim):,} images of 16 bits use 12 of them at most and become almost black: scale them in a "
            "preprocess function",
        )


def _without_far_ends(image: "Image") -> "Image":
    """The middle of a very long image; resized as a whole it would be millions of pixels long."""
    most = LONGEST * min(image.size)
    return image if max(image.size) <= most else _centre(image, min(image.width, most), min(image.height, most))


def _centre(image: "Image", width: int, height: int) -> "Image":
    """The middle of an image, rounded as torchvision does."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _check(preprocess: Preprocess) -> None:
    channels = len(preprocess.mean)
    if channels not in (1, 3) or len(preprocess.std) != channels or 0 in preprocess.std:
        raise SamplesError(
            f"mean {preprocess.mean} and std {preprocess.std} do not fit",
            "give 3 numbers each for RGB or 1 for grey, std not 0",
        )
    if preprocess.crop < 1 or (preprocess.crop > preprocess.resize and preprocess.fit in ("crop", "squash")):
        raise SamplesError(
            f"crop {preprocess.crop} does not fit into resize {preprocess.resize}", "choose crop between 1 and resize"
        )
