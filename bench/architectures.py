"""Eighteen architectures with random, well-scaled weights, for what depends on the graph and not on the weights.

Weights are seeded. Transformers have Kaiming-scaled weights instead of their usual N(0, 0.02), so that every layer
adds to the output, and ConvNeXt's layer scale is 0.3 instead of 1e-6. Batch norms have the bias ``BATCH_NORM_BIAS``
and hold the statistics of two batches of ``images``, so that activations are normalised as in a trained net. Images
are small where the architecture permits, and vocabularies (embeddings are no part of the question) have 8,192 entries;
widths and depths are the published ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.harness import example

Kind = Literal["cnn", "transformer", "recurrent"]
Arrays = tuple[NDArray[Any], ...]

VOCABULARY = 8192
TOKENS = 64
CALIBRATING = 16
"""Images in each of the two batches that batch norms take their statistics from."""
BATCH_NORM_BIAS = 1.0
"""With a bias of 0 random nets amplify any noise from layer to layer (Yang et al. 2019, "A Mean Field Theory of Batch
Normalization"). 1 % of noise on all weights leaves 12.3 dB of MobileNetV2's logits less their mean over images with its
trained weights, and with random ones 2.5 dB at a bias of 0, 7.3 dB at 0.5 and 11.9 dB at 1."""


def images(count: int, seed: int, *, size: int) -> Arrays:
    """float32 (count, 3, size, size): smooth noise of mean 0 and variance 1, with the 1/f spectrum of photographs."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(random.standard_normal((count, 3, size, size))) / frequency
    noise += 1.5 * noise.mean(1, keepdims=True)  # the channels of a photograph are alike
    picture = np.fft.irfft2(noise, s=(size, size))
    picture /= picture.std(axis=(1, 2, 3), keepdims=True)
    picture *= random.uniform(0.6, 1.4, (count, 1, 1, 1))
    picture += random.normal(0, 0.4, (count, 3, 1, 1))
    return (picture.astype(np.float32),)


def tokens(count: int, seed: int, *, masked: bool) -> Arrays:
    """int64 (count, 64) token ids, frequent ones more often; ``masked`` adds an attention mask of 24 to 64 tokens."""
    random = np.random.default_rng(seed)
    ids = np.floor(VOCABULARY ** random.random((count, TOKENS))).astype(np.int64) - 1
    if not masked:
        return (ids,)
    lengths = random.integers(24, TOKENS + 1, (count, 1))
    return ids, (np.arange(TOKENS) < lengths).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model and its inputs."""

    kind: Kind
    make: Callable[[], nn.Module]
    """The module as its constructor leaves it."""
    inputs: Callable[[int, int], Arrays]
    """(count, seed) -> one array per positional argument of ``forward``, batch first."""

    def build(self) -> nn.Module:
        """The module, fp32, in eval mode, with the weights that the module's docstring describes; always the same."""
        torch.manual_seed(0)
        model = self.make().eval()
        if self.kind == "transformer":
            _scale_weights(model)
        _settle_batch_norms(model, [self.inputs(CALIBRATING, seed) for seed in (1001, 1002)])
        return model


def _scale_weights(model: nn.Module) -> None:
    """Outputs of every linear layer and convolution with about the variance of their inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def _settle_batch_norms(model: nn.Module, batches: list[Arrays]) -> None:
    """Give batch norms ``BATCH_NORM_BIAS`` and the mean statistics of the batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, BATCH_NORM_BIAS)
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean of all batches
        norm.train()
    with torch.no_grad():
        for arrays in batches if norms else []:
            model(*map(torch.from_numpy, arrays))
    for norm in norms:
        norm.eval()


class OneTensor(nn.Module):
    """A model of ``transformers`` that returns one tensor of its output."""

    def __init__(self, model: nn.Module, output: str = "logits") -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *tensors: Tensor) -> Tensor:
        """The output's tensor of that name."""
        return getattr(self.model(*tensors), self.output)


class Tokens(OneTensor):
    """The same for models of tokens and their mask; ``mean`` returns the mean over the mask."""

    def __init__(self, model: nn.Module, output: str = "logits", *, mean: bool = False) -> None:
        super().__init__(model, output)
        self.mean = mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 (N, tokens), twice -> (N, values)."""
        output = getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.output)
        if not self.mean:
            return output
        mask = attention_mask.unsqueeze(-1).to(output.dtype)
        return F.normalize((output * mask).sum(1) / mask.sum(1), dim=-1)


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = None
) -> nn.Sequential:
    """Convolution, batch norm and, where given, an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([activation()] if activation else []))


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3, 1x1, and a shortcut (Xie et al. 2017)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv_bn(inputs, width, 1, activation=nn.ReLU),
            conv_bn(width, width, 3, stride, groups=32, activation=nn.ReLU),
            conv_bn(width, outputs, 1),
        )
        self.shortcut = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return F.relu(self.conv(x) + self.shortcut(x))


def resnext50() -> nn.Module:
    """ResNeXt-50 (32x4d)."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            outputs = 256 * 2**stage
            layers.append(ResNeXtBlock(inputs, outputs // 2, outputs, 2 if stage and not i else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W), unchanged in shape."""
        return x * self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))


class MobileBlock(nn.Module):
    """Expand, depthwise, squeeze-excite where given, project, and a shortcut where the shapes allow it."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        kernel: int,
        stride: int,
        activation: type[nn.Module],
        squeeze: nn.Module | None,
    ) -> None:
        super().__init__()
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([conv_bn(inputs, hidden, 1, activation=activation)] if hidden != inputs else []),
            conv_bn(hidden, hidden, kernel, stride, hidden, activation),
            *([squeeze] if squeeze else []),
            conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


# kernel, expanded, outputs, squeeze-excite, hardswish, stride (Howard et al. 2019, table 1)
MOBILENET_V3_LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-large."""
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, activation=nn.Hardswish)]
    inputs = 16
    for kernel, hidden, outputs, squeezes, hard, stride in MOBILENET_V3_LARGE:
        squeeze = SqueezeExcite(hidden, -(-hidden // 32) * 8, nn.ReLU, nn.Hardsigmoid) if squeezes else None
        layers.append(MobileBlock(inputs, hidden, outputs, kernel, stride, nn.Hardswish if hard else nn.ReLU, squeeze))
        inputs = outputs
    head = [nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    last = conv_bn(inputs, 960, 1, activation=nn.Hardswish)
    return nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


# expansion, kernel, outputs, repeats, first stride (Tan and Le 2019, table 1)
EFFICIENTNET_B0 = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


def efficientnet_b0() -> nn.Module:
    """EfficientNet-B0."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, activation=nn.SiLU)]
    inputs = 32
    for expansion, kernel, outputs, repeats, first in EFFICIENTNET_B0:
        for i in range(repeats):
            hidden = inputs * expansion
            squeeze = SqueezeExcite(hidden, max(1, inputs // 4), nn.SiLU, nn.Sigmoid)
            layers.append(MobileBlock(inputs, hidden, outputs, kernel, 1 if i else first, nn.SiLU, squeeze))
            inputs = outputs
    last = conv_bn(inputs, 1280, 1, activation=nn.SiLU)
    return nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000))


class ShuffleBlock(nn.Module):
    """Half the channels through the branch (both, where it strides), then the halves are shuffled (Ma et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(
                conv_bn(inputs, inputs, 3, 2, inputs), conv_bn(inputs, half, 1, activation=nn.ReLU)
            )
        self.right = nn.Sequential(
            conv_bn(inputs if stride == 2 else half, half, 1, activation=nn.ReLU),
            conv_bn(half, half, 3, stride, half),
            conv_bn(half, half, 1, activation=nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        left, right = (self.left(x), x) if self.left else x.chunk(2, 1)
        y = torch.cat((left, self.right(right)), 1)
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2 1.0x."""
    layers: list[nn.Module] = [conv_bn(3, 24, 3, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    inputs = 24
    for outputs, repeats in ((116, 4), (232, 8), (464, 4)):
        for i in range(repeats):
            layers.append(ShuffleBlock(inputs, outputs, 1 if i else 2))
            inputs = outputs
    last = conv_bn(inputs, 1024, 1, activation=nn.ReLU)
    return nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class DenseBlock(nn.Module):
    """Layers that each read all that came before (Huang et al. 2017); growth 32."""

    def __init__(self, inputs: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + 32 * i),
                nn.ReLU(),
                nn.Conv2d(inputs + 32 * i, 128, 1, bias=False),
                nn.BatchNorm2d(128),
                nn.ReLU(),
                nn.Conv2d(128, 32, 3, padding=1, bias=False),
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, inputs + 32 depth, H, W)."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet121() -> nn.Module:
    """DenseNet-121."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for depth in (6, 12, 24, 16):
        layers.append(DenseBlock(channels, depth))
        channels += 32 * depth
        if depth != 16:
            transition = (nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False))
            layers += [*transition, nn.AvgPool2d(2)]
            channels //= 2
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down four times, and up again with what was seen on the way down (Ronneberger et al. 2015); widths 32 to 512."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        widths = (32, 64, 128, 256, 512)
        self.down = nn.ModuleList(map(self._twice, (3, *widths), widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width // 2, 2, 2) for width in widths[:0:-1])
        self.joined = nn.ModuleList(self._twice(width, width // 2) for width in widths[:0:-1])
        self.classify = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            conv_bn(inputs, outputs, 3, activation=nn.ReLU), conv_bn(outputs, outputs, 3, activation=nn.ReLU)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> class scores (N, classes, H, W); H and W are multiples of 16."""
        seen: list[Tensor] = []
        for down in self.down:
            x = down(F.max_pool2d(x, 2) if seen else x)
            seen.append(x)
        for up, joined, skipped in zip(self.up, self.joined, seen[-2::-1], strict=True):
            x = joined(torch.cat((skipped, up(x)), 1))
        return self.classify(x)


class Tagger(nn.Module):
    """Embedding, LSTM, one linear layer for each token's tag."""

    def __init__(self, tags: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 128)
        self.lstm = nn.LSTM(128, 256, batch_first=True)
        self.classify = nn.Linear(256, tags)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (N, tokens) -> tag scores (N, tokens, tags)."""
        return self.classify(self.lstm(self.embedding(ids))[0])


def mobilenet_v2() -> nn.Module:
    """MobileNetV2, the class of ``examples``."""
    return example("mobilenet_v2", "MobileNetV2")()


def resnet(layer: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    """A ResNet of ``transformers``."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(layer_type=layer, depths=list(depths), hidden_sizes=list(widths), num_labels=1000)
    return OneTensor(ResNetForImageClassification(config))


def regnet_y() -> nn.Module:
    """RegNetY-400MF."""
    from transformers import RegNetConfig, RegNetForImageClassification

    widths, depths = [48, 104, 208, 440], [1, 3, 6, 6]
    config = RegNetConfig(
        layer_type="y", embedding_size=32, hidden_sizes=widths, depths=depths, groups_width=8, num_labels=1000
    )
    return OneTensor(RegNetForImageClassification(config))


def convnext_t() -> nn.Module:
    """ConvNeXt-T."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return OneTensor(ConvNextForImageClassification(ConvNextConfig(num_labels=1000, layer_scale_init_value=0.3)))


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}


def vit_s() -> nn.Module:
    """ViT-S/16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, image_size=128, num_labels=1000, attn_implementation="sdpa")
    return OneTensor(ViTForImageClassification(config))


def deit_s() -> nn.Module:
    """DeiT-S with its distillation token: the mean of both heads."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(**SMALL, image_size=128, num_labels=1000, attn_implementation="sdpa")
    return OneTensor(DeiTForImageClassificationWithTeacher(config))


def swin_t() -> nn.Module:
    """Swin-T."""
    from transformers import SwinConfig, SwinForImageClassification

    return OneTensor(SwinForImageClassification(SwinConfig(num_labels=1000)))


def bert_base() -> nn.Module:
    """BERT-base with a classifier of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, attn_implementation="sdpa")
    return Tokens(BertForSequenceClassification(config))


def distilbert() -> nn.Module:
    """DistilBERT with a classifier of two classes."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=VOCABULARY, attn_implementation="sdpa")
    return Tokens(DistilBertForSequenceClassification(config))


def minilm() -> nn.Module:
    """MiniLM (6 layers of 384), the mean of its last hidden states."""
    from transformers import BertConfig, BertModel

    sizes = {**SMALL, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = BertConfig(vocab_size=VOCABULARY, attn_implementation="sdpa", **sizes)
    return Tokens(BertModel(config, add_pooling_layer=False), "last_hidden_state", mean=True)


def _cnn(make: Callable[[], nn.Module], size: int = 128) -> Architecture:
    return Architecture(kind="cnn", make=make, inputs=partial(images, size=size))


def _vision_transformer(make: Callable[[], nn.Module], size: int = 128) -> Architecture:
    return Architecture(kind="transformer", make=make, inputs=partial(images, size=size))


def _text_transformer(make: Callable[[], nn.Module]) -> Architecture:
    return Architecture(kind="transformer", make=make, inputs=partial(tokens, masked=True))


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": _cnn(partial(resnet, "basic", (2, 2, 2, 2), (64, 128, 256, 512))),
    "resnet50": _cnn(partial(resnet, "bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048))),
    "resnext50": _cnn(resnext50),
    "mobilenet_v2": _cnn(mobilenet_v2),
    "mobilenet_v3": _cnn(mobilenet_v3),
    "efficientnet_b0": _cnn(efficientnet_b0),
    "shufflenet_v2": _cnn(shufflenet_v2),
    "densenet121": _cnn(densenet121),
    "regnet_y": _cnn(regnet_y),
    "convnext_t": Architecture(kind="cnn", make=convnext_t, inputs=partial(images, size=128)),
    "unet": _cnn(UNet, 96),
    "vit_s": _vision_transformer(vit_s),
    "deit_s": _vision_transformer(deit_s),
    "swin_t": _vision_transformer(swin_t, 224),  # its windows of 7 need 224, or padding in every stage
    "bert_base": _text_transformer(bert_base),
    "distilbert": _text_transformer(distilbert),
    "minilm": _text_transformer(minilm),
    "lstm_tagger": Architecture(kind="recurrent", make=Tagger, inputs=partial(tokens, masked=False)),
}
"""In the order of the breadth table."""
