"""The ranges of integer inputs: found in exported programs, and checked before an engine sees a value."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from corewise.artifact.checks import InputChecks, program_ranges
from corewise.artifact.index_ranges import derive
from corewise.common.errors import ArtifactError, InputError
from corewise.records.build import TensorSpec
from corewise.records.ranges import InputRange, ValueRange
from corewise.samples import from_python
from corewise.source import export, save_program

IDS = ValueRange(low=0, high=9)


def ids(length=4):
    return np.arange(length, dtype=np.int64) % 4


class Model(nn.Module):
    """A table of 10 rows that ``look_up`` looks something up in."""

    def __init__(self, look_up, rows=10):
        super().__init__()
        self.table, self.look_up = nn.Embedding(rows, 3), look_up
        self.register_buffer("places", torch.arange(6).expand(1, -1), persistent=False)

    def forward(self, *inputs):
        return self.look_up(self, *inputs).reshape(inputs[0].shape[0], -1).sum(1, keepdim=True)


def ranges(tmp_path, look_up, *samples, **options):
    exported = export(Model(look_up, **options), from_python([samples] * 4 if len(samples) > 1 else [*samples] * 4))
    assert exported.program is not None, exported.why_not
    save_program(exported.program, tmp_path / "program.pt2")
    return derive(tmp_path / "program.pt2")


@pytest.mark.parametrize(
    ("look_up", "expected"),
    [
        (lambda m, x: m.table(x), [IDS]),
        (lambda m, x: m.table(x + 2), [ValueRange(low=-2, high=7)]),
        (lambda m, x: m.table(9 - x), [IDS]),
        (lambda m, x: m.table(x * 3), [ValueRange(low=0, high=3)]),
        (lambda m, x: m.table(-x + 5), [ValueRange(low=-4, high=5)]),
        (lambda m, x: m.table(x.view(-1).to(torch.int32)), [IDS]),
        (lambda m, x: m.table(torch.cat([torch.zeros_like(x[:, :1]), x.flip(1)], 1)), [IDS]),
        (lambda m, x: m.table(x.clamp(min=0)), [ValueRange(low=None, high=9)]),
        (lambda m, x: m.table.weight[x], [ValueRange(low=-10, high=9)]),
        (lambda m, x: m.table.weight.index_select(0, x.flatten()), [IDS]),
        (lambda m, x: m.table.weight.T.expand(x.shape[0], 3, 10).gather(2, x.unsqueeze(1)[:, :, :3]), []),
        (lambda m, x: m.table.weight.T.expand(x.shape[0], 3, 10).gather(2, x.unsqueeze(1)), [IDS]),
        (lambda m, x: nn.functional.one_hot(x, 10).float(), [IDS]),
        (lambda m, x: m.table(x) + m.table(x + 1), [ValueRange(low=0, high=8)]),
        # Each column has a table of its own.
        (
            lambda m, x: m.table(x[:, 0]) + m.table.weight[:4][x[:, -1]],
            [ValueRange(low=-4, high=3, axis=1, start=-1), ValueRange(low=0, high=9, axis=1, start=0, stop=1)],
        ),
        (lambda m, x: m.table(x[:, :-1]), [ValueRange(low=0, high=9, axis=1, start=0, stop=-1)]),
        # Whether these are valid depends on more than their size.
        (lambda m, x: m.table(torch.where(x < 0, 0, x)), []),
        (lambda m, x: m.table(x.masked_fill(x == -100, 0)), []),
        (lambda m, x: m.table(x * (x < 10)), []),
        (lambda m, x: m.table(x.clamp(0, 9)), []),
        (lambda m, x: m.table(x % 10), []),
        (lambda m, x: x.float(), []),
    ],
)
def test_what_is_an_index_must_lie_in_its_table(tmp_path, look_up, expected):
    (found,) = ranges(tmp_path, look_up, ids())
    assert list(found.values) == expected


@pytest.mark.parametrize(
    ("look_up", "longest"),
    [
        (lambda m, x: m.table(x) + m.table(torch.arange(x.shape[1])), 10),
        (lambda m, x: m.table(x) + m.table(torch.arange(2, x.shape[1] + 2)), 8),
        (lambda m, x: m.table(x) + m.table(m.places[:, : x.shape[1]]), 6),
        # RoBERTa's: padding has no position, and others count from 2.
        (lambda m, x: m.table(x) + m.table((x != 1).int().cumsum(1).long() * (x != 1) + 1), 8),
        (lambda m, x: m.table(x), None),
    ],
)
def test_a_table_of_positions_limits_the_length(tmp_path, look_up, longest):
    model = Model(look_up)
    exported = export(model, from_python([ids(4), ids(5), ids(4), ids(5)]))
    assert exported.program is not None, exported.why_not
    save_program(exported.program, tmp_path / "program.pt2")
    (found,) = derive(tmp_path / "program.pt2")
    assert found.longest == (None, longest)
    if longest:
        model(torch.zeros(2, longest, dtype=torch.int64))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(2, longest + 1, dtype=torch.int64))


class Branching(nn.Module):
    """Computes otherwise for sizes that ``is_usual`` is false for."""

    def __init__(self, is_usual):
        super().__init__()
        self.is_usual = is_usual

    def forward(self, x):
        return (x if self.is_usual(x.shape[1]) else 2 * x).mean((1, 2))


@pytest.mark.parametrize(
    ("is_usual", "right", "wrong", "told"),
    [
        (lambda size: size > 50, 51, 50, "give at least 51: for other sizes the model takes a branch"),
        (lambda size: size % 8 == 0, 24, 20, "give a multiple of 8: for other sizes the model takes a branch"),
        (lambda size: size <= 80, 80, 81, "give at most 80"),
    ],
)
def test_sizes_for_which_the_model_takes_another_branch_are_refused(tmp_path, is_usual, right, wrong, told):
    samples = from_python([np.ones((size, 3), np.float32) for size in (64, 72, 64, 72)])
    exported = export(Branching(is_usual), samples)
    assert exported.program is not None, exported.why_not
    save_program(exported.program, tmp_path / "program.pt2")
    checks = InputChecks(exported.inputs, derive(tmp_path / "program.pt2"))
    checks.check([np.ones((2, right, 3), np.float32)])
    with pytest.raises(InputError, match=f"has size {wrong} in dimension 1; {told}"):
        checks.check([np.ones((2, wrong, 3), np.float32)])


def test_a_program_without_integers_has_no_ranges(tmp_path):
    (found,) = ranges(tmp_path, lambda m, x: x @ m.table.weight, np.ones(10, np.float32))
    assert found == InputRange(longest=(None, None))


def test_a_file_that_cannot_be_read_is_told_and_checks_nothing(tmp_path):
    ranges(tmp_path, lambda m, x: m.table(x), ids())
    good = tmp_path / "program.pt2"
    with zipfile.ZipFile(good) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
        model = json.loads(archive.read(name))
    model["graph_module"]["graph"]["nodes"][0]["inputs"] = [7]
    assert program_ranges(good, SPECS[:1], [[np.array([[1, 9]])]]) is not None
    # The model took this: whatever says that it cannot is wrong.
    assert program_ranges(good, SPECS[:1], [[np.array([[1, 9]])], [np.array([[1, 10]])]]) is None
    for content in (json.dumps(model), "{", "[" * 100_000, json.dumps({"graph_module": 1})):
        bad = tmp_path / "bad.pt2"
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            derive(bad)
        assert program_ranges(bad, SPECS[:1], []) is None
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    assert program_ranges(tmp_path / "bad.pt2", SPECS[:1], []) is None
    assert program_ranges(tmp_path / "none.pt2", SPECS[:1], []) is None


SPECS = [
    TensorSpec(name="tokens", dtype="int64", shape=(None, None)),
    TensorSpec(name="weights", dtype="float32", shape=(None, 2)),
]
RANGES = [InputRange(values=(IDS,), longest=(None, 4)), InputRange()]
FLOATS = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([[0, 9], [3, 10_000_000]], "input 'tokens' has the value 10000000 in row 1; give values from 0 to 9"),
        ([[0, -1], [3, 3]], "input 'tokens' has the value -1 in row 0; give values from 0 to 9"),
        (
            [[0] * 5] * 2,
            "input 'tokens' has size 5 in dimension 1; give at most 4, the number of positions that the model has",
        ),
    ],
)
def test_a_value_out_of_range_is_told_with_its_name_and_number(tokens, match):
    checks = InputChecks(SPECS, RANGES)
    checks.check([np.array([[0, 9], [1, 2]]), FLOATS])
    with pytest.raises(InputError) as error:
        checks.check([np.array(tokens), FLOATS])
    assert str(error.value) == match


def test_the_part_of_an_input_that_is_an_index_is_checked_alone():
    part = InputRange(values=(replace(IDS, axis=1, start=-1),))
    checks = InputChecks(SPECS[:1], [part])
    checks.check([np.array([[500, 9]])])
    with pytest.raises(InputError, match="the value 10 in row 1"):
        checks.check([np.array([[500, 9], [1, 10]])])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_refused_where_that_is_wanted(value):
    wrong = FLOATS.copy()
    wrong[1, 0] = value
    InputChecks(SPECS, RANGES).check([np.zeros((2, 2), np.int64), wrong])
    checks = InputChecks(SPECS, RANGES, check_finite=True)
    checks.check([np.zeros((2, 2), np.int64), np.full((2, 2), 3e38, np.float32)])
    with pytest.raises(InputError, match=f"input 'weights' has the value {value} in row 1; give finite numbers"):
        checks.check([np.zeros((2, 2), np.int64), wrong])
