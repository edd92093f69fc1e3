"""Photos per second from JPEG files to class names, beside a loop written by hand.

    python -m bench photos [--photos N] [--rounds N]

Sets of photos are made from ``imagenet-photos``: as they are (299 x 299), and as 1920 x 1080 and 4000 x 3000, mirrored
at their sides to that ratio, upscaled, with grain, quality 90. The contenders take turns, each run in a process of its
own whose clock starts when its model is open:

- corewise: ``corewise.load(artifact).predict(files)``, of an artifact optimized on other photos of that size;
- by hand: a pool of threads that decode by Pillow, and OpenVINO with the hint THROUGHPUT on the model that
  ``nncf.quantize`` makes of it by default;
- by hand with draft: the same, with Pillow's ``draft`` at twice the size needed.

Top-1 is that of each contender, and of corewise's artifact with photos decoded in full.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import sched_getaffinity
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.harness import DATA, ROOT, add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.subjects import SUBJECTS, add_models
from corewise import artifact as corewise_artifact
from corewise.common.references import call_reference
from corewise.common.stats import ratio_interval
from corewise.records.report import Preprocess
from corewise.samples import read
from corewise.samples.images import image_array

SIZES = {"299": None, "hd": (1920, 1080), "12mp": (4000, 3000)}
GRAIN = 6.0
"""Standard deviation of the grain, in levels of 255."""
CALIBRATING = 200
"""The first photos, of which artifacts are made; the others are asked."""
MODELS = ("mobilenet_v2", "resnet50")


def make_set(folder: Path, size: tuple[int, int] | None, photos: Sequence[tuple[str, int]]) -> Path:
    """Write a set of photos with its ``labels.csv``, unless it is there; the folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(0).normal(0, GRAIN, (1024, 1024, 3)).astype(np.int16)

    def write(name: str) -> None:
        source, made = DATA / "imagenet-photos" / name, folder / Path(name).name
        if made.exists():
            return
        if size is None:
            made.write_bytes(source.read_bytes())
            return
        pixels = np.asarray(Image.open(source).convert("RGB"))
        side = round(pixels.shape[0] * size[0] / size[1] - pixels.shape[1]) // 2
        wide = Image.fromarray(np.pad(pixels, ((0, 0), (side, side), (0, 0)), mode="reflect"))
        large = np.asarray(wide.resize(size, Image.Resampling.BICUBIC), np.int16)
        times = (-(-size[1] // 1024), -(-size[0] // 1024), 1)
        noisy = large + np.tile(grain, times)[: size[1], : size[0]]
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(made, quality=90)

    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        list(pool.map(write, [name for name, _ in photos]))
    lines = [f"{Path(name).name},{label}" for name, label in photos]
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    return folder


def listed(folder: Path) -> tuple[list[Path], list[int]]:
    """The photos of a set and their labels."""
    with (folder / "labels.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return [folder / row["file"] for row in rows], [int(row["label"]) for row in rows]


def by_corewise(artifact: Path, files: Sequence[Path], full: bool) -> tuple[float, list[int]]:
    """Photos/s and the class of each; ``full`` decodes all photos in full, by a function of its own."""
    import corewise

    preprocess = corewise_artifact.read(artifact).manifest.preprocess
    assert preprocess is not None

    def in_full(image: Any) -> np.ndarray:
        return image_array(image, preprocess)

    with corewise.load(artifact, preprocess=in_full if full else None) as model:
        model.predict(list(files[:8]), top=1)
        started_s = perf_counter()
        answers = list(model.predict(iter(files), top=1))
        took_s = perf_counter() - started_s
    return len(files) / took_s, [int(answer.label) for answer in answers]


def by_hand(model: Path, files: Sequence[Path], preprocess: Preprocess, draft: bool) -> tuple[float, list[int]]:
    """The same of a loop as OpenVINO's documentation has it."""
    import openvino
    from PIL import Image

    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    resize, crop = preprocess.resize, preprocess.crop

    def prepare(file: Path) -> np.ndarray:
        image = Image.open(file)
        if draft:
            image.draft("RGB", (2 * resize, 2 * resize))
        image = image.convert("RGB")
        scale = resize / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
        return ((pixels - mean) / std).transpose(2, 0, 1)[None]

    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled, 0)
    classes = [0] * len(files)
    queue.set_callback(lambda request, k: classes.__setitem__(k, int(request.get_output_tensor(0).data.argmax())))

    def run(some: Sequence[Path]) -> None:
        with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
            for k, array in enumerate(pool.map(prepare, some)):
                queue.start_async([array], k)
        queue.wait_all()

    run(files[:8])
    started_s = perf_counter()
    run(files)
    return len(files) / (perf_counter() - started_s), classes


def quantize_by_hand(model: str, samples: Any, path: Path) -> None:
    """nncf.quantize with its defaults."""
    import nncf
    import openvino
    import torch

    module = call_reference(model, ValueError, "the model").eval()  # type: ignore[arg-type]
    rows = [list(arrays) for _, arrays in samples.batches(1)]
    converted = openvino.convert_model(module, example_input=torch.from_numpy(rows[0][0]))
    openvino.save_model(nncf.quantize(converted, nncf.Dataset(rows)), path)


def once(kind: str, place: str, folder: str, preprocess: str) -> None:
    """Run one contender in this process, and print its photos/s and classes as JSON."""
    files, _ = listed(Path(folder))
    if kind.startswith("corewise"):
        per_s, classes = by_corewise(Path(place), files, kind.endswith("in full"))
    else:
        per_s, classes = by_hand(Path(place), files, Preprocess(**json.loads(preprocess)), kind.endswith("draft"))
    print(json.dumps({"per_s": per_s, "classes": classes}))


def run(kind: str, place: Path, folder: Path, preprocess: dict[str, Any]) -> dict[str, Any]:
    """``once`` in a process of its own."""
    code = f"from bench.photos import once; once({kind!r}, {str(place)!r}, {str(folder)!r}, {json.dumps(preprocess)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    answered: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answered


def measure(model: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model on one set."""
    subject = SUBJECTS[model]
    with (DATA / "imagenet-photos" / "labels.csv").open() as lines:
        photos = [(row["file"], int(row["label"])) for row in csv.DictReader(lines)]
    place = options.folder / size
    known = make_set(place / f"known-{options.known}", SIZES[size], photos[: options.known])
    asked = make_set(place / f"asked-{options.photos}", SIZES[size], photos[CALIBRATING:][: options.photos])
    ours, theirs = place / f"{model}-{options.known}.cw", place / f"{model}-{options.known}.xml"
    preprocess = {"resize": 256, "crop": 224}
    if "--mean" in subject.options:
        for name in ("mean", "std"):
            preprocess[name] = tuple(map(float, subject.option(f"--{name}").split(",")))  # type: ignore[assignment]
    if not ours.exists():
        given = [name for name in ("--mean", "--std") if name in subject.options]
        flags = [part for name in given for part in (name, subject.option(name))]
        optimize(ours, subject.model, "--samples", str(known), "--budget", options.budget, *flags)
    if not theirs.exists():
        quantize_by_hand(subject.model, read(str(known), Preprocess(**preprocess)), theirs)
    kinds = {"corewise": ours, "by hand": theirs, "by hand with draft": theirs}
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        kind: partial(run, kind, place, asked, preprocess) for kind, place in kinds.items()
    }
    returned = alternate(options.rounds, contenders)
    _, labels = listed(asked)
    in_full = run("corewise in full", ours, asked, preprocess)
    record: dict[str, Any] = {"photos": len(labels), "decode": decode_of(ours)}
    record["corewise in full"] = {"top1": top1(in_full["classes"], labels)}
    for kind, runs in returned.items():
        record[kind] = {"per_s": [one["per_s"] for one in runs], "top1": top1(runs[-1]["classes"], labels)}
    record["over"] = {
        kind: ratio_data(ratio_interval(record["corewise"]["per_s"], record[kind]["per_s"]))
        for kind in kinds
        if kind != "corewise"
    }
    return record


def decode_of(artifact: Path) -> str:
    """How an artifact decodes."""
    found: str = json.loads((artifact / "manifest.json").read_text())["preprocess"]["decode"]
    return found


def top1(classes: Sequence[int], labels: Sequence[int]) -> float:
    """The share of right classes."""
    return float(np.mean(np.array(classes) == np.array(labels)))


def lines_of(name: str, record: dict[str, Any]) -> Iterator[str]:
    """A record for people."""
    yield f"\n{name}, {record['photos']} photos, {record['decode']} decoding"
    for kind in ("corewise", *record["over"]):
        rates = record[kind]
        yield f"  {kind:20s} {median(rates['per_s']):7.1f} photos/s, top-1 {rates['top1']:.3f}"
    yield f"  decoded in full, corewise's top-1 is {record['corewise in full']['top1']:.3f}"
    for kind, ratio in record["over"].items():
        yield f"  {ratio_words(ratio)} of {kind}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, MODELS)
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--photos", type=int, default=300, help="photos that are asked (default: 300)")
    parser.add_argument("--known", type=int, default=CALIBRATING, help="photos to optimize with (default: 200)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", default="5m", help="of optimize (default: 5m)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/corewise-photos"), help="keeps photos and artifacts for the next run"
    )


def main(options: argparse.Namespace) -> None:
    """Measure each model on each set; the results of others in the file stay."""
    for model in options.models:
        for size in options.sizes:
            record = measure(model, size, options)
            add_results(options.results / "photos.json", f"{model} {size}", record)
            for line in lines_of(f"{model} {size}", record):
                say(line)
