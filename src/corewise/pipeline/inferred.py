"""The pipeline of a model of which only its inputs, its outputs and a tokenizer are known."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from corewise.common.errors import InputError
from corewise.common.tokenizers import MOST_TOKENS, read_tokenizer
from corewise.records.build import TensorSpec
from corewise.records.pipeline import TextPipeline, TextTask, TokenInput
from corewise.records.ranges import InputRange


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
        InputError: The inputs are not tokens, or the file is not a tokenizer.
    """
    content, pad_id = read_tokenizer(tokenizer)
    task: TextTask = "classes" if labels and len(outputs[0].shape) == 2 else "vectors"
    base = TextPipeline(
        task=task,
        tokenizer_sha256=hashlib.sha256(content).hexdigest(),
        inputs=(),
        max_length=_longest(ranges) or MOST_TOKENS,
        pad_id=pad_id,
        labels=tuple(labels),
        activation="softmax" if task == "classes" else "none",
    )
    return fit(base, inputs, outputs, ranges)


def fit(
    pipeline: TextPipeline,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    ranges: Sequence[InputRange] | None = None,
) -> TextPipeline:
    """The pipeline for a program: its inputs' names, order and dtypes, the most tokens, and whether it pools itself.

    Raises ``InputError`` if the inputs are not tokens.
    """
    if not all(len(spec.shape) == 2 and spec.dtype in ("int32", "int64") for spec in inputs):
        named = ", ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in inputs)
        raise InputError(f"there is a tokenizer, but the model takes {named} and no tokens", "leave out the tokenizer")
    fixed = next((spec.shape[1] for spec in inputs if spec.shape[1] is not None), None)
    most = [limit for limit in (pipeline.max_length, fixed, _longest(ranges)) if limit is not None]
    pools = pipeline.task == "vectors" and pipeline.pooling == "none" and len(outputs[0].shape) == 2
    return replace(
        pipeline,
        inputs=tuple(map(TokenInput.of, inputs)),
        max_length=fixed or min(most),
        fixed_length=fixed,
        pooling="own" if pools else pipeline.pooling,
    )


def _longest(ranges: Sequence[InputRange] | None) -> int | None:
    longest = [each.longest[1] for each in ranges or () if len(each.longest) == 2]
    return min((size for size in longest if size is not None), default=None)
