"""What decoding an image takes, found out before it is decoded: files may be made to take long, or to take memory.

Pillow limits the pixels that a header claims. It does not limit the parts of a header, each of which it keeps; the
passes over a JPEG's pixels; the size of a TIFF's tiles; and how long its decoders in Python may take.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from corewise.samples.raw import UnreadableItem

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_STEPS = 4096
"""Reads from a file until its size is known. Pillow keeps every part of a header, joins comments block by block, and
has no limit for either; photos with large profiles take a few hundred."""
STEP_BYTES = 256
"""From then on a stranger's image is read in one more step for this many bytes: parts may come after its pixels."""
MOST_SCANS, MOST_SEGMENTS = 100, 1000
"""Passes over the pixels, and segments, of a JPEG that comes in several passes: encoders write about ten, and each
decodes the whole image again for as little as a few bytes."""
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
"""The next one in a JPEG that is not within the data of a scan."""
SCAN, END, ALONE = 0xDA, 0xD9, (0xD8, 0x01)
"""Kinds of a JPEG's parts; the last have no content."""
COEFFICIENT_BYTES = 2
SLOW = 50
"""A pixel that Pillow decodes in Python (QOI, PPM of odd depths, compressed BMP) takes as long as this many others."""
MOST_TILE_PIXELS = 2**22
"""Pixels of a TIFF's tile that is larger than the image: all of it is decoded."""
TILE_WIDTH, TILE_HEIGHT = 322, 323
"""The tags of a TIFF."""
MOST_TAGS = 2**16
"""Entries of a TIFF's directory: their number has two bytes, and in a BigTIFF nobody needs more."""
NUMBERS = {1: "B", 3: "H", 16: "Q"}
"""How ``struct`` reads the types of a TIFF; those that are not listed have four bytes."""


class TooManyPixels(UnreadableItem):
    """The image is larger than the caller takes."""


class TooManyParts(Exception):
    """An image is read in more steps than it may take. No error that Pillow takes for one of its own."""


class _Stepwise:
    """A file that is read in ``MOST_STEPS`` steps at most."""

    steps_left = MOST_STEPS

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        self._step()
        content: bytes = super().read(size)  # type: ignore[misc]
        return content

    def readline(self, size: int | None = -1, /) -> bytes:
        """The same."""
        self._step()
        content: bytes = super().readline(size)  # type: ignore[misc]
        return content

    def _step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise TooManyParts


class Content(_Stepwise, io.BytesIO):
    """An image's content, as the file that Pillow opens."""


class File(_Stepwise, io.BufferedReader):
    """The same on disk; given a ``io.FileIO``."""


def check_pixels(image: "Image", name: str, max_pixels: int | None) -> None:
    """Raise ``TooManyPixels`` for an image that takes more than ``max_pixels``, or much more than it says."""
    width, height = image.size
    if image.format == "TIFF":
        across, down = _tile(image)
        if across * down > max(MOST_TILE_PIXELS, width * height):
            raise TooManyPixels(name, f"has tiles of {across}x{down} pixels, more than the image")
    if max_pixels is None:
        return
    if width * height > max_pixels:
        raise TooManyPixels(name, f"has {width}x{height} pixels, over {max_pixels:,}")
    if is_slow(image) and width * height > max_pixels // SLOW:
        most = max_pixels // SLOW
        raise TooManyPixels(name, f"has {width}x{height} pixels that take long to decode, over {most:,}")


def is_slow(image: "Image") -> bool:
    """Whether Pillow decodes it in Python, which reads it in many steps."""
    from PIL import Image as pil

    return any(part[0] in pil.DECODERS for part in image.tile)  # type: ignore[attr-defined]


def _tile(image: "Image") -> tuple[int, int]:
    """Width and height of the tiles of a TIFF, 0 without any.

    Read from its first directory: of a tag that is there twice, libtiff takes the first value and Pillow the last.
    """
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    head = file.read(16)
    order, is_big = "<" if head[:2] == b"II" else ">", 43 in head[2:4]
    place, entry_bytes, value = (8, 20, 12) if is_big else (4, 12, 8)
    (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", head, place)
    file.seek(start)
    count_bytes = 8 if is_big else 2
    count = int.from_bytes(file.read(count_bytes), "little" if order == "<" else "big")
    entries = file.read(entry_bytes * min(count, MOST_TAGS))
    sides = {TILE_WIDTH: 0, TILE_HEIGHT: 0}
    for entry in range(0, len(entries) - entry_bytes + 1, entry_bytes):
        tag, kind = struct.unpack_from(f"{order}HH", entries, entry)
        if tag in sides:
            (side,) = struct.unpack_from(f"{order}{NUMBERS.get(kind, 'I')}", entries, entry + value)
            sides[tag] = max(sides[tag], side)
    return sides[TILE_WIDTH], sides[TILE_HEIGHT]


def check_scans(image: "Image", name: str) -> None:
    """Raise ``UnreadableItem`` for a JPEG of more passes than any encoder writes."""
    if not has_passes(image):
        return
    file: Any = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    scans = 0
    for number, (kind, _) in enumerate(_segments(file.read())):
        scans += kind == SCAN
        if scans > MOST_SCANS or number > MOST_SEGMENTS:
            raise UnreadableItem(name, f"has over {MOST_SCANS} scans, which no encoder writes")


def has_passes(image: "Image") -> bool:
    """Whether it is a JPEG whose pixels come in several scans, until the last of which all coefficients are kept."""
    if image.format not in ("JPEG", "MPO") or "progressive" in image.info:
        return image.format in ("JPEG", "MPO")
    file: Any = image.fp  # type: ignore[attr-defined]
    layers: int = image.layers  # type: ignore[attr-defined]
    if image.format == "MPO":
        file.seek(0)
        content = file.read()
        return next((content[place + 2] < layers for kind, place in _segments(content) if kind == SCAN), False)
    # Pillow has just read the header of the first scan; the only one has all layers.
    end, length = file.tell(), 8 + 2 * layers
    file.seek(max(0, end - length))
    return not file.read(length).startswith(bytes([0xFF, SCAN, 0, length - 2, layers]))


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The parts of a JPEG until its end, behind which phones put videos: the kind and the place behind it."""
    place = 0
    while (found := MARKER.search(content, place)) is not None and (kind := found[1][0]) != END:
        place = found.end()
        yield kind, place
        if kind not in ALONE:
            place += int.from_bytes(content[place : place + 2])
