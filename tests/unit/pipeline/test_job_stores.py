"""pipeline.job and .parts on a folder and in an object store alike: leftovers, damaged parts, inputs that change."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corewise.cluster.distributed import record_result, seen_of
from corewise.common.errors import OutputError, SamplesError
from corewise.pipeline import ImageRunner
from corewise.pipeline import job as jobs
from corewise.pipeline.job import Done, Job, check_folder, count_rows, run_job
from corewise.pipeline.outputs import format_of
from corewise.pipeline.parts import Parts
from corewise.pipeline.runner import Rejected
from corewise.records.bulk import BulkResult
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.samples.folders import list_files
from corewise.samples.places import Place, place_of
from corewise.samples.tables import READERS
from corewise.samples.texts import GUESSED

fsspec = pytest.importorskip("fsspec")
BUCKET = "fsspec+memory://bucket"


class Lengths(ImageRunner):
    """Answers each text with its length."""

    def __init__(self) -> None:
        self.pipeline = ImagePipeline(task="vectors", preprocess=Preprocess(), labels=())

    def answers(self, items: Any, ask: Any = None) -> Iterator[Any]:
        for item in items:
            yield Rejected("is empty") if item is None else np.array([len(item)], np.float32)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jobs, "FOLDER_PART_ROWS", 10)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["folder", "store"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a job writes."""
    return tmp_path / "out" if request.param == "folder" else place_of(f"{BUCKET}/out")


def job_of(output: Place, *inputs: Place) -> Job:
    return Job(inputs=inputs, output=output, columns=GUESSED, prompt=None, artifact="a", folder=True)


def texts(folder: Path, count: int) -> Path:
    path = folder / "t.txt"
    path.write_text("".join(f"{'x' * (1 + row % 7)}\n" for row in range(count)))
    return path


def names(output: Place) -> set[str]:
    return {*(path.name for path in output.iterdir())} if isinstance(output, Path) else {*output.names()}


def test_a_part_that_is_made_again_leaves_nothing_of_the_first_attempt(output: Place, tmp_path: Path) -> None:
    """The first one was killed before it was done, and could not read what the second one can, or the other way."""
    job = job_of(output, texts(tmp_path, 2))
    kept, rows = job.kept, list(jobs.records(job))
    kind = format_of(".parquet", Lengths().pipeline)
    good, bad = np.ones(1, np.float32), Rejected("cannot be read")
    with kept.begun(job.facts()):
        for answers in ([good, bad], [good, good], [bad, bad]):
            kept.write(0, kind, list(zip(rows, answers, strict=True)))
            expected = {"_part-000000.done"} | {"part-000000.parquet" for one in answers if one is good}
            expected |= {"_part-000000.failed" for one in answers if one is bad}
            assert {name for name in names(output) if "part-" in name} == expected
            assert [*kept.finished()] == [0]


def test_a_part_of_which_a_file_is_gone_or_damaged_is_made_again(output: Place, tmp_path: Path) -> None:
    job = job_of(output, texts(tmp_path, 55))
    assert run_job(job, Lengths()) == Done(55, 0, 0)
    before = names(output)
    (output / "part-000001.parquet").unlink()

    def write(name: str, text: str) -> None:
        job.kept.replace(output / name, lambda path: path.write_text(text))

    write("_part-000002.done", "{}")
    write("_part-000003.done", '{"rows": ')
    write("_part-000004.done", '{"rows": 5, "failed": 1}')  # a file of rows set aside is missing
    write("_part-of-something-else.done", "")
    write("part-000005.parquet", "half")
    assert [*job.kept.finished()] == [0]
    assert run_job(job, Lengths()) == Done(55, 10, 0)
    assert names(output) == before | {"_part-of-something-else.done"}
    assert [*job.kept.finished()] == [*range(6)]


def test_a_part_whose_second_attempt_was_killed_is_made_a_third_time(output: Place, tmp_path: Path) -> None:
    """The second one could read what the first one could not, and the row would be there answered and set aside."""

    class Killed(Parts):
        def _remove(self, path: Place) -> None:
            if path == self.failed(0):
                raise KeyboardInterrupt
            super()._remove(path)

    job = job_of(output, texts(tmp_path, 2))
    kept, rows = job.kept, list(jobs.records(job))
    kind = format_of(".parquet", Lengths().pipeline)
    good, bad = np.ones(1, np.float32), Rejected("cannot be read")
    with kept.begun(job.facts()):
        kept.write(0, kind, list(zip(rows, [good, bad], strict=True)))
        assert [*kept.finished()] == [0]
        with pytest.raises(KeyboardInterrupt):
            Killed(**vars(kept)).write(0, kind, list(zip(rows, [good, good], strict=True)))
        assert not kept.finished()
        for number in (10**6, 999_999):  # whose names are of different lengths
            kept.write(number, kind, list(zip(rows, [good, good], strict=True)))
        assert [*kept.finished()] == [999_999, 10**6]


@pytest.mark.parametrize("typed", ["in", "in/*.txt", "in/t.txt"])
def test_an_input_in_a_store_that_changes_while_it_is_read(tmp_path: Path, typed: str) -> None:
    def put(count: int) -> None:
        content = texts(tmp_path, count).read_bytes()
        place_of(f"{BUCKET}/in").write_whole("t.txt", lambda path: path.write_bytes(content))

    put(25)
    job = job_of(place_of(f"{BUCKET}/out"), *list_files([f"{BUCKET}/{typed}"], READERS, "texts"))
    with pytest.raises(SamplesError, match="an input has changed while it was read; remove"):
        run_job(job, Lengths(), on_rows=lambda done: put(26) if done.rows == 25 else None)
    put(25)


def test_an_input_in_a_store_is_the_same_however_it_is_named(tmp_path: Path) -> None:
    content = texts(tmp_path, 25).read_bytes()
    place_of(f"{BUCKET}/in").write_whole("t.txt", lambda path: path.write_bytes(content))
    facts = [
        job_of(place_of(f"{BUCKET}/out"), *list_files([f"{BUCKET}/{typed}"], READERS, "texts")).facts()
        for typed in ("in/", "in/*.txt", "in/t.txt", "in//")
    ]
    assert all(one == facts[0] for one in facts)


def test_an_input_that_cannot_be_read_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"none\.txt cannot be read: No such file or directory; check the path"):
        count_rows([tmp_path / "none.txt"])
    (tmp_path / "mem.txt").symlink_to("/proc/self/mem")
    with pytest.raises(SamplesError, match=r"mem\.txt cannot be read: Input/output error"):
        count_rows([tmp_path / "mem.txt"])


def test_an_output_whose_name_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a name in UTF-8; give another name with -o"):
        check_folder(tmp_path / "out\udcff")


def test_nodes_are_asked_for_an_input_of_each_bucket_and_disk() -> None:
    root = Path("/usr/bin")
    found = sorted(path for path in root.iterdir() if path.is_file())[:3]
    links = [Path("/usr/nowhere/a.jpg"), *found, Path("/bin/sh"), Path("/etc/passwd"), Path("/etc/hosts")]
    place_of(f"{BUCKET}/a").write_whole("b.jpg", lambda path: path.write_bytes(b"x"))
    stored = list_files([f"{BUCKET}/a"], (".jpg",), "images")
    expected = (str(found[0]), "/bin/sh", "/etc/passwd", f"{BUCKET}/a/b.jpg")
    assert seen_of([*links, *stored]) == expected


def test_the_result_of_another_version_is_replaced(output: Place, tmp_path: Path) -> None:
    job = job_of(output, texts(tmp_path, 25))
    run_job(job, Lengths())
    result = BulkResult(output=str(output), failed_in=str(output), rows=25, resumed=0, failed=0, wall_s=2.0)
    record_result(job.kept, replace(result, notes=("of the first run",)))
    again = replace(result, resumed=25, wall_s=1.0)
    assert record_result(job.kept, again).notes == ("of the first run",)
    job.kept.replace(output / "_result.json", lambda path: path.write_text('{"rows": 25, "version": "0.9"}'))
    assert record_result(job.kept, again) == again
    if isinstance(output, Path):
        (output / "_result.json").unlink()
        (output / "_result.json").mkdir()
        with pytest.raises(OutputError, match="run the same command: finished parts are kept in"):
            record_result(job.kept, again)
