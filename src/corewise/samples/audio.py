"""Recordings: decoded, and as inputs of a model: one channel of its rate, its length and its layout."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.common.errors import MissingExtra, SamplesError
from corewise.common.phrases import with_article
from corewise.common.references import find_reference, guard, reference_to
from corewise.records.report import AudioPreprocess
from corewise.samples.data import Samples
from corewise.samples.raw import RawSamples, UnreadableItem

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff"})

HEADS = re.compile(rb"(RIFF|RIFX|RF64)....WAVE|fLaC|OggS|FORM....AIF[FC]|\xff", re.DOTALL)
"""How WAV, FLAC, Ogg, AIFF and MP3 files begin. libsndfile reads more formats, for which few people look for bugs."""
MOST_TAGS = 4
"""ID3 tags in front of a recording; each may be as small as ten bytes."""
MOST_FRAMES = 2**62
"""libsndfile's number of frames of a FLAC file that was written to a pipe is larger: its header does not say it."""
STREAMED = 2**32 - 1
"""The size in the header of a WAV file that was written to a pipe."""
RATES_HZ = range(1000, 768_001)
"""The rates of recordings that are resampled: others in a file's header are mistakes, and would take much memory."""
BLOCK_VALUES = 2**20
"""Frames times channels that are decoded at once, of which one channel is kept."""
MOST_TERM = 2**15
"""The largest term of the ratio of two rates. A filter has 20 weights for each unit of it: 320 KB for this one."""
REACH = 12
"""Frames of the lower of two rates that the filter reaches beyond a frame, rounded up."""
EPSILON = 1e-7
"""What transformers' ``Wav2Vec2FeatureExtractor`` adds to a variance, so that silence stays silence."""

AudioFunction = Callable[[NDArray[np.float32], int], Any]
"""From the frames (frames,) and their rate to the model's input."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Decoded sound: ``samples`` is float32 (channels, frames) between -1 and 1, ``rate_hz`` frames per second."""

    samples: NDArray[np.float32]
    rate_hz: int


class AudioSize(NamedTuple):
    """What a recording takes, by its header."""

    frames: int
    """Those that are decoded: of a recording that is cut, no more than the model's input is made of."""
    channels: int
    made: int
    """Frames of the model's input."""


def audio_size(content: bytes, preprocess: AudioPreprocess, name: str = "the recording") -> AudioSize:
    """How much of a recording is decoded, without decoding it. Raises as ``open_audio``."""
    with _opened(content, name) as file:
        frames = _frames_read(file, preprocess, name)
        most, made = _most(preprocess), ceil(frames * Fraction(preprocess.rate_hz, file.samplerate))
        if most is not None:
            made = most if preprocess.pads else min(made, most)
        return AudioSize(frames, file.channels, made)


def open_audio(source: Path | bytes, name: str = "", preprocess: AudioPreprocess | None = None) -> Recording:
    """Decode one recording, to the mean of its channels.

    Args:
        source: A file, or its content: WAV, FLAC, Ogg, MP3 or AIFF.
        name: What messages call it; the file's path by default.
        preprocess: What is made of it: where that cuts long recordings, the rest is not decoded.

    Raises:
        UnreadableItem: Saying what is wrong with it.
        MissingExtra: Where soundfile is not installed.
    """
    name = name or ("the recording" if isinstance(source, bytes) else f"the recording {source}")
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UnreadableItem(name, f"cannot be opened: {error.strerror}") from error
    with _opened(content, name) as file:
        left = _frames_read(file, preprocess, name)
        blocks: list[NDArray[np.float32]] = []
        while left > 0:
            block = file.read(min(left, max(1, BLOCK_VALUES // file.channels)), dtype="float32", always_2d=True)
            if not len(block):
                break
            left -= len(block)
            blocks.append(block.mean(1))
        rate_hz = int(file.samplerate)
    if not blocks:
        raise UnreadableItem(name, "has no frames")
    samples = np.concatenate(blocks)[None]
    if not np.isfinite(samples).all():
        raise UnreadableItem(name, "has NaN or infinite samples")
    return Recording(samples=samples, rate_hz=rate_hz)


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Any]:
    """A recording as soundfile opens it; what goes wrong until the ``with`` ends is told of the recording."""
    soundfile = _soundfile()
    if not content:
        raise UnreadableItem(name, "is empty")
    if content[:4] == b"RIFF" and len(content) < int.from_bytes(content[4:8], "little") + 8 < STREAMED:
        raise UnreadableItem(name, "is cut off")
    if not HEADS.match(content, _tags_end(content)):
        raise UnreadableItem(name, "cannot be decoded: it is not a WAV, FLAC, Ogg, MP3 or AIFF file")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            yield file
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        # The message of libsndfile alone: soundfile's own names the object that stands for the file.
        why = getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")
        raise UnreadableItem(name, f"cannot be decoded: {why}") from error


def _tags_end(content: bytes) -> int:
    """Where the recording itself begins: libsndfile looks for all its formats behind ID3 tags."""
    end = 0
    for _ in range(MOST_TAGS):
        if content.startswith(b"ID3", end):
            sizes = content[end + 6 : end + 10]
            end += 10 + sum((size & 127) << shift for size, shift in zip(sizes, (21, 14, 7, 0), strict=False))
    return end


def _frames_read(file: Any, preprocess: AudioPreprocess | None, name: str) -> int:
    """How many frames of a file are decoded, by its header."""
    frames, rate_hz = int(file.frames), int(file.samplerate)
    if frames > MOST_FRAMES:
        raise UnreadableItem(name, "has no length in its header, like a FLAC file that was written to a pipe")
    if preprocess is None:
        return frames
    _check_rate(rate_hz, preprocess.rate_hz, name)
    most = _most(preprocess)
    if most is None:
        return frames
    needed_s = most / preprocess.rate_hz + REACH / min(rate_hz, preprocess.rate_hz)
    return min(frames, ceil(needed_s * rate_hz))


def array_recording(samples: Any, rate_hz: Any) -> Recording:
    """The recording that an array and its rate are.

    Args:
        samples: Floats between -1 and 1, or integers of which the widest are -1 and 1; (frames,), or with channels in
            either order: the shorter side has them.
        rate_hz: Frames per second, a whole number.

    Raises ``UnreadableItem``.
    """
    name, values = "the recording", np.asarray(samples)
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, int | np.integer) or rate_hz < 1:
        raise UnreadableItem(name, f"has the rate {rate_hz!r:.40}, not a whole number of frames per second")
    if values.ndim not in (1, 2) or values.dtype.kind not in "iuf":
        raise UnreadableItem(name, f"is {with_article(str(values.dtype))} array {values.shape}, no numbers (frames,)")
    if not values.size:
        raise UnreadableItem(name, "has no frames")
    if values.dtype.kind != "f":
        most = 2.0 ** (8 * values.dtype.itemsize - 1)
        values = values / most - (values.dtype.kind == "u")
    if not np.isfinite(values).all():
        raise UnreadableItem(name, "has NaN or infinite samples")
    channels = np.atleast_2d(values) if values.ndim == 1 or values.shape[0] <= values.shape[1] else values.T
    return Recording(samples=channels.astype(np.float32), rate_hz=int(rate_hz))


def resampled(frames: NDArray[np.float32], rate_hz: int, wanted_hz: int) -> NDArray[np.float32]:
    """Frames (frames,) of one rate at another, low-pass filtered: about (frames * wanted_hz / rate_hz,).

    Raises:
        UnreadableItem: ``rate_hz`` is not the rate of a recording.
        MissingExtra: SciPy is not installed.
    """
    if rate_hz == wanted_hz:
        return frames
    _check_rate(rate_hz, wanted_hz)
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise MissingExtra("scipy", "audio", f"resampling recordings from {rate_hz} to {wanted_hz} Hz") from None
    ratio = rate_ratio(rate_hz, wanted_hz)
    return np.asarray(resample_poly(frames, ratio.numerator, ratio.denominator), np.float32)


def rate_ratio(rate_hz: int, wanted_hz: int) -> Fraction:
    """``wanted_hz / rate_hz``, or the nearest ratio of small terms, with which a filter is short.

    It is at most 15 millionths off for recordings of 1,000 to 768,000 Hz and models of 8,000 to 48,000.

    Example:
        >>> rate_ratio(44_100, 16_000), rate_ratio(767_999, 16_000)
        (Fraction(160, 441), Fraction(1, 48))
    """
    ratio = Fraction(wanted_hz, rate_hz)
    if max(ratio.numerator, ratio.denominator) <= MOST_TERM:
        return ratio
    below_1 = min(ratio, 1 / ratio).limit_denominator(MOST_TERM) or Fraction(1, MOST_TERM)
    return below_1 if ratio < 1 else 1 / below_1


def _check_rate(rate_hz: int, wanted_hz: int, name: str = "the recording") -> None:
    if rate_hz != wanted_hz and rate_hz not in RATES_HZ:
        raise UnreadableItem(name, f"has {rate_hz:,} frames per second, which is not a rate of recordings")


def audio_array(recording: Recording, preprocess: AudioPreprocess) -> NDArray[np.float32]:
    """The input that a recording becomes: (frames,) or (1, frames).

    Example:
        >>> stereo = Recording(samples=np.array([[0, 2], [2, 4]], np.float32), rate_hz=2)
        >>> audio_array(stereo, AudioPreprocess(rate_hz=2, seconds=1.5))
        array([1., 3., 0.], dtype=float32)
    """
    frames = _cut(recording, preprocess)
    most = _most(preprocess)
    if most is not None and preprocess.pads and len(frames) < most:
        frames = np.pad(frames, (0, most - len(frames)), constant_values=preprocess.padding)
    if preprocess.normalize:
        frames = (frames - frames.mean()) / np.sqrt(frames.var() + EPSILON)
    return frames[None] if preprocess.layout == "channels" else frames


def _most(preprocess: AudioPreprocess) -> int | None:
    """The most frames of an input."""
    return None if preprocess.seconds is None else max(1, round(preprocess.seconds * preprocess.rate_hz))


def _cut(recording: Recording, preprocess: AudioPreprocess) -> NDArray[np.float32]:
    """One channel of the model's rate, at most as long as it takes: (frames,)."""
    return resampled(recording.samples.mean(0), recording.rate_hz, preprocess.rate_hz)[: _most(preprocess)]


class AudioReader:
    """Makes inputs of recordings: paths, contents, and tuples of an array and its rate.

    ``function`` is the user's own: it, or a reference to it, takes the frames and their rate and returns the input.
    """

    def __init__(self, preprocess: AudioPreprocess, function: str | AudioFunction | None = None) -> None:
        """Raises ``SamplesError`` where there is no such function."""
        self.preprocess = preprocess
        self._function: AudioFunction | None = None
        if function is None:
            return
        if isinstance(function, str):
            name, self._function = function, find_reference(function, SamplesError, "preprocess function")
        else:
            name, self._function = reference_to(function), function
        self.preprocess = replace(preprocess, function=name)

    def __call__(self, item: Any) -> Any:
        """One sample's inputs. Raises ``UnreadableItem``."""
        is_file = isinstance(item, Path | bytes)
        recording = open_audio(item, preprocess=self.preprocess) if is_file else array_recording(*item)
        if self._function is None:
            return audio_array(recording, self.preprocess)
        frames = _cut(recording, self.preprocess)
        with guard(
            SamplesError, f"the preprocess function failed on {item if isinstance(item, Path) else 'a recording'}"
        ):
            return self._function(frames, self.preprocess.rate_hz)


def audio_samples(recordings: RawSamples, reader: AudioReader) -> Samples:
    """Samples of what ``reader`` makes of recordings. Raises as ``RawSamples.tensors``."""
    samples, preprocess = recordings.tensors(reader), reader.preprocess
    shortest = 0 if preprocess.function is not None else min(shapes[0][-1] for shapes in samples.shapes)
    return replace(samples, audio=replace(preprocess, shortest=shortest))


def missing_packages() -> str:
    """The packages that recordings need and that are not installed; the others are imported, which takes seconds."""
    missing = []
    for name in ("soundfile", "scipy.signal"):
        try:
            import_module(name)
        except (ImportError, OSError):
            missing.append(name.partition(".")[0])
    return " and ".join(missing)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # the wheel is there, libsndfile is not
        raise MissingExtra("soundfile", "audio", "reading recordings") from None
    return soundfile
