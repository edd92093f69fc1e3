"""What tokenizers give: dicts of token ids and masks, as lists or arrays, for one text or for several."""

from collections.abc import Iterator, Mapping
from typing import Any

from corewise.common.errors import SamplesError
from corewise.samples.stored import to_array

IDS = "input_ids"
LABEL_KEYS = ("labels", "label")


def is_encoding(value: Any) -> bool:
    """Whether it is a dict with ``input_ids``, as tokenizers return."""
    return isinstance(value, Mapping) and IDS in value


def pop_label(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A dict without its label, and the label or ``None``."""
    key = next((key for key in LABEL_KEYS if key in inputs), None)
    return {name: value for name, value in inputs.items() if name != key}, None if key is None else inputs[key]


def is_several(encoding: Mapping[str, Any]) -> bool:
    """Whether it holds several texts, or one with a batch dimension, as ``return_tensors`` gives it.

    Two dimensions alone do not say so: a multiple choice is one sample of several rows. A ``BatchEncoding`` does.
    """
    ids = encoding[IDS]
    if hasattr(ids, "ndim"):
        return int(ids.ndim) == 2 and (len(ids) == 1 or hasattr(encoding, "encodings"))
    nested = isinstance(ids, list | tuple) and bool(ids) and isinstance(ids[0], list | tuple)
    ragged = nested and len({len(row) for row in ids}) > 1
    return nested and (ragged or len(ids) == 1 or hasattr(encoding, "encodings"))


def arrays(encoding: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One text's tokens with lists of numbers as arrays; texts that a data set keeps beside them are left out."""
    made = {}
    for name, value in encoding.items():
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
            continue
        made[name] = to_array(value, f"{name} of {where}") if isinstance(value, list) else value
    return made


def single(inputs: Any, where: str) -> Any:
    """One sample's inputs, without a batch dimension where a tokenizer put one around them."""
    if not is_encoding(inputs):
        return inputs
    if not is_several(inputs):
        return arrays(inputs, where)
    several = list(rows(inputs, where))
    if len(several) != 1:
        raise SamplesError(f"{where} has the tokens of {len(several)} texts", "tokenize one text at a time")
    return arrays(several[0], where)


def rows(columns: Mapping[str, Any], source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dict of columns, arrays or lists of one length. Raises ``SamplesError`` for other lengths."""
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        named = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise SamplesError(f"the columns of {source} have different lengths: {named}", "give one value for each sample")
    for row in range(next(iter(counts.values()), 0)):
        yield {name: values[row] for name, values in columns.items()}
