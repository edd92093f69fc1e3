"""Images in, answers out, in the order of the input: decoded by threads, put into calls, and run on all instances."""

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import IOBase
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from corewise.common.detections import Head, find_head
from corewise.common.errors import InputError
from corewise.common.phrases import with_article
from corewise.pipeline.answers import ClassAnswer, activate
from corewise.pipeline.boxes import Thresholds, detected
from corewise.pipeline.runner import Rejected, Run
from corewise.records.build import Plan
from corewise.records.pipeline import Activation, ImagePipeline, ImageTask, MediaPipeline
from corewise.records.report import Preprocess
from corewise.samples.archives import Slice, is_archive, read_archive
from corewise.samples.folders import list_images
from corewise.samples.image_files import is_image, is_pil
from corewise.samples.images import ImageReader
from corewise.samples.places import RemotePath, place_of
from corewise.samples.raw import UnreadableItem

TOP = 5
"""Classes that an answer names, unless it is asked for more."""
ROWS_ALONE = 8
FETCHERS = 16
"""Photos of an object store that are fetched at the same time: each waits for the network."""
SUM_ERROR = 1e-2
"""How far the sum of probabilities may be from 1 for int8 and bf16."""


@dataclass(frozen=True, kw_only=True)
class ImageAsk:
    """What is wanted of each image or recording."""

    top: int = TOP
    """How many classes an answer names."""
    score_threshold: float | None = None
    """For a detector, the least score of an object. Default: 0.25 where boxes overlap (YOLO, SSD), else 0.5 (DETR)."""
    iou_threshold: float | None = None
    """For a detector whose boxes overlap, the overlap with a better box at which a box is left out. Default: 0.45."""

    def thresholds(self, head: Head | None) -> Thresholds | None:
        """Which detections count; ``None`` for a model that is no detector.

        Raises ``InputError`` for thresholds that are not in 0..1, or of such a model.
        """
        if head is not None:
            return Thresholds.of(head, self.score_threshold, self.iou_threshold)
        for name, given in (("score", self.score_threshold), ("IoU", self.iou_threshold)):
            if given is not None:
                what = f"{with_article(name)} threshold applies to boxes, and the model gives none"
                raise InputError(what, "leave it out")
        return None


USUAL = ImageAsk()


class Decoded(NamedTuple):
    """An item's input, and the width and height of the upright photo where its boxes are wanted."""

    array: NDArray[Any]
    size: tuple[int, int] = (0, 0)


class _Call(NamedTuple):
    """Items in work: the input of each, and the outputs of those that can be read, in their order, of one row each."""

    decoded: "list[Future[Decoded | Rejected]]"
    outputs: "Future[list[list[NDArray[Any]]]]"


def content_of(source: str | Slice) -> Path | bytes:
    """A file's path, or the content of one in an object store or a tar file. Raises ``OSError`` if it is not there."""
    if isinstance(source, Slice):
        return source.read()
    place = place_of(source)
    return place.read_bytes() if isinstance(place, RemotePath) else place


def _fetched(item: Any, fetchers: ThreadPoolExecutor) -> Any:
    """The item, or what will be the content of one in an object store or a tar file."""
    remote = isinstance(item, Slice) or (isinstance(item, str) and "://" in item)
    return fetchers.submit(content_of, item) if remote else item


def rows_of_call(plan: Plan) -> int:
    """The images of a call; more than one to a single instance whose plan is for single items."""
    return plan.batch if plan.batch > 1 or plan.instances > 1 else ROWS_ALONE


def image_pipeline(
    preprocess: Preprocess, golden: Sequence[NDArray[Any]], labels: Sequence[str] = (), names: Sequence[str] = ()
) -> ImagePipeline:
    """The pipeline of a model of images, by a few of its outputs and their names.

    Rows of one number for each class are classes, and probabilities where they are none below 0 and sum to 1;
    otherwise softmax makes probabilities of them. Outputs of a detector are boxes (``common.detections``).
    """
    first = golden[0]
    if preprocess.function is None:  # only where it is known which part of a photo the input shows
        numbered = names or [f"output_{number}" for number in range(len(golden))]
        head = find_head(numbered, golden, len(labels) or None)
        # A map of probabilities looks like relative boxes; only the number of classes tells them apart.
        if head is not None and not (head.relative and len(golden) == 1 and not labels):
            return ImagePipeline(task="boxes", preprocess=preprocess, labels=tuple(labels), head=head)
    task, activation = meaning(first)
    return ImagePipeline(task=task, preprocess=preprocess, labels=tuple(labels), activation=activation)


def meaning(output: NDArray[Any]) -> tuple[ImageTask, Activation]:
    """Whether outputs are classes or vectors, and what makes probabilities of them."""
    if output.ndim != 2 or output.shape[1] == 1:
        return "vectors", "none"
    are_probabilities = output.min() >= 0 and np.allclose(output.sum(1), 1, atol=SUM_ERROR)
    return "classes", "none" if are_probabilities else "softmax"


def check_top(pipeline: MediaPipeline, top: int | None) -> None:
    """Raise ``InputError`` if a number of classes is asked for and is none, or the model gives no classes."""
    if top is None:
        return
    if pipeline.task != "classes":
        raise InputError(f"top is a number of classes, and the model gives {pipeline.task}", "leave it out")
    if not isinstance(top, int | np.integer) or top < 1:
        raise InputError(f"top is {top}", "give a whole number, 1 or more")


def top_classes(pipeline: MediaPipeline, row: NDArray[Any], top: int) -> list[tuple[int, str, float]]:
    """The most probable classes of one row (classes,): number, name (the number, where it has none), probability."""
    probabilities = activate(row, pipeline.activation)
    best = np.argpartition(-probabilities, min(top, len(row)) - 1)[:top]
    best = best[np.argsort(-probabilities[best], kind="stable")]
    return [(int(k), pipeline.label(int(k)), float(probabilities[k])) for k in best]


def run_alike(run: Run, inputs: Sequence[NDArray[Any]]) -> list[list[NDArray[Any]]]:
    """The outputs of each input, of one row each; inputs of one shape share a call.

    Example:
        >>> inputs = [np.full(size, size) for size in (1, 2, 1)]
        >>> run_alike(lambda arrays: [arrays[0].sum(1)], inputs)
        [[array([1])], [array([4])], [array([1])]]
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, array in enumerate(inputs):
        alike.setdefault(array.shape, []).append(number)
    found: dict[int, list[NDArray[Any]]] = {}
    for numbers in alike.values():
        outputs = run([np.stack([inputs[number] for number in numbers])])
        found |= {number: [output[row : row + 1] for output in outputs] for row, number in enumerate(numbers)}
    return [found[number] for number in range(len(inputs))]


class MediaRunner(ABC):
    """Runs items that are decoded one by one through a model's instances. Thread-safe."""

    noun: ClassVar[str]
    pipeline: MediaPipeline

    def __init__(self, run: Run, *, instances: int, rows: int, decoders: int, whole: Run | None = None) -> None:
        """``run`` takes calls of ``rows`` items from ``instances`` threads; ``decoders`` threads make their inputs.

        ``whole`` takes calls that have others beside them: to divide those among instances that wait for photos would
        only make them smaller, and an engine takes longer for each row of a small call.
        """
        self._run = run
        self._whole = whole or run
        self._instances = instances
        self._rows = rows
        self._decoders = decoders
        self.calls_ended = 0
        """Rises while the engine answers."""

    def answers(self, items: Iterable[Any], ask: ImageAsk = USUAL) -> Iterator[Any]:
        """The answer to each item, in order; ``Rejected`` for one that cannot be read.

        Items are taken as they are needed, a few calls ahead of the answers, so that memory is bounded.

        Args:
            items: Of images paths, contents (``bytes``), PIL images, or uint8 arrays (H, W, 3) or (H, W, 1); of
                recordings paths, contents, or tuples of an array and its rate.
            ask: What is wanted of each.

        Returns:
            A ``ClassAnswer`` each, whose probabilities are those of the ``top`` classes; of a detector, a list of
            ``Detection`` each, the surest first; or the output's row.

        Raises:
            InputError: ``top`` is below 1, a threshold is not in 0..1, or the model is no detector.
            EngineError: The engine fails.
        """
        thresholds = ask.thresholds(self.pipeline.head)
        if not isinstance(ask.top, int | np.integer) or ask.top < 1:
            raise InputError(f"top is {ask.top}", "give a whole number, 1 or more")
        ahead: deque[_Call] = deque()
        most_ahead = self._instances + ceil(self._decoders / self._rows)
        decoders = ThreadPoolExecutor(self._decoders, "corewise-decode")
        callers = ThreadPoolExecutor(self._instances, "corewise-call")
        fetchers = ThreadPoolExecutor(FETCHERS, "corewise-fetch")
        try:
            rest = iter(items)
            while chunk := [_fetched(item, fetchers) for item in islice(rest, self._rows)]:
                ahead.append(self._start(chunk, self._whole if ahead else self._run, decoders, callers))
                while len(ahead) > most_ahead:
                    yield from self._finish(ahead.popleft(), ask.top, thresholds)
            while ahead:
                yield from self._finish(ahead.popleft(), ask.top, thresholds)
        finally:
            decoders.shutdown(cancel_futures=True)
            callers.shutdown(cancel_futures=True)
            fetchers.shutdown(cancel_futures=True)

    def predict(self, items: Any, ask: ImageAsk = USUAL) -> Any:
        """The answers to a list of items, together; to an iterator, as an iterator; to a single item, alone.

        A folder stands for all its files of that kind, in the order of ``list_files``.

        Raises ``InputError`` for an item that cannot be read, with its number.
        """
        taken_singly = isinstance(items, Iterator)
        items = self._listed(items)
        if self._is_one(items):
            return next(self._checked([items], ask))
        answers = self._checked(items, ask)
        if taken_singly:
            return answers
        made = list(answers)
        alike = self.pipeline.task == "vectors" and len({one.shape for one in made}) == 1
        return np.stack(made) if alike else made

    @abstractmethod
    def _listed(self, items: Any) -> Any:
        """The items of a folder; other items as they are."""

    @abstractmethod
    def _is_one(self, items: Any) -> bool:
        """Whether it is a single item, or nothing that items could be taken from."""

    @abstractmethod
    def _decoded(self, item: Any) -> Decoded | Rejected:
        """The input that is made of an item, which may be none; raises ``UnreadableItem``."""

    def _checked(self, items: Iterable[Any], ask: ImageAsk) -> Iterator[Any]:
        for number, answer in enumerate(self.answers(items, ask)):
            if isinstance(answer, Rejected):
                raise InputError(f"{self.noun} {number} {answer.reason}", "replace or remove it")
            yield answer

    def _start(
        self, items: Sequence[Any], run: Run, decoders: ThreadPoolExecutor, callers: ThreadPoolExecutor
    ) -> _Call:
        """Begin to decode items, and the call that waits for them."""
        decoded = [decoders.submit(self._decode, item) for item in items]

        def call() -> list[list[NDArray[Any]]]:
            inputs = [one.array for one in (future.result() for future in decoded) if not isinstance(one, Rejected)]
            outputs = run_alike(run, inputs)
            self.calls_ended += 1
            return outputs

        return _Call(decoded, callers.submit(call))

    def _decode(self, item: Any) -> Decoded | Rejected:
        if isinstance(item, Rejected):
            return item
        if isinstance(item, bytearray | memoryview):
            item = bytes(item)
        try:
            item = item.result() if isinstance(item, Future) else content_of(item) if isinstance(item, str) else item
        except OSError as error:
            return Rejected(f"cannot be read: {error.strerror}")
        try:
            made = self._decoded(item)
        except UnreadableItem as error:
            return Rejected(error.reason)
        if isinstance(made, Decoded) and not self.pipeline.takes(made.array.shape):
            return Rejected(f"becomes an input of {made.array.shape}, and the model takes {self.pipeline.shape}")
        return made

    def _finish(self, call: _Call, top: int, thresholds: Thresholds | None) -> Iterator[Any]:
        """The answers of a call, when it has ended."""
        outputs = iter(call.outputs.result())
        for one in (future.result() for future in call.decoded):
            yield one if isinstance(one, Rejected) else self._answer(next(outputs), one, top, thresholds)

    def _answer(self, outputs: list[NDArray[Any]], one: Decoded, top: int, thresholds: Thresholds | None) -> Any:
        row = outputs[0][0]
        if self.pipeline.task == "vectors":
            return row
        best = top_classes(self.pipeline, row, top)
        # Of two classes of one name, the more probable one counts.
        probabilities = {label: probability for _, label, probability in reversed(best)}
        probabilities = {label: probabilities[label] for _, label, _ in best}
        return ClassAnswer(label=best[0][1], probability=best[0][2], probabilities=probabilities)


class ImageRunner(MediaRunner):
    """Runs images through a model's instances. Thread-safe."""

    noun = "image"
    pipeline: ImagePipeline

    def __init__(
        self,
        pipeline: ImagePipeline,
        run: Run,
        *,
        instances: int,
        rows: int,
        reader: Callable[[Any], NDArray[Any]] | None = None,
        decoders: int | None = None,
        whole: Run | None = None,
    ) -> None:
        """Make a runner.

        Args:
            pipeline: What images and outputs are.
            run: Takes calls from ``instances`` threads at the same time.
            instances: How many calls run at once.
            rows: The images of a call.
            reader: Makes the input of an image, in place of the pipeline's preprocessing.
            decoders: Threads that decode, sharing the cores with the instances. Default: one for each core, but only
                one with a ``reader``, which need not be thread-safe.
            whole: As in ``MediaRunner``.
        """
        decoders = decoders or (len(os.sched_getaffinity(0)) if reader is None else 1)
        super().__init__(run, instances=instances, rows=rows, decoders=decoders, whole=whole)
        self.pipeline = pipeline
        self._read = reader or ImageReader(pipeline.preprocess)
        sizing = self._read if isinstance(self._read, ImageReader) else ImageReader(pipeline.preprocess)
        self._sized = sizing.sized if pipeline.task == "boxes" else None

    def _listed(self, items: Any) -> Any:
        """The images of a folder, or of a tar file."""
        if isinstance(items, str | Path) and os.path.isdir(items):  # also for a name too long for any file
            return list_images([items])
        if isinstance(items, str | Path) and is_archive(items):
            return (Rejected(one.problem) if one.problem else one.content for one in read_archive(place_of(items)))
        return items

    def _is_one(self, items: Any) -> bool:
        if isinstance(items, np.ndarray):
            return items.ndim < 4 and items.dtype.kind in "biuf"
        single = isinstance(items, str | Path | bytes | bytearray | memoryview | IOBase) or is_pil(items)
        return single or not isinstance(items, Iterable)

    def _decoded(self, item: Any) -> Decoded | Rejected:
        if not (isinstance(item, Path | bytes) or is_pil(item) or is_image(item)):
            found = f"{item.dtype} array {item.shape}" if isinstance(item, np.ndarray) else type(item).__name__
            return Rejected(f"is {with_article(found)}, not a path, bytes, PIL image or uint8 array (H, W, 3)")
        return Decoded(np.asarray(self._read(item))) if self._sized is None else Decoded(*self._sized(item))

    def _answer(self, outputs: list[NDArray[Any]], one: Decoded, top: int, thresholds: Thresholds | None) -> Any:
        if thresholds is not None:
            return detected(self.pipeline, outputs, [one.size], thresholds)[0]
        return super()._answer(outputs, one, top, thresholds)
