"""Requests of short texts in one call: who joins, how texts are packed, and that each request gets its own vectors."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from corewise.pipeline import CostTable, TextEncoder
from corewise.records.build import Plan
from corewise.records.pipeline import Packing, TextPipeline, TokenInput
from corewise.serving.short_texts import SHORT, ShortTexts

PLAN = Plan(threads_per_instance=1, instances=2, batch=16)
PIPELINE = TextPipeline(
    task="vectors",
    tokenizer="tokenizer.json",
    tokenizer_sha256="",
    inputs=(
        TokenInput(name="input_ids", dtype="int64", role="ids"),
        TokenInput(name="attention_mask", dtype="int64", role="mask"),
    ),
    pad_id=9,
    max_length=128,
)


def cost_of_rows(ms: float) -> CostTable:
    """Calls that cost so much for each row, however long."""
    return CostTable(rows=(1, 16), tokens=(8, 64), ms=((ms, ms), (16 * ms, 16 * ms)))


class Model:
    """Its vectors are the sum of a text's ids, and their number; it notes the shapes of its calls."""

    def __init__(self) -> None:
        self.usual: list[tuple[int, ...]] = []
        self.packed: list[tuple[int, tuple[int, ...]]] = []

    def run(self, inputs: Any) -> list[Any]:
        ids, mask = inputs
        assert (ids[mask == 0] == PIPELINE.pad_id).all()
        self.usual.append(ids.shape)
        return [np.stack([(ids * mask).sum(1), mask.sum(1)], axis=1)]

    def run_packed(self, instance: int, inputs: Any) -> list[Any]:
        ids, positions, segments = inputs
        self.packed.append((instance, ids.shape))
        vectors = np.zeros((len(ids), 16, 2), np.int64)
        for row, (tokens, numbers) in enumerate(zip(ids, segments, strict=True)):
            for number in range(1, numbers.max() + 1):
                part = tokens[numbers == number]
                assert positions[row, numbers == number].tolist() == list(range(len(part)))
                vectors[row, number - 1] = part.sum(), len(part)
        return [vectors]


def joining(model: Model, ms: float = 5.0, **changes: Any) -> ShortTexts:
    manifest: Any = SimpleNamespace(plan=PLAN, call_costs=cost_of_rows(ms))
    packing = Packing(rows=8, tokens=64, texts=16, ms=16.0)
    pipeline = replace(PIPELINE, **changes)
    encoder: Any = SimpleNamespace(pipeline=pipeline)  # a TextEncoder would need a tokenizer
    return ShortTexts(pipeline, packing, manifest, PLAN, partial(TextEncoder.collate, encoder), model.run_packed)


def request(*lengths: int, tokens: int | None = None, start: int = 0) -> list[Any]:
    """Texts of so many tokens, the k-th of ids ``start + k + 1``, padded to a multiple of 8."""
    size = tokens or -(-max(lengths) // 8) * 8
    ids, mask = np.full((len(lengths), size), PIPELINE.pad_id), np.zeros((len(lengths), size), np.int64)
    for k, length in enumerate(lengths):
        ids[k, :length], mask[k, :length] = start + k + 1, 1
    return [ids, mask]


def expected(*lengths: int, start: int = 0) -> list[list[int]]:
    return [[(start + k + 1) * length, length] for k, length in enumerate(lengths)]


def test_texts_of_any_length_share_packed_rows_and_each_request_gets_its_own_vectors() -> None:
    model = Model()
    lengths = [(5,), (20,), (3, 12), (64,), (9,), (1,)]
    found = joining(model).answer(model.run, 1, [request(*each, start=10 * k) for k, each in enumerate(lengths)])
    assert [one.tolist() for (one,) in found] == [expected(*each, start=10 * k) for k, each in enumerate(lengths)]
    assert model.packed == [(1, (2, 64))]
    assert not model.usual


def test_texts_that_are_cheaper_unpacked_are_padded_together() -> None:
    model = Model()
    found = joining(model, ms=0.1).answer(model.run, 0, [request(5), request(20), request(9)])
    assert [one.tolist() for (one,) in found] == [expected(5), expected(20), expected(9)]
    assert not model.packed
    assert sum(rows for rows, _ in model.usual) == 3


def test_a_request_that_is_alone_runs_as_it_came() -> None:
    model = Model()
    ((found,),) = joining(model).answer(model.run, 0, [request(5, tokens=16)])
    assert found.tolist() == expected(5)
    assert model.usual == [(1, 16)]


@pytest.mark.parametrize("rows", [1, 4])
def test_short_texts_are_one_group(rows: int) -> None:
    assert joining(Model()).group(request(*[7] * rows)) == joining(Model()).group(request(60)) == SHORT


def test_what_cannot_be_packed_shares_calls_with_its_shape() -> None:
    joins = joining(Model())
    holes, padded_left, nothing, long, many = request(8), request(8), request(8), request(65), request(*[5] * 5)
    holes[1][0, 3] = 0
    padded_left[1][0, :3] = 0
    nothing[1][:] = 0
    for each in (holes, padded_left, nothing, long, many):
        assert joins.group(each) != SHORT
    assert joins.group(holes) == joins.group(nothing)
    assert joins.group(long) != joins.group(holes)


@pytest.mark.parametrize("value", [2, -1])
@pytest.mark.parametrize("place", [0, 3, 9])
def test_a_mask_of_other_numbers_than_0_and_1_is_not_taken_for_one_of_these(value: int, place: int) -> None:
    joins = joining(Model())
    weighted = request(8, tokens=16)
    weighted[1][0, place] = value
    assert joins.group(weighted) != SHORT
    weighted = request(8, tokens=16)
    weighted[1] = weighted[1].astype(np.float32)
    assert joins.group(weighted) == SHORT
    weighted[1][0, place] = np.nan
    assert joins.group(weighted) != SHORT


@pytest.mark.parametrize("tokens", [(8, 16), (16, 8), (8, 1)])
def test_ids_and_a_mask_of_different_lengths_are_left_to_the_model(tokens: tuple[int, int]) -> None:
    ids, mask = (np.ones((1, size), np.int64) for size in tokens)
    assert joining(Model()).group([ids, mask]) != SHORT


def test_raw_tensors_of_more_tokens_than_texts_have_fail_no_call_of_others() -> None:
    model = Model()
    joins = joining(model, ms=0.1, max_length=32)
    assert joins.group(request(33, tokens=40)) != SHORT
    assert joins.group(request(32)) == joins.group(request(5)) == SHORT
    found = joins.answer(model.run, 0, [request(32), request(5)])
    assert [one.tolist() for (one,) in found] == [expected(32), expected(5)]
