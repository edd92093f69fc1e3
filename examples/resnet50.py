"""ResNet-50 v1 with real ImageNet weights (``COREWISE_DATA`` or ``../shared/data``).

    corewise optimize examples/resnet50.py:build --samples ../shared/data/imagenet-photos --metric top1 \
        --mean 0.48501961,0.45795686,0.40760392 --std 0.00392157,0.00392157,0.00392157 --max-drop 0.01 -o resnet50.cw

The weights want RGB in 0..255 less (123.68, 116.779, 103.939), so the standard deviation is 1/255.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from weights import load_weights


class Bottleneck(nn.Module):
    """1x1 (strided: v1, not v1.5), 3x3, 1x1, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=1e-3)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs, eps=1e-3),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet of bottlenecks; ``depths`` blocks a stage."""

    def __init__(self, depths: Sequence[int], classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-3)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width, 2 if stage and not i else 1))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 224, 224) -> logits (N, 1000)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build() -> nn.Module:
    """ResNet-50, fp32, in eval mode; images (N, 3, 224, 224) -> logits (N, 1000)."""
    return load_weights(ResNet((3, 4, 6, 3)), "resnet50.safetensors")
