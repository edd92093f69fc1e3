"""How a model takes recordings: what its feature extractor's configuration says, and what the user adds."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from corewise.common.errors import SamplesError, SourceError
from corewise.common.references import guard
from corewise.records.report import AudioPreprocess
from corewise.samples.audio import AudioReader
from corewise.source.packages import processor_files

RAW_WAVEFORMS = "Wav2Vec2FeatureExtractor"
"""The extractor of Wav2Vec2, HuBERT, WavLM, UniSpeech, SEW and Data2Vec."""
OPTIONS = {"rate_hz": "--sample-rate", "seconds": "--seconds", "layout": "--layout"}
FUNCTION = "give --preprocess FILE.py:FUNCTION, which makes the input of the frames and their rate, or arrays"


def audio_reader(model: Any, given: Mapping[str, Any], function: str | None, source: str) -> AudioReader:
    """What makes a model's inputs of recordings.

    Args:
        model: A model or its reference, as ``optimize`` takes it.
        given: Fields of ``AudioPreprocess`` that the user gives: of a model that says nothing, ``rate_hz`` at least.
        function: The user's function that makes the input of the frames and their rate.
        source: What messages call the recordings.

    Raises:
        SamplesError: The model takes spectrograms and there is no ``function``, nothing says its rate, or what is given
            is not what the model says.
        SourceError: The model's configuration cannot be read.
    """
    name = model.removeprefix("hf:") if isinstance(model, str) and model.startswith("hf:") else None
    says = None if name is None else extractor_config(name)
    own = None if says is None else audio_preprocess(says)
    if says is not None and own is None and function is None:
        kind = says.get("feature_extractor_type", "its feature extractor")
        raise SamplesError(f"{model} takes spectrograms ({kind}), which corewise does not make of recordings", FUNCTION)
    rate_hz = None if says is None else int(says["sampling_rate"])
    wanted = given.get("rate_hz", rate_hz)
    if wanted is None:
        raise SamplesError(
            f"there are recordings in {source}, and nothing says which rate the model takes",
            "give it with --sample-rate, such as --sample-rate 16000, or in Python give arrays",
        )
    if rate_hz not in (None, wanted):
        raise SamplesError(f"{model} takes recordings of {rate_hz} Hz, not of {wanted}", "leave out --sample-rate")
    if own is not None and given.get("layout", own.layout) != own.layout:
        raise SamplesError(f"{model} takes inputs of shape (frames,)", "leave out --layout")
    return AudioReader(replace(own or AudioPreprocess(rate_hz=wanted), **given), function)


def extractor_config(name: str) -> dict[str, Any] | None:
    """What the feature extractor of recordings of a transformers folder or a model of the hub says, if it has one."""
    for path in processor_files(name):
        with guard(SourceError, f"{path} cannot be read", "check the model's files"):
            says = json.loads(path.read_text(encoding="utf-8"))
            says = says.get("feature_extractor", says)
        if isinstance(says, dict) and "sampling_rate" in says:
            return says
    return None


def audio_preprocess(says: Mapping[str, Any]) -> AudioPreprocess | None:
    """What an extractor of raw waveforms says; ``None`` for one of spectrograms.

    A model that takes an attention mask is given none, so its recordings are not padded.
    """
    if says.get("feature_extractor_type", RAW_WAVEFORMS) != RAW_WAVEFORMS or says.get("feature_size", 1) != 1:
        return None
    return AudioPreprocess(
        rate_hz=int(says["sampling_rate"]),
        pads=not says.get("return_attention_mask"),
        padding=float(says.get("padding_value", 0.0)),
        normalize=bool(says.get("do_normalize", True)),
        origin="its preprocessor_config.json",
    )
