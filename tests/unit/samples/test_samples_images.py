"""samples: folders of images and recordings, and the one way of decoding."""

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from corewise.common.errors import MissingExtra, SamplesError
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.samples import RawSamples, Samples, UnreadableItem, read, read_raw
from corewise.samples.audio import open_audio
from corewise.samples.folders import list_images, read_folder
from corewise.samples.image_files import SIZE_KEY, image_suffixes, normalize_image, open_image
from corewise.samples.image_geometry import input_sides, placement
from corewise.samples.image_limits import TooManyPixels
from corewise.samples.images import ImageReader, image_array
from corewise.serving import files as serving_files
from corewise.serving import images as serving_images
from corewise.serving.protocol import ProtocolError

TINY = Preprocess(resize=8, crop=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
PLAIN = Preprocess(resize=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1))
GREY = Preprocess(resize=8, crop=8, mean=(0,), std=(1,))

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
"""An 8-bit grey image, from black to white."""


def write_image(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SamplesError) as caught:
        function(*args, **kwargs)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def labels_of(samples: Samples | RawSamples) -> list[Any]:
    assert samples.labels is not None
    return list(samples.labels.tolist())


# Which files of a folder are samples


def make(folder: Path, names: list[str]) -> Path:
    """Files of these names: images, and a line of text where the name says so."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif path.suffix in (".txt", ".csv", ".md"):
            path.write_text("no image")
        else:
            path.write_bytes(encoded(Image.new("RGB", (10, 8)), "PNG"))
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/1.png", "cat/2.png", "dog/1.png"], [("cat/1.png", 0), ("cat/2.png", 0), ("dog/1.png", 1)]),
        (["10/a.png", "2/a.png", "1/a.png"], [("1/a.png", 0), ("10/a.png", 1), ("2/a.png", 2)]),
        ([".ipynb_checkpoints/a.png", "cat/a.png", "dog/a.png"], [("cat/a.png", 0), ("dog/a.png", 1)]),
        (["__MACOSX/._a.png", "cat/a.png", "dog/a.png"], [("cat/a.png", 0), ("dog/a.png", 1)]),
        (["cat/.hidden.png", "cat/a.png", "dog/.git/a.png", "dog/a.png"], [("cat/a.png", 0), ("dog/a.png", 1)]),
        (["cat/2024/may/a.png", "cat/z.png", "dog/2024/a.png"],
         [("cat/z.png", 0), ("cat/2024/may/a.png", 0), ("dog/2024/a.png", 1)]),
        (["b.png", "a.png", ".c.png", "readme.txt"], [("a.png", None), ("b.png", None)]),
        (["a.png", "empty/", "texts/readme.txt"], [("a.png", None)]),
        (["cat/naïve фото #1 %20.png", "写真: x/a.png"], [("cat/naïve фото #1 %20.png", 0), ("写真: x/a.png", 1)]),
        (["cat/a.PNG", "cat/b.JPEG", "cat/c.jfif", "dog/d.webp"],
         [("cat/a.PNG", 0), ("cat/b.JPEG", 0), ("cat/c.jfif", 0), ("dog/d.webp", 1)]),
    ],
)  # fmt: skip
def test_folders_are_read_as_torchvision_does(tmp_path: Path, names: list[str], expected: list[Any]) -> None:
    samples = read(str(make(tmp_path, names)), TINY)
    labels = [None] * len(samples) if samples.labels is None else samples.labels.tolist()
    assert list(zip(samples.names or (), labels, strict=True)) == expected
    assert samples.labels is None or samples.labels.dtype == np.int64


def test_images_are_listed_by_file_folder_and_pattern(tmp_path: Path) -> None:
    make(tmp_path, ["b/2.png", "b/1.png", "b/c/3.png", "b/notes.txt", "b/.hidden.png", "a.png"])

    def listed(*places: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in list_images([tmp_path / place for place in places])]

    assert listed("b", "a.png") == ["b/1.png", "b/2.png", "b/c/3.png", "a.png"]
    assert listed("b/*.png") == ["b/1.png", "b/2.png"]
    assert listed("b/**/*.png") == ["b/1.png", "b/2.png", "b/c/3.png"]
    (tmp_path / "empty").mkdir()
    assert "there are no images in" in error_of(list_images, [tmp_path / "empty"])
    assert "there is no file" in error_of(list_images, [tmp_path / "*.jpg"])


def test_an_empty_class_is_an_error_or_keeps_its_number(tmp_path: Path) -> None:
    make(tmp_path, ["0/a.png", "1/", "2/notes.txt", "3/a.png"])
    assert "the class folder" in error_of(read, str(tmp_path))
    assert f"{tmp_path / '1'} is empty; remove it if the model has no such class" in error_of(read, str(tmp_path))
    (tmp_path / "1").rmdir()
    assert f"{tmp_path / '2'} has no images: it holds 1 .txt; remove it if" in error_of(read, str(tmp_path))
    (tmp_path / "1").mkdir()
    assert labels_of(read(str(tmp_path), TINY, allow_empty=True)) == [0, 3]


def test_class_folders_whose_numbers_are_not_their_classes_are_told(tmp_path: Path) -> None:
    samples = read(str(make(tmp_path, [f"{number}/a.png" for number in range(11)])), TINY)
    assert "10 is class 2" in samples.notes[0]
    assert labels_of(samples) == list(range(11))
    assert read(str(make(tmp_path / "few", [f"{number}/a.png" for number in range(4)])), TINY).notes == ()


MANY_PARTS = tuple(f"train{number}" for number in range(9))


@pytest.mark.parametrize(
    "parts",
    [("train", "val"), ("test_set", "training_set"), ("train2017", "annotations/"), ("images", "masks"), MANY_PARTS],
    ids=lambda parts: "-".join(parts[:2]),
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path, parts: tuple[str, str]) -> None:
    make(tmp_path, [part if part[-1] == "/" else f"{part}/{kind}/a.png" for part in parts for kind in ("cat", "dog")])
    filled = [part for part in parts if part[-1] != "/"]
    assert (
        f"the folders {', '.join(filled[:3])}{' and 6 more' * (len(filled) > 3)} of {tmp_path} look like parts"
        in error_of(read, str(tmp_path))
    )
    assert labels_of(read(str(tmp_path / parts[0]), TINY)) == [0, 1]


def test_classes_may_be_called_as_parts_are(tmp_path: Path) -> None:
    assert labels_of(read(str(make(tmp_path, ["bus/a.png", "train/a.png", "val d'isere/a.png"])), TINY)) == [0, 1, 2]


def test_a_named_pipe_is_set_aside_and_not_waited_for(tmp_path: Path) -> None:
    make(tmp_path, [f"{number}.png" for number in range(20)])
    os.mkfifo(tmp_path / "pipe.png")
    samples = read(str(tmp_path), TINY)
    assert len(samples) == 20
    assert "pipe.png is not a regular file" in samples.notes[0]


def test_circular_links_end(tmp_path: Path) -> None:
    make(tmp_path, ["cat/a.png", "dog/a.png"])
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "linked.png").symlink_to(tmp_path / "dog" / "a.png")
    assert read_raw(str(tmp_path)).names == ["cat/a.png", "cat/linked.png", "dog/a.png"]


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a.png", "notes.txt", "more.txt", "b.md"], "3 files are not images that can be read here: 2 .txt, 1 .md"),
        (["cat/a.png", "dog/a.png", "dog/x.txt", "dog/makefile"], "2 files are not images"),
    ],
)
def test_other_files_are_counted(tmp_path: Path, names: list[str], note: str) -> None:
    assert read(str(make(tmp_path, names)), TINY).notes[0].startswith(note)


def test_heic_without_its_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffixes = image_suffixes() - {".heic"}
    monkeypatch.setattr("corewise.samples.folders.image_suffixes", lambda: suffixes)
    samples = read(str(make(tmp_path, ["a.png", "b.heic"])), TINY)
    assert len(samples) == 1
    assert samples.notes == ("1 files are not images that can be read here: 1 .heic; pip install 'corewise[heic]' "
                             "reads .heic",)  # fmt: skip
    make(tmp_path / "only", ["b.heic"])
    assert "it holds 1 .heic" in error_of(read, str(tmp_path / "only"))


@pytest.mark.parametrize(
    ("names", "table", "message"),
    [
        ([], None, "there are no images in"),
        (["a.txt"], None, "there are no images in"),
        (["a.txt"], None, "it holds 1 .txt"),
        (["images/a.png"], None, "has the single class folder images; give"),
        (["a.png", "cat/a.png"], None, "has images beside the folder cat"),
        (["a.png", "b.wav"], None, "there are both images and recordings in"),
        (["a.png"], "file,label\nb.png,1\n", "labels.csv line 2: there is no file 'b.png'"),
        (["a.png"], "file,label\na.png,cat\n", "labels.csv line 2: the label 'cat' is not a number"),
        (["a.png"], "file,label\na.png,nan\n", "the label 'nan' is not a number"),
        (["a.png"], "file,label\na.png,1_0\n", "the label '1_0' is not a number"),
        (["a.png"], "file,label\n\na.png,cat\n", "labels.csv line 3: the label 'cat' is not a number"),
        (["a.png"], "file,label\na.png,1\n\na.png,2\n", "labels.csv line 4: 'a.png' has a label in line 2 already"),
        (["a.png"], "file,label\na.png,1\na.png\n", "labels.csv line 3: the label '' is not a number"),
        (["a.png"], "name,class\na.png,1\n", "labels.csv has the columns name, class; name two of them"),
        (["a.png"], "file,label\n", "there are no samples in"),
        (["a.png"], "", "there are no samples in"),
        (["a.png"], "file,label\n\xff\xfe,1\n", "labels.csv cannot be read"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, names: list[str], table: str | None, message: str) -> None:
    make(tmp_path, names)
    if table is not None:
        (tmp_path / "labels.csv").write_bytes(table.encode("latin-1"))
    assert message in error_of(read, str(tmp_path), TINY)


def test_labels_csv(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "red.jpg")
    write_image(tmp_path / "green.png", (0, 255, 0))
    (tmp_path / "labels.csv").write_text("author,file,label\nme,images/red.jpg,7\nyou,green.png, 2\n")
    samples = read(str(tmp_path), TINY)
    assert labels_of(samples) == [7, 2]
    assert samples.names == ["images/red.jpg", "green.png"]
    assert samples.rows[1][0][:, 0, 0].tolist() == [-2, 2, -2]
    assert samples.preprocess == TINY
    (tmp_path / "labels.csv").write_text("file,label\nimages/red.jpg,31.5\ngreen.png,-2\n")
    assert labels_of(read(str(tmp_path), TINY)) == [31.5, -2]


# Samples that cannot be used, and draws


def test_a_few_broken_images_are_set_aside_and_named(tmp_path: Path) -> None:
    for number in range(40):
        write_image(tmp_path / ("cat" if number < 20 else "dog") / f"{number:02}.png")
    whole = (tmp_path / "dog" / "30.png").read_bytes()
    (tmp_path / "cat" / "05.png").write_bytes(b"")
    (tmp_path / "dog" / "25.png").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tmp_path / "dog" / "26.png").write_bytes(whole[:45])
    (tmp_path / "dog" / "27.png").unlink()
    (tmp_path / "dog" / "27.png").symlink_to("/nowhere.png")
    samples = read(str(tmp_path), TINY)
    assert samples.notes == (
        "4 of 40 images were set aside: cat/05.png is empty, dog/25.png is an HTML page, dog/26.png is cut off "
        "and 1 more",
    )
    assert len(samples) == 36
    assert labels_of(samples) == [0] * 19 + [1] * 17
    assert samples.describe(5) == "sample 6 (cat/06.png)"
    (tmp_path / "dog" / "28.png").write_bytes(b"no image")
    assert "5 of 40 images in" in error_of(read, str(tmp_path), TINY)


def random_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"no image at all", "is not an image that Pillow opens"),
        (b"\n<html>404", "is an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that Pillow opens"),
        (encoded(random_image(), "PNG")[:500], "is cut off"),
        (encoded(random_image(), "JPEG")[:-800], "is cut off"),
        (encoded(random_image(), "WEBP")[:500], "cannot be decoded"),
        (encoded(random_image(), "BMP")[:500], "is cut off"),
    ],
)
def test_undecodable_images_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    assert f"1 of 1 images in {tmp_path} cannot be used: broken.png {reason}" in error_of(read, str(tmp_path), TINY)
    for source in (content, path):
        with pytest.raises(UnreadableItem, match=reason):
            open_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_read_or_named() -> None:
    """Whatever a flipped or a missing byte does to Pillow, it ends as an image or as a reason."""
    random = np.random.default_rng(0)
    files = [encoded(random_image().convert(mode), kind) for mode in ("RGB", "L") for kind in
             ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "AVIF", "JPEG2000", "TGA", "ICO", "PPM")]  # fmt: skip
    outcomes = {"read": 0, "named": 0}
    for trial in range(600):
        damaged = bytearray(files[trial % len(files)])
        for place in random.integers(0, min(400, len(damaged)), 3):
            damaged[place] = random.integers(256)
        try:
            image_array(open_image(bytes(damaged[: random.integers(len(damaged))] if trial % 3 else damaged)), TINY)
            outcomes["read"] += 1
        except UnreadableItem:
            outcomes["named"] += 1
    assert min(outcomes.values()) > 50


def test_max_samples_are_drawn_with_the_seed_and_only_they_are_opened(tmp_path: Path) -> None:
    for number in range(60):
        write_image(tmp_path / f"{number:02}.png", (number, 0, 0))
    everything = read(str(tmp_path), PLAIN)
    drawn = read(str(tmp_path), PLAIN, max_samples=10, seed=3)
    assert len(drawn) == 10
    assert drawn.notes == ("10 of 60 images were drawn with seed 3",)
    assert drawn.numbers is not None
    for row, number in enumerate(drawn.numbers):
        np.testing.assert_array_equal(drawn.rows[row][0], everything.rows[number][0])
    assert read(str(tmp_path), PLAIN, max_samples=10, seed=3).fingerprint == drawn.fingerprint
    assert read(str(tmp_path), PLAIN, max_samples=10, seed=4).fingerprint != drawn.fingerprint
    assert read(str(tmp_path), PLAIN, max_samples=60).fingerprint == everything.fingerprint
    for number in set(range(60)) - set(drawn.numbers.tolist()):
        (tmp_path / f"{number:02}.png").write_bytes(b"broken")
    assert read(str(tmp_path), PLAIN, max_samples=10, seed=3).fingerprint == drawn.fingerprint
    assert "give at least 2" in error_of(read, str(tmp_path), PLAIN, max_samples=1)
    assert "max_samples is 0" in error_of(read, str(tmp_path), PLAIN, max_samples=0)


def test_a_draw_of_a_stream_gives_each_the_same_chance() -> None:
    from corewise.samples.drawing import draw

    counts = np.zeros(10)
    for seed in range(2000):
        chosen, _ = draw(10, 3, seed)
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert (abs(counts - 600) < 100).all()


MEMORY = """
import sys
from pathlib import Path
from corewise.records.report import Preprocess
from corewise.samples import read
most = None if sys.argv[2] == "None" else int(sys.argv[2])
samples = read(sys.argv[1], Preprocess(resize=224, crop=224), max_samples=most, spool=Path(sys.argv[3]))
samples.fingerprint
print(len(samples), open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak_kib(folder: Path, most: int | None, spool: Path) -> int:
    command = [sys.executable, "-c", MEMORY, str(folder), str(most), str(spool)]
    count, kib = subprocess.check_output(command, text=True).split()
    assert int(count) == most or most is None
    assert not list(spool.iterdir())
    return int(kib)


def test_a_large_folder_needs_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    few, many, spool = tmp_path / "few", tmp_path / "many", tmp_path / "spool"
    spool.mkdir()
    write_image(few / "0.png", size=(300, 240))
    for number in range(1, 60):
        os.link(few / "0.png", few / f"{number}.png")
    many.mkdir()
    for number in range(8_000):
        os.link(few / "0.png", many / f"{number}.png")
    small, large = peak_kib(few, None, spool), peak_kib(many, 200, spool)
    assert large < small + 50_000, "8,000 names are a few MB; 200 decoded photos are 120 MB, and wait in a file"


# Decoding


@pytest.mark.parametrize(
    ("kind", "suffix", "options"),
    [
        ("PNG", ".png", {}),
        ("TIFF", ".tif", {}),
        ("BMP", ".bmp", {}),
        ("GIF", ".gif", {}),
        ("PPM", ".pgm", {}),
        ("TGA", ".tga", {}),
        ("WEBP", ".webp", {"lossless": True}),
        ("JPEG2000", ".jp2", {}),
        ("JPEG", ".jfif", {"quality": 100, "subsampling": 0}),
        ("AVIF", ".avif", {"quality": 100}),
        ("HEIF", ".heic", {"quality": -1}),
    ],
)
def test_all_formats_give_the_same_pixels(tmp_path: Path, kind: str, suffix: str, options: dict[str, Any]) -> None:
    pixels = np.kron(RAMP, np.ones((8, 8), np.uint8))
    picture = Image.fromarray(pixels)
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
        picture = picture.convert("RGB")
    for name in ("a", "b"):
        (tmp_path / f"{name}{suffix}").write_bytes(encoded(picture, kind, **options))
    samples = read(str(tmp_path), Preprocess(resize=64, crop=64, mean=(0,), std=(1,)))
    assert len(samples) == 2
    np.testing.assert_allclose(samples.rows[0][0][0], pixels / 255, atol=0.02)


def sixteen(mode: str) -> bytes:
    values = RAMP.astype(np.uint16) * 257
    if mode == "I;16B":
        return encoded(Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()), "TIFF")
    return encoded(Image.fromarray(values), "PNG")


DEEP: dict[str, Callable[[], bytes]] = {
    "uint16 PNG": lambda: sixteen("I;16"),
    "uint16 TIFF, big endian": lambda: sixteen("I;16B"),
    "uint16 PGM": lambda: encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PPM"),
    "int32 TIFF of 8 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "int32 TIFF of 16 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
    "int32 TIFF of 30 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.int32) * 4_000_000), "TIFF"),
    "int32 TIFF with negative values": lambda: encoded(Image.fromarray(RAMP.astype(np.int32) * 30 - 3000), "TIFF"),
    "float TIFF to 1": lambda: encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "float TIFF to 255": lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float TIFF to 65535": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) * 257), "TIFF"),
    "float TIFF with negative values": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) - 100), "TIFF"),
    "float TIFF beyond": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) * 1e9), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_scaled_by_their_range(kind: str) -> None:
    image = open_image(DEEP[kind]())
    assert image.mode == "L"
    np.testing.assert_allclose(np.asarray(image), RAMP, atol=1)
    np.testing.assert_allclose(image_array(image, PLAIN), np.broadcast_to(RAMP / 255, (3, 8, 8)), atol=0.005)


def test_a_deep_image_of_one_value_and_one_with_nan() -> None:
    flat = encoded(Image.fromarray(np.full((4, 4), 1e7, np.float32)), "TIFF")
    assert len(np.unique(np.asarray(open_image(flat)))) == 1
    holes = np.full((4, 4), 0.5, np.float32)
    holes[1, 2] = np.nan
    with pytest.raises(UnreadableItem, match="NaN or infinite pixels"):
        open_image(encoded(Image.fromarray(holes), "TIFF"))


def test_twelve_bits_in_sixteen_are_named(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(RAMP.astype(np.uint16) * 16).save(tmp_path / f"{number}.png")
    samples = read(str(tmp_path), GREY)
    assert "3 images of 16 bits use 12 of them at most and become almost black" in samples.notes[0]


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_grey_or_rgb(mode: str) -> None:
    source = Image.fromarray(np.stack([RAMP, 255 - RAMP, RAMP], 2))
    for step in {"La": ("LA", "La"), "PA": ("P", "PA"), "RGBa": ("RGBA", "RGBa"), "LAB": ()}.get(mode, (mode,)):
        source = source.convert(step)
    image = normalize_image(source)
    assert image.mode == ("L" if mode in ("1", "L", "LA", "La") else "RGB")
    assert image_array(source if mode == "LAB" else image, PLAIN).shape == (3, 8, 8)
    assert image_array(image, GREY).shape == (1, 8, 8)


def test_transparency_is_dropped_as_torchvision_does() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    content = encoded(palette, "PNG", transparency=bytes([255, 0]))
    assert np.asarray(open_image(content))[0, 0].tolist() == [200, 100, 50]
    clear = encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG")
    assert np.asarray(open_image(clear))[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    pixel = np.asarray(open_image(content).convert("RGB"))[4, 4]
    np.testing.assert_allclose(pixel, (250, 0, 0), atol=8)


QUARTERS = np.kron(np.array([[10, 80], [160, 240]], np.uint8), np.ones((8, 8), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    turns = {
        1: lambda image: image,
        2: lambda image: image[:, ::-1],
        3: lambda image: image[::-1, ::-1],
        4: lambda image: image[::-1],
        5: lambda image: image.T,
        6: lambda image: np.rot90(image, 1),
        7: lambda image: np.rot90(image, 2).T,
        8: lambda image: np.rot90(image, -1),
    }  # what a camera stores for this orientation
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](QUARTERS))).convert("RGB")
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    content = encoded(stored, kind, exif=exif, **options)
    opened = open_image(content)
    assert opened.info[SIZE_KEY] == opened.size
    np.testing.assert_allclose(np.asarray(opened.convert("L")), QUARTERS, atol=6)
    in_memory = Image.open(io.BytesIO(content))
    np.testing.assert_allclose(np.asarray(normalize_image(in_memory).convert("L")), QUARTERS, atol=6)


def test_broken_exif_data_leaves_an_image_as_it_is_without_a_warning(tmp_path: Path) -> None:
    content = encoded(Image.fromarray(QUARTERS), "JPEG", quality=100, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(content)
    samples = read(str(tmp_path), Preprocess(resize=16, crop=16, mean=(0,), std=(1,)))
    np.testing.assert_allclose(samples.rows[0][0][0], QUARTERS / 255, atol=0.03)


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (1, 1), (2, 4000), (70, 3), (3, 3)])
def test_odd_sizes_are_sane(size: tuple[int, int]) -> None:
    """Resized as a whole, 30000x1 at 256 would be 7,680,000 pixels long: 2 GB."""
    content = encoded(Image.new("RGB", size, (200, 100, 50)), "PNG")
    array = image_array(open_image(content), Preprocess(mean=(0, 0, 0), std=(1, 1, 1)))
    np.testing.assert_allclose(array, np.broadcast_to(np.array([200, 100, 50])[:, None, None] / 255, (3, 224, 224)),
                               atol=0.01)  # fmt: skip


def test_a_long_image_shows_its_middle() -> None:
    pixels = np.zeros((4, 4000, 3), np.uint8)
    pixels[:, 1990:2010] = 255
    array = image_array(Image.fromarray(pixels), PLAIN)
    assert array.min() == 1


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    content = encoded(Image.new("L", (50, 40)), "PNG")
    assert open_image(content, max_pixels=2000).size == (50, 40)
    with pytest.raises(TooManyPixels, match="the body has 50x40 pixels, over 1,999"):
        open_image(content, "the body", max_pixels=1999)
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    claiming = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with pytest.raises(TooManyPixels):
        open_image(claiming)


def test_what_hides_its_pixels_is_not_opened_where_they_are_limited() -> None:
    content = encoded(Image.new("RGB", (16, 16)), "ICO")
    assert open_image(content).size == (16, 16)
    with pytest.raises(UnreadableItem, match="is an ICO file, whose pixels cannot be counted before they are decoded"):
        open_image(content, max_pixels=1000)


@pytest.mark.parametrize(("orientation", "size"), [(3, (1007, 1001)), (6, (1001, 1007))])
def test_a_nearly_square_photo_that_is_turned_says_its_upright_size(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.new("RGB", (1007, 1001)), "JPEG", exif=exif)
    small = open_image(content, preprocess=Preprocess(resize=32, crop=32, decode="scaled"))
    assert (small.size, small.info[SIZE_KEY]) == ((126, 126), size)


def test_images_are_resized_cropped_and_normalised_as_the_formulas_say(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    preprocess = Preprocess(resize=20, crop=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bicubic")
    array = read(str(tmp_path), preprocess).rows[0][0]
    resized = np.asarray(Image.fromarray(pixels).resize((33, 20), Image.Resampling.BICUBIC))
    cropped = resized[5:15, 12:22] / 255  # round(11.5) is 12
    np.testing.assert_allclose(array, ((cropped - preprocess.mean) / preprocess.std).transpose(2, 0, 1), atol=1e-5)
    assert array.dtype == np.float32


def test_grey_modes_and_sizes_are_handled(tmp_path: Path) -> None:
    Image.new("L", (5, 20), 255).save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 5), (255, 255, 255, 0)).save(tmp_path / "transparent.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert {row[0].shape for row in read(str(tmp_path), TINY).rows} == {(3, 4, 4)}
    grey = read(str(tmp_path), Preprocess(resize=6, crop=6, mean=(0,), std=(1,)))
    assert {row[0].shape for row in grey.rows} == {(1, 6, 6)}
    assert grey.rows[0][0].max() == 1


def darker(image: Any) -> Any:
    import torch

    return torch.tensor(np.asarray(image.resize((2, 2))), dtype=torch.float32).permute(2, 0, 1) / 510


def test_a_preprocess_function_takes_the_image(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", (255, 0, 51))
    samples = read(str(tmp_path / "images"), TINY, darker)
    assert samples.rows[0][0][:, 0, 0].tolist() == pytest.approx([0.5, 0, 0.1])
    assert samples.preprocess == Preprocess(function=f"{__name__}:darker")
    (tmp_path / "own.py").write_text("def bad(image):\n    raise ValueError(f'mode {image.mode}')\n")
    message = error_of(read, str(tmp_path / "images"), TINY, f"{tmp_path}/own.py:bad")
    assert "preprocess function failed on" in message
    assert f"a.png: ValueError: mode RGB ({tmp_path}/own.py:2)" in message
    with pytest.raises(SamplesError, match="which is not available; send tensors"):
        image_array(Image.new("RGB", (8, 8)), Preprocess(function="own:bad"))


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(resize=4, crop=8), Preprocess(crop=0), Preprocess(mean=(0.5, 0.5)), Preprocess(std=(0.0, 1.0, 1.0))],
)
def test_a_senseless_preprocess_is_refused(tmp_path: Path, preprocess: Preprocess) -> None:
    write_image(tmp_path / "a.png")
    assert "fit" in error_of(read, str(tmp_path), preprocess)


def test_one_reader_makes_the_same_of_a_path_its_content_a_pil_image_and_its_pixels(tmp_path: Path) -> None:
    picture = random_image()
    picture.save(tmp_path / "a.png")
    reader = ImageReader(TINY)
    forms = [tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), picture, np.asarray(picture)]
    for form in forms:
        np.testing.assert_array_equal(reader(form), read(str(tmp_path), TINY).rows[0][0])
    inputs = reader({"pixels": np.asarray(picture), "scale": np.ones(2, np.float32)})
    np.testing.assert_array_equal(inputs["pixels"], reader(picture))
    assert inputs["scale"].tolist() == [1, 1]


def test_pillow_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"reading images needs the package 'pillow'; pip install"):
        open_image(b"")


# Recordings


def test_a_folder_of_recordings_is_raw_until_it_is_told_how(tmp_path: Path) -> None:
    for number, (name, rate) in enumerate([("a.wav", 16_000), ("b.flac", 8000), ("c.wav", 16_000)]):
        soundfile.write(tmp_path / name, np.full((400, 2), number / 4, np.float32), rate)
    raw = read_raw(str(tmp_path))
    assert isinstance(raw, RawSamples)
    assert (raw.kind, raw.names) == ("audio", ["a.wav", "b.flac", "c.wav"])
    assert "there are recordings in" in error_of(read, str(tmp_path))

    def mono(path: Path) -> np.ndarray:
        recording = open_audio(path)
        if recording.rate_hz != 16_000:
            raise UnreadableItem(str(path), f"has {recording.rate_hz} frames per second, the model takes 16,000")
        return recording.samples.mean(0)

    assert "1 of 3 recordings in" in error_of(read, str(tmp_path), tensorize=mono)
    (tmp_path / "b.flac").unlink()
    samples = read(str(tmp_path), tensorize=mono)
    assert [row[0].shape for row in samples.rows] == [(400,), (400,)]
    np.testing.assert_allclose(samples.rows[1][0], 0.5, atol=1e-3)


def test_recordings_in_class_folders_have_labels(tmp_path: Path) -> None:
    for name in ("no/a.wav", "yes/a.wav", "yes/b.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(10), 8000)
    assert labels_of(read_raw(str(tmp_path))) == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"RIFF nothing", "is cut off"), ("cut", "is cut off"), (b"ID", "cannot be decoded"),
     ("none", "has no frames")],
)  # fmt: skip
def test_broken_recordings_are_named(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(0 if content == "none" else 4000), 8000)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UnreadableItem, match=reason):
        open_audio(path)
    with pytest.raises(UnreadableItem, match="cannot be opened"):
        open_audio(tmp_path / "missing.wav")


def test_reading_a_folder_opens_nothing(tmp_path: Path) -> None:
    make(tmp_path, ["cat/a.png", "dog/b.png"])
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    assert len(read_folder(tmp_path)) == 2


# Real data


def test_real_photos(data_folder: Path) -> None:
    samples = read(str(data_folder / "imagenet-photos"), max_samples=60)
    assert len(samples) == 60
    assert set(labels_of(samples)) <= set(range(1000))
    assert {row[0].shape for row in samples.rows} == {(3, 224, 224)}
    assert abs(np.mean([row[0].mean() for row in samples.rows])) < 0.3


# The server


def test_the_server_decodes_as_samples_are_decoded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "turned.jpg": encoded(random_image(), "JPEG", exif=exif),
        "deep.png": sixteen("I;16"),
        "float.tiff": DEEP["float TIFF to 1"](),
        "animated.gif": encoded(random_image(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
        "cmyk.jpg": encoded(random_image().convert("CMYK"), "JPEG"),
        "long.png": encoded(Image.new("RGB", (1, 3000), (9, 8, 7)), "PNG"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    samples = read(str(tmp_path), TINY)
    served: Any = SimpleNamespace(name="m", manifest=SimpleNamespace(preprocess=TINY), outputs=(), photos=None)
    assert samples.names == sorted(files)
    for row, name in enumerate(sorted(files)):
        np.testing.assert_array_equal(serving_images.batch([files[name]], served).array[0], samples.rows[row][0])
    wide = encoded(Image.new("1", (10_000, 6_000)), "PNG")
    for content, status in ((b"", 415), (b"<html>", 415), (files["turned.jpg"][:300], 415), (wide, 413)):
        with pytest.raises(ProtocolError) as caught:
            serving_images.batch([content], served)
        assert caught.value.status == status


def test_the_server_takes_photos_of_one_shape_together_where_they_keep_it() -> None:
    how = Preprocess(fit="keep", resize=24, crop=24, longest=40)
    served: Any = SimpleNamespace(name="m", manifest=SimpleNamespace(preprocess=how), outputs=(), photos=None)
    wide, high = (encoded(Image.new("RGB", size), "PNG") for size in ((80, 60), (60, 80)))
    made = serving_images.batch([wide, wide], served)
    assert made.array.shape == (2, 3, 24, 32)
    assert made.sizes == ((80, 60), (80, 60))
    with pytest.raises(ProtocolError, match="the images differ in shape when prepared; send one image per request"):
        serving_images.batch([wide, high], served)
    served.photos = ImagePipeline(task="boxes", preprocess=how, shape=(3, 24, None))
    assert serving_images.batch([wide], served).array.shape == (1, 3, 24, 32)
    assert replace(served.photos, preprocess=replace(how, dtype="uint8")).takes((24, 32, 3))
    with pytest.raises(ProtocolError, match=r"takes photos of shape \(3, 24, None\) when prepared; send one of that"):
        serving_images.batch([high], served)


def test_a_form_of_many_empty_parts_is_refused_before_they_are_read() -> None:
    body = b"--b\r\n\r\n\r\n" * 1000 + b"--b--\r\n"
    with pytest.raises(ProtocolError, match="more than 64 parts") as caught:
        serving_files.content(body, "multipart/form-data; boundary=b", "image")
    assert caught.value.status == 413


@pytest.mark.parametrize("body", [b'{"image": 5}', b'{"picture": "AAAA"}', b"[]", b"{", b'{"a":' + b"[" * 100_000])
def test_json_without_an_image_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"the body (has no image|is not a JSON object)"):
        serving_files.content(body, "application/json", "image")


def test_what_else_json_has_is_skipped() -> None:
    body = b'{"note": [[], {"a": [1]}], "image": "AAAA", "b": null}'
    assert serving_files.content(body, "application/json", "image") == bytes(3)


@pytest.mark.parametrize(
    ("size", "multiple", "sides"),
    [((120, 90), 1, (106, 80)), ((90, 120), 1, (80, 106)), ((400, 100), 1, (133, 33)), ((80, 100), 1, (80, 100)),
     ((120, 90), 16, (96, 80)), ((400, 100), 16, (128, 32)), ((500, 2), 16, (128, 16)), ((500, 1), 1, (133, 1))],
)  # fmt: skip
def test_a_photo_may_keep_its_shape(size: tuple[int, int], multiple: int, sides: tuple[int, int]) -> None:
    how = Preprocess(fit="keep", resize=80, longest=133, multiple=multiple, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = np.tile(np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None], (size[1], 1, 3))
    made = image_array(Image.fromarray(pixels), how)
    assert made.shape == (3, *sides[::-1])
    assert made[0, 0, 0] < 0.05
    assert made[0, 0, -1] > 0.95
    assert input_sides(size, how) == sides


@pytest.mark.parametrize("size", [(400, 300), (210, 600), (4000, 100)])
@pytest.mark.parametrize("fit", ["crop", "squash", "letterbox", "keep"])
def test_a_place_in_the_photo_is_found_in_the_input(size: tuple[int, int], fit: Any) -> None:
    how = Preprocess(resize=72, crop=64, mean=(0.0,), std=(1.0,), fit=fit, fill=0)
    width, height = size
    x, y, radius = 0.502 * width, 0.45 * height, min(size) // 10
    pixels = np.zeros((height, width), np.uint8)
    pixels[max(0, round(y) - radius) : round(y) + radius, round(x) - radius : round(x) + radius] = 255
    shown = image_array(Image.fromarray(pixels), how)[0].astype(np.float64)
    rows, columns = np.indices(shown.shape)
    middle = [(one * shown).sum() / shown.sum() + 0.5 for one in (columns, rows)]
    place = placement(size, how)
    assert place.left + place.across * x == pytest.approx(middle[0], abs=0.75)
    assert place.top + place.down * y == pytest.approx(middle[1], abs=0.75)
