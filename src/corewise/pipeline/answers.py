"""A model's outputs as answers: vectors, classes with probabilities, scores, and spans with labels. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.pipeline.tokens import Tokens
from corewise.records.pipeline import Activation, TextPipeline
from corewise.samples.texts import Text

NO_ENTITY = "O"
"""The label of tokens outside of all spans, as in CoNLL's data."""


@dataclass(frozen=True, kw_only=True)
class ClassAnswer:
    """The most probable class of an item, and the probability of each."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a text with a label: its first character and the one after its last, and the mean probability."""

    label: str
    probability: float
    start: int
    end: int
    text: str


def decode(
    pipeline: TextPipeline, outputs: Sequence[NDArray[Any]], items: Sequence[Text], tokens: Sequence[Tokens]
) -> list[Any]:
    """The answers of one call, one for each item.

    Args:
        pipeline: What the outputs are.
        outputs: The model's, of which the first is used: (N, D), (N, classes), or (N, tokens, D or classes).
        items: What was asked, N texts or pairs.
        tokens: Their tokens.

    Returns:
        Arrays (D,) for vectors, or (tokens, D) without pooling; floats for scores; a ``ClassAnswer`` each for classes;
        a list of ``Span`` each for tokens.
    """
    values = outputs[0][: len(items)]
    if pipeline.task == "vectors":
        return [row[: len(one)] if row.ndim == 2 else row for row, one in zip(values, tokens, strict=True)]
    activated = activate(values, pipeline.activation)
    if pipeline.task == "scores":
        return [float(row.reshape(-1)[0]) for row in activated]
    labels = pipeline.labels or tuple(f"LABEL_{number}" for number in range(values.shape[-1]))
    if pipeline.task == "classes":
        return [_class(row, labels) for row in activated]
    return [
        _spans(row[: len(one)], labels, one, item if isinstance(item, str) else item[0])
        for row, one, item in zip(activated, tokens, items, strict=True)
    ]


def activate(values: NDArray[Any], activation: Activation) -> NDArray[np.float32]:
    """Outputs as probabilities or scores: softmax over the last axis, sigmoid, or as they are."""
    exact = np.asarray(values, np.float32)
    if activation == "softmax":
        powers = np.exp(exact - exact.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True))
    if activation == "sigmoid":
        # The same as 1 / (1 + exp(-x)), without its overflow.
        return np.asarray(0.5 * (1 + np.tanh(0.5 * exact)), np.float32)
    return exact


def _class(row: NDArray[np.float32], labels: Sequence[str]) -> ClassAnswer:
    best = int(row.argmax())
    probabilities: dict[str, float] = {}
    for label, value in zip(labels, map(float, row), strict=True):  # of two classes of one name, the more probable one
        probabilities[label] = max(value, probabilities.get(label, value))
    return ClassAnswer(label=labels[best], probability=float(row[best]), probabilities=probabilities)


def _spans(rows: NDArray[np.float32], labels: Sequence[str], tokens: Tokens, text: str) -> list[Span]:
    """Neighbouring words of one entity as spans. A word has the label of its first token.

    ``B-`` begins a span and ``I-`` continues one of the same entity (the scheme IOB2); labels without such a prefix
    make a span of each run of equal labels.
    """
    spans: list[Span] = []
    parts: list[tuple[str, str, float, int, int]] = []
    """Words as (prefix, entity, probability, start, end)."""
    last_word: int | None = None
    for row, (start, end), word in zip(rows, tokens.offsets, tokens.words, strict=True):
        if word is None or (start, end) == (0, 0):
            continue
        if word == last_word and parts:
            prefix, entity, probability, first, _ = parts[-1]
            parts[-1] = (prefix, entity, probability, first, end)
            continue
        last_word = word
        label = labels[int(row.argmax())]
        prefix, entity = label.split("-", 1) if label[:2] in ("B-", "I-") else ("", label)
        parts.append((prefix, entity, float(row.max()), start, end))
    run: list[tuple[str, str, float, int, int]] = []
    for part in [*parts, ("", NO_ENTITY, 0.0, 0, 0)]:
        if run and (part[1] != run[-1][1] or part[0] == "B"):
            start, end = run[0][3], run[-1][4]
            probability = sum(each[2] for each in run) / len(run)
            spans.append(Span(label=run[0][1], probability=probability, start=start, end=end, text=text[start:end]))
            run = []
        if part[1] != NO_ENTITY:
            run.append(part)
    return spans
