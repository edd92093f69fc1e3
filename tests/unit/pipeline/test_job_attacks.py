"""pipeline.job against those who want rows lost or doubled: two jobs at once, changing inputs, odd names, leftovers."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pyarrow import dataset

from corewise.artifact import Artifact
from corewise.cluster.bulk import Bulk, _check_apart
from corewise.common.errors import InputError, OutputError, SamplesError
from corewise.pipeline import ImageAsk, ImageRunner
from corewise.pipeline import job as jobs
from corewise.pipeline.job import Done, Job, run_job, writing
from corewise.pipeline.parts import Counts
from corewise.pipeline.runner import Rejected
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.samples.folders import list_files
from corewise.samples.tables import READERS
from corewise.samples.texts import GUESSED

ODD = ["a\nb.txt", "50%20.txt", "grün😀.txt", 'it\'s "b".txt', "c\udcff.txt"]


class Lengths(ImageRunner):
    """Answers each text with its length."""

    def __init__(self) -> None:
        self.pipeline = ImagePipeline(task="vectors", preprocess=Preprocess(), labels=())

    def answers(self, items: Any, ask: Any = None) -> Iterator[Any]:
        for item in items:
            yield Rejected("is empty") if item is None else np.array([len(item)], np.float32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_ROWS", 10)
    monkeypatch.setattr(jobs, "FOLDER_PART_ROWS", 10)


def texts(path: Path, count: int) -> Path:
    path.write_text("".join(f"{'x' * (1 + row % 7)}\n" for row in range(count)))
    return path


def job_of(output: Path, *inputs: Path) -> Job:
    return Job(inputs=inputs, output=output, columns=GUESSED, prompt=None, artifact="a", folder=not output.suffix)


def rows_of(output: Path) -> list[tuple[int, float]]:
    table = dataset.dataset(output).to_table()
    return sorted(zip(table["row"].to_pylist(), (vector[0] for vector in table["vector"].to_pylist()), strict=True))


@pytest.mark.parametrize("name", ["out", "out.parquet"])
def test_two_jobs_into_one_output(tmp_path: Path, name: str) -> None:
    job = job_of(tmp_path / name, texts(tmp_path / "t.txt", 25))
    with job.kept.begun(job.facts()), pytest.raises(OutputError, match="another process writes"):
        run_job(job, Lengths())
    assert run_job(job, Lengths()) == Done(25, 0, 0)


def test_a_folder_is_resumed_wherever_parts_are_missing(tmp_path: Path) -> None:
    job = job_of(tmp_path / "out", texts(tmp_path / "t.txt", 45))
    run_job(job, Lengths())
    before = rows_of(job.file)
    assert before == [(row, 1 + row % 7) for row in range(45)]
    (job.file / "_part-000001.done").unlink()
    (job.file / "_part-000003.done").write_text("")  # a machine that crashed
    (job.file / "part-000003.parquet").write_bytes(b"half")
    (job.file / "_new-0123-part-000001.parquet").write_bytes(b"half")
    assert run_job(job, Lengths()) == Done(45, 25, 0)
    assert rows_of(job.file) == before
    assert not list(job.file.glob("_new-*"))
    os.utime(job.inputs[0], ns=(0, 0))  # another clock
    with pytest.raises(OutputError, match="its inputs or artifact have changed"):
        run_job(job, Lengths())


def test_a_part_that_is_removed_while_the_job_runs_is_missed(tmp_path: Path) -> None:
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path / "t.txt", 25))

    def remove(done: Counts) -> None:
        if done.rows == 25:
            (job.parts / "part-000001.jsonl").unlink()

    with pytest.raises(
        OutputError, match=r"files were removed from .*out\.jsonl\.parts while the job ran; run the same"
    ):
        run_job(job, Lengths(), on_rows=remove)
    assert not job.file.exists()
    assert run_job(job, Lengths()) == Done(25, 15, 0)
    assert len(job.file.read_text().splitlines()) == 25


@pytest.mark.parametrize("end", [lambda path: texts(path, 26), Path.unlink])
def test_an_input_that_changes_while_it_is_read(tmp_path: Path, end: Any) -> None:
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path / "t.txt", 25))
    with pytest.raises(SamplesError, match=r"an input has changed while it was read; remove .*out\.jsonl\.parts"):
        run_job(job, Lengths(), on_rows=lambda done: end(job.inputs[0]) if done.rows == 25 else None)
    assert not job.file.exists()


@pytest.mark.parametrize("name", ["out", "out.jsonl", "out.parquet"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    for odd in ODD:
        texts(tmp_path / "in" / odd, 3)
    found = list_files([tmp_path / "in"], READERS, "texts")
    assert sorted(path.name for path in found) == sorted(ODD)
    assert run_job(job_of(tmp_path / name, *map(Path, map(str, found))), Lengths()) == Done(15, 0, 0)
    if name == "out.jsonl":
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    else:
        rows = dataset.dataset(tmp_path / name).to_table().to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(15))
    assert {Path(row["input"]).name for row in rows} == {*ODD[:-1], "c?.txt"}


def test_inputs_that_are_named_twice_or_are_links(tmp_path: Path) -> None:
    first = texts(tmp_path / "a.txt", 3)
    (tmp_path / "link.txt").symlink_to(first)
    (tmp_path / "below").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path)
    others = (tmp_path / "below" / ".." / "a.txt", tmp_path / "folder" / "a.txt")
    for places in (
        [first, tmp_path],
        [first, str(tmp_path / "*.txt")],
        *([str(first), one] for one in (first, *others)),
    ):
        with pytest.raises(SamplesError, match=r"a\.txt is given twice"):
            list_files(places, READERS, "texts")
    assert len(list_files([tmp_path], READERS, "texts")) == 2


def test_outputs_among_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    path = texts(folder / "a.txt", 1)
    for output in (folder, folder / "out", tmp_path / "link" / "out.parquet"):
        with pytest.raises(OutputError, match="is among the inputs in"):
            _check_apart(output, [folder], [path])
    with pytest.raises(OutputError, match="has inputs in it"):
        _check_apart(folder, [path], [path])
    _check_apart(tmp_path / "into", [folder], [path])


def test_a_header_that_does_not_fit_ends_no_job_in_its_middle(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("text\n" + "x\n" * 30)
    second.write_text("body,title\ny,z\n")
    with pytest.raises(SamplesError, match=r"b\.csv has the columns body, title; say with --text which is the text"):
        run_job(job_of(tmp_path / "out", first, second), Lengths())
    assert not (tmp_path / "out").exists()


def test_what_another_job_left_is_not_taken_for_this_one(tmp_path: Path) -> None:
    source = texts(tmp_path / "t.txt", 5)
    (tmp_path / "out.failed.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match=r"out\.failed\.jsonl exists already; remove it"):
        run_job(job_of(tmp_path / "out.parquet", source), Lengths())
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "_lock").touch()  # of a job that was killed at its very beginning
    assert run_job(job_of(tmp_path / "begun", source), Lengths()) == Done(5, 0, 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-000000.parquet").touch()
    with pytest.raises(OutputError, match="other has files that are not from such a job"):
        run_job(job_of(tmp_path / "other", source), Lengths())


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            PermissionError(13, "Permission denied", "/o/x"),
            "/o/x cannot be written: Permission denied; make it",
        ),
        (OSError(30, "Read-only file system", "/o/x"), "Read-only file system; make it writable, or give another"),
        (
            OSError(28, "No space left on device"),
            "o cannot be written: No space left on device; free space and",
        ),
        (OSError(5, "Input/output error"), "Input/output error; run the same command: finished parts are kept in p"),
    ],
)
def test_a_disk_that_refuses_is_told_with_the_fix(error: OSError, fix: str) -> None:
    with pytest.raises(OutputError, match=fix), writing("o", "p"):
        raise error


class Sizes(Lengths):
    """Answers each text with a vector of its length."""

    def answers(self, items: Any, ask: Any = None) -> Iterator[Any]:
        return (np.zeros(len(item), np.float32) for item in items)


@pytest.mark.parametrize("lengths", [[1, 2], [1] * 10 + [2] * 10])
def test_an_array_holds_answers_of_one_size_only(tmp_path: Path, lengths: list[int]) -> None:
    """In one part, and in two of which each alone is an array."""
    (tmp_path / "t.txt").write_text("".join(f"{'x' * length}\n" for length in lengths))
    with pytest.raises(InputError, match=r"cannot hold answers of several sizes, such as \(2,\) and \(1,\); name it"):
        run_job(job_of(tmp_path / "out.npy", tmp_path / "t.txt"), Sizes())
    assert not (tmp_path / "out.npy").exists()


def test_a_file_that_is_no_tar_ends_no_job_in_its_middle(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(25):
            archive.addfile(tarfile.TarInfo(f"{number}.jpg"))
    (tmp_path / "b.tar").write_bytes(b"<html>")
    job = replace(job_of(tmp_path / "out", tmp_path / "a.tar", tmp_path / "b.tar"), ask=ImageAsk())
    with pytest.raises(SamplesError, match=r"b\.tar is not a readable tar file"):
        run_job(job, Lengths())
    assert not (tmp_path / "out").exists()


def test_a_dry_run_into_another_jobs_output_says_so(tmp_path: Path) -> None:
    job = job_of(tmp_path / "out", texts(tmp_path / "t.txt", 5))
    with job.kept.begun({}):
        pass
    with pytest.raises(OutputError, match="out holds the parts of another job"):
        Bulk(artifact=cast(Artifact, None), job=job, ray=None).outlook()
