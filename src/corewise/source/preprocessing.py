"""The preprocessing that a model brings: read from its library, and proven against what the library itself does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import SamplesError, SourceError
from corewise.common.references import guard
from corewise.records.jsonable import from_json
from corewise.records.report import Preprocess
from corewise.samples import RawSamples, Samples, read_leaving_texts
from corewise.samples.audio import audio_samples
from corewise.samples.images import image_array
from corewise.source.audio import audio_reader
from corewise.source.models import HUBS, split_reference
from corewise.source.packages import NO_CODE, import_package, processor_files, without_code

if TYPE_CHECKING:
    from PIL.Image import Image

CLOSE_DB = 34.0
"""The least SQNR of our input for one picture against the library's. The rounding of pixels leaves 40 and more; a wrong
mean, size, crop or order of colours leaves 29 and less."""
STEPS = ("resize", "crop", "mean", "std", "interpolation")
"""What says all about the usual way."""
PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of interpolations."""
ULTRALYTICS, ULTRALYTICS_SIZE = "ultralytics.nn.tasks.DetectionModel", 640
KEEPING = {"shortest_edge", "longest_edge"}
"""What a size has with which a photo keeps its shape, as DETR's."""
YOLOS_MULTIPLE = 16
"""Not in its configuration: transformers ``models/yolos/image_processing_yolos.py``."""


@dataclass(frozen=True, kw_only=True)
class OwnPreprocess:
    """What a model's library does with an image.

    ``preprocess`` says it in corewise's steps; ``None`` where these give another input. ``function`` is the library's
    own: an RGB PIL image to a float32 array (C, H, W).
    """

    origin: str
    preprocess: Preprocess | None
    function: Callable[["Image"], NDArray[np.float32]]


def read_for(
    model: Any,
    reference: str,
    *,
    given: Mapping[str, Any] | None = None,
    audio: Mapping[str, Any] | None = None,
    function: str | None = None,
    **options: Any,
) -> Samples | RawSamples:
    """The samples that ``reference`` names: texts as they are, others as the model's own preprocessing makes them.

    Args:
        model: A model or its reference, as ``optimize`` takes it.
        reference: As ``samples.read_leaving_texts`` takes it.
        given: Fields of ``Preprocess`` that the user gives instead of the model's.
        audio: Fields of ``AudioPreprocess`` that the user gives.
        function: The user's function that does all of it.
        options: As ``samples.read_leaving_texts`` takes them.

    Raises:
        SamplesError: As ``samples.read_leaving_texts``; where ``given`` changes a part of what is known only as a
            whole; and as ``audio_reader``.
        SourceError: Where the model's package cannot be imported.
    """
    found = _read_with_images(model, reference, dict(given or {}), function, options)
    if isinstance(found, RawSamples) and found.kind == "audio":
        return audio_samples(found, audio_reader(model, audio or {}, function, found.source))
    if audio:
        raise SamplesError(f"there are no recordings in {reference}", "leave out --sample-rate, --seconds and --layout")
    return found


def _read_with_images(
    model: Any, reference: str, given: Mapping[str, Any], function: str | None, options: Mapping[str, Any]
) -> Samples | RawSamples:
    """As ``read_for``, recordings left as they are."""
    own = None if function is not None else own_preprocess(model)
    if own is None:
        return read_leaving_texts(reference, replace(Preprocess(), **given), function, **options)
    if own.preprocess is not None:
        return read_leaving_texts(reference, replace(own.preprocess, **given), **options)
    if given:
        missing = [name for name in STEPS if name not in given]
        if missing:
            raise SamplesError(
                f"{own.function.__module__}:{own.function.__qualname__} prepares images in its own way, in which "
                f"{', '.join(given)} cannot be changed alone",
                f"leave that out, or give {', '.join(missing)} as well",
            )
        return read_leaving_texts(reference, replace(Preprocess(), **given), **options)
    return read_leaving_texts(reference, None, own.function, **options)


def own_preprocess(model: Any) -> OwnPreprocess | None:
    """What the library of a model, or of the one that a reference names, does with an image.

    ``None`` where it says nothing: for models of the user's own, and for those that take no images.

    Raises ``SourceError`` where the package of a reference cannot be imported, or what it says cannot be read.
    """
    if not isinstance(model, str):
        if any(f"{kind.__module__}.{kind.__name__}" == ULTRALYTICS for kind in type(model).__mro__):
            return _ultralytics(model)
        config = getattr(model, "pretrained_cfg", None)
        return _timm(config, "model") if isinstance(config, Mapping) and "input_size" in config else None
    prefix, name = split_reference(model)
    if prefix == "timm":
        timm = import_package("timm", "timm")
        config = timm.get_pretrained_cfg(name)
        return None if config is None else _timm(config.to_dict(), name)
    if prefix == "torchvision":
        return _torchvision(name)
    return _transformers(name) if prefix == "hf" else None


def _ultralytics(model: Any) -> OwnPreprocess:
    """What Ultralytics' ``LetterBox`` does for the size that the detector was trained with."""
    trained = getattr(model, "args", None)
    found = trained.get("imgsz") if isinstance(trained, Mapping) else getattr(trained, "imgsz", None)
    size = found if isinstance(found, int) else ULTRALYTICS_SIZE
    preprocess = Preprocess(
        fit="letterbox", resize=size, crop=size, mean=(0.0,) * 3, std=(1.0,) * 3, origin="Ultralytics' LetterBox"
    )
    return OwnPreprocess(
        origin="Ultralytics' LetterBox", preprocess=preprocess, function=lambda image: image_array(image, preprocess)
    )


def _timm(config: Mapping[str, Any], name: str) -> OwnPreprocess | None:
    data = import_package("timm.data", "timm")
    with guard(SourceError, f"the preprocessing of timm:{name} cannot be read", "give --preprocess FILE.py:FUNCTION"):
        chosen = data.resolve_data_config(pretrained_cfg=dict(config))
        transform = data.create_transform(**chosen, is_training=False)
    return _proven("timm's pretrained_cfg", timm_preprocess(chosen), lambda image: np.asarray(transform(image)), name)


def timm_preprocess(config: Mapping[str, Any]) -> Preprocess | None:
    """What timm's data config says; ``None`` where it says more than corewise does."""
    _, height, width = config["input_size"]
    fit = {"center": "crop", "squash": "squash"}.get(config.get("crop_mode") or "center")
    if height != width or fit is None:
        return None
    return _made(
        fit=fit,
        resize=floor(height / config["crop_pct"]),
        crop=height,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def _torchvision(name: str) -> OwnPreprocess | None:
    models = import_package("torchvision.models", "torchvision")
    with guard(SourceError, f"the preprocessing of torchvision:{name} cannot be read", "check its name"):
        transform = models.get_model_weights(name).DEFAULT.transforms()
    if not hasattr(transform, "mean"):
        return None  # a detector prepares images itself
    return _proven(
        "torchvision's weights.transforms()",
        torchvision_preprocess(transform),
        lambda image: np.asarray(transform(image)),
        name,
    )


def torchvision_preprocess(transform: Any) -> Preprocess | None:
    """What a transform that comes with torchvision's weights says; ``None`` where it says more than corewise does."""
    if not hasattr(transform, "crop_size"):
        return None
    (resize, *_), (crop, *_) = transform.resize_size, transform.crop_size
    return _made(
        resize=resize,
        crop=crop,
        interpolation=transform.interpolation.value,
        mean=transform.mean,
        std=transform.std,
    )


def _transformers(name: str) -> OwnPreprocess | None:
    transformers = import_package("transformers", "hf")
    if not _has_image_processor(name):
        return None
    with (
        guard(SourceError, f"the image processor of hf:{name} cannot be loaded", "give --preprocess FILE.py:FUNCTION"),
        without_code(f"the image processor of hf:{name}"),
    ):
        processor = transformers.AutoImageProcessor.from_pretrained(name, **NO_CODE)
        says = processor.to_dict()

    def function(image: "Image") -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = processor(image, return_tensors="np")["pixel_values"][0]
        return pixels

    return _proven("its preprocessor_config.json", transformers_preprocess(says), function, name)


def _has_image_processor(name: str) -> bool:
    """Whether a folder, or a model of the hub, says how images are processed."""
    return any("image" in path.read_text(encoding="utf-8") for path in processor_files(name))


def transformers_preprocess(says: Mapping[str, Any]) -> Preprocess | None:
    """What an image processor's configuration says; ``None`` where it says more than corewise does."""
    size, cut = says.get("size"), says.get("crop_size")
    longest = size.get("longest_edge") if isinstance(size, Mapping) and set(size) == KEEPING else None
    edge = size.get("shortest_edge") if isinstance(size, Mapping) and (len(size) == 1 or longest) else None
    side = _square(size)
    crop = _square(cut) if says.get("do_center_crop") else None
    if not says.get("do_resize") or (edge is None and side is None):
        return None
    resize, fit = (edge, "keep" if longest else "crop") if edge is not None else (side, "squash")
    if edge is not None and fit == "crop" and says.get("crop_pct"):
        # PoolFormer always cuts out the middle, ConvNeXt that of small images only.
        fit = "squash" if crop is None and edge >= 384 else "crop"
        crop, resize = crop or edge, edge if fit == "squash" else int(edge / says["crop_pct"])
    if (crop is None) == (fit == "crop") and fit != "squash":
        return None
    scale = says.get("rescale_factor", 1 / 255) if says.get("do_rescale") else 1.0
    mean: Sequence[float] = (0.0,) * 3
    std: Sequence[float] = (1.0,) * 3
    if says.get("do_normalize"):
        mean, std = says["image_mean"], says["image_std"]
    offset = 1.0 if says.get("rescale_offset") else 0.0
    if says.get("include_top"):  # EfficientNet divides by it twice
        std = tuple(one * one for one in std)
    # (x * scale - offset - mean) / std, for x in 0..255, as (x / 255 - mean') / std'.
    return _made(
        resize=resize,
        fit=fit,
        crop=crop or resize,
        interpolation=says.get("resample"),
        mean=[(one + offset) / (255 * scale) for one in mean],
        std=[one / (255 * scale) for one in std],
        bgr=bool(says.get("do_flip_channel_order")),
        longest=longest or Preprocess.longest,
        multiple=YOLOS_MULTIPLE if str(says.get("image_processor_type", "")).startswith("Yolos") else 1,
    )


def _square(size: Any) -> int | None:
    """The side of a square, as image processors write it."""
    if isinstance(size, int):
        return size
    if not isinstance(size, Mapping) or set(size) != {"height", "width"} or size["height"] != size["width"]:
        return None
    return int(size["height"])


def _made(*, interpolation: Any, mean: Any, std: Any, **others: Any) -> Preprocess | None:
    """These values, as libraries write them; ``None`` where corewise has no such interpolation, crop or channels."""
    method = interpolation if isinstance(interpolation, str) else PILLOW.get(int(interpolation or 0))
    numbers = {"mean": [float(one) for one in mean], "std": [float(one) for one in std]}
    try:
        made = from_json(Preprocess, {"interpolation": method, **numbers, **others})
    except ValueError:
        return None
    return made if made.crop <= made.resize and len(made.mean) == len(made.std) else None


def _proven(
    origin: str, preprocess: Preprocess | None, function: Callable[["Image"], NDArray[np.float32]], name: str
) -> OwnPreprocess:
    """``preprocess`` where it gives the input that the library's function gives for a picture, else without it."""
    prefix = next((prefix for prefix in HUBS if origin.startswith(prefix)), "hf")
    function.__module__, function.__qualname__ = prefix, name  # what the report calls it
    if preprocess is not None:
        pictures = _pictures(preprocess)
        with guard(SourceError, f"the preprocessing of {prefix}:{name} failed", "give --preprocess FILE.py:FUNCTION"):
            expected = [function(picture) for picture in pictures]
        ours = [image_array(picture, preprocess) for picture in pictures]
        same = all(map(_same, ours, expected))
        preprocess = replace(preprocess, origin=origin) if same else None
    return OwnPreprocess(origin=origin, preprocess=preprocess, function=function)


def _pictures(preprocess: Preprocess) -> "list[Image]":
    """A picture wider than high; where photos keep their shape, also one on which the limit of the longer side acts."""
    if preprocess.fit != "keep":
        return [_picture(4 * preprocess.resize, 3 * preprocess.resize)]
    return [_picture(2 * preprocess.resize, 3 * preprocess.resize // 2), _picture(250, 2 * preprocess.longest)]


def _picture(width: int, height: int) -> "Image":
    """An RGB picture with coarse and fine structure and a colour that leans to one side."""
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, share in ((4, 0.5), (16, 0.3), (48, 0.2)):
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        pixels += share * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray((pixels * np.array([1, 0.7, 0.5])).astype(np.uint8))


def _same(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """Whether two inputs show the same; libraries round the place of an odd crop up or down."""
    if ours.shape != expected.shape:
        return False
    _, height, width = ours.shape
    shifts = [(down, right) for down in (0, 1) for right in (0, 1)]
    shifted = ((ours[:, : height - down, : width - right], expected[:, down:, right:]) for down, right in shifts)
    return max(_sqnr_db(*both) for both in shifted) >= CLOSE_DB


def _sqnr_db(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    error = float(np.square(ours - expected, dtype=np.float64).sum())
    return 10 * float(np.log10(max(np.square(expected, dtype=np.float64).sum(), 1e-300) / max(error, 1e-300)))
