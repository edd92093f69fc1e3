"""Samples for a model: tensors as they are, texts through the model's pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corewise.common.errors import InputError, SamplesError
from corewise.pipeline import TextEncoder, fit, text_samples
from corewise.records.pipeline import TextPipeline
from corewise.samples import RawSamples, Samples, check_class_names, raw_from_python
from corewise.samples.python import RAW_FIXES
from corewise.samples.raw import NOUNS

if TYPE_CHECKING:
    from corewise.source import Exported, Loaded


def read_samples(model: Any, samples: Any) -> Samples | RawSamples:
    """The samples in the forms that ``optimize`` takes, texts as they are, images by the model's own preprocessing.

    Raises ``SamplesError``.
    """
    if isinstance(samples, str | Path):
        from corewise import source

        return source.read_for(model, str(samples))
    return raw_from_python(samples() if callable(samples) else samples)


def tokenized(
    loaded: "Loaded", samples: Samples | RawSamples, class_names: Sequence[str] | None = None
) -> tuple["Loaded", Samples]:
    """The model and its samples as tensors, the pipeline with what the samples say: pairs, and names of classes.

    Pairs of texts are single texts to a model of single ones, neighbours with one label.

    Raises:
        SamplesError: The samples are raw and the model has no pipeline for them, or they do not fit it.
        InputError: The tokenizer file is not a tokenizer.
    """
    pipeline = loaded.pipeline
    if pipeline is not None and class_names is not None:
        pipeline = _with_classes(pipeline, tuple(class_names))
    if isinstance(samples, Samples):
        return replace(loaded, pipeline=pipeline), samples
    if pipeline is None and samples.kind in ("text", "pair") and loaded.why_no_texts:
        raise SamplesError(
            f"there are {NOUNS[samples.kind]} in {samples.source}, but {loaded.why_no_texts}", loaded.instead
        )
    if pipeline is None or samples.kind not in ("text", "pair"):
        raise SamplesError(f"there are {NOUNS[samples.kind]} in {samples.source}", RAW_FIXES[samples.kind])
    if pipeline.task == "classes":
        samples = _with_labels(samples, pipeline.labels)
    if pipeline.pairs and samples.kind == "text":
        raise SamplesError(
            f"there are single texts in {samples.source}, but the model takes pairs",
            "name the second text's column with --pair",
        )
    if samples.kind == "pair" and pipeline.task in ("classes", "scores"):
        pipeline = replace(pipeline, pairs=True)
    elif samples.kind == "pair":
        samples = samples.singles()
    if pipeline.task == "classes":
        samples = _with_numbers(samples, pipeline.labels)
    by_name = hasattr(loaded.model, "forward")
    return replace(loaded, pipeline=pipeline), text_samples(TextEncoder(pipeline, loaded.tokenizer), samples, by_name)


def fitted(loaded: "Loaded", exported: "Exported", *, asked: bool) -> "Loaded":
    """The model with its pipeline fitted to its program.

    A model that brings a tokenizer and was given other inputs than tokens, such as photos, has no pipeline, unless its
    tokenizer was ``asked`` for: then that is an ``InputError``. So are names of classes of which the model has others
    in number: answers would have wrong names, or none.
    """
    if loaded.pipeline is None:
        return loaded
    try:
        pipeline = fit(loaded.pipeline, exported.inputs, exported.outputs)
    except InputError:
        if asked:
            raise
        return replace(loaded, pipeline=None, tokenizer=b"")
    classes = exported.outputs[0].shape[-1]
    if pipeline.labels and classes is not None:
        check_class_names(pipeline.labels, classes, "the list of class names")
    return replace(loaded, pipeline=pipeline)


def _with_classes(pipeline: TextPipeline, names: tuple[str, ...]) -> TextPipeline:
    """The pipeline with the user's names of classes; a factory's model of which no task is known has classes."""
    if pipeline.task == "vectors":
        return replace(pipeline, task="classes", labels=names, activation="softmax")
    return replace(pipeline, labels=names)


def _with_labels(samples: RawSamples, names: Sequence[str]) -> RawSamples:
    """Pairs of a text and the name of its class as texts with labels: in Python both are tuples of two strings.

    They are meant so if most are names, in whatever case: a misspelt one makes no pairs of all others.
    """
    if samples.kind != "pair" or samples.labels is not None:
        return samples
    known = {name.casefold() for name in names}
    if 2 * sum(second.casefold() in known for _, second in samples.items) <= len(samples):
        return samples
    labels = np.array([second for _, second in samples.items], object)
    return replace(samples, kind="text", items=[first for first, _ in samples.items], labels=labels)


def _with_numbers(samples: RawSamples, names: Sequence[str]) -> RawSamples:
    """Labels that are names of classes as their numbers."""
    labels = samples.labels
    if labels is None or labels.dtype != object or not all(isinstance(label, str) for label in labels):
        return samples
    numbers = {name: number for number, name in enumerate(names)}
    for row, label in enumerate(labels):
        if label not in numbers:
            raise SamplesError(
                f"{samples.describe(row)} of {samples.source} has the label {label!r:.40}",
                f"the model's classes are {', '.join(names)[:200]}",
            )
    return replace(samples, labels=np.array([numbers[label] for label in labels], np.int64))
