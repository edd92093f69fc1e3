"""Recurrent layers as one operation each, for sequences of any length.

torch.export takes ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` apart into one cell a step, which makes the length of the
example a constant. Told the shapes of their outputs, it leaves ``aten.lstm`` as it is, and runtimes have that operation
too (ONNX: LSTM, GRU and RNN). OpenVINO gets an ONNX file: from a program it takes them apart as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

DECOMPOSED = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
"""Where torch keeps the way to take these operations apart (``torch._decomp.decompositions``)."""

aten: Any = torch.ops.aten
LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@contextmanager
def recurrent_layers_kept() -> Iterator[None]:
    """While it lasts, ``torch.export`` and ``run_decompositions`` leave recurrent layers as they are."""
    with ExitStack() as undo:
        for operation in LAYERS:
            undo.enter_context(_described(operation, _lstm if operation is aten.lstm.input else _one_state))
        yield


def has_recurrent_layers(operators: Mapping[str, int]) -> bool:
    """Whether a program, described by its operators (``source.operators``), has such a layer."""
    return any(str(operation) in operators for operation in LAYERS)


def without_unused_layers(program: ExportedProgram) -> None:
    """Take recurrent layers whose results are not used out of a program: torch keeps them, as dropout may draw."""
    if any(node.target in LAYERS for node in program.graph.nodes):
        program.graph.eliminate_dead_code(lambda node: node.target not in LAYERS and node.is_impure())
        program.graph_module.recompile()


@contextmanager
def _described(operation: Any, shapes: Callable[..., Any]) -> Iterator[None]:
    kernels, taken_apart = dict(operation.py_kernels), decomposition_table[operation]
    operation.py_kernels.update(dict.fromkeys(DECOMPOSED, shapes))
    # ``run_decompositions`` asks the table for the shapes.
    decomposition_table[operation] = shapes
    operation._dispatch_cache.clear()
    try:
        yield
    finally:
        decomposition_table[operation] = taken_apart
        operation.py_kernels.clear()
        operation.py_kernels.update(kernels)
        operation._dispatch_cache.clear()


def _lstm(
    given: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The outputs' shapes of ``aten.lstm.input``."""
    # With proj_size the hidden state is narrower than the cell state, and so is the output.
    return _outputs(given, states[0], bidirectional), torch.empty_like(states[0]), torch.empty_like(states[1])


def _one_state(
    given: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The outputs' shapes of ``aten.gru.input``, ``aten.rnn_tanh.input`` and ``aten.rnn_relu.input``."""
    return _outputs(given, state, bidirectional), torch.empty_like(state)


def _outputs(given: Tensor, state: Tensor, bidirectional: bool) -> Tensor:
    return given.new_empty(*given.shape[:2], state.shape[-1] * (2 if bidirectional else 1))
