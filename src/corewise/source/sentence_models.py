"""Models of sentence-transformers, from their folders or as objects; the package itself is not needed.

A folder's ``modules.json`` lists its modules: a Transformer, a Pooling, and perhaps Dense and Normalize.
https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corewise.common.errors import SourceError
from corewise.common.phrases import with_article
from corewise.common.references import guard
from corewise.records.pipeline import Activation
from corewise.source.loaded import Loaded
from corewise.source.packages import import_package
from corewise.source.pooling import Normalized, Way
from corewise.source.transformers_models import activation_of, encoder_class, longest, quiet, vectors, with_head

MODULES = "modules.json"
WAYS: dict[str, Way] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "sqrt",
    "weightedmean": "weighted",
    "lasttoken": "last",
}
"""Modes of a Pooling, in the order in which their vectors are joined."""
MODE = "pooling_mode_"
OTHER_WAY = "give a function that returns it as a torch.nn.Module, with --tokenizer"
ACTIVATIONS = {
    kind.__name__: kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Mish)
}


def load_sentence_model(name: str) -> Loaded:
    """The model that ``st:FOLDER`` or ``st:NAME`` names: an encoder of sentences or a cross-encoder, in fp32.

    Raises ``SourceError`` for a folder of another kind and for modules that are not supported.
    """
    transformers = import_package("transformers", "st")
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    with quiet(), guard(SourceError, f"st:{name} cannot be loaded", "check that all its files are there"):
        if not (folder / MODULES).is_file():
            return _cross_encoder_folder(transformers, folder, name)
        parts = [(str(part["type"]).rpartition(".")[2], folder / part["path"]) for part in _json(folder / MODULES)]
        if not parts or parts[0][0] != "Transformer":
            first = parts[0][0] if parts else "nothing"
            raise SourceError(f"st:{name} begins with {first}, not with a Transformer", OTHER_WAY)
        base = parts[0][1]
        settings = _settings(base)
        config = transformers.AutoConfig.from_pretrained(base)
        model = encoder_class(transformers, config).from_pretrained(base, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        poolings, after = _modules(parts[1:], name)
        most = longest(tokenizer, model.config)
        prompts = _optional(folder / "config_sentence_transformers.json")
    return vectors(
        model,
        tokenizer,
        poolings=poolings,
        after=after,
        max_length=min(settings.get("max_seq_length") or most, most),
        lower=bool(settings.get("do_lower_case")),
        normalize=any(isinstance(part, Normalized) for part in after),
        **_prompts(prompts.get("prompts"), prompts.get("default_prompt_name")),
    )


def is_sentence_model(model: Any) -> bool:
    """Whether it is a ``SentenceTransformer`` or a ``CrossEncoder`` object, by its class path."""
    return bool(_kinds(model))


def from_sentence_model(model: Any) -> Loaded:
    """The model of a ``SentenceTransformer`` or ``CrossEncoder`` object. Raises ``SourceError`` as for folders."""
    kinds = _kinds(model)
    if "CrossEncoder" in kinds:
        activation = type(getattr(model, "activation_fn", None) or model.default_activation_function).__name__
        return _cross_encoder(model.model, model.tokenizer, _activation(activation), model.max_length or 0)
    parts = list(model)
    first, rest = parts[0], parts[1:]
    if type(first).__name__ != "Transformer":
        raise SourceError(f"the model begins with {type(first).__name__}, not with a Transformer", OTHER_WAY)
    poolings: Sequence[Way] = ("none",)
    after: list[nn.Module] = []
    for part in rest:
        kind = type(part).__name__
        if kind == "Pooling":
            poolings = _poolings(part.get_config_dict(), "the model")
        elif kind == "Normalize":
            after.append(Normalized())
        elif kind == "Dense":
            after += [part.linear, part.activation_function]
        elif kind != "Dropout":
            raise SourceError(f"the model has {with_article(kind)}, which is not supported", OTHER_WAY)
    return vectors(
        first.auto_model,
        first.tokenizer,
        poolings=poolings,
        after=after,
        max_length=int(model.max_seq_length or longest(first.tokenizer, first.auto_model.config)),
        lower=bool(getattr(first, "do_lower_case", False)),
        normalize=any(isinstance(part, Normalized) for part in after),
        **_prompts(model.prompts, model.default_prompt_name),
    )


def _kinds(model: Any) -> set[str]:
    """The classes of sentence-transformers that an object is of."""
    named = {"SentenceTransformer", "CrossEncoder"}
    ours = (kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == "sentence_transformers")
    return {kind.__name__ for kind in ours} & named


def _downloaded(name: str) -> Path:
    hub = import_package("huggingface_hub", "st")
    repository = name if "/" in name else f"sentence-transformers/{name}"
    files = ["*.json", "*.safetensors", "*.txt", "*.model"]
    with guard(SourceError, f"st:{name} cannot be loaded", "check the name, the network, or give a local folder"):
        return Path(hub.snapshot_download(repository, allow_patterns=files))


def _modules(parts: list[tuple[str, Path]], name: str) -> tuple[Sequence[Way], list[nn.Module]]:
    """The ways to pool, and the modules after them."""
    poolings: Sequence[Way] = ("none",)
    after: list[nn.Module] = []
    for kind, place in parts:
        if kind == "Pooling":
            poolings = _poolings(_json(place / "config.json"), f"st:{name}")
        elif kind == "Normalize":
            after.append(Normalized())
        elif kind == "Dense":
            after += _dense(place, name)
        elif kind != "Dropout":
            raise SourceError(f"st:{name} has {with_article(kind)}, which is not supported", OTHER_WAY)
    return poolings, after


def _poolings(config: Mapping[str, Any], name: str) -> Sequence[Way]:
    """The ways to pool that a Pooling's configuration names, in new files by ``pooling_mode``."""
    told = config.get("pooling_mode")
    if told is None:
        used = [
            mode.removeprefix(MODE) for mode, is_used in config.items() if mode.startswith(MODE) and is_used is True
        ]
        modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in used] or ["mean"]
        modes.sort(key=lambda mode: [*WAYS, mode].index(mode))
    else:
        listed = told if isinstance(told, list | tuple) and told else [told]
        modes = [str(mode).removesuffix("_tokens") for mode in listed]
    unknown = [mode for mode in modes if mode not in WAYS]
    if unknown or config.get("include_prompt") is False:
        why = f"by {unknown[0]}" if unknown else "without the prompt's tokens"
        raise SourceError(f"{name} pools {why}, which is not supported", OTHER_WAY)
    return [WAYS[mode] for mode in modes]


def _dense(place: Path, name: str) -> list[nn.Module]:
    from safetensors.torch import load_file

    config = _json(place / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2]
    if activation not in ACTIVATIONS or not (place / "model.safetensors").is_file():
        raise SourceError(f"st:{name} has a Dense with {activation} that cannot be read from {place}", OTHER_WAY)
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    weights = load_file(place / "model.safetensors")
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return [linear, ACTIVATIONS[activation]()]


def _cross_encoder_folder(transformers: Any, folder: Path, name: str) -> Loaded:
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise SourceError(
            f"st:{name} is not a sentence-transformers model: it has no {MODULES}", f"try hf:{name} --pooling mean"
        )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return _cross_encoder(model, transformers.AutoTokenizer.from_pretrained(folder), activation_of(config), 0)


def _cross_encoder(model: Any, tokenizer: Any, activation: Activation | None, max_length: int) -> Loaded:
    single = model.config.num_labels == 1
    return with_head(
        model,
        tokenizer,
        "ForSequenceClassification",
        task="scores" if single else "classes",
        max_length=max_length,
        pairs=True,
        activation=activation or ("sigmoid" if single else "none"),
    )


def _activation(name: str) -> Activation:
    known: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none", "Softmax": "softmax"}
    if name not in known:
        raise SourceError(f"the cross-encoder's scores go through {name}, which is not supported", OTHER_WAY)
    return known[name]


def _prompts(prompts: Any, default: Any) -> dict[str, Any]:
    """The prompts that are texts, and the name of the default one."""
    named = {str(name): str(text) for name, text in (prompts or {}).items() if isinstance(text, str)}
    return {"prompts": named, "default_prompt": default if default in named else None}


def _settings(folder: Path) -> dict[str, Any]:
    """``sentence_bert_config.json``, which older folders call by their architecture."""
    return next((_json(path) for path in sorted(folder.glob("sentence_*_config.json"))), {})


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
