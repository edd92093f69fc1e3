"""Calls whose inputs or outputs leave the ranges that the search saw are counted, and warned of once."""

import warnings

import numpy as np
import pytest

from corewise.artifact import watch
from corewise.artifact.model import Model
from corewise.artifact.watch import FEWEST_ROWS, RangeWatch, seen_range
from corewise.common.nested import flatten
from corewise.records.build import TensorSpec
from corewise.records.jsonable import from_json, to_json
from corewise.records.ranges import SeenRanges
from corewise.records.report import Preprocess
from corewise.samples.images import normalize_pixels

PIXELS = TensorSpec(name="x", dtype="float32", shape=(None, 3, 4, 4))
SCORES = TensorSpec(name="y", dtype="float32", shape=(None, 5))
IDS = TensorSpec(name="ids", dtype="int64", shape=(None, 7))


@pytest.fixture(autouse=True)
def every_call(monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 0.0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def watching(samples=99):
    """A watch whose ranges come from normal samples."""
    seen = SeenRanges(
        inputs=(seen_range(PIXELS, [normal(samples, 3, 4, 4)]),), outputs=(seen_range(SCORES, [normal(samples, 5)]),)
    )
    return RangeWatch(from_json(SeenRanges, to_json(seen)))


def fed(watch, rows, *, scale=1.0, offset=0.0, calls=10):
    for call in range(calls):
        pixels, scores = normal(rows, 3, 4, 4, seed=call + 1), normal(rows, 5, seed=-call % 1000 + 99)
        watch.see([pixels], [scores * scale + offset])
    return watch.outside


def test_ranges_are_of_channels_over_all_batches():
    values = normal(10, 3, 4, 4)
    found = seen_range(PIXELS, [values[:6], values[6:]])
    assert found == seen_range(PIXELS, [values])
    assert found.samples == 10
    assert found.low == tuple(values.min(axis=(0, 2, 3)).tolist())
    tokens = normal(4, 6, 2)
    whole = seen_range(TensorSpec(name="t", dtype="float32", shape=(None, 6, 2)), [tokens])
    assert (whole.low, whole.high) == ((float(tokens.min()),), (float(tokens.max()),))


def test_pixels_have_the_extremes_of_their_normalized_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    preprocess = Preprocess(std=(0.2, -0.2, 0.2))
    found = watch._extremes(watch.pixel_extremes(pixels, preprocess))
    for ours, theirs in zip(found, watch._extremes(normalize_pixels(pixels, preprocess)), strict=True):
        assert np.array_equal(ours, theirs)


def test_integers_and_what_is_not_finite_have_no_range():
    assert seen_range(IDS, [np.zeros((2, 7), np.int64)]) is None
    assert seen_range(SCORES, [np.full((2, 5), np.inf, np.float32)]) is None
    assert seen_range(SCORES, []) is None


def test_samples_like_those_of_the_search_leave_its_ranges_as_often_as_expected():
    found = fed(watching(), 16, calls=200)
    assert found.expected_share == pytest.approx(1 / 100)
    assert 0.5 * found.expected_share < found.share < 2 * found.expected_share
    assert not found.many
    assert found.checks == 200 * 16 * 2 * (3 + 5)


def test_other_samples_leave_them_far_more_often():
    found = fed(watching(), 16, offset=4.0, calls=20)
    assert found.share > 0.2
    assert found.many


def test_a_few_rows_are_no_reason_to_warn():
    found = fed(watching(), 16, offset=4.0, calls=FEWEST_ROWS // 16)
    assert found.share > 0.2
    assert not found.many


def test_what_is_long_ago_is_forgotten():
    watch = watching()
    assert fed(watch, 16, offset=4.0, calls=20).many
    assert not fed(watch, 16, calls=400).many


def test_without_ranges_nothing_is_watched():
    assert fed(RangeWatch(None), 4) is None
    integers = SeenRanges(inputs=(None,), outputs=(None,))
    assert not RangeWatch(integers).watching


def test_only_one_call_in_a_while_is_looked_at(monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 3600.0)
    assert fed(watching(), 1, calls=5).checks == 2 * (3 + 5)


def test_rounding_is_inside():
    scores = np.ones((50, 5), np.float32)
    watch = RangeWatch(SeenRanges(inputs=(None,), outputs=(seen_range(SCORES, [scores]),)))
    watch.see([np.zeros((50, 7), np.int64)], [scores + np.float32(5e-6)])
    assert watch.outside.outside == 0


class Doubling:
    def run(self, inputs):
        return [2 * inputs[0]]

    def close(self):
        pass


def test_a_model_warns_once():
    values = normal(100, 5)
    seen = SeenRanges(inputs=(seen_range(SCORES, [values]),), outputs=(seen_range(SCORES, [2 * values]),))
    structures = {"input_structure": flatten(((values,), {}))[1], "output_structure": flatten(values)[1]}
    model = Model(Doubling(), inputs=[SCORES], seen_ranges=seen, **structures)
    assert model.outside is None

    def told(inputs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(40):
                model(inputs)
        return [str(one.message) for one in caught]

    assert told(values[:16]) == []
    (words,) = told(values[:16] + 5)
    assert "outside of the ranges that the search saw (1.0 % are expected)" in words
    assert model.outside.many
