"""Loading the user's model by a reference."""

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from corewise.common.errors import SourceError
from corewise.common.phrases import with_article
from corewise.common.references import call_reference, guard
from corewise.records.pipeline import Pooling
from corewise.source.class_names import own_class_names
from corewise.source.loaded import Loaded, tokenizer_file, with_tokenizer
from corewise.source.packages import import_package
from corewise.source.pooling import POOLINGS
from corewise.source.program import load_program
from corewise.source.sentence_models import from_sentence_model, is_sentence_model

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
FOREIGN = {".onnx": "an ONNX model", ".xml": "OpenVINO's IR", ".keras": "a Keras model", ".tflite": "a LiteRT model"}


def load(reference: str) -> nn.Module | ExportedProgram:
    """The model that ``reference`` names. Raises ``SourceError``.

    - ``module:factory`` or ``path/to/file.py:factory``: what the function returns without arguments, or the model that
      has this name there;
    - ``path/to/model.pt2``: a program saved with ``torch.export.save`` (see ``load_program``);
    - ``timm:NAME``, ``torchvision:NAME``: that package's model with its pretrained weights;
    - ``hf:NAME`` or ``hf:FOLDER``: a transformers model of the hub or of a local folder, in fp32;
    - ``st:NAME`` or ``st:FOLDER``: the same of sentence-transformers.
    """
    return load_with_texts(reference).model


def load_with_texts(model: Any, *, tokenizer: Any = None, pooling: Pooling | None = None) -> Loaded:
    """A model and, if it takes texts, its pipeline and tokenizer.

    Args:
        model: A reference as ``load`` takes it, a module, a program, or a ``SentenceTransformer`` or ``CrossEncoder``.
        tokenizer: The path of a ``tokenizer.json``, or a tokenizer of transformers or of tokenizers, for a model that
            brings none, or instead of its own.
        pooling: What makes one vector of a text's token vectors, for a model without a head.

    Raises:
        SourceError: The model cannot be loaded, or the tokenizer or pooling does not fit.
    """
    if pooling not in (None, *POOLINGS):
        raise SourceError(f"there is no pooling {pooling!r}", f"give one of {', '.join(POOLINGS)}")
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        with TemporaryDirectory(prefix="corewise-") as folder:
            return load_with_texts(model, tokenizer=tokenizer_file(tokenizer, Path(folder)), pooling=pooling)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    if isinstance(model, str):
        prefix, name = split_reference(model)
        loaded = TEXT_HUBS[prefix](name, pooling, tokenizer) if prefix in TEXT_HUBS else _from_object(_load(model))
        if loaded.pipeline is None:
            loaded = replace(loaded, class_names=own_class_names(loaded.model, prefix, name))
    else:
        loaded = _from_object(model)
    if loaded.pipeline is None and tokenizer is not None:
        loaded = _with_own_head(loaded, tokenizer, pooling)
    if loaded.pipeline is not None and pooling not in (None, loaded.pipeline.pooling):
        raise SourceError("the model brings its own pooling", "leave out pooling")
    if loaded.pipeline is not None and tokenizer is None:
        return loaded
    if tokenizer is None:
        if pooling is not None:
            raise SourceError("--pooling needs a tokenizer, and the model brings none", "give --tokenizer too")
        return loaded
    return with_tokenizer(loaded, tokenizer, pooling)


def _from_object(model: Any) -> Loaded:
    if is_sentence_model(model):
        return from_sentence_model(model)
    return Loaded(model=model, class_names=own_class_names(model))


def _with_own_head(loaded: Loaded, tokenizer: Path, pooling: Pooling | None) -> Loaded:
    """A model object of transformers with the pipeline that its head has; others as they are."""
    if not type(loaded.model).__module__.startswith("transformers.models."):
        return loaded
    from corewise.source.transformers_models import from_transformers_model

    found = from_transformers_model(loaded.model, tokenizer, pooling)
    return loaded if found.pipeline is None else found


def _load(reference: str) -> nn.Module | ExportedProgram:
    prefix, name = split_reference(reference)
    path = Path(reference)
    library, _, rest = reference.partition(":")
    if library in (*HUBS, *TEXT_HUBS) and not rest.strip():
        raise SourceError(f"{reference!r} names no model", f"give {library}:NAME")
    if prefix in HUBS:
        model = HUBS[prefix](name)
    elif path.suffix == ".pt2":
        return load_program(path)
    elif path.suffix in FOREIGN:
        raise SourceError(
            f"{reference} is {FOREIGN[path.suffix]}, and corewise begins with the PyTorch model",
            "give the code that builds that model, as file.py:function, or a .pt2 file of torch.export.save",
        )
    elif path.is_dir():
        raise SourceError(f"{reference} is a folder", f"write hf:{reference} or st:{reference} if it holds a model")
    elif path.suffix in PICKLES:
        raise SourceError(
            f"{reference} is a pickle, which can run any code when it is opened",
            "write a function that fills the model with torch.load(..., weights_only=True) or safetensors, or save the"
            " model with torch.export.save as .pt2",
        )
    elif ":" in reference:
        model = call_reference(reference, SourceError, "model factory", is_model)
    else:
        raise SourceError(
            f"{reference!r} does not name a model",
            "give module:factory, file.py:factory, a .pt2 file, or hf:, st:, timm:, torchvision:",
        )
    if not is_model(model):
        raise SourceError(f"{reference} returned {_named(model)}, not a torch.nn.Module", "return the model itself")
    return model  # type: ignore[no-any-return]


def is_model(value: Any) -> bool:
    """Whether it is a module or an exported program, and no function or class that makes one."""
    return isinstance(value, nn.Module | ExportedProgram)


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else with_article(type(value).__name__)


def split_reference(reference: str) -> tuple[str, str]:
    """The library of a reference, such as ``timm``, and the name there; both empty for others.

    A folder below ``~`` becomes its full path here, because shells do not expand ``~`` behind a colon.
    """
    prefix, _, name = reference.partition(":")
    if not (prefix in HUBS or prefix in TEXT_HUBS) or not name:
        return "", ""
    return prefix, os.path.expanduser(name) if prefix in TEXT_HUBS else name


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


def _transformers(name: str, pooling: Pooling | None, tokenizer: Path | None) -> Loaded:
    from corewise.source.transformers_models import load_transformers

    _check_folder(name)
    return load_transformers(name, pooling, tokenizer)


def _sentence_transformers(name: str, pooling: Pooling | None, tokenizer: Path | None) -> Loaded:
    from corewise.source.sentence_models import load_sentence_model

    if pooling is not None:
        raise SourceError(f"st:{name} brings its own pooling", "leave out --pooling, or give hf: instead of st:")
    _check_folder(name)
    return load_sentence_model(name)


def _check_folder(name: str) -> None:
    """Raise ``SourceError`` if the name is a path, which no model of the hub has for a name, and no folder is there."""
    if Path(name).is_file():
        raise SourceError(f"{name} is a file", "give the folder with the model's config.json")
    if (name.startswith(("/", ".")) or name.count("/") > 1) and not Path(name).is_dir():
        raise SourceError(f"there is no folder {name}", "check the path")


HUBS = {"timm": _timm, "torchvision": _torchvision}
TEXT_HUBS = {"hf": _transformers, "st": _sentence_transformers}
