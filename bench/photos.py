"""Photos per second from JPEG files to class names, beside a loop written by hand.

    python -m bench photos [--photos N] [--rounds N]

Sets of photos are made from ``imagenet-photos``: as they are (299 x 299), and as 1920 x 1080 and 4000 x 3000, mirrored
at their sides to that ratio, upscaled, with grain, quality 90. The contenders take turns, each run in a process of its
own whose clock starts when its model is open:

- corewise: ``corewise.load(artifact, photos=True).predict(files)``, of an artifact optimized on other photos of the
  largest size, once for all sizes;
- by hand: a pool of threads that decode by Pillow, and OpenVINO with the hint THROUGHPUT on the model that
  ``nncf.quantize`` makes of it by default;
- by hand with draft: the same, with Pillow's ``draft`` at twice the size needed;
- DataLoader + torch.compile: a worker for each core that decodes by Pillow, and the compiled model in fp32.

Top-1 is that of each contender, and of corewise's artifact with photos decoded in full. Photos, artifacts and quantized
models are kept in ``--folder``, so that another run only measures.
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
from bench.subjects import SUBJECTS, Subject, add_models
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
KNOWN = 48
"""Of these, how many are used: enough of them are held out to judge scaled decoding."""
BATCH = 8
"""Of the DataLoader."""
MODELS = ("mobilenet_v2", "resnet50")
LOADER = "DataLoader + torch.compile"


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

    with corewise.load(artifact, preprocess=in_full if full else None, photos=not full) as model:
        model.predict(list(files[:8]), top=1)
        started_s = perf_counter()
        answers = list(model.predict(iter(files), top=1))
        took_s = perf_counter() - started_s
    return len(files) / took_s, [int(answer.label) for answer in answers]


def prepared(file: Path, preprocess: Preprocess, draft: bool = False) -> np.ndarray:
    """A photo as a script has it that does what torchvision does: float32 (3, crop, crop)."""
    from PIL import Image

    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    resize, crop = preprocess.resize, preprocess.crop
    image = Image.open(file)
    if draft:
        image.draft("RGB", (2 * resize, 2 * resize))
    image = image.convert("RGB")
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)


def by_hand(model: Path, files: Sequence[Path], preprocess: Preprocess, draft: bool) -> tuple[float, list[int]]:
    """The same of a loop as OpenVINO's documentation has it."""
    import openvino

    def prepare(file: Path) -> np.ndarray:
        return prepared(file, preprocess, draft)[None]

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


class Photos:
    """A data set as ``torch.utils.data`` has it; the last file again where a batch would be short."""

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self._files, self._preprocess = [*files, *[files[-1]] * (-len(files) % BATCH)], preprocess

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, k: int) -> np.ndarray:
        return np.ascontiguousarray(prepared(self._files[k], self._preprocess))


def by_data_loader(model: str, files: Sequence[Path], preprocess: Preprocess) -> tuple[float, list[int]]:
    """The same of a loop as PyTorch's documentation has it; the first pass compiles, the second is timed."""
    import torch

    module = call_reference(model, ValueError, "the model").eval()  # type: ignore[arg-type]
    compiled, workers = torch.compile(module), len(sched_getaffinity(0))
    loader: Any = torch.utils.data.DataLoader(
        Photos(files, preprocess),
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=True,  # type: ignore[arg-type]
    )

    def run() -> list[int]:
        with torch.inference_mode():
            return [k for batch in loader for k in compiled(batch).argmax(1).tolist()]

    run()
    started_s = perf_counter()
    classes = run()[: len(files)]
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
    elif kind == LOADER:
        per_s, classes = by_data_loader(place, files, Preprocess(**json.loads(preprocess)))
    else:
        per_s, classes = by_hand(Path(place), files, Preprocess(**json.loads(preprocess)), kind.endswith("draft"))
    print(json.dumps({"per_s": per_s, "classes": classes}))


def run(kind: str, place: Path | str, folder: Path, preprocess: dict[str, Any]) -> dict[str, Any]:
    """``once`` in a process of its own."""
    code = f"from bench.photos import once; once({kind!r}, {str(place)!r}, {str(folder)!r}, {json.dumps(preprocess)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    answered: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answered


def preprocess_of(subject: Subject) -> dict[str, Any]:
    """What all contenders do with a photo, as fields of ``Preprocess``."""
    names = [name for name in ("mean", "std") if f"--{name}" in subject.options]
    given = {name: tuple(map(float, subject.option(f"--{name}").split(","))) for name in names}
    return {"resize": 256, "crop": 224, **given}


def prepare(model: str, known: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """corewise's artifact and the model quantized by hand, made of the same photos, unless they are there."""
    subject = SUBJECTS[model]
    ours, theirs = (options.folder / f"{model}-{known.parent.name}-{options.known}.{kind}" for kind in ("cw", "xml"))
    if not ours.exists():
        given = [name for name in ("--mean", "--std") if name in subject.options]
        flags = [part for name in given for part in (name, subject.option(name))]
        goal = ("--metric", "top1", "--max-drop", str(options.max_drop), "--engine", "openvino")
        optimize(ours, subject.model, "--samples", str(known), "--budget", options.budget, *goal, *flags)
    if not theirs.exists():
        quantize_by_hand(subject.model, read(str(known), Preprocess(**preprocess_of(subject))), theirs)
    return ours, theirs


def photo_set(kind: str, size: str, options: argparse.Namespace) -> Path:
    """The photos of a size that are ``known``, or ``asked``."""
    with (DATA / "imagenet-photos" / "labels.csv").open() as lines:
        photos = [(row["file"], int(row["label"])) for row in csv.DictReader(lines)]
    chosen = photos[: options.known] if kind == "known" else photos[CALIBRATING:][: options.photos]
    return make_set(options.folder / size / f"{kind}-{len(chosen)}", SIZES[size], chosen)


def measure(model: str, size: str, made: tuple[Path, Path], options: argparse.Namespace) -> dict[str, Any]:
    """One model on one set, by all contenders in turns."""
    asked, (ours, theirs), preprocess = photo_set("asked", size, options), made, preprocess_of(SUBJECTS[model])
    kinds: dict[str, Path | str] = {
        "corewise": ours,
        "by hand": theirs,
        "by hand with draft": theirs,
        LOADER: SUBJECTS[model].model,
    }
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        kind: partial(run, kind, place, asked, preprocess) for kind, place in kinds.items()
    }
    returned = alternate(options.rounds, contenders)
    _, labels = listed(asked)
    in_full = run("corewise in full", ours, asked, preprocess)
    record: dict[str, Any] = {"photos": len(labels), **facts_of(ours)}
    record["corewise in full"] = {"top1": top1(in_full["classes"], labels)}
    for kind, runs in returned.items():
        record[kind] = {"per_s": [one["per_s"] for one in runs], "top1": top1(runs[-1]["classes"], labels)}
    record["over"] = {
        kind: ratio_data(ratio_interval(record["corewise"]["per_s"], record[kind]["per_s"]))
        for kind in kinds
        if kind != "corewise"
    }
    return record


def facts_of(artifact: Path) -> dict[str, Any]:
    """How an artifact decodes, what its engine takes, and its plans."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    how = {name: manifest["preprocess"][name] for name in ("decode", "dtype")}
    return {**how, "build": manifest["build"], "plan": manifest["plan"], "photo plan": manifest["photos"]}


def top1(classes: Sequence[int], labels: Sequence[int]) -> float:
    """The share of right classes."""
    return float(np.mean(np.array(classes) == np.array(labels)))


def lines_of(name: str, record: dict[str, Any]) -> Iterator[str]:
    """A record for people."""
    yield f"\n{name}, {record['photos']} photos, {record['decode']} decoding, the engine takes {record['dtype']}"
    for kind in ("corewise", *record["over"]):
        rates = record[kind]
        yield f"  {kind:26s} {median(rates['per_s']):7.1f} photos/s, top-1 {rates['top1']:.3f}"
    yield f"  decoded in full, corewise's top-1 is {record['corewise in full']['top1']:.3f}"
    for kind, ratio in record["over"].items():
        yield f"  {ratio_words(ratio)} of {kind}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_models(parser, MODELS)
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--photos", type=int, default=300, help="photos that are asked (default: 300)")
    parser.add_argument("--known", type=int, default=KNOWN, help=f"photos to optimize with (default: {KNOWN})")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--budget", default="100s", help="of optimize (default: 100s)")
    parser.add_argument("--max-drop", type=float, default=0.05, help="of top-1, by few photos (default: 0.05)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/corewise-photos"), help="keeps photos and artifacts for the next run"
    )


def main(options: argparse.Namespace) -> None:
    """Measure each model on each set; the results of others in the file stay."""
    largest = max(options.sizes, key=list(SIZES).index)
    for model in options.models:
        made = prepare(model, photo_set("known", largest, options), options)
        for size in options.sizes:
            record = measure(model, size, made, options)
            add_results(options.results / "photos.json", f"{model} {size}", record)
            for line in lines_of(f"{model} {size}", record):
                say(line)
