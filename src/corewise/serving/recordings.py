"""Recordings as they are: what they are decoded to."""

from collections.abc import Sequence

import numpy as np

from corewise.pipeline.recordings import too_short
from corewise.records.report import AudioPreprocess
from corewise.samples.audio import BLOCK_VALUES, audio_array, audio_size, open_audio
from corewise.serving.files import Batch, Work, file_name, told
from corewise.serving.memory_limit import FRAME_BYTES
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.served import Served

KIND, NOUN = "frames", "recording"
VALUE_BYTES = 4
COPIES_MADE = 2
"""Copies of the input while it is resampled and normalised."""


def work(body: bytes, name: str, served: Served, limits: Limits) -> Work:
    """What the frames of a recording take, by its header; those that are cut off are not decoded.

    Raises ``ProtocolError`` where it is not a recording, is too long, or the model takes none.
    """
    preprocess = _preprocess(served)
    with told():
        size = audio_size(body, preprocess, name)
    values, made_bytes = size.frames * size.channels, VALUE_BYTES * size.made
    if values > limits.samples:
        what = f"{name} has {values:,} samples in its channels, the server takes {limits.samples:,}"
        raise ProtocolError(what, "send it in parts", 413)
    if made_bytes > limits.body_bytes:
        most = limits.body_bytes // VALUE_BYTES
        what = f"{name} has {size.made:,} frames at {preprocess.rate_hz} Hz, the server takes {most:,}"
        raise ProtocolError(what, "send it in parts", 413)
    block_bytes = VALUE_BYTES * min(values, BLOCK_VALUES)
    return Work(values, FRAME_BYTES * size.frames + block_bytes + COPIES_MADE * made_bytes, made_bytes)


def batch(bodies: Sequence[bytes], served: Served) -> Batch:
    """Recordings as the model takes them. Raises ``ProtocolError`` as ``work`` does."""
    preprocess, arrays = _preprocess(served), []
    with told():
        names = [file_name(NOUN, number, len(bodies)) for number in range(len(bodies))]
        for name, body in zip(names, bodies, strict=True):
            arrays.append(audio_array(open_audio(body, name, preprocess), preprocess))
    for name, array in zip(names, arrays, strict=True):
        if why := too_short(array, preprocess):
            raise ProtocolError(f"{name} {why}", "send a longer one", 415)
        if served.audio is not None and not served.audio.takes(array.shape):
            what = f"{name} becomes an input of shape {array.shape}, the model takes {served.audio.shape}"
            raise ProtocolError(what, "send one of that length", 415)
    if len({array.shape for array in arrays}) > 1:
        raise ProtocolError(
            "the recordings differ in length, and the model does not cut or pad them", "send one per request"
        )
    return Batch(np.stack(arrays), ((0, 0),) * len(arrays))


def _preprocess(served: Served) -> AudioPreprocess:
    if served.audio is None or not served.takes_files:
        raise ProtocolError(f"the model {served.name} takes no recordings", "send tensors to .../infer", 501)
    return served.audio.preprocess
