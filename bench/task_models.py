"""Small models of eight tasks with random, well-scaled weights: what their outputs look like is as in the real ones.

Backbones have few and narrow layers, so that all of them are built in minutes; heads, activations and the layout of
outputs are the published ones. Weights are scaled as those of ``bench.architectures``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures import (
    VOCABULARY,
    Architecture,
    Arrays,
    MobileBlock,
    SqueezeExcite,
    UNet,
    conv_bn,
    images,
    tokens,
)

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
RELU, SILU = nn.ReLU, nn.SiLU


def grey(count: int, seed: int, *, height: int, width: int) -> Arrays:
    """float32 (count, 1, height, width)."""
    return (np.ascontiguousarray(images(count, seed, size=max(height, width))[0][:, :1, :height, :width]),)


def waves(count: int, seed: int, *, length: int) -> Arrays:
    """float32 (count, length): tones in noise, as recordings of 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(length) / 16_000
    tones = sum(
        random.uniform(0, 1, (count, 1)) * np.sin(2 * np.pi * random.uniform(80, 4000, (count, 1)) * time)
        for _ in range(5)
    )
    return ((tones + 0.1 * random.standard_normal((count, length))).astype(np.float32),)


def spectrograms(count: int, seed: int, *, bins: int, frames: int, bins_first: bool) -> Arrays:
    """float32 (count, bins, frames), or (count, frames, bins)."""
    picture = images(count, seed, size=max(bins, frames))[0][:, 0, :bins, :frames]
    return (np.ascontiguousarray(picture if bins_first else picture.swapaxes(1, 2)),)


class Named(nn.Module):
    """A model of ``transformers`` that returns some of its outputs by their names."""

    def __init__(self, model: nn.Module, *outputs: str, given: str = "") -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.given = given

    def forward(self, *tensors: Tensor) -> Any:
        """One tensor, or a dict of several."""
        made = self.model(**{self.given: tensors[0]}) if self.given else self.model(*tensors)
        named = {name: getattr(made, name) for name in self.outputs}
        return named if len(named) > 1 else next(iter(named.values()))


class Masked(Named):
    """The same for models of tokens and their mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """int64 (N, tokens), twice."""
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.outputs[0])


def backbone(widths: tuple[int, ...] = (16, 32, 48, 64), activation: type[nn.Module] = SILU) -> nn.ModuleList:
    """Stages that each halve height and width."""
    return nn.ModuleList(
        nn.Sequential(
            conv_bn(before, width, 3, 2, activation=activation), conv_bn(width, width, 3, activation=activation)
        )
        for before, width in zip((3, *widths), widths, strict=False)
    )


def stages(parts: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """What each stage makes of the one before."""
    made = []
    for part in parts:
        x = part(x)
        made.append(x)
    return made


class Yolo8(nn.Module):
    """Anchor-free, decoded: (N, 4 + classes, cells), boxes in pixels and scores, of strides 8 and 16."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.stages = backbone()
        self.boxes = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (48, 64))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in (48, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W)."""
        parts = []
        for level, stride, boxes, scores in zip(
            stages(self.stages, x)[2:], (8, 16), self.boxes, self.scores, strict=True
        ):
            rows = torch.arange(level.shape[2]).float() * stride + stride / 2
            columns = torch.arange(level.shape[3]).float() * stride + stride / 2
            centers = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).flatten(1)
            offsets = boxes(level).flatten(2)
            corner = centers + stride * torch.tanh(offsets[:, :2])
            sizes = 4 * stride * torch.exp(0.5 * torch.tanh(offsets[:, 2:]))
            parts.append(torch.cat([corner, sizes, (4 * scores(level).flatten(2) - 4).sigmoid()], 1))
        return torch.cat(parts, 2)


class Yolo5(nn.Module):
    """With objectness: (N, cells, 5 + classes), three anchors a cell."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.stages, self.classes = backbone(), classes
        self.head = nn.Conv2d(64, 3 * (5 + classes), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W)."""
        values = self.head(stages(self.stages, x)[-1])
        batch, _, height, width = values.shape
        values = values.view(batch, 3, 5 + self.classes, height, width).permute(0, 1, 3, 4, 2)
        shares = (2 * values - F.pad(torch.full((1,), 4.0), (4, self.classes))).sigmoid()
        return torch.cat([shares[..., :4] * 2 * 64, shares[..., 4:]], -1).flatten(1, 3)


class YoloRaw(nn.Module):
    """What training sees: a list of (N, anchors, 5 + classes, height, width) for three strides, not decoded."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.stages, self.classes = backbone(activation=nn.Mish), classes
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * (5 + classes), 1) for width in (32, 48, 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W)."""
        levels = stages(self.stages, x)[1:]
        return [head(x).unflatten(1, (3, 5 + self.classes)) for head, x in zip(self.heads, levels, strict=True)]


class Ssd(nn.Module):
    """SSDLite: boxes (N, cells, 4) and class scores (N, cells, classes) apart, the first class being none."""

    def __init__(self, classes: int = 9) -> None:
        super().__init__()
        self.stages = backbone(activation=nn.ReLU6)
        self.boxes = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in (48, 64))
        self.scores = nn.ModuleList(nn.Conv2d(width, classes, 3, padding=1) for width in (48, 64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W)."""
        levels = stages(self.stages, x)[2:]
        boxes, scores = (
            torch.cat([head(level).flatten(2).mT for head, level in zip(heads, levels, strict=True)], 1)
            for heads in (self.boxes, self.scores)
        )
        return {"boxes": boxes, "scores": scores.softmax(-1)}


class CenterNet(nn.Module):
    """Heatmap of centers, sizes and offsets (Zhou et al. 2019)."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stages = backbone(activation=RELU)
        self.up = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.heads = nn.ModuleDict({"heat": nn.Conv2d(32, classes, 1), "size": nn.Conv2d(32, 2, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W)."""
        x = F.relu(self.up(stages(self.stages, x)[-1]))
        return {"heat": (2 * self.heads["heat"](x) - 4).sigmoid(), "size": 20 + 10 * self.heads["size"](x)}


class DeepLab(nn.Module):
    """Atrous pyramid and a decoder that is joined with early features (DeepLabV3+)."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.stages = backbone(activation=RELU)
        self.rates = nn.ModuleList(
            nn.Sequential(nn.Conv2d(64, 32, 3, padding=rate, dilation=rate, bias=False), nn.BatchNorm2d(32), nn.ReLU())
            for rate in (1, 2, 4)
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 32, 1), nn.ReLU())
        self.project = conv_bn(4 * 32, 32, 1, activation=RELU)
        self.classify = nn.Sequential(conv_bn(64, 32, 3, activation=RELU), nn.Conv2d(32, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, classes, H, W)."""
        levels = stages(self.stages, x)
        deep = levels[-1]
        parts = [*(rate(deep) for rate in self.rates), self.pooled(deep).expand(-1, -1, *deep.shape[2:])]
        deep = F.interpolate(self.project(torch.cat(parts, 1)), scale_factor=4.0, mode="bilinear")
        return F.interpolate(self.classify(torch.cat([deep, levels[1]], 1)), scale_factor=4.0, mode="bilinear")


class Espcn(nn.Module):
    """Sub-pixel convolution behind tanh (Shi et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 16, 3, padding=1)
        self.last, self.shuffle = nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, 1, 2 H, 2 W)."""
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.shuffle(self.last(x))


class Edsr(nn.Module):
    """Residual blocks without batch norms (Lim et al. 2017)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, 2 H, 2 W)."""
        x = seen = self.head(x)
        for block in self.body:
            x = x + 0.2 * block(x)
        return self.tail(x + seen)


class Crnn(nn.Module):
    """Convolutions, then a two-way LSTM over the width: a character for each step (Shi et al. 2015)."""

    def __init__(self, characters: int = 37) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(conv_bn(1, 16, 3, activation=RELU), nn.MaxPool2d(2), conv_bn(16, 32, 3, activation=RELU)),
            *(nn.MaxPool2d(2), conv_bn(32, 64, 3, activation=RELU), nn.MaxPool2d((4, 1))),
        )
        self.lstm = nn.LSTM(128, 48, bidirectional=True, batch_first=True)
        self.classify = nn.Linear(96, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Grey lines (N, 1, 32, W) -> (N, W / 4, characters)."""
        return self.classify(self.lstm(self.convs(x).flatten(1, 2).mT)[0])


class Craft(nn.Module):
    """A U-Net that returns maps of characters and of links between them: (N, H / 2, W / 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(classes=16)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W)."""
        return self.last(F.max_pool2d(F.relu(self.unet(x)), 2)).sigmoid().permute(0, 2, 3, 1)


class ArcFace(nn.Module):
    """Residual blocks with PReLU and batch norms before the convolutions; embeddings of norm 1 (Deng et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 32, 48)
        self.stem = nn.Sequential(conv_bn(3, 24, 3, 2), nn.PReLU(24))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(before), conv_bn(before, width, 3), nn.PReLU(width), conv_bn(width, width, 3, 2))
            )
            for before, width in zip((24, *widths), widths, strict=False)
        )
        self.shortcuts = nn.ModuleList(
            conv_bn(before, width, 1, 2) for before, width in zip((24, *widths), widths, strict=False)
        )
        self.embed = nn.Linear(48 * 49, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Faces (N, 3, 112, 112) -> (N, 128)."""
        x = self.stem(x)
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = block(x) + shortcut(x)
        return F.normalize(self.embed(x.flatten(1)))


class ONet(nn.Module):
    """MTCNN's last network: whether it is a face, its box and five landmarks (Zhang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2))
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, k), nn.PReLU(b)) for a, b, k in widths)
        self.shared = nn.Sequential(nn.Linear(1152, 256), nn.PReLU(256))
        self.face, self.box, self.marks = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 48, 48) -> (N, 2), (N, 4), (N, 10)."""
        for number, conv in enumerate(self.convs):
            x = conv(x)
            x = F.max_pool2d(x, 2 if number == 2 else 3, 2, ceil_mode=True) if number < 3 else x
        x = self.shared(x.flatten(1))
        return self.face(x).softmax(1), self.box(x), self.marks(x)


class BlazeFace(nn.Module):
    """Depthwise blocks; raw boxes with landmarks (N, cells, 16), and a score for each (N, cells, 1)."""

    def __init__(self) -> None:
        super().__init__()
        blocks = ((16, 16, 24, 2), (24, 24, 32, 2), (32, 32, 48, 2))
        self.stem = conv_bn(3, 16, 5, 2, activation=RELU)
        self.blocks = nn.ModuleList(
            MobileBlock(inputs, hidden, outputs, 5, stride, RELU, None) for inputs, hidden, outputs, stride in blocks
        )
        self.boxes, self.scores = nn.Conv2d(48, 32, 1), nn.Conv2d(48, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 128, 128)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        boxes, scores = (head(x).permute(0, 2, 3, 1).flatten(1) for head in (self.boxes, self.scores))
        return 32 * boxes.unflatten(1, (-1, 16)), scores.unflatten(1, (-1, 1))


class AgeNet(nn.Module):
    """Squeeze-excite blocks and one number for each face, around 40."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2, activation=nn.Hardswish)
        gates = (SqueezeExcite(width, 8, nn.ReLU, nn.Hardsigmoid) for width in (48, 72))
        self.first = MobileBlock(16, 48, 24, 3, 2, nn.Hardswish, next(gates))
        self.second = MobileBlock(24, 72, 32, 5, 2, nn.Hardswish, next(gates))
        self.age = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 1)."""
        return 40 + 8 * self.age(self.second(self.first(self.stem(x))).mean((2, 3)))


class Sound(nn.Module):
    """M5: convolutions on raw sound (Dai et al. 2017)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = ((1, 32, 80, 16), (32, 32, 3, 1), (32, 64, 3, 1))
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv1d(a, b, k, s), nn.ReLU()) for a, b, k, s in widths)
        self.classify = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, samples) -> (N, classes)."""
        x = x[:, None]
        for conv in self.convs:
            x = F.max_pool1d(conv(x), 4)
        return self.classify(x.mean(2))


def transformer(name: str, config: dict[str, Any], *outputs: str, given: str = "", masked: bool = False) -> nn.Module:
    """A model of ``transformers`` by its class's name and what its configuration differs in."""
    import transformers

    kind = getattr(transformers, name)
    model = kind(kind.config_class(**config))
    return Masked(model, *outputs) if masked else Named(model, *outputs, given=given)


def resnet_config(kind: str) -> Any:
    """A small ResNet as the backbone of DETR and RT-DETR."""
    import transformers

    widths: dict[str, Any] = {"depths": [1, 1, 1, 1], "layer_type": "basic", "hidden_sizes": [16, 32, 48, 64]}
    levels = ["stage4"] if kind == "ResNetConfig" else ["stage2", "stage3", "stage4"]
    return getattr(transformers, kind)(**widths, embedding_size=16, out_features=levels)


def detr() -> nn.Module:
    """DETR of three layers."""
    sizes = {"d_model": 96, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "num_queries": 20}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    own = {"use_pretrained_backbone": False, "use_timm_backbone": False, "backbone": None}
    config = {**sizes, **layers, **own, "backbone_config": resnet_config("ResNetConfig")}
    return transformer("DetrForObjectDetection", config, "logits", "pred_boxes", given="pixel_values")


def rt_detr() -> nn.Module:
    """RT-DETR, whose batch torch.export cannot make dynamic."""
    sizes = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_in_channels": [64, 64, 64]}
    config = {**sizes, **heads, "num_queries": 30, "decoder_layers": 2, "anchor_image_size": None}
    config |= {"encoder_in_channels": [32, 48, 64], "backbone_config": resnet_config("RTDetrResNetConfig")}
    return transformer("RTDetrForObjectDetection", config, "logits", "pred_boxes", given="pixel_values")


def text(name: str, output: str = "logits", **config: Any) -> Callable[[], nn.Module]:
    """A model of tokens and their mask."""
    return partial(transformer, name, {**SMALL, "vocab_size": VOCABULARY, **config}, output, masked=True)


def vision(name: str, *outputs: str, **config: Any) -> Callable[[], nn.Module]:
    """A model of images."""
    return partial(transformer, name, config, *outputs, given="pixel_values")


def _cnn(make: Callable[[], nn.Module], size: int) -> Architecture:
    return Architecture(kind="cnn", make=make, inputs=partial(images, size=size))


def _of(make: Callable[[], nn.Module], inputs: Callable[[int, int], Arrays]) -> Architecture:
    return Architecture(kind="transformer", make=make, inputs=inputs)


def _text(make: Callable[[], nn.Module]) -> Architecture:
    return _of(make, partial(tokens, masked=True))


SEGFORMER: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 96], "decoder_hidden_size": 64, "depths": [1, 1, 1, 1]}
DPT: dict[str, Any] = {"neck_hidden_sizes": [16, 24, 32, 48], "fusion_hidden_size": 32, "image_size": 64}
SPEECH: dict[str, Any] = {"conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4)}

TASKS: dict[str, dict[str, Architecture]] = {
    "detection": {
        "yolo_v8": _cnn(Yolo8, 96),
        "yolo_v5": _cnn(Yolo5, 96),
        "yolo_raw": _cnn(YoloRaw, 96),
        "ssd_lite": _cnn(Ssd, 96),
        "center_net": _cnn(CenterNet, 96),
        "detr": _of(detr, partial(images, size=96)),
        "rt_detr": _of(rt_detr, partial(images, size=96)),
        "yolos": _of(
            vision("YolosForObjectDetection", "logits", "pred_boxes", **SMALL, image_size=[64, 64],
                   num_detection_tokens=10, use_mid_position_embeddings=False),
            partial(images, size=64),
        ),
    },
    "segmentation": {
        "unet": _cnn(UNet, 64),
        "deep_lab": _cnn(DeepLab, 96),
        "segformer": _of(vision("SegformerForSemanticSegmentation", "logits", **SEGFORMER), partial(images, size=96)),
    },
    "depth": {
        "dpt": _of(
            vision("DPTForDepthEstimation", "predicted_depth", **SMALL, **DPT, backbone_out_indices=[0, 1, 2, 2],
                   is_hybrid=False),
            partial(images, size=64),
        ),
        "glpn": _of(
            vision("GLPNForDepthEstimation", "predicted_depth", hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1]),
            partial(images, size=64),
        ),
    },
    "super-resolution": {
        "espcn": Architecture(kind="cnn", make=Espcn, inputs=partial(grey, height=48, width=64)),
        "edsr": _cnn(Edsr, 48),
        "swin2sr": _of(
            vision("Swin2SRForImageSuperResolution", "reconstruction", embed_dim=24, depths=[1, 1], num_heads=[2, 2],
                   image_size=32),
            partial(images, size=32),
        ),
    },
    "OCR": {
        "crnn": Architecture(kind="cnn", make=Crnn, inputs=partial(grey, height=32, width=96)),
        "craft": _cnn(Craft, 64),
    },
    "face": {
        "arc_face": _cnn(ArcFace, 112),
        "mtcnn_onet": _cnn(ONet, 48),
        "blaze_face": _cnn(BlazeFace, 128),
        "age": _cnn(AgeNet, 96),
    },
    "audio": {
        "m5": Architecture(kind="cnn", make=Sound, inputs=partial(waves, length=8000)),
        "wav2vec2": _of(
            partial(transformer, "Wav2Vec2ForCTC", {**SMALL, **SPEECH, "num_conv_pos_embeddings": 16, "vocab_size": 32,
                                                    "num_conv_pos_embedding_groups": 4}, "logits"),
            partial(waves, length=8000),
        ),
        "ast": _of(
            partial(transformer, "ASTForAudioClassification", {**SMALL, "max_length": 64, "num_mel_bins": 32},
                    "logits"),
            partial(spectrograms, bins=32, frames=64, bins_first=False),
        ),
    },
    "text": {
        "bert_tags": _text(text("BertForTokenClassification", num_labels=9)),
        "roberta": _text(text("RobertaForSequenceClassification", num_labels=3, max_position_embeddings=80)),
        "albert": _text(text("AlbertForSequenceClassification", embedding_size=32)),
        "electra": _text(text("ElectraForSequenceClassification", num_labels=1, embedding_size=32)),
        "mpnet": _text(text("MPNetModel", "last_hidden_state", max_position_embeddings=80)),
        "t5_encoder": _text(text("T5EncoderModel", "last_hidden_state", d_model=96, d_kv=24, d_ff=192, num_heads=4)),
    },
}  # fmt: skip
"""The models by what they do."""
