"""Recordings in, answers out, as images are: decoded and resampled by threads, in calls of one length."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.pipeline.photos import Decoded, MediaRunner, meaning
from corewise.pipeline.runner import Rejected, Run
from corewise.records.pipeline import AudioPipeline
from corewise.records.report import AudioPreprocess
from corewise.samples.audio import AUDIO_SUFFIXES, AudioReader
from corewise.samples.folders import list_files

NUMBERS = (int, float, np.integer, np.floating)


def audio_pipeline(
    preprocess: AudioPreprocess, golden: Sequence[NDArray[Any]], labels: Sequence[str] = ()
) -> AudioPipeline:
    """The pipeline of a model of recordings, by a few of its outputs: classes as of images, else vectors."""
    task, activation = meaning(golden[0])
    ragged = golden[0].ndim > 2
    return AudioPipeline(task=task, preprocess=preprocess, labels=tuple(labels), activation=activation, ragged=ragged)


class AudioRunner(MediaRunner):
    """Runs recordings through a model's instances. Thread-safe."""

    noun = "recording"
    pipeline: AudioPipeline

    def __init__(
        self,
        pipeline: AudioPipeline,
        run: Run,
        *,
        instances: int,
        rows: int,
        reader: Callable[[Any], Any] | None = None,
        whole: Run | None = None,
    ) -> None:
        """As ``ImageRunner``; ``reader`` makes the input of a recording, in place of the pipeline's preprocessing."""
        decoders = len(os.sched_getaffinity(0)) if reader is None else 1
        super().__init__(run, instances=instances, rows=rows, decoders=decoders, whole=whole)
        self.pipeline = pipeline
        self._read = reader or AudioReader(pipeline.preprocess)

    def _listed(self, items: Any) -> Any:
        """The recordings of a folder."""
        is_folder = isinstance(items, str | Path) and os.path.isdir(items)
        return list_files([items], AUDIO_SUFFIXES, "recordings") if is_folder else items

    def _is_one(self, items: Any) -> bool:
        """Whether it is a path, a content, an array and its rate, or nothing that recordings could be taken from."""
        single = isinstance(items, str | Path | bytes | bytearray | memoryview) or not isinstance(items, Iterable)
        return single or hasattr(items, "dtype") or _is_array_with_rate(items)

    def _decoded(self, item: Any) -> Decoded | Rejected:
        if not (isinstance(item, Path | bytes) or _is_array_with_rate(item)):
            return Rejected(f"is a {type(item).__name__}, not a path, bytes or (array, rate)")
        array = np.asarray(self._read(item))
        why = too_short(array, self.pipeline.preprocess)
        return Rejected(why) if why else Decoded(array)


def too_short(array: NDArray[Any], preprocess: AudioPreprocess) -> str:
    """Why a recording that became this array was not verified to be answered well; nothing if it was."""
    if not preprocess.shortest or array.shape[-1] >= preprocess.shortest:
        return ""
    seconds, shortest_s = array.shape[-1] / preprocess.rate_hz, preprocess.shortest / preprocess.rate_hz
    return f"has {seconds:.3g} s, less than the shortest sample, {shortest_s:.3g} s"


def _is_array_with_rate(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and hasattr(item[0], "dtype") and isinstance(item[1], NUMBERS)
