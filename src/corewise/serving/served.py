"""One artifact in service: its engine process, its batcher, and what became of its requests."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from corewise import artifact
from corewise.artifact import tuned
from corewise.artifact.open import check_available
from corewise.artifact.photos import images_of
from corewise.artifact.recordings import audio_of
from corewise.artifact.texts import packing_under, text_pipeline
from corewise.artifact.watch import RangeWatch, pixel_extremes
from corewise.batching import ONE_BATCH, Answer, Batcher, NotServed, Run, policy_of
from corewise.common.errors import ArtifactError
from corewise.engines import ENGINES, engine
from corewise.engines.base import mixes_rows
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import TensorSpec
from corewise.records.pipeline import AudioPipeline, ImagePipeline, Packing
from corewise.samples.audio import missing_packages
from corewise.serving.frames import Frames
from corewise.serving.protocol import InferRequest
from corewise.serving.remote import Remote
from corewise.serving.shadow import Shadow
from corewise.serving.short_texts import ShortTexts
from corewise.serving.statistics import Statistics
from corewise.serving.text import TextInput
from corewise.serving.values import Values

log = logging.getLogger("corewise.serve")

MAX_WAITING = 1024
NATIVE = ("inductor", "torch-int8")
"""Engines whose payloads are code: whoever made one can do what the server may."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An artifact as the command line names it."""

    name: str
    version: str
    folder: Path

    @classmethod
    def of(cls, text: str) -> "Source":
        """``[NAME[@VERSION]=]FOLDER``; by default the folder's name without ``.cw``, and version 1.

        What is a folder as it stands is one, as names of folders may have ``=`` in them too.
        """
        told, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():
            told, folder = "", text
        name, _, version = told.partition("@")
        path = Path(folder)
        return cls(name=name or path.resolve().name.removesuffix(".cw"), version=version or "1", folder=path)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Which payloads that are code may be opened."""

    everything: bool = False
    digests: frozenset[str] = frozenset()
    """sha256 of manifests, which hold the hashes of all other files."""

    def check(self, found: artifact.Artifact, digest: str) -> None:
        """Raise ``ArtifactError`` where the payload of the artifact of that digest is code that nobody vouched for."""
        engine = found.manifest.build.engine
        if engine in NATIVE and not self.everything and digest not in self.digests:
            raise ArtifactError(
                f"{found.folder} holds code ({engine}), which runs with this server's rights",
                f"if you trust who made it, give --trust, or put {digest} into the file of --trust-file",
            )


class Served:
    """An artifact that answers requests. Thread-safe."""

    def __init__(
        self,
        source: Source,
        *,
        trust: Trust,
        max_waiting: int = MAX_WAITING,
        shadow: float = 0.0,
        check_finite: bool = False,
    ) -> None:
        """Check, open, prove and warm it. ``shadow`` is the share of requests that fp32 answers too (``Shadow``).

        Raises ``ArtifactError`` and ``EngineError`` with why it cannot serve.
        """
        cpu = inspect_cpu()
        identity = artifact.identity(source.folder) if (source.folder / artifact.MANIFEST).is_file() else ""
        found = artifact.read(source.folder, cpu=cpu)
        build = found.manifest.build
        if build.engine not in ENGINES:
            raise ArtifactError(
                f"{source.folder} needs the engine {build.engine}, which is not corewise's",
                "serve artifacts of corewise's own engines only",
            )
        trust.check(found, identity)
        check_available(build.engine, f"serving {source.folder}")
        fit, tables = tuned.for_requests(found, tuned.fit(found, cpu))
        curve, notes = tuned.usable_table(found, fit, cpu)
        max_rows = max(max_waiting, fit.plan.batch)
        policy = policy_of(
            curve,
            tables,
            max_batch=fit.plan.batch,
            max_waiting=max_rows,
            shared=not mixes_rows(engine(build.engine), build),
        )
        self.name, self.version = source.name, source.version
        self.manifest = found.manifest
        self.values = Values(found, check_finite=check_finite)
        self.plan, self.notes = fit.plan, (*fit.warnings, *notes, *self.values.notes)
        self.elastic = fit.elastic
        """The layouts that are open, if these are two; ``plan`` is then the narrow one."""
        self.inputs: tuple[TensorSpec, ...] = found.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = found.manifest.outputs
        pipeline = text_pipeline(found)
        self.text = None if pipeline is None else TextInput(found, pipeline, self.values.ranges)
        self.photos, self.audio = images_of(found), audio_of(found)
        why = self._no_files()
        self.takes_files = self.media is not None and not why
        """Whether a request may have images or recordings, as BYTES, in place of tensors."""
        if why:
            self.notes = (*self.notes, f"it takes tensors but no {why}")
        self.frames = Frames(self.inputs, self.outputs, self.instead)
        self.statistics = Statistics()
        self.ranges = RangeWatch(found.manifest.seen_ranges)
        self._told_ranges = False
        self.draining = self.has_priorities = False
        self._max_rows = max_rows
        self.shadow = Shadow(found, shadow) if shadow > 0 else None
        with ExitStack() as undo:
            if self.shadow is not None:
                undo.callback(self.shadow.close)
            wide = None if fit.elastic is None else fit.elastic.wide
            packing = self._packing()
            self.remote = Remote(
                source.folder.resolve(),
                identity,
                fit.plan,
                cpu,
                wide=wide,
                packed=packing is not None,
                on_death=self._died,
            )
            undo.pop_all()
        self._batcher = Batcher(
            [partial(self.remote.run, number) for number in range(self.plan.instances + (wide is not None))],
            policy,
            joining=ONE_BATCH if packing is None else self._short_texts(packing),
            reopen=self._reopen,
        )

    def _packing(self) -> Packing | None:
        """How short texts share rows; ``None`` where they do not."""
        if self.text is None or self.elastic is not None or len(self.outputs) > 1:
            return None
        if self.plan.batch == 1:  # no requests share a call, and the second program would only take memory
            return None
        takes = {each.role for each in self.text.pipeline.inputs}
        return packing_under(self.plan, self.manifest) if takes == {"ids", "mask"} else None

    def _short_texts(self, packing: Packing) -> ShortTexts:
        assert self.text is not None  # as ``_packing`` has seen
        run, instances = self.remote.run, self.plan.instances
        return ShortTexts(
            self.text.pipeline,
            packing,
            self.manifest,
            self.plan,
            self.text.encoder.collate,
            lambda instance, arrays: run(instances + instance, arrays),
        )

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self.remote.alive and not self.draining

    @property
    def pids(self) -> list[int]:
        """The ids of its processes: the engine's, and that of fp32 if that answers too."""
        shadow = None if self.shadow is None else self.shadow.pid
        return [pid for pid in (self.remote.pid, shadow) if pid is not None]

    @property
    def plan_label(self) -> str:
        """The plan in words, or both layouts of an elastic one."""
        return self.plan.label if self.elastic is None else self.elastic.label

    @property
    def instead(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The inputs that a request may have in place of all of the model's own: each of these sets."""
        if not self.takes_files:
            return () if self.text is None else (self.text.specs,)
        taken = {spec.name for spec in self.inputs}
        if self.photos is None:
            name = next(name for name in ("audio", "recording", "sound") if name not in taken)
            return ((TensorSpec(name=name, dtype="object", shape=(None,)),),)
        name = next(name for name in ("image", "images", "photos") if name not in taken)
        image, preprocess = TensorSpec(name=name, dtype="object", shape=(None,)), self.photos.preprocess
        if preprocess.dtype != "uint8":
            return ((image,),)
        name = next(name for name in ("pixels", "levels", "uint8_pixels") if name not in taken)
        side = None if preprocess.fit == "keep" else preprocess.crop
        shape = (None, side, side, len(preprocess.mean))
        return (image,), (TensorSpec(name=name, dtype="uint8", shape=shape),)

    @property
    def media(self) -> ImagePipeline | AudioPipeline | None:
        """What the model's outputs for files are, if it was made from images or recordings."""
        return self.photos if self.photos is not None else self.audio

    @property
    def file_call(self) -> str | None:
        """The last part of the path at which a file is answered for people; ``None`` where none is."""
        if self.media is None or not self.takes_files:
            return None
        return {"classes": "classify", "boxes": "detect", "vectors": None}[self.media.task]

    def _no_files(self) -> str:
        """Which files the model does not take although it was made from some, and why not; nothing if it does."""
        if self.media is None:
            return ""
        noun = "images" if self.photos is not None else "recordings"
        if (function := self.media.preprocess.function) is not None:
            return f"{noun}: its {noun} are prepared by {function}, which is code and not in the artifact"
        if self.audio is not None and (missing := missing_packages()):
            return f"{noun}: reading them needs {missing}; pip install 'corewise[audio]'"
        return ""

    def prepared(self, request: InferRequest) -> InferRequest:
        """With texts as the model takes them, and values that it has a place for. Raises ``ProtocolError``."""
        if self.text is not None and request.inputs[0].dtype == object:
            request = replace(request, inputs=self.text.arrays(request.inputs))
        if not self.are_pixels(request.inputs):
            self.values.check(request.inputs)
        return request

    def are_pixels(self, inputs: Sequence[np.ndarray]) -> bool:
        """Whether a request has pixels in place of the model's own input; their shape was checked."""
        return self.photos is not None and self.photos.preprocess.dtype == "uint8" and inputs[0].dtype == np.uint8

    def text_bytes(self, request: InferRequest) -> int:
        """How much text a request has to be tokenized; 0 where it has none.

        Raises ``NotServed`` for more texts than may wait.
        """
        if self.text is None or request.inputs[0].dtype != object:
            return 0
        if len(request.inputs[0]) > self._max_rows:
            raise NotServed("too large")
        return sum(len(item) for column in request.inputs for item in column)

    def takes_as(self, other: "Served") -> bool:
        """Whether a request that was read, checked and prepared for the other one is one for this one too."""
        return self._form == other._form

    @property
    def _form(self) -> tuple[object, ...]:
        """What requests are read, checked and prepared by."""
        manifest, texts = self.manifest, None if self.text is None else self.text.pipeline
        return (manifest.inputs, manifest.outputs, self.values.ranges, manifest.preprocess, manifest.audio, texts)

    def described_inputs(self) -> list[dict[str, Any]]:
        """The inputs as the model's metadata lists them."""
        return self.values.described([spec for specs in self.instead for spec in specs])

    def described_statistics(self) -> dict[str, Any]:
        """As Triton's extension ``statistics`` has them."""
        return {"name": self.name, "version": self.version, **self.statistics.described()}

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._batcher.waiting_rows

    @property
    def slowness(self) -> float:
        """How many times as long as measured calls last now, at least 1."""
        return self._batcher.slowness

    def expected_s(self, ahead_rows: int = 0) -> float:
        """About how long a row that came now would take, behind all that wait and ``ahead_rows`` more."""
        return self._batcher.expected_s(ahead_rows)

    def keep_margin(self, margin_s: float) -> None:
        """Admit only requests whose answers should be there so long before their deadlines."""
        self._batcher.keep_margin(margin_s)

    def submit(self, inputs: Sequence[np.ndarray], *, timeout_s: float = inf, priority: int = 0) -> "Future[Answer]":
        """Queue a request; see ``Batcher.submit``. More rows than the plan's batch run as several calls."""
        started_s = time.monotonic()
        self.has_priorities |= priority != 0
        try:
            parts = self._submitted(inputs, timeout_s, priority)
        except NotServed:
            self.statistics.not_served()
            raise
        future = parts[0] if len(parts) == 1 else _together(parts)
        future.add_done_callback(partial(self._ended, inputs, started_s))
        return future

    def close(self, drain_s: float = inf) -> bool:
        """Refuse what comes, finish what was accepted for so long at most, and end the process; whether all was."""
        self.draining = True
        finished = self._batcher.close(drain_s)
        self.remote.close()
        if self.shadow is not None:
            self.shadow.close()
        return finished

    def _submitted(self, inputs: Sequence[np.ndarray], timeout_s: float, priority: int) -> list["Future[Answer]"]:
        rows, size = len(inputs[0]), self.plan.batch
        if rows > self._max_rows:
            raise NotServed("too large")
        if rows <= size:
            return [self._batcher.submit(inputs, timeout_s=timeout_s, priority=priority)]
        parts: list[Future[Answer]] = []
        try:
            for start in range(0, rows, size):
                piece = [array[start : start + size] for array in inputs]
                parts.append(self._batcher.submit(piece, timeout_s=timeout_s, priority=priority))
        except NotServed:
            for part in parts:
                part.cancel()
            raise
        return parts

    def _ended(self, inputs: Sequence[np.ndarray], started_s: float, ended: "Future[Answer]") -> None:
        took_s = time.monotonic() - started_s
        if ended.cancelled():
            return
        if (error := ended.exception()) is None:
            answer = ended.result()
            is_wide = self.elastic is not None and answer.instance == self.plan.instances
            layout = (self.elastic.wide if self.elastic is not None and is_wide else self.plan).layout_label
            self.statistics.answered(answer, len(inputs[0]), took_s, layout)
            self._watch(inputs, ended.result().outputs)
            if self.shadow is not None:
                self.shadow.offer(inputs, ended.result().outputs)
        elif isinstance(error, NotServed):
            self.statistics.not_served()
        else:
            self.statistics.failed(took_s)

    def _watch(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Count what leaves the ranges of the search, and say once that it is too much."""
        if self.photos is not None and self.are_pixels(inputs):
            if not self.ranges.is_due:
                return
            inputs = [pixel_extremes(inputs[0], self.photos.preprocess)]
        looked = self.ranges.see(inputs, outputs)
        if looked and not self._told_ranges and (outside := self.ranges.outside) is not None and outside.many:
            self._told_ranges = True
            log.warning("%s, version %s: %s", self.name, self.version, outside.words)

    def _died(self, why: str) -> None:
        log.error("the engine process of %s, version %s: %s", self.name, self.version, why)

    def _reopen(self, instance: int) -> Run | None:
        return partial(self.remote.run, instance) if self.remote.wait() else None


def _together(parts: "Sequence[Future[Answer]]") -> "Future[Answer]":
    """One future for all: the first error is its own and cancels the rest, and so does cancelling it."""
    whole: Future[Answer] = Future()
    lock = threading.Lock()
    left = len(parts)

    def ended(part: "Future[Answer]") -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if part.cancelled():
            return
        with suppress(InvalidStateError):  # it has its end already
            if (error := part.exception()) is not None:
                whole.set_exception(error)
            elif last:
                whole.set_result(_joined([one.result() for one in parts]))

    def cancel(done: "Future[Answer]") -> None:
        if done.cancelled() or done.exception() is not None:
            for part in parts:
                part.cancel()

    whole.add_done_callback(cancel)
    for part in parts:
        part.add_done_callback(ended)
    return whole


def _joined(answers: Sequence[Answer]) -> Answer:
    return Answer(
        outputs=[np.concatenate(parts) for parts in zip(*(answer.outputs for answer in answers), strict=True)],
        waited_s=max(answer.waited_s for answer in answers),
        ran_s=max(answer.ran_s for answer in answers),
        batch_rows=max(answer.batch_rows for answer in answers),
        instance=max(answer.instance for answer in answers),
    )
