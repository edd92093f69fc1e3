"""Texts as samples of the model's inputs, padded as they will be served."""

from dataclasses import replace
from typing import Any

from corewise.pipeline.calls import CallLimits, fill
from corewise.pipeline.runner import MULTIPLE
from corewise.pipeline.tokens import TextEncoder
from corewise.samples import RawSamples, Samples, UnreadableItem

ROWS = 32
"""Rows of the calls whose padding the samples have."""


def text_samples(encoder: TextEncoder, raw: RawSamples, by_name: bool = True) -> Samples:
    """Tokenized samples, each padded to the tokens of the call that the runner would put it into.

    A model is so calibrated, judged and measured on what it is asked when it is served. Outputs for each token are
    compared token by token, so samples of such models keep their own length.

    Args:
        encoder: The model's pipeline and tokenizer.
        raw: Texts, or pairs of texts, as the pipeline takes them.
        by_name: Samples are keyword inputs, else positional ones.

    Raises:
        SamplesError: More than a tenth of the texts cannot be used.
    """
    pipeline = encoder.pipeline
    problems = [encoder.problem(item) for item in raw.items]
    usable = [place for place, problem in enumerate(problems) if not problem]
    tokens = encoder.encode([raw.items[place] for place in usable]) if usable else []
    lengths = [len(one) for one in tokens]
    pooled = pipeline.task in ("classes", "scores") or pipeline.pooling != "none"
    if pooled and pipeline.pads:
        for call in fill([len(one) for one in tokens], limits=CallLimits(rows=ROWS), multiple=MULTIPLE):
            for place in call.places:
                lengths[place] = min(call.tokens, pipeline.max_length)
    made: list[Any] = [UnreadableItem("", problem) for problem in problems]
    for place, one, length in zip(usable, tokens, lengths, strict=True):
        arrays = [array[0] for array in encoder.collate([one], length)]
        names = [each.name for each in pipeline.inputs]
        made[place] = dict(zip(names, arrays, strict=True)) if by_name else tuple(arrays)
    return replace(raw, items=made).tensors(_usable)


def _usable(inputs: Any) -> Any:
    if isinstance(inputs, UnreadableItem):
        raise inputs
    return inputs
