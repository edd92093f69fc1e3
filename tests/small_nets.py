"""Small nets that the quantizer's tests share."""

from torch import Tensor, nn, relu


class Residual(nn.Module):
    """A stem, a residual block, a max pooling, a convolution and a linear: five layers, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.body1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body2 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.pool, self.last, self.head = nn.MaxPool2d(2), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = relu(self.body2(self.body1(x)) + x)
        return self.head(relu(self.last(self.pool(x))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck with ReLU6 and a linear: four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.project(self.depthwise(self.expand(x))).mean((2, 3)))


class Mlp(nn.Module):
    """Tokens: two blocks with layer norms; the last layer sees one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.up = nn.LayerNorm(8), nn.Linear(8, 16)
        self.norm2, self.down = nn.LayerNorm(16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(nn.functional.gelu(self.up(self.norm1(x))))
        return self.head((x + self.down(y)).mean(1))
