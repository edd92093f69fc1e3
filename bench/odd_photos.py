"""Ten thousand files, of which 1 % are odd: what samples, ``predict`` and the server make of each.

    python -m bench odd_photos ARTIFACT [--files 10000]

Most files are small JPEGs of ``imagenet-photos``. The odd ones are photos in other forms (CMYK, 16 bits, turned by
EXIF, animated, transparent and so on) and files that are no image, or none that is whole: cut off, huge by their
headers, empty, web pages, text, and some that are made to take long or to take memory. A photo in another form must be
answered as the same photo in a plain form; whatever else must be set aside with its reason, and all three must agree.
Writes odd_photos.json.
"""

import argparse
import io
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import local
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bench.harness import DATA, ROOT, machine_facts, say, write_results
from bench.servers import Server
from bench.wire import MODEL
from corewise.records.report import Preprocess
from corewise.samples import read

SIDE = 96
ODD_EACH = 100
"""One file in this many is odd."""
NEAR = 0.1
"""How far the probability of a photo in another form may be from that of the plain one."""
SENDERS = 4

Make = Callable[[Image.Image], bytes]


class Kind(NamedTuple):
    """A form of file, and the reason for which it is set aside, in part; empty for a photo."""

    suffix: str
    make: Make
    reason: str = ""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The content of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int = 6) -> bytes:
    """A photo on its side whose EXIF data says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def damaged(image: Image.Image) -> bytes:
    """The same, with a resolution that is text, so that Pillow cannot write the EXIF data again."""
    orientation, resolution = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")
    exif = struct.pack("<2sHIH", b"II", 42, 8, 2) + orientation + resolution + bytes(4)
    return saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=b"Exif\0\0" + exif)


def deep(image: Image.Image) -> bytes:
    """16 bits a pixel, grey."""
    return saved(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG")


def animated(image: Image.Image, kind: str) -> bytes:
    """The photo, then its negative."""
    negative = Image.eval(image, lambda value: 255 - value)
    return saved(image, kind, save_all=True, append_images=[negative], duration=100, lossless=True)


def huge_bmp(image: Image.Image) -> bytes:
    """A header of 1.6 gigapixels."""
    content = bytearray(saved(image, "BMP"))
    content[18:26] = np.array([40_000, 40_000], "<i4").tobytes()
    return bytes(content)


def huge_png(image: Image.Image) -> bytes:
    """The same in PNG, with a sound checksum."""
    content = bytearray(saved(image, "PNG"))
    content[16:24] = np.array([60_000, 60_000], ">u4").tobytes()
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def cut(kind: str) -> Make:
    """The first half of a file."""

    def make(image: Image.Image) -> bytes:
        content = saved(image, kind)
        return content[: len(content) // 2]

    return make


def of_many_parts(image: Image.Image) -> bytes:
    """A JPEG with a header of 20,000 empty parts."""
    content = saved(image, "JPEG")
    return content[:2] + b"\xff\xe5\0\2" * 20_000 + content[2:]


def of_many_scans(image: Image.Image) -> bytes:
    """A JPEG whose last pass is there 1,000 times."""
    content = saved(image, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 1000 + b"\xff\xd9"


def of_a_large_tile(image: Image.Image) -> bytes:
    """A TIFF of 16 x 16 pixels in a tile of 3000 x 3000."""
    side, tile = 16, 3000
    data = zlib.compress(bytes(tile * tile), 1)
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 134, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


KINDS = {
    "CMYK JPEG": Kind("jpg", lambda image: saved(image.convert("CMYK"), "JPEG", quality=95)),
    "CMYK TIFF": Kind("tiff", lambda image: saved(image.convert("CMYK"), "TIFF")),
    "16-bit PNG": Kind("png", deep),
    "turned JPEG": Kind("jpg", turned),
    "turned JPEG, damaged EXIF": Kind("jpg", damaged),
    "animated GIF": Kind("gif", lambda image: animated(image, "GIF")),
    "animated WebP": Kind("webp", lambda image: animated(image, "WEBP")),
    "animated PNG": Kind("png", lambda image: animated(image, "PNG")),
    "TIFF of two pages": Kind("tif", lambda image: animated(image, "TIFF")),
    "AVIF": Kind("avif", lambda image: saved(image, "AVIF", quality=95)),
    "palette with transparency": Kind("png", lambda image: saved(image.quantize(256), "PNG", transparency=0)),
    "grey with alpha": Kind("png", lambda image: saved(image.convert("LA"), "PNG")),
    "transparent PNG": Kind("png", lambda image: saved(image.convert("RGBA"), "PNG")),
    "progressive JPEG": Kind("jpeg", lambda image: saved(image, "JPEG", quality=95, progressive=True)),
    "PNG called .jpg": Kind("jpg", lambda image: saved(image, "PNG")),
    "cut JPEG": Kind("jpg", cut("JPEG"), "is cut off"),
    "cut PNG": Kind("png", cut("PNG"), "is cut off"),
    "huge BMP": Kind("bmp", huge_bmp, "pixels"),
    "huge PNG": Kind("png", huge_png, "pixels"),
    "JPEG of many parts": Kind("jpg", of_many_parts, "too many parts"),
    "JPEG of many scans": Kind("jpg", of_many_scans, "scans"),
    "TIFF of a large tile": Kind("tif", of_a_large_tile, "tiles"),
    "empty": Kind("jpg", lambda image: b"", "is empty"),
    "web page": Kind("jpg", lambda image: b"<!DOCTYPE html><html>404</html>", "is an HTML page"),
    "text": Kind("png", lambda image: b"sorry, no such photo", "is not an image"),
    "zip": Kind("jpg", lambda image: b"PK\x03\x04" + bytes(200), "is not an image"),
    "zeros": Kind("webp", lambda image: bytes(3000), "is not an image"),
}
GREY = ("16-bit PNG", "grey with alpha")
"""Their plain photo is grey too."""


def write(folder: Path, count: int) -> tuple[dict[str, str], dict[str, str]]:
    """Write the files; the kind of each odd one by its name, and the name of its plain photo."""
    sources = [Image.open(file).convert("RGB").resize((SIDE, SIDE)) for file in sorted(photo_files())]
    plain = [saved(image, "JPEG", quality=90) for image in sources]
    odd: dict[str, str] = {}
    same: dict[str, str] = {}
    names = list(KINDS)
    for number in range(count):
        image, name = sources[number % len(sources)], f"{number:05}"
        if number % ODD_EACH:
            (folder / f"{name}.jpg").write_bytes(plain[number % len(sources)])
            continue
        kind = names[number // ODD_EACH % len(names)]
        file = f"{name}.{KINDS[kind].suffix}"
        (folder / file).write_bytes(KINDS[kind].make(image))
        odd[file] = kind
        if not KINDS[kind].reason:
            # PNG beside it: what the form itself loses (the colours of GIF) counts.
            (folder / f"{name}-plain.png").write_bytes(saved(image.convert("L") if kind in GREY else image, "PNG"))
            same[file] = f"{name}-plain.png"
    return odd, same


def photo_files() -> list[Path]:
    """ImageNet's photos."""
    return list((DATA / "imagenet-photos").rglob("*.jpg"))


Answer = tuple[str, float] | str
"""A label and its probability, or a reason."""


def by_samples(folder: Path) -> dict[str, bool]:
    """Whether each file became a sample."""
    files = list(folder.iterdir())
    samples = read(str(folder), Preprocess(resize=36, crop=32), max_samples=len(files))  # by default some are drawn
    kept = {Path(name).name for name in samples.names or ()}
    return {path.name: path.name in kept for path in files}


def by_predict(artifact: Path, folder: Path, place: Path) -> dict[str, Answer]:
    """What ``corewise predict`` writes."""
    output = place / "labels.jsonl"
    command = ["predict", str(artifact), str(folder), "-o", str(output), "--top", "1"]
    subprocess.run([sys.executable, "-m", "corewise.cli", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    failed = output.with_name("labels.failed.jsonl")
    aside = [json.loads(line) for line in failed.read_text().splitlines()] if failed.exists() else []
    answered = {Path(line["input"]).name: (line["label"], line["probability"]) for line in lines}
    return answered | {Path(line["input"]).name: line["reason"] for line in aside}


def by_server(artifact: Path, files: Sequence[Path]) -> dict[str, Answer]:
    """What the server says of each file."""
    kept = local()
    with Server(artifact) as server, ThreadPoolExecutor(SENDERS) as pool:

        def ask(file: Path) -> Answer:
            if not hasattr(kept, "line"):
                kept.line = HTTPConnection("127.0.0.1", server.port, timeout=60)
            kept.line.request("POST", f"/v2/models/{MODEL}/classify?top=1", file.read_bytes())
            answer = kept.line.getresponse()
            told = json.loads(answer.read())
            if answer.status != 200:
                return f"{answer.status} {told['error']}"
            best = told["classes"][0]
            return best.get("label", str(best["class"])), best["probability"]

        return dict(zip([file.name for file in files], pool.map(ask, files), strict=True))


def same_answer(one: Answer, other: Answer) -> bool:
    """Whether two answers say the same: near ties may turn a label over."""
    if isinstance(one, str) or isinstance(other, str):
        return False
    return one[0] == other[0] or abs(one[1] - other[1]) < NEAR


def judged(
    names: Sequence[str], odd: dict[str, str], same: dict[str, str], answers: dict[str, Answer]
) -> dict[str, list[str]]:
    """What is wrong with one contender's answers, by kind."""
    wrong: dict[str, list[str]] = {}
    for name in names:
        kind, answer = odd.get(name, "photo"), answers.get(name, "nothing")
        reason = KINDS[kind].reason if kind in KINDS else ""
        if reason:
            good = isinstance(answer, str) and reason in answer
        elif name in same:
            good = same_answer(answer, answers.get(same[name], "nothing"))
        else:
            good = not isinstance(answer, str)
        if not good:
            wrong.setdefault(kind, []).append(f"{name}: {answer}")
    return wrong


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--files", type=int, default=10_000)


def main(options: argparse.Namespace) -> None:
    """Write the files, ask all three, and compare."""
    with tempfile.TemporaryDirectory(prefix="corewise-odd-") as name:
        place, folder = Path(name), Path(name) / "photos"
        folder.mkdir()
        odd, same = write(folder, options.files)
        files = sorted(folder.iterdir())
        names = [file.name for file in files]
        seconds, started_s = {}, perf_counter()
        sampled = by_samples(folder)
        seconds["samples"] = perf_counter() - started_s
        predicted = by_predict(options.artifact, folder, place)
        seconds["predict"] = perf_counter() - started_s - seconds["samples"]
        served = by_server(options.artifact, files)
        seconds["server"] = perf_counter() - started_s - sum(seconds.values())
    good = {name: not (name in odd and KINDS[odd[name]].reason) for name in names}
    answered = {"predict": predicted, "server": served}
    verdicts = {"samples": sampled} | {
        who: {name: not isinstance(each.get(name, ""), str) for name in names} for who, each in answered.items()
    }
    apart = [name for name in names if not same_answer(predicted[name], served[name]) and good[name]]
    record = {
        "files": len(names),
        "odd": dict(Counter(odd.values())),
        "set_aside": {who: sum(not kept for kept in each.values()) for who, each in verdicts.items()},
        "verdicts_unlike_expected": {who: [n for n in names if each[n] != good[n]] for who, each in verdicts.items()},
        "wrong": {who: judged(names, odd, same, each) for who, each in answered.items()},
        "predict_and_server_apart": apart,
        "reasons": {kind: [predicted[n], served[n]] for n, kind in odd.items() if KINDS[kind].reason},
        "seconds": seconds,
    }
    write_results(options.results / "odd_photos.json", {**machine_facts(), **record})
    for key in ("files", "set_aside", "verdicts_unlike_expected", "wrong", "predict_and_server_apart", "seconds"):
        say(f"{key}: {record[key]}")
