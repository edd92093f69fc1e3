"""Requests as people make them: an image as it is, and answers with names."""

from math import isfinite
from typing import Any

import numpy as np

from corewise.common.errors import SamplesError
from corewise.samples.images import TooManyPixels, image_array, open_image
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


def image(body: bytes, served: Served) -> InferRequest:
    """One image as the model takes it. Raises ``ProtocolError`` where it is none, or the model takes no images."""
    preprocess = served.manifest.preprocess
    if preprocess is None:
        raise ProtocolError(f"the model {served.name} was not made from images", "send tensors to .../infer", 501)
    try:
        array = image_array(open_image(body, "the body", max_pixels=MOST_PIXELS), preprocess)
    except TooManyPixels as error:
        raise ProtocolError(error.what, "send a smaller one", 413) from error
    except SamplesError as error:
        raise ProtocolError(error.what, error.fix, 415) from error
    asked = tuple(Asked(name=spec.name) for spec in served.outputs)
    return InferRequest(inputs=(np.ascontiguousarray(array[None]),), outputs=asked)


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
