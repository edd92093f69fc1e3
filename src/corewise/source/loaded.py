"""What a source gives: the model and, if it takes texts, its pipeline and tokenizer."""

import hashlib
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from corewise.common.errors import SourceError
from corewise.common.phrases import with_article
from corewise.common.tokenizers import MOST_TOKENS, read_tokenizer
from corewise.records.build import TensorSpec
from corewise.records.pipeline import Pooling, TextPipeline, TokenInput
from corewise.samples.encodings import IDS
from corewise.source.pooling import PooledOutput

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A model, and how texts become its inputs."""

    model: nn.Module | ExportedProgram
    pipeline: TextPipeline | None = None
    tokenizer: bytes = b""
    """The content of ``tokenizer.json``."""
    class_names: tuple[str, ...] = ()
    """Names of classes that the library of a model without texts brings."""
    why_no_texts: str = ""
    """Why texts cannot be its samples although it has a tokenizer, as a sentence; empty if there is no more to say."""
    instead: str = ""
    """What can be done then."""


def text_pipeline(tokenizer: bytes, names: tuple[str, ...], **facts: Any) -> TextPipeline:
    """A pipeline for a model that takes these tokens by keyword, int64 (N, tokens) each."""
    specs = (TensorSpec(name=name, dtype="int64", shape=(None, None)) for name in names)
    digest = hashlib.sha256(tokenizer).hexdigest()
    return TextPipeline(tokenizer_sha256=digest, inputs=tuple(map(TokenInput.of, specs)), **facts)


def fast_tokenizer(tokenizer: Any, *, lower: bool = False) -> bytes:
    """The ``tokenizer.json`` of a transformers tokenizer; a slow one is converted by transformers.

    ``lower`` has it lower-case texts first. Raises ``SourceError`` where there is no conversion.
    """
    from tokenizers import Tokenizer, normalizers

    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            fast = convert_slow_tokenizer(tokenizer)
        except (ValueError, KeyError, AttributeError, ImportError) as error:
            raise SourceError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form: {error}",
                "give samples that are tokenized, or --tokenizer with a tokenizer.json",
            ) from error
    made = Tokenizer.from_str(fast.to_str())
    if lower:
        parts = [normalizers.Lowercase(), *([made.normalizer] if made.normalizer is not None else [])]
        made.normalizer = normalizers.Sequence(parts)
    made.no_padding()
    made.no_truncation()
    return str(made.to_str()).encode()


def tokenizer_file(tokenizer: Any, folder: Path) -> Path:
    """The ``tokenizer.json`` of a tokenizer object, written into a folder. Raises ``SourceError`` for other objects."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, Tokenizer):
        made = Tokenizer.from_str(tokenizer.to_str())
    elif hasattr(tokenizer, "model_input_names"):
        made = Tokenizer.from_str(fast_tokenizer(tokenizer).decode())
        if tokenizer.pad_token_id is not None:
            made.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    else:
        kind = type(tokenizer).__name__
        raise SourceError(
            f"the tokenizer is {with_article(kind)}", "give a tokenizer of transformers, or a path of a tokenizer.json"
        )
    path = folder / TOKENIZER_FILE
    made.save(str(path))
    return path


def with_tokenizer(loaded: Loaded, path: Path, pooling: Pooling | None) -> Loaded:
    """The model with the tokenizer in a file, and with ``pooling`` after it.

    Without a pipeline of its own, the model gets the tokens that its ``forward`` asks for, by name.

    Raises:
        SourceError: The file is not a tokenizer, or the model cannot be pooled.
    """
    content, pad_id = read_tokenizer(path)
    if loaded.pipeline is not None:  # which knows what the model takes for padding
        changed = replace(loaded.pipeline, tokenizer_sha256=hashlib.sha256(content).hexdigest())
        return replace(loaded, pipeline=changed, tokenizer=content)
    names = _token_names(loaded.model)
    most = _positions(loaded.model) or MOST_TOKENS
    pipeline = text_pipeline(content, names, task="vectors", max_length=most, pad_id=pad_id, pooling=pooling or "none")
    if pooling is None or pooling == "none":
        return replace(loaded, pipeline=pipeline, tokenizer=content)
    mask = next((each.name for each in pipeline.inputs if each.role == "mask"), None)
    if mask is None or not isinstance(loaded.model, nn.Module):
        raise SourceError("--pooling needs a module that takes an attention mask", "pool in the model itself")
    return Loaded(model=PooledOutput(loaded.model, pooling, mask), pipeline=pipeline, tokenizer=content)


def _positions(model: nn.Module | ExportedProgram) -> int | None:
    """How many positions a module's smallest table of them has; ``None`` where no table has such a name."""
    if not isinstance(model, nn.Module):
        return None
    # transformers' first positions are never used where the table has a row for padding.
    sizes = (
        part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and "position" in name.rpartition(".")[2]
    )
    return min(sizes, default=None)


def _token_names(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """The inputs that a model needs, and the token ids and the attention mask where it takes them.

    Models of transformers give all of their inputs a default.
    """
    if isinstance(model, ExportedProgram):
        return tuple(str(name) for name in model.graph_signature.user_inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    optional = re.compile(rf"{IDS}|(?!encoder_|decoder_).*attention_mask.*")
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind in kinds and (parameter.default is parameter.empty or optional.fullmatch(parameter.name))
    )
