"""ResNet-20 for CIFAR-10 with real weights (``COREWISE_DATA`` or ``../shared/data``).

    corewise optimize examples/resnet20.py:build --samples ../shared/data/cifar10.npz \
        --resize 32 --crop 32 --metric top1 --max-drop 0.01 -o resnet20.cw
"""

import torch.nn.functional as F
from torch import Tensor, nn
from weights import load_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights (He et al. 2016, option A): subsample, pad the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """Three stages of three basic blocks with 16, 32 and 64 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) -> logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Three blocks, of which the first changes the size."""
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1), BasicBlock(outputs, outputs, 1)
    )


def build() -> nn.Module:
    """ResNet-20, fp32, in eval mode; images (N, 3, 32, 32) -> logits (N, 10)."""
    return load_weights(ResNet20(), "cifar10_resnet20.safetensors")
