"""pipeline.job: files of texts to a file of answers, resumed where they were."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from corewise.common.errors import EngineError, InputError, OutputError, SamplesError
from corewise.pipeline import CallLimits, ImageRunner, TextEncoder, TextRunner
from corewise.pipeline import job as jobs
from corewise.pipeline.answers import ClassAnswer
from corewise.pipeline.job import Done, Job, answered, check_job, count_rows, run_job
from corewise.pipeline.parts import Counts, Record
from corewise.records.pipeline import TextPipeline, TokenInput
from corewise.samples.texts import GUESSED, Columns

WORDS = {word: number for number, word in enumerate(["[UNK]", "red", "blue", "house", "tree"])}


def sums(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A model: the number of tokens, and the sum of their ids."""
    ids, mask = inputs
    return [np.stack([mask.sum(1), (ids * mask).sum(1)], 1).astype(np.float32)]


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    made = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return str(made.to_str()).encode()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_ROWS", 10)


def runner_of(tokenizer: bytes, run: Any = sums, **changes: Any) -> TextRunner:
    inputs = tuple(TokenInput(name=role, dtype="int64", role=role) for role in ("ids", "mask"))
    values: dict[str, Any] = {"task": "vectors", "pooling": "mean", "tokenizer_sha256": "", "inputs": inputs}
    pipeline = TextPipeline(**{**values, "max_length": 8, **changes})
    return TextRunner(TextEncoder(pipeline, tokenizer), run, instances=1, limits=CallLimits(rows=4))


def job_of(output: Path, *inputs: Path, columns: Columns = GUESSED, **changes: Any) -> Job:
    return Job(**{"inputs": inputs, "output": output, "columns": columns, "prompt": None, "artifact": "a", **changes})


def texts(folder: Path, count: int, bad: Sequence[int] = ()) -> Path:
    path = folder / "texts.txt"
    lines = ["null \0 byte" if number in bad else " ".join(["red"] * (1 + number % 5)) for number in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_with_rows_set_aside(tokenizer: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done: list[int] = []
    result = run_job(
        job_of(output, texts(tmp_path, 25, bad=[3, 24])),
        runner_of(tokenizer),
        on_rows=lambda counts: done.append(counts.rows),
    )
    assert (result, done) == (Done(25, 0, 2), [0, 10, 20, 25])
    rows = lines_of(output)
    assert [row["row"] for row in rows] == [row for row in range(25) if row not in (3, 24)]
    assert all(row["vector"] == [1 + row["row"] % 5] * 2 for row in rows)
    failed = lines_of(tmp_path / "out.failed.jsonl")
    assert [(row["row"], row["where"], row["reason"]) for row in failed] == [
        (3, "line 4", "has a null byte at character 5"),
        (24, "line 25", "has a null byte at character 5"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed.jsonl", "out.jsonl", "texts.txt"]


def test_threads_wait_for_each_other_as_before_when_a_job_has_ended(tokenizer: bytes, tmp_path: Path) -> None:
    before_s, seen_s = sys.getswitchinterval(), list[float]()

    def broken(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        seen_s.append(sys.getswitchinterval())
        raise EngineError("broken", "correct it")

    with pytest.raises(EngineError, match="broken"):
        run_job(job_of(tmp_path / "out.jsonl", texts(tmp_path, 4)), runner_of(tokenizer, broken))
    assert seen_s[0] < before_s == sys.getswitchinterval()


def test_rows_are_the_lines_of_a_text_file_empty_ones_too(tokenizer: bytes, tmp_path: Path) -> None:
    lines, output = tmp_path / "lines.txt", tmp_path / "out.npy"
    lines.write_text("red\n\nblue house\n")
    assert run_job(job_of(output, lines), runner_of(tokenizer)) == Done(3, 0, 1)
    np.testing.assert_array_equal(np.load(output), [[1, 1], [np.nan, np.nan], [2, 5]])
    assert [(row["row"], row["reason"]) for row in lines_of(tmp_path / "out.failed.jsonl")] == [(1, "is empty")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".npy"])
def test_an_interrupted_job_resumes_without_doing_a_finished_row_again(
    tokenizer: bytes, tmp_path: Path, suffix: str
) -> None:
    source, output = texts(tmp_path, 65, bad=[0, 30]), tmp_path / f"out{suffix}"
    answered: list[int] = []

    def watched(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        answered.append(len(inputs[0]))
        return sums(inputs)

    for most in (25, 45):

        def stop(done: Counts, most: int = most) -> None:
            if done.rows > most:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_job(job_of(output, source), runner_of(tokenizer, watched), on_rows=stop)
        assert not output.exists()
    answered.clear()
    result = run_job(job_of(output, source), runner_of(tokenizer, watched))
    assert result == Done(65, 50, 2)
    assert sum(answered) == 15
    expected = [[1 + row % 5] * 2 for row in range(65)]
    if suffix == ".npy":
        made = np.load(output)
        assert made.shape == (65, 2)
        assert np.flatnonzero(np.isnan(made[:, 0])).tolist() == [0, 30]
        assert made[[1, 31, 64]].tolist() == [expected[row] for row in (1, 31, 64)]
        return
    rows = lines_of(output) if suffix == ".jsonl" else parquet.read_table(output).to_pylist()
    good = [row for row in range(65) if row not in (0, 30)]
    assert [(row["row"], row["vector"]) for row in rows] == [(row, expected[row]) for row in good]


@pytest.mark.parametrize("existed", [False, True])
def test_a_job_that_does_nothing_leaves_its_name_free(tokenizer: bytes, tmp_path: Path, existed: bool) -> None:
    def broken(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise EngineError("it is broken")

    job = job_of(tmp_path / "out", texts(tmp_path, 25), folder=True)
    if existed:
        (tmp_path / "out").mkdir()
    with pytest.raises(EngineError):
        run_job(job, runner_of(tokenizer, broken))
    assert job.output.exists() == existed
    assert not existed or list((tmp_path / "out").iterdir()) == []
    assert run_job(job_of(job.output, *job.inputs, folder=True, artifact="b"), runner_of(tokenizer)).rows == 25


def test_a_job_that_another_began_is_still_the_others(tmp_path: Path) -> None:
    kept = job_of(tmp_path / "out", texts(tmp_path, 25), folder=True).kept
    with kept.begun({}):
        pass
    with pytest.raises(EngineError), kept.begun({}):
        raise EngineError("it is broken")
    assert kept.same({})


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_job_that_was_killed_while_it_joined_is_finished(
    tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        if not missing_ok:  # what an earlier attempt may have left is not there
            raise KeyboardInterrupt

    job = job_of(tmp_path / "out.jsonl", texts(tmp_path, 25))
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, runner_of(tokenizer))
    monkeypatch.undo()
    assert job.output.exists()
    monkeypatch.setattr(jobs, "PART_ROWS", 10)
    left = job.parts / "new-0123abcd-part-000003.jsonl"
    left.touch()
    monkeypatch.setattr(jobs.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, runner_of(tokenizer))
    assert len(lines_of(job.output)) == 25
    assert not left.exists()


def test_parts_that_were_left_behind_belong_to_no_job(
    tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path, 25))
    with monkeypatch.context() as patched:
        patched.setattr(jobs.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, runner_of(tokenizer))
    assert len(list(job.parts.glob("part-*.done"))) == 3
    with pytest.raises(OutputError, match=r"out\.jsonl exists already"):
        run_job(job, runner_of(tokenizer))
    job.output.unlink()
    assert run_job(job_of(job.output, texts(tmp_path, 5)), runner_of(tokenizer)) == Done(5, 0, 0)
    assert len(lines_of(job.output)) == 5


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_input_whose_name_is_not_utf_8(tokenizer: bytes, tmp_path: Path, suffix: str) -> None:
    first, second = texts(tmp_path, 1), tmp_path / "b\udcff.txt"
    second.write_text("red\n")
    output = tmp_path / f"out{suffix}"
    run_job(job_of(output, first, second), runner_of(tokenizer))
    rows = lines_of(output) if suffix == ".jsonl" else parquet.read_table(output).to_pylist()
    assert [row["input"] for row in rows] == [str(first), str(tmp_path / "b?.txt")]


def test_another_function_or_folder_of_drawings_is_another_job(tmp_path: Path) -> None:
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path, 1))
    others = [replace(job, preprocess="a.py:f"), replace(job, drawings=tmp_path / "drawn")]
    assert all(other.facts() != job.facts() for other in others)


def test_checking_a_job_makes_no_folder_of_drawings(tmp_path: Path) -> None:
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path, 1), drawings=tmp_path / "drawn")
    check_job(job)
    assert not (tmp_path / "drawn").exists()
    for folder, why in ((job.inputs[0], "it is a file"), (tmp_path / "none" / "drawn", "there is no folder")):
        with pytest.raises(OutputError, match=f"cannot be made: {why}.*; give another folder with --draw"):
            check_job(replace(job, drawings=folder))


def test_a_drawing_has_a_name_that_every_file_system_takes(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    answer = ClassAnswer(label="a", probability=1.0, probabilities={"a": 1.0})

    class Same(ImageRunner):
        def __init__(self) -> None:
            pass

        def answers(self, items: Any, ask: Any = None) -> Any:
            return (answer for _ in items)

    names = ["\\x:\n\udcff*.jpg", f"{'a' * 300}.jpg"]
    rows = [Record(row, f"photos.tar/{name}", "", photo.read_bytes(), "") for row, name in enumerate(names)]
    list(answered(rows, Same(), prompt=None, ask=None, drawings=tmp_path))
    assert {path.name for path in tmp_path.glob("0*")} == {"000000-_x____.jpg", f"000001-{'a' * 60}.jpg"}


def test_parts_of_another_job_are_no_parts_of_this_one(tokenizer: bytes, tmp_path: Path) -> None:
    source, output = texts(tmp_path, 25), tmp_path / "out.jsonl"

    def stop(done: Counts) -> None:
        if done.rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job_of(output, source), runner_of(tokenizer), on_rows=stop)
    with pytest.raises(OutputError, match=r"out\.jsonl\.parts holds the parts of another job"):
        run_job(job_of(output, source, artifact="b"), runner_of(tokenizer))
    source.write_text("red\n")
    with pytest.raises(OutputError, match="its inputs or artifact have changed"):
        run_job(job_of(output, source), runner_of(tokenizer))


def test_several_inputs_and_columns(tokenizer: bytes, tmp_path: Path) -> None:
    table, lines = tmp_path / "a.csv", tmp_path / "b.jsonl"
    table.write_text('name,body\nx,red tree\ny,"broken\nz\n')
    lines.write_text('{"body": "blue"}\n{"body": 3}\n')
    output = tmp_path / "out.parquet"
    result = run_job(job_of(output, table, lines, columns=Columns("body")), runner_of(tokenizer))
    assert result.rows == 5
    group = parquet.read_metadata(output).row_group(0)
    assert [group.column(k).has_dictionary_page for k in range(3)] == [True, True, False]
    assert [(row["row"], row["input"], row["vector"]) for row in parquet.read_table(output).to_pylist()] == [
        (0, str(table), [2.0, 5.0]),
        (3, str(lines), [1.0, 2.0]),
    ]
    reasons = [(row["row"], row["reason"]) for row in lines_of(tmp_path / "out.failed.jsonl")]
    assert reasons == [
        (1, "is not CSV: unexpected end of data"),
        (2, "is not CSV: unexpected end of data"),
        (4, "has a body that is 3, which is not a text"),
    ]
    with pytest.raises(SamplesError, match="has no column 'bodi'"):
        run_job(job_of(tmp_path / "c.jsonl", table, columns=Columns("bodi")), runner_of(tokenizer))


def test_classes_and_pairs(tokenizer: bytes, tmp_path: Path) -> None:
    table, output = tmp_path / "pairs.csv", tmp_path / "out.parquet"
    table.write_text("question,answer,label\nred,blue,\ntree,house,\n")
    facts = {"task": "classes", "labels": ("few", "many"), "activation": "softmax", "pairs": True}
    run_job(job_of(output, table, columns=Columns("question", "answer")), runner_of(tokenizer, **facts))
    first = parquet.read_table(output).to_pylist()[0]
    assert (first["row"], first["label"]) == (0, "many")
    assert first["probabilities"]["many"] == pytest.approx(1 / (1 + np.exp(-1)))
    with pytest.raises(InputError, match=r"out\.npy cannot hold classes with their probabilities; name it"):
        run_job(job_of(tmp_path / "out.npy", table), runner_of(tokenizer, **facts))


@pytest.mark.parametrize(
    ("output", "source", "what"),
    [
        ("out.csv", "texts.txt", r"out\.csv does not say the format; end it with \.parquet, \.jsonl or \.npy"),
        ("none/out.jsonl", "texts.txt", "there is no folder"),
        ("old.jsonl", "texts.txt", r"old\.jsonl exists already"),
        ("out.jsonl", "none.txt", r"there is no file .*none\.txt"),
        ("out.jsonl", "photo.jpg", r"photo\.jpg is not a file of texts; give one of \.txt, \.csv"),
        ("out.jsonl", "empty.txt", r"there are no rows in .*empty\.txt"),
    ],
)
def test_wrong_jobs(tokenizer: bytes, tmp_path: Path, output: str, source: str, what: str) -> None:
    texts(tmp_path, 3)
    for name in ("old.jsonl", "photo.jpg", "empty.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=what):
        run_job(job_of(tmp_path / output, tmp_path / source), runner_of(tokenizer))
    assert not (tmp_path / f"{output}.parts").exists()


def test_rows_are_counted_for_the_progress_bar(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("text\nred\nblue\n")
    assert count_rows([texts(tmp_path, 7), table]) == 9
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(SamplesError, match=r"is not a Parquet file: .*; write it with pyarrow or pandas"):
        count_rows([broken])


def test_a_name_in_capitals_says_its_format_too(tokenizer: bytes, tmp_path: Path) -> None:
    source = texts(tmp_path, 12)
    for name in ("a.NPY", "b.JSONL", "c.PARQUET"):
        assert run_job(job_of(tmp_path / name, source), runner_of(tokenizer)) == Done(12, 0, 0)
    assert np.load(tmp_path / "a.NPY").shape == (12, 2)


def test_large_answers_are_in_small_parts(tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_BYTES", 100)
    done: list[int] = []
    job = job_of(tmp_path / "out.jsonl", texts(tmp_path, 7), answer_bytes=30)
    run_job(job, runner_of(tokenizer), on_rows=lambda counts: done.append(counts.rows))
    assert done == [0, 3, 6, 7]
    assert [replace(job, answer_bytes=size).part_rows for size in (0, 5, 1000)] == [10, 10, 1]


@pytest.mark.parametrize(
    ("facts", "answer"),
    [
        ({}, {"vector": [None, 2.0, None]}),
        (
            {"task": "classes", "labels": ("a", "b", "c")},
            {"label": "a", "probability": None, "probabilities": {"a": None, "b": 2.0, "c": None}},
        ),
    ],
)
def test_numbers_that_json_has_not_are_null(
    tokenizer: bytes, tmp_path: Path, facts: dict[str, Any], answer: dict[str, Any]
) -> None:
    def wild(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.array([[np.nan, 2.0, -np.inf]] * len(inputs[0]), np.float32)]

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    output = tmp_path / "out.jsonl"
    run_job(job_of(output, texts(tmp_path, 2)), runner_of(tokenizer, wild, **facts))
    rows = [json.loads(line, parse_constant=refuse) for line in output.read_text().splitlines()]
    assert rows == [{"row": row, **answer} for row in range(2)]


def test_a_folder_that_is_named_as_partitions_are_adds_no_column(tokenizer: bytes, tmp_path: Path) -> None:
    output = tmp_path / "lang=en" / "out.parquet"
    output.parent.mkdir()
    run_job(job_of(output, texts(tmp_path, 12)), runner_of(tokenizer))
    assert parquet.read_schema(output).names == ["row", "vector"]
