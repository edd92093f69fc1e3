"""``nn.RNN`` in ONNX: ``torch.onnx`` writes LSTM and GRU as one operation each, but takes this one apart into steps.

https://onnx.ai/onnx/operators/onnx__RNN.html
"""

from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import FLOAT
from onnxscript.onnx_opset import opset18 as op


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The function that writes each of these operations, as ``torch.onnx.export`` takes them."""
    from torch import ops

    return {ops.aten.rnn_tanh.input: _written_with("Tanh"), ops.aten.rnn_relu.input: _written_with("Relu")}


def _written_with(activation: str) -> Callable[..., Any]:
    """What writes such layers, with the arguments of ``aten.rnn_tanh.input``."""

    def rnn(
        given: FLOAT,
        states: FLOAT,
        weights: Sequence[FLOAT],
        has_biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[FLOAT, FLOAT]:
        directions = 2 if bidirectional else 1
        each = 4 if has_biases else 2
        steps = op.Transpose(given, perm=[1, 0, 2]) if batch_first else given
        finals = []
        for first in range(0, layers * directions, directions):
            parts = [weights[each * number : each * (number + 1)] for number in range(first, first + directions)]
            outputs, final = op.RNN(
                steps,
                _stacked([part[0] for part in parts]),
                _stacked([part[1] for part in parts]),
                *([_stacked([op.Concat(part[2], part[3], axis=0) for part in parts])] if has_biases else []),
                initial_h=op.Slice(states, [first], [first + directions], axes=[0]),
                activations=[activation] * directions,
                direction="bidirectional" if bidirectional else "forward",
                hidden_size=states.shape[2],
            )
            # (steps, directions, rows, width) -> (steps, rows, directions * width)
            steps = op.Reshape(op.Transpose(outputs, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
            finals.append(final)
        steps = op.Transpose(steps, perm=[1, 0, 2]) if batch_first else steps
        return steps, op.Concat(*finals, axis=0) if len(finals) > 1 else finals[0]

    return rnn


def _stacked(arrays: Sequence[Any]) -> Any:
    """Arrays of one shape along a new first dimension."""
    rows = [op.Unsqueeze(array, [0]) for array in arrays]
    return op.Concat(*rows, axis=0) if len(rows) > 1 else rows[0]
