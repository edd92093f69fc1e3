"""Models of sentence-transformers, from their folders or as objects; the package itself is not needed.

A folder's ``modules.json`` lists its modules: a Transformer, a Pooling, and perhaps Dense and Normalize. That of a
cross-encoder has a Transformer for sequence classification alone, and older cross-encoders have no such file.
https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from corewise.common.errors import SourceError
from corewise.common.phrases import with_article
from corewise.common.references import guard
from corewise.records.pipeline import Activation
from corewise.source.loaded import Loaded
from corewise.source.packages import NO_CODE, import_package, without_code
from corewise.source.pooling import Leading, Normalized, Way
from corewise.source.transformers_models import (
    activation_name,
    from_pretrained,
    longest,
    quiet,
    vectors,
    with_head,
    without_head,
)

PACKAGE = "sentence_transformers"
MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
EMBEDS, CLASSIFIES = "feature-extraction", "sequence-classification"
"""Tasks of a Transformer."""
GIVES = {EMBEDS: "last_hidden_state", CLASSIFIES: "logits"}
"""What a Transformer of each task gives for texts, in the files of new versions."""
HARMLESS = {"max_length", "padding", "truncation", "pad_to_multiple_of"}
"""Settings of a tokenizer that change no answers of texts within the maximum length."""
OPENING = ("model", "tokenizer", "processor", "config")
"""What files say how to open: each with ``_args`` or ``_kwargs`` behind it."""
HARMLESS_OPENING = {
    *("trust_remote_code", "use_cache", "use_fast", "use_safetensors", "padding_side", "model_max_length"),
    *("dtype", "torch_dtype", "device_map", "low_cpu_mem_usage", "attn_implementation", "add_pooling_layer"),
    *("export", "file_name", "provider"),
}
"""What may be said there without another answer in fp32 on a CPU."""
OLD_WEIGHTS = ["pytorch_model*.bin*", "0_Transformer/pytorch_model*.bin*"]
"""Files of models from before safetensors; transformers reads no more than tensors of them."""
SENTENCE = "sentence_embedding"
"""The vector that modules behind a Pooling take and give."""
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


class _Module(NamedTuple):
    """A module behind the Transformer: its class, its configuration, and what a Dense computes."""

    kind: str
    config: Callable[[], Mapping[str, Any]]
    dense: Callable[[], list[nn.Module]]


def load_sentence_model(name: str) -> Loaded:
    """The model that ``st:FOLDER`` or ``st:NAME`` names: an encoder of sentences or a cross-encoder, in fp32.

    Raises ``SourceError`` for a folder of another kind and for modules that are not supported.
    """
    transformers = import_package("transformers", "st")
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    fix = "check that all its files are there"
    with quiet(), guard(SourceError, f"st:{name} cannot be loaded", fix), without_code(f"st:{name}"):
        facts = _optional(folder / SETTINGS)
        if not (folder / MODULES).is_file():
            return _cross_encoder_folder(transformers, folder, name, facts, {})
        parts = [(_kind(part["type"], f"st:{name}"), folder / part["path"]) for part in _json(folder / MODULES)]
        if not parts or parts[0][0] != "Transformer":
            first = parts[0][0] if parts else "nothing"
            raise SourceError(f"st:{name} begins with {first}, not with a Transformer", OTHER_WAY)
        base = parts[0][1]
        settings = _settings(base)
        if settings.get("transformer_task") == CLASSIFIES and len(parts) == 1:
            _check_transformer(settings, f"st:{name}", CLASSIFIES)
            return _cross_encoder_folder(transformers, base, name, facts, settings)
        _check_transformer(settings, f"st:{name}")
        model = without_head(transformers, transformers.AutoConfig.from_pretrained(base, **NO_CODE), base)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **NO_CODE)
        modules = (_module_in(kind, place, f"st:{name}") for kind, place in parts[1:])
        poolings, after = _modules(modules, f"st:{name}", facts.get("truncate_dim"))
        return vectors(
            model,
            tokenizer,
            poolings=poolings,
            after=after,
            max_length=longest(tokenizer, model.config, _told_length(settings)),
            lower=bool(settings.get("do_lower_case")),
            **_prompts(facts.get("prompts"), facts.get("default_prompt_name")),
        )


def is_sentence_model(model: Any) -> bool:
    """Whether it is a ``SentenceTransformer`` or a ``CrossEncoder`` object, by its class path."""
    return bool(_kinds(model))


def from_sentence_model(model: Any) -> Loaded:
    """The model of a ``SentenceTransformer`` or ``CrossEncoder`` object. Raises ``SourceError`` as for folders."""
    if "CrossEncoder" in _kinds(model):
        return _cross_encoder_object(model)
    parts = list(model)
    first, rest = parts[0], parts[1:]
    if type(first).__name__ != "Transformer":
        raise SourceError(f"the model begins with {type(first).__name__}, not with a Transformer", OTHER_WAY)
    _check_backend(first)
    settings = {**_settings_of(first), "max_seq_length": model.max_seq_length}
    _check_transformer(settings, "the model")
    poolings, after = _modules(map(_module_of, rest), "the model", getattr(model, "truncate_dim", None))
    return vectors(
        first.auto_model,
        first.tokenizer,
        poolings=poolings,
        after=after,
        max_length=longest(first.tokenizer, first.auto_model.config, _told_length(settings)),
        lower=bool(getattr(first, "do_lower_case", False)),
        **_prompts(model.prompts, model.default_prompt_name),
    )


def _cross_encoder_object(model: Any) -> Loaded:
    inner = model.model
    _check_backend(model)
    parts = [type(part).__name__ for part in model] if isinstance(model, nn.Sequential) else ["Transformer"]
    if parts != ["Transformer"] or not isinstance(inner, nn.Module):
        raise SourceError(f"the cross-encoder is made of {', '.join(parts)}, which is not supported", OTHER_WAY)
    activation = getattr(model, "activation_fn", None) or model.default_activation_function
    settings = _settings_of(next(iter(model))) if isinstance(model, nn.Sequential) else {}
    _check_transformer({"transformer_task": CLASSIFIES, **settings}, "the cross-encoder", CLASSIFIES)
    told = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None)
    most = _told_length({**settings, "max_seq_length": told})
    prompts = _prompts(getattr(model, "prompts", None), getattr(model, "default_prompt_name", None))
    return _cross_encoder(inner, model.tokenizer, _activation(type(activation).__name__), most, prompts)


def _kinds(model: Any) -> set[str]:
    """The classes of sentence-transformers that an object is of."""
    named = {"SentenceTransformer", "CrossEncoder"}
    ours = (kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == PACKAGE)
    return {kind.__name__ for kind in ours} & named


def _downloaded(name: str) -> Path:
    hub = import_package("huggingface_hub", "st")
    repository = name if "/" in name else f"sentence-transformers/{name}"
    files = ["*.json", "*.safetensors", "*.txt", "*.model", "*_Dense/pytorch_model.bin"]
    with guard(SourceError, f"st:{name} cannot be loaded", "check the name, the network, or give a local folder"):
        folder = Path(hub.snapshot_download(repository, allow_patterns=files))
        if not any(folder.glob("model*.safetensors")) and not any(folder.glob("0_Transformer/model*.safetensors")):
            hub.snapshot_download(repository, allow_patterns=OLD_WEIGHTS)
        return folder


def _kind(path: str, name: str) -> str:
    """The class of a module, which must be sentence-transformers' own: code of others' is never run."""
    package, _, kind = str(path).rpartition(".")
    if package.partition(".")[0] != PACKAGE:
        raise SourceError(f"{name} has the module {path}, which is not of sentence-transformers", OTHER_WAY)
    return kind


def _settings_of(transformer: Any) -> dict[str, Any]:
    """What a folder's settings would say of a Transformer object."""
    names = ("transformer_task", "modality_config", "processing_kwargs")
    return {name: getattr(transformer, name) for name in names if hasattr(transformer, name)}


def _check_transformer(settings: Mapping[str, Any], name: str, task: str = EMBEDS) -> None:
    """Raise ``SourceError`` unless the Transformer is for this task, takes texts as they are, and gives what it does.

    ``EMBEDS`` gives a vector for each token.
    """
    told = settings.get("transformer_task") or EMBEDS
    gives = {"method": "forward", "method_output_name": GIVES[task]}
    takes = settings.get("modality_config") or {"text": gives}
    if told != task:
        raise SourceError(f"{name} has a Transformer for {told}, which is not supported", OTHER_WAY)
    if "message" in takes:
        raise SourceError(f"{name} puts texts into its chat template, which is not supported", OTHER_WAY)
    if takes.get("text") != gives:
        given = (takes.get("text") or {}).get("method_output_name", "nothing")
        raise SourceError(f"{name} gives {given} for texts, which is not supported", OTHER_WAY)
    if other := {*_tokenizing(settings)} - HARMLESS:
        raise SourceError(f"{name} tokenizes with {', '.join(sorted(other))}, which is not supported", OTHER_WAY)
    opened = {key for part in OPENING for key in _opening(settings, part)} - HARMLESS_OPENING
    if settings.get("tokenizer_name_or_path"):
        opened.add("tokenizer_name_or_path")
    if opened:
        raise SourceError(f"{name} is opened with {', '.join(sorted(opened))}, which is not supported", OTHER_WAY)


def _tokenizing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer is called with."""
    asked = settings.get("processing_kwargs") or {}
    return {**(asked.get("text") or {}), **(asked.get("common") or {})}


def _opening(settings: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """What a part is opened with."""
    return settings.get(f"{part}_kwargs") or settings.get(f"{part}_args") or {}


def _told_length(settings: Mapping[str, Any]) -> int | None:
    """The maximum length that a folder's settings say."""
    opened = {**_opening(settings, "tokenizer"), **_opening(settings, "processor")}
    told = (opened.get("model_max_length") or settings.get("max_seq_length"), _tokenizing(settings).get("max_length"))
    return min((int(length) for length in told if length), default=None)


def _check_backend(model: Any) -> None:
    backend = getattr(model, "backend", "torch")
    if backend != "torch":
        raise SourceError(f"the model runs in {backend}, not in PyTorch", 'open it with backend="torch"')


def _module_in(kind: str, place: Path, name: str) -> _Module:
    """A module that a folder has in ``place``."""
    return _Module(kind, lambda: _optional(place / "config.json"), lambda: _dense(place, name))


def _module_of(part: Any) -> _Module:
    """A module of an object."""

    def config() -> Mapping[str, Any]:
        if hasattr(part, "get_config_dict"):
            told: Mapping[str, Any] = part.get_config_dict()
            return told
        return {}

    return _Module(type(part).__name__, config, lambda: [part.linear, part.activation_function])


def _modules(modules: Iterable[_Module], name: str, dimensions: int | None) -> tuple[Sequence[Way], list[nn.Module]]:
    """The ways to pool, and what comes after them; of the vectors, only the leading ``dimensions`` are used."""
    poolings: Sequence[Way] = ()
    after: list[nn.Module] = []
    for module in modules:
        if module.kind == "Dropout":
            continue
        config = module.config()
        ends = {config.get(f"module_{end}_name") or SENTENCE for end in ("input", "output")}
        if module.kind == "Pooling" and not poolings:
            poolings = _poolings(config, name)
        elif module.kind not in ("Dense", "Normalize"):
            what = "a second Pooling" if module.kind == "Pooling" else with_article(module.kind)
            raise SourceError(f"{name} has {what}, which is not supported", OTHER_WAY)
        elif not poolings or ends != {SENTENCE}:
            raise SourceError(
                f"{name} has {with_article(module.kind)} for each token's vector, which is not supported", OTHER_WAY
            )
        else:
            after += [Normalized()] if module.kind == "Normalize" else module.dense()
    if dimensions:
        after.append(Leading(int(dimensions)))
    return poolings or ("none",), after


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
    safe, pickled = place / "model.safetensors", place / "pytorch_model.bin"
    if activation not in ACTIVATIONS or not (safe.is_file() or pickled.is_file()):
        raise SourceError(f"{name} has a Dense with {activation} that cannot be read from {place}", OTHER_WAY)
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    weights = load_file(safe) if safe.is_file() else torch.load(pickled, map_location="cpu", weights_only=True)
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return [linear, ACTIVATIONS[activation]()]


def _cross_encoder_folder(
    transformers: Any, folder: Path, name: str, facts: Mapping[str, Any], settings: Mapping[str, Any]
) -> Loaded:
    """The cross-encoder in a folder, whose ``SETTINGS`` are ``facts``; ``settings`` are its Transformer's."""
    config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
    architecture = (config.architectures or [""])[0]
    if not architecture.endswith("ForSequenceClassification"):
        why = f"its architecture is {architecture or 'not told'}" if settings else f"it has no {MODULES}"
        raise SourceError(f"st:{name} is not a sentence-transformers model: {why}", f"try hf:{name} --pooling mean")
    model = from_pretrained(transformers.AutoModelForSequenceClassification, folder, f"st:{name}")
    told = str(facts.get("activation_fn") or "").rpartition(".")[2] or activation_name(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    prompts = _prompts(facts.get("prompts"), facts.get("default_prompt_name"))
    return _cross_encoder(model, tokenizer, _activation(told) if told else None, _told_length(settings), prompts)


def _cross_encoder(
    model: Any, tokenizer: Any, activation: Activation | None, told_length: int | None, prompts: Mapping[str, Any]
) -> Loaded:
    """A cross-encoder. One of several classes answers with probabilities, where its library gives bare numbers."""
    architecture = type(model).__name__
    if not architecture.endswith("ForSequenceClassification"):
        raise SourceError(f"the cross-encoder is a {architecture}, which is not supported", OTHER_WAY)
    single = model.config.num_labels == 1
    if not single and activation in (None, "none"):
        activation = "softmax"
    return with_head(
        model,
        tokenizer,
        architecture,
        task="scores" if single else "classes",
        max_length=longest(tokenizer, model.config, told_length),
        pairs=True,
        activation=activation or "sigmoid",
        **prompts,
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
