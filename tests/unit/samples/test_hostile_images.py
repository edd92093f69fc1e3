"""samples.image_limits: files that are made to take long or to take memory, and photos that other tools damaged."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from corewise.common.errors import SamplesError
from corewise.records.report import Preprocess
from corewise.samples import UnreadableItem, archives, folders, images
from corewise.samples.image_limits import TooManyPixels
from corewise.samples.images import ImageReader, image_size, normalize_image, open_image

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
TINY = Preprocess(resize=8, crop=8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF data of tags, types, counts and values of 4 bytes."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    head = struct.pack("<2sHI", b"II", 42, 8)
    return b"Exif\0\0" + head + struct.pack("<H", len(entries)) + packed + struct.pack("<I", 0)


ON_ITS_SIDE = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "odd",
    [
        (0x011A, 2, 4, b"abc\0"),  # a resolution that is text
        (0x0100, 2, 4, b"abc\0"),  # a width that is text
        (0x0128, 8, 1, struct.pack("<hh", -3, 0)),  # a unit below 0
    ],
)
def test_a_photo_is_turned_whatever_its_other_exif_data_is(tmp_path: Path, odd: tuple[int, int, int, bytes]) -> None:
    content = encoded(PHOTO, "JPEG", quality=100, subsampling=0, exif=exif(ON_ITS_SIDE, odd))
    with pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    upright = np.asarray(PHOTO.transpose(Image.Transpose.ROTATE_270), np.int16)
    for image in (open_image(content), normalize_image(Image.open(io.BytesIO(content)))):
        assert np.abs(np.asarray(image, np.int16) - upright).mean() < 4
    assert image_size(content, "it")[:2] == PHOTO.size  # as it is stored
    (tmp_path / "a.jpg").write_bytes(content)
    assert ImageReader(TINY).sized(tmp_path / "a.jpg")[1] == (48, 64)


def test_a_function_that_turns_photos_itself_does_not_turn_them_twice() -> None:
    def function(image: Image.Image) -> Any:
        return np.asarray(ImageOps.exif_transpose(image))

    content = encoded(PHOTO, "JPEG", quality=100, exif=exif(ON_ITS_SIDE))
    assert ImageReader(TINY, function)(content).shape == (64, 48, 3)


def jpeg_of_many_parts() -> bytes:
    content = encoded(PHOTO, "JPEG")
    return content[:2] + b"\xff\xe5\0\2" * 100_000 + content[2:]


def png_of_many_parts() -> bytes:
    content = encoded(PHOTO, "PNG")
    part = struct.pack(">I4sI", 0, b"teSt", zlib.crc32(b"teSt"))
    return content[:33] + part * 50_000 + content[33:]


def gif_with_a_comment(blocks: int) -> bytes:
    content = encoded(PHOTO.convert("P"), "GIF")
    palette_ends = 13 + 3 * 256
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * blocks + b"\0"
    return content[:palette_ends] + comment + content[palette_ends:]


@pytest.mark.parametrize("make", [jpeg_of_many_parts, png_of_many_parts, lambda: gif_with_a_comment(40_000)])
def test_a_header_of_many_parts_is_not_read_to_its_end(tmp_path: Path, make: Callable[[], bytes]) -> None:
    """Pillow would keep each part, in 30 times the bytes of that JPEG, and copy a comment for each of its blocks."""
    path = tmp_path / "photo"
    path.write_bytes(make())
    for source in (path, path.read_bytes()):
        with pytest.raises(UnreadableItem, match="has a header of too many parts"):
            open_image(source)


def test_large_profiles_and_comments_are_no_reason_against_an_image() -> None:
    profile = np.random.default_rng(0).bytes(3_000_000)
    assert open_image(encoded(PHOTO, "JPEG", icc_profile=profile)).size == PHOTO.size
    assert open_image(encoded(PHOTO, "PNG", icc_profile=profile[:900_000])).size == PHOTO.size
    assert open_image(gif_with_a_comment(1000)).size == PHOTO.size


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last pass is there so often."""
    content = encoded(PHOTO, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(with_scans(2000))
    for source in (path, path.read_bytes()):
        with pytest.raises(UnreadableItem, match="has over 100 scans, which no encoder writes"):
            open_image(source)
    hidden = with_scans(2000).replace(b"\xff\xda", b"\xff\xfe\0\4\xff\xd9\xff\xda")  # an end in each comment
    with pytest.raises(UnreadableItem, match="has over 100 scans"):
        open_image(hidden)
    behind = encoded(PHOTO, "JPEG", progressive=True) + b"\xff\xda\0\2" * 5000  # of phones, a video
    assert open_image(with_scans(50)).size == open_image(behind).size == PHOTO.size


def test_a_jpeg_of_several_scans_keeps_its_coefficients_whatever_the_scale() -> None:
    """``of_one`` has each channel in a scan of its own, which is not called progressive."""
    large = PHOTO.resize((640, 480))
    scaled = Preprocess(resize=36, crop=32, decode="scaled")
    plain, progressive = encoded(large, "JPEG"), encoded(large, "JPEG", progressive=True)
    scan = plain.index(b"\xff\xda")
    of_one = plain[:scan] + bytes([0xFF, 0xDA, 0, 8, 1, 1, 0, 0, 63, 0]) + plain[scan + 14 :]
    several = encoded(large, "MPO", save_all=True, append_images=[large])
    in_passes = encoded(large, "MPO", save_all=True, append_images=[large], progressive=True)
    for content, kept_bytes in (
        (plain, 0),
        (several, 0),
        (encoded(large, "PNG"), 0),
        (progressive, 2 * 3 * 640 * 480),
        (of_one, 2 * 3 * 640 * 480),
        (in_passes, 2 * 3 * 640 * 480),
        (encoded(large.convert("L"), "JPEG", progressive=True), 2 * 640 * 480),
    ):
        size = image_size(content, "it", preprocess=scaled)
        assert size.kept_bytes == kept_bytes
        assert size.width == (640 if content[1:4] == b"PNG" else 160)


def tiff(side: int, tile: int, *also: tuple[int, int]) -> bytes:
    """A grey square in a single tile, which is larger; ``also`` are further tags."""
    data = zlib.compress(bytes(tile * tile), 1)
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), *also]
    tags += [(324, 8 + 2 + 12 * (len(tags) + 2) + 4), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + data


def test_a_tile_that_is_much_larger_than_its_image_is_not_decoded() -> None:
    assert open_image(tiff(16, 512)).size == (16, 16)
    for work in (open_image, lambda content: image_size(content, "it")):
        with pytest.raises(TooManyPixels, match="has tiles of 3000x3000 pixels, more than the image"):
            work(tiff(16, 3000))
        with pytest.raises(TooManyPixels, match="has tiles of 3000x3000 pixels"):
            work(tiff(16, 3000, (322, 16), (323, 16)))  # Pillow takes the last value of a tag, libtiff the first


def test_what_pillow_decodes_in_python_may_have_fewer_pixels_where_they_are_limited() -> None:
    width, height = PHOTO.size
    deep = b"P5 %d %d 254\n" % PHOTO.size + bytes(width * height)
    for slow in (encoded(PHOTO, "QOI"), deep):
        assert open_image(slow, max_pixels=50 * width * height).size == PHOTO.size
        with pytest.raises(TooManyPixels, match="has 64x48 pixels that take long to decode, over 3,071"):
            open_image(slow, max_pixels=50 * width * height - 1)
    plain = b"P5 %d %d 255\n" % PHOTO.size + bytes(width * height)
    assert open_image(plain, max_pixels=width * height).size == PHOTO.size


def test_a_file_that_holds_another_of_any_format_is_not_opened() -> None:
    """IPTC may hold EPS, for which Pillow would run Ghostscript, and images of any size."""

    def field(section: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, section, number]) + struct.pack(">H", len(data)) + data

    sizes = field(3, 60, b"\1\0") + field(3, 20, b"\0\x40") + field(3, 30, b"\0\x30")
    content = sizes + field(3, 120, b"\5") + field(8, 10, encoded(PHOTO.convert("L"), "PNG")) + bytes(5)
    assert Image.open(io.BytesIO(content)).format == "IPTC"
    with pytest.raises(UnreadableItem, match="is not an image that Pillow opens"):
        open_image(content)


def test_a_blp_hides_its_pixels() -> None:
    content = encoded(PHOTO.convert("P"), "BLP")
    assert open_image(content).size == PHOTO.size
    with pytest.raises(UnreadableItem, match="is a BLP file, whose pixels cannot be counted before they are decoded"):
        open_image(content, max_pixels=10**6)


def test_names_that_no_file_has_are_told() -> None:
    for name, reason in (("a\0b.jpg", "cannot be opened: embedded null byte"), ("a" * 5000, "File name too long")):
        with pytest.raises(UnreadableItem, match=reason):
            open_image(Path(name))


def test_one_image_may_be_decoded_by_several_threads() -> None:
    content = encoded(PHOTO.resize((400, 300)), "PNG")
    reader = ImageReader(TINY)
    expected = reader(content)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            image = Image.open(io.BytesIO(content))
            for made in pool.map(reader, [image] * 8):
                np.testing.assert_array_equal(made, expected)


def test_heic_photos_that_cannot_be_read_here_are_set_aside_with_the_way_to_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffixes, formats = images.image_suffixes() - {*images.HEIC_SUFFIXES}, images._formats()
    monkeypatch.setattr(images, "_formats", lambda: tuple(kind for kind in formats if kind != "HEIF"))
    for module in (archives, folders):
        monkeypatch.setattr(module, "image_suffixes", lambda: suffixes)
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (tmp_path / "a.heic").write_bytes(content)
    PHOTO.save(tmp_path / "b.jpg")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(tmp_path / "a.heic", "a.HEIC")
    assert folders.list_images([tmp_path]) == [tmp_path / "a.heic", tmp_path / "b.jpg"]
    assert [member.content for member in archives.read_archive(tmp_path / "photos.tar")] == [content]
    with pytest.raises(UnreadableItem, match=r"is a HEIC photo: pip install 'corewise\[heic\]' reads it"):
        open_image(content)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(SamplesError, match=r"it holds 1 \.heic, 1 \.tar; pip install 'corewise\[heic\]' reads \.heic"):
        folders.read_folder(tmp_path)
