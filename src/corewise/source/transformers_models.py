"""Models of transformers, from a folder or the hub: the head that the configuration names, and the tokenizer."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import torch

from corewise.common.errors import SourceError
from corewise.common.references import guard
from corewise.common.tokenizers import MOST_TOKENS, TOKENIZER, read_tokenizer
from corewise.records.pipeline import Activation, Pooling, TextTask
from corewise.source.loaded import Loaded, fast_tokenizer, text_pipeline
from corewise.source.packages import NO_CODE, import_package, without_code
from corewise.source.pooling import POOLINGS, Leading, Normalized, TextVectors, Way

TYPES = "token_type_ids"
TOKEN_INPUTS = ("input_ids", "attention_mask", TYPES)
UNKNOWN_LENGTH = 100_000
"""transformers says a huge number where a tokenizer does not know its model's length."""
PADDED_POSITIONS = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "mpnet", "longformer"),
    *("data2vec-text", "esm", "ibert", "lilt", "luke", "markuplm"),
)
"""Types of models whose positions begin behind the padding token's number, so that the first ones are never used."""
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
ENCODER = "the encoder is supported: --pooling mean makes a vector of each text"
VECTORS = "--pooling mean makes a vector of each text"
HEADS: dict[str, TextTask] = {"ForSequenceClassification": "classes", "ForTokenClassification": "tokens"}
"""Endings of the names of classes, with what their answers are."""
GENERATING = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
"""Endings of the names of decoders whose answer is the next token."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model"),
)


def load_transformers(name: str, pooling: Pooling | None = None, tokenizer_file: Path | None = None) -> Loaded:
    """The model that ``hf:NAME`` or ``hf:FOLDER`` names, in fp32.

    With ``pooling`` it is the bare model and makes one vector of each text; else it has the head that the
    configuration names. ``tokenizer_file``, a ``tokenizer.json``, is for a model that brings no tokenizer.
    Raises ``SourceError``.
    """
    transformers = import_package("transformers", "hf")
    fix = "check the name, the network, or give a local folder"
    with guard(SourceError, f"hf:{name} cannot be loaded", fix), without_code(f"hf:{name}"):
        config = transformers.AutoConfig.from_pretrained(name, **NO_CODE)
    architecture = (config.architectures or [""])[0]
    generates = architecture.endswith(("ForConditionalGeneration", "ForSpeechSeq2Seq", "Seq2SeqLM", "WithLMHeadModel"))
    if generates and pooling is None:
        kind = "text" if hasattr(config, "vocab_size") and not hasattr(config, "num_mel_bins") else "transcripts"
        way = ENCODER if kind == "text" else "its encoder is: give a factory that returns model.get_encoder()"
        raise SourceError(f"hf:{name} generates {kind} in a loop ({architecture}), which corewise does not run", way)
    with quiet():  # looking for a class imports it
        is_known = not architecture or hasattr(transformers, architecture)
    if pooling is None and not is_known:
        raise SourceError(
            f"hf:{name} is a {architecture}, which transformers {transformers.__version__} does not have",
            "give a factory that returns the model, or --pooling mean for a vector of each text, without its head",
        )
    with quiet(), guard(SourceError, f"hf:{name} cannot be loaded", "check its files"), without_code(f"hf:{name}"):
        if pooling is None:
            model = from_pretrained(getattr(transformers, architecture or "AutoModel"), name, f"hf:{name}")
        else:
            model = encoder_of(without_head(transformers, config, name))
        takes = getattr(model, "main_input_name", "input_ids")
        if pooling is not None and takes != "input_ids":
            raise SourceError(f"hf:{name} takes {takes} and no texts", "leave out --pooling")
        # A model of recordings may have a tokenizer too, which is for its transcripts.
        needs = takes == "input_ids" and tokenizer_file is None
        tokenizer = None if takes == "input_values" else _tokenizer(transformers, name, needed=needs)
    if tokenizer is None and tokenizer_file is not None:
        tokenizer = _tokenizer_of(transformers, tokenizer_file, config)
    if tokenizer is None:
        if pooling is not None:
            raise SourceError(f"hf:{name} has no tokenizer", "leave out --pooling, or give --tokenizer tokenizer.json")
        return Loaded(model=model)
    if pooling is not None:
        return vectors(model, tokenizer, max_length=longest(tokenizer, config), poolings=(pooling,))
    return with_head(model, tokenizer, type(model).__name__)


def from_transformers_model(model: Any, tokenizer_file: Path, pooling: Pooling | None) -> Loaded:
    """A model object of transformers with the tokenizer in a file, as ``load_transformers`` opens its folder.

    Raises ``SourceError``.
    """
    import transformers

    tokenizer = _tokenizer_of(transformers, tokenizer_file, model.config)
    if pooling is None:
        return with_head(model, tokenizer, type(model).__name__)
    bare = encoder_of(model.base_model)
    return vectors(bare, tokenizer, max_length=longest(tokenizer, model.config), poolings=(pooling,))


def from_pretrained(model_class: Any, place: str | Path, name: str) -> Any:
    """A model in fp32. Raises ``SourceError`` if its files lack the weights of its head: it would answer at random."""
    model, found = model_class.from_pretrained(place, dtype=torch.float32, output_loading_info=True, **NO_CODE)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(f"{model.base_model_prefix}."))
    if missing and type(model).__name__.endswith(tuple(HEADS)):
        raise SourceError(
            f"{name} has no weights for {missing[0]}, so that the head of {type(model).__name__} would be random",
            "give the folder of the trained model",
        )
    return model


def without_head(transformers: Any, config: Any, place: str | Path) -> Any:
    """A model without its head, in fp32: of T5, its encoder alone."""
    model_class = getattr(transformers, ENCODERS.get(config.model_type, "AutoModel"))
    return model_class.from_pretrained(place, dtype=torch.float32, **NO_CODE)


def encoder_of(model: Any) -> Any:
    """The encoder of a model that has a decoder too; others as they are."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def vectors(
    model: torch.nn.Module, tokenizer: Any, *, max_length: int, poolings: Sequence[Way], after: Any = (), **facts: Any
) -> Loaded:
    """A transformers model without a head as one that makes vectors of texts; ``after`` comes behind the pooling."""
    pooling: Pooling = next((known for known in POOLINGS if [*poolings] == [known]), "own")
    content = fast_tokenizer(tokenizer, lower=facts.pop("lower", False))
    most = min((part.count for part in after if isinstance(part, Leading)), default=inf)
    pipeline = text_pipeline(
        content,
        ("input_ids", "attention_mask"),
        task="vectors",
        max_length=max_length,
        pooling=pooling,
        normalize=bool(after) and isinstance(after[-1], Normalized),
        pad_id=_pad_id(tokenizer, model.config),
        truncation=tokenizer.truncation_side,
        dimensions=tuple(
            int(size) for size in getattr(model.config, "matryoshka_dimensions", None) or () if size <= most
        ),
        **facts,
    )
    return Loaded(model=TextVectors(model, poolings, after), pipeline=pipeline, tokenizer=content)


def with_head(
    model: Any, tokenizer: Any, architecture: str, *, task: TextTask | None = None, max_length: int = 0, **facts: Any
) -> Loaded:
    """A transformers model with its own head as one that takes texts; without a pipeline where the head is another."""
    head = next((kind for ending, kind in HEADS.items() if architecture.endswith(ending)), None)
    generates = architecture.endswith(GENERATING)
    bare = architecture.endswith("Model") and not generates
    if head is None and not bare:
        does = "generates text in a loop, which corewise does not run" if generates else "has answers of its own kind"
        return Loaded(model=model, why_no_texts=f"{architecture} {does}", instead=VECTORS)
    config = model.config
    task = task or ("vectors" if bare else "scores" if head == "classes" and config.num_labels == 1 else head)
    content = fast_tokenizer(tokenizer)
    known = inspect.signature(model.forward).parameters
    taken = [name for name in TOKEN_INPUTS if name in tokenizer.model_input_names and name in known]
    types = getattr(config, "type_vocab_size", None)
    if TYPES in taken and types in (0, 1):  # as DeBERTa's and RoBERTa's, for which all tokens are alike
        taken.remove(TYPES)
    pipeline = text_pipeline(
        content,
        tuple(taken),
        task=task,
        max_length=max_length or longest(tokenizer, config),
        pad_id=_pad_id(tokenizer, config),
        truncation=tokenizer.truncation_side,
        labels=_labels(config) if task in ("classes", "tokens") else (),
        activation=facts.pop("activation", None) or _activation(config, task),
        **facts,
    )
    return Loaded(model=model, pipeline=pipeline, tokenizer=content)


def longest(tokenizer: Any, config: Any, told: int | None = None) -> int:
    """The most tokens that a model takes: ``told``, else the tokenizer's ``model_max_length``; at most its positions.

    ``told`` is what the model's library says, if it does.
    """
    known = [int(most) for most in (told, tokenizer.model_max_length) if most and 0 < most < UNKNOWN_LENGTH][:1]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        unused = (getattr(config, "pad_token_id", None) or 0) + 1 if config.model_type in PADDED_POSITIONS else 0
        known.append(positions - unused)
    return min(known, default=MOST_TOKENS)


def _pad_id(tokenizer: Any, config: Any) -> int:
    """What goes behind the end of short texts. Heads of decoders look for that end by what their configuration says."""
    known = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id)
    return next((number for number in known if isinstance(number, int) and number >= 0), 0)


def _labels(config: Any) -> tuple[str, ...]:
    """The names of a head's classes, transformers' own for those that have none."""
    return tuple(str(config.id2label.get(number, f"LABEL_{number}")) for number in range(config.num_labels))


def _activation(config: Any, task: TextTask | None) -> Activation:
    """As transformers' pipelines choose it."""
    if task == "vectors":
        return "none"
    known: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none"}
    if task == "scores" and activation_name(config) in known:
        return known[activation_name(config)]
    if task != "tokens" and config.problem_type == "regression":
        return "none"
    return "sigmoid" if task == "scores" or config.problem_type == "multi_label_classification" else "softmax"


def activation_name(config: Any) -> str:
    """What a cross-encoder's configuration says that its scores go through: the name of a class, or nothing."""
    told = getattr(config, "sentence_transformers", None) or {}
    name = told.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or ""
    return str(name).rpartition(".")[2]


def _tokenizer(transformers: Any, name: str, *, needed: bool) -> Any:
    """The tokenizer of a folder or of a model of the hub; ``None`` where there is none.

    If one is ``needed`` and a folder has the files of one that cannot be opened, raises what transformers raises.
    """
    is_folder = Path(name).is_dir()
    if is_folder and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **NO_CODE)
    except (OSError, ValueError, KeyError):
        if is_folder and needed:
            raise
        return None


def _tokenizer_of(transformers: Any, path: Path, config: Any) -> Any:
    """The tokenizer in a file, of which no more is known. Raises ``SourceError`` if it is none.

    It gives types of tokens only to a model that has a table of them: GPT-2 takes theirs for words.
    """
    read_tokenizer(path)
    names = [name for name in TOKEN_INPUTS if name != TYPES or (getattr(config, "type_vocab_size", None) or 0) > 1]
    with guard(SourceError, f"{path} is not a tokenizer", TOKENIZER):
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), model_input_names=names)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its reports of weights that a model does not use.

    It also imports torchao, which logs each of its CUDA libraries that does not fit.
    """
    from transformers.utils import logging as theirs

    before, bars, disabled = theirs.get_verbosity(), theirs.is_progress_bar_enabled(), logging.root.manager.disable
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
