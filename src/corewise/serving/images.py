"""Requests as people make them: an image as it is, and answers with names."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import msgspec
import numpy as np

from corewise.common.errors import InputError, SamplesError
from corewise.pipeline import Thresholds, detected
from corewise.pipeline.answers import activate
from corewise.records.report import Preprocess
from corewise.samples.images import LONGEST, SIZE_KEY, TooManyPixels, image_array, image_size, open_image
from corewise.serving.protocol import Asked, InferRequest, ProtocolError
from corewise.serving.served import Served

TOP, MOST = 5, 100
MOST_PIXELS = 50_000_000
MOST_IMAGES = 64
"""In one request."""
MOST_PARTS = 64
"""Of a form. Its parser takes microseconds and hundreds of bytes for each, and an empty one has ten bytes."""


class _Json(msgspec.Struct):
    """Other keys are skipped: decoded, they could take many times their bytes."""

    image: str


_decode_json = msgspec.json.Decoder(_Json).decode


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


def wrapped(body: bytes, content_type: str) -> bool:
    """Whether the body is not an image itself but contains one (``content``)."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "multipart/form-data" or (kind == "application/json" and body[:1].isascii())


def content(body: bytes, content_type: str) -> bytes:
    """The image in a body that is ``wrapped``: the file of a form, or base64 in JSON.

    A form (multipart/form-data, RFC 7578) has it in its first part with a file name, or in its only part; JSON in the
    key ``image``. Raises ``ProtocolError``.
    """
    if content_type.lower().lstrip().startswith("multipart"):
        return _file_of_form(body, content_type)
    try:
        found = _decode_json(body).image
    except msgspec.ValidationError as error:
        raise ProtocolError("the body has no image", 'send {"image": "<base64>"}') from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the body is not a JSON object: {error}") from error
    decoded = _from_base64(found.encode("utf-8", "replace"))
    if decoded is None:
        raise ProtocolError("the image is not base64", 'send {"image": "<base64>"}')
    return decoded


def _from_base64(text: bytes) -> bytes | None:
    """What base64, or a data URL of it, stands for; ``None`` for other bytes."""
    if text[:5] == b"data:":
        text = text.partition(b",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return None


def _file_of_form(body: bytes, content_type: str) -> bytes:
    from python_multipart.exceptions import MultipartParseError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise ProtocolError("the form has no boundary", "send it as curl -F image=@photo.jpg does")
    parts: list[tuple[list[bytes], list[memoryview]]] = []

    def begin() -> None:
        if len(parts) == MOST_PARTS:
            raise ProtocolError(f"the form has more than {MOST_PARTS} parts", "send one image a request", 413)
        parts.append(([], []))

    callbacks = {
        "on_part_begin": begin,
        "on_header_value": lambda data, start, end: parts[-1][0].append(bytes(data[start:end])),
        "on_part_data": lambda data, start, end: parts[-1][1].append(memoryview(data)[start:end]),
    }
    try:
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise ProtocolError(f"the form cannot be read: {error}") from error
    files = [data for headers, data in parts if b"filename" in b"".join(headers).lower()]
    chosen = files or [data for _, data in parts]
    if len(files) != 1 and len(parts) != 1:
        raise ProtocolError(f"the form has {len(files)} files", "send one image a request")
    return b"".join(chosen[0])


def contents(asked: InferRequest, served: Served) -> list[bytes]:
    """The images that a request has in place of tensors; none in others. Raises ``ProtocolError`` for too many."""
    if not served.takes_images or asked.inputs[0].dtype != object:
        return []
    found: list[bytes] = asked.inputs[0].tolist()
    if len(found) > MOST_IMAGES:
        raise ProtocolError(f"the request has {len(found)} images", f"send at most {MOST_IMAGES} a request", 413)
    return found


def unpacked(body: bytes) -> bytes:
    """The image itself, where a client of JSON sent it as base64."""
    decoded = _from_base64(body)
    return body if decoded is None else decoded


def pixels(body: bytes, served: Served, most: int = MOST_PIXELS) -> int:
    """How many pixels of an image are decoded, by its header, with those that it is resized to.

    Raises ``ProtocolError`` where it is not an image, has too many pixels, or the model takes no images.
    """
    preprocess = _preprocess(served)
    with _told():
        width, height = image_size(body, "the image", max_pixels=most, preprocess=preprocess)
    shorter, resize = min(width, height), max(preprocess.resize, preprocess.crop)
    resized = [min(resize * side // shorter, LONGEST * resize) for side in (width, height)]
    count = max(width * height, resized[0] * resized[1])
    if count > most:
        raise ProtocolError(f"the image has {count} pixels when it is resized", "send one of another shape", 413)
    return count


class Batch(NamedTuple):
    """Images as the model takes them, and the width and height of each, upright."""

    array: np.ndarray
    """float32 (N, C, H, W), or uint8 (N, H, W, C)."""
    sizes: tuple[tuple[int, int], ...]


def request(inputs: np.ndarray, served: Served) -> InferRequest:
    """A request for all outputs."""
    return InferRequest(inputs=(inputs,), outputs=tuple(Asked(name=spec.name) for spec in served.outputs))


def batch(bodies: Sequence[bytes], served: Served) -> Batch:
    """Images as the model takes them. Raises ``ProtocolError`` as ``pixels`` does."""
    preprocess = _preprocess(served)
    arrays, sizes = [], []
    with _told():
        for one in bodies:
            opened = open_image(one, "the image", max_pixels=MOST_PIXELS, preprocess=preprocess)
            arrays.append(image_array(opened, preprocess))
            sizes.append(opened.info[SIZE_KEY])
    if served.photos is not None and not all(served.photos.takes(array.shape) for array in arrays):
        raise ProtocolError(f"the model takes photos that become {served.photos.shape}", "send one of that shape", 415)
    if len({array.shape for array in arrays}) > 1:
        raise ProtocolError("the images have several shapes, which the model keeps", "send one image a request")
    return Batch(np.stack(arrays), tuple(sizes))


def _preprocess(served: Served) -> Preprocess:
    preprocess = served.manifest.preprocess
    if preprocess is None:
        raise ProtocolError(f"the model {served.name} was not made from images", "send tensors to .../infer", 501)
    if preprocess.function is not None:
        raise ProtocolError(
            f"the images of the model {served.name} are prepared by {preprocess.function}, which is code and not here",
            "send tensors to .../infer",
            501,
        )
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


def row_bytes(served: Served) -> int:
    """What an image becomes, as the model takes it. Raises ``ProtocolError`` as ``pixels``."""
    preprocess = _preprocess(served)
    sides = preprocess.resize * preprocess.longest if preprocess.fit == "keep" else preprocess.crop**2
    return sides * len(preprocess.mean) * np.dtype(preprocess.dtype).itemsize


def check_classes(served: Served) -> None:
    """Raise ``ProtocolError`` for a detector, before its image is read."""
    if served.image_call == "detect":
        raise ProtocolError(f"the model {served.name} does not give class scores", "send images to .../detect", 501)


def classes(scores: np.ndarray, served: Served, top: int) -> list[dict[str, Any]]:
    """The highest scores of one row, with their classes' names where the artifact has them."""
    if scores.ndim != 1:
        raise ProtocolError(f"the model {served.name} does not give class scores", "send tensors to .../infer", 501)
    labels = served.manifest.labels or ()
    probabilities = activate(scores, served.photos.activation) if served.photos is not None else scores
    found: list[dict[str, Any]] = []
    for k in np.argsort(-scores, kind="stable")[:top].tolist():
        score = float(scores[k])
        found.append({"class": k, "score": score if isfinite(score) else None})
        if served.photos is not None and isfinite(probability := float(probabilities[k])):
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
