"""Loading the user's model by a reference."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from corewise.common.errors import SourceError
from corewise.common.references import call_reference, guard
from corewise.source.program import load_program

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def load(reference: str) -> nn.Module | ExportedProgram:
    """The model that ``reference`` names. Raises ``SourceError``.

    - ``module:factory`` or ``path/to/file.py:factory``: what the function returns without arguments;
    - ``path/to/model.pt2``: a program saved with ``torch.export.save`` (see ``load_program``);
    - ``timm:NAME``, ``torchvision:NAME``: that package's model with its pretrained weights;
    - ``hf:NAME`` or ``hf:FOLDER``: a transformers model of the hub or of a local folder, in fp32.
    """
    prefix, name = split_reference(reference)
    path = Path(reference)
    if prefix:
        model = HUBS[prefix](name)
    elif path.suffix == ".pt2":
        return load_program(path)
    elif path.suffix in PICKLES:
        raise SourceError(
            f"{reference} is a pickle, which can run any code when it is opened",
            "write a factory that fills the model by torch.load(..., weights_only=True) or safetensors, or save the"
            " model with torch.export.save as .pt2",
        )
    elif ":" in reference:
        model = call_reference(reference, SourceError, "model factory")
    else:
        raise SourceError(
            f"{reference!r} names no model",
            "give module:factory, file.py:factory, a .pt2 file, or hf:, timm:, torchvision:",
        )
    if not isinstance(model, nn.Module | ExportedProgram):
        raise SourceError(f"{reference} returned {_named(model)}, not a torch.nn.Module", "return the model itself")
    return model


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def split_reference(reference: str) -> tuple[str, str]:
    """The library of a reference, such as ``timm``, and the name there; both empty for others."""
    prefix, _, name = reference.partition(":")
    return (prefix, name) if prefix in HUBS and name else ("", "")


def import_package(name: str, prefix: str) -> Any:
    """A library of models. Raises ``SourceError`` where it is missing or does not fit."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SourceError(f"{prefix}: models need the package {error.name}", f"pip install {error.name}") from error
    except (ImportError, RuntimeError) as error:
        # torchvision registers operators that must have been compiled for the torch that is installed.
        raise SourceError(
            f"{name} does not fit torch {torch.__version__}: {str(error).partition(chr(10))[0]}",
            f"install the {name} that was built for this torch, from the same package index",
        ) from error


def _timm(name: str) -> Any:
    timm = import_package("timm", "timm")
    with guard(SourceError, f"timm:{name} cannot be loaded", "check its name with timm.list_models(pretrained=True)"):
        return timm.create_model(name, pretrained=True)


def _torchvision(name: str) -> Any:
    models = import_package("torchvision.models", "torchvision")
    with guard(
        SourceError, f"torchvision:{name} cannot be loaded", "check its name with torchvision.models.list_models()"
    ):
        return models.get_model(name, weights="DEFAULT")


def _transformers(name: str) -> Any:
    transformers = import_package("transformers", "hf")
    with guard(SourceError, f"hf:{name} cannot be loaded", "check the name, the network, or give a local folder"):
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, transformers.AutoModel)
        return model_class.from_pretrained(name, dtype=torch.float32)


HUBS = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
