"""Models of transformers, from a folder or the hub: the head that the configuration names, and the tokenizer."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from corewise.common.errors import SourceError
from corewise.common.references import guard
from corewise.common.tokenizers import MOST_TOKENS, TOKENIZER, read_tokenizer
from corewise.records.pipeline import Activation, Pooling, TextTask
from corewise.source.loaded import Loaded, fast_tokenizer, text_pipeline
from corewise.source.packages import import_package
from corewise.source.pooling import POOLINGS, TextVectors, Way

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
UNKNOWN_LENGTH = 100_000
"""transformers says a huge number where a tokenizer does not know its model's length."""
PADDED_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
)
"""Types of models whose positions begin behind the padding token's number, so that the first ones are never used."""
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
ENCODER = "the encoder is supported: --pooling mean makes a vector of each text"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def load_transformers(name: str, pooling: Pooling | None = None, tokenizer_file: Path | None = None) -> Loaded:
    """The model that ``hf:NAME`` or ``hf:FOLDER`` names, in fp32.

    With ``pooling`` it is the bare model and makes one vector of each text; else it has the head that the
    configuration names. ``tokenizer_file``, a ``tokenizer.json``, is for a model that brings no tokenizer.
    Raises ``SourceError``.
    """
    transformers = import_package("transformers", "hf")
    with guard(SourceError, f"hf:{name} cannot be loaded", "check the name, the network, or give a local folder"):
        config = transformers.AutoConfig.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    generates = architecture.endswith(("ForConditionalGeneration", "ForSpeechSeq2Seq", "Seq2SeqLM"))
    if generates and pooling is None:
        kind = "text" if hasattr(config, "vocab_size") and not hasattr(config, "num_mel_bins") else "transcripts"
        way = ENCODER if kind == "text" else "its encoder is: give a factory that returns model.get_encoder()"
        raise SourceError(f"hf:{name} generates {kind} in a loop ({architecture}), which corewise does not run", way)
    with quiet(), guard(SourceError, f"hf:{name} cannot be loaded", "check its files"):
        if pooling is None:
            model_class = getattr(transformers, architecture, transformers.AutoModel)
        else:
            model_class = encoder_class(transformers, config)
        model = model_class.from_pretrained(name, dtype=torch.float32)
        # A model of recordings may have a tokenizer too, which is for its transcripts.
        tokenizer = None if model.main_input_name == "input_values" else _tokenizer(transformers, name)
    if tokenizer is None and tokenizer_file is not None:
        tokenizer = _tokenizer_of(transformers, tokenizer_file)
    if tokenizer is None:
        if pooling is not None:
            raise SourceError(f"hf:{name} has no tokenizer", "leave out --pooling, or give --tokenizer tokenizer.json")
        return Loaded(model=model)
    if pooling is not None:
        return vectors(model, tokenizer, max_length=longest(tokenizer, config), poolings=(pooling,))
    return with_head(model, tokenizer, architecture)


def encoder_class(transformers: Any, config: Any) -> Any:
    """What opens a model without its head: of T5, its encoder alone."""
    return getattr(transformers, ENCODERS.get(config.model_type, "AutoModel"))


def vectors(
    model: torch.nn.Module, tokenizer: Any, *, max_length: int, poolings: Sequence[Way], after: Any = (), **facts: Any
) -> Loaded:
    """A transformers model without a head as one that makes vectors of texts."""
    pooling: Pooling = next((known for known in POOLINGS if [*poolings] == [known]), "own")
    content = fast_tokenizer(tokenizer, lower=facts.pop("lower", False))
    pipeline = text_pipeline(
        content,
        ("input_ids", "attention_mask"),
        task="vectors",
        max_length=max_length,
        pooling=pooling,
        pad_id=tokenizer.pad_token_id or 0,
        truncation=tokenizer.truncation_side,
        dimensions=tuple(int(size) for size in getattr(model.config, "matryoshka_dimensions", None) or ()),
        **facts,
    )
    return Loaded(model=TextVectors(model, poolings, after), pipeline=pipeline, tokenizer=content)


def with_head(
    model: Any, tokenizer: Any, architecture: str, *, task: TextTask | None = None, max_length: int = 0, **facts: Any
) -> Loaded:
    """A transformers model with its own head as one that takes texts; without a pipeline where the head is another."""
    kinds: dict[str, TextTask] = {"ForSequenceClassification": "classes", "ForTokenClassification": "tokens"}
    head = next((kind for ending, kind in kinds.items() if architecture.endswith(ending)), None)
    bare = architecture.endswith("Model")
    if head is None and not bare:
        return Loaded(model=model)
    config = model.config
    count = 0 if bare else config.num_labels
    task = task or ("vectors" if bare else "scores" if head == "classes" and count == 1 else head)
    content = fast_tokenizer(tokenizer)
    known = inspect.signature(model.forward).parameters
    taken = [name for name in TOKEN_INPUTS if name in tokenizer.model_input_names and name in known]
    pipeline = text_pipeline(
        content,
        tuple(taken),
        task=task,
        max_length=max_length or longest(tokenizer, config),
        pad_id=tokenizer.pad_token_id or 0,
        truncation=tokenizer.truncation_side,
        labels=tuple(str(config.id2label[number]) for number in range(count)) if task in ("classes", "tokens") else (),
        activation=facts.pop("activation", None) or _activation(config, task),
        **facts,
    )
    return Loaded(model=model, pipeline=pipeline, tokenizer=content)


def longest(tokenizer: Any, config: Any) -> int:
    """The most tokens that a model takes: its own positions and the tokenizer's ``model_max_length``."""
    told = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < UNKNOWN_LENGTH else []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        unused = (config.pad_token_id or 0) + 1 if config.model_type in PADDED_POSITIONS else 0
        told.append(positions - unused)
    return min(told, default=MOST_TOKENS)


def _activation(config: Any, task: TextTask | None) -> Activation:
    """As transformers' pipelines choose it."""
    if task == "vectors":
        return "none"
    if task == "scores":
        return activation_of(config) or ("none" if config.problem_type == "regression" else "sigmoid")
    return "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"


def activation_of(config: Any) -> Activation | None:
    """What a cross-encoder's configuration says that its scores go through."""
    told = getattr(config, "sentence_transformers", None) or {}
    name = str(told.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or "")
    return {"Sigmoid": "sigmoid", "Identity": "none"}.get(name.rpartition(".")[2])  # type: ignore[return-value]


def _tokenizer(transformers: Any, name: str) -> Any:
    """The tokenizer of a folder or of a model of the hub; ``None`` where there is none."""
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def _tokenizer_of(transformers: Any, path: Path) -> Any:
    """The tokenizer in a file, of which no more is known. Raises ``SourceError`` if it is none."""
    read_tokenizer(path)
    with guard(SourceError, f"{path} is not a tokenizer", TOKENIZER):
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its reports of weights that a model does not use."""
    from transformers import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
