"""A file in a request, an image or a recording: as the body itself, in a form, or as base64 in JSON."""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from corewise.common.errors import SamplesError
from corewise.samples.image_limits import TooManyPixels
from corewise.serving.protocol import Asked, InferRequest, Limits, ProtocolError, not_json
from corewise.serving.served import Served

MOST_FILES = 64
"""Files in one request."""
BASE64 = re.compile(rb"[A-Za-z0-9+/_=\s-]*+")
"""In either alphabet of RFC 4648, and broken into lines."""
URL_SAFE, SPACE = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v"
FILE_NAME = re.compile(rb';\s*filename\*?\s*=\s*"?([^";\n]*)', re.IGNORECASE)
"""In the headers of a part of a form that is a file; a field may be called ``filename``, too."""
MOST_PARTS = 64
"""Parts of a form. Its parser takes microseconds and hundreds of bytes for each, and an empty one has ten bytes."""


class _Json(msgspec.Struct):
    """Other keys are skipped: decoded, they could take many times their bytes."""

    image: str | None = None
    audio: str | None = None


class Work(NamedTuple):
    """What decoding a file takes, by its header."""

    size: int
    """Pixels, or frames times channels."""
    decoding_bytes: int
    """Memory while it is decoded."""
    made_bytes: int
    """What it becomes, as the model takes it."""


class Batch(NamedTuple):
    """Files as the model takes them."""

    array: np.ndarray
    """Images float32 (N, C, H, W), or uint8 (N, H, W, C); recordings float32 (N, frames), or (N, 1, frames)."""
    sizes: tuple[tuple[int, int], ...]
    """The width and height of each image, upright; 0 of recordings."""


class Media(Protocol):
    """What the modules ``images`` and ``recordings`` do for their files."""

    KIND: str
    """What ``Work.size`` counts."""
    NOUN: str

    def work(self, body: bytes, name: str, served: Served, limits: Limits) -> Work:
        """What a file takes, which messages call ``name``.

        Raises ``ProtocolError`` where it is none, or too large, or the model takes none.
        """

    def batch(self, bodies: Sequence[bytes], served: Served) -> Batch:
        """Decode files. Raises ``ProtocolError`` as ``work`` does."""


_decode_json = msgspec.json.Decoder(_Json).decode


def wrapped(body: bytes, content_type: str) -> bool:
    """Whether the body is not a file itself but contains one (``content``)."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "multipart/form-data" or (kind == "application/json" and body[:1].isascii())


def content(body: bytes, content_type: str, key: str) -> bytes:
    """The file in a body that is ``wrapped``: that of a form, or base64 in JSON.

    A form (multipart/form-data, RFC 7578) has it in its first part with a file name, or in its only part; JSON in
    ``key``, which is ``image`` or ``audio``. Raises ``ProtocolError``.
    """
    if content_type.lower().lstrip().startswith("multipart"):
        return _file_of_form(body, content_type)
    fix = f'send {{"{key}": "<base64>"}}'
    try:
        found: str | None = getattr(_decode_json(body), key)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the body has no {key}", fix) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the body is not a JSON object: {not_json(error, body)}") from error
    if found is None:
        raise ProtocolError(f"the body has no {key}", fix)
    decoded = _from_base64(found.encode("utf-8", "replace"))
    if decoded is None:
        raise ProtocolError(f"the {key} is not base64", fix)
    return decoded


def _from_base64(text: bytes) -> bytes | None:
    """What base64, or a data URL of it, stands for; ``None`` for other bytes.

    It may have line breaks, as ``base64`` and MIME write it, the alphabet for URLs, and no padding.
    """
    if text[:5] == b"data:":
        text = text.partition(b",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        pass
    if not BASE64.fullmatch(text):
        return None
    text = text.translate(URL_SAFE, SPACE).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def _file_of_form(body: bytes, content_type: str) -> bytes:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise ProtocolError("the form has no boundary", "send it as curl -F file=@NAME does")
    parts: list[tuple[list[bytes], list[memoryview]]] = []

    def begin() -> None:
        if len(parts) == MOST_PARTS:
            raise ProtocolError(f"the form has more than {MOST_PARTS} parts", "send one file per request", 413)
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
    except FormParserError as error:
        raise ProtocolError(f"the form cannot be read: {error}") from error
    named = [(FILE_NAME.search(b"\n".join(headers)), data) for headers, data in parts]
    # Of a field for a file that was not chosen, browsers send an empty part without a name.
    files = [data for found, data in named if found is not None and (found[1] or data)]
    chosen = files or [data for _, data in parts]
    if len(files) != 1 and len(parts) != 1:
        raise ProtocolError(f"the form has {len(files)} files", "send one file per request")
    return b"".join(chosen[0])


def contents(asked: InferRequest, served: Served, noun: str) -> list[bytes]:
    """The files that a request has in place of tensors; none in others. Raises ``ProtocolError`` for too many."""
    if not served.takes_files or asked.inputs[0].dtype != object:
        return []
    found: list[bytes] = asked.inputs[0].tolist()
    if len(found) > MOST_FILES:
        raise ProtocolError(f"the request has {len(found)} {noun}s", f"send at most {MOST_FILES} per request", 413)
    return found


def unpacked(body: bytes) -> bytes:
    """The file itself, where a client of JSON sent it as base64."""
    # What base64 writes with a P in front begins with one of <=>?, as no image and no recording does. PNM does begin
    # with a P, and the rest may be digits.
    decoded = None if body[:1] == b"P" else _from_base64(body)
    return body if decoded is None else decoded


def file_name(noun: str, number: int, count: int) -> str:
    """What messages call a file of a request of ``count`` files, numbered from 0."""
    return f"the {noun}" if count == 1 else f"{noun} {number}"


def request(inputs: np.ndarray, served: Served) -> InferRequest:
    """A request for all outputs."""
    return InferRequest(inputs=(inputs,), outputs=tuple(Asked(name=spec.name) for spec in served.outputs))


@contextmanager
def told() -> Iterator[None]:
    """Errors of reading a file as errors of the request."""
    try:
        yield
    except TooManyPixels as error:
        raise ProtocolError(error.what, "send a smaller one", 413) from error
    except SamplesError as error:
        raise ProtocolError(error.what, error.fix, 415) from error
