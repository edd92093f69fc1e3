"""Requests as people make them: an image as it is, and answers with names."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np

from corewise.common.errors import SamplesError
from corewise.records.report import Preprocess
from corewise.samples.images import LONGEST, TooManyPixels, image_array, image_size, open_image
from corewise.serving.protocol import Asked, InferRequest, ProtocolError
from corewise.serving.served import Served

TOP, MOST = 5, 100
MOST_PIXELS = 50_000_000


def how_many(text: str | None) -> int:
    """The query's ``top``. Raises ``ProtocolError``."""
    if text is None:
        return TOP
    if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MOST):
        raise ProtocolError(f"top is no number from 1 to {MOST}")
    return int(text)


def pixels(body: bytes, served: Served, most: int = MOST_PIXELS) -> int:
    """How many pixels of an image are decoded, by its header, with those that it is resized to.

    Raises ``ProtocolError`` where it is not an image, has too many pixels, or the model takes no images.
    """
    preprocess = _preprocess(served)
    with _told():
        width, height = image_size(body, "the body", max_pixels=most, preprocess=preprocess)
    shorter, resize = min(width, height), max(preprocess.resize, preprocess.crop)
    resized = [min(resize * side // shorter, LONGEST * resize) for side in (width, height)]
    count = max(width * height, resized[0] * resized[1])
    if count > most:
        raise ProtocolError(f"the image has {count} pixels when it is resized", "send one of another shape", 413)
    return count


def image(body: bytes, served: Served) -> InferRequest:
    """One image as the model takes it. Raises ``ProtocolError`` as ``pixels`` does."""
    preprocess = _preprocess(served)
    with _told():
        array = image_array(open_image(body, "the body", max_pixels=MOST_PIXELS, preprocess=preprocess), preprocess)
    asked = tuple(Asked(name=spec.name) for spec in served.outputs)
    return InferRequest(inputs=(np.ascontiguousarray(array[None]),), outputs=asked)


def _preprocess(served: Served) -> Preprocess:
    preprocess = served.manifest.preprocess
    if preprocess is None:
        raise ProtocolError(f"the model {served.name} was not made from images", "send tensors to .../infer", 501)
    return preprocess


@contextmanager
def _told() -> Iterator[None]:
    """Errors of reading an image as errors of the request."""
    try:
        yield
    except TooManyPixels as error:
        raise ProtocolError(error.what, "send a smaller one", 413) from error
    except SamplesError as error:
        raise ProtocolError(error.what, error.fix, 415) from error


def classes(scores: np.ndarray, served: Served, top: int) -> list[dict[str, Any]]:
    """The highest scores of one row, with their classes' names where the artifact has them."""
    if scores.ndim != 1:
        raise ProtocolError(f"the model {served.name} gives no scores of classes", "send tensors to .../infer", 501)
    labels = served.manifest.labels or ()
    found: list[dict[str, Any]] = []
    for k in np.argsort(-scores, kind="stable")[:top].tolist():
        score = float(scores[k])
        found.append({"class": k, "score": score if isfinite(score) else None})
        if k < len(labels):
            found[-1]["label"] = labels[k]
    return found
