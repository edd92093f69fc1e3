"""One plan for decoding and the engine, which share the cores: measured from files to answers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corewise.common.errors import CorewiseError, InputError
from corewise.machine.layouts import ThreadLayout
from corewise.pipeline.photos import image_pipeline
from corewise.records.build import Plan
from corewise.records.events import Stage, StageStarted
from corewise.records.pipeline import ImagePipeline, PhotoPlan, PhotoRate
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Choice, Preprocess
from corewise.runtime.client import read_outputs
from corewise.samples import Samples
from corewise.search.budget import FINISHING
from corewise.search.task import Task
from corewise.search.trial import SearchContext

LEAST_FILES, MOST_FILES = 8, 64
BETTER = 1.03
"""A plan replaces the best one so far if it is at least this many times as fast; less is noise."""
SMALL_BATCH = 8
MEASURE_S = 0.5
NEEDED_S = 10.0
"""Under a budget, what must be left to measure another plan."""

Measure = Callable[[PhotoPlan], PhotoRate | None]
"""The rate of a plan; ``None`` if the engine cannot run it, or there is no more time."""


class Found(NamedTuple):
    """The rate of the winner's own plan, and the best."""

    own: PhotoRate
    best: PhotoRate


def climb(plan: Plan, cores: int, measure: Measure, *, batches: bool = True) -> Found | None:
    """Measure plans near ``plan``, each time changing one thing of the best so far.

    Args:
        plan: The winner's for tensors. With a decoder for each core it is measured first.
        cores: That decoders and instances share.
        measure: Measures one.
        batches: Whether the engine takes other batches.

    Returns:
        ``None`` if not even the first could be measured.

    Example:
        >>> def measure(photos: PhotoPlan) -> PhotoRate:
        ...     return PhotoRate(plan=photos, per_s=100.0 / photos.decoders, decoding=0.5)
        >>> climb(Plan(threads_per_instance=2, batch=8), 2, measure).best.plan.decoders
        1
    """
    own = measure(PhotoPlan(plan=plan, decoders=cores))
    if own is None:
        return None
    best, tried = own, {own.plan}
    for changed in (_layouts, _decoders, _batches) if batches else (_layouts, _decoders):
        for photos in list(changed(best.plan, cores)):
            if photos in tried:
                continue
            tried.add(photos)
            rate = measure(photos)
            if rate is not None and rate.per_s > BETTER * best.per_s:
                best = rate
    return Found(own, best)


def _layouts(photos: PhotoPlan, cores: int) -> Iterator[PhotoPlan]:
    """An instance for each core, one on all, and one that leaves cores to the decoders."""
    for layout in (ThreadLayout(1, cores), ThreadLayout(cores, 1), ThreadLayout(max(1, cores // 2), 1)):
        yield replace(photos, plan=layout.plan(photos.plan.batch))


def _decoders(photos: PhotoPlan, cores: int) -> Iterator[PhotoPlan]:
    for decoders in (max(1, cores // 2), cores + max(1, cores // 2)):
        yield replace(photos, decoders=decoders)


def _batches(photos: PhotoPlan, cores: int) -> Iterator[PhotoPlan]:
    if photos.plan.batch != SMALL_BATCH:
        yield replace(photos, plan=replace(photos.plan, batch=SMALL_BATCH))


def photo_files(samples: Samples) -> tuple[Path, ...]:
    """The files of samples that are photos, some of them; nothing for other samples."""
    preprocess, photos = samples.preprocess, samples.originals
    if preprocess is None or preprocess.function is not None or photos is None:
        return ()
    items = photos.items[:MOST_FILES]
    return tuple(items) if len(items) >= LEAST_FILES and all(isinstance(item, Path) for item in items) else ()


def plan_photos(task: Task, preprocess: Preprocess, choice: Choice, context: SearchContext) -> Found | None:
    """The plan with which the winner answers most photos a second, from files; ``None`` without files or time."""
    files = photo_files(task.holdout)
    if not files or context.budget.left_s(FINISHING) < NEEDED_S:
        return None
    outputs = read_outputs(context.workspace.outputs(choice.winner)).rows(np.arange(1))
    golden, names = [np.stack(list(leaf)) for leaf in outputs.leaves], [spec.name for spec in task.exported.outputs]
    pipeline = image_pipeline(preprocess, golden, task.class_names or (), names)
    context.on_event(StageStarted(Stage.FROM_FILES, build=choice.winner))
    measure = _measuring(files, pipeline, choice, context)
    return climb(choice.plan, context.cpu.usable_cores, measure, batches=choice.winner.fixed_batch is None)


def _measuring(files: tuple[Path, ...], pipeline: ImagePipeline, choice: Choice, context: SearchContext) -> Measure:
    build, payload = choice.winner, context.workspace.payload(choice.winner)

    def measure(photos: PhotoPlan) -> PhotoRate | None:
        if context.budget.left_s(FINISHING) < NEEDED_S:
            return None
        try:
            with context.client(build, share=FINISHING) as client:
                rate = client.measure_photos(payload, build, photos, pipeline, files, MEASURE_S)
        except InputError:
            raise
        except CorewiseError:
            return None  # The other plans are measured all the same.
        return rate if context.requirements.within_memory(rate.memory_bytes) else None

    return measure


def reason_of(found: Found) -> Reason:
    """What the report says about it."""
    plan, best = found.best.plan, found.best
    return Reason.of(
        ReasonKind.FROM_FILES,
        per_s=best.per_s,
        own_per_s=found.own.per_s,
        decoders=plan.decoders,
        plan=plan.plan.label,
        decoding=best.decoding,
    )
