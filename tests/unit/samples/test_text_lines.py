"""samples: what ends a line of a file of texts, and what does not."""

from pathlib import Path
from typing import Any

import pytest

from corewise.common.errors import SamplesError
from corewise.pipeline.job import count_rows
from corewise.samples import RawSamples, read_raw, tables
from corewise.samples.tables import iterate_table

INNER = "one\x0btwo\x0cthree\x1cfour\x1dfive\x1esix\x85seven\u2028eight\u2029nine"
"""What ``str.splitlines`` splits, and no file of lines."""


def raw(path: Path, **options: Any) -> RawSamples:
    samples = read_raw(str(path), **options)
    assert isinstance(samples, RawSamples)
    return samples


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.tsv", "t.jsonl"])
def test_lines_end_as_files_of_all_systems_end_them(tmp_path: Path, name: str, end: str, last: bool) -> None:
    texts = ["first", INNER, "last"]
    lines = [f'"{text}"' for text in texts] if name == "t.jsonl" else list(texts)
    if name == "t.jsonl":
        lines[1] = '{"text": "one\\u000btwo"}'
    lines = ["text", *lines] if name in ("t.csv", "t.tsv") else lines
    path = tmp_path / name
    path.write_bytes(("\ufeff" + end.join(lines) + (end if last else "")).encode())
    samples = raw(path)
    assert list(samples.items) == [texts[0], "one\x0btwo" if name == "t.jsonl" else INNER, texts[2]]
    assert samples.names == [f"line {number + (name in ('t.csv', 't.tsv'))}" for number in (1, 2, 3)]
    assert count_rows([path]) == 3


def test_ends_of_all_kinds_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\rb\r\nc\n\rd\r\r\ne")
    assert [(item.name, item.value) for item in iterate_table(path, samples=False)] == [
        ("line 1", "a"),
        ("line 2", "b"),
        ("line 3", "c"),
        ("line 4", None),
        ("line 5", "d"),
        ("line 6", None),
        ("line 7", "e"),
    ]
    assert list(raw(path).items) == ["a", "b", "c", "d", "e"]
    assert count_rows([path]) == 7


def test_an_end_of_two_characters_between_two_blocks_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corewise.pipeline import job

    monkeypatch.setattr(job, "BLOCK_BYTES", 2)
    path = tmp_path / "t.txt"
    path.write_bytes(b"a\r\nb\r\ncc\r\n\rd")
    assert count_rows([path]) == 5
    assert len(list(iterate_table(path, samples=False))) == 5


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    for name, content in (("a.csv", b""), ("b.csv", b"text"), ("c.tsv", b"text\n")):
        (tmp_path / name).write_bytes(content)
        assert count_rows([tmp_path / name]) == 0


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_line_without_an_end_is_held_in_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tables, "MOST_LINE_CHARACTERS", 100)
    mark = "," if name == "t.csv" else "\t"
    rows = [f"text {number}{mark}{number}" for number in range(30)]
    # Cut after 100 characters it would be a row like any other.
    long = f"{'x' * 98}{mark}12" + "3" * 1000
    path = tmp_path / name
    path.write_text("\n".join([f"text{mark}label", *rows[:10], long, *rows[10:]]) + "\n")
    samples = raw(path)
    assert samples.notes == ("1 of 31 texts was set aside: line 12 has more than 100 characters",)
    assert list(samples.items) == [f"text {number}" for number in range(30)]
    path.write_text(f"text{mark}label" + "x" * 1000)
    with pytest.raises(SamplesError, match=r"the header of .* has more than 100 characters; end the header"):
        raw(path)
