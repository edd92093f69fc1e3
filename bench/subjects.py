"""The models that the benchmarks run, their samples, and how both get to trial children."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DATA = Path(os.environ.get("COREWISE_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT / "examples"))

from corewise import source  # noqa: E402
from corewise.engines import BuildInputs  # noqa: E402
from corewise.machine.inspect import inspect_cpu  # noqa: E402
from corewise.records.build import Build  # noqa: E402
from corewise.records.cpu import Cpu  # noqa: E402
from corewise.records.report import Preprocess  # noqa: E402
from corewise.runtime.client import Worker  # noqa: E402
from corewise.runtime.worker import CALIBRATION, HOLDOUT, PROGRAM, write_build_inputs  # noqa: E402
from corewise.samples import Samples, default_calibration, from_python, read, split  # noqa: E402

PHOTOS = str(DATA / "imagenet-photos")
RESNET_MEAN = "0.48501961,0.45795686,0.40760392"
RESNET_STD = "0.00392157,0.00392157,0.00392157"
TIMEOUT_S = 900.0
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
        ("--samples", f"{HERE}/subjects.py:sentences", "--metric", f"{ROOT}/examples/minilm.py:spearman"),
    ),
    # Random weights: what it answers means nothing, so the gate lets all pass.
    "vit_s": Subject(f"{HERE}/subjects.py:vit_s", ("--samples", f"{HERE}/subjects.py:images", "--max-drop", "1")),
    "resnet20": Subject(
        f"{ROOT}/examples/resnet20.py:build",
        ("--samples", str(DATA / "cifar10.npz"), "--metric", "top1", "--resize", "32", "--crop", "32"),
    ),
}
FIVE = ("resnet50", "mobilenet_v2", "minilm_128", "vit_s", "resnet20")
"""What the search of plans is measured on."""


def vit_s() -> Any:
    """ViT-S/16 at 224 x 224 with random weights."""
    import torch
    from architectures import SMALL, OneTensor
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**SMALL, num_labels=1000, attn_implementation="sdpa")
    return OneTensor(ViTForImageClassification(config)).eval()


def images() -> Samples:
    """Photo-like noise, float32 (3, 224, 224), without labels."""
    from architectures import images as noise

    return from_python(list(noise(IMAGES, 0, size=224)[0]), source="noise")


def sentences() -> Samples:
    """The first pairs of STS-B, padded to 128 tokens."""
    import minilm

    return minilm.padded(TOKENS, PAIRS)


def prepare(work: Path, subject: Subject, cpu: Cpu) -> BuildInputs:
    """Export the model and write into ``work`` what trial children read."""
    calibrating, holdout = subject.samples()
    exported = source.export(source.load(subject.model), calibrating)
    assert exported.program is not None, exported.why_not
    source.save_program(exported.program, work / PROGRAM)
    calibrating.save(work / CALIBRATION)
    holdout.save(work / HOLDOUT)
    (work / "cache").mkdir()
    material = BuildInputs(
        program=work / PROGRAM,
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=source.operators(exported.program),
        calibration=calibrating,
        cpu=cpu,
        cache=work / "cache",
    )
    write_build_inputs(work, material)
    return material


def starter(work: Path, timeout_s: float = TIMEOUT_S) -> Callable[[Build], Worker]:
    """What starts a trial child for a build."""
    cpu = inspect_cpu()
    return lambda build: Worker(cpu=cpu, log=work / "log", timeout_s=timeout_s)
