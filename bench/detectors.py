"""Photos per second from JPEG files to boxes, beside the detector's own library, and whether int8 finds the same boxes.

    python -m bench detectors [MODEL ...]

No wheel has weights of a detector that can be exported, so these have random ones, with batch norms settled on photos
and class scores spread, so that boxes come out: YOLOv8n as Ultralytics makes it by its configuration (needs the package
``ultralytics``, by ``PYTHONPATH``), and RT-DETR with a ResNet-18. Random weights are harder to keep than trained ones:
thousands of boxes have nearly the same score. Each is optimized with ``--metric detections`` on photos that are not
asked, and answers the 1920 x 1080 photos of ``python -m bench photos``, in turns with its library's own ``predict``.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from bench.photos import Contender, asked_photos, known_photos, listed
from corewise.common.stats import ratio_interval

SCORE, IOU = 0.25, 0.45
SIDE = 640
SETTLING = 8
"""Photos on which batch norms are settled."""
MOST_DROP = 0.05
FILES = 16
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

    from corewise.records.report import Preprocess
    from corewise.samples.images import ImageReader

    reader = ImageReader(Preprocess(fit="letterbox", resize=SIDE, crop=SIDE, mean=(0.0,) * 3, std=(1.0,) * 3))
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


@contextmanager
def by_corewise(artifact: Path) -> Iterator[Detect]:
    """The artifact."""
    import corewise

    with corewise.load(artifact, photos=True) as model:

        def detect(files: Sequence[Path]) -> list[Boxes]:
            answers = model.predict(iter(files), score_threshold=SCORE, iou_threshold=IOU)
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


def contend(kind: str, place: str, folder: str, known: str) -> None:
    """Run one contender here: each number on stdin is how many files to answer; photos/s and boxes as JSON."""
    files, photos = listed(Path(folder))[0], listed(Path(known))[0]
    ways = {
        "corewise": lambda: by_corewise(Path(place)),
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


def prepare(name: str, options: argparse.Namespace) -> Path:
    """The artifact, unless it is there."""
    import corewise

    artifact: Path = options.folder / f"{name}.cw"
    known = known_photos(options)
    if not artifact.exists():
        photos = listed(known)[0]
        model = yolo_module(photos) if name == "yolov8n" else rt_detr(options.folder / "rt_detr", photos)
        corewise.optimize(
            model,
            str(known),
            metric="detections",
            max_drop=MOST_DROP,
            budget_s=options.budget_s,
            engines=["openvino"],
        ).save(artifact)
    return artifact


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One detector."""
    artifact, known, asked = prepare(name, options), known_photos(options), asked_photos("hd", options)
    library = "ultralytics" if name == "yolov8n" else "transformers"
    places = {"corewise": artifact, library: options.folder / "rt_detr"}
    with ExitStack() as stack:
        contenders = {
            kind: stack.enter_context(Contender("detectors", kind, str(place), str(asked), str(known)))
            for kind, place in places.items()
        }
        returned = alternate(options.rounds, {kind: partial(one, FILES) for kind, one in contenders.items()})
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
        "files": FILES,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["yolov8n", "rt_detr"], help="yolov8n or rt_detr")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--photos", type=int, default=300, help="photos of the set (default: 300)")
    parser.add_argument("--budget-s", type=float, default=150.0, help="of optimize (default: 150)")
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
