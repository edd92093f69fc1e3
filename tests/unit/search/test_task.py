"""What a search starts from: samples that calibrate in a useful order, and arguments that are what they seem."""

import tempfile

import numpy as np
import pytest
from torch import nn

from corewise.common.errors import InputError, OutputError
from corewise.runtime.workspace import Workspace
from corewise.search.optimization import optimize
from corewise.search.task import Task
from corewise.search.texts import read_samples


def test_the_first_samples_that_calibrate_are_of_every_class_where_samples_come_class_by_class():
    rows = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    task = Task.read(
        nn.Linear(4, 4),
        [(row, number // 50) for number, row in enumerate(rows)],
        metric=None,
        engines=("eager",),
        ignored=(),
        calibration=80,
        seed=0,
        class_names=None,
        tokenizer=None,
        pooling=None,
        on_event=lambda event: None,
    )
    assert len(task.calibration) == 80
    assert set(task.calibration.labels[:16]) == set(task.calibration.labels[-16:]) == {0, 1, 2, 3}
    assert set(task.calibration.numbers).isdisjoint(task.holdout.numbers)


@pytest.mark.parametrize("name", ["engines", "ignored", "class_names"])
def test_a_text_in_the_place_of_a_list_is_named(name):
    with pytest.raises(InputError, match=rf"{name} is the text 'abc'; give a list: {name}=\['abc'\]"):
        optimize(None, [], **{name: "abc"})


def test_paths_may_be_texts_and_texts_paths(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.ones((3, 4), np.float32))
    assert len(read_samples(None, tmp_path / "rows.npz")) == 3
    with pytest.raises(InputError, match="there are no samples in python"):
        optimize(None, [], work=str(tmp_path / "work"))


def test_a_place_for_temporary_files_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="there is no place for temporary files: No such file or directory"):
        Workspace.create()
