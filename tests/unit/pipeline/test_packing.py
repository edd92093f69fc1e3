"""pipeline: several texts in one row, and when that is done."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from corewise.common.errors import InputError
from corewise.pipeline import CallLimits, TextEncoder, TextRunner, fill
from corewise.pipeline.packing import PackedCall, pack, packed_arrays, unpacked, with_packing
from corewise.records.pipeline import Packing, TextPipeline, TokenInput

SMALL = Packing(rows=2, tokens=16, texts=4, ms=1.0)
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number for number in range(2, 40)}}


def many_ms(rows: NDArray[np.int64], tokens: int) -> NDArray[np.float64]:
    """Calls of which each row takes a millisecond."""
    return np.asarray(rows, np.float64)


def as_usual(lengths: Sequence[int]) -> Any:
    return fill(lengths, limits=CallLimits(rows=8), multiple=4)


@given(
    lengths=st.lists(st.integers(1, 16), max_size=60),
    rows=st.integers(1, 5),
    texts=st.integers(1, 6),
)
def test_each_text_is_in_one_row_that_has_room(lengths: list[int], rows: int, texts: int) -> None:
    calls = pack(lengths, Packing(rows=rows, tokens=16, texts=texts, ms=1.0))
    assert sorted(place for call in calls for place in call.places) == list(range(len(lengths)))
    for call in calls:
        assert 1 <= len(call.rows) <= rows
        assert all(1 <= len(row) <= texts and sum(lengths[place] for place in row) <= 16 for row in call.rows)
    assert all(len(call.rows) == rows for call in calls[:-1])


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    calls = pack(lengths, Packing(rows=3, tokens=16, texts=16, ms=1.0))
    filled = sorted(sum(lengths[place] for place in row) for call in calls for row in call.rows)
    assert len(filled) == 1 or filled[0] + filled[1] > 16


def test_positions_begin_again_and_padding_is_of_no_text() -> None:
    ids = [[np.array([7, 8, 9]), np.array([5])]]
    tokens, positions, segments = packed_arrays(ids, Packing(rows=2, tokens=6, texts=3, ms=1.0), pad_id=1)
    np.testing.assert_array_equal(tokens, [[7, 8, 9, 5, 1, 1], [1] * 6])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(segments, [[1, 1, 1, 2, 0, 0], [0] * 6])
    assert {array.dtype for array in (tokens, positions, segments)} == {np.dtype(np.int64)}


def test_each_text_gets_its_own_vector_back() -> None:
    output = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(unpacked(PackedCall(((5, 0), (2,))), output), output[[0, 0, 1], [0, 1, 0]])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), ms=st.floats(0.001, 100.0))
def test_texts_are_packed_only_where_that_takes_less_time(lengths: list[int], ms: float) -> None:
    packing = Packing(rows=2, tokens=16, texts=4, ms=ms)
    calls = with_packing(lengths, as_usual, many_ms, packing, 2, lambda saved_ms: True)
    assert sorted(place for call in calls for place in call.places) == list(range(len(lengths)))
    packed = [call for call in calls if isinstance(call, PackedCall)]
    assert all(lengths[place] <= 16 for call in packed for place in call.places)
    if packed:
        turns = -(-len(packed) // 2) * 2
        others = sum(len(call.places) for call in calls if not isinstance(call, PackedCall))
        assert turns * ms + others < len(lengths)
    else:
        assert calls == as_usual(lengths)


def test_a_long_text_keeps_no_short_ones_from_being_packed() -> None:
    calls = with_packing([4] * 12 + [30], as_usual, many_ms, SMALL, 1, lambda saved_ms: True)
    assert [type(call).__name__ for call in calls] == ["Call", "PackedCall", "PackedCall"]
    assert calls[0].places == (12,)


def encoder() -> TextEncoder:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    inputs = tuple(TokenInput(name=name, dtype="int64", role=role) for name, role in (("ids", "ids"), ("mask", "mask")))
    pipeline = TextPipeline(task="vectors", tokenizer_sha256="", inputs=inputs, max_length=64, pooling="mean")
    return TextEncoder(pipeline, made.to_str().encode())


class Sums:
    """Programs whose vector of a text is the sum of its ids times their positions, and its length."""

    packing = SMALL

    def __init__(self) -> None:
        self.packed_calls = 0
        self.closed = False
        self._lock = threading.Lock()

    def usual(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        ids, mask = inputs
        places = np.arange(1, ids.shape[1] + 1)
        return [np.stack([(ids * mask * places).sum(1), mask.sum(1)], 1).astype(np.float32)]

    def pays(self, saved_ms: float) -> bool:
        return saved_ms > 0

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        with self._lock:
            self.packed_calls += 1
        ids, positions, segments = inputs
        assert ids.shape == (SMALL.rows, SMALL.tokens)
        own = [(segments == number) for number in range(1, SMALL.texts + 1)]
        vectors = [np.stack([(ids * mask * (positions + 1)).sum(1), mask.sum(1)], 1) for mask in own]
        return [np.stack(vectors, 1).astype(np.float32)]

    def close(self) -> None:
        self.closed = True


def texts(count: int, most: int = 9) -> list[str]:
    random = np.random.default_rng(count)
    return [" ".join(f"w{number}" for number in random.integers(2, 40, random.integers(1, most))) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 3, 40, 3000])
def test_answers_are_those_of_each_text_alone_in_order(count: int) -> None:
    sums = Sums()
    options: dict[str, Any] = {"instances": 2, "limits": CallLimits(rows=8), "cost": many_ms}
    usual = TextRunner(encoder(), sums.usual, **options)
    packing = TextRunner(encoder(), sums.usual, packed=sums, **options)
    asked = texts(count)
    asked[count // 2] = "w3 " * 40  # which fits no row
    np.testing.assert_array_equal(packing.predict(asked), usual.predict(asked))
    assert (sums.packed_calls > 0) == (count > 3)
    packing.close()
    assert sums.closed


def test_nothing_is_packed_until_that_pays() -> None:
    saved: list[float] = []
    calls = with_packing([4] * 12 + [30], as_usual, many_ms, SMALL, 1, lambda ms: bool(saved.append(ms)))
    assert calls == as_usual([4] * 12 + [30])
    assert saved == [10.0]  # 12 rows of a millisecond became two calls


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"tokens": 0}, {"texts": 0}, {"ms": 0.0}, {"opening_ms": -1.0}])
def test_packing_without_rows_or_time_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        replace(SMALL, **wrong)


def test_a_text_that_cannot_be_answered_is_set_aside_among_packed_ones() -> None:
    sums = Sums()
    runner = TextRunner(encoder(), sums.usual, packed=sums, instances=1, limits=CallLimits(rows=8), cost=many_ms)
    asked: list[Any] = [*texts(30), None, *texts(20)]
    answers = list(runner.answers(asked))
    assert [type(answer).__name__ for answer in answers].index("Rejected") == 30
    assert sums.packed_calls
    with pytest.raises(InputError, match="text 30 "):
        runner.predict(asked)
