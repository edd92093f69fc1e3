"""Runs the model on samples, and refuses outputs that are no rows of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from corewise.common import nested
from corewise.common.errors import InputError, SamplesError, SourceError
from corewise.common.nested import Structure
from corewise.common.phrases import with_article
from corewise.common.references import guard
from corewise.records.build import TensorSpec
from corewise.source.checks import inner_model
from corewise.source.examples import Batch, Examples, free
from corewise.source.exported import Flat

ONE_VALUE = "Expected more than 1 value per channel when training"
"""What torch says of a batch norm that is given one row."""
SUPPRESSED = ("boxes", "scores", "labels", "keypoints", "masks")
"""What torchvision's detectors call the tensors that they list for each photo."""
SUPPRESSED_FIX = "return what is before the suppression: boxes (N, K, 4) and scores (N, K, classes)"
OUTPUT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def run(flat: Flat, batch: Batch, inputs: Sequence[TensorSpec]) -> tuple[Structure, list[Tensor]]:
    """The structure and tensors of the output for one batch.

    Raises ``SamplesError`` where the model does not take the samples, and ``SourceError`` where it changes them, or its
    outputs are no tensors with the batch as first dimension, or have NaN.
    """
    given = ", ".join(
        f"{spec.name} {spec.dtype} {tuple(tensor.shape)}" for spec, tensor in zip(inputs, batch.tensors, strict=True)
    )
    what = f"the model does not take the samples, in a batch {given}"
    versions = [tensor._version for tensor in batch.tensors]
    with guard(SamplesError, what, _samples_fix(flat, batch, inputs)), torch.no_grad():
        value = flat.call_model(*batch.tensors)
    for spec, tensor, version in zip(inputs, batch.tensors, versions, strict=True):
        if tensor._version != version:
            raise SourceError(
                f"the model changes its input {spec.name} in place, so that a second call gives another answer",
                f"compute a new tensor: {spec.name} = {spec.name} * 2 in place of {spec.name} *= 2",
            )
    try:
        leaves, structure = nested.flatten(value, "output")
    except InputError as error:
        fix = inner_model(flat.model) or f"return only tensors: {error.fix}"
        raise SourceError(f"the model's {error.what}", fix) from error
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise SourceError(f"the model returns {type(value).__name__} without tensors", "return tensors")
    for name, leaf in zip(nested.leaf_names(structure), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise SourceError(
                f"the model's {name} is {with_article(type(leaf).__name__)}, which is not a tensor", "return tensors"
            )
        _check_output(name, leaf, batch)
    if not any(leaf.numel() for leaf in leaves):
        raise SourceError(
            f"the model returns no values: the shape of its output is {tuple(leaves[0].shape)}",
            "return what it computes",
        )
    return structure, leaves


def takes(flat: Flat, batch: Batch, inputs: Sequence[TensorSpec]) -> bool:
    """Whether the model answers a batch as it should."""
    try:
        run(flat, batch, inputs)
    except InputError:
        return False
    return True


def run_batches(flat: Flat, examples: Examples) -> tuple[Structure, list[Tensor], str]:
    """``run`` on a batch of two, having checked that the batch is free; or on one row, and why the model takes no more.

    Raises ``SourceError`` where it takes two rows and not one or three, or where an output compares the rows of the
    batch with each other.
    """
    inputs = examples.inputs
    two, three, one = examples.largest(2), examples.largest(3), examples.smallest(1)
    fix = "make forward independent of the batch, the first dimension of its inputs"
    try:
        structure, outputs = run(flat, two, inputs)
    except SamplesError as error:
        if not takes(flat, two.rows([0]), inputs):
            raise
        structure, outputs = run(flat, two.rows([0]), inputs)
        return structure, outputs, f"the model takes one sample but no batch of two: {error.what}"
    for batch, count in ((three, "three"), (one, "one")):
        try:
            again, more = run(flat, batch, inputs)
        except SamplesError as error:
            if batch is one and takes(flat, two.rows([0]), inputs):  # so it is the sample and not the batch
                raise
            if ONE_VALUE in error.what:
                raise SourceError(*_batch_statistics(flat)) from error
            raise SourceError(f"the model takes a batch of two but not of {count}: {error.what}", fix) from error
        check_structure(structure, again)
        if batch is three:
            _check_rows(nested.leaf_names(structure), outputs, more)
    return structure, outputs, ""


def check_structure(first: Structure, other: Structure) -> None:
    """Raise ``SourceError`` if what the model returns has another structure for other inputs."""
    if first == other:
        return
    counts = [len(nested.leaf_names(structure)) for structure in (first, other)]
    if counts[0] != counts[1]:
        raise SourceError(
            f"the model returns {counts[0]} tensors for one input and {counts[1]} for another",
            "return as many for each, e.g. one tensor that is padded",
        )
    raise SourceError("the model's output has constants that depend on its input", "return them as tensors")


def _batch_statistics(flat: Flat) -> tuple[str, str]:
    """What to say and to advise about a batch norm that normalises by the rows of each call."""
    names = [
        name.removeprefix("model.")
        for name, part in flat.named_modules()
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None)
    ]
    which = f"the batch norm {names[0]}" if names else "a batch norm"
    return (
        f"{which} takes mean and variance from the rows of each call, so that answers depend on the neighbours and a "
        "single row has none",
        "use the statistics of training: eval mode, and track_running_stats=True while training",
    )


def output_specs(structure: Structure, outputs: list[Tensor], smallest: list[Tensor]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes; a dimension that is another for the smallest sample is dynamic, as the batch is."""
    specs = []
    for name, tensor, other in zip(nested.leaf_names(structure), outputs, smallest, strict=True):
        sizes, others = tensor.shape[1:], other.shape[1:]
        varying = {dim for dim in range(len(sizes)) if sizes[dim] != others[dim]}
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=name, dtype=dtype, shape=(None, *free(sizes, varying))))
    return tuple(specs)


def _samples_fix(flat: Flat, batch: Batch, inputs: Sequence[TensorSpec]) -> str:
    tables = [part.num_embeddings for part in flat.modules() if isinstance(part, nn.Embedding)]
    # (N, tokens): numbers of another shape, such as lengths, look nothing up.
    integers = [each for each in batch.tensors if each.dtype in (torch.int32, torch.int64) and each.dim() == 2]
    largest = max((int(tensor.max()) for tensor in integers), default=0)
    if tables and largest >= max(tables):
        return (
            f"the samples have the number {largest}, and no table of the model has as many rows: give the tokenizer"
            " that it was trained with"
        )
    doubles = [spec.name for spec in inputs if spec.dtype == "float64"]
    if doubles and all(weight.dtype != torch.float64 for weight in flat.parameters()):
        return f"give {', '.join(doubles)} as float32, as the model's weights are"
    return "give samples of the shape and dtype that forward takes; a sample that is a pair is (inputs, label)"


def _check_output(name: str, leaf: Tensor, batch: Batch) -> None:
    if not leaf.dim() or len(leaf) != len(batch):
        raise SourceError(
            f"the model's {name} has shape {tuple(leaf.shape)} for a batch of {len(batch)}",
            SUPPRESSED_FIX if name in SUPPRESSED else "return tensors whose first dimension is the batch",
        )
    if leaf.layout != torch.strided:
        layout = str(leaf.layout).removeprefix("torch.")
        raise SourceError(f"the model's {name} is sparse ({layout})", "return its .to_dense()")
    if str(leaf.dtype).removeprefix("torch.") not in OUTPUT_DTYPES:
        raise SourceError(f"the model's {name} is {leaf.dtype}", "return float32 or integers")
    if leaf.is_floating_point() and bool(leaf.isnan().any()):
        row = int(leaf.isnan().reshape(len(leaf), -1).any(1).nonzero()[0])
        raise SourceError(f"the model's {name} has NaN for {batch.names[row]}", "repair the model or that sample")


def _check_rows(names: Sequence[str], two: Sequence[Tensor], three: Sequence[Tensor]) -> None:
    """Raise ``SourceError`` for an output as CLIP's ``logits_per_image``: each row has a value for each other row."""
    grows = [
        any(2 * more == 3 * fewer != 0 for fewer, more in zip(of_two.shape[1:], of_three.shape[1:], strict=False))
        for of_two, of_three in zip(two, three, strict=True)
    ]
    if not any(grows):
        return
    first = grows.index(True)
    others = [name for name, is_square in zip(names, grows, strict=True) if not is_square]
    advice = f"return only {', '.join(others)}" if others else "return what is compared"
    shapes = f"{tuple(two[first].shape)} for two rows and {tuple(three[first].shape)} for three"
    raise SourceError(
        f"the model's {names[first]} compares the rows of a batch with each other: its shape is {shapes}",
        f"{advice}, from a module around the model, and compare the rows afterwards",
    )
