"""The models that the benchmarks run, with their samples."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness import DATA, ROOT, example, export_into
from corewise import source
from corewise.engines import BuildInputs
from corewise.records.cpu import Cpu
from corewise.records.report import Preprocess
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples, default_calibration, from_python, read, split

PHOTOS = str(DATA / "imagenet-photos")
RESNET_MEAN = "0.48501961,0.45795686,0.40760392"
RESNET_STD = "0.00392157,0.00392157,0.00392157"
IMAGES = 200
PAIRS, TOKENS = 300, 128


@dataclass(frozen=True)
class Subject:
    """A model as ``corewise optimize`` takes it."""

    model: str
    options: tuple[str, ...]

    def option(self, name: str) -> str:
        """The value of an option that it has."""
        return self.options[self.options.index(name) + 1]

    def data(self) -> Samples:
        """All samples."""
        preprocess = Preprocess()
        if "--mean" in self.options:
            mean, std = (tuple(map(float, self.option(name).split(","))) for name in ("--mean", "--std"))
            preprocess = Preprocess(mean=mean, std=std)
        if "--resize" in self.options:
            preprocess = Preprocess(resize=int(self.option("--resize")), crop=int(self.option("--crop")))
        return read(self.option("--samples"), preprocess)

    def samples(self) -> tuple[Samples, Samples]:
        """The calibration part and the holdout, split as ``optimize`` splits them."""
        data = self.data()
        return split(data, calibration=default_calibration(len(data)), seed=0)


SUBJECTS = {
    "resnet50": Subject(
        f"{ROOT}/examples/resnet50.py:build",
        ("--samples", PHOTOS, "--metric", "top1", "--mean", RESNET_MEAN, "--std", RESNET_STD),
    ),
    "mobilenet_v2": Subject(f"{ROOT}/examples/mobilenet_v2.py:build", ("--samples", PHOTOS, "--metric", "top1")),
    "minilm": Subject(
        f"{ROOT}/examples/minilm.py:build",
        ("--samples", f"{ROOT}/examples/minilm.py:samples", "--metric", f"{ROOT}/examples/minilm.py:spearman"),
    ),
    "minilm_128": Subject(
        f"{ROOT}/examples/minilm.py:build",
        ("--samples", "bench.subjects:sentences", "--metric", f"{ROOT}/examples/minilm.py:spearman"),
    ),
    # The weights are random, so its outputs mean nothing and the gate lets every build pass.
    "vit_s": Subject("bench.subjects:vit_s", ("--samples", "bench.subjects:images", "--max-drop", "1")),
    "resnet20": Subject(
        f"{ROOT}/examples/resnet20.py:build",
        ("--samples", str(DATA / "cifar10.npz"), "--metric", "top1", "--resize", "32", "--crop", "32"),
    ),
    "digits": Subject(
        f"{ROOT}/examples/digits.py:build", ("--samples", f"{ROOT}/examples/digits.py:samples", "--metric", "top1")
    ),
}
FIVE = ("resnet50", "mobilenet_v2", "minilm_128", "vit_s", "resnet20")
"""The models of the main job."""


def add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """The positional arguments that name subjects."""

    def subject_name(name: str) -> str:
        if name not in SUBJECTS:
            raise argparse.ArgumentTypeError(f"there is no model {name!r}; there are {', '.join(SUBJECTS)}")
        return name

    parser.add_argument(
        "models",
        nargs="*",
        type=subject_name,
        default=list(default),
        metavar="MODEL",
        help=f"any of {', '.join(SUBJECTS)} (default: {' '.join(default)})",
    )


def vit_s() -> Any:
    """ViT-S/16 at 224 x 224 with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from bench.architectures import SMALL, OneTensor

    torch.manual_seed(0)
    config = ViTConfig(**SMALL, num_labels=1000, attn_implementation="sdpa")
    return OneTensor(ViTForImageClassification(config)).eval()


def images() -> Samples:
    """Photo-like noise, float32 (3, 224, 224), without labels."""
    from bench.architectures import images as noise

    return from_python(list(noise(IMAGES, 0, size=224)[0]), source="noise")


def sentences() -> Samples:
    """The first pairs of STS-B, padded to 128 tokens."""
    return example("minilm", "padded")(TOKENS, PAIRS)


def sentences_ragged() -> Samples:
    """The first 150 pairs of STS-B, each sentence with its own length."""
    return example("minilm", "samples_ragged")(150)


def prepare(workspace: Workspace, subject: Subject, cpu: Cpu) -> BuildInputs:
    """Export the subject's model and write what trial processes read."""
    calibration, holdout = subject.samples()
    _, inputs = export_into(workspace, source.load(subject.model), calibration, holdout, cpu)
    return inputs
