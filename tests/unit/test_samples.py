"""samples: from folders, files, functions and Python objects; split, stored and loaded."""

import os
import subprocess
import sys
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
from corewise.samples import Samples, default_calibration, from_python, read, split

TINY = Preprocess(resize=8, crop=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def numbers(count: int, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def call(samples: Samples, index: int) -> Any:
    """The (args, kwargs) of one sample."""
    return nested.unflatten(samples.structure, samples.rows[index])


def write_image(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


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
        ({"x": np.zeros((2, 2))}, "the dict from python has the keys x; give inputs"),
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
        ([torch.zeros(2, dtype=torch.bfloat16)], "sample 0 of python: input_0 is no numpy array: .*BFloat16"),
        ([3.0], "sample 0 of python: there is no array"),
        ([{1: np.zeros(2)}, {2: np.zeros(2)}], r"sample 1 of python: inputs\[2\] is not expected"),
        ([{"a": np.zeros(2)}, {"b": np.zeros(2)}], r'sample 1 of python: inputs\["b"\] is not expected; give a'),
        ([np.zeros(2), np.zeros((2, 2))], r"sample 1 of python: input_0 has shape \(2, 2\), in sample 0 it has \(2,\)"),
        ([np.zeros(2), np.zeros(2, np.int64)], "sample 1 of python: input_0 is int64, in sample 0 it is float32"),
        ([(np.zeros(2), 1), (np.zeros(2), None)], "sample 1 of python has no label"),
        ([(np.zeros(2), "cat")], "the label of sample 0 of python has dtype <U3"),
        ([(np.zeros(2), float("nan"))], "the label of sample 0 of python is NaN"),
        ([(np.zeros(2), np.zeros(2)), (np.zeros(2), np.zeros(3))], "the label of sample 1 .* has shape"),
    ],
)
def test_bad_samples_are_named(given: Any, message: str) -> None:
    with pytest.raises(SamplesError, match=message) as caught:
        from_python(given)
    assert "\n" not in str(caught.value)


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
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", (0, 255, 0))
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
import resource
from pathlib import Path
from corewise.samples import Samples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = Samples.load(Path({str(path)!r})).rows
assert rows[99][0].sum() == 500_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown_kib = int(subprocess.check_output([sys.executable, "-c", code]))
    assert grown_kib < 100_000, "200 MB must not be read for one row of 2 MB"


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
    assert "holds no samples of corewise" in error_of(Samples.load, path)


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
def test_labels_and_groups_are_numbers(name: str) -> None:
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
        (10, 10, "10 of 10 samples cannot be for calibration: 1 to 9 can; give at least 11 samples"),
        (10, 0, "0 of 10 samples cannot be for calibration"),
    ],
)
def test_too_few_samples_to_split(count: int, calibration: int, message: str) -> None:
    assert message in error_of(split, from_python([np.zeros(1)] * count), calibration=calibration, seed=0)


# Folders of images


def test_labels_csv(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "red.jpg")
    write_image(tmp_path / "green.png", (0, 255, 0))
    (tmp_path / "labels.csv").write_text("author,file,label\nme,images/red.jpg,7\nyou,green.png, 2\n")
    samples = read(str(tmp_path), TINY)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 2]
    assert samples.rows[0][0].shape == (3, 4, 4)
    assert samples.rows[1][0][:, 0, 0].tolist() == [-2, 2, -2]
    assert samples.preprocess == TINY


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/1.JPG", "cat/notes.txt", "empty/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            write_image(path)
    samples = read(str(tmp_path), TINY)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", ".hidden.png", "readme.txt"):
        write_image(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("")
    samples = read(str(tmp_path), TINY)
    assert len(samples) == 2
    assert samples.labels is None


def test_grey_modes_and_sizes_are_handled(tmp_path: Path) -> None:
    Image.new("L", (5, 20), 255).save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 5), (255, 255, 255, 0)).save(tmp_path / "transparent.png")
    Image.new("P", (4, 4)).save(tmp_path / "palette.png")
    assert {row[0].shape for row in read(str(tmp_path), TINY).rows} == {(3, 4, 4)}
    grey = read(str(tmp_path), Preprocess(resize=6, crop=6, mean=(0,), std=(1,)))
    assert {row[0].shape for row in grey.rows} == {(1, 6, 6)}
    assert grey.rows[0][0].max() == 1


def test_images_are_resized_cropped_and_normalised_as_the_formulas_say(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    preprocess = Preprocess(resize=20, crop=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bicubic")
    found = read(str(tmp_path), preprocess).rows[0][0]
    resized = np.asarray(Image.fromarray(pixels).resize((33, 20), Image.Resampling.BICUBIC))
    cropped = resized[5:15, 12:22] / 255  # round(11.5) is 12
    np.testing.assert_allclose(found, ((cropped - preprocess.mean) / preprocess.std).transpose(2, 0, 1), atol=1e-5)
    assert found.dtype == np.float32


def darker(image: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(image.resize((2, 2))), dtype=torch.float32).permute(2, 0, 1) / 510


def test_a_preprocess_function_takes_the_image(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", (255, 0, 51))
    samples = read(str(tmp_path / "images"), TINY, darker)
    assert samples.rows[0][0][:, 0, 0].tolist() == pytest.approx([0.5, 0, 0.1])
    assert samples.preprocess == Preprocess(function=f"{__name__}:darker")
    (tmp_path / "own.py").write_text("def bad(image):\n    raise ValueError(f'mode {image.mode}')\n")
    message = error_of(read, str(tmp_path / "images"), TINY, f"{tmp_path}/own.py:bad")
    assert "preprocess function failed on" in message
    assert f"a.png: ValueError: mode RGB ({tmp_path}/own.py:2)" in message


@pytest.mark.parametrize(
    ("files", "table", "message"),
    [
        ([], None, "there are no images in"),
        (["a.txt"], None, "there are no images in"),
        (["images/a.png"], None, "has the single class folder images; give"),
        (["a.png", "cat/a.png"], None, "has images beside the folder cat"),
        (["a.png"], "file,label\nb.png,1\n", "labels.csv line 2: there is no file 'b.png'"),
        (["a.png"], "file,label\na.png,cat\n", "labels.csv line 2: the label 'cat' is no integer"),
        (["a.png"], "file,label\na.png,-1\n", "the label '-1' is no integer"),
        (["a.png"], "file,label\na.png,1\na.png\n", "labels.csv line 3: the label '' is no integer"),
        (["a.png"], "name,class\na.png,1\n", "labels.csv has the columns name, class; name two of them"),
        (["a.png"], "file,label\n", "there are no samples in"),
        (["a.png"], "file,label\n\xff\xfe,1\n", "labels.csv cannot be read"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, files: list[str], table: str | None, message: str) -> None:
    for name in files:
        write_image(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("")
    if table is not None:
        (tmp_path / "labels.csv").write_bytes(table.encode("latin-1"))
    assert message in error_of(read, str(tmp_path), TINY)


@pytest.mark.parametrize("content", [b"", b"no image at all", "cut"])
def test_undecodable_images_are_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "broken.png"
    if content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:500]
    path.write_bytes(content)
    assert f"the image {path} cannot be decoded" in error_of(read, str(tmp_path), TINY)


@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(resize=4, crop=8), Preprocess(crop=0), Preprocess(mean=(0.5, 0.5)), Preprocess(std=(0.0, 1.0, 1.0))],
)
def test_a_senseless_preprocess_is_refused(tmp_path: Path, preprocess: Preprocess) -> None:
    write_image(tmp_path / "a.png")
    assert "fit" in error_of(read, str(tmp_path), preprocess)


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
    assert read(str(path), TINY, darker).rows[0][0].shape == (3, 2, 2)


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


def test_generator_functions_are_read_lazily_and_their_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(
        "import numpy as np\ndef made():\n    yield np.zeros(2)\n    raise RuntimeError('gone')\n"
    )
    message = error_of(read, f"{tmp_path}/lazy.py:made")
    assert f"sample 1 of {tmp_path}/lazy.py:made cannot be made: RuntimeError: gone ({tmp_path}/lazy.py:4)" in message


# Real data


@pytest.mark.skipif(not os.path.isdir("../shared/data/imagenet-photos"), reason="needs ../shared/data")
def test_real_photos() -> None:
    samples = read("../shared/data/imagenet-photos")
    assert len(samples) == 500
    assert samples.labels is not None
    assert 0 <= samples.labels.min() < samples.labels.max() < 1000
    assert {row[0].shape for row in samples.rows} == {(3, 224, 224)}
    assert abs(np.mean([row[0].mean() for row in samples.rows])) < 0.3
