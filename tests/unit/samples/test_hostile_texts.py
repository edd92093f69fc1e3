"""samples: texts, tables and dicts that must end in one line, or in one row set aside, and never in a traceback."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from corewise.common.errors import SamplesError
from corewise.samples import RawSamples, raw_from_python, read_raw


def error_of(samples: Any, **options: Any) -> str:
    with pytest.raises(SamplesError) as caught:
        raw_from_python(samples, **options)
    return str(caught.value)


def test_values_that_python_does_not_have_are_set_aside(tmp_path: Path) -> None:
    """A time in nanoseconds, which pyarrow makes no ``datetime`` of."""
    times = [datetime.datetime(2026, 1, 1)] * 30
    nanoseconds = pyarrow.array(times, pyarrow.timestamp("ns"))
    odd = pyarrow.array([*[1_000] * 29, 1_001], pyarrow.int64()).cast(pyarrow.timestamp("ns"))
    for name, column in (("a", nanoseconds), ("b", odd)):
        table = pyarrow.table({"text": [f"text {row}" for row in range(30)], "when": column})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        found = read_raw(str(tmp_path / f"{name}.parquet"), text="text")
        assert isinstance(found, RawSamples)
        assert len(found) == 30
        with pytest.raises(SamplesError, match=r"30 of 30 texts in .* cannot be used: row 0 has"):
            read_raw(str(tmp_path / f"{name}.parquet"), text="when")


ROWS = [{"text": "red", "label": 1}, {"text": "blue", "label": 0}]


@pytest.mark.parametrize(
    "splits",
    [
        {"train": ROWS, "validation": ROWS[:1]},
        {"train": ROWS},
        {"train": {"text": ["red", "blue"]}, "test": {"text": ["red"]}},
        {"train": pandas.DataFrame(ROWS), "test": pandas.DataFrame(ROWS)},
        {"train": pyarrow.Table.from_pylist(ROWS)},
    ],
)
def test_a_dict_of_data_sets_is_not_one(splits: Any) -> None:
    message = error_of(splits)
    assert f"the dict from python has a data set for each of {', '.join(splits)}" in message
    assert message.endswith("give one of them: samples['train']")


@pytest.mark.parametrize("columns", [{"text": {"red", "blue"}}, {"a": np.zeros(3), "b": {1, 2, 3}}])
def test_columns_that_have_no_order_are_refused(columns: Any) -> None:
    assert "sample 0 of python cannot be made: TypeError" in error_of(columns)


@pytest.mark.parametrize("ids", [None, 5, "red", {"a": 1}])
def test_tokens_that_are_none_are_refused(ids: Any) -> None:
    assert "sample 0 of python" in error_of([{"input_ids": ids}] * 3)


def test_a_table_of_which_nothing_says_what_is_the_text_is_told_what_to_do_in_python() -> None:
    rows = [{"sentence1": "red", "sentence2": "blue", "score": 1.0}] * 3
    message = error_of(rows)
    assert "python has the columns sentence1, sentence2, score; name the text's column 'text', or give" in message
    assert "--text" in error_of(rows, source="file.py:rows")
