"""Image files decoded: the one place for samples, ``predict`` and the server alike.

Every image becomes upright (EXIF orientation is applied), 8 bits deep, and RGB or grey; of an animation it is the first
frame. Transparency is dropped, as torchvision does. Values that are not 8 bits deep are scaled:

- 16-bit integers by 65535;
- 32-bit integers and floats by the smallest of 1 (floats only), 255 and 65535 that holds all values; where none does,
  or one is negative, the image's own lowest value becomes black and its highest white.
"""

import io
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from corewise.common.errors import MissingExtra
from corewise.common.phrases import with_article
from corewise.records.report import Preprocess
from corewise.samples.image_geometry import decoding_scale, sharpness_of
from corewise.samples.image_limits import (
    COEFFICIENT_BYTES,
    MOST_STEPS,
    STEP_BYTES,
    Content,
    File,
    TooManyParts,
    TooManyPixels,
    check_pixels,
    check_scans,
    has_passes,
    is_slow,
)
from corewise.samples.raw import UnreadableItem

if TYPE_CHECKING:
    from PIL.Image import Image

UNSAFE_FORMATS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
"""Known to Pillow, but read by other programs (Ghostscript) or not at all. IPTC holds a file of any format, EPS among
them."""
UNBOUNDED_FORMATS = {"BLP": b"BLP", "ICNS": b"icns", "ICO": b"\0\0\1\0"}
"""What begins with these bytes holds images that may be larger than its header says, and that Pillow decodes before
their size can be checked."""
SMALL_BYTES = 2**20
"""A file up to this size is read at once, which takes 50 microseconds less than Pillow's many steps."""
HEIC_SUFFIXES = (".heic", ".heif", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""What a HEIC file begins with, behind the length and the name of its first part."""
HEIC_HINT = "pip install 'corewise[heic]' reads"
ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright, 2 to 8 are mirrored or turned."""
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
"""Pillow's names for what makes an image of each orientation upright."""
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""The ``info`` of an image that may say its orientation."""
LOADING = tuple(Lock() for _ in range(64))
"""Two threads must not decode the same PIL image at the same time; each image has one of these."""
DIM = 4095
"""A 16-bit image whose values all fit into 12 bits becomes almost black; it is marked in its ``info``."""
DIM_KEY = "corewise.dim"
SIZE_KEY = "corewise.size"
"""The ``info`` of what ``open_image`` returns has the size of the whole image, upright, under this key."""
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for bytes that are no whole image."""


def open_image(
    source: Path | bytes, name: str = "", *, max_pixels: int | None = None, preprocess: Preprocess | None = None
) -> "Image":
    """Decode one image.

    Args:
        source: A file, or its content.
        name: What messages call it; the file's path by default.
        max_pixels: Refuse more before they are decoded, and ``UNBOUNDED_FORMATS``; Pillow's own limit (about 179
            million) holds in any case.
        preprocess: What it is decoded for: where that says so, a large JPEG is decoded at a smaller scale.

    Returns:
        The first frame, upright, of mode ``RGB`` or ``L``.

    Raises:
        UnreadableItem: Saying what is wrong with it: empty, cut off, no image; ``TooManyPixels`` where it is too large.
        MissingExtra: Where Pillow is not installed.
    """
    name = name or ("the image" if isinstance(source, bytes) else f"the image {source}")
    with _opened(source, name, max_pixels) as image:
        whole = image.size
        check_scans(image, name)
        _scale_down(image, preprocess)
        image.load()
        image, turned = _upright(image)
        made = _eight_bits(image, name)
        made.info[SIZE_KEY] = whole[::-1] if turned else whole
        return made


class ImageSize(NamedTuple):
    """What decoding an image takes."""

    width: int
    """As it is decoded."""
    height: int
    kept_bytes: int
    """What is kept beside its pixels: of a progressive JPEG, coefficients in its own size whatever the scale."""


def image_size(
    source: Path | bytes, name: str, *, max_pixels: int | None = None, preprocess: Preprocess | None = None
) -> ImageSize:
    """What ``open_image`` takes, by the header alone. Raises as it does."""
    with _opened(source, name, max_pixels) as image:
        layers = image.layers if has_passes(image) else 0  # type: ignore[attr-defined]
        kept_bytes = COEFFICIENT_BYTES * layers * image.width * image.height
        _scale_down(image, preprocess)
        return ImageSize(image.width, image.height, kept_bytes)


def sharpness_left(item: Any, preprocess: Preprocess) -> float | None:
    """How many pixels a side are decoded for each pixel of the resized image, where scaled decoding has any effect.

    ``None`` for an image that is decoded in full, or is decoded already.
    """
    if not isinstance(item, Path | bytes):
        return None
    with _opened(item, "the image", None) as image:
        size = image.size
        _scale_down(image, preprocess)
        return None if image.size == size else sharpness_of(size, preprocess) / decoding_scale(size, preprocess)


def _scale_down(image: "Image", preprocess: Preprocess | None) -> None:
    """Have a JPEG decoded at a half, a quarter or an eighth of its size, at ``sharpness`` times what is needed."""
    if preprocess is None or preprocess.decode == "full":
        return
    scale = decoding_scale(image.size, preprocess)
    image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


@contextmanager
def _opened(source: Path | bytes, name: str, max_pixels: int | None) -> "Iterator[Image]":
    """The image, not decoded yet. Raises ``UnreadableItem``, also for what Pillow raises in the ``with``."""
    pil = pillow()
    bounded = [kind for kind in _formats() if max_pixels is None or kind not in UNBOUNDED_FORMATS]
    try:
        with _file(source, name) as file, pil.open(file, formats=bounded) as image:
            check_pixels(image, name, max_pixels)
            file.steps_left = sys.maxsize
            if max_pixels is not None and isinstance(source, bytes) and not is_slow(image):
                file.steps_left = MOST_STEPS + len(source) // STEP_BYTES
            yield image
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise TooManyPixels(name, "has too many pixels") from error
    except TooManyParts as error:
        raise UnreadableItem(name, "has too many parts") from error
    except BROKEN as error:
        raise UnreadableItem(name, _reason(source, error, bounded)) from error


def _file(source: Path | bytes, name: str) -> Content | File:
    """What Pillow opens. Raises ``UnreadableItem`` for what is no file."""
    if isinstance(source, bytes):
        return Content(source)
    found = source.stat()
    if not S_ISREG(found.st_mode):
        raise UnreadableItem(name, "is not a regular file")  # to open a named pipe would wait for ever
    return Content(source.read_bytes()) if found.st_size <= SMALL_BYTES else File(io.FileIO(source))


def normalize_image(image: "Image", name: str = "the image") -> "Image":
    """The image upright, of mode ``RGB`` or ``L``, 8 bits deep; the given one stays as it is."""
    return _eight_bits(_upright(image)[0], name)


def _eight_bits(image: "Image", name: str) -> "Image":
    """The image in mode ``RGB`` or ``L``."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image, name)
    # Pillow converts these by way of another mode with transparency only.
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return in_mode(image, "L" if image.mode in ("1", "L", "LA") else "RGB")


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of the files that Pillow reads here; of HEIC files where its plug-in is installed."""
    formats = {*_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, kind in pillow().registered_extensions().items() if kind in formats)


def is_image(value: Any) -> bool:
    """Whether an array is an image: uint8 (H, W, 1) or (H, W, 3)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] in (1, 3)


def decoded(item: Any) -> "Image":
    """A uint8 array, or a PIL image, which may still have to be read from its file, as ``normalize_image`` has it.

    Raises ``UnreadableItem``.
    """
    width, height = item.size if is_pil(item) else item.shape[1::-1]
    if not (width and height):
        raise UnreadableItem("the image", "has no pixels")
    try:
        if is_pil(item):
            with LOADING[id(item) // 64 % len(LOADING)]:
                item.load()
            return normalize_image(item)
        return pillow().fromarray(item.squeeze(-1) if item.shape[2] == 1 else item)  # type: ignore[no-any-return]
    except BROKEN as error:
        raise UnreadableItem("the image", _broken(error)) from error


def is_pil(value: Any) -> bool:
    """Whether it is a PIL image; Pillow is not imported for it."""
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def pillow() -> Any:
    """Pillow, imported when it is needed. Raises ``MissingExtra``."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "optimize", "reading images") from None
    return Image


@cache
def _formats() -> Sequence[str]:
    """The formats that are opened: what Pillow decodes by itself or by an installed plug-in."""
    pil = pillow()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    pil.init()
    return tuple(kind for kind in pil.ID if kind not in UNSAFE_FORMATS)


def _reason(source: Path | bytes, error: BaseException, opened: Sequence[str]) -> str:
    """What is wrong with an image that Pillow does not decode by these formats, as the end of a sentence."""
    try:
        head = source[:512] if isinstance(source, bytes) else _head(source)
    except OSError as missing:
        return f"cannot be opened: {missing.strerror}"
    except ValueError as wrong:  # its name has a zero byte
        return f"cannot be opened: {wrong}"
    if not head:
        return "is empty"
    if head.lstrip().lower().startswith((b"<html", b"<!doctype html")):
        return "is an HTML page"
    if type(error).__name__ == "UnidentifiedImageError":
        for kind, magic in UNBOUNDED_FORMATS.items():
            if head.startswith(magic) and kind not in opened:
                return f"is {with_article(kind)} file, whose pixels cannot be counted before they are decoded"
        if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
            return f"is a HEIC photo: {HEIC_HINT} it"
        return "is not an image that Pillow opens"
    return _broken(error)


def _broken(error: BaseException) -> str:
    """What Pillow says about an image that it knows, as the end of a sentence."""
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "is cut off"
    return f"cannot be decoded: {str(error).strip() or type(error).__name__}"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _upright(image: "Image") -> "tuple[Image, bool]":
    """The image upright, and whether its width and height were exchanged for that."""
    image.load()  # by which a TIFF becomes upright
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (*BROKEN, UserWarning):
        return image, False  # broken EXIF data says nothing about the orientation
    if orientation not in TURNS:
        return image, False
    # Not by Pillow's ``exif_transpose``, which fails where it cannot write all other EXIF data again.
    upright = image.transpose(pillow().Transpose[TURNS[orientation]])
    for key in METADATA:
        upright.info.pop(key, None)
    return upright, orientation >= 5


def in_mode(image: "Image", mode: str) -> "Image":
    """The image in another mode; without a copy where it has that mode."""
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: "Image", name: str) -> "Image":
    """Values of another depth in 8 bits; see the module's docstring for the rule."""
    pixels = np.asarray(image, np.float64)
    if not np.isfinite(pixels).all():
        raise UnreadableItem(name, "has NaN or infinite pixels")
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode.startswith("I;16"):
        black, white = 0.0, 65535.0
    else:
        holding = [limit for limit in (1, 255, 65535) if high <= limit and (limit > 1 or image.mode == "F")]
        black, white = (0.0, float(holding[0])) if low >= 0 and holding else (low, high)
    eight = np.rint((pixels - black) / max(white - black, np.finfo(np.float64).tiny) * 255)
    scaled: Image = pillow().fromarray(eight.astype(np.uint8))
    scaled.info[DIM_KEY] = white == 65535 and 0 < high <= DIM
    return scaled
