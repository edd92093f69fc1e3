"""samples: recordings of any rate, width and number of channels as inputs of a model."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from corewise.common.errors import SamplesError
from corewise.records.report import AudioPreprocess
from corewise.samples import UnreadableItem, read_raw
from corewise.samples.audio import (
    MOST_TERM,
    AudioReader,
    Recording,
    array_recording,
    audio_array,
    audio_samples,
    audio_size,
    open_audio,
    rate_ratio,
    resampled,
)

RATE = 16_000


def tone(rate_hz: int, frequency_hz: float = 440, seconds: float = 0.25) -> np.ndarray:
    """A sine (frames,)."""
    sine = 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(round(rate_hz * seconds)) / rate_hz)
    return sine.astype(np.float32)


@pytest.mark.parametrize(
    ("rate_hz", "subtype", "channels"),
    [(RATE, "PCM_16", 1), (44_100, "PCM_24", 2), (8000, "FLOAT", 3), (48_000, "PCM_U8", 1)],
)
def test_a_tone_stays_the_same_tone_at_the_models_rate(
    tmp_path: Path, rate_hz: int, subtype: str, channels: int
) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.repeat(tone(rate_hz)[:, None], channels, 1), rate_hz, subtype)
    made = AudioReader(AudioPreprocess(rate_hz=RATE))(path)
    assert (made.shape, made.dtype) == ((RATE // 4,), np.float32)
    inside = slice(200, -200)  # the ends meet silence
    np.testing.assert_allclose(made[inside], tone(RATE)[inside], atol=0.01)


def test_what_the_models_rate_cannot_have_is_filtered_out() -> None:
    assert np.abs(resampled(tone(44_100, 7000), 44_100, 8000)[200:-200]).max() < 0.01
    assert len(resampled(np.zeros(1001, np.float32), 44_100, RATE)) == 364
    for rate_hz in (1, 2**32 - 1):
        with pytest.raises(UnreadableItem, match=f"has {rate_hz:,} frames per second, which is not a rate"):
            resampled(np.zeros(9, np.float32), rate_hz, RATE)


def test_a_filter_is_short_whatever_the_rates_are() -> None:
    for rate_hz in (767_999, 447_993, 16_001, 44_100, 1009, 1000):
        for wanted_hz in (RATE, 48_000, 11, 10**9):
            ratio = rate_ratio(rate_hz, wanted_hz)
            assert 0 < max(ratio.numerator, ratio.denominator) <= MOST_TERM
            if 8000 <= wanted_hz <= 48_000:
                assert float(ratio) == pytest.approx(wanted_hz / rate_hz, rel=1.5e-5)
    heard = resampled(tone(383_987), 383_987, RATE)
    np.testing.assert_allclose(heard[200:-200], tone(RATE)[200 : len(heard) - 200], atol=0.01)


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 44_100, 48_000])
def test_what_is_cut_off_is_not_decoded_and_changes_nothing(rate_hz: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * rate_hz, 2)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, noise, rate_hz, format="FLAC")
    for seconds in (0.5, 1 / 3, 2.999, 5.0):
        preprocess = AudioPreprocess(rate_hz=RATE, seconds=seconds)
        recording = open_audio(file.getvalue(), preprocess=preprocess)
        assert recording.samples.shape[1] <= min(3.0, seconds + 0.002) * rate_hz + 1
        expected = audio_array(open_audio(file.getvalue()), preprocess)
        np.testing.assert_array_equal(audio_array(recording, preprocess), expected)
        size = audio_size(file.getvalue(), preprocess)
        assert (size.frames, size.channels, size.made) == (recording.samples.shape[1], 2, len(expected))
    whole = AudioPreprocess(rate_hz=RATE)
    assert audio_size(file.getvalue(), whole).made == len(audio_array(open_audio(file.getvalue()), whole))


def test_channels_length_and_normalization_come_in_that_order() -> None:
    stereo = Recording(samples=np.array([[0, 2, 6], [2, 4, 0]], np.float32), rate_hz=2)
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [1, 3, 3]),
        ({"seconds": 1}, [1, 3]),
        ({"seconds": 2}, [1, 3, 3, 0]),
        ({"seconds": 2, "padding": -1.0}, [1, 3, 3, -1]),
        ({"seconds": 2, "pads": False}, [1, 3, 3]),
        ({"seconds": 1, "normalize": True}, [-1, 1]),
    ]
    for options, expected in cases:
        made = audio_array(stereo, AudioPreprocess(rate_hz=2, **options))
        np.testing.assert_allclose(made, expected, atol=1e-6, err_msg=str(options))
    silent = Recording(samples=np.zeros((1, 9), np.float32), rate_hz=2)
    assert not audio_array(silent, AudioPreprocess(rate_hz=2, normalize=True)).any()
    assert audio_array(stereo, AudioPreprocess(rate_hz=2, layout="channels")).shape == (1, 3)


def test_arrays_have_channels_in_either_order_and_any_width() -> None:
    ramp = np.linspace(-1, 0.99, 50)
    expected = np.stack([ramp, ramp]).astype(np.float32)
    whole = np.round(expected * 128)
    for array in (expected, expected.T, np.int16(whole * 256), np.int32(whole * 2**24), np.uint8(whole + 128)):
        np.testing.assert_allclose(array_recording(array, RATE).samples, expected, atol=0.01)


@pytest.mark.parametrize(
    ("array", "rate", "reason"),
    [(np.zeros(3), 0.5, "has the rate 0.5"), (np.zeros(3), 0, "has the rate 0"), (np.zeros(0), RATE, "has no frames"),
     (np.zeros((2, 3, 4)), RATE, "is a float64 array"), (np.array(["a"]), RATE, "is a <U1 array"),
     (np.array([np.nan]), RATE, "has NaN")],
)  # fmt: skip
def test_what_is_no_array_of_frames_says_so(array: Any, rate: Any, reason: str) -> None:
    with pytest.raises(UnreadableItem, match=reason):
        array_recording(array, rate)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(RATE), RATE, format=kind)
    return file.getvalue()


TAG = b"ID3\x04\0\0\0\0\1\2" + bytes(130)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF"])
def test_formats_are_told_by_their_heads_behind_tags_too(kind: str) -> None:
    assert open_audio(encoded(kind)).rate_hz == RATE
    if kind == "MP3":
        assert open_audio(TAG * 2 + encoded(kind)).rate_hz == RATE


@pytest.mark.parametrize("kind", ["AU", "SVX", "VOC", "W64"])
@pytest.mark.parametrize("tags", [b"", TAG, TAG * 9])
def test_other_formats_do_not_reach_the_decoder(kind: str, tags: bytes) -> None:
    with pytest.raises(UnreadableItem, match="it is not a WAV, FLAC, Ogg, MP3 or AIFF file"):
        open_audio(tags + encoded(kind))


def test_a_flac_that_was_written_to_a_pipe_has_no_length() -> None:
    content = bytearray(encoded("FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the samples in its header
    for read in (open_audio, audio_size):
        with pytest.raises(UnreadableItem, match="has no length in its header, like a FLAC file that was written to"):
            read(bytes(content), preprocess=AudioPreprocess(rate_hz=RATE))  # type: ignore[operator]


def test_a_folder_becomes_samples_and_broken_files_are_set_aside(tmp_path: Path) -> None:
    for number in range(20):
        rate_hz = (8000, RATE)[number % 2]
        path = tmp_path / ("low", "high")[number % 2] / f"{number}.{('wav', 'flac')[number % 2]}"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone(rate_hz, seconds=0.1 + number / 100), rate_hz)
    (tmp_path / "low" / "empty.wav").write_bytes(b"")
    raw = read_raw(str(tmp_path))
    samples = audio_samples(raw, AudioReader(AudioPreprocess(rate_hz=RATE)))  # type: ignore[arg-type]
    assert len(samples) == 20
    assert samples.audio == AudioPreprocess(rate_hz=RATE, shortest=1600)
    assert np.asarray(samples.labels).tolist() == [0] * 10 + [1] * 10
    assert samples.notes == ("1 of 21 recordings was set aside: low/empty.wav is empty",)
    assert sorted(row[0].shape[0] for row in samples.rows)[-1] == round(RATE * 0.29)


def test_a_users_function_gets_frames_of_the_models_rate() -> None:
    seen = []

    def spectrum(frames: np.ndarray, rate_hz: int) -> np.ndarray:
        seen.append((frames.shape, rate_hz))
        return np.abs(np.fft.rfft(frames)).astype(np.float32)

    reader = AudioReader(AudioPreprocess(rate_hz=RATE, seconds=0.1), spectrum)
    assert reader((tone(8000), 8000)).shape == (801,)
    assert seen == [((1600,), RATE)]
    assert str(reader.preprocess.function).endswith("spectrum")
    broken: Callable[..., Any] = lambda frames: frames  # noqa: E731
    with pytest.raises(SamplesError, match="the preprocess function failed on a recording: TypeError"):
        AudioReader(AudioPreprocess(rate_hz=RATE), broken)((tone(8000), 8000))
