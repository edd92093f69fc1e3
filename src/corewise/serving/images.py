"""Images as they are: what they are decoded to, and answers with names."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from corewise.common.errors import InputError
from corewise.pipeline import Thresholds, detected
from corewise.pipeline.answers import activate
from corewise.records.report import Preprocess
from corewise.samples.image_files import SIZE_KEY, image_size, open_image
from corewise.samples.image_geometry import LONGEST
from corewise.samples.images import image_array
from corewise.serving.files import Batch, Work, file_name, told
from corewise.serving.memory_limit import PIXEL_BYTES, most_decoding_bytes
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.served import Served

KIND, NOUN = "pixels", "image"
TOP, MOST = 5, 100
MOST_PIXELS = 50_000_000


def how_many(text: str | None) -> int:
    """The query's ``top``. Raises ``ProtocolError``."""
    if text is None:
        return TOP
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MOST):
        raise ProtocolError(f"top is not a number from 1 to {MOST}")
    return int(text)


def thresholds(score: str | None, iou: str | None, served: Served) -> Thresholds:
    """The query's ``score_threshold`` and ``iou_threshold``.

    Raises ``ProtocolError`` for what is no share, and for a model that is no detector.
    """
    _preprocess(served)
    if served.photos is None or served.photos.head is None:
        raise ProtocolError(f"the model {served.name} gives no boxes", "send images to .../classify", 501)
    try:
        given = [None if text is None else float(text) for text in (score, iou)]
        return Thresholds.of(served.photos.head, *given)
    except ValueError as error:
        raise ProtocolError("score_threshold or iou_threshold is not a number", "give a number from 0 to 1") from error
    except InputError as error:
        raise ProtocolError(error.what, error.fix) from error


def work(body: bytes, name: str, served: Served, limits: Limits) -> Work:
    """What the pixels of an image take, by its header, with those that it is resized to.

    Raises ``ProtocolError`` where it is not an image, has too many pixels, or the model takes no images.
    """
    preprocess, most = _preprocess(served), limits.pixels
    with told():
        width, height, kept_bytes = image_size(body, name, max_pixels=most, preprocess=preprocess)
    shorter, resize = min(width, height), max(preprocess.resize, preprocess.crop)
    resized = [min(resize * side // shorter, LONGEST * resize) for side in (width, height)]
    count = max(width * height, resized[0] * resized[1])
    if count > most:
        raise ProtocolError(f"{name} has {count:,} pixels when it is resized", "send one of another shape", 413)
    needed_bytes, most_bytes = count * PIXEL_BYTES + kept_bytes, most_decoding_bytes(limits)
    if needed_bytes > most_bytes:
        what = f"{name} takes {needed_bytes:,} bytes to decode, the server has {most_bytes:,} for it"
        raise ProtocolError(what, "send it smaller, or as a JPEG that is not progressive", 413)
    return Work(count, needed_bytes, _row_bytes(preprocess))


def batch(bodies: Sequence[bytes], served: Served) -> Batch:
    """Images as the model takes them. Raises ``ProtocolError`` as ``work`` does."""
    preprocess = _preprocess(served)
    arrays, sizes = [], []
    with told():
        for number, one in enumerate(bodies):
            name = file_name(NOUN, number, len(bodies))
            opened = open_image(one, name, max_pixels=MOST_PIXELS, preprocess=preprocess)
            arrays.append(image_array(opened, preprocess))
            sizes.append(opened.info[SIZE_KEY])
    if served.photos is not None and not all(served.photos.takes(array.shape) for array in arrays):
        raise ProtocolError(
            f"the model takes photos of shape {served.photos.shape} when prepared", "send one of that shape", 415
        )
    if len({array.shape for array in arrays}) > 1:
        raise ProtocolError("the images differ in shape when prepared", "send one image per request")
    return Batch(np.stack(arrays), tuple(sizes))


def _preprocess(served: Served) -> Preprocess:
    preprocess = served.manifest.preprocess
    if preprocess is None:
        raise ProtocolError(f"the model {served.name} was not made from images", "send tensors to .../infer", 501)
    if preprocess.function is not None:
        raise ProtocolError(
            f"the images of the model {served.name} are prepared by {preprocess.function}, code that is not here",
            "send tensors to .../infer",
            501,
        )
    return preprocess


def check_classes(served: Served) -> None:
    """Raise ``ProtocolError`` for a detector, before its image is read."""
    if served.file_call == "detect":
        raise ProtocolError(f"the model {served.name} does not give class scores", "send images to .../detect", 501)


def classes(scores: np.ndarray, served: Served, top: int) -> list[dict[str, Any]]:
    """The highest scores of one row, with their classes' names where the artifact has them."""
    if scores.ndim != 1:
        raise ProtocolError(f"the model {served.name} does not give class scores", "send tensors to .../infer", 501)
    labels = served.manifest.labels or ()
    probabilities = scores if served.media is None else activate(scores, served.media.activation)
    found: list[dict[str, Any]] = []
    for k in np.argsort(-scores, kind="stable")[:top].tolist():
        score = float(scores[k])
        found.append({"class": k, "score": score if isfinite(score) else None})
        if served.media is not None and isfinite(probability := float(probabilities[k])):
            found[-1]["probability"] = probability
        if k < len(labels):
            found[-1]["label"] = labels[k]
    return found


def objects(
    outputs: Sequence[np.ndarray], served: Served, size: tuple[int, int], asked: Thresholds
) -> list[dict[str, Any]]:
    """What is in one image of that width and height, the surest first, with boxes in its pixels."""
    assert served.photos is not None
    (found,) = detected(served.photos, [array[:1] for array in outputs], [size], asked)
    return [
        {"class": one.number, "label": one.label, "score": one.score, "box": [round(side, 2) for side in one.box]}
        for one in found
    ]


def _row_bytes(preprocess: Preprocess) -> int:
    """What an image becomes, as the model takes it."""
    sides = preprocess.resize * preprocess.longest if preprocess.fit == "keep" else preprocess.crop**2
    return sides * len(preprocess.mean) * np.dtype(preprocess.dtype).itemsize
