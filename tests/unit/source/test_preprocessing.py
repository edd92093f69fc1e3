"""source: the preprocessing that a model brings, and what the user's own options change."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from corewise.common.errors import SamplesError
from corewise.records.report import Preprocess
from corewise.samples.images import image_array
from corewise.source import own_preprocess, read_for

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LITE0 = {
    "input_size": (3, 24, 24),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def transform_of(preprocess: Preprocess) -> Any:
    """What a library would compute, written out."""

    def transform(image: Image.Image) -> np.ndarray:
        short = min(image.size)
        width, height = (preprocess.resize * side // short for side in image.size)
        resized = image.resize((width, height), Image.Resampling[preprocess.interpolation.upper()])
        left, top = (width - preprocess.crop) // 2, (height - preprocess.crop) // 2
        pixels = np.asarray(resized, np.float32)[top : top + preprocess.crop, left : left + preprocess.crop] / 255
        return ((pixels - np.float32(preprocess.mean)) / np.float32(preprocess.std)).transpose(2, 0, 1)

    return transform


def install_timm(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], does: Preprocess) -> None:
    """A timm with one model, whose transform does what ``does`` says whatever the model's config says."""
    timm: Any = ModuleType("timm")
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(to_dict=lambda: config) if name == "lite0" else None
    data: Any = ModuleType("timm.data")
    data.resolve_data_config = lambda pretrained_cfg: pretrained_cfg
    data.create_transform = lambda **options: transform_of(does)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", data)


TIMM = Preprocess(
    resize=27, crop=24, interpolation="bicubic", mean=LITE0["mean"], std=LITE0["std"], origin="timm's pretrained_cfg"
)


def test_timm_models_bring_their_preprocessing_by_name_and_as_modules(
    monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    install_timm(monkeypatch, LITE0, TIMM)
    assert read_for("timm:lite0", str(photos)).preprocess == TIMM
    assert read_for(SimpleNamespace(pretrained_cfg=LITE0), str(photos)).preprocess == TIMM
    assert read_for("timm:unknown", str(photos)).preprocess == Preprocess()
    given = {"crop": 20, "interpolation": "bilinear"}
    assert read_for("timm:lite0", str(photos), given=given).preprocess == replace(TIMM, **given)


@pytest.mark.parametrize(
    "does",
    [
        replace(TIMM, mean=IMAGENET["mean"], std=IMAGENET["std"]),
        replace(TIMM, resize=24),
        replace(TIMM, crop=20),
    ],
)
def test_where_a_library_does_something_else_it_does_it_itself(
    monkeypatch: pytest.MonkeyPatch, photos: Path, does: Preprocess
) -> None:
    install_timm(monkeypatch, LITE0, does)
    samples = read_for("timm:lite0", str(photos))
    assert samples.preprocess == Preprocess(function="timm:lite0")
    np.testing.assert_allclose(samples.rows[0][0], transform_of(does)(Image.open(photos / "0.png")), atol=1e-6)
    given = {"resize": 30, "crop": 20, "interpolation": "bilinear", **IMAGENET}
    assert read_for("timm:lite0", str(photos), given=given).preprocess == Preprocess(**given)
    given.pop("crop")
    with pytest.raises(SamplesError, match=r"timm:lite0 prepares images in its own way.*or give crop as well"):
        read_for("timm:lite0", str(photos), given=given)


def test_torchvision_models_bring_that_of_their_weights(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    expected = Preprocess(resize=29, crop=24, **IMAGENET, origin="torchvision's weights.transforms()")

    class Transforms:
        crop_size, resize_size = [24], [29]
        mean, std = list(IMAGENET["mean"]), list(IMAGENET["std"])
        interpolation = SimpleNamespace(value="bilinear")
        __call__ = staticmethod(transform_of(expected))

    default = SimpleNamespace(transforms=Transforms)
    models: Any = ModuleType("torchvision.models")
    models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=default)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    assert read_for("torchvision:net", str(photos)).preprocess == expected
    default.transforms = lambda: lambda image: image  # a detector's
    assert read_for("torchvision:net", str(photos)).preprocess == Preprocess()


HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
         {"fit": "squash", "resize": 32, "crop": 32, "mean": HALF, "std": HALF}),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}},
         {"resize": 32, "crop": 28, "interpolation": "bicubic", "mean": HALF, "std": HALF}),
        ({"image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 32},
         {"resize": 36, "crop": 32, "mean": (0, 0, 0), "std": (1, 1, 1), "bgr": True}),
        ({"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32}, "resample": 0,
          "rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
         {"fit": "squash", "resize": 32, "crop": 32, "interpolation": "nearest", "mean": (0.75,) * 3,
          "std": (0.25,) * 3}),
        ({"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 40, "longest_edge": 66}},
         {"fit": "keep", "resize": 40, "longest": 66, "multiple": 1}),
        ({"image_processor_type": "YolosImageProcessor", "size": {"shortest_edge": 60, "longest_edge": 90}},
         {"fit": "keep", "resize": 60, "longest": 90, "multiple": 16}),
    ],
)  # fmt: skip
def test_transformers_folders_say_how_images_are_processed(
    tmp_path: Path, photos: Path, says: dict[str, Any], expected: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
    preprocess = read_for(f"hf:{tmp_path}", str(photos)).preprocess
    assert preprocess is not None
    assert preprocess.function is None
    assert preprocess.origin == "its preprocessor_config.json"
    for name, value in expected.items():
        assert getattr(preprocess, name) == (pytest.approx(value) if isinstance(value, tuple) else value), name
    photo = Image.open(photos / "0.png")
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photo, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(image_array(photo, preprocess), pixels, atol=0.05)


def test_processors_of_another_kind_are_used_as_they_are(tmp_path: Path, photos: Path) -> None:
    pytest.importorskip("transformers")
    assert own_preprocess(f"hf:{tmp_path}") is None  # a model of texts
    says = {"image_processor_type": "LevitImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
    samples = read_for(f"hf:{tmp_path}", str(photos))
    assert samples.preprocess == Preprocess(function=f"hf:{tmp_path}")
    assert samples.rows[0][0].shape == (3, 28, 28)


def test_detectors_of_ultralytics_get_their_letterbox(photos: Path) -> None:
    class DetectionModel:
        args = SimpleNamespace(imgsz=64)

    DetectionModel.__module__, DetectionModel.__name__ = "ultralytics.nn.tasks", "DetectionModel"
    samples = read_for(DetectionModel(), str(photos))
    assert samples.preprocess == Preprocess(
        fit="letterbox", resize=64, crop=64, mean=(0,) * 3, std=(1,) * 3, origin="Ultralytics' LetterBox"
    )
    np.testing.assert_allclose(samples.rows[0][0][:, 0, 0], 114 / 255, atol=1e-5)


def test_models_of_the_users_own_get_imagenets_and_what_is_given(photos: Path) -> None:
    assert read_for("net.py:build", str(photos)).preprocess == Preprocess()
    given = {"crop": 8, "fit": "letterbox"}
    samples = read_for("net.py:build", str(photos), given=given)
    assert samples.preprocess == Preprocess(**given)
    assert samples.rows[0][0].shape == (3, 8, 8)
    edges = samples.rows[0][0][:, 0, 0]  # 80 x 60 leaves a bar above and below
    np.testing.assert_allclose(edges, (114 / 255 - np.array(IMAGENET["mean"])) / IMAGENET["std"], atol=1e-5)
