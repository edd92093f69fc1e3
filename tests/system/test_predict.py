"""corewise predict: texts in files to answers in files, on the command line, also through kills."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command_line import command, several
from serving_tools import write_bulk_job
from waiting import eventually

import corewise

ROWS = 16_000
HALTING = """
import time
from corewise.pipeline.parts import Parts
write = Parts.write
def write_and_halt(*args):
    write(*args)
    time.sleep(600)
Parts.write = write_and_halt
"""
"""The job stops after the first part that it writes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tokens, and a file of texts of which one has a null byte."""
    made = tmp_path_factory.mktemp("predict")
    write_bulk_job(made, ROWS)
    return made


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("predict", *args, quick=False), capture_output=True, text=True, cwd=folder)


def test_a_job_that_is_killed_loses_no_row_and_does_none_twice(folder: Path) -> None:
    args = ("words.cw", "texts.txt", "-o", "out.npy")
    parts = folder / "out.npy.parts"
    for least, how in ((1, signal.SIGKILL), (2, signal.SIGINT)):
        process = subprocess.Popen(
            command("predict", *args, before=HALTING),
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert eventually(lambda least=least: len(list(parts.glob("part-*.done"))) == least)
        finally:
            process.send_signal(how)
            _, errors = process.communicate(timeout=120)
    assert "corewise: finished parts are kept in out.npy.parts; the same command resumes" in errors.splitlines()
    done = run(folder, *args)
    assert done.returncode == 0, done.stderr
    assert f"{ROWS:,} rows to out.npy in" in done.stdout
    assert "were done before; 1 set aside in out.failed.jsonl" in done.stdout
    made = np.load(folder / "out.npy")
    texts = (folder / "texts.txt").read_text().splitlines()
    assert np.flatnonzero(np.isnan(made[:, 0])).tolist() == [7]
    with corewise.load(folder / "words.cw") as model:
        few = [*range(7), *range(8, 40), *range(ROWS - 40, ROWS)]
        np.testing.assert_allclose(made[few], model.predict([texts[row] for row in few]), atol=1e-6)
        assert model.predict(iter(texts[:3])).__next__().shape == (8,)
    assert not parts.exists()
    failed = json.loads((folder / "out.failed.jsonl").read_text())
    assert (failed["row"], failed["where"]) == (7, "line 8")


def test_what_is_wrong_is_one_line(folder: Path) -> None:
    (folder / "table.csv").write_text("body\nw1\n")
    column = ("table.csv", "--text", "bodi", "-o", "a.jsonl")
    cases = {
        column: "has no column 'bodi'; it has body; did you mean 'body'?",
        ("none.csv", "-o", "a.jsonl"): "there is no file none.csv; check the path",
        ("table.csv", "--prompt", "query", "-o", "b.jsonl"): "the model has no prompt 'query'",
    }
    found = several([("predict", "words.cw", *args) for args in cases], folder)
    for what, (code, _, errors) in zip(cases.values(), found, strict=True):
        assert code == 2
        (line,) = errors.splitlines()
        assert what in line
