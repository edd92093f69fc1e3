"""The models that the benchmarks run, with their samples."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    # The weights of these four are random, so that their answers mean nothing; only the floors of the gate hold.
    "vit_s": Subject("bench.subjects:vit_s", ("--samples", "bench.subjects:images", "--max-drop", "1")),
    "distilbert": Subject("bench.subjects:distilbert", ("--samples", "bench.subjects:token_rows", "--max-drop", "1")),
    "efficientnet_lite0": Subject(
        "bench.subjects:efficientnet_lite0", ("--samples", "bench.subjects:images", "--max-drop", "1")
    ),
    "unet": Subject("bench.subjects:unet", ("--samples", "bench.subjects:small_images", "--max-drop", "1")),
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


def distilbert() -> Any:
    """DistilBERT with random weights, of 64 tokens and their mask."""
    from bench.architectures import ARCHITECTURES

    return ARCHITECTURES["distilbert"].build()


def token_rows() -> Samples:
    """Random token ids and masks of 64 tokens."""
    from bench.architectures import tokens

    # A pair would be taken for (inputs, label).
    return from_python([(row, None) for row in zip(*tokens(IMAGES, 0, masked=True), strict=True)], source="tokens")


def efficientnet_lite0() -> Any:
    """EfficientNet-Lite0 at 224 x 224 with random weights: EfficientNet-B0 with ReLU6 and without squeeze-excite."""
    from torch import nn

    from bench.architectures import EFFICIENTNET_B0, MobileBlock, conv_bn

    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
    inputs = 32
    for expansion, kernel, outputs, repeats, first in EFFICIENTNET_B0:
        for i in range(repeats):
            stride = 1 if i else first
            layers.append(MobileBlock(inputs, inputs * expansion, outputs, kernel, stride, nn.ReLU6, None))
            inputs = outputs
    last = conv_bn(inputs, 1280, 1, activation=nn.ReLU6)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000))
    return _settled(lambda: nn.Sequential(*layers, last, *head), 224)


def unet() -> Any:
    """A U-Net of four levels at 128 x 128, 32 to 256 channels, with random weights (Ronneberger et al. 2015)."""
    import torch
    from torch import nn

    from bench.architectures import conv_bn

    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            conv_bn(inputs, outputs, 3, activation=nn.ReLU), conv_bn(outputs, outputs, 3, activation=nn.ReLU)
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (32, 64, 128, 256)
            self.down = nn.ModuleList(double(*pair) for pair in zip((3, *widths), widths, strict=False))
            pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
            self.grow = nn.ModuleList(nn.ConvTranspose2d(*pair, 2, 2) for pair in pairs)
            self.up = nn.ModuleList(double(*pair) for pair in pairs)
            self.head = nn.Conv2d(widths[0], 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(N, 3, H, W) -> (N, 2, H, W)."""
            skipped = []
            for block in self.down:
                x = block(x)
                skipped.append(x)
                x = nn.functional.max_pool2d(x, 2) if block is not self.down[-1] else x
            for grow, up, skip in zip(self.grow, self.up, skipped[-2::-1], strict=True):
                x = up(torch.cat((grow(x), skip), 1))
            return self.head(x)

    return _settled(UNet, 128)


def _settled(make: Callable[[], Any], size: int) -> Any:
    """A network with the batch norms of ``bench.architectures``."""
    from bench.architectures import Architecture
    from bench.architectures import images as noise

    return Architecture(kind="cnn", make=make, inputs=partial(noise, size=size)).build()


def small_images() -> Samples:
    """Photo-like noise, float32 (3, 128, 128), without labels."""
    from bench.architectures import images as noise

    return from_python(list(noise(IMAGES, 0, size=128)[0]), source="noise")


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
