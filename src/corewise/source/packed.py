"""Packed sequences as padded ones, so that models which pack can be exported.

``pack_padded_sequence`` puts the steps of all rows behind each other, in an order that depends on the lengths, and no
runtime has a layer that runs over them. While ``packed_sequences_padded`` lasts, a packed sequence is the padded batch
and its lengths instead. The answers stay the same:

- In the forward direction a step depends on those before it, so what is behind a row's end changes nothing before it.
- For the backward direction each row is reversed within its length, and so are its outputs.
- Layers run one by one, because in each of them the backward direction begins at each row's own end.
- Final states are those at each row's last step, and ``pad_packed_sequence`` fills what is behind it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.utils import rnn

from corewise.source.recurrence import LAYERS

OPERATIONS = dict(zip(("LSTM", "GRU", "RNN_TANH", "RNN_RELU"), LAYERS, strict=True))
CLOSED = 1e4
"""Less than its negative is 0 for a sigmoid, and more than it is 1."""


class Padded(rnn.PackedSequence):
    """A padded batch and its lengths, in the place of a packed sequence."""

    steps: Tensor
    """(rows, longest, ...)."""
    lengths: Tensor
    """(rows,), int64."""

    def __new__(cls, steps: Tensor, lengths: Tensor) -> "Padded":
        """An empty tuple with attributes."""
        made = tuple.__new__(cls, ())
        made.steps, made.lengths = steps, lengths
        return made

    def behind(self, longest: Any) -> Tensor:
        """Which of the first ``longest`` steps are behind each row's end: (rows, longest)."""
        return torch.arange(longest) >= self.lengths[:, None]

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotImplementedError(
            "the model reads what is in a packed sequence, and only recurrent layers and pad_packed_sequence can"
        )

    data = batch_sizes = sorted_indices = unsorted_indices = property(_refuse)
    __iter__ = __getitem__ = _refuse


@contextmanager
def packed_sequences_padded() -> Iterator[None]:
    """While it lasts, ``pack_padded_sequence`` gives ``Padded``, which recurrent layers and its inverse take."""
    with ExitStack() as undo:
        undo.enter_context(_running(rnn.pack_padded_sequence, _pack))
        undo.enter_context(_running(rnn.pad_packed_sequence, _pad))
        for kind in (nn.LSTM, nn.GRU, nn.RNN):
            undo.callback(setattr, kind, "forward", kind.forward)
            setattr(kind, "forward", _forward(kind.forward))  # noqa: B010
        yield


@contextmanager
def _running(function: Any, other: Any) -> Iterator[None]:
    """While it lasts, ``function`` runs the code of ``other``, also where a model has imported it by its name."""
    code = function.__code__
    function.__code__ = other.__code__
    try:
        yield
    finally:
        function.__code__ = code


# The code of these two runs with the globals of torch.nn.utils.rnn, so they import what they need.


def _pack(input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Any:
    from corewise.source.packed import padded

    return padded(input, lengths, batch_first)


def _pad(sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: Any = None) -> Any:
    from corewise.source.packed import filled

    return filled(sequence, batch_first, padding_value, total_length)


def padded(given: Tensor, lengths: Tensor | Sequence[Any], batch_first: bool) -> Padded:
    """What stands for ``pack_padded_sequence``, whose rows may come in any order here."""
    if not isinstance(lengths, Tensor):
        lengths = torch.stack([torch.scalar_tensor(length, dtype=torch.int64) for length in lengths])
    return Padded(given if batch_first else given.transpose(0, 1), lengths.to(torch.int64))


def filled(packed: Any, batch_first: bool, value: float, total: Any) -> tuple[Tensor, Tensor]:
    """What stands for ``pad_packed_sequence``: without ``total``, steps end at the longest row's end."""
    if not isinstance(packed, Padded):
        raise NotImplementedError("the model puts a packed sequence together by itself")
    steps = packed.steps
    longest: Any = packed.lengths.max().item() if total is None else total
    if total is None:
        check: Any = torch._check
        check(longest >= 1)
        check(longest <= steps.shape[1])
    if not statically_known_true(longest == steps.shape[1]):
        steps = steps.index_select(1, torch.arange(longest).clamp(max=steps.shape[1] - 1))
    behind = packed.behind(longest)[(..., *[None] * (steps.dim() - 2))]
    steps = steps.masked_fill(behind, value)
    return steps if batch_first else steps.transpose(0, 1), packed.lengths


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a kind of layers, for ``Padded`` too; ``own`` is torch's."""

    def forward(layer: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        return _run(layer, input, hx) if isinstance(input, Padded) else own(layer, input, hx)

    return forward


def _run(module: nn.RNNBase, packed: Padded, given: Any) -> tuple[Padded, Any]:
    """What the module returns for a packed sequence, with initial states ``given`` or zeros."""
    is_lstm = module.mode == "LSTM"
    steps, ends = packed.steps, _Ends(packed)
    directions = 2 if module.bidirectional else 1
    states = _initial(module, steps, directions) if given is None else given if is_lstm else (given,)
    finals = []
    for layer in range(module.num_layers):
        outputs = []
        for number in range(directions * layer, directions * (layer + 1)):
            is_backward = number > directions * layer
            one = _Direction(module, number, [state[number : number + 1] for state in states])
            came = ends.reversed(steps) if is_backward else steps
            output = one.run(came)
            final = [ends.last(output)]
            if is_lstm:
                final.append(one.cell(came, ends.behind))
            finals.append(final)
            outputs.append(ends.reversed(output) if is_backward else output)
        steps = torch.cat(outputs, -1)
    after = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return Padded(steps, packed.lengths), after if is_lstm else after[0]


def _initial(module: nn.RNNBase, steps: Tensor, directions: int) -> list[Tensor]:
    """States of zeros, (layers and directions, rows, width) each."""
    widths = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if module.mode == "LSTM" else 1]
    return [steps.new_zeros(directions * module.num_layers, steps.shape[0], width) for width in widths]


class _Ends:
    """Where the rows of a padded batch end."""

    def __init__(self, packed: Padded) -> None:
        rows, longest = packed.steps.shape[:2]
        self.behind = packed.behind(longest)
        places = torch.arange(longest)
        # Counted, so that each place is in its own row, whatever a caller gives as lengths.
        self._last = (longest - 1 - self.behind.sum(1, keepdim=True)).clamp(min=0)
        self._reversed = torch.where(self.behind, places, self._last - places)
        self._first = torch.arange(rows)[:, None] * longest

    def reversed(self, steps: Tensor) -> Tensor:
        """Each row in reverse, and behind its end as it was."""
        return self._taken(steps, self._reversed)

    def last(self, steps: Tensor) -> Tensor:
        """Each row's last step: (1, rows, width)."""
        return self._taken(steps, self._last).transpose(0, 1)

    def _taken(self, steps: Tensor, places: Tensor) -> Tensor:
        taken = steps.flatten(0, 1).index_select(0, (self._first + places).flatten())
        return taken.reshape(*places.shape, steps.shape[-1])


class _Direction:
    """One direction of one layer, with its initial states."""

    def __init__(self, module: nn.RNNBase, number: int, states: Sequence[Tensor]) -> None:
        self._operation = OPERATIONS[module.mode]
        self._weights: list[Tensor] = [getattr(module, name) for name in module._all_weights[number]]
        self._states = states
        self._biased = module.bias
        self._width = module.hidden_size

    def run(self, steps: Tensor) -> Tensor:
        """The outputs of all steps."""
        output: Tensor = self._call(steps, self._weights)[0]
        return output

    def cell(self, steps: Tensor, behind: Tensor) -> Tensor:
        """The cell state at each row's last step, which no output has.

        It comes from a second run with one more input. Behind a row's end that is 1, which closes the input gate and
        opens the forget gate, so that the state stays what it is.
        """
        weight = self._weights[0]
        columns = ((-CLOSED, 1), (CLOSED, 1), (0.0, 2))  # input gate, forget gate, and two that do not matter
        gates = torch.cat([weight.new_full((count * self._width, 1), value) for value, count in columns])
        behind = behind[..., None]
        steps = torch.cat([steps.masked_fill(behind, 0.0), behind.to(steps.dtype)], -1)
        state: Tensor = self._call(steps, [torch.cat([weight, gates], 1), *self._weights[1:]])[2]
        return state

    def _call(self, steps: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        states = self._states if len(self._states) > 1 else self._states[0]
        result: tuple[Tensor, ...] = self._operation(steps, states, weights, self._biased, 1, 0.0, False, False, True)
        return result
