"""The pipeline of a model of which only its inputs, its outputs and a tokenizer are known."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corewise.common.errors import InputError
from corewise.records.build import TensorSpec
from corewise.records.pipeline import TextPipeline, TextTask, TokenInput
from corewise.records.ranges import InputRange

MOST_TOKENS = 512
"""Tokens of an item if the model has no positions that say how many it takes."""
TOKENIZER = "give the model's own tokenizer.json"


def infer(
    tokenizer: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    ranges: Sequence[InputRange] | None = None,
    labels: Sequence[str] = (),
) -> TextPipeline:
    """The pipeline that fits a model's inputs and outputs.

    Args:
        tokenizer: A ``tokenizer.json``; its padding token is used, its truncation is not.
        inputs: All (N, tokens) of integers. A name with ``mask``, ``type`` or ``position`` says what an input takes.
        outputs: The first one is the answer: (N, classes) with ``labels``, else vectors.
        ranges: The most tokens that the model has positions for.
        labels: Names of the classes.

    Raises:
        InputError: The inputs are no tokens, or the file is no tokenizer.
    """
    if not all(len(spec.shape) == 2 and spec.dtype in ("int32", "int64") for spec in inputs):
        named = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
        raise InputError(f"there is a tokenizer, and the model takes no tokens but {named}", "leave out the tokenizer")
    fixed = next((spec.shape[1] for spec in inputs if spec.shape[1] is not None), None)
    longest = [each.longest[1] for each in ranges or () if len(each.longest) == 2 and each.longest[1] is not None]
    task: TextTask = "classes" if labels and len(outputs[0].shape) == 2 else "vectors"
    content, data = read_tokenizer(tokenizer)
    return TextPipeline(
        task=task,
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
        inputs=tuple(TokenInput.of(spec) for spec in inputs),
        max_length=fixed or min(longest, default=MOST_TOKENS),
        fixed_length=fixed,
        pad_id=int((data.get("padding") or {}).get("pad_id", 0)),
        labels=tuple(labels),
        activation="softmax" if task == "classes" else "none",
    )


def read_tokenizer(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A ``tokenizer.json``, as bytes and as data. Raises ``InputError`` if it is another file."""
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}", "check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is no tokenizer: {error}", TOKENIZER) from error
    if not isinstance(data, dict) or "model" not in data:
        raise InputError(f"{path} is no tokenizer: it has no model", TOKENIZER)
    return content, data
