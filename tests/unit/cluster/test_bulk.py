"""cluster.bulk: what is checked before a job runs, and how large its parts are."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from corewise.cluster import bulk
from corewise.cluster.bulk import _check_drawings
from corewise.cluster.messages import packed_rows
from corewise.common.errors import InputError, OutputError
from corewise.pipeline import ImageAsk
from corewise.pipeline.job import FOLDER_PART_ROWS, PART_BYTES, Job, records
from corewise.records.pipeline import ImagePipeline, TextPipeline
from corewise.records.report import Preprocess
from corewise.samples.texts import GUESSED


@pytest.mark.parametrize("draw", ["photos", "photos/drawn", "photos/a/../../photos/a", "more"])
def test_drawings_do_not_go_among_the_inputs(tmp_path: Path, draw: str) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    files = [tmp_path / "photos" / "a" / "1.jpg", tmp_path / "more" / "2.jpg"]
    with pytest.raises(OutputError, match="is among the inputs; give another folder with --draw"):
        _check_drawings(tmp_path / draw, [tmp_path / "photos", files[1]], files)
    _check_drawings(tmp_path / "drawn", [tmp_path / "photos", files[1]], files)


@pytest.mark.parametrize(
    ("task", "top", "why"),
    [
        ("classes", 0, "top is 0; give a whole number, 1 or more"),
        ("boxes", 3, "top is a number of classes, and the model gives boxes; leave it out"),
    ],
)
def test_a_number_of_classes_that_is_none(monkeypatch: pytest.MonkeyPatch, task: Any, top: int, why: str) -> None:
    pipeline = ImagePipeline(task=task, preprocess=Preprocess())
    monkeypatch.setattr(bulk, "images_of", lambda artifact: pipeline)
    with pytest.raises(InputError, match=why):
        bulk._check_media(SimpleNamespace(), ImageAsk(), top, None)  # type: ignore[arg-type]


TEXTS = TextPipeline(task="vectors", tokenizer_sha256="", inputs=(), max_length=512)


@pytest.mark.parametrize(
    ("kind", "pipeline", "shape", "size"),
    [
        ("images", ImagePipeline(task="vectors", preprocess=Preprocess()), (4, 21, 50, 50), 21 * 50 * 50 * 4),
        ("images", ImagePipeline(task="boxes", preprocess=Preprocess()), (4, 84, 8400), 0),
        ("texts", TEXTS, (4, 9, 384), 512 * 384 * 4),
        ("texts", TEXTS, (4, 384), 384 * 4),
    ],
)
def test_how_large_answers_are(
    monkeypatch: pytest.MonkeyPatch, kind: Any, pipeline: Any, shape: tuple[int, ...], size: int
) -> None:
    monkeypatch.setattr(bulk, "text_pipeline" if kind == "texts" else "images_of", lambda artifact: pipeline)
    artifact: Any = SimpleNamespace(golden=lambda: ([], [np.zeros(shape, np.float32)]))
    assert bulk._answer_bytes(artifact, kind) == size


def test_a_part_has_fewer_texts_if_they_are_long(tmp_path: Path) -> None:
    """On a cluster a part's texts are in memory, and in a message to a node."""
    for name, text in (("short.txt", "a text\n"), ("long.txt", f"{'long ' * 40_000}\n")):
        (tmp_path / name).write_text(text * 3)
        job = Job(
            inputs=(tmp_path / name,), output=tmp_path / "out", columns=GUESSED, prompt=None, artifact="", folder=True
        )
        job = replace(job, row_bytes=bulk._row_bytes(job))
        assert len(packed_rows([*records(job)])) // 3 == job.row_bytes
        assert job.part_rows == min(FOLDER_PART_ROWS, PART_BYTES // job.row_bytes)
    assert job.part_rows < FOLDER_PART_ROWS
