"""Labels: one for each sample, as the metric takes them.

Numbers and arrays of one shape become one array (N, ...). Arrays of several sizes (a class for each token), dicts of
arrays (the boxes and classes that a detector is judged by) and strings (transcripts) stay one by one, in an object
array (N,). What they mean is the metric's to say.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corewise.common.errors import SamplesError
from corewise.samples.stored import Array, FileRows, StoredFile, Tensor, row_tensors, text_tensor, to_array

RAGGED_FIX = "use one number of dimensions; a sample of two inputs is ((a, b), None), for a pair is (inputs, label)"


def stack_labels(labels: Sequence[Any], describe: Callable[[int], str], source: str) -> Array | None:
    """One array of the labels, or ``None`` where no sample has one.

    ``describe`` names the sample at a place. Raises ``SamplesError`` naming the first label that is missing, is no
    number, or is of another kind than the first one's.
    """
    missing = [place for place, label in enumerate(labels) if label is None]
    if len(missing) == len(labels):
        return None
    if missing:
        raise SamplesError(f"{describe(missing[0])} of {source} has no label", "give a label for each sample or none")
    where = [f"the label of {describe(place)} of {source}" for place in range(len(labels))]
    if isinstance(labels[0], str):
        return _objects(_all(labels, where, str, "a string"))
    if isinstance(labels[0], Mapping):
        return _objects(_dicts(_all(labels, where, Mapping, "a dict"), where))
    return _stack([_number(label, place) for label, place in zip(labels, where, strict=True)], where)


def check_class_names(names: Sequence[str], classes: int, source: str) -> None:
    """Raise ``SamplesError`` where ``source`` has another number of class names than the model has scores."""
    if len(names) != classes:
        raise SamplesError(
            f"{source} has {len(names)} class names, but the model has {classes} classes",
            "give one name per line, in the order of the model's scores",
        )


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names in a text file, one per line.

    Raises ``SamplesError`` where a line is empty, which would shift the classes after it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error  # without the path again
        raise SamplesError(f"{path} cannot be read: {why}", "give a text file in UTF-8, one name per line") from error
    if "" in lines:
        raise SamplesError(f"{path} line {lines.index('') + 1} is empty", "give one class name per line")
    return tuple(lines)


def digest_bytes(values: Array | None) -> Iterator[bytes]:
    """What a fingerprint takes of an array; of an object array, of each of its labels."""
    if values is None:
        yield b"none"
    elif values.dtype != object:
        yield f"{values.dtype.str}{values.shape}".encode() + values.tobytes()
    else:
        for label in values:
            if isinstance(label, str):
                yield json.dumps(label).encode()
            elif isinstance(label, Mapping):
                for key, array in label.items():
                    yield json.dumps(key).encode()
                    yield from digest_bytes(array)
            else:
                yield from digest_bytes(label)


def label_tensors(labels: Array | None) -> Iterator[Tensor]:
    """The tensors that keep labels in a file; ``stored_labels`` reads them."""
    if labels is None:
        return
    if labels.dtype != object:
        yield Tensor.whole("labels", labels)
    elif isinstance(labels[0], str):
        yield text_tensor("labels.text", list(labels))
    else:
        keys = list(labels[0]) if isinstance(labels[0], Mapping) else []
        rows = [tuple(label[key] for key in keys) if keys else (label,) for label in labels]
        yield text_tensor("labels.keys", keys)
        yield from row_tensors(rows, [tuple(array.shape for array in row) for row in rows], "label.")


def stored_labels(file: StoredFile) -> Array | None:
    """The labels that ``label_tensors`` wrote."""
    if "labels" in file.names:
        return file.array("labels")
    if "labels.text" in file.names:
        return _objects(file.texts("labels.text"))
    if "labels.keys" not in file.names:
        return None
    keys = file.texts("labels.keys")
    rows = FileRows.stored(file, "label.")
    return _objects([dict(zip(keys, row, strict=True)) if keys else row[0] for row in rows])


def _objects(labels: Sequence[Any]) -> Array:
    """An object array (N,), whatever its elements are."""
    array = np.empty(len(labels), object)
    for place, label in enumerate(labels):
        array[place] = label
    return array


def _all(labels: Sequence[Any], where: Sequence[str], kind: type, noun: str) -> Sequence[Any]:
    for label, place in zip(labels, where, strict=True):
        if not isinstance(label, kind):
            raise SamplesError(f"{place} is not {noun}, but the first one is", "use one kind of label")
    return labels


def _number(label: Any, where: str) -> Array:
    array = to_array(label, where)
    if not np.isfinite(array).all():
        raise SamplesError(f"{where} is NaN or infinite", "repair that label")
    return array


def _stack(arrays: list[Array], where: Sequence[str]) -> Array:
    """(N, ...) of int64 or float64; an object array (N,) of such arrays where their sizes differ."""
    wide = np.float64 if np.result_type(*{array.dtype for array in arrays}).kind == "f" else np.int64
    shapes = {array.shape for array in arrays}
    if len(shapes) == 1:
        return np.stack(arrays).astype(wide)
    for array, place in zip(arrays, where, strict=True):
        if array.ndim != arrays[0].ndim:
            raise SamplesError(f"{place} has shape {array.shape}, but the first one has {arrays[0].shape}", RAGGED_FIX)
    return _objects([array.astype(wide) for array in arrays])


def _dicts(labels: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[dict[str, Array]]:
    """Each value an array, of one dtype and rank for each key; ``[]`` for no boxes gets the others' shape."""
    keys = list(labels[0])
    for label, place in zip(labels, where, strict=True):
        if set(label) != set(keys):
            raise SamplesError(
                f"{place} has the keys {', '.join(map(str, label))}, but the first one has {', '.join(map(str, keys))}",
                "give the same keys for each sample",
            )
    columns = {}
    for key in keys:
        places = [f"{key!r} of {place}" for place in where]
        arrays = [_number(label[key], place) for label, place in zip(labels, places, strict=True)]
        model = max(arrays, key=lambda array: array.size)
        dtype = np.result_type(*{array.dtype for array in arrays if array.size} or {model.dtype})
        for number, (array, place) in enumerate(zip(arrays, places, strict=True)):
            if array.ndim != model.ndim and array.size:
                raise SamplesError(f"{place} has shape {array.shape}, but another one has {model.shape}", RAGGED_FIX)
            shape = array.shape if array.ndim == model.ndim else (0, *model.shape[1:])
            arrays[number] = array.reshape(shape).astype(dtype)
        columns[key] = arrays
    return [{key: columns[key][place] for key in keys} for place in range(len(labels))]
