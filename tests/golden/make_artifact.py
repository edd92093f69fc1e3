"""Write the golden artifact of the current schema: ``python tests/golden/make_artifact.py``.

Artifacts of every schema ever released stay here, and each is opened by ``tests/system/test_golden_artifacts.py``.
This one holds an ONNX payload, so that it opens wherever ONNX Runtime is, on any x86-64 CPU.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

import corewise
from corewise import artifact
from corewise.samples import from_python

FOLDER = Path(__file__).parent / f"schema-{artifact.SCHEMA}"


def main() -> None:
    """Optimize a tiny net with ONNX Runtime and save it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    images = np.random.default_rng(0).normal(size=(64, 3, 12, 12)).astype(np.float32)
    result = corewise.optimize(net, from_python(list(images)), max_drop=0.2, engines=("onnxruntime",))
    shutil.rmtree(FOLDER, ignore_errors=True)
    result.save(FOLDER)


if __name__ == "__main__":
    main()
