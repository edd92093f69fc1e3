"""A small CNN on the real digits that ship with scikit-learn: needs no data folder.

    corewise optimize examples/digits.py:build --samples examples/digits.py:samples \
        --metric top1 --max-drop 0.01 -o digits.cw

The first ``build`` trains it, which takes some seconds; later ones read the weights from ``.digits.safetensors``.
"""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from corewise.samples import Samples, from_python

WEIGHTS = Path(__file__).with_name(".digits.safetensors")
CHANNELS = ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
"""Inputs, outputs and stride of each convolution."""
EPOCHS, BATCH, PEAK_RATE = 6, 50, 0.01


def network() -> nn.Module:
    """The untrained network; images (N, 1, 32, 32) -> logits (N, 10)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in CHANNELS:
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1][1], 10))


def digits() -> list[NDArray[np.float32]]:
    """Training images, test images (N, 1, 32, 32) in 0..1, and both's labels; 1000 digits to train, 797 to test."""
    images, labels = load_digits(return_X_y=True)
    enlarged = (images / 16).reshape(-1, 1, 8, 8).repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)
    return train_test_split(enlarged, labels, train_size=1000, random_state=0, stratify=labels)


def train(model: nn.Module) -> None:
    """Train in place, with one cycle of the learning rate (Smith 2018)."""
    train_images, _, train_labels, _ = digits()
    images, labels = torch.from_numpy(train_images), torch.from_numpy(train_labels)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, EPOCHS * len(images) // BATCH)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


def build() -> nn.Module:
    """The trained network, fp32, in eval mode; images (N, 1, 32, 32) -> logits (N, 10)."""
    if WEIGHTS.exists():
        model = network()
        model.load_state_dict(load_file(WEIGHTS))
        return model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
        train(model)
    unfinished = WEIGHTS.with_suffix(f".{os.getpid()}")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(WEIGHTS)
    return model.eval()


def samples() -> Samples:
    """The 797 digits that ``build`` was not trained on, with labels."""
    _, images, _, labels = digits()
    return from_python({"inputs": images, "labels": labels}, source="scikit-learn digits")
