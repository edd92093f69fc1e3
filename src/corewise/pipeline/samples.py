"""Texts as samples of the model's inputs, padded as they will be served."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from corewise.common.errors import SamplesError
from corewise.pipeline.calls import Call, CallLimits, fill
from corewise.pipeline.runner import MULTIPLE
from corewise.pipeline.tokens import TextEncoder, Tokens
from corewise.records.pipeline import TextPipeline
from corewise.records.report import TokenFacts
from corewise.samples import RawSamples, Samples, UnreadableItem

ROWS = 32
"""Rows of the calls whose padding the samples have."""


def text_samples(encoder: TextEncoder, raw: RawSamples, by_name: bool = True) -> Samples:
    """Tokenized samples, each padded to the tokens of the call that the runner would put it into.

    This way a model is calibrated, judged and measured on inputs like those that it gets later. Outputs for each token
    are compared token by token, so samples of such models keep their own length. If all have one length, the shortest
    gets another, so that the program takes any.

    Args:
        encoder: The model's pipeline and tokenizer.
        raw: Texts, or pairs of texts, as the pipeline takes them.
        by_name: Samples are keyword inputs, else positional ones.

    Returns:
        Rows of the model's inputs, (tokens,) each, with the facts about their lengths.

    Raises:
        SamplesError: More than a tenth of the texts cannot be used, or a text has a number of labels that is not that
            of its tokens.
    """
    pipeline = encoder.pipeline
    problems, usable, tokens = encoder.encode_usable(raw.items)
    lengths = [len(one) for one in tokens]
    calls = fill(lengths, limits=CallLimits(rows=ROWS), multiple=MULTIPLE, pads=pipeline.pads)
    facts = token_facts(lengths, calls, pipeline.max_length, sum(one.is_cut for one in tokens)) if usable else None
    pooled = pipeline.task in ("classes", "scores") or pipeline.pooling != "none"
    if pooled and pipeline.pads:
        for call in calls:
            for place in call.places:
                lengths[place] = min(call.tokens, pipeline.max_length)
    of_tokens = raw.labels is not None and (raw.labels.ndim > 1 or raw.labels.dtype == object)
    if of_tokens and pipeline.task == "tokens":
        _check_labels(raw, usable, tokens)
    if pooled or not of_tokens:  # there are as many labels as tokens
        _vary(pipeline, tokens, lengths, may_pad=pooled and pipeline.pads)
    made: list[Any] = [UnreadableItem("", problem) for problem in problems]
    for place, one, length in zip(usable, tokens, lengths, strict=True):
        arrays = [array[0] for array in encoder.collate([one], length)]
        names = [each.name for each in pipeline.inputs]
        made[place] = dict(zip(names, arrays, strict=True)) if by_name else tuple(arrays)
    return replace(replace(raw, items=made).tensors(_usable), tokens=facts)


def _check_labels(raw: RawSamples, places: Sequence[int], tokens: Sequence[Tokens]) -> None:
    """Raise ``SamplesError`` for a text with a label for each of its words, as data sets have them, and not tokens."""
    assert raw.labels is not None
    for place, one in zip(places, tokens, strict=True):
        if np.shape(raw.labels[place]) != (len(one),):
            raise SamplesError(
                f"{raw.describe(place)} of {raw.source} has {np.size(raw.labels[place])} labels for {len(one)} tokens",
                "give a label for each token that the tokenizer makes of it, special ones included: -100 where none is"
                " meant",
            )


def _vary(pipeline: TextPipeline, tokens: list[Tokens], lengths: list[int], *, may_pad: bool) -> None:
    """Give the shortest text another length if all have one: less padding, or else more, or else cut it.

    The program would take texts of that length only: all others would be padded to it, and longer ones cut.
    """
    size = min(lengths, default=0)
    if len(lengths) < 2 or size < 2 or size != max(lengths):
        return
    place = min(range(len(tokens)), key=lambda place: len(tokens[place]))
    own = -(-len(tokens[place]) // MULTIPLE) * MULTIPLE
    if own < size:
        lengths[place] = own
    elif may_pad and size + MULTIPLE <= pipeline.max_length:
        lengths[place] = size + MULTIPLE
    else:
        lengths[place] = max(1, size - MULTIPLE)
        one, most = tokens[place], lengths[place]
        tokens[place] = Tokens(one.ids[:most], one.types[:most], one.offsets[:most], one.words[:most])


def token_facts(lengths: Sequence[int], calls: Sequence[Call], most: int, cut: int) -> TokenFacts:
    """The facts about texts of these lengths (N,), of which ``cut`` were longer, in these calls."""
    counts = np.asarray(lengths)
    rows = -(-len(counts) // len(calls))
    unsorted = sum(int(part.max()) * len(part) for part in (counts[k : k + rows] for k in range(0, len(counts), rows)))
    filled, total = sum(min(call.tokens, most) * len(call.places) for call in calls), int(counts.sum())
    return TokenFacts(
        median=int(np.quantile(counts, 0.5, method="nearest")),
        p95=int(np.quantile(counts, 0.95, method="nearest")),
        longest=int(counts.max()),
        most=most,
        cut=cut / len(counts),
        padding=1 - total / filled,
        padding_unsorted=1 - total / unsorted,
    )


def _usable(inputs: Any) -> Any:
    if isinstance(inputs, UnreadableItem):
        raise inputs
    return inputs
