"""Photos per second from JPEG files to boxes, beside the detector's own library, and whether int8 finds the same boxes.

    python -m bench detectors [MODEL ...]

- ``mtcnn_pnet``: the first stage of MTCNN, which proposes faces, with the trained weights of the wheel of
  facenet-pytorch, on a pyramid of a photo of 640 x 640. Beside it, the loop that facenet-pytorch has: Pillow and the
  same pyramid in PyTorch, photo by photo.
- ``yolov8n``: as Ultralytics makes it by its configuration (needs the package ``ultralytics``, by ``PYTHONPATH``), and
  ``rt_detr``: RT-DETR with a ResNet-18. No wheel has weights of theirs, so these are random, with batch norms settled
  on photos and class scores spread, so that boxes come out. They are harder to keep than trained ones: thousands of
  boxes have nearly the same score. Beside them, the library's own ``predict``, and a loop as its documentation has it.

Each is optimized with ``--metric detections`` on photos of 1920 x 1080, and answers others of that size, in turns with
its library. A model takes some minutes; its results stay in detectors.json, and a search that was ended goes on.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import log
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.harness import add_results, alternate, ratio_data, ratio_words, say
from bench.photos import ASKED, SIZES, Contender, all_photos, listed, make_set, write_labels
from corewise.common.detections import Detections, corners, suppressed
from corewise.common.stats import ratio_interval
from corewise.records.report import Preprocess

SCORE, IOU = 0.25, 0.45
FACE_SCORE, FACE_IOU = 0.6, 0.5
"""What facenet-pytorch's first stage takes."""
SIDE = 640
SQUARE = Preprocess(fit="letterbox", resize=SIDE, crop=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3)
FACES = Preprocess(fit="letterbox", resize=SIDE, crop=SIDE, mean=(127.5 / 255,) * 3, std=(128 / 255,) * 3)
KNOWN = 60
"""Photos of which artifacts are made: 36 of them are held out."""
SETTLING = 8
"""Photos on which batch norms are settled."""
MOST_DROP = 0.05
NEAR = 0.9
"""Intersection over union from which two boxes of a class are the same."""
SPREAD, SURE = 1.0, 100
"""Standard deviation of the class scores before the sigmoid, and how many of a photo are over ``SCORE``."""
Boxes = list[list[float]]
"""Of one photo: class, score, x1, y1, x2, y2 each."""
Detect = Callable[[Sequence[Path]], list[Boxes]]


def settled(model: Any, photos: Sequence[Path]) -> Any:
    """The model with the mean statistics of photos in its batch norms."""
    import torch

    from corewise.samples.images import ImageReader

    reader = ImageReader(SQUARE)
    batch = torch.from_numpy(np.stack([reader(photo) for photo in photos[:SETTLING]]))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(batch)
    model.eval()
    return batch


def spread(layer: Any, run: Callable[[], Any]) -> None:
    """Give the last layer of the class scores that variance, and so many that count, in a run of the model."""
    import torch

    found: list[Any] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        run()
        hook.remove()
        scores = found[-1].flatten()
        times = SPREAD / scores.std()
        highest = scores.sort().values[-SURE * SETTLING]
        layer.weight *= times
        layer.bias[:] = times * (layer.bias - highest) + log(SCORE / (1 - SCORE))


def yolo(photos: Sequence[Path]) -> Any:
    """Ultralytics' YOLOv8n, not trained."""
    import torch

    torch.manual_seed(0)
    made = import_module("ultralytics").YOLO("yolov8n.yaml")
    model = made.model.eval()
    batch = settled(model, photos)
    for level in model.model[-1].cv3:
        spread(level[-1], partial(model, batch))
    return made


def yolo_module(photos: Sequence[Path]) -> Any:
    """The module, as Ultralytics exports it: one output (N, 4 + classes, cells)."""
    model = yolo(photos).model.fuse(verbose=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = model.model[-1]
    head.export, head.format, head.dynamic = True, "torchscript", True
    return model


def rt_detr(folder: Path, photos: Sequence[Path]) -> str:
    """RT-DETR with a ResNet-18, written as transformers does; its reference."""
    import torch
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    if not folder.exists():
        torch.manual_seed(0)
        backbone = RTDetrResNetConfig(
            layer_type="basic",
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            embedding_size=64,
            out_features=["stage2", "stage3", "stage4"],
        )
        config = RTDetrConfig(backbone_config=backbone, encoder_in_channels=[128, 256, 512], decoder_layers=3)
        config.anchor_image_size = [SIDE, SIDE]
        model = RTDetrForObjectDetection(config).eval()
        batch = settled(model, photos)
        spread(model.model.decoder.class_embed[-1], partial(model, batch))
        model.save_pretrained(folder)
        RTDetrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return f"hf:{folder}"


def pnet() -> Any:
    """MTCNN's first stage."""
    from bench.real_models import mtcnn_pnet

    return mtcnn_pnet(SIDE)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A model, and what runs it beside corewise."""

    library: str
    score: float = SCORE
    iou: float = IOU


DETECTORS = {
    "mtcnn_pnet": Detector(library="torch", score=FACE_SCORE, iou=FACE_IOU),
    "yolov8n": Detector(library="ultralytics"),
    "rt_detr": Detector(library="transformers"),
}


@contextmanager
def by_corewise(name: str, artifact: Path) -> Iterator[Detect]:
    """The artifact."""
    import corewise

    detector = DETECTORS[name]
    with corewise.load(artifact, photos=True) as model:

        def detect(files: Sequence[Path]) -> list[Boxes]:
            answers = model.predict(iter(files), score_threshold=detector.score, iou_threshold=detector.iou)
            return [[[one.number, one.score, *one.box] for one in answer] for answer in answers]

        yield detect


@contextmanager
def by_ultralytics(photos: Sequence[Path]) -> Iterator[Detect]:
    """``YOLO.predict`` on a list of files, photos as squares as for the artifact."""
    model = yolo(photos)

    def detect(files: Sequence[Path]) -> list[Boxes]:
        found = model.predict(
            [str(file) for file in files], imgsz=SIDE, rect=False, conf=SCORE, iou=IOU, verbose=False, stream=True
        )
        return [
            [[float(row[5]), float(row[4]), *map(float, row[:4])] for row in one.boxes.data.tolist()] for one in found
        ]

    yield detect


@contextmanager
def by_transformers(folder: Path) -> Iterator[Detect]:
    """A loop as transformers' documentation has it."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder)

    def one(file: Path) -> Boxes:
        image = Image.open(file).convert("RGB")
        with torch.inference_mode():
            outputs = model(**processor(images=image, return_tensors="pt"))
        (found,) = processor.post_process_object_detection(outputs, SCORE, [image.size[::-1]])
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [[float(label), score, *box] for label, score, box in rows]

    yield lambda files: [one(file) for file in files]


@contextmanager
def by_torch() -> Iterator[Detect]:
    """P-Net as facenet-pytorch runs it, on the square that the artifact takes."""
    import torch
    from PIL import Image

    model = pnet()

    def one(file: Path) -> Boxes:
        image = Image.open(file).convert("RGB")
        scale = SIDE / max(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (SIDE - small.width) // 2, (SIDE - small.height) // 2
        square = Image.new("RGB", (SIDE, SIDE), (FACES.fill,) * 3)
        square.paste(small, (left, top))
        pixels = torch.from_numpy(np.asarray(square, np.float32)).permute(2, 0, 1)[None]
        with torch.inference_mode():
            places = model((pixels - 127.5) / 128)[0].T
            likely = places[places[:, 4] >= FACE_SCORE].double().numpy()
        found = Detections(corners(likely[:, :4]), likely[:, 4], np.zeros(len(likely), np.int64))
        boxes, scores, _ = suppressed(found, FACE_IOU, FACE_SCORE)
        inside = ((boxes - ([left, top] * 2)) / scale).clip(0, [*image.size] * 2)
        return [[0.0, float(score), *box] for score, box in zip(scores, inside.tolist(), strict=True)]

    yield lambda files: [one(file) for file in files]


def contend(name: str, kind: str, place: str, folder: str, known: str) -> None:
    """Run one contender here: each number on stdin is how many files to answer; photos/s and boxes as JSON."""
    files, photos = listed(Path(folder))[0], listed(Path(known))[0]
    ways = {
        "corewise": lambda: by_corewise(name, Path(place)),
        "torch": by_torch,
        "ultralytics": lambda: by_ultralytics(photos),
        "transformers": lambda: by_transformers(Path(place)),
    }
    with ways[kind]() as detect:
        detect(files[:2])
        for line in sys.stdin:
            asked = files[: int(line)]
            started_s = perf_counter()
            boxes = detect(asked)
            print(json.dumps({"per_s": len(asked) / (perf_counter() - started_s), "boxes": boxes}), flush=True)


def overlap(one: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of a box with others."""
    low, high = np.maximum(one[:2], others[:, :2]), np.minimum(one[2:], others[:, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    return np.asarray(both / np.maximum(np.prod(one[2:] - one[:2]) + areas - both, 1e-9))


def found_again(ours: Sequence[Boxes], theirs: Sequence[Boxes]) -> dict[str, float]:
    """Of the library's boxes, the share that one of ours of the class is near to; and how many each found."""
    near = total = 0
    for mine, others in zip(ours, theirs, strict=True):
        boxes = np.array(mine, np.float64).reshape(-1, 6)
        for other in others:
            of_class = boxes[boxes[:, 0] == other[0]]
            near += bool(len(of_class) and overlap(np.array(other[2:]), of_class[:, 2:]).max() >= NEAR)
            total += 1
    return {"near": near / max(1, total), "theirs": total, "ours": sum(map(len, ours))}


def photos_of(name: str, first: int, count: int, options: argparse.Namespace) -> Path:
    """A folder of photos of 1920 x 1080."""
    photos = all_photos()[first : first + count]
    folder = make_set(options.folder / name, SIZES["hd"], photos)
    write_labels(folder, photos)
    return folder


def prepare(name: str, known: Path, options: argparse.Namespace) -> Path:
    """The artifact, unless it is there. A search that was ended before goes on where it was."""
    from rich.console import Console

    import corewise
    from corewise.report.terminal import Progress
    from corewise.samples import read

    artifact: Path = options.folder / f"{name}.cw"
    if artifact.exists():
        return artifact
    photos = listed(known)[0]
    made: dict[str, Callable[[], Any]] = {
        "mtcnn_pnet": pnet,
        "yolov8n": lambda: yolo_module(photos),
        "rt_detr": lambda: rt_detr(options.folder / "rt_detr", photos),
    }
    with Progress(Console(), "plain") as progress:
        result = corewise.optimize(
            made[name](),
            partial(read, str(known), FACES) if name == "mtcnn_pnet" else str(known),
            metric="detections",
            max_drop=MOST_DROP,
            class_names=("face",) if name == "mtcnn_pnet" else None,
            budget_s=options.budget_s,
            engines=["openvino"],
            work=options.folder / f"{name}.work",
            on_event=progress,
        )
        result.save(artifact)
    shutil.rmtree(options.folder / f"{name}.work", ignore_errors=True)
    return artifact


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One detector."""
    started_s = perf_counter()

    def tell(line: str) -> None:
        say(f"{name}, {perf_counter() - started_s:.0f} s: {line}")

    tell("photos")
    known = photos_of("detectors-known", 0, KNOWN, options)
    asked = photos_of("detectors-asked", ASKED, options.photos, options)
    tell("artifact")
    artifact = prepare(name, known, options)
    library = DETECTORS[name].library
    places = {"corewise": artifact, library: options.folder / "rt_detr"}
    tell(f"{options.rounds} rounds of {options.photos} photos by corewise and {library}")
    with ExitStack() as stack:
        contenders = {
            kind: stack.enter_context(Contender("detectors", name, kind, str(place), str(asked), str(known)))
            for kind, place in places.items()
        }
        returned = alternate(options.rounds, {kind: partial(one, options.photos) for kind, one in contenders.items()})
    tell("measured")
    manifest, report = (json.loads((artifact / f"{part}.json").read_text()) for part in ("manifest", "report"))
    winner = next(trial for trial in report["trials"] if trial["build"] == report["choice"]["winner"])
    rates = {kind: [one["per_s"] for one in runs] for kind, runs in returned.items()}
    boxes = {kind: runs[-1]["boxes"] for kind, runs in returned.items()}
    return {
        "build": manifest["build"],
        "plan": manifest["plan"],
        "photo plan": manifest["photos"],
        "preprocess": manifest["preprocess"],
        "fidelity": winner["fidelity"],
        "tried": [
            {"build": trial["build"], "state": trial["state"], "fidelity": trial["fidelity"]}
            for trial in report["trials"]
        ],
        "library": library,
        "per_s": rates,
        "over": ratio_data(ratio_interval(rates["corewise"], rates[library])),
        "boxes": found_again(boxes["corewise"], boxes[library]),
        "files": options.photos,
        "wall_s": perf_counter() - started_s,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", default=list(DETECTORS), help=f"any of {', '.join(DETECTORS)}"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--photos", type=int, default=12, help="photos that are answered in a round (default: 12)")
    parser.add_argument("--budget-s", type=float, default=120.0, help="of optimize (default: 120)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/corewise-photos"), help="where python -m bench photos keeps its files"
    )


def main(options: argparse.Namespace) -> None:
    """Measure each."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(options.folder))
    for name in options.models:
        record = measure(name, options)
        add_results(options.results / "detectors.json", name, record)
        ours, theirs = (median(record["per_s"][kind]) for kind in ("corewise", record["library"]))
        say(
            f"{name}: {record['build']['precision']}, detections {record['fidelity']['value']:.3f}; {ours:.1f} photos/s"
        )
        say(f"  {ratio_words(record['over'])} of {record['library']}'s {theirs:.1f}; boxes {record['boxes']}")
