"""Recordings: decoded, and as they are; which rate and channels a model takes is its pipeline's to say."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import MissingExtra
from corewise.samples.raw import UnreadableItem

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"})

STREAMED = 2**32 - 1
"""The size in the header of a WAV file that was written to a pipe."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Decoded sound: ``samples`` is float32 (channels, frames) between -1 and 1, ``rate_hz`` frames per second."""

    samples: NDArray[np.float32]
    rate_hz: int


def open_audio(source: Path | bytes, name: str = "") -> Recording:
    """Decode one recording.

    Args:
        source: A file, or its content: WAV, FLAC and what else libsndfile reads.
        name: What messages call it; the file's path by default.

    Raises:
        UnreadableItem: Saying what is wrong with it.
        MissingExtra: Where soundfile is not installed.
    """
    soundfile = _soundfile()
    name = name or ("the recording" if isinstance(source, bytes) else f"the recording {source}")
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UnreadableItem(name, f"cannot be opened: {error.strerror}") from error
    if not content:
        raise UnreadableItem(name, "is empty")
    if content[:4] == b"RIFF" and len(content) < int.from_bytes(content[4:8], "little") + 8 < STREAMED:
        raise UnreadableItem(name, "is cut off")
    try:
        samples, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise UnreadableItem(name, f"cannot be decoded: {error}") from error
    if not len(samples):
        raise UnreadableItem(name, "has no frames")
    if not np.isfinite(samples).all():
        raise UnreadableItem(name, "has NaN or infinite samples")
    return Recording(samples=np.ascontiguousarray(samples.T), rate_hz=int(rate_hz))


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # the wheel is there, libsndfile is not
        raise MissingExtra("soundfile", "audio", "reading recordings") from None
    return soundfile
