"""samples: texts, pairs and tokens as people store them."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BatchEncoding, PreTrainedTokenizerFast

from corewise.common import nested
from corewise.common.errors import MissingExtra, SamplesError
from corewise.samples import RawSamples, Samples, UnreadableItem, from_python, raw_from_python, read, read_raw, tables
from corewise.samples.tables import iterate_table
from corewise.samples.texts import MOST_CHARACTERS

ROWS = [("a man plays", "a man is playing", 4.5), ("two dogs", "a cat", 0.5), ('he said "no", twice', "über 写真", 3.0)]


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SamplesError) as caught:
        function(*args, **kwargs)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raw(*args: Any, **kwargs: Any) -> RawSamples:
    samples = read_raw(*args, **kwargs)
    assert isinstance(samples, RawSamples)
    return samples


def labels_of(samples: Samples | RawSamples) -> list[Any]:
    assert samples.labels is not None
    return list(samples.labels.tolist())


def lengths(text: Any) -> np.ndarray:
    """Stands for a tokenizer."""
    return np.array([len(word) for part in ([text] if isinstance(text, str) else text) for word in part.split()])


# Files


def write_table(path: Path, rows: list[tuple[Any, ...]], names: tuple[str, ...]) -> Path:
    if path.suffix == ".parquet":
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix in (".jsonl", ".ndjson"):
        lines = (json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in (names, *rows)), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=";" if "semicolon" in path.name else ",").writerows([names, *rows])
    return path


@pytest.mark.parametrize("name", ["t.csv", "semicolon.csv", "t.tsv", "t.jsonl", "t.ndjson", "t.parquet", "T.CSV"])
def test_every_table_gives_the_same_texts_pairs_and_labels(tmp_path: Path, name: str) -> None:
    path = str(write_table(tmp_path / name, ROWS, ("left", "right", "score")))
    texts = raw(path, text="left", label="score")
    assert (texts.kind, list(texts.items)) == ("text", [row[0] for row in ROWS])
    assert labels_of(texts) == [4.5, 0.5, 3.0]
    pairs = raw(path, text="left", pair="right")
    assert (pairs.kind, list(pairs.items), pairs.labels) == ("pair", [row[:2] for row in ROWS], None)
    first = {"t.jsonl": "line 1", "t.ndjson": "line 1", "t.parquet": "row 0"}.get(name, "line 2")
    assert pairs.describe(0) == f"sample 0 ({first})"
    assert pairs.fingerprint != texts.fingerprint
    assert raw(path, text="left", pair="right").fingerprint == pairs.fingerprint
    tensors = read(path, text="left", label="score", tensorize=lengths)
    assert labels_of(tensors) == [4.5, 0.5, 3.0]
    assert tensors.describe(1) == texts.describe(1)


def test_columns_are_found_where_they_have_their_usual_names(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", [("x", 1), ("y", 0)], ("sentence", "label"))
    assert labels_of(raw(str(path))) == [1, 0]
    path = write_table(tmp_path / "b.csv", [(7, "x"), (8, "y")], ("id", "text"))
    assert (list(raw(str(path)).items), raw(str(path)).labels) == (["x", "y"], None)
    path = write_table(tmp_path / "c.csv", [("x",), ("y",)], ("review",))
    assert list(raw(str(path)).items) == ["x", "y"]
    path = write_table(tmp_path / "e.csv", [("x",), ("y",)], ("How was it?",))
    assert list(raw(str(path), text="How was it?").items) == ["x", "y"]
    path = write_table(tmp_path / "d.csv", ROWS, ("left", "right", "score"))
    assert "has the columns left, right, score; say with --text which is the text" in error_of(raw, str(path))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_a_column_that_was_named_for_something_else_is_not_taken_for_the_text(tmp_path: Path, name: str) -> None:
    path = str(write_table(tmp_path / name, [("q", "d", 1), ("r", "e", 0)], ("query", "text", "label")))
    pairs = raw(path, pair="text")
    assert (pairs.kind, list(pairs.items), labels_of(pairs)) == ("pair", [("q", "d"), ("r", "e")], [1, 0])
    assert "has the columns query, text, label; say with --text which is the text" in error_of(raw, path, label="text")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
@pytest.mark.parametrize("role", ["text", "pair", "label"])
def test_a_column_that_is_not_there_is_named_with_a_near_one(tmp_path: Path, name: str, role: str) -> None:
    path = write_table(tmp_path / name, ROWS, ("sentence", "sentence2", "score"))
    message = error_of(raw, str(path), **{"text": "sentence", role: "scores"})
    assert "has no column 'scores'; it has sentence, sentence2, score; did you mean 'score'?" in message


LABELS: dict[str, tuple[list[Any], list[Any], Any]] = {
    "classes": ([0, 2, 1], [0, 2, 1], np.int64),
    "scores": ([0.5, 2, 1], [0.5, 2.0, 1.0], np.float64),
    "names": (["pos", "neg", "pos"], ["pos", "neg", "pos"], object),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_labels_are_numbers_or_names(tmp_path: Path, name: str, kind: str) -> None:
    labels, expected, dtype = LABELS[kind]
    rows = list(zip("abc", labels, strict=True))
    if name == "t.parquet":
        rows = [(text, float(label) if kind == "scores" else label) for text, label in rows]
    samples = raw(str(write_table(tmp_path / name, rows, ("text", "label"))))
    assert labels_of(samples) == expected
    assert samples.labels is not None
    assert samples.labels.dtype == dtype


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_a_label_for_each_token(tmp_path: Path, name: str) -> None:
    rows = [("a b", [0, 1]), ("a b c", [0, 1, 2]), ("a", [0])]
    samples = read(str(write_table(tmp_path / name, rows, ("text", "label"))), tensorize=lengths)
    assert samples.labels is not None
    assert [label.tolist() for label in samples.labels] == [[0, 1], [0, 1, 2], [0]]


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes('\ufefffirst\r\n\n  \n\u2028 one line\nlast, "quoted"\ttab'.encode())
    samples = raw(str(path))
    assert list(samples.items) == ["first", "\u2028 one line", 'last, "quoted"\ttab']
    assert [samples.describe(row) for row in range(3)] == [
        "sample 0 (line 1)",
        "sample 1 (line 4)",
        "sample 2 (line 5)",
    ]
    assert "has lines but no columns" in error_of(raw, str(path), text="text")


def test_jsonl_may_hold_strings(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('"one"\n\n"two"\n')
    assert list(raw(str(tmp_path / "t.jsonl")).items) == ["one", "two"]


def test_quoted_fields_hold_lines_and_commas(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"one,\ntwo",1\n"""three""",0\n\n')
    samples = raw(str(tmp_path / "t.csv"))
    assert list(samples.items) == ["one,\ntwo", '"three"']
    assert samples.names == ["line 2", "line 4"]


# Rows that cannot be used


GOOD = [f"text {number}" for number in range(30)]

BAD: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8 in .txt": ("t.txt", b"caf\xe9", "is not UTF-8 at character 3"),
    "invalid UTF-8 in .csv": ("t.csv", b"caf\xe9,1", "has a text that is not UTF-8 at character 3"),
    "invalid UTF-8 in .jsonl": ("t.jsonl", b'{"text": "\xff", "label": 1}', "is not UTF-8 at character 10"),
    "lone surrogate": ("t.jsonl", b'{"text": "x \\ud83d", "label": 1}', "has a text that has half of a surrogate pair"),
    "null byte in .txt": ("t.txt", b"a\0b", "has a null byte at character 1"),
    "null byte in .csv": ("t.csv", b"a\0b,1", "has a text that has a null byte at character 1"),
    "10 MB in .txt": ("t.txt", b"x" * 10_000_000, "has 10,000,000 characters, but at most 1,000,000 are allowed"),
    "2 MB in .csv": ("t.csv", b"x" * 2_000_000 + b",1", "has a text that has 2,000,000 characters"),
    "10 MB in .csv": ("t.csv", b"x" * 10_000_000 + b",1", "is not CSV: field larger than field limit"),
    "empty text": ("t.csv", b",1", "has a text that is empty"),
    "blank text": ("t.tsv", b"  \t1", "has a text that is empty"),
    "too many fields": ("t.csv", b"a,b,1", "has 3 fields where the header has 2"),
    "too few fields": ("t.tsv", b"a", "has 1 fields where the header has 2"),
    "half a quote": ("t.csv", b'"a" b,1', "is not CSV: ',' expected after '\"'"),
    "no JSON": ("t.jsonl", b"{text: 1}", "is not JSON: Expecting property name"),
    "no object": ("t.jsonl", b"[1, 2]", "is not a JSON object"),
    "no text": ("t.jsonl", b'{"text": 5, "label": 1}', "has a text that is 5, which is not a text"),
    "no key": ("t.jsonl", b'{"label": 1}', "has a text that is None, which is not a text"),
    "no label": ("t.csv", b"a,", "has no label"),
    "label of another kind": ("t.csv", b"a,good", "has the label 'good', which is not a number"),
    "NaN for a label": ("t.csv", b"a,nan", "has the label nan, which is not a number"),
}


def good_lines(suffix: str) -> list[bytes]:
    lines = {
        ".txt": list(GOOD),
        ".csv": ["text,label", *(f"{text},1" for text in GOOD)],
        ".tsv": ["text\tlabel", *(f"{text}\t1" for text in GOOD)],
        ".jsonl": [json.dumps({"text": text, "label": 1}) for text in GOOD],
    }[suffix]
    return [line.encode() for line in lines]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_set_aside_and_many_are_an_error(tmp_path: Path, kind: str) -> None:
    name, line, problem = BAD[kind]
    path = tmp_path / name
    lines = good_lines(path.suffix)
    path.write_bytes(b"\n".join([*lines[:10], line, *lines[10:]]))
    samples = raw(str(path))
    assert list(samples.items) == GOOD
    assert len(samples.notes) == 1
    assert samples.notes[0].startswith(f"1 of 31 texts was set aside: line 11 {problem}")
    path.write_bytes(b"\n".join([*lines[:10], *[line] * 5, *lines[10:]]))
    message = error_of(raw, str(path))
    assert f"5 of 35 texts in {path} cannot be used: line 11 {problem}" in message
    assert "and 2 more" in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("", "has no label"),
        ("nan", "has the label nan, which is not a number"),
        ("1e999", "has the label inf, which is not a number"),
    ],
)
def test_a_first_label_that_is_none_condemns_no_others(tmp_path: Path, label: str, problem: str) -> None:
    rows = [("first", label), *((f"text {number}", number % 2) for number in range(20))]
    samples = raw(str(write_table(tmp_path / "t.csv", rows, ("text", "label"))))
    assert samples.notes == (f"1 of 21 texts was set aside: line 2 {problem}",)
    assert labels_of(samples) == [number % 2 for number in range(20)]


def test_a_label_of_hundreds_of_digits_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [("a", "1" * 400), ("b", "2" * 400)], ("text", "label"))
    assert "the label of sample 0 (line 2)" in error_of(raw, str(path))


def test_an_unclosed_quote_is_a_problem_of_every_line_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    lines = good_lines(".csv")
    path.write_bytes(b"\n".join([*lines[:29], b'"open,1', *lines[29:]]))
    assert (
        raw(str(path)).notes[0].startswith("3 of 31 texts were set aside: line 30 is not CSV: unexpected end of data")
    )
    path.write_bytes(b"\n".join([*lines[:10], b'"open,1', *lines[10:]]))
    assert "22 of 31 texts in" in error_of(raw, str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "there are no samples in"),
        ("t.txt", b"\n\n", "there are no samples in"),
        ("t.csv", b"", "t.csv is empty; give a header and rows"),
        ("t.csv", b"text,label\n", "there are no samples in"),
        ("t.tsv", b"\n\n", "t.tsv is empty"),
        ("t.jsonl", b"", "there are no samples in"),
        ("t.parquet", b"", "t.parquet is not a Parquet file"),
        ("t.parquet", b"PAR1 nothing PAR1", "t.parquet is not a Parquet file"),
        ("t.txt", "text".encode("utf-16"), "t.txt is UTF-16; save it as UTF-8"),
        ("t.csv", "text,label\na,1\n".encode("utf-16"), "t.csv is UTF-16"),
        ("t.csv", "text,label\na,1\n".encode("utf-16-le"), "t.csv is UTF-16"),
        ("t.jsonl", b'[\n{"text": "a"}\n]\n', "t.jsonl is one JSON list; write each of its objects on a line"),
        ("t.jsonl", b'[{"text": "a"}, {"text": "b"}]', "t.jsonl is one JSON list; write each of its objects on a line"),
        ("t.csv", b"It is a very good film\nbad\n", "has the column 'It is a very good film', which reads like a text"),
        ("t.tsv", b"Good film!\nbad\n", "reads like a text; put a line with the columns' names before it"),
        ("t.txt", bytes(range(256)) * 9, "texts in"),
        ("t.jsonl", b"[" * 100_000, "is not JSON"),
    ],
)
def test_files_without_texts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in error_of(raw, str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tabs.csv", b"text\tlabel\na man, who plays\t1\n"),
        ("bars.csv", b"text|label\na man, who plays|1\n"),
        ("semicolons.csv", b'"text";"label, or score"\n"a man, who plays";1\n'),
        ("bom.csv", b'\xef\xbb\xbftext,label\n"a man, who plays",1\n'),
        ("later.jsonl", b'{"id": 7}\n{"text": "a man, who plays", "label": 1}\n'),
        ("more.jsonl", b'{"body": "a man, who plays"}\n{"body": "", "lang": "en"}\n'),
        ("unused.csv", b'note,text,note\nx,"a man, who plays",y\n'),
    ],
)
def test_tables_as_other_programs_write_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [item.value for item in iterate_table(tmp_path / name) if not item.problem] == ["a man, who plays"]


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,text,label\nfirst,second,1\n")
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        assert error_of(raw, str(tmp_path / name)).endswith(" has the column text twice; rename one of them")


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_labels_that_are_not_used_may_be_there_twice(tmp_path: Path, name: str) -> None:
    names = ["body", "label", "label"]
    if name == "t.parquet":
        parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=names), tmp_path / name)
    else:
        write_table(tmp_path / name, [("a", "b", "c")], names)
    assert [item.value for item in iterate_table(tmp_path / name, samples=False)] == ["a"]
    assert error_of(raw, str(tmp_path / name)).endswith(" has the column label twice; rename one of them")


def test_a_header_of_any_width_makes_a_short_message(tmp_path: Path) -> None:
    names = ["te\nxt", "x" * 100, *(f"c{number}" for number in range(100_000))]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, ["a"] * len(names)])
    for options in ({}, {"text": "c99999x"}):
        said = error_of(raw, str(tmp_path / "t.csv"), **options)
        assert len(said) < 500
        assert f"te xt, {'x' * 40}, c0," in said
        assert "c17 and 99,982 more" in said


def test_parquet_cells_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    invalid = pyarrow.array([*(text.encode() for text in GOOD), b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": invalid}), path)
    assert raw(str(path)).notes == ("1 of 31 texts was set aside: row 30 is not UTF-8 at byte 3",)
    parquet.write_table(pyarrow.table({"text": [*GOOD, None]}), path)
    assert raw(str(path)).notes == ("1 of 31 texts was set aside: row 30 has a text that is None, which is not a text",)
    parquet.write_table(pyarrow.table({"text": pyarrow.array(GOOD).dictionary_encode()}), path)
    assert list(raw(str(path)).items) == GOOD


def test_parquet_needs_pyarrow_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "t.parquet", [("a",)], ("text",))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'pyarrow'; pip install 'corewise\[parquet\]'"):
        raw(str(path))


def test_missing_files_and_columns_of_what_has_none(tmp_path: Path) -> None:
    assert "there is no file" in error_of(raw, str(tmp_path / "t.csv"))
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    assert "has no columns of texts" in error_of(read_raw, str(tmp_path / "a.npz"), text="x")
    assert "has no columns of texts" in error_of(read_raw, str(tmp_path), label="x")
    path = write_table(tmp_path / "t.csv", ROWS, ("text", "right", "score"))
    assert f"there are texts in {path}; give a model that brings its tokenizer" in error_of(read, str(path))
    os.mkfifo(tmp_path / "pipe.csv")
    assert "there is no file" in error_of(raw, str(tmp_path / "pipe.csv"))


written = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=40)
@given(st.lists(written, min_size=1, max_size=10))
def test_what_the_csv_module_writes_is_read(tmp_path_factory: Any, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_table(path, [(text, 0) for text in texts], ("text", "label"))
    assert list(raw(str(path)).items) == texts


@settings(max_examples=60)
@given(st.binary(max_size=300), st.sampled_from([".txt", ".csv", ".tsv", ".jsonl", ".parquet"]))
def test_any_bytes_are_texts_or_a_message(tmp_path_factory: Any, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"t{suffix}"
    path.write_bytes(content)
    with suppress(SamplesError):
        for text in raw(str(path)).items:
            assert text.strip()
            text.encode()


def test_the_process_keeps_its_limit_on_csv_fields(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    write_table(tmp_path / "t.csv", [("x" * 500_000, 1), ("y", 1)], ("text", "label"))
    assert len(raw(str(tmp_path / "t.csv")).items[0]) == 500_000
    assert csv.field_size_limit() == limit


# Many


MEMORY = """
import sys
from corewise.samples import read_raw
samples = read_raw(sys.argv[1])
print(len(samples), samples.notes[0], open("/proc/self/status").read().split("VmHWM:")[1].split()[0], sep="|")
"""


def test_two_thousand_of_many_lines_are_drawn_and_held(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with path.open("w") as file:
        for number in range(30_000):
            file.write(f"{number} " + "word " * 500 + "\n")
    output = subprocess.check_output([sys.executable, "-c", MEMORY, str(path)], text=True)
    count, note, kib = output.split("|")
    assert (int(count), note) == (2000, "2,000 of 30,000 texts were drawn with seed 0")
    assert int(kib) < 80_000, "75 MB of text are not held"
    assert list(raw(str(path), max_samples=5, seed=1).items) != list(raw(str(path), max_samples=5, seed=2).items)
    again = raw(str(path), max_samples=5, seed=1)
    assert [text.split()[0] for text in again.items] == [str(number) for number in again.numbers.tolist()]  # type: ignore[union-attr]


def test_rows_can_be_read_as_they_come(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [("a", 1), ("", 1), ("b", 0)], ("text", "label"))
    rows = list(iterate_table(path))
    assert [(row.number, row.name, row.value, row.problem) for row in rows] == [
        (0, "line 2", "a", ""),
        (1, "line 3", "", "has a text that is empty"),
        (2, "line 4", "b", ""),
    ]


@pytest.mark.parametrize(("name", "text"), [("t.txt", "red"), ("t.jsonl", '{"text": "red"}')])
def test_a_line_without_an_end_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setattr(tables, "MOST_LINE_CHARACTERS", MOST_CHARACTERS + 1)
    path = tmp_path / name
    path.write_text("x" * (5 * MOST_CHARACTERS) + f"\n{text}\n" + "x" * (2 * MOST_CHARACTERS + 2))
    first, second, third = iterate_table(path)
    assert (second.name, second.value, second.problem) == ("line 2", "red", "")
    assert first.problem.startswith("has ")
    assert third.problem.startswith("has ")
    assert "x" * 100 not in first.problem
    assert len(first.value or "") <= MOST_CHARACTERS + 1


# Python objects


def generated() -> Iterator[tuple[str, int]]:
    yield "a", 1
    yield "b", 0


@pytest.mark.parametrize(
    "texts",
    [
        [("a", 1), ("b", 0)],
        [["a", 1], ["b", 0]],
        generated(),
        [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
        [{"sentence": "a", "labels": 1, "idx": 0}, {"sentence": "b", "labels": 0, "idx": 1}],
        {"text": ["a", "b"], "label": [1, 0]},
        {"inputs": ["a", "b"], "labels": np.array([1, 0])},
        pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]}),
        pyarrow.table({"text": ["a", "b"], "label": [1, 0]}),
    ],
)
def test_texts_with_labels(texts: Any) -> None:
    samples = raw_from_python(texts)
    assert isinstance(samples, RawSamples)
    assert (samples.kind, list(samples.items), labels_of(samples)) == ("text", ["a", "b"], [1, 0])


def test_a_column_of_a_table_may_have_numbers_of_its_own() -> None:
    table = pandas.DataFrame({"text": ["a", "b", "c"], "label": [1, 0, 1]})
    for column in (table[table.label == 1]["text"], pyarrow.chunked_array([["a"], ["c"]])):
        samples = raw_from_python(column, max_samples=2)
        assert isinstance(samples, RawSamples)
        assert list(samples.items) == ["a", "c"]


SHUFFLED = pandas.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 2]}).iloc[[2, 0, 1]]


@pytest.mark.parametrize(
    "columns",
    [
        {"text": SHUFFLED.text, "label": SHUFFLED.label},
        {"text": SHUFFLED.text, "label": SHUFFLED.label.to_numpy()},
        {"inputs": SHUFFLED.text, "labels": SHUFFLED.label},
        {"inputs": np.array(["c", "a", "b"]), "labels": [2, 0, 1]},
        {"text": pyarrow.chunked_array([["c"], ["a", "b"]]), "label": pyarrow.array([2, 0, 1])},
    ],
)
def test_columns_in_a_dict_are_in_their_own_order(columns: Any) -> None:
    samples = raw_from_python(columns)
    assert isinstance(samples, RawSamples)
    assert (list(samples.items), labels_of(samples)) == (["c", "a", "b"], [2, 0, 1])


def test_columns_of_tokens_in_a_dict_are_in_their_own_order() -> None:
    tokens = pandas.Series([[2, 3], [4]], index=[1, 0])
    samples = from_python({"input_ids": tokens, "labels": np.array([5, 6])})
    assert (ids_of(samples), labels_of(samples)) == ([[2, 3], [4]], [5, 6])


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0]], [np.array([0, 1]), np.array([1])], np.array([[0, 1], [1, 0]])])
def test_labels_that_are_arrays_beside_texts(labels: Any) -> None:
    samples = raw_from_python({"text": ["a", "b"], "label": labels})
    assert isinstance(samples, RawSamples)
    assert [label.tolist() for label in samples.labels] == [list(label) for label in labels]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pairs", "options", "labels"),
    [
        ([("a", "b"), ("c", "d")], {}, None),
        ([["a", "b"], ["c", "d"]], {}, None),
        ([(("a", "b"), 0.5), (("c", "d"), 1.0)], {}, [0.5, 1.0]),
        ([(["a", "b"], 1), (["c", "d"], 2)], {}, [1, 2]),
        ({"inputs": [("a", "b"), ("c", "d")], "labels": [1, 2]}, {}, [1, 2]),
        ({"inputs": [("a", "b"), ("c", "d")]}, {}, None),
        (
            [{"q": "a", "p": "b", "s": 1}, {"q": "c", "p": "d", "s": 2}],
            {"text": "q", "pair": "p", "label": "s"},
            [1, 2],
        ),
    ],
)
def test_pairs(pairs: Any, options: dict[str, str], labels: Any) -> None:
    samples = raw_from_python(pairs, **options)
    assert isinstance(samples, RawSamples)
    assert (samples.kind, list(samples.items)) == ("pair", [("a", "b"), ("c", "d")])
    assert (None if samples.labels is None else samples.labels.tolist()) == labels


def test_pairs_become_single_texts_in_groups() -> None:
    samples = raw_from_python([(("a", "b"), 0.5), (("c", "d"), 1.0)])
    assert isinstance(samples, RawSamples)
    singles = samples.singles()
    assert (singles.kind, list(singles.items)) == ("text", ["a", "b", "c", "d"])
    assert singles.groups is not None
    assert (singles.groups.tolist(), labels_of(singles)) == ([0, 0, 1, 1], [0.5, 0.5, 1, 1])
    assert singles.describe(3) == "sample 1"
    tensors = singles.tensors(lengths)
    assert tensors.groups is not None
    assert tensors.groups.tolist() == [0, 0, 1, 1]
    assert singles.singles() is singles


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize("form", ["texts", "labelled", "rows", "table"])
def test_a_first_text_that_is_missing_is_one_bad_text(form: str, missing: Any) -> None:
    texts = [missing, *GOOD]
    forms: dict[str, Any] = {
        "texts": texts,
        "labelled": [(text, 1) for text in texts],
        "rows": [{"text": text, "label": 1} for text in texts],
        "table": pandas.DataFrame({"text": texts, "label": 1}),
    }
    samples = raw_from_python(forms[form])
    assert isinstance(samples, RawSamples)
    assert list(samples.items) == GOOD
    assert samples.notes[0].startswith("1 of 31 texts was set aside: sample 0 ")


def test_an_array_of_pairs_and_rows_whose_columns_have_other_names() -> None:
    pairs = raw_from_python(np.array([["a", "b"], ["c", "d"]]))
    assert isinstance(pairs, RawSamples)
    assert (pairs.kind, list(pairs.items)) == ("pair", [("a", "b"), ("c", "d")])
    rows = raw_from_python([{"review": "a", "label": 1}, {"review": "b", "label": 0}])
    assert isinstance(rows, RawSamples)
    assert (list(rows.items), labels_of(rows)) == (["a", "b"], [1, 0])
    message = error_of(raw_from_python, [{"title": "a", "review": "b", "label": 1}] * 2)
    assert "python has the columns title, review, label; name the text's column 'text', or give" in message


def test_labels_that_begin_late_are_not_left_unused() -> None:
    message = error_of(raw_from_python, [{"text": "a"}, {"text": "b", "label": 1}])
    assert "sample 1 of python has a label, but the first one has none; give a label for each" in message


def test_plain_texts_are_drawn_too() -> None:
    samples = raw_from_python(GOOD, max_samples=4, seed=2)
    assert isinstance(samples, RawSamples)
    assert [GOOD.index(text) for text in samples.items] == samples.numbers.tolist()  # type: ignore[union-attr]
    assert raw_from_python(GOOD).draw(4, 2).fingerprint == samples.fingerprint
    assert raw_from_python(iter(GOOD), max_samples=4, seed=2).fingerprint == samples.fingerprint


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "1 of 2 texts in python cannot be used: sample 1 is empty"),
        (["a", "x\0"], "sample 1 has a null byte at character 1"),
        (["a", "\ud800"], "sample 1 has half of a surrogate pair at character 0"),
        (["a", "x" * (MOST_CHARACTERS + 1)], "sample 1 has 1,000,001 characters, but at most 1,000,000 are allowed"),
        (["a", 3], "sample 1 is 3, which is not a text"),
        (["a", ("b", "c")], "sample 1 is ('b', 'c'), which is not a text"),
        ([("a", "b"), "c"], "sample 1 is 'c', not a pair of texts"),
        ([("a", "b"), ("c", "")], "sample 1 has a text that is empty"),
        ([("a", 1), ("b", None)], "sample 1 of python has no label"),
        (
            [["a"], ["b"]],
            "sample 0 of python is ['a']; give a text, (text, label), (text, text) or ((text, text), label)",
        ),
        ([("a", "b", 1)] * 2, "sample 0 of python is ('a', 'b', 1); give a text"),
        ([{"text": "a", "n": 1}, {"text": 5, "n": 1}], "sample 1 has a text that is 5, which is not a text"),
    ],
)
def test_bad_texts_are_named(texts: Any, message: str) -> None:
    assert message in error_of(raw_from_python, texts)


def test_a_column_of_a_dict_that_is_not_there() -> None:
    message = error_of(raw_from_python, [{"text": "a", "score": 1}], label="scores")
    assert "python has no column 'scores'; it has text, score; did you mean 'score'?" in message


def test_a_function_may_return_texts(tmp_path: Path) -> None:
    (tmp_path / "my_texts.py").write_text("def made():\n    return ['one', 'two two']\n")
    samples = read(f"{tmp_path}/my_texts.py:made", tensorize=lengths)
    assert [row[0].tolist() for row in samples.rows] == [[3], [3, 3]]


def test_an_item_that_a_tokenizer_cannot_take_is_set_aside() -> None:
    def tokenize(text: str) -> np.ndarray:
        if text == "text 3":
            raise UnreadableItem(text, "has 600 tokens, the model takes 512")
        return lengths(text)

    samples = raw_from_python([(text, number) for number, text in enumerate(GOOD)])
    assert isinstance(samples, RawSamples)
    tensors = samples.tensors(tokenize)
    assert tensors.notes == ("1 of 30 texts was set aside: sample 3 has 600 tokens, the model takes 512",)
    assert labels_of(tensors) == [number for number in range(30) if number != 3]
    assert tensors.describe(3) == "sample 4"


# What tokenizers give


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, **{word: 2 + place for place, word in enumerate("abcdefgh")}}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


TEXTS = ["a b", "c", "a d e f"]
IDS = [[2, 3], [4], [2, 5, 6, 7]]


def ids_of(samples: Samples) -> list[list[int]]:
    return [
        nested.unflatten(samples.structure, row)[1]["input_ids"].tolist()  # type: ignore[index]
        for row in samples.rows
    ]


def test_tokenizers_outputs(tokenizer: PreTrainedTokenizerFast) -> None:
    ragged: list[Any] = [
        tokenizer(TEXTS),
        [tokenizer(text) for text in TEXTS],
        [tokenizer(text, return_tensors="pt") for text in TEXTS],
        [tokenizer(text, return_tensors="np") for text in TEXTS],
        [dict(tokenizer(text)) for text in TEXTS],
        [(tokenizer(text), None) for text in TEXTS],
        [tokenizer(TEXTS[:2]), tokenizer(TEXTS[2:])],
    ]
    for form in ragged:
        samples = from_python(form)
        assert ids_of(samples) == IDS
        assert all(array.dtype == np.int64 for array in samples.rows[0])
        assert [samples.describe(row) for row in range(3)] == ["sample 0", "sample 1", "sample 2"]
    padded: list[Any] = [
        tokenizer(TEXTS, padding=True, return_tensors="pt"),
        tokenizer(TEXTS, padding=True),
        [tokenizer(TEXTS, padding=True, return_tensors="pt")],
        dict(tokenizer(TEXTS, padding=True, return_tensors="np")),
    ]
    for form in padded:
        assert ids_of(from_python(form)) == [ids + [0] * (4 - len(ids)) for ids in IDS]


def test_labels_inside_the_dict(tokenizer: PreTrainedTokenizerFast) -> None:
    def one(text: str, label: int, **options: Any) -> BatchEncoding:
        encoding = tokenizer(text, **options)
        encoding["labels"] = torch.tensor([label]) if options else label
        return encoding

    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch["labels"] = torch.arange(3)
    forms: list[Any] = [
        [one(text, label) for label, text in enumerate(TEXTS)],
        [one(text, label, return_tensors="pt") for label, text in enumerate(TEXTS)],
        batch,
        [batch],
        [{"sentence": text, "label": label, **tokenizer(text)} for label, text in enumerate(TEXTS)],
        torch.utils.data.DataLoader([{**tokenizer("a b"), "labels": label} for label in range(3)],  # type: ignore[arg-type]
                                    batch_size=2, collate_fn=tokenizer.pad),
    ]  # fmt: skip
    for form in forms:
        samples = from_python(form)
        assert samples.labels is not None
        assert np.ravel(samples.labels).tolist() == [0, 1, 2]
        assert "labels" not in nested.input_names(samples.structure)


def test_a_label_for_each_token_inside_the_dict(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**tokenizer(text), "labels": [0] * len(text.split())} for text in TEXTS]
    samples = from_python(rows)
    assert samples.labels is not None
    assert [label.tolist() for label in samples.labels] == [[0, 0], [0], [0, 0, 0, 0]]


def test_a_multiple_choice_is_one_sample() -> None:
    choices = {"input_ids": np.ones((4, 7), np.int64), "attention_mask": np.ones((4, 7), np.int64)}
    samples = from_python([(choices, 2), (choices, 0)])
    assert [array.shape for array in samples.rows[0]] == [(4, 7), (4, 7)]


def test_tokens_of_a_real_model(data_folder: Path) -> None:
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(data_folder / "weights" / "all-MiniLM-L6-v2", local_files_only=True)
    pairs = raw(str(data_folder / "stsb.csv"), text="sentence1", pair="sentence2", label="score", max_samples=60)
    samples = pairs.singles().tensors(lambda text: real(text, return_token_type_ids=False))
    assert len(samples) == 120
    assert samples.groups is not None
    assert (np.bincount(samples.groups) == 2).all()
    assert len({shapes[0] for shapes in samples.shapes}) > 5
    together = pairs.tensors(lambda pair: real(*pair, return_tensors="np"))
    assert len(together.rows[0]) == 3
    assert labels_of(together)[:2] == labels_of(pairs)[:2]
