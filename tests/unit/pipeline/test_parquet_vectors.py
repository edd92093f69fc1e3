"""Vectors in Parquet: what is read back, and what writing them imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

CODE = """
import sys
from pathlib import Path
import numpy as np
from corewise.pipeline.outputs import AnswerRow, _Parquet

made = _Parquet("vector")
vectors = np.arange(6, dtype=np.float64).reshape(3, 2)
names = {names}
rows = [AnswerRow(row=5 + k, input=name, answer=vectors[k]) for k, name in enumerate(names)]
parts = [Path(sys.argv[1], f"{{k}}.parquet") for k in range(2)]
made.write(parts[0], rows, 5, 3)
made.write(parts[1], rows, 5, 3)
made.join(parts, Path(sys.argv[1], "whole.parquet"))
assert "pandas" not in sys.modules
"""


@pytest.mark.parametrize("names", [["a.txt", "ü", ""], [None, None, None]])
def test_they_are_written_without_pandas_which_takes_a_second_to_import(tmp_path: Path, names: list[str]) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(names=names), str(tmp_path)], check=True, timeout=120)
    table = parquet.read_table(tmp_path / "whole.parquet")
    assert table.column("row").to_pylist() == [5, 6, 7] * 2
    assert table.column("vector").to_pylist() == [[0, 1], [2, 3], [4, 5]] * 2
    assert table.schema.field("vector").type.list_size == 2
    assert ("input" in table.schema.names) == (names[0] is not None)
    if names[0] is not None:
        assert table.column("input").to_pylist() == names * 2
