"""Where the pixels of an image go when it becomes a model's input: sizes and places, without the pixels. Pure."""

from typing import NamedTuple

from corewise.records.report import Preprocess

LONGEST = 16
"""Ratio of the sides beyond which an image is cut before it is resized: the crop shows its middle alone."""


def decoding_scale(size: tuple[int, int], preprocess: Preprocess) -> int:
    """By how much a JPEG of that width and height is decoded smaller: as libjpeg does it without loss of time."""
    sharpness = sharpness_of(size, preprocess)
    return next((scale for scale in (8, 4, 2) if sharpness >= scale * preprocess.sharpness), 1)


def sharpness_of(size: tuple[int, int], preprocess: Preprocess) -> float:
    """Pixels a side for each pixel of the resized image."""
    return min(side / most for side, most in zip(size, resized_size(size, preprocess), strict=True))


def resized_size(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height of the whole image after it is resized; the part that is cut out may be smaller."""
    if preprocess.fit == "squash":
        return preprocess.resize, preprocess.resize
    short, long = min(size), max(size)
    if preprocess.fit == "letterbox":
        return max(1, round(preprocess.crop * size[0] / long)), max(1, round(preprocess.crop * size[1] / long))
    if preprocess.fit == "keep":
        return _kept(size, preprocess)
    return preprocess.resize * size[0] // short, preprocess.resize * size[1] // short


def _kept(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height as DETR has them (transformers, ``image_transforms.get_size_with_aspect_ratio``)."""
    short, long = min(size), max(size)
    exact: float = preprocess.resize
    if long / short * exact > preprocess.longest:
        exact = preprocess.longest * short / long
    side = round(exact)
    sides = (short, long) if side == short else (side, int(exact * long / short))
    short, long = (max(preprocess.multiple, one - one % preprocess.multiple) for one in sides)
    return (short, long) if size[0] <= size[1] else (long, short)


def input_sides(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """Width and height of the input that ``image_array`` makes of an image of that width and height."""
    return resized_size(size, preprocess) if preprocess.fit == "keep" else (preprocess.crop, preprocess.crop)


class Placement(NamedTuple):
    """Where an image lies in the input that is made of it: x of the input is ``left`` + ``across`` times its own x."""

    left: float
    top: float
    across: float
    down: float


def placement(size: tuple[int, int], preprocess: Preprocess) -> Placement:
    """Where an image of that width and height lies in the input that ``image_array`` makes of it."""
    width, height = size
    cut = (0.0, 0.0)
    if preprocess.fit == "crop":
        most = LONGEST * min(size)
        cut = (max(0, width - most) / 2, max(0, height - most) / 2)
        size = (min(width, most), min(height, most))
    resized = resized_size(size, preprocess)
    across, down = resized[0] / size[0], resized[1] / size[1]
    if preprocess.fit == "letterbox":
        left, top = ((preprocess.crop - side) // 2 for side in resized)
    elif preprocess.fit == "keep":
        left, top = 0, 0
    else:
        left, top = (-round((side - preprocess.crop) / 2) for side in resized)
    return Placement(left - cut[0] * across, top - cut[1] * down, across, down)
