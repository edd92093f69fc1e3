"""Packed sequences: exported as padded ones, with the answers that packing gives."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from corewise.samples import from_python
from corewise.source import Exported, export, load_module, save_program
from corewise.source.packed import packed_sequences_padded

HERE = Path(__file__)
WIDTH, HIDDEN = 3, 4
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "projected": partial(nn.LSTM, proj_size=2),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}


class Packing(nn.Module):
    """Everything that a recurrent layer gives for packed sequences."""

    def __init__(self, kind: str, layers: int = 1, *, sort: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = KINDS[kind](WIDTH, HIDDEN, layers, **options)
        self.sort = sort

    def forward(self, x: Tensor, lengths: Tensor, states: Any = None) -> tuple[Tensor, ...]:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x if first else x.transpose(0, 1), lengths, first, enforce_sorted=self.sort)
        outputs, after = self.layer(packed, states)
        steps, again = pad_packed_sequence(outputs, batch_first=first, padding_value=-1.0)
        after = after if isinstance(after, tuple) else (after,)
        return (steps if first else steps.transpose(0, 1), again, *(state.transpose(0, 1) for state in after))


class Classifier(nn.Module):
    """Token ids and their number, an embedding, two layers in both directions, the last states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, WIDTH)
        self.layers = nn.GRU(WIDTH, HIDDEN, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        last = self.layers(packed)[1][-2:]
        return self.head(last.transpose(0, 1).flatten(1))


class Tagger(nn.Module):
    """An answer for each step."""

    def __init__(self, *, to_the_end: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * HIDDEN, 2)
        self.to_the_end = to_the_end

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False)
        length = x.shape[1] if self.to_the_end else None
        return self.head(pad_packed_sequence(self.layers(packed)[0], batch_first=True, total_length=length)[0])


class Pooled(Tagger):
    """The mean over the steps of a row."""

    def __init__(self) -> None:
        super().__init__(to_the_end=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask).sum(1) / mask.sum(1, keepdim=True)


class ReadsData(Classifier):
    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(ids, lengths, batch_first=True, enforce_sorted=False)
        embedded = self.embedding(packed.data)  # what is in it
        packed = rnn.PackedSequence(embedded, *packed[1:])
        return self.head(self.layers(packed)[1][-2:].transpose(0, 1).flatten(1))


def sequences(lengths: tuple[int, ...] = (5, 3, 1), longest: int = 5) -> tuple[Tensor, Tensor]:
    """Rows with what no answer may depend on behind their ends."""
    torch.manual_seed(1)
    x = torch.randn(len(lengths), longest, WIDTH)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = torch.nan
    return x, torch.tensor(lengths)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_padded_layers_answer_as_packed_ones(kind: str, bidirectional: bool, layers: int) -> None:
    model = Packing(kind, layers, bidirectional=bidirectional, bias=layers > 1)
    for lengths in ((5, 3, 1), (2, 4, 4)):
        inputs = sequences(lengths)
        with torch.no_grad():
            expected = model(*inputs)
            with packed_sequences_padded():
                answers = model(*inputs)
        torch.testing.assert_close(answers, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("first", [False, True])
def test_states_and_options_are_those_of_the_call(kind: str, first: bool) -> None:
    model = Packing(kind, 2, sort=True, bidirectional=True, batch_first=first)
    one = torch.randn(4, 3, HIDDEN)
    states = (one, one.tanh()) if kind == "lstm" else one
    with torch.no_grad():
        expected = model(*sequences(), states)
        with packed_sequences_padded():
            answers = model(*sequences(), states)
    torch.testing.assert_close(answers, expected, atol=1e-6, rtol=1e-5)


def test_ids_are_packed_and_lengths_may_be_a_list() -> None:
    ids = torch.arange(10).reshape(2, 5)

    def through(total: int) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(ids, [4, 2], batch_first=True)
        return pad_packed_sequence(packed, padding_value=7, total_length=total)

    expected = through(6)
    with packed_sequences_padded():
        answers = through(6)
    assert expected[0].dtype == torch.int64
    torch.testing.assert_close(answers, expected, atol=0, rtol=0)


def test_packing_is_torchs_own_again_afterwards() -> None:
    functions = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward, pack_padded_sequence.__code__)
    with pytest.raises(KeyError), packed_sequences_padded():
        raise KeyError
    assert functions == (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward, pack_padded_sequence.__code__)


# Exported


def with_lengths() -> list[dict[str, Any]]:
    return [{"ids": np.arange(n) % 9, "lengths": np.array(n)} for n in (3, 6, 1, 6, 6)]


def masked(lengths: tuple[int, ...] = (3, 6, 2, 6, 6), longest: int | None = None) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "x": random.normal(size=(longest or n, WIDTH)).astype(np.float32),
            "mask": (np.arange(longest or n) < n).astype(np.int64),
        }
        for n in lengths
    ]


def of_any_batch(model: nn.Module, samples: list[dict[str, Any]]) -> Exported:
    result = export(model, from_python(samples))
    assert result.program is not None, result.why_not
    assert result.fixed_batch is None, result.why_fixed
    return result


def test_a_classifier_that_packs_is_exported_for_any_batch_and_length(tmp_path: Path) -> None:
    model = Classifier()
    result = of_any_batch(model, with_lengths())
    assert result.program is not None
    targets = [str(node.target) for node in result.program.graph.nodes]
    assert targets.count("aten.gru.input") == 4  # two layers in two directions
    save_program(result.program, tmp_path / "program.pt2")
    ids, lengths = torch.randint(9, (5, 11)), torch.tensor([4, 11, 1, 7, 2])
    answers = load_module(tmp_path / "program.pt2")(ids, lengths)
    torch.testing.assert_close(answers, (model(ids, lengths),))


def test_cell_states_that_nobody_reads_are_not_computed() -> None:
    program = of_any_batch(Tagger(to_the_end=True), masked()).program
    assert program is not None
    assert [str(node.target) for node in program.graph.nodes].count("aten.lstm.input") == 2


@pytest.mark.parametrize("make", [partial(Tagger, to_the_end=True), partial(Tagger, to_the_end=False), Pooled])
def test_steps_are_exported_with_the_length_that_they_have(make: Callable[[], nn.Module]) -> None:
    model = make()
    result = of_any_batch(model, masked())
    assert result.program is not None
    x, lengths = sequences((2, 4, 3), longest=7)
    mask = (torch.arange(7) < lengths[:, None]).long()
    x = x.nan_to_num()
    torch.testing.assert_close(result.program.module()(x, mask)[0], model(x, mask))


def test_samples_of_one_shape_may_have_different_lengths() -> None:
    model = Tagger(to_the_end=True)
    result = of_any_batch(model, masked((3, 6, 2), longest=8))
    assert result.program is not None
    assert result.outputs[0].shape == (None, 8, 2)
    x, mask = (torch.from_numpy(np.stack([row[key] for row in masked((1, 5), longest=8)])) for key in ("x", "mask"))
    torch.testing.assert_close(result.program.module()(x, mask)[0], model(x, mask))


def test_a_model_that_reads_a_packed_sequence_stays_eager_and_says_where() -> None:
    result = export(ReadsData(), from_python(with_lengths()))
    assert result.program is None
    line = 1 + next(n for n, text in enumerate(HERE.read_text().splitlines()) if text.endswith("# what is in it"))
    assert "the model reads what is in a packed sequence" in result.why_not
    assert f"{HERE}:{line}" in result.why_not
