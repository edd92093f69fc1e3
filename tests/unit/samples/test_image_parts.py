"""Images that consist of very many parts, of which each costs time, however few bytes and pixels they have."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from corewise.common.errors import SamplesError
from corewise.samples.image_files import image_size, open_image
from corewise.samples.image_limits import MOST_STEPS


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*, before=b"", data=None, after=b""):
    """One of 1 x 1 pixels with more chunks before its pixels, or after them."""
    pixels = chunk(b"IDAT", zlib.compress(b"\0\7")) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND")


TINY = chunk(b"xxXx")
XPM = b"/* XPM */\n" + b"\n" * (2 * MOST_STEPS)


@pytest.mark.parametrize("content", [png(before=TINY * MOST_STEPS), XPM], ids=["png", "xpm"])
def test_a_header_in_too_many_parts_is_none(content):
    for read in (image_size, open_image):
        with pytest.raises(SamplesError, match="too many parts"):
            read(content, "the image", max_pixels=100)


@pytest.mark.parametrize("where", ["before", "after"])
def test_what_is_decoded_is_read_in_so_many_parts_for_its_bytes(where):
    few, many = (png(**{where: TINY * count}) for count in (MOST_STEPS // 8, 2 * MOST_STEPS))
    assert np.asarray(open_image(few, "the image", max_pixels=100)).tolist() == [[7]]
    with pytest.raises(SamplesError, match="too many parts"):
        open_image(many, "the image", max_pixels=100)


def test_photos_as_they_come_have_few_parts():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"):
        buffer = io.BytesIO()
        photo.save(buffer, kind)
        assert image_size(buffer.getvalue(), "the image", max_pixels=10**6)[:2] == (90, 70)
        assert open_image(buffer.getvalue(), "the image", max_pixels=10**6).size == (90, 70)
