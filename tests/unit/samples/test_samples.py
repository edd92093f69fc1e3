"""samples: from folders, files, functions and Python objects; split, stored and loaded."""

import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

from corewise.common import nested
from corewise.common.errors import OutputError, SamplesError
from corewise.records.report import Preprocess
from corewise.samples import (
    Samples,
    check_class_names,
    check_finite,
    default_calibration,
    from_python,
    read,
    read_class_names,
    split,
)
from corewise.samples import raw as raw_module

TINY = Preprocess(resize=8, crop=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def numbers(count: int, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def call(samples: Samples, index: int) -> Any:
    """The (args, kwargs) of one sample."""
    return nested.unflatten(samples.structure, samples.rows[index])


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SamplesError) as caught:
        function(*args, **kwargs)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From Python


def test_single_arrays_are_positional_inputs() -> None:
    samples = from_python([numbers(1)[0], torch.ones(3)])
    args, kwargs = call(samples, 1)
    assert len(samples) == 2
    assert kwargs == {}
    np.testing.assert_array_equal(args[0], np.ones(3, np.float32))
    assert samples.labels is None


def test_pairs_are_inputs_and_label() -> None:
    samples = from_python([(np.zeros(2), 3), [np.ones(2), torch.tensor(4)]])
    assert samples.labels is not None
    assert samples.labels.tolist() == [3, 4]
    assert samples.labels.dtype == np.int64
    assert call(samples, 1)[0][0].tolist() == [1, 1]


def test_tuples_are_several_inputs_and_dicts_are_keyword_inputs() -> None:
    several = from_python([((np.zeros(2), np.ones(1)), None)] * 2)
    assert [array.tolist() for array in call(several, 0)[0]] == [[0, 0], [1]]
    three = from_python([(np.zeros(2), np.ones(1), 7)] * 2)
    assert call(three, 0)[0][2] == 7
    keyword = from_python([({"ids": np.zeros(2, np.int64), "mask": None}, 0.5)] * 2)
    assert call(keyword, 0)[0] == ()
    assert list(call(keyword, 0)[1]) == ["ids", "mask"]
    assert keyword.labels is not None
    assert keyword.labels.dtype == np.float64


def test_float64_becomes_float32_and_integers_stay() -> None:
    samples = from_python([{"x": np.zeros(2), "ids": np.zeros(2, np.int64)}])
    assert [array.dtype.name for array in samples.rows[0]] == ["float32", "int64"]


class Numbers(Dataset[Any]):
    """As many datasets: length and items only, and no IndexError at the end."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index % 2


def test_datasets_loaders_generators_and_stacked_arrays_give_the_same_samples() -> None:
    rows = [(np.full(2, i, np.float32), i % 2) for i in range(5)]
    same = [
        rows,
        iter(rows),
        Numbers(),
        DataLoader(Numbers(), batch_size=2),
        DataLoader(Numbers(), batch_size=None),
        DataLoader(Numbers(), batch_sampler=[[0, 1, 2], [3, 4]]),
        DataLoader(TensorDataset(torch.arange(5.0)[:, None].expand(5, 2), torch.arange(5) % 2), batch_size=3),
        {"inputs": np.stack([row for row, _ in rows]), "labels": [label for _, label in rows]},
    ]
    assert len({from_python(form).fingerprint for form in same}) == 1


def test_batches_of_a_loader_may_be_nested() -> None:
    loader = DataLoader([{"ids": torch.tensor([i]), "mask": torch.ones(1)} for i in range(3)], batch_size=2)  # type: ignore[arg-type, var-annotated]
    samples = from_python(loader)
    assert call(samples, 2)[1]["ids"].tolist() == [2]
    stacked = from_python({"inputs": (np.zeros((4, 2)), np.ones((4, 1))), "groups": [7, 7, 9, 9]})
    assert len(call(stacked, 0)[0]) == 2
    assert stacked.groups is not None
    assert stacked.groups.tolist() == [0, 0, 1, 1]


def test_samples_pass_through_and_mappings_of_any_class_are_keyword_inputs() -> None:
    samples = from_python([OrderedDict(a=np.zeros(1))], groups=[0])
    assert from_python(samples) is samples
    assert list(call(samples, 0)[1]) == ["a"]


def broken() -> Iterator[np.ndarray]:
    yield np.zeros(2)
    raise KeyError("no more photos")


class Unreadable:
    def __iter__(self) -> Any:
        raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no samples in python"),
        (broken(), "sample 1 of python cannot be made: KeyError: 'no more photos' .*test_samples.py:"),
        (Unreadable(), "sample 0 of python cannot be made: OSError: disk on fire"),
        ("photos", "python gives str"),
        (None, "python gives NoneType"),
        ({"x": 3}, "the dict from python has the keys x; give inputs"),
        ({}, "the dict from python has the keys ; give inputs"),
        ({"x": np.zeros((2, 2)), "y": np.zeros((3, 2))}, "the columns of python have different lengths: x 2, y 3"),
        ({"input_ids": [101, 7, 102]}, "the column 'input_ids' of python has one number for each sample; give arrays"),
        ({"inputs": np.zeros((3, 2)), "labels": [1, 2]}, "python has 2 labels for 3 samples"),
        ({"inputs": np.zeros((3, 2)), "groups": [1, 2]}, "python has 2 groups for 3 samples"),
        ({"inputs": (np.zeros((3, 2)), np.zeros((2, 2)))}, "the stacked inputs of python have 2 and 3 rows"),
        ({"inputs": 3}, "the stacked inputs of python have no rows"),
        ([np.zeros(2), np.array([1, np.nan])], "sample 1 of python: input_0 has NaN or infinite values"),
        ([{"x": np.array([np.inf])}], "sample 0 of python: x has NaN or infinite values"),
        ([np.zeros((0, 3))], r"sample 0 of python: input_0 is empty: its shape is \(0, 3\)"),
        ([np.array([object()])], "sample 0 of python: input_0 has dtype object"),
        ([np.array(["word"])], "sample 0 of python: input_0 has dtype <U4"),
        ([np.zeros(2, np.complex64)], "sample 0 of python: input_0 has dtype complex64"),
        ([np.zeros(2, np.uint16)], "sample 0 of python: input_0 has dtype uint16; give one of"),
        ([torch.zeros(2, dtype=torch.bfloat16)], "sample 0 of python: input_0 is not a NumPy array: .*BFloat16"),
        ([3.0], "sample 0 of python: there is no array"),
        ([{1: np.zeros(2)}, {2: np.zeros(2)}], r"sample 1 of python: inputs\[2\] is not expected"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], r'sample 1 of python: inputs\["b"\] is not expected; give a'),
        ([np.zeros(2), np.zeros((2, 2))], r"sample 1 .* has shape \(2, 2\), but in the first sample it has \(2,\)"),
        (
            [np.zeros(2), np.zeros(2, np.int64)],
            "sample 1 of python: input_0 is int64, but in the first sample it is float",
        ),
        ([(np.zeros(2), 1), (np.zeros(2), None)], "sample 1 of python has no label"),
        (
            [(np.zeros(2), "cat"), (np.zeros(2), 3)],
            "the label of sample 1 of python is not a string, but the first one is",
        ),
        ([(np.zeros(2), 3), (np.zeros(2), "cat")], "the label of sample 1 of python has dtype <U3"),
        ([(np.zeros(2), float("nan"))], "the label of sample 0 of python is NaN"),
        ([(np.zeros(2), np.zeros(2)), (np.zeros(2), np.zeros((2, 2)))], "the label of sample 1 .* has shape"),
        ([(np.zeros(2), {"boxes": np.zeros(4)}), (np.zeros(2), 3)], "the label of sample 1 of python is not a dict"),
        (
            [(np.zeros(2), {"a": 1}), (np.zeros(2), {"b": 1})],
            "the label of sample 1 .* the keys b, but the first one has a",
        ),
        ([(np.zeros(2), {"a": "x"})], "'a' of the label of sample 0 of python has dtype <U1"),
        ([(np.zeros(2), {"a": np.array([np.nan])})], "'a' of the label of sample 0 of python is NaN"),
        (["a text", "another"], "python gives texts; give a model that brings its tokenizer"),
        ([("a", "b"), ("c", "d")], "python gives pairs of texts"),
        ([Image.new("RGB", (4, 4))] * 2, "python gives images; give arrays"),
    ],
)
def test_bad_samples_are_named(given: Any, message: str) -> None:
    with pytest.raises(SamplesError, match=message) as caught:
        from_python(given)
    assert "\n" not in str(caught.value)


# Fingerprints are part of the journal: those of plain samples stay what they were in version 0.1.


@pytest.mark.parametrize(
    ("given", "fingerprint"),
    [
        (
            [(np.arange(4, dtype=np.float32) + i, i % 2) for i in range(5)],
            "0159700ac5d7a17d17873afd0ab9a4147d03046cc72ef5280f08956307e5c676",
        ),
        (
            {"inputs": np.arange(12.0).reshape(4, 3), "labels": np.array([0.5, 1, 2, 3]), "groups": [1, 1, 2, 2]},
            "19f59756c5f409dae94d5250be071d0705dd150b96541903cfdea0b002b7dbfb",
        ),
        (
            [{"ids": np.arange(n), "mask": np.ones(n, np.int64)} for n in (3, 5, 2)],
            "3420a3f66c557a41965fde662da25c06709af1f978249d727e4e0f12a90fcccf",
        ),
    ],
)
def test_plain_samples_keep_their_fingerprints(given: Any, fingerprint: str) -> None:
    assert from_python(given).fingerprint == fingerprint


def test_photos_keep_their_fingerprint(data_folder: Path) -> None:
    photos = read(str(data_folder / "cifar10.npz"), Preprocess(resize=32, crop=32))
    assert photos.fingerprint == "fc27b2eb0de38c9fa2c0097c16e57113a30994be9c62a181e76d756329f798a8"


# Labels


ONE_HOT = np.eye(4)[[0, 1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("labels", "expected", "dtype"),
    [
        ([0, 1, 2, 3, 0], [0, 1, 2, 3, 0], np.int64),
        (np.array([0, 1, 2, 3, 0])[:, None], [[0], [1], [2], [3], [0]], np.int64),
        (np.array([0, 1, 2, 3, 0], np.float32), [0.0, 1.0, 2.0, 3.0, 0.0], np.float64),
        (ONE_HOT, ONE_HOT.tolist(), np.float64),
        (ONE_HOT.astype(np.int32), ONE_HOT.astype(int).tolist(), np.int64),
        (np.array([True, False, True, True, False]), [1, 0, 1, 1, 0], np.int64),
        ([torch.tensor(k) for k in range(5)], [0, 1, 2, 3, 4], np.int64),
        ([0, 1.5, 2, 3, 0], [0, 1.5, 2, 3, 0], np.float64),
    ],
)
def test_labels_are_handed_on_as_they_are(labels: Any, expected: Any, dtype: Any) -> None:
    inputs = numbers(5)
    forms = [{"inputs": inputs, "labels": labels}, list(zip(inputs, labels, strict=True))]
    for samples in map(from_python, forms):
        assert samples.labels is not None
        assert samples.labels.dtype == dtype
        assert samples.labels.tolist() == expected


def boxes(count: int) -> dict[str, Any]:
    """A target as torchvision's detectors take them."""
    return {
        "boxes": torch.arange(4.0 * count).reshape(count, 4),
        "labels": torch.arange(count),
        "image_id": torch.tensor(count),
        "iscrowd": [0] * count,
    }


OBJECTS: dict[str, Any] = {
    "a class for each token": [np.arange(n) for n in (5, 6, 7, 5)],
    "a number for each token": [np.arange(n) / 2 for n in (5, 6, 7, 5)],
    "boxes": [boxes(n) for n in (2, 0, 1, 2)],
    "transcripts": ["one", "two, three", "", "fünf"],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_labels_of_varying_size_stay_one_by_one(tmp_path: Path, kind: str) -> None:
    given = OBJECTS[kind]
    samples = from_python([(row, label) for row, label in zip(numbers(4), given, strict=True)])
    assert samples.labels is not None
    assert samples.labels.dtype == object
    assert samples.labels.shape == (4,)
    for label, expected in zip(samples.labels, given, strict=True):
        if isinstance(expected, dict):
            assert list(label) == list(expected)
            for key in expected:
                np.testing.assert_array_equal(label[key], np.asarray(expected[key]))
        else:
            assert label == expected if isinstance(label, str) else (label == expected).all()
    samples.save(tmp_path / "s.safetensors")
    loaded = Samples.load(tmp_path / "s.safetensors")
    assert loaded.fingerprint == samples.fingerprint
    assert loaded.take([2]).labels is not None
    repeated = from_python([(row, given[0]) for row in numbers(4)])
    assert repeated.fingerprint != samples.fingerprint
    calibration, holdout = split(samples, calibration=2, seed=0)
    assert calibration.labels is not None
    assert holdout.labels is not None
    assert len(calibration.labels) == len(holdout.labels) == 2


def test_an_image_without_boxes_has_none_of_the_same_form() -> None:
    empty = {"boxes": [], "labels": []}
    full = {"boxes": [[0.0, 0, 4, 4]], "labels": [3]}
    samples = from_python([(row, label) for row, label in zip(numbers(2), (empty, full), strict=True)])
    assert samples.labels is not None
    assert [label["boxes"].shape for label in samples.labels] == [(0, 4), (1, 4)]
    assert [label["labels"].dtype for label in samples.labels] == [np.int64, np.int64]


def test_a_loader_of_detections_is_taken_apart() -> None:
    images = [torch.zeros(3, n, 8) for n in (4, 6, 8)]
    dataset: Any = list(zip(images, map(boxes, range(3)), strict=True))
    loader = DataLoader(dataset, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    samples = from_python(loader)
    assert [row[0].shape for row in samples.rows] == [(3, 4, 8), (3, 6, 8), (3, 8, 8)]
    assert samples.labels is not None
    assert [len(label["boxes"]) for label in samples.labels] == [0, 1, 2]


def test_class_names_are_counted_and_read(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("tench\ncrane\n\u9ce5\ncrane\n\n", encoding="utf-8")
    names = read_class_names(path)
    assert names == ("tench", "crane", "\u9ce5", "crane")
    check_class_names(names, 4, str(path))
    assert "has 4 class names, but the model has 10 classes" in error_of(check_class_names, names, 10, str(path))
    path.write_text("tench\n\ncrane\n")
    assert "names.txt line 2 is empty" in error_of(read_class_names, path)
    path.write_bytes(b"caf\xe9")
    assert "cannot be read" in error_of(read_class_names, path)
    assert "cannot be read" in error_of(read_class_names, tmp_path / "missing.txt")


# NaN


def test_nan_is_named_with_the_row_and_its_name() -> None:
    array = np.zeros((4, 3), np.float32)
    check_finite([array, np.zeros((4, 1), np.int64)], ["x", "ids"])
    array[2, 1] = np.nan
    ids = np.zeros((4, 1), np.int64)
    assert error_of(check_finite, [ids, array], ["ids", "x"]).startswith("row 2: x has NaN or infinite values")
    names = [f"sample {number} (cat/{number}.jpg)" for number in range(4)]
    assert error_of(check_finite, [array], ["x"], names).startswith("sample 2 (cat/2.jpg): x has NaN")
    array[2, 1] = np.inf
    assert "row 2" in error_of(check_finite, [array.astype(np.float16)], ["x"])


def test_nan_in_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def broken(image: Any) -> np.ndarray:
        return np.full(2, np.nan if image.getpixel((0, 0))[0] == 2 else 1)

    assert "sample 2 (2.png)" in error_of(read, str(tmp_path), TINY, broken)


# Names and numbers


def test_the_users_numbers_travel_through_draws_and_splits(tmp_path: Path) -> None:
    samples = from_python([(np.array([i]), i) for i in range(50)], max_samples=20, seed=1)
    calibration, holdout = split(samples, calibration=8, seed=2)
    for part in (samples, calibration, holdout, holdout.take([3, 1])):
        assert part.labels is not None
        assert [part.describe(row) for row in range(len(part))] == [f"sample {label}" for label in part.labels]
    holdout.save(tmp_path / "h.safetensors")
    assert Samples.load(tmp_path / "h.safetensors").describe(0) == holdout.describe(0)


def test_file_names_travel_through_the_file(tmp_path: Path) -> None:
    for name in ("naïve 写真 (1).png", "b.png", "c.png", "d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    samples = read(str(tmp_path), TINY)
    assert samples.describe(3) == "sample 3 (naïve 写真 (1).png)"
    samples.take([3, 0]).save(tmp_path / "s.safetensors")
    loaded = Samples.load(tmp_path / "s.safetensors")
    assert [loaded.describe(row) for row in range(2)] == ["sample 3 (naïve 写真 (1).png)", "sample 0 (b.png)"]
    assert loaded.notes == samples.notes


# Draws


class Counted(Dataset[Any]):
    """Says which of its items were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return torch.full((2,), float(index)), index


def test_only_the_drawn_items_of_a_dataset_are_asked_for() -> None:
    dataset = Counted()
    samples = from_python(dataset, max_samples=30, seed=5)
    assert len(dataset.asked) == len(samples) == 30
    assert samples.labels is not None
    assert samples.labels.tolist() == dataset.asked == sorted(dataset.asked)
    assert samples.notes == ("30 of 1,000 samples were drawn with seed 5",)


def test_every_form_draws_the_same_samples() -> None:
    rows = [(np.full(2, i, np.float32), i) for i in range(60)]
    forms: list[Any] = [
        rows,
        iter(rows),
        DataLoader(rows, batch_size=7),  # type: ignore[arg-type]
        {"inputs": np.stack([row for row, _ in rows]), "labels": np.arange(60)},
        from_python(rows),
    ]
    drawn = [from_python(form, max_samples=9, seed=4) for form in forms]
    assert len({samples.fingerprint for samples in drawn}) == 1
    assert {len(samples) for samples in drawn} == {9}
    assert len({samples.describe(3) for samples in drawn}) == 1
    assert all(samples.notes == ("9 of 60 samples were drawn with seed 4",) for samples in drawn)


def test_a_draw_keeps_groups() -> None:
    rows = [np.array([i]) for i in range(40)]
    grouped = from_python(rows, groups=np.arange(40) // 4)
    drawn = grouped.draw(10, seed=0)
    assert drawn.numbers is not None
    assert len(drawn) == 8
    assert all(count == 4 for count in np.bincount(drawn.numbers // 4) if count)
    assert len(grouped.draw(2, seed=0)) == 8, "a split needs two groups"
    for form in (rows, iter(rows), {"inputs": np.stack(rows)}):
        assert from_python(form, groups=np.arange(40) // 4, max_samples=10, seed=0).fingerprint == drawn.fingerprint
    assert "give at least 2" in error_of(grouped.draw, 1, 0)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("lazily", [False, True])
def test_another_number_of_groups_is_refused(count: int, lazily: bool) -> None:
    rows = list(numbers(3))
    message = error_of(from_python, iter(rows) if lazily else rows, groups=np.arange(count))
    assert f"python has {count} groups for 3 samples" in message
    assert f"{count} groups for 3" in error_of(from_python, rows, groups=np.arange(count), max_samples=2)


# Rows that wait in a file


def test_rows_of_an_iterable_move_to_a_file_and_stay_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [({"x": np.arange(n * 3.0).reshape(n, 3), "y": np.array(n)}, n) for n in (1, 5, 2, 9, 4)]
    in_memory = from_python(rows)
    monkeypatch.setattr("corewise.samples.stored.MOST_IN_MEMORY_BYTES", 100)
    spooled = from_python(iter(rows), spool=tmp_path)
    assert not isinstance(spooled.rows, list)
    assert list(tmp_path.iterdir()) == [], "the file has no name, and goes with the samples"
    assert spooled.fingerprint == in_memory.fingerprint
    assert list(spooled.shapes) == list(in_memory.shapes)
    assert spooled.take([4, 0]).shapes == [in_memory.shapes[4], in_memory.shapes[0]]
    assert isinstance(from_python(rows, spool=tmp_path).rows, list), "what the user holds is not written"
    drawn = from_python(iter(rows), max_samples=3, spool=tmp_path)
    assert drawn.fingerprint == from_python(rows, max_samples=3).fingerprint
    with pytest.raises(OutputError, match="the samples cannot be kept in"):
        from_python(iter(rows), spool=tmp_path / "missing")


# As a value


ragged = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 3)).map(
        lambda size: (np.arange(size[0] * size[1]).reshape(size), np.ones(size[0], bool))
    ),
    min_size=1,
    max_size=12,
)


@given(ragged, st.integers(1, 5))
def test_batches_hold_every_sample_once_in_one_shape_and_in_order(rows: list[Any], size: int) -> None:
    samples = from_python([(row, None) for row in rows])
    seen: list[int] = []
    last: dict[Any, int] = {}
    for indices, arrays in samples.batches(size):
        assert 1 <= len(indices) <= size
        for position, index in enumerate(indices):
            for array, expected in zip(arrays, samples.rows[index], strict=True):
                np.testing.assert_array_equal(array[position], expected)
        shapes = tuple(array.shape[1:] for array in arrays)
        assert last.get(shapes, -1) < indices[0]
        last[shapes] = int(indices[-1])
        assert list(indices) == sorted(indices)
        seen += indices.tolist()
    assert sorted(seen) == list(range(len(samples)))


@given(ragged, st.booleans(), st.booleans())
def test_saved_samples_load_equal(tmp_path_factory: Any, rows: list[Any], labelled: bool, grouped: bool) -> None:
    items = [(row, i / 2 if labelled else None) for i, row in enumerate(rows)]
    samples = from_python(items, groups=np.arange(len(rows)) // 2 if grouped else None)
    path = tmp_path_factory.mktemp("samples") / "s.safetensors"
    samples.save(path)
    loaded = Samples.load(path)
    assert loaded.fingerprint == samples.fingerprint
    assert (loaded.labels is None, loaded.groups is None) == (not labelled, not grouped)
    load_file(path)


def test_loaded_samples_keep_where_they_came_from_and_can_be_taken(tmp_path: Path) -> None:
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 255, 0))):
        Image.new("RGB", (10, 8), colour).save(tmp_path / name)
    samples = read(str(tmp_path), TINY)
    samples.save(tmp_path / "s.safetensors")
    loaded = Samples.load(tmp_path / "s.safetensors")
    assert (loaded.source, loaded.preprocess) == (str(tmp_path), TINY)
    taken = loaded.take([1, 0]).take([1])
    np.testing.assert_array_equal(taken.rows[0][0], samples.rows[0][0])
    assert len(taken) == 1
    assert [len(rows) for rows in (loaded.rows[:1], taken.rows[-1:], loaded.rows[::-1])] == [1, 1, 2]
    with pytest.raises(IndexError):
        loaded.rows[2]


def test_loading_reads_only_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    from_python({"inputs": np.ones((100, 500_000), np.float32)}).save(path)
    code = f"""
from pathlib import Path
from corewise.samples import Samples
samples = Samples.load(Path({str(path)!r}))
assert samples.rows[99][0].sum() == 500_000
samples.fingerprint
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    peak_kib = int(subprocess.check_output([sys.executable, "-c", code]))
    assert peak_kib < 100_000, "200 MB must not be in memory for one row of 2 MB, nor after all were read"


@pytest.mark.parametrize("damage", ["missing", "empty", "foreign", "cut", "metadata"])
def test_damaged_sample_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    from_python([np.zeros(4)] * 3).save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        save_file({"x": np.zeros(2)}, path)
    elif damage == "cut":
        path.write_bytes(content[:-8])
    else:
        path.write_bytes(content.replace(b'\\"kind\\": \\"tuple\\"', b'\\"kind\\": \\"code!\\"'))
    assert "is not a file of samples" in error_of(Samples.load, path)


def test_a_file_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        from_python([np.zeros(4)]).save(tmp_path / "missing" / "s.safetensors")


def test_the_fingerprint_knows_data_labels_groups_structure_and_order() -> None:
    rows = list(numbers(3))
    variants = [
        from_python(rows),
        from_python(rows[::-1]),
        from_python([row + 1 for row in rows]),
        from_python([(row, 0) for row in rows]),
        from_python([(row, 1) for row in rows]),
        from_python(rows, groups=[0, 0, 1]),
        from_python(rows, groups=[0, 1, 1]),
        from_python([{"x": row} for row in rows]),
        from_python([row.reshape(1, 3) for row in rows]),
        from_python([row.view(np.int32) for row in rows]),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert from_python(rows, source="elsewhere").fingerprint == variants[0].fingerprint


@pytest.mark.parametrize("name", ["labels", "groups"])
def test_labels_and_groups_are_numbers_or_objects(name: str) -> None:
    samples = from_python([np.zeros(1)])
    fields: dict[str, Any] = {name: np.array(["cat"])}
    assert f"the {name} of python are <U3" in error_of(
        lambda: Samples(rows=samples.rows, structure=samples.structure, **fields)
    )


# The split


def test_default_calibration() -> None:
    assert [default_calibration(n) for n in (1, 2, 5, 100, 500, 10_000)] == [1, 1, 2, 40, 200, 200]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.data())
def test_a_split_is_disjoint_complete_seeded_and_keeps_groups_whole(groups: list[int], data: Any) -> None:
    samples = from_python([(np.array([i]), i) for i in range(len(groups))], groups=groups)
    wanted = data.draw(st.integers(1, len(groups) - 1))
    if len(set(groups)) == 1:
        assert "are one group" in error_of(split, samples, calibration=wanted, seed=0)
        return
    calibration, holdout = split(samples, calibration=wanted, seed=3)
    parts = [part.labels.tolist() for part in (calibration, holdout) if part.labels is not None]
    assert sorted(parts[0] + parts[1]) == list(range(len(groups)))
    assert parts == [sorted(part) for part in parts]
    in_calibration, in_holdout = ({groups[i] for i in part} for part in parts)
    assert not in_calibration & in_holdout
    assert in_calibration
    assert in_holdout
    assert len(in_holdout) == 1 or len(calibration) >= wanted
    again, _ = split(samples, calibration=wanted, seed=3)
    assert again.fingerprint == calibration.fingerprint


def test_another_seed_draws_others() -> None:
    samples = from_python([np.array([i]) for i in range(100)])
    draws = {split(samples, calibration=40, seed=seed)[0].fingerprint for seed in range(5)}
    assert len(draws) == 5
    assert len(split(samples, calibration=40, seed=0)[0]) == 40


@pytest.mark.parametrize(
    ("count", "calibration", "message"),
    [
        (1, 1, "python has 1 sample; give at least 2"),
        (10, 10, "10 of 10 samples cannot be for calibration, only 1 to 9; give at least 11 samples"),
        (10, 0, "0 of 10 samples cannot be for calibration"),
    ],
)
def test_too_few_samples_to_split(count: int, calibration: int, message: str) -> None:
    assert message in error_of(split, from_python([np.zeros(1)] * count), calibration=calibration, seed=0)


# Array files


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


@pytest.mark.parametrize(("save", "suffix"), [(save_npz, ".npz"), (lambda path, a: save_file(a, path), ".safetensors")])
def test_array_files(tmp_path: Path, save: Any, suffix: str) -> None:
    path = tmp_path / f"arrays{suffix}"
    save(path, {"x": numbers(4), "y": np.arange(4)})
    samples = read(str(path))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert call(samples, 1)[0][0].tolist() == [3, 4, 5]
    assert samples.preprocess is None
    save(path, {"ids": np.zeros((4, 2), np.int64), "mask": np.ones((4, 2)), "groups": np.array([5, 5, 6, 6])})
    samples = read(str(path))
    assert sorted(call(samples, 0)[1]) == ["ids", "mask"]
    assert samples.groups is not None
    assert samples.labels is None
    save(path, {"images": np.full((3, 9, 9, 3), 255, np.uint8), "label": np.arange(3)})
    samples = read(str(path), TINY)
    assert samples.rows[0][0].shape == (3, 4, 4)
    assert samples.preprocess == TINY
    save(path, {"images": np.full((3, 9, 9, 1), 255, np.uint8)})
    assert read(str(path), TINY).rows[0][0].max() == 2
    own = read(str(path), TINY, lambda image: np.asarray(image.resize((2, 2)), np.float32))
    assert own.rows[0][0].shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3)}, "has no inputs"),
        ({"x": np.zeros((3, 2)), "labels": np.zeros(2)}, "has 2 labels for 3 samples"),
        ({"x": np.zeros((3, 2)), "z": np.zeros((2, 2))}, "have 2 and 3 rows"),
        ({"x": np.zeros((0, 2))}, "there are no samples in"),
        ({"x": np.array([{}, {}], object)}, "the array 'x' of"),
        ({"x": np.array([[np.nan]])}, "sample 0 of"),
        ({"x": np.float32(3)}, "have no rows"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert message in error_of(read, str(tmp_path / "a.npz"))


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04K\x01."])
def test_files_that_are_no_archives_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name} cannot be read" in error_of(read, str(tmp_path / name))


def test_damaged_array_files_are_refused_or_read(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez_compressed(path, inputs=rng.standard_normal((20, 3)), labels=np.arange(20))
    content = path.read_bytes()
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read(str(path))
        except SamplesError:
            refused += 1
    assert refused > 200


def test_an_array_that_claims_more_than_the_memory_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 10000000)}"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("x.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(0x75) + b"\n")
    assert "the array 'x' of" in error_of(read, str(tmp_path / "a.npz"))


def test_only_a_few_items_are_made_before_they_are_asked_for() -> None:
    started: list[int] = []

    def double(item: int) -> int:
        started.append(item)
        return 2 * item

    made = raw_module._map(double, range(200), 3)
    assert next(made) == 0
    assert len(started) <= 3 * raw_module.AHEAD + 1
    assert list(made) == list(range(2, 400, 2))


@pytest.mark.parametrize("reference", ["nowhere", "nowhere.npz", "nowhere.safetensors", "nowhere/photos"])
def test_missing_paths(reference: str) -> None:
    assert f"{reference}; " in error_of(read, reference)


# Functions


def test_a_function_in_a_file_can_import_its_siblings(tmp_path: Path) -> None:
    (tmp_path / "corewise_sibling.py").write_text("WIDTH = 4\n")
    (tmp_path / "own_samples.py").write_text(
        "import numpy as np\nfrom corewise_sibling import WIDTH\n"
        "def made():\n    return [(np.zeros(WIDTH), i) for i in range(3)]\n"
    )
    path = list(sys.path)
    samples = read(f"{tmp_path}/own_samples.py:made")
    assert samples.rows[0][0].shape == (4,)
    assert samples.source.endswith("own_samples.py:made")
    assert sys.path == path


def test_a_generator_can_import_its_siblings_as_it_runs(tmp_path: Path) -> None:
    (tmp_path / "corewise_late_sibling.py").write_text("WIDTH = 4\n")
    (tmp_path / "lazy_samples.py").write_text(
        "import numpy as np\ndef made():\n"
        "    from corewise_late_sibling import WIDTH\n    for k in range(3): yield np.full(WIDTH, k)\n"
    )
    path = list(sys.path)
    assert len(read(f"{tmp_path}/lazy_samples.py:made")) == 3
    assert sys.path == path


def test_generator_functions_are_read_lazily_and_their_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(
        "import numpy as np\ndef made():\n    yield np.zeros(2)\n    raise RuntimeError('gone')\n"
    )
    message = error_of(read, f"{tmp_path}/lazy.py:made")
    assert f"sample 1 of {tmp_path}/lazy.py:made cannot be made: RuntimeError: gone ({tmp_path}/lazy.py:4)" in message
