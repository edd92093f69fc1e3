"""From a user's module to one exported program with flat tensors and a dynamic batch."""

import contextlib
import inspect
import io
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from corewise.common import nested
from corewise.common.errors import CorewiseError, InputError, SamplesError, SourceError
from corewise.common.nested import Structure
from corewise.common.references import guard, place, where
from corewise.records.build import TensorSpec
from corewise.samples import Samples

Shapes = tuple[tuple[int, ...], ...]
SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
SPECIALIZED = re.compile(r"You marked (.+) as dynamic but your code specialized it to be a constant \((\d+)\)")
SHAPES: Any = torch.fx.experimental._config
OUTPUT_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


class Flat(nn.Module):
    """``model`` with flat tensors as positional inputs and a flat tuple of tensors as output."""

    def __init__(self, model: nn.Module, inputs: Structure) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.training = False

    def call_model(self, *tensors: Tensor) -> Any:
        """The model's own output for flat inputs."""
        args, kwargs = nested.unflatten(self.inputs, tensors)
        return self.model(*args, **kwargs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the model's output."""
        return tuple(nested.flatten(self.call_model(*tensors), "output")[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported:
    """A model ready for the engines.

    ``module`` takes and returns flat tensors (see ``Flat``); ``program`` is its export, without example inputs,
    or ``None`` with the reason in ``why_not``. ``output_structure`` puts the flat outputs together again.
    """

    program: ExportedProgram | None
    why_not: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_structure: Structure


class _NotExportable(CorewiseError):
    """Why there is no program; becomes ``Exported.why_not``."""


def export(model: nn.Module | ExportedProgram, samples: Samples) -> Exported:
    """Run ``model`` on samples and export it with a dynamic batch.

    The model is put in eval mode. Dimension 0 of every input is the batch; what differs between samples is dynamic
    too. Raises ``SamplesError`` where the model does not take the samples, and ``SourceError`` where its outputs are
    no tensors, are NaN, or do not have the input's batch as first dimension. A model that cannot be exported
    is no error: see ``Exported.why_not``.
    """
    flat = Flat(_checked(model), samples.structure)
    names = nested.input_names(samples.structure, _parameters(flat.model))
    shapes = [tuple(array.shape for array in row) for row in samples.rows]
    varying = [_varying([row[k] for row in shapes]) for k in range(len(names))]
    inputs = tuple(
        TensorSpec(name=name, dtype=array.dtype.name, shape=(None, *_free(array.shape, dims)))
        for name, array, dims in zip(names, samples.rows[0], varying, strict=True)
    )
    largest, smallest = max(shapes, key=_size), min(shapes, key=_size)
    two, three = _example(samples, shapes, largest, 2), _example(samples, shapes, largest, 3)
    structure, outputs = _run_batches(flat, two, three, inputs)
    single = _example(samples, shapes, smallest, 1)
    _, single_outputs = _run(flat, single, inputs)
    program, why_not = _program(flat, two, varying, (single, three))
    return Exported(
        program=program,
        why_not=why_not,
        module=flat,
        inputs=inputs,
        outputs=_specs(structure, outputs, single_outputs),
        output_structure=structure,
    )


def digest(exported: Exported) -> str:
    """sha256 (hex) over what the model computes: its graph (or source code) and its weights."""
    result = sha256()
    if exported.program is not None:
        modules = exported.program.graph_module.modules()
        texts = [module.code for module in modules if isinstance(module, GraphModule)]
        texts.append(str(exported.program.graph_signature))
        tensors: dict[str, Any] = {**exported.program.state_dict, **exported.program.constants}
    else:
        texts = [repr(exported.module), *(_source(module) for module in exported.module.modules())]
        tensors = exported.module.state_dict()
    for text in (*texts, repr(exported.inputs), repr(exported.outputs), repr(exported.output_structure)):
        result.update(text.encode())
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            result.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _source(module: nn.Module) -> str:
    if type(module).__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(type(module))
    except (OSError, TypeError):
        return ""


def _checked(model: Any) -> nn.Module:
    """The module to run, in eval mode, if it is one and its weights are fp32 on the CPU."""
    if isinstance(model, ExportedProgram):
        placeholders = {node.name: node.meta["val"] for node in model.graph.nodes if node.op == "placeholder"}
        for name in model.graph_signature.user_inputs:
            value = placeholders.get(str(name))
            if isinstance(value, Tensor) and (not value.shape or isinstance(value.shape[0], int)):
                raise SourceError(
                    f"the batch of input {name} is fixed: its shape is {tuple(value.shape)}",
                    "export it with a dynamic first dimension: dynamic_shapes={0: torch.export.Dim('batch')}",
                )
        module: nn.Module = model.module()
    elif isinstance(model, nn.Module):
        module = model.eval()
    else:
        raise SourceError(f"the model is a {type(model).__name__}", "give a torch.nn.Module or an ExportedProgram")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu":
            raise SourceError(f"{name} is on {tensor.device}", "call model.cpu() first")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise SourceError(f"{name} is {tensor.dtype}", "call model.float() first: the fp32 model is the baseline")
    return module


def _parameters(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except ValueError:  # a traced TorchScript module has none
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _varying(shapes: Sequence[tuple[int, ...]]) -> set[int]:
    """The dimensions whose size differs between samples."""
    return {dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}


def _free(shape: Sequence[int], varying: set[int]) -> tuple[int | None, ...]:
    return tuple(None if dim in varying else size for dim, size in enumerate(shape))


def _size(shapes: Shapes) -> tuple[int, int]:
    # A dimension of size 1 comes last: torch.export takes it for a constant.
    sizes = [size for shape in shapes for size in shape]
    return -sizes.count(1), sum(sizes)


def _example(samples: Samples, shapes: list[Shapes], wanted: Shapes, count: int) -> tuple[Tensor, ...]:
    """A batch of ``count`` rows of one shape; repeats rows where there are too few."""
    rows = [index for index, shape in enumerate(shapes) if shape == wanted][:count]
    chosen = [samples.rows[rows[i % len(rows)]] for i in range(count)]
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*chosen, strict=True))


def _run(flat: Flat, tensors: Sequence[Tensor], inputs: Sequence[TensorSpec]) -> tuple[Structure, list[Tensor]]:
    """The structure and tensors of the output for one batch."""
    given = ", ".join(
        f"{spec.name} {spec.dtype} {tuple(tensor.shape)}" for spec, tensor in zip(inputs, tensors, strict=True)
    )
    fix = "give samples of the shape and dtype that forward takes; a sample that is a pair is (inputs, label)"
    with guard(SamplesError, f"the model does not take the samples, in a batch {given}", fix), torch.no_grad():
        value = flat.call_model(*tensors)
    try:
        leaves, structure = nested.flatten(value, "output")
    except InputError as error:
        raise SourceError(f"the model's {error.what}", f"return only tensors: {error.fix}") from error
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise SourceError(f"the model returns {type(value).__name__} without tensors", "return tensors")
    batch = len(tensors[0])
    for name, leaf in zip(nested.leaf_names(structure), leaves, strict=True):
        if not leaf.dim() or len(leaf) != batch:
            raise SourceError(
                f"the model's {name} has shape {tuple(leaf.shape)} for a batch of {batch}",
                "return tensors whose first dimension is the batch",
            )
        if str(leaf.dtype).removeprefix("torch.") not in OUTPUT_DTYPES:
            raise SourceError(f"the model's {name} is {leaf.dtype}", "return float32 or integers")
        if leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise SourceError(f"the model's {name} has NaN for the first samples", "repair the model or its inputs")
    return structure, leaves


def _run_batches(
    flat: Flat, two: Sequence[Tensor], three: Sequence[Tensor], inputs: Sequence[TensorSpec]
) -> tuple[Structure, list[Tensor]]:
    """``_run`` on a batch of two, having checked that the batch is free."""
    fix = "make forward independent of the batch, the first dimension of its inputs"
    try:
        structure, outputs = _run(flat, two, inputs)
    except SamplesError as error:
        if _takes(flat, [tensor[:1] for tensor in two], inputs):
            raise SourceError(f"the model takes one sample but no batch of two: {error.what}", fix) from error
        raise
    try:
        again, _ = _run(flat, three, inputs)
    except SamplesError as error:
        raise SourceError(f"the model takes a batch of two but not of three: {error.what}", fix) from error
    if again != structure:
        raise SourceError("the model's output has constants that depend on its input", "return them as tensors")
    return structure, outputs


def _takes(flat: Flat, tensors: Sequence[Tensor], inputs: Sequence[TensorSpec]) -> bool:
    try:
        _run(flat, tensors, inputs)
    except InputError:
        return False
    return True


def _specs(structure: Structure, outputs: list[Tensor], smallest: list[Tensor]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes; a dimension that is another for the smallest sample is dynamic, as the batch is."""
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=(None, *_free(tensor.shape[1:], _varying([tensor.shape[1:], other.shape[1:]]))),
        )
        for name, tensor, other in zip(nested.leaf_names(structure), outputs, smallest, strict=True)
    )


def _program(
    flat: Flat, example: tuple[Tensor, ...], varying: Sequence[set[int]], batches: Sequence[tuple[Tensor, ...]]
) -> tuple[ExportedProgram | None, str]:
    """The exported program, which answers ``batches`` as the model does, or why there is none.

    The batch is one ``Dim`` over all inputs. Other dynamic dimensions are ``Dim.DYNAMIC``: torch derives which of
    them are equal and how large they may be (a model's longest sequence), which a ``Dim`` would have to know.
    """
    batch = Dim("batch", min=1)
    dims = tuple({0: batch, **{dim + 1: Dim.DYNAMIC for dim in sorted(free)}} for free in varying)
    try:
        with _quiet(), guard(_NotExportable, "torch.export failed"):
            program = torch.export.export(flat, example, dynamic_shapes=(dims,), strict=False)
    except _NotExportable as error:
        return None, _reason(error, flat, example, dims)
    program.example_inputs = None
    module = program.module()
    for inputs in batches:
        size = len(inputs[0])
        try:
            with _quiet(), guard(_NotExportable, f"the exported program fails for a batch of {size}"), torch.no_grad():
                found, expected = module(*inputs), flat(*inputs)
        except _NotExportable as error:
            return None, error.what
        if not all(map(_close, found, expected)):
            return None, f"the exported program answers a batch of {size} differently from the model"
    return program, ""


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    scale = float(expected.abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * scale)


def _reason(error: _NotExportable, flat: Flat, example: tuple[Tensor, ...], dims: Sequence[dict[int, Any]]) -> str:
    """Which operation torch.export cannot take, with the user's line of code."""
    cause = error.__cause__ or error
    first, *details = str(cause).splitlines()
    if not first.startswith("Constraints violated"):
        return error.what + _code(where(cause))
    # The first line only names the dimension; the next one says what became of it.
    found = SIZE.sub(r"dimension \2 of input \1", details[0].strip(" -") if details else first)
    if specialized := SPECIALIZED.match(found):
        found = f"{specialized[1]} became the constant {specialized[2]}"
    at = _specialization(flat, example, dims)
    return f"torch.export failed: {found}{f' ({at})' if at else ''}{_code(at)}"


def _specialization(flat: Flat, example: tuple[Tensor, ...], dims: Sequence[dict[int, Any]]) -> str:
    """``file:line`` where a dynamic dimension became a constant, by exporting once more.

    torch's error does not say where; with ``print_specializations`` it logs "Specializing ..." while that line runs.
    """
    recorder = _Recorder()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, handlers = logger.level, logger.handlers
    logger.handlers = [recorder]
    logger.setLevel(logging.WARNING)
    try:
        with _quiet(), guard(_NotExportable, "torch.export failed"), SHAPES.patch(print_specializations=True):
            torch.export.export(flat, example, dynamic_shapes=(tuple(dims),), strict=False)
    except _NotExportable:
        pass
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
    return recorder.places[0] if recorder.places else ""


class _Recorder(logging.Handler):
    """Notes which line of the user's runs at each specialization."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by torch while the line runs."""
        if record.getMessage().startswith("Specializing"):
            stack = list(traceback.extract_stack())
            # What is outside of the export is not the model's code.
            start = max(i for i, frame in enumerate(stack) if frame.name == "call_model")
            self.places.append(place(stack[start + 1 :]))


def _code(at: str) -> str:
    file, _, line = at.rpartition(":")
    text = linecache.getline(file, int(line)).strip() if file else ""
    return f": {text}" if text else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing graphs, warnings and logs: what matters becomes a message."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
