"""Samples from Python objects: lists, datasets, loaders, stacked arrays, what tokenizers give, and raw items."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corewise.common import nested
from corewise.common.errors import InputError, SamplesError
from corewise.common.phrases import shown, with_article
from corewise.common.references import guard
from corewise.samples import encodings
from corewise.samples.data import Samples
from corewise.samples.drawing import draw
from corewise.samples.image_files import is_pil
from corewise.samples.raw import NOUNS, RawItem, RawKind, RawSamples, gather
from corewise.samples.stored import Array, Spool, to_array
from corewise.samples.tensors import Item, collect
from corewise.samples.texts import GUESSED, LABEL_COLUMNS, NAME_BY_OPTION, TEXT_COLUMNS, Columns, text_problem

RAW_FIXES: dict[RawKind, str] = {
    "text": "give a model that brings its tokenizer, or tokenize them: a dict of input_ids and attention_mask each",
    "pair": "give a model that brings its tokenizer, or tokenize them: a dict of input_ids and attention_mask each",
    "image": "give arrays, or a folder of images with a preprocess function",
    "audio": "give a model that says their rate, --sample-rate, or arrays",
}

PYTHON = "python"
"""What messages call samples that are no file."""
NAME_IN_PYTHON = "name the text's column 'text', or give (text, label), or ((text, text), label) for pairs"
"""What to do about such samples if nothing tells which column is the text."""
FIRST = 16
"""Samples that are looked at until one tells what all are."""
CELLS = (str, int, float, np.generic)
"""What a row of a table of texts has."""

Pair = tuple[Any, Any]
"""A sample's inputs and its label (or ``None``)."""


def from_python(
    samples: Any,
    *,
    groups: Any = None,
    source: str = PYTHON,
    max_samples: int | None = None,
    seed: int = 0,
    spool: Path | None = None,
) -> Samples:
    """Samples of tensors from Python objects.

    ``Samples`` are taken as they are; else ``samples`` is one of

    - a torch ``DataLoader`` (anything with ``batch_size`` and ``dataset``): yields batches, which are taken apart;
    - a dict of stacked values ``{"inputs": ..., "labels": ..., "groups": ...}``, the last two optional;
    - a dict of columns, as a tokenizer returns for several texts: keyword inputs, ``labels`` and ``groups`` aside;
    - a list, dataset or other iterable of single samples without batch dimension.

    A sample or batch that is a list or tuple of two is (inputs, label), where the label may be ``None``; anything
    else is inputs. Inputs that are a tuple or list call ``model(*inputs)``, a dict ``model(**inputs)`` without its
    ``labels``, which are the label; anything else ``model(inputs)``. A tokenizer's output for one text may be lists,
    and may have a batch dimension of 1.

    Args:
        samples: Numpy arrays or torch tensors in one of these forms; float64 becomes float32.
        groups: Numbers of the samples that belong together, one for each sample.
        source: What messages and the report call them.
        max_samples: Draw at most this many; of what has a length, only those are asked for.
        seed: Seed of the draw.
        spool: Folder for a temporary file, for what an iterable makes beyond 64 MiB; the system's by default.

    Raises:
        SamplesError: Naming the sample, and where the samples are raw (``raw_from_python`` takes those).
        OutputError: Where the temporary file cannot be written.

    Example:
        >>> samples = from_python([(np.zeros(3, np.float32), 0), (np.ones(3, np.float32), 1)])
        >>> len(samples), samples.labels
        (2, array([0, 1]))
    """
    gathered = raw_from_python(samples, groups=groups, source=source, max_samples=max_samples, seed=seed, spool=spool)
    if isinstance(gathered, RawSamples):
        raise SamplesError(f"{source} gives {NOUNS[gathered.kind]}", RAW_FIXES[gathered.kind])
    return gathered


def raw_from_python(
    samples: Any,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    groups: Any = None,
    source: str = PYTHON,
    max_samples: int | None = None,
    seed: int = 0,
    spool: Path | None = None,
) -> Samples | RawSamples:
    """Samples from Python objects, raw where they are raw.

    Beside what ``from_python`` takes: strings, pairs of strings, PIL images, paths and content (``bytes``) of images,
    each alone or as (item, label); dicts, or a table of pandas, polars or pyarrow, with the columns ``text``, ``pair``
    and ``label``.

    Args:
        samples: What holds them.
        text: Which key of a dict is the text; ``text`` or ``sentence`` by default.
        pair: Which key is the second text of a pair.
        label: Which key is the label; ``label`` or ``labels`` by default.
        groups: As in ``from_python``, as are ``source``, ``max_samples``, ``seed`` and ``spool``.

    Raises:
        SamplesError: Naming the sample.
        OutputError: Where the temporary file cannot be written.

    Example:
        >>> raw_from_python(["a text", "another one"]).kind
        'text'
    """
    if isinstance(samples, Samples | RawSamples):
        return samples.draw(max_samples, seed)
    stream = _stream(samples, groups, source, max_samples, seed)
    columns = Columns(text, pair, label)
    head = _first_told(stream.singles, columns)
    if not head:
        raise SamplesError(f"there are no samples in {source}", "give at least 2; a few hundred are better")
    singles = chain(head, stream.singles)
    told = head[-1].sample
    kind = _raw_kind(told, columns)
    if kind is None and isinstance(told, list | tuple) and told and isinstance(told[0], str):
        raise SamplesError(
            f"sample {head[-1].number} of {source} is {shown(told, 60)}",
            "give a text, (text, label), (text, text) or ((text, text), label)",
        )
    options: dict[str, Any] = {"source": source, "max_samples": stream.max_samples, "seed": seed}
    made: Samples | RawSamples
    if kind is None:
        made = collect(_items(singles, source), spool=Spool(spool) if stream.is_made else None, **options)
    else:
        made = gather(_raw_items(singles, kind, columns, source), kind, **options)
    made = replace(made, notes=(*made.notes, *stream.notes))
    return made if made.groups is None else made.draw(max_samples, seed)


class _Single(NamedTuple):
    """A sample as the user has it, with the user's number for it."""

    number: int
    sample: Any
    group: int | None = None


class _Stream(NamedTuple):
    """Samples one after the other.

    ``max_samples`` of them are to be drawn as they come: not where that is done, or where they are in groups, which
    are drawn as a whole. ``is_made``: the samples come into being now, so that the user does not hold them.
    """

    singles: Iterator[_Single]
    max_samples: int | None = None
    is_made: bool = False
    notes: tuple[str, ...] = ()


def _stream(samples: Any, groups: Any, source: str, max_samples: int | None, seed: int) -> _Stream:
    samples = _rows_of_table(samples)
    if isinstance(samples, Mapping):
        groups = samples.get("groups", groups)
        rows = _guarded(_from_mapping(samples, source), f"sample {{}} of {source}", count())
        return _grouped(rows, groups, source, max_samples, is_made=False)
    if isinstance(samples, str | bytes) or not (hasattr(samples, "__iter__") or hasattr(samples, "__getitem__")):
        raise SamplesError(f"{source} gives {type(samples).__name__}", "give a list, a dict or a DataLoader of samples")
    if hasattr(samples, "dataset") and (
        getattr(samples, "batch_size", None) is not None or getattr(samples, "batch_sampler", None) is not None
    ):
        batches = _guarded(samples, f"batch {{}} of {source}", count())
        singles = (single for _, batch in batches for single in _from_batch(batch, source))
        return _grouped(enumerate(singles), groups, source, max_samples, is_made=True)
    place = f"sample {{}} of {source}"
    is_made = not isinstance(samples, list | tuple)
    if groups is None and max_samples is not None and hasattr(samples, "__len__") and hasattr(samples, "__getitem__"):
        chosen, notes = draw(len(samples), max_samples, seed)
        drawn = _guarded((samples[number] for number in chosen), place, iter(chosen))
        return _Stream((_Single(number, sample) for number, sample in drawn), None, is_made, notes)
    # A dataset without __iter__ need not end with IndexError, as Python's iteration expects.
    everything = samples if hasattr(samples, "__iter__") else (samples[number] for number in range(len(samples)))
    return _grouped(_guarded(everything, place, count()), groups, source, max_samples, is_made)


def _rows_of_table(samples: Any) -> Any:
    """The rows of a table, a column or an array of texts, as dicts or values; anything else as it is."""
    if hasattr(samples, "iloc"):  # of pandas, whose columns have their own numbers for rows
        return samples.to_dict("records") if hasattr(samples, "columns") else samples.tolist()
    if isinstance(samples, np.ndarray) and samples.size and isinstance(samples.flat[0], str):
        return samples.tolist()
    name = next((name for name in ("to_dicts", "to_pylist") if hasattr(samples, name)), None)
    return samples if name is None else getattr(samples, name)()


def _values_of_column(values: Any) -> Any:
    """A column of pandas, polars or pyarrow as an array, and an array of texts as a list; all else as it is.

    Columns of pandas have their own numbers for rows, which a split or a shuffle leaves in another order.
    """
    is_table = hasattr(values, "columns")
    if not is_table and any(hasattr(values, name) for name in ("iloc", "to_pylist", "to_list")):
        values = np.asarray(values)
    is_texts = isinstance(values, np.ndarray) and values.ndim == 1 and len(values) and isinstance(values[0], str)
    return values.tolist() if is_texts else values


def _grouped(
    samples: Iterable[tuple[int, Any]], groups: Any, source: str, max_samples: int | None, is_made: bool
) -> _Stream:
    """A stream of numbered samples with their groups, where there are any."""
    if groups is None:
        return _Stream((_Single(number, sample) for number, sample in samples), max_samples, is_made)
    return _Stream(_with_groups(samples, to_array(groups, f"groups of {source}"), source), None, is_made)


def _with_groups(samples: Iterable[tuple[int, Any]], groups: Array, source: str) -> Iterator[_Single]:
    seen = 0
    for number, sample in samples:
        seen += 1
        if number < len(groups):
            yield _Single(number, sample, groups[number])
    if len(groups) != seen:
        raise SamplesError(f"{source} has {len(groups)} groups for {seen} samples", "give one for each sample")


def _items(singles: Iterable[_Single], source: str) -> Iterator[Item]:
    """Samples as items; what a tokenizer gave for several texts becomes several, each with a number of its own."""
    further = 0
    for number, sample, group in singles:
        number += further
        inputs, label = _pair(sample)
        where = f"sample {number} of {source}"
        is_several = encodings.is_encoding(inputs) and encodings.is_several(inputs)
        if isinstance(inputs, Mapping) and label is None:
            inputs, label = encodings.pop_label(inputs)
        if not is_several:
            yield Item(number, encodings.single(inputs, where), label, group=group)
            continue
        several = list(encodings.rows(inputs, where))
        labels = label if hasattr(label, "__len__") and len(label) == len(several) else [label] * len(several)
        for place, (row, its_label) in enumerate(zip(several, labels, strict=True)):
            yield Item(number + place, encodings.arrays(row, where), its_label, group=group)
        further += len(several) - 1


def _first_told(singles: Iterator[_Single], columns: Columns) -> list[_Single]:
    """The first sample that tells what all are, behind those in which it is missing; at most ``FIRST``."""
    head: list[_Single] = []
    for single in singles:
        head.append(single)
        if len(head) == FIRST or not _is_missing(single.sample, columns):
            break
    return head


def _is_missing(sample: Any, columns: Columns) -> bool:
    """Whether a sample has nothing in the place of a text: ``None``, or NaN as pandas has it."""
    if isinstance(sample, Mapping):
        value = sample.get(_text_column(sample, columns), "")
    else:
        value = sample[0] if isinstance(sample, list | tuple) and sample else sample
    return value is None or (isinstance(value, float) and value != value)


def _text_column(sample: Mapping[str, Any], columns: Columns) -> str:
    """The column of the text, if it is named or has a usual name; else nothing."""
    return columns.text or next((name for name in TEXT_COLUMNS if name in sample), "")


def _raw_kind(sample: Any, columns: Columns) -> RawKind | None:
    """What raw samples are, by one of them; ``None`` for tensors."""
    if isinstance(sample, Mapping):
        has_text = isinstance(sample.get(_text_column(sample, columns)), str)
        # Any row of a table that has words in it: the columns say which are the text, or a message does.
        is_row = any(isinstance(value, str) for value in sample.values()) and all(
            value is None or isinstance(value, CELLS) for value in sample.values()
        )
        if encodings.is_encoding(sample) or not (has_text or is_row):
            return None
        return "pair" if columns.pair else "text"
    value, _ = _raw_pair(sample)
    if isinstance(value, str):
        return "text"
    if isinstance(value, Path | bytes) or is_pil(value):
        return "image"
    return "pair" if _is_text_pair(value) else None


def _raw_items(singles: Iterable[_Single], kind: RawKind, columns: Columns, source: str) -> Iterator[RawItem]:
    resolved: Columns | None = None
    for number, sample, group in singles:
        if isinstance(sample, Mapping):
            fix = NAME_IN_PYTHON if source == PYTHON else NAME_BY_OPTION
            resolved = resolved or columns.resolve(list(sample), source, fix)
            if resolved.label is None and any(name in sample and name not in resolved for name in LABEL_COLUMNS):
                raise SamplesError(
                    f"sample {number} of {source} has a label, but the first one has none",
                    "give a label for each sample or none",
                )
            value, label, problem = resolved.item(sample)
        else:
            value, label = _raw_pair(sample)
            problem = _raw_problem(value, kind)
        yield RawItem(number, value, label, problem=problem, group=group)


def _raw_pair(sample: Any) -> Pair:
    """A raw item and its label. Two strings are a pair of texts."""
    if isinstance(sample, list | tuple) and len(sample) == 2 and not _is_text_pair(sample):
        value, label = sample
        if isinstance(value, str | bytes | Path) or is_pil(value) or _is_text_pair(value):
            return tuple(value) if isinstance(value, list) else value, label
    return tuple(sample) if isinstance(sample, list) else sample, None


def _is_text_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _raw_problem(value: Any, kind: RawKind) -> str:
    """What is wrong with an item where the first one was of this kind."""
    if kind == "text":
        return text_problem(value)
    if kind == "image":
        is_one = isinstance(value, Path | bytes) or is_pil(value)
        return "" if is_one else f"is {with_article(type(value).__name__)}, no image"
    if not _is_text_pair(value):
        return f"is {shown(value)}, not a pair of texts"
    return next((f"has a text that {problem}" for text in value if (problem := text_problem(text))), "")


def _guarded(items: Iterable[Any], what: str, numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    """``items``, whose code is the user's and may raise anything, numbered; ``what`` has a place for the number."""
    with guard(SamplesError, f"{what.format(0)} cannot be made"):
        iterator = iter(items)
    for number in numbers:
        with guard(SamplesError, f"{what.format(number)} cannot be made"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield number, item


def _pair(item: Any) -> Pair:
    if isinstance(item, list | tuple) and not hasattr(item, "_fields") and len(item) == 2:
        return item[0], item[1]
    return item, None


def _from_mapping(samples: Mapping[str, Any], source: str) -> Iterator[Any]:
    """The single samples of a dict of stacked values or columns."""
    rest = {name: _values_of_column(values) for name, values in samples.items() if name != "groups"}
    if "inputs" in rest and set(rest) <= {"inputs", "labels"}:
        inputs, labels = rest["inputs"], rest.get("labels")
        kind = _raw_kind(inputs[0], GUESSED) if isinstance(inputs, list | tuple) and inputs else None
        if kind is None:
            return unstack(inputs, labels, source)
        rows = encodings.rows({"text": inputs} if labels is None else {"text": inputs, "label": labels}, source)
        # A text and a label that is a string would be taken for a pair of texts.
        return rows if kind == "text" else ((row["text"], row.get("label")) for row in rows)
    if rest and all(map(_is_table, rest.values())):  # as datasets.load_dataset gives them
        raise SamplesError(
            f"the dict from {source} has a data set for each of {', '.join(map(str, rest))}",
            f"give one of them: samples[{next(iter(rest))!r}]",
        )
    if not rest or not all(hasattr(values, "__len__") and not isinstance(values, str) for values in rest.values()):
        raise SamplesError(
            f"the dict from {source} has the keys {', '.join(map(str, samples))}",
            "give inputs and, if there are any, labels and groups; or a column of arrays for each input",
        )
    return _from_columns(rest, source)


def _is_table(values: Any) -> bool:
    """Whether a value of a dict is a whole data set, with named columns, and not a single column."""
    if isinstance(values, Mapping) or hasattr(values, "columns") or hasattr(values, "column_names"):
        return True
    return isinstance(values, list | tuple) and bool(values) and isinstance(values[0], Mapping)


def _from_columns(columns: Mapping[str, Any], source: str) -> Iterator[dict[str, Any]]:
    for row in encodings.rows(columns, source):
        for name, value in row.items():
            if isinstance(value, list) and not (value and isinstance(value[0], str)):
                row[name] = to_array(value, f"{name} of {source}")
            if name not in encodings.LABEL_KEYS and not isinstance(value, str) and np.ndim(row[name]) == 0:
                raise SamplesError(
                    f"the column {name!r} of {source} has one number for each sample",
                    "give arrays; tokens of one text are one sample: put them into a list",
                )
        yield row


def _from_batch(batch: Any, source: str) -> Iterator[Any]:
    """The single samples of a loader's batch."""
    inputs, labels = _pair(batch)
    if isinstance(inputs, Mapping) and labels is None:
        if encodings.is_encoding(inputs):
            return encodings.rows(inputs, source)
        inputs, labels = encodings.pop_label(inputs)
    # Detectors' loaders collate lists: images of any size, and a dict of boxes and classes for each.
    lists = isinstance(inputs, list | tuple) and isinstance(labels, list | tuple) and len(inputs) == len(labels)
    if lists and all(isinstance(label, Mapping) for label in labels):
        return zip(inputs, labels, strict=True)
    return unstack(inputs, labels, source)


def unstack(inputs: Any, labels: Any, source: str) -> Iterator[Pair]:
    """The single samples of a batch."""
    try:
        leaves, structure = nested.flatten(inputs, "inputs")
    except InputError as error:
        raise SamplesError(f"{source}: {error.what}", error.fix) from error
    arrays = [to_array(leaf, f"inputs of {source}") for leaf in leaves]
    counts = sorted({len(array) if array.ndim else -1 for array in arrays})
    if len(counts) != 1 or counts[0] < 0:
        lengths = " and ".join(str(count) for count in counts if count >= 0) or "no"
        raise SamplesError(f"the stacked inputs of {source} have {lengths} rows", "give one row for each sample")
    total = counts[0]
    if labels is not None:
        labels = labels if isinstance(labels, list | tuple) else np.atleast_1d(to_array(labels, f"labels of {source}"))
        if len(labels) != total:
            raise SamplesError(f"{source} has {len(labels)} labels for {total} samples", "give a label for each sample")
    for i in range(total):
        row = nested.unflatten(structure, [array[i, ...] for array in arrays])
        yield row, None if labels is None else labels[i]
