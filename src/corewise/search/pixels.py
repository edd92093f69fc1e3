"""Whether the winner takes the pixels of photos and normalizes them itself: its answers and its speed decide."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.groups import decibels
from corewise.accuracy.outputs import Outputs
from corewise.common.errors import CorewiseError, InputError
from corewise.engines import Engine
from corewise.engines.base import PixelScale, PixelTaking
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Choice, Preprocess
from corewise.runtime.client import Client, read_outputs
from corewise.samples import Samples
from corewise.samples.images import normalize_pixels, restore_pixels
from corewise.search.budget import FINISHING
from corewise.search.trial import SearchContext

LEAST_DB = 50.0
"""How near the answers to pixels must be to those to normalized photos."""
PHOTOS = 32
"""Photos of the holdout that are answered both ways."""
ROUNDS, ROUND_S = 5, 0.2
BETTER = 1.03
"""Pixels are taken if at least this many times as many photos are answered: the engine then holds the model twice."""
OPEN_S = 10.0
"""Under a budget, what is left for opening the payload twice."""


def judge_pixels(holdout: Samples, choice: Choice, context: SearchContext, engine: Engine) -> Reason | None:
    """Have the winner's payload take pixels, if it so answers the same and more photos a second.

    A second has the time of all cores: one of them normalizes photos while the engine has the others.

    Returns:
        ``TAKES_PIXELS``, or ``TAKES_FLOATS`` if the payload stays as it was; ``None`` if there was no choice.
    """
    preprocess = holdout.preprocess
    if preprocess is None or preprocess.function is not None or not isinstance(engine, PixelTaking):
        return None
    pixels = _pixels(holdout, preprocess)
    if pixels is None:
        return None
    # An earlier run that was interrupted may have left the file, so it is made, and removed, in any case.
    told = engine.take_pixels(context.workspace.payload(choice.winner), scale_of(preprocess))
    reason: Reason | None = None
    try:
        if _needed_s(choice) <= context.budget.left_s(FINISHING):
            reason = _compared(holdout, pixels, choice, context)
    except InputError:
        raise
    except CorewiseError:
        pass  # The winner is what it was; only this choice was not made.
    finally:
        if reason is None or reason.kind != ReasonKind.TAKES_PIXELS:
            told.unlink()
    return reason


def scale_of(preprocess: Preprocess) -> PixelScale:
    """How an engine normalizes pixels as ``normalize_pixels`` does."""
    mean, std = (tuple(255 * value for value in values) for values in (preprocess.mean, preprocess.std))
    return PixelScale(mean=mean, std=std)


def _compared(holdout: Samples, pixels: NDArray[np.uint8], choice: Choice, context: SearchContext) -> Reason:
    assert holdout.preprocess is not None  # as ``judge_pixels`` has seen
    folder, plan = context.workspace.folder, choice.plan
    ways = {"floats": holdout.take(range(len(pixels))), "pixels": _samples(pixels, holdout)}
    files = {way: folder / f"{way}.safetensors" for way in ways}
    for way, samples in ways.items():
        samples.save(files[way])
    with context.client(choice.winner, share=FINISHING) as client:
        client.open(context.workspace.payload(choice.winner), choice.winner, plan)
        answers = {}
        for way, file in files.items():
            outputs = file.with_name(f"{way}-outputs.safetensors")
            client.run_samples(file, plan.batch, outputs, alone=False)
            answers[way] = read_outputs(outputs)
        apart_db = _apart_db(answers["floats"], answers["pixels"])
        if apart_db < LEAST_DB:
            return Reason.of(ReasonKind.TAKES_FLOATS, decibels=apart_db, least_db=LEAST_DB)
        floats_per_s, pixels_per_s = _rates(client, tuple(files.values()), plan.batch)
        memory_bytes = client.measure(files["pixels"], plan, ROUND_S).memory_bytes
    normalize_s = _normalizing_s(pixels, holdout.preprocess)
    ratio = pixels_per_s * (1 / floats_per_s + normalize_s / context.cpu.usable_cores)
    takes_pixels = ratio > BETTER and context.requirements.within_memory(memory_bytes)
    kind = ReasonKind.TAKES_PIXELS if takes_pixels else ReasonKind.TAKES_FLOATS
    return Reason.of(
        kind,
        decibels=apart_db,
        least_db=LEAST_DB,
        ratio=ratio,
        normalize_ms=normalize_s * 1e3,
        memory_bytes=memory_bytes,
    )


def _pixels(holdout: Samples, preprocess: Preprocess) -> NDArray[np.uint8] | None:
    """The pixels of some of the holdout's photos, (N, H, W, C); ``None`` where its rows are something else."""
    rows = [holdout.rows[number] for number in range(min(PHOTOS, len(holdout)))]
    if any(len(row) != 1 or row[0].ndim != 3 for row in rows) or len({row[0].shape for row in rows}) > 1:
        return None
    return restore_pixels(np.stack([row[0] for row in rows]), preprocess)


def _samples(pixels: NDArray[np.uint8], holdout: Samples) -> Samples:
    return Samples(rows=[(photo,) for photo in pixels], structure=holdout.structure, source=holdout.source)


def _apart_db(expected: Outputs, answers: Outputs) -> float:
    """The lowest SQNR of an output, in decibels."""
    found = []
    for ours, theirs in zip(expected.leaves, answers.leaves, strict=True):
        exact, other = (np.stack(list(leaf)).astype(np.float64) for leaf in (ours, theirs))
        finite = np.isfinite(exact) & np.isfinite(other)
        if not np.array_equal(exact[~finite], other[~finite], equal_nan=True):
            return -decibels(1.0, 0.0)
        found.append(decibels(float(np.square(exact[finite]).sum()), float(np.square((other - exact)[finite]).sum())))
    return min(found)


def _rates(client: Client, files: Sequence[Path], batch: int) -> list[float]:
    """The median rate of calls with the samples of each file, per second, in alternating rounds."""
    rates: dict[Path, list[float]] = {file: [] for file in files}
    for _ in range(ROUNDS):
        for file in files:
            client.warm_up(file, batch, 0.0)
            rates[file].append(client.run_round(ROUND_S).per_s)
    return [median(rates[file]) for file in files]


def _normalizing_s(pixels: NDArray[np.uint8], preprocess: Preprocess) -> float:
    """Seconds that a core takes to normalize a photo: the median of all."""
    seconds = []
    for photo in pixels:
        started_s = perf_counter()
        normalize_pixels(photo, preprocess)
        seconds.append(perf_counter() - started_s)
    return median(seconds)


def _needed_s(choice: Choice) -> float:
    """About how long it takes to judge both ways."""
    call_s = choice.plan.batch * choice.plan.instances / choice.throughput_per_s
    return OPEN_S + 2 * (PHOTOS * choice.plan.instances / choice.throughput_per_s + ROUNDS * (ROUND_S + 3 * call_s))
