"""source: models whose texts share rows, each kind of pooling, and architectures that cannot keep texts apart."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from corewise.engines.torch_tools import to_bf16
from corewise.samples import from_python
from corewise.source import Flat, export, packed_form
from corewise.source.pooling import Leading, Normalized, TextVectors, Way

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
LENGTHS = (5, 3, 7)
TEXTS = 6


def model_of(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**SIZES, **config}))
    # Weights of 0.02 hardly let tokens or positions change anything.
    for weights in made.parameters():
        nn.init.normal_(weights, std=0.4)
    evaluated: nn.Module = made.eval()
    return evaluated


def row(lengths: tuple[int, ...] = LENGTHS, tokens: int = 18) -> tuple[NDArray[np.int64], ...]:
    random = np.random.default_rng(0)
    ids, positions, segments = (np.zeros(tokens, np.int64) for _ in range(3))
    start = 0
    for number, length in enumerate(lengths, 1):
        part = slice(start, start + length)
        ids[part], positions[part], segments[part] = random.integers(5, 40, length), np.arange(length), number
        start += length
    return ids, positions, segments


@pytest.mark.parametrize("poolings", [("mean",), ("cls",), ("last",), ("weighted",), ("sqrt",), ("mean", "cls")])
def test_vectors_of_packed_texts_are_those_of_texts_alone(poolings: tuple[Way, ...]) -> None:
    model = TextVectors(model_of("Bert"), poolings).eval()
    assert packed_form(model, TEXTS, row()) is not None


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Bert", {}),
        ("Roberta", {"pad_token_id": 1}),
        ("XLMRoberta", {"pad_token_id": 1}),
        ("MPNet", {"pad_token_id": 1}),
        ("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}),
        ("Electra", {"embedding_size": 16}),
        ("Albert", {"embedding_size": 16}),
    ],
)
def test_encoders_that_keep_packed_texts_apart(kind: str, config: dict[str, Any]) -> None:
    model = TextVectors(model_of(kind, **config), ("mean",), [Normalized()]).eval()
    assert packed_form(model, TEXTS, row()) is not None


@pytest.mark.parametrize(
    ("kind", "config"),
    [("ConvBert", {"embedding_size": 16}), ("FNet", {}), ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2})],
)
def test_encoders_that_mix_packed_texts_are_found_out(kind: str, config: dict[str, Any]) -> None:
    model = TextVectors(model_of(kind, **config), ("mean",)).eval()
    assert packed_form(model, TEXTS, row()) is None


def test_what_is_not_packed() -> None:
    assert packed_form(TextVectors(model_of("Bert"), ("max",)), TEXTS, row()) is None
    assert packed_form(TextVectors(model_of("Bert"), ("none",)), TEXTS, row()) is None
    assert packed_form(nn.Linear(2, 2), TEXTS, row()) is None


def test_the_program_takes_any_number_of_rows() -> None:
    model = TextVectors(model_of("Bert"), ("mean",), [Leading(5), Normalized()]).eval()
    packed = packed_form(Flat(model, from_python([{"x": np.zeros(1)}] * 2).structure), TEXTS, row())
    assert packed is not None
    names = ("input_ids", "positions", "segments")
    rows = [row(), row((2, 2)), row((18,)), row((1,) * 6)]
    exported = export(packed, from_python([dict(zip(names, one, strict=True)) for one in rows]))
    assert exported.program is not None
    assert exported.fixed_batch is None
    assert [spec.shape for spec in exported.outputs] == [(None, TEXTS, 5)]
    given = [torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)]
    (found,) = exported.program.module()(*given)
    with torch.no_grad():
        torch.testing.assert_close(found, packed(*given), rtol=1e-4, atol=1e-5)
        (rounded,) = to_bf16(exported.program.module())(*given)
        torch.testing.assert_close(rounded, found, rtol=0.05, atol=0.02)
    assert bool((found[1, 2:] == 0).all())
