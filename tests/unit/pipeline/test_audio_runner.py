"""pipeline: recordings in, answers out: paths, contents, arrays and folders, and what cannot be answered."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from corewise.artifact.recordings import audio_runner
from corewise.common.errors import InputError
from corewise.pipeline import AudioRunner, ImageAsk, Rejected, audio_pipeline
from corewise.pipeline.outputs import format_of
from corewise.records.build import Plan
from corewise.records.report import AudioPreprocess

RATE = 8000


def constant(value: float, frames: int = 400) -> np.ndarray:
    return np.full(frames, value, np.float32)


def wav(array: np.ndarray, rate_hz: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, array, rate_hz, "FLOAT", format="WAV")
    return file.getvalue()


def runner(golden: Any, run: Any, **preprocess: Any) -> AudioRunner:
    pipeline = audio_pipeline(
        AudioPreprocess(rate_hz=RATE, **preprocess), [np.asarray(golden, np.float32)], ("low", "high")
    )
    return AudioRunner(pipeline, run, instances=2, rows=3)


@pytest.fixture
def means() -> AudioRunner:
    """Answers the mean and the number of frames; its calls have recordings of one length only."""
    return runner(
        [[0.5]], lambda arrays: [np.stack([arrays[0].mean(1), np.full(len(arrays[0]), arrays[0].shape[1])], 1)]
    )


def test_all_forms_of_a_recording_are_answered_in_order(means: AudioRunner, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for number, name in enumerate(("a.wav", "b/c.flac", "d.wav")):
        soundfile.write(tmp_path / name, constant(number / 4), RATE)
    (tmp_path / "notes.txt").write_text("no recording")
    path = tmp_path / "b" / "c.flac"
    items: list[Any] = [
        path,
        str(path),
        wav(constant(0.75)),
        (constant(0.1, 500), RATE),
        (np.stack([constant(0.2)] * 2), RATE),
    ]
    made = means.predict(items)
    np.testing.assert_allclose(made, [[0.25, 400], [0.25, 400], [0.75, 400], [0.1, 500], [0.2, 400]], atol=1e-3)
    np.testing.assert_allclose(means.predict(tmp_path), [[0, 400], [0.5, 400], [0.25, 400]], atol=1e-3)
    for one in (path, str(path), wav(constant(0.25)), bytearray(wav(constant(0.25))), (constant(0.25), RATE)):
        np.testing.assert_allclose(means.predict(one), [0.25, 400], atol=1e-3)
    assert next(means.predict(iter([path])))[1] == 400
    assert means.predict([]) == []


def test_classes_have_names_and_rates_are_the_models() -> None:
    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        assert arrays[0].shape[1] == 400
        return [np.stack([-arrays[0].mean(1), arrays[0].mean(1)], 1) * 9]

    classes = runner([[1, -1]], run)
    answers = classes.predict([(constant(0.5, 800), 2 * RATE), (constant(-0.5, 200), RATE // 2)], ImageAsk(top=1))
    assert [answer.label for answer in answers] == ["high", "low"]
    assert set(answers[0].probabilities) == {"high"}
    with pytest.raises(InputError, match="the model gives none"):
        classes.predict((constant(0), RATE), ImageAsk(score_threshold=0.5))


def test_what_cannot_be_answered_has_its_reason(means: AudioRunner, tmp_path: Path) -> None:
    (tmp_path / "cut.wav").write_bytes(wav(constant(0))[:300])
    cases: list[tuple[Any, str]] = [
        (tmp_path / "cut.wav", "is cut off"),
        (str(tmp_path / "missing.wav"), "cannot be opened: No such file or directory"),
        (b"", "is empty"),
        (7, "is an int, not a path, bytes or (array, rate)"),
        (constant(0), "is a ndarray, not a path, bytes or (array, rate)"),
        ((constant(0), 0), "has the rate 0, not a whole number of frames per second"),
    ]
    answers = list(means.answers([wav(constant(0.25)), *(item for item, _ in cases)]))
    assert answers[0][1] == 400
    assert [answer.reason for answer in answers[1:]] == [reason for _, reason in cases]
    with pytest.raises(InputError, match=r"recording 1 is empty; replace or remove it"):
        means.predict([wav(constant(0)), b""])


def test_recordings_that_were_not_verified_or_do_not_fit_are_rejected() -> None:
    varied = runner([[0.5]], lambda arrays: [arrays[0][:, :1]], shortest=100)
    short = next(varied.answers([(constant(0, 80), RATE)]))
    assert short == Rejected("has 0.01 s, less than the shortest sample, 0.0125 s")
    fixed = runner([[0.5]], lambda arrays: [arrays[0][:, :1]])
    fixed.pipeline = replace(fixed.pipeline, shape=(400,))
    right, wrong = fixed.answers([(constant(0), RATE), (constant(0, 401), RATE)])
    assert right.shape == (1,)
    assert wrong == Rejected("becomes an input of (401,), and the model takes (400,)")


def test_outputs_of_several_dimensions_are_as_long_as_their_recordings() -> None:
    frames = runner([[[0.5]]], lambda arrays: [arrays[0].reshape(len(arrays[0]), -1, 100)])
    made = frames.predict([(constant(0), RATE), (constant(0, 600), RATE)])
    assert [one.shape for one in made] == [(4, 100), (6, 100)]
    with pytest.raises(InputError, match="cannot hold vectors of several sizes"):
        format_of("out.npy", frames.pipeline)


def test_what_a_users_function_makes_may_have_no_dimensions() -> None:
    means = runner([[0.5]], lambda arrays: [arrays[0][:, None]])
    means._read = lambda item: item[0].mean()
    assert next(means.answers([(constant(0.5), RATE)])) == 0.5


def test_recordings_of_a_users_function_need_that_function() -> None:
    preprocess = AudioPreprocess(rate_hz=RATE, seconds=0.05, function="own.py:powers")
    pipeline, plan = audio_pipeline(preprocess, [np.zeros((1, 1))]), Plan(threads_per_instance=1, instances=1, batch=2)

    def run(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].sum((1, 2))[:, None]]

    session: Any = SimpleNamespace(run=run)
    assert audio_runner(None, session, plan) is None
    assert audio_runner(pipeline, session, plan) is None
    opened = audio_runner(pipeline, session, plan, lambda frames, rate_hz: frames[None, :rate_hz] ** 2)
    assert opened is not None
    np.testing.assert_allclose(opened.predict([(constant(0.5, 1600), 2 * RATE)]), [[100]], rtol=0.01)
