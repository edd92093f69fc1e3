"""torch.export of a flat model, and the reason in one line where it fails."""

import contextlib
import io
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.jit import ScriptModule

from corewise.common.errors import CorewiseError
from corewise.common.references import guard, place, where
from corewise.source.behaviour import random_operation
from corewise.source.examples import Batch
from corewise.source.exported import Flat
from corewise.source.packed import packed_sequences_padded
from corewise.source.recurrence import recurrent_layers_kept, without_unused_layers

SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
SPECIALIZED = re.compile(r"You marked (.+) as dynamic but your code specialized it to be a constant \((\d+)\)")
SHAPES: Any = torch.fx.experimental._config
OWN = ("aten", "prim", "prims", "rngprims", "profiler", "quantized", "mkldnn", "export")
"""Namespaces of the operators that PyTorch has wherever it is imported."""


class _NotExportable(CorewiseError):
    """Why there is no program."""


def trace(
    flat: Flat, example: Batch, varying: Sequence[set[int]], checks: Sequence[Batch], *, dynamic_batch: bool
) -> tuple[ExportedProgram | None, str]:
    """The exported program, which answers ``checks`` as the model does, or why there is none.

    The batch is one ``Dim`` over all inputs, or the example's for good. Other dynamic dimensions are ``Dim.DYNAMIC``:
    torch derives which of them are equal and how large they may be (a model's longest sequence), which a ``Dim`` would
    have to know.
    """
    batch: dict[int, Any] = {0: Dim("batch", min=1)} if dynamic_batch else {}
    dims = tuple(batch | {dim + 1: Dim.DYNAMIC for dim in sorted(free)} for free in varying)
    try:
        program = _export(flat, example, dims)
    except _NotExportable as error:
        return None, _reason(error, flat, example, dims)
    if foreign := _foreign_operator(program):
        return None, f"the operator {foreign} is not PyTorch's own, and engines run in processes that do not have it"
    module = program.module()
    for inputs in checks:
        what = f"the exported program fails for a batch of {len(inputs)}"
        try:
            with _quiet(), guard(_NotExportable, what), torch.no_grad():
                answers, expected = module(*inputs.tensors), flat(*inputs.tensors)
        except _NotExportable as error:
            return None, error.what
        if not all(map(_close, answers, expected)):
            return (
                None,
                f"the exported program answers a batch of {len(inputs)} differently from the model{_drawn(program)}",
            )
    return program, ""


def _foreign_operator(program: ExportedProgram) -> str:
    """The first operator that a library or the user has registered; empty if there is none."""
    parts = (part for part in program.graph_module.modules() if isinstance(part, GraphModule))
    targets = (node.target for part in parts for node in part.graph.nodes)
    return next((str(one) for one in targets if isinstance(one, OpOverload) and one.namespace not in OWN), "")


def _drawn(program: ExportedProgram) -> str:
    """What to say of a program that draws random numbers, from which it may differ."""
    drawn = random_operation(program)
    if drawn is None:
        return ""
    return f": it draws random numbers, {drawn.operation}{f' ({drawn.where})' if drawn.where else ''}"


def _export(flat: Flat, example: Batch, dims: Sequence[dict[int, Any]]) -> ExportedProgram:
    failed = guard(_NotExportable, "torch.export failed")
    with _quiet(), failed, recurrent_layers_kept(), packed_sequences_padded():
        program = torch.export.export(flat, example.tensors, dynamic_shapes=(tuple(dims),), strict=False)
        without_unused_layers(program)
    program.example_inputs = None
    return program


def _close(answer: Tensor, expected: Tensor) -> bool:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(answer, expected)
    scale = float(expected.abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(answer, expected, rtol=1e-3, atol=1e-4 * scale)


def _reason(error: _NotExportable, flat: Flat, example: Batch, dims: Sequence[dict[int, Any]]) -> str:
    """Which operation torch.export cannot take, with the user's line of code."""
    scripted = next((name for name, part in flat.model.named_modules() if isinstance(part, ScriptModule)), None)
    if scripted is not None:
        which = f"its {scripted}" if scripted else "it"
        return f"torch.export does not take TorchScript, and {which} is; give the module that it was made from"
    cause = error.__cause__ or error
    first, *details = str(cause).splitlines() or [""]  # an error need not say anything
    if not first.startswith("Constraints violated"):
        return error.what + _code(where(cause))
    # The first line only names the dimension; the next one says what became of it.
    detail = SIZE.sub(r"dimension \2 of input \1", details[0].strip(" -") if details else first)
    if specialized := SPECIALIZED.match(detail):
        detail = f"{specialized[1]} became the constant {specialized[2]}"
    at = _specialization(flat, example, dims)
    return f"torch.export failed: {detail}{f' ({at})' if at else ''}{_code(at)}"


def _specialization(flat: Flat, example: Batch, dims: Sequence[dict[int, Any]]) -> str:
    """``file:line`` where a dynamic dimension became a constant, by exporting once more.

    torch's error does not say where; with ``print_specializations`` it logs "Specializing ..." while that line runs.
    """
    recorder = _Recorder()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, handlers = logger.level, logger.handlers
    logger.handlers = [recorder]
    logger.setLevel(logging.WARNING)
    try:
        with SHAPES.patch(print_specializations=True):
            _export(flat, example, dims)
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
