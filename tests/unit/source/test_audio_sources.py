"""source: how a model takes recordings, as its feature extractor's configuration and the user say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import Wav2Vec2FeatureExtractor

from corewise.common.errors import CorewiseError, SamplesError
from corewise.records.report import AudioPreprocess
from corewise.samples import Samples
from corewise.source import read_for

WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "sampling_rate": 16000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recordings")
    for number in range(4):
        noise = np.random.default_rng(number).normal(0.1, 0.2, 2000 + 100 * number)
        soundfile.write(made / f"{number}.wav", noise, 16_000)
    return made


def configured(tmp_path: Path, says: dict[str, Any], file: str = "preprocessor_config.json") -> str:
    (tmp_path / file).write_text(json.dumps(says))
    return f"hf:{tmp_path}"


def error_of(*args: Any, **options: Any) -> str:
    with pytest.raises(CorewiseError) as caught:
        read_for(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seconds", [None, 0.1, 0.5])
def test_inputs_are_those_of_transformers(folder: Path, tmp_path: Path, masked: bool, seconds: float | None) -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    extractor.save_pretrained(tmp_path)
    samples = read_for(f"hf:{tmp_path}", str(folder), audio={} if seconds is None else {"seconds": seconds})
    assert isinstance(samples, Samples)
    assert samples.audio is not None
    assert samples.audio.origin == "its preprocessor_config.json"
    padding = {"padding": "max_length"} if seconds == 0.5 and not masked else {}
    for path, (row,) in zip(sorted(folder.iterdir()), samples.rows, strict=True):
        frames, rate_hz = soundfile.read(path, dtype="float32")
        most = None if seconds is None else round(seconds * rate_hz)
        expected = extractor(frames, sampling_rate=rate_hz, max_length=most, truncation=most is not None, **padding)
        np.testing.assert_allclose(row, expected["input_values"][0], atol=1e-4)


def test_a_nested_configuration_is_read_and_normalization_can_be_off(folder: Path, tmp_path: Path) -> None:
    says = {"feature_extractor": {"sampling_rate": 8000, "do_normalize": False, "padding_value": -1.0}}
    samples = read_for(configured(tmp_path, says, "processor_config.json"), str(folder))
    assert samples.audio == AudioPreprocess(  # type: ignore[union-attr]
        rate_hz=8000, padding=-1.0, origin="its preprocessor_config.json", shortest=1000
    )


def test_a_model_of_spectrograms_names_the_way_out(folder: Path, tmp_path: Path) -> None:
    model = configured(tmp_path, WHISPER)
    error = error_of(model, str(folder))
    assert error.startswith(f"{model} takes spectrograms (WhisperFeatureExtractor)")
    assert "give --preprocess FILE.py:FUNCTION" in error
    (tmp_path / "spectra.py").write_text("def power(frames, rate):\n    return (frames ** 2)[None, :5].repeat(2, 0)\n")
    samples = read_for(model, str(folder), function=f"{tmp_path}/spectra.py:power")
    assert [row[0].shape for row in samples.rows] == [(2, 5)] * 4  # type: ignore[union-attr]
    assert samples.audio.rate_hz == 16_000  # type: ignore[union-attr]


def test_the_users_model_needs_a_rate_and_takes_no_other(folder: Path, tmp_path: Path) -> None:
    assert "nothing says which rate the model takes; give it with --sample-rate" in error_of(
        "net.py:build", str(folder)
    )
    samples = read_for("net.py:build", str(folder), audio={"rate_hz": 8000, "seconds": 0.1, "layout": "channels"})
    assert [row[0].shape for row in samples.rows] == [(1, 800)] * 4  # type: ignore[union-attr]
    model = configured(tmp_path, {"feature_size": 1, "sampling_rate": 16000})
    assert "takes recordings of 16000 Hz, not of 8000; leave out --sample-rate" in error_of(
        model, str(folder), audio={"rate_hz": 8000}
    )
    assert "takes inputs of shape (frames,)" in error_of(model, str(folder), audio={"layout": "channels"})
    (tmp_path / "preprocessor_config.json").write_text("{")
    assert "preprocessor_config.json cannot be read" in error_of(model, str(folder))


def test_options_of_recordings_are_for_recordings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(SamplesError, match=r"there are no recordings in .*; leave out --sample-rate"):
        read_for("net.py:build", f"{tmp_path}/a.txt", audio={"rate_hz": 8000})
