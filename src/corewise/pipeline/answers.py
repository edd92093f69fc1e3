"""A model's outputs as answers: vectors, classes with probabilities, scores, and spans with labels. Pure."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.pipeline.tokens import Tokens
from corewise.records.pipeline import Activation, TextPipeline
from corewise.samples.texts import Text

NO_ENTITY = "O"
"""The label of tokens outside of all spans, as in CoNLL's data."""
LETTERS = ("B-", "I-", "E-", "L-", "S-", "U-")
BEGINNING, ENDING = ("B", "S", "U"), ("E", "L", "S", "U")
"""Letters of words that begin a span of their own, and of those that are the last one of theirs."""


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


class _Word(NamedTuple):
    """A word with its label: the letter before the entity, if there is one, and its place in the text."""

    letter: str
    entity: str
    probability: float
    start: int
    end: int


def _spans(rows: NDArray[np.float32], labels: Sequence[str], tokens: Tokens, text: str) -> list[Span]:
    """Neighbouring words of one entity as spans.

    ``B-`` begins a span and ``I-`` continues one of the same entity (IOB2); where all labels have such letters, ``E-``
    and ``L-`` end one, and ``S-`` and ``U-`` are one of a single word (IOBES, BILOU). Labels without a letter make a
    span of each run of equal ones.
    """
    spans: list[Span] = []
    run: list[_Word] = []
    for word in [*_words(rows, labels, tokens, text), _Word("", NO_ENTITY, 0.0, 0, 0)]:
        if run and (word.entity != run[-1].entity or word.letter in BEGINNING or run[-1].letter in ENDING):
            start, end = run[0].start, run[-1].end
            probability = sum(each.probability for each in run) / len(run)
            spans.append(Span(label=run[0].entity, probability=probability, start=start, end=end, text=text[start:end]))
            run = []
        if word.entity != NO_ENTITY:
            run.append(word)
    return spans


def _words(rows: NDArray[np.float32], labels: Sequence[str], tokens: Tokens, text: str) -> list[_Word]:
    """The words of a text, each with the label of its first token, without the spaces that tokens may begin with.

    A tokenizer may split a text at its spaces only, or not at all, as many decoders' do. So a word begins behind a
    space and behind marks such as quotes, and marks behind it that are outside of entities are no part of it.
    """
    letters = LETTERS if all(label == NO_ENTITY or label[:2] in LETTERS for label in labels) else LETTERS[:2]
    words: list[_Word] = []
    last_number: int | None = None
    last_end = 0
    for row, (start, end), number in zip(rows, tokens.offsets, tokens.words, strict=True):
        if number is None or (start, end) == (0, 0):
            continue
        token, label = text[start:end], labels[int(row.argmax())]
        is_spaced = token[:1].isspace() or any(map(str.isspace, text[max(0, last_end - 1) : start]))
        so_far = text[words[-1].start : words[-1].end] if words else ""
        begins = number != last_number or (bool(so_far) and (is_spaced or (_is_marks(so_far) and not _is_marks(token))))
        last_number, last_end = number, end
        start, end = end - len(token.lstrip()), start + len(token.rstrip())
        if begins:
            letter, entity = label.split("-", 1) if label[:2] in letters else ("", label)
            words.append(_Word(letter, entity, float(row.max()), start, max(start, end)))
        elif not (so_far and _is_marks(token) and label == NO_ENTITY):
            words[-1] = words[-1]._replace(end=max(end, words[-1].end))
    return [word for word in words if word.start < word.end]


def _is_marks(text: str) -> bool:
    """Whether a text has punctuation and symbols only."""
    return all(unicodedata.category(character)[0] in "PSZ" for character in text)
