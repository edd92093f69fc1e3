"""Samples from Python objects: lists, datasets, loaders, stacked arrays."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np

from corewise.common import nested
from corewise.common.errors import InputError, SamplesError
from corewise.common.references import guard
from corewise.records.report import Preprocess
from corewise.samples.data import Array, Row, Samples

Item = tuple[Any, Any]
"""A sample's inputs and its label (or ``None``)."""

INPUT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32")


def from_python(samples: Any, *, groups: Any = None, source: str = "python") -> Samples:
    """Samples from Python objects: ``Samples`` (as they are), or one of

    - a torch ``DataLoader`` (anything with ``batch_size`` and ``dataset``): yields batches, which are taken apart;
    - a dict of stacked values ``{"inputs": ..., "labels": ..., "groups": ...}``, the last two optional;
    - a list, dataset or other iterable of single samples without batch dimension.

    A sample or batch that is a list or tuple of two is (inputs, label), where the label may be ``None``; anything
    else is inputs. Inputs that are a tuple or list call ``model(*inputs)``, a dict ``model(**inputs)``, anything else
    ``model(inputs)``. Arrays are numpy arrays or torch tensors; float64 becomes float32. ``groups`` numbers the
    samples that belong together. Raises ``SamplesError`` naming the sample.
    """
    if isinstance(samples, Samples):
        return samples
    if isinstance(samples, Mapping):
        if "inputs" not in samples or not set(samples) <= {"inputs", "labels", "groups"}:
            raise SamplesError(
                f"the dict from {source} has the keys {', '.join(map(str, samples))}",
                "give inputs and, where there are any, labels and groups",
            )
        items = unstack(samples["inputs"], samples.get("labels"), source)
        return collect(items, groups=samples.get("groups", groups), source=source)
    if isinstance(samples, str | bytes) or not (hasattr(samples, "__iter__") or hasattr(samples, "__getitem__")):
        raise SamplesError(f"{source} gives {type(samples).__name__}", "give a list, a dict or a DataLoader of samples")
    if hasattr(samples, "dataset") and (
        getattr(samples, "batch_size", None) is not None or getattr(samples, "batch_sampler", None) is not None
    ):
        batches = (_pair(batch) for batch in _guarded(samples, f"batch {{}} of {source}"))
        items = (item for inputs, labels in batches for item in unstack(inputs, labels, source))
    else:
        # A dataset without __iter__ need not end with IndexError, as Python's iteration expects.
        single = samples if hasattr(samples, "__iter__") else (samples[i] for i in range(len(samples)))
        items = (_pair(sample) for sample in _guarded(single, f"sample {{}} of {source}"))
    return collect(items, groups=groups, source=source)


def collect(items: Iterable[Item], *, source: str, groups: Any = None, preprocess: Preprocess | None = None) -> Samples:
    """Check every sample and bring it to one form."""
    rows: list[Row] = []
    labels: list[Any] = []
    structure = None
    names: tuple[str, ...] = ()
    for number, (inputs, label) in enumerate(items):
        args, kwargs = _call(inputs)
        try:
            if structure is None:
                leaves, structure = nested.flatten((args, kwargs), "inputs")
                names = nested.input_names(structure)
                if not names:
                    raise InputError("there is no array", "give numpy arrays or torch tensors")
            else:
                leaves = nested.match_call(structure, args, kwargs)
        except InputError as error:
            raise SamplesError(f"sample {number} of {source}: {error.what}", error.fix) from error
        where = [f"sample {number} of {source}: {name}" for name in names]
        row = tuple(map(_input, leaves, where))
        _check_like(row, rows[0] if rows else row, where)
        rows.append(row)
        labels.append(label)
    if structure is None:
        raise SamplesError(f"there are no samples in {source}", "give at least 2; a few hundred are better")
    return Samples(
        rows=rows,
        structure=structure,
        labels=_labels(labels, source),
        groups=None if groups is None else np.unique(_array(groups, f"groups of {source}"), return_inverse=True)[1],
        source=source,
        preprocess=preprocess,
    )


def _guarded(items: Iterable[Any], what: str) -> Iterator[Any]:
    """``items``, whose code is the user's and may raise anything; ``what`` has a place for the number."""
    with guard(SamplesError, f"{what.format(0)} cannot be made"):
        iterator = iter(items)
    for number in count():
        with guard(SamplesError, f"{what.format(number)} cannot be made"):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _pair(item: Any) -> Item:
    if isinstance(item, list | tuple) and not hasattr(item, "_fields") and len(item) == 2:
        return item[0], item[1]
    return item, None


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    return (inputs,), {}


def unstack(inputs: Any, labels: Any, source: str) -> Iterator[Item]:
    """The single samples of a batch."""
    try:
        leaves, structure = nested.flatten(inputs, "inputs")
    except InputError as error:
        raise SamplesError(f"{source}: {error.what}", error.fix) from error
    arrays = [_array(leaf, f"inputs of {source}") for leaf in leaves]
    counts = sorted({len(array) if array.ndim else -1 for array in arrays})
    if len(counts) != 1 or counts[0] < 0:
        found = " and ".join(str(count) for count in counts if count >= 0) or "no"
        raise SamplesError(f"the stacked inputs of {source} have {found} rows", "give one row for each sample")
    total = counts[0]
    if labels is not None:
        labels = np.atleast_1d(_array(labels, f"labels of {source}"))
        if len(labels) != total:
            raise SamplesError(f"{source} has {len(labels)} labels for {total} samples", "give a label for each sample")
    for i in range(total):
        row = nested.unflatten(structure, [array[i, ...] for array in arrays])
        yield row, None if labels is None else labels[i]


def _array(value: Any, where: str) -> Array:
    """An array or torch tensor as a numpy array of numbers."""
    try:
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SamplesError(f"{where} is no numpy array: {error}", "give numbers, e.g. float32") from error
    if array.dtype.kind not in "biuf":
        raise SamplesError(f"{where} has dtype {array.dtype}", "give numbers")
    return array


def _input(value: Any, where: str) -> Array:
    array = _array(value, where)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.name not in INPUT_DTYPES:
        raise SamplesError(f"{where} has dtype {array.dtype}", f"give one of {', '.join(INPUT_DTYPES)}")
    if not array.size:
        raise SamplesError(f"{where} is empty: its shape is {array.shape}", "remove that sample")
    if not np.isfinite(array).all():
        raise SamplesError(f"{where} has NaN or infinite values", "remove or repair that sample")
    return array


def _check_like(row: Row, first: Row, where: list[str]) -> None:
    for array, model, place in zip(row, first, where, strict=True):
        if array.dtype != model.dtype:
            raise SamplesError(f"{place} is {array.dtype}, in sample 0 it is {model.dtype}", "use one dtype")
        if array.ndim != model.ndim:
            raise SamplesError(
                f"{place} has shape {array.shape}, in sample 0 it has {model.shape}", "use one number of dimensions"
            )


def _labels(labels: list[Any], source: str) -> Array | None:
    missing = [number for number, label in enumerate(labels) if label is None]
    if len(missing) == len(labels):
        return None
    if missing:
        raise SamplesError(f"sample {missing[0]} of {source} has no label", "give a label for each sample or for none")
    arrays = [_array(label, f"the label of sample {number} of {source}") for number, label in enumerate(labels)]
    for number, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise SamplesError(
                f"the label of sample {number} of {source} has shape {array.shape}, that of sample 0 {arrays[0].shape}",
                "use one shape; a sample that is a pair is (inputs, label): give ((a, b), None) for two inputs",
            )
        if not np.isfinite(array).all():
            raise SamplesError(f"the label of sample {number} of {source} is NaN or infinite", "repair that label")
    stacked = np.stack(arrays)
    return stacked.astype(np.float64 if stacked.dtype.kind == "f" else np.int64)
