"""source.class_names: names that a model's library has."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from corewise.source.class_names import own_class_names
from corewise.source.models import load_with_texts


def module(**attributes: Any) -> nn.Module:
    made = nn.Identity()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (module(config=SimpleNamespace(id2label={0: "cat", 1: "dog"})), ("cat", "dog")),
        (module(config=SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})), ()),
        (module(config=SimpleNamespace(id2label={1: "cat", 3: "dog"})), ()),
        (module(names={0: "person", 1: "bicycle"}), ("person", "bicycle")),
        (module(names=["person", "bicycle"]), ("person", "bicycle")),
        (module(names="person"), ()),
        (module(pretrained_cfg={"label_names": ["ant", "bee"]}), ("ant", "bee")),
        (module(), ()),
    ],
)
def test_the_names_that_a_model_brings(model: nn.Module, expected: tuple[str, ...]) -> None:
    assert own_class_names(model) == expected
    assert load_with_texts(model).class_names == expected


def test_the_names_that_a_librarys_weights_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    models: Any = ModuleType("torchvision.models")
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(meta={"categories": ["__background__", "person"]}))
    models.get_model_weights = lambda name: {"ssd": weights}[name]
    data: Any = ModuleType("timm.data")
    data.infer_imagenet_subset = lambda model: "imagenet-1k" if model.num_classes == 1000 else None
    data.ImageNetInfo = lambda subset: SimpleNamespace(
        label_descriptions=lambda: [f"{subset} {k}" for k in range(1000)]
    )
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    assert own_class_names(module(), "torchvision", "ssd") == ("__background__", "person")
    thousand = module(pretrained_cfg={"tag": "in1k"}, num_classes=1000)
    assert own_class_names(thousand, "timm", "resnet50")[7] == "imagenet-1k 7"
    assert own_class_names(thousand) == ()
    assert own_class_names(module(pretrained_cfg={}, num_classes=10_000), "timm", "inat") == ()
