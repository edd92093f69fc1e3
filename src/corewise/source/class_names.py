"""The names of a model's classes, where its library has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from corewise.source.packages import import_package

UNNAMED = "LABEL_"
"""How transformers calls classes that nobody named."""


def own_class_names(model: Any, library: str = "", name: str = "") -> tuple[str, ...]:
    """The names in the order of the model's scores; none where nobody says them.

    Args:
        model: The module: ``config.id2label`` of transformers, ``pretrained_cfg`` of timm, and ``names`` as
            Ultralytics has them are read.
        library: The library that a reference named, such as ``torchvision``, whose weights have ``categories``.
        name: The model's name there.
    """
    if library == "torchvision":
        weights = import_package("torchvision.models", "torchvision").get_model_weights(name).DEFAULT
        return _strings(weights.meta.get("categories"))
    if isinstance(found := getattr(getattr(model, "config", None), "id2label", None), Mapping):
        names = _strings(found)
        return () if any(one.startswith(UNNAMED) for one in names) else names
    if isinstance(found := getattr(model, "pretrained_cfg", None), Mapping):
        # A model of the user's own may have learned other thousand classes than ImageNet's.
        return _strings(found.get("label_names")) or (_of_imagenet(model) if library == "timm" else ())
    return _strings(getattr(model, "names", None))


def _of_imagenet(model: Any) -> tuple[str, ...]:
    """The names of ImageNet's classes, for a model of timm that knows a subset of them."""
    data = import_package("timm.data", "timm")
    subset = data.infer_imagenet_subset(model)
    return _strings(data.ImageNetInfo(subset).label_descriptions()) if subset else ()


def _strings(names: Any) -> tuple[str, ...]:
    """Names in a list, or in a mapping from 0, 1, ...; none where it is something else."""
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            return ()
        names = [names[number] for number in range(len(names))]
    usable = isinstance(names, Sequence) and not isinstance(names, str)
    return tuple(names) if usable and all(isinstance(one, str) for one in names) else ()
