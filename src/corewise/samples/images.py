"""Images as a model takes them: the one place that decodes, for samples, ``predict`` and the server alike.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from stat import S_ISREG
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import MissingExtra, SamplesError
from corewise.common.references import find_reference, guard
from corewise.records.report import Preprocess
from corewise.samples.image_limits import (
    COEFFICIENT_BYTES,
    Content,
    File,
    LongHeader,
    TooManyPixels,
    check_pixels,
    check_scans,
    has_passes,
)
from corewise.samples.raw import UnreadableItem

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocessor = Callable[["Image"], Any]

UNSAFE_FORMATS = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
"""Known to Pillow, but read by other programs (Ghostscript) or not at all. IPTC holds a file of any format, EPS among
them."""
UNBOUNDED_FORMATS = {"BLP": b"BLP", "ICNS": b"icns", "ICO": b"\0\0\1\0"}
"""What begins with these bytes holds images that may be larger than its header says, and that Pillow decodes before
their size can be checked."""
SMALL_BYTES = 2**20
"""A file of so many is read at once, which takes 50 microseconds less than in the many steps in which Pillow does."""
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
LONGEST = 16
"""Ratio of the sides beyond which an image is cut before it is resized: the crop shows its middle alone."""
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
    """Beside its pixels: of a progressive JPEG, in its own size whatever the scale."""


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
        return None if image.size == size else _sharpness(size, preprocess) / _scale(size, preprocess)


def _scale_down(image: "Image", preprocess: Preprocess | None) -> None:
    """Have a JPEG decoded at a half, a quarter or an eighth of its size, at ``sharpness`` times what is needed."""
    if preprocess is None or preprocess.decode == "full":
        return
    scale = _scale(image.size, preprocess)
    image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _scale(size: tuple[int, int], preprocess: Preprocess) -> int:
    """By how much a JPEG of that width and height is decoded smaller: as libjpeg does it without loss of time."""
    sharpness = _sharpness(size, preprocess)
    return next((scale for scale in (8, 4, 2) if sharpness >= scale * preprocess.sharpness), 1)


def _sharpness(size: tuple[int, int], preprocess: Preprocess) -> float:
    """Pixels a side for each pixel of the resized image."""
    return min(side / most for side, most in zip(size, _resized(size, preprocess), strict=True))


@contextmanager
def _opened(source: Path | bytes, name: str, max_pixels: int | None) -> "Iterator[Image]":
    """The image, not decoded yet. Raises ``UnreadableItem``, also for what Pillow raises in the ``with``."""
    pil = _pil()
    bounded = [kind for kind in _formats() if max_pixels is None or kind not in UNBOUNDED_FORMATS]
    try:
        with _file(source, name) as file, pil.open(file, formats=bounded) as image:
            file.steps_left = sys.maxsize
            check_pixels(image, name, max_pixels)
            yield image
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise TooManyPixels(name, "has too many pixels") from error
    except LongHeader as error:
        raise UnreadableItem(name, "has a header of too many parts") from error
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
    return _convert(image, "L" if image.mode in ("1", "L", "LA") else "RGB")


def image_array(image: "Image", preprocess: Preprocess) -> NDArray[Any]:
    """One image as a model's input.

    As torchvision's Resize, CenterCrop, ToTensor and Normalize make it of a PIL image.

    Args:
        image: What ``open_image`` returned, or another PIL image.
        preprocess: How it is resized, cropped and normalised.

    Returns:
        float32 (C, crop, crop) of as many channels as ``preprocess.mean`` has; uint8 (crop, crop, C), not normalised,
        where ``preprocess.dtype`` says so. Where ``preprocess.fit`` is ``keep``, of the image's own shape.

    Raises:
        SamplesError: Where ``preprocess`` is a function of the user's, which is not run for strangers' images.
    """
    if preprocess.function is not None:
        raise SamplesError(f"images are prepared by {preprocess.function}, which is not available", "send tensors")
    image = _convert(image, "L" if len(preprocess.mean) == 1 else "RGB")
    if preprocess.fit == "crop":
        image = _without_far_ends(image)
    if preprocess.fit == "letterbox":
        image = _boxed(image, preprocess)
    elif preprocess.fit == "keep":
        image = image.resize(_resized(image.size, preprocess), _method(preprocess))
    else:
        image = _resized_middle(image, preprocess)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if preprocess.bgr:
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(pixels) if preprocess.dtype == "uint8" else normalize_pixels(pixels, preprocess)


def normalize_pixels(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Pixels, uint8 (..., H, W, C), as float32 (..., C, H, W), normalised."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocess.mean, preprocess.std))
    planes = np.ascontiguousarray(np.moveaxis(pixels, -1, -3)).astype(np.float32)
    planes /= np.float32(255)
    planes -= mean
    planes /= std
    return planes


def restore_pixels(planes: NDArray[np.float32], preprocess: Preprocess) -> NDArray[np.uint8] | None:
    """The pixels of which ``normalize_pixels`` made ``planes``; ``None`` where it did not make them.

    Example:
        >>> pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        >>> bool((restore_pixels(normalize_pixels(pixels, Preprocess()), Preprocess()) == pixels).all())
        True
    """
    if planes.dtype != np.float32 or planes.ndim < 3 or planes.shape[-3] != len(preprocess.mean):
        return None
    mean, std = (np.array(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    levels = np.rint((planes * std + mean) * 255)
    if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 255):
        return None
    pixels = np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), -3, -1))
    return pixels if np.array_equal(normalize_pixels(pixels, preprocess), planes) else None


def _resized(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
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
    return _resized(size, preprocess) if preprocess.fit == "keep" else (preprocess.crop, preprocess.crop)


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
    resized = _resized(size, preprocess)
    across, down = resized[0] / size[0], resized[1] / size[1]
    if preprocess.fit == "letterbox":
        left, top = ((preprocess.crop - side) // 2 for side in resized)
    elif preprocess.fit == "keep":
        left, top = 0, 0
    else:
        left, top = (-round((side - preprocess.crop) / 2) for side in resized)
    return Placement(left - cut[0] * across, top - cut[1] * down, across, down)


def _resized_middle(image: "Image", preprocess: Preprocess) -> "Image":
    """The middle of the resized image; only what it shows is computed, which some values round differently."""
    crop, (width, height) = preprocess.crop, _resized(image.size, preprocess)
    method = _method(preprocess)
    if (width, height) == image.size:
        return _centre(image, crop, crop)
    if preprocess.interpolation == "nearest":  # rounding would choose other pixels
        return _centre(image.resize((width, height), method), crop, crop)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + crop) * across, (top + crop) * down)
    inside = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return image.resize((crop, crop), method, inside)


def _boxed(image: "Image", preprocess: Preprocess) -> "Image":
    """The whole image in the middle of a grey square."""
    width, height = _resized(image.size, preprocess)
    square = _pil().new(image.mode, (preprocess.crop, preprocess.crop), (preprocess.fill,) * len(image.getbands()))
    small = image.resize((width, height), _method(preprocess))
    square.paste(small, ((preprocess.crop - width) // 2, (preprocess.crop - height) // 2))
    return square  # type: ignore[no-any-return]


def _method(preprocess: Preprocess) -> Any:
    """Pillow's name for how to resize."""
    return _pil().Resampling[preprocess.interpolation.upper()]


@cache
def image_suffixes() -> frozenset[str]:
    """The lower-case suffixes of the files that Pillow reads here; of HEIC files where its plug-in is installed."""
    formats = {*_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, kind in _pil().registered_extensions().items() if kind in formats)


def is_image(value: Any) -> bool:
    """Whether an array is an image: uint8 (H, W, 1) or (H, W, 3)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] in (1, 3)


class ImageReader:
    """Makes inputs of images: paths, bytes, PIL images, uint8 arrays, and dicts of inputs with such arrays.

    ``function`` is the user's own: it, or a reference to it, takes an RGB PIL image and returns the input. ``dim``
    names images that came out almost black.
    """

    def __init__(self, preprocess: Preprocess, function: str | Preprocessor | None = None) -> None:
        """Raises ``SamplesError`` where the numbers do not fit each other, or there is no such function."""
        self.dim: list[str] = []
        self.preprocess = preprocess
        self._function: Preprocessor | None = None
        if function is None:
            _check(preprocess)
            return
        chosen = (
            find_reference(function, SamplesError, "preprocess function") if isinstance(function, str) else function
        )
        name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        self._function = chosen
        self.preprocess = Preprocess(function=name)

    def sized(self, item: Any) -> tuple[Any, tuple[int, int]]:
        """The input that is made of one image, and the width and height of the whole image, upright."""
        if isinstance(item, Path | bytes):
            opened = open_image(item, preprocess=self.preprocess)
            return self._input(opened, f"{item}" if isinstance(item, Path) else "an image"), opened.info[SIZE_KEY]
        upright = _decoded(item)
        return self._input(upright, "an image"), upright.size

    def __call__(self, item: Any) -> Any:
        """One sample's inputs."""
        if isinstance(item, dict):
            return {name: self(value) for name, value in item.items()}
        if isinstance(item, Path | bytes):
            opened = open_image(item, preprocess=self.preprocess)
            return self._input(opened, f"{item}" if isinstance(item, Path) else "an image")
        return self._input(_decoded(item), "an image") if is_image(item) or is_pil(item) else item

    def _input(self, image: "Image", name: str) -> Any:
        if image.info.get(DIM_KEY):
            self.dim.append(name)
        if self._function is None:
            return image_array(image, self.preprocess)
        with guard(SamplesError, f"the preprocess function failed on {name}"):
            return self._function(image.convert("RGB"))

    @property
    def threads_allowed(self) -> bool:
        """Whether several threads may call it: a user's function need not stand that."""
        return self._function is None

    def notes(self) -> tuple[str, ...]:
        """A sentence for the report about images that come out almost black."""
        if not self.dim:
            return ()
        return (
            f"{len(self.dim):,} images of 16 bits use 12 of them at most and become almost black: scale them in a "
            "preprocess function",
        )


def _decoded(item: Any) -> "Image":
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
        return _pil().fromarray(item.squeeze(-1) if item.shape[2] == 1 else item)  # type: ignore[no-any-return]
    except BROKEN as error:
        raise UnreadableItem("the image", _broken(error)) from error


def is_pil(value: Any) -> bool:
    """Whether it is a PIL image; Pillow is not imported for it."""
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("pillow", "optimize", "reading images") from None
    return Image


@cache
def _formats() -> Sequence[str]:
    """The formats that are opened: what Pillow decodes by itself or by an installed plug-in."""
    pil = _pil()
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
                article = "an" if kind[0] in "AEIOU" else "a"
                return f"is {article} {kind} file, whose pixels cannot be counted before they are decoded"
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
    upright = image.transpose(_pil().Transpose[TURNS[orientation]])
    for key in METADATA:
        upright.info.pop(key, None)
    return upright, orientation >= 5


def _convert(image: "Image", mode: str) -> "Image":
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
    scaled: Image = _pil().fromarray(eight.astype(np.uint8))
    scaled.info[DIM_KEY] = white == 65535 and 0 < high <= DIM
    return scaled


def _without_far_ends(image: "Image") -> "Image":
    """The middle of a very long image; resized as a whole it would be millions of pixels long."""
    most = LONGEST * min(image.size)
    return image if max(image.size) <= most else _centre(image, min(image.width, most), min(image.height, most))


def _centre(image: "Image", width: int, height: int) -> "Image":
    """The middle of an image, rounded as torchvision does."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _check(preprocess: Preprocess) -> None:
    channels = len(preprocess.mean)
    if channels not in (1, 3) or len(preprocess.std) != channels or 0 in preprocess.std:
        raise SamplesError(
            f"mean {preprocess.mean} and std {preprocess.std} do not fit",
            "give 3 numbers each for RGB or 1 for grey, std not 0",
        )
    if preprocess.crop < 1 or (preprocess.crop > preprocess.resize and preprocess.fit in ("crop", "squash")):
        raise SamplesError(
            f"crop {preprocess.crop} does not fit into resize {preprocess.resize}", "choose crop between 1 and resize"
        )
