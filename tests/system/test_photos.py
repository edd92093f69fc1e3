"""Photos in, answers out: one artifact made from large JPEGs, and what it says about files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

import corewise
from corewise.artifact.format import Artifact
from corewise.pipeline import ClassAnswer
from corewise.records.reason import ReasonKind
from corewise.records.report import Preprocess
from corewise.samples import read
from corewise.samples.images import ImageReader, gains_by_scale

SMALL = Preprocess(resize=36, crop=32)
NAMES = ("dark", "red", "bright")


class Shades(nn.Module):
    """Knows how bright and how red a photo is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, green, blue = x.mean((2, 3)).unbind(1)
        light = red + green + blue
        return torch.stack((-light, 3 * red - 2 * (green + blue), light), 1)


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 400 x 300 in three shades, with soft structure."""
    rng = np.random.default_rng(0)
    shades = ((40, 40, 50), (200, 30, 30), (230, 230, 220))
    for number in range(count):
        coarse = rng.normal(0, 25, (12, 16, 3)) + shades[number % 3]
        image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{number:02}.jpg", quality=90)
    lines = [f"{number:02}.jpg,{number % 3}" for number in range(count)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 36)
    return folder


@pytest.fixture(scope="module")
def result(photos: Path) -> corewise.Result:
    return corewise.optimize(
        Shades().eval(),
        lambda: read(str(photos), SMALL),
        engines=["eager"],
        calibration=12,
        class_names=NAMES,
        budget_s=20,
    )


@pytest.fixture(scope="module")
def artifact(result: corewise.Result, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return result.save(tmp_path_factory.mktemp("artifact") / "shades.cw")


@pytest.fixture(scope="module")
def fast(artifact: Artifact) -> Iterator[corewise.Model]:
    with corewise.load(artifact.folder) as model:
        yield model


def test_scaled_decoding_is_taken_where_the_answers_hold(result: corewise.Result, artifact: Artifact) -> None:
    (reason,) = [note for note in result.report.notes if note.kind == ReasonKind.SCALED_DECODING]
    assert reason.details["photos"] == 24
    assert abs(float(str(reason.details["drop"]))) < 0.01
    assert artifact.manifest.preprocess == artifact.report.samples.preprocess
    assert artifact.manifest.preprocess is not None
    assert artifact.manifest.preprocess.decode == "scaled"


def test_predict_answers_paths_bytes_pictures_and_arrays(fast: corewise.Model, photos: Path) -> None:
    paths = sorted(photos.glob("*.jpg"))[:7]
    answers = fast.predict(paths)
    assert [answer.label for answer in answers] == [NAMES[number % 3] for number in range(7)]
    for answer in answers:
        assert isinstance(answer, ClassAnswer)
        assert next(iter(answer.probabilities)) == answer.label
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert fast.predict([str(path) for path in paths]) == answers
    assert fast.predict([path.read_bytes() for path in paths]) == answers
    assert fast.predict(paths[1]) == answers[1]
    pictures = [Image.open(path) for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    for form in (pictures, arrays):  # decoded already, so in full
        for answer, expected in zip(fast.predict(form), answers, strict=True):
            assert answer.label == expected.label
            assert answer.probability == pytest.approx(expected.probability, abs=0.02)
    assert list(fast.predict(paths[0], top=2).probabilities) == list(answers[0].probabilities)[:2]


def test_predict_reads_an_iterator_as_its_answers_are_taken(fast: corewise.Model, photos: Path) -> None:
    path = next(photos.glob("*.jpg"))
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    answers = fast.predict(endless())
    assert next(answers) == next(answers)
    assert taken < 200
    answers.close()


def test_an_image_that_cannot_be_read_is_named_or_set_aside(fast: corewise.Model, photos: Path) -> None:
    good = next(photos.glob("*.jpg"))
    items = [good, b"", good, good.read_bytes()[:900], 3, Path("nowhere.jpg"), good]
    with pytest.raises(corewise.InputError, match=r"image 1 is empty; replace or remove it"):
        fast.predict(items)
    assert fast.images is not None
    answers = list(fast.images.answers(items))
    assert [getattr(answer, "reason", "")[:16] for answer in answers] == [
        "", "is empty", "", "is cut off", "is a int, no pat", "cannot be opened", ""
    ]  # fmt: skip
    assert answers[0] == answers[2] == answers[6]


def test_only_large_jpegs_gain_by_scale_and_never_below_twice_the_target(photos: Path, tmp_path: Path) -> None:
    scaled = Preprocess(resize=36, crop=32, decode="scaled")
    jpeg = next(photos.glob("*.jpg"))
    assert gains_by_scale(jpeg, scaled)
    assert not gains_by_scale(jpeg, Preprocess(resize=160, crop=160, decode="scaled"))
    assert not gains_by_scale(jpeg, SMALL)
    Image.open(jpeg).save(tmp_path / "photo.png")
    assert not gains_by_scale(tmp_path / "photo.png", scaled)
    full, small = (ImageReader(how)(jpeg) for how in (SMALL, scaled))
    assert 0 < np.abs(full - small).max() < 0.1
