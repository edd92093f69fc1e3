"""A node's part of a job: a process that prepares itself for its machine, and answers and writes part after part.

No Ray: ``crew`` makes an actor of it, and tests call it as it is.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from corewise.artifact import Artifact, identity, read, tuned
from corewise.artifact.model import Model
from corewise.artifact.open import check_available, check_trusted, load
from corewise.cluster.messages import Answered, Prepared, Task, answering, unpacked, unpacked_alike, unpacked_rows
from corewise.common.errors import ArtifactError, InputError, OutputError, SamplesError
from corewise.pipeline import MediaRunner, TextRunner
from corewise.pipeline.job import SUFFIX, answered, folder_of, writing
from corewise.pipeline.outputs import format_of
from corewise.pipeline.parts import Parts, Record
from corewise.pipeline.runner import Rejected
from corewise.records.build import Plan
from corewise.records.bulk import PlanSource
from corewise.records.cpu import Cpu
from corewise.records.tuned import Machine, Tuned
from corewise.runtime.cores import compute_on
from corewise.samples.archives import Slice, Unpacked
from corewise.samples.places import Place, RemotePath, place_of
from corewise.search.retuning import find_plan


class Answerer:
    """Answers parts of one job on one machine. All methods but the first return messages (``messages.answering``).

    ``answer`` may be called by two threads, so that one part is tokenized or decoded while another one runs, and
    ``beat`` by a third one.
    """

    def __init__(self, task: str, *, keep_cores: Callable[[int], Cpu] = compute_on) -> None:
        """``task`` is a packed ``Task``; ``keep_cores`` limits the process to a number of hardware threads."""
        self._message = task
        self._keep_cores = keep_cores
        self._model: Model | None = None
        self._unpacked = Unpacked(self._skipped)
        self._skips = 0

    @answering
    def prepare(self, cores: int) -> Prepared:
        """Compute on ``cores`` hardware threads from now on, and look whether the job can run here.

        Raises:
            ArtifactError: The artifact cannot be read here, is another one, or needs what this CPU lacks.
            OutputError: The output is not that of the driver, or cannot be written.
            SamplesError: Inputs that are read here are not here, or cannot be read.
            EngineError: The engine or this version of corewise is not installed here.
        """
        task = self._task
        cpu = self._keep_cores(cores)
        artifact = self._artifact(cpu)
        about = self._parts.about
        if not about.is_file() or hashlib.sha256(about.read_text(encoding="utf-8").encode()).hexdigest() != task.job:
            raise OutputError(f"{task.output} is not the job's folder there", "write to a folder that all nodes share")
        if not isinstance(about, RemotePath) and not os.access(about.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{task.output} cannot be written there", "make it writable for Ray's user")
        self._check_inputs()
        fit = tuned.for_bulk(artifact, cpu) if task.ask is None else tuned.for_photos(artifact, cpu)
        source: PlanSource = "tuned before" if fit.tuned else "untuned"
        if not fit.tuned and Machine.of(artifact.report.cpu) == Machine.of(cpu):
            source = "made here"
        return Prepared(pid=os.getpid(), machine=Machine.of(cpu), plan=fit.plan, source=source)

    @answering
    def retune(self, budget_s: float) -> Tuned:
        """The best plan for this machine, found within ``budget_s``; nothing is written."""
        return find_plan(self._task.artifact, budget_s=budget_s).entry

    @answering
    def open(self, plan: str) -> tuple[str, ...]:
        """Open the artifact under a packed ``Plan``. Returns what ``load`` warns of."""
        chosen, task = unpacked(Plan, plan), self._task
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._model = load(
                task.artifact,
                threads_per_instance=chosen.threads_per_instance,
                instances=chosen.instances,
                batch=chosen.batch,
                preprocess=task.preprocess,
            )
        self._runner()
        return tuple(str(warning.message) for warning in caught if warning.category is UserWarning)

    @answering
    def answer(self, number: int, rows: str) -> Answered:
        """Answer the packed rows of a part, and write it.

        Raises:
            InputError: The prompt is unknown.
            SamplesError: The inputs are not here any more.
            OutputError: The part cannot be written.
            EngineError: The engine fails.
        """
        task, runner = self._task, self._runner()
        pipeline = runner.pipeline if isinstance(runner, MediaRunner) else runner.encoder.pipeline
        given = map(self._with_content, unpacked_rows(rows))
        part = list(answered(given, runner, prompt=task.prompt, ask=task.ask))
        if any(isinstance(answer, Rejected) for _, answer in part):
            self._check_inputs()  # a node that has lost a disk would set aside one part after the other
        with writing(task.output, task.output):
            counts = self._parts.write(number, format_of(SUFFIX, pipeline), part)
        return Answered(rows=counts.rows, failed=counts.failed, example=counts.example, cut=counts.cut)

    @answering
    def beat(self) -> int:
        """Rises with each call that the engine ends. If it stays while parts are running, the engine hangs."""
        return self._runner().calls_ended + self._skips

    @cached_property
    def _task(self) -> Task:
        return unpacked_alike(Task, self._message)

    @cached_property
    def _parts(self) -> Parts:
        return folder_of(place_of(self._task.output), several=self._task.several)

    def _skipped(self) -> None:
        self._skips += 1

    def _artifact(self, cpu: Cpu) -> Artifact:
        folder = self._task.artifact
        if not folder.is_dir():
            raise ArtifactError(f"there is no artifact {folder} there", "put it into a folder that all nodes share")
        artifact = read(folder, cpu=cpu)
        if identity(folder) != self._task.identity:
            raise ArtifactError(f"{folder} is another artifact there", "give every node the same one")
        check_trusted(artifact, artifact.manifest.build.engine)
        check_available(artifact.manifest.build.engine, f"opening {folder}")
        return artifact

    def _check_inputs(self) -> None:
        for place in map(place_of, self._task.seen):
            _check_readable(place)

    def _with_content(self, record: Record) -> Record:
        """An image of a compressed tar file is read here, in order: elsewhere each would begin at the file's start."""
        if not (isinstance(record.value, Slice) and record.value.compressed):
            return record
        try:
            return record._replace(value=self._unpacked.read(record.value))
        except OSError as error:
            return record._replace(value=None, problem=f"cannot be read: {error.strerror}")

    def _runner(self) -> TextRunner | MediaRunner:
        assert self._model is not None, "open comes first"
        return runner_of(self._model, self._task.artifact)


def _check_readable(place: Place) -> None:
    """Raise ``SamplesError`` if an input is not on this node: each of its rows would be set aside."""
    if not place.is_file():
        raise SamplesError(f"there is no input {place} there", "put the inputs into a folder that all nodes share")
    if isinstance(place, Path) and not os.access(place, os.R_OK):
        raise SamplesError(f"the input {place} cannot be read there", "let Ray's user read it")


def runner_of(model: Model, artifact: Path) -> TextRunner | MediaRunner:
    """What answers the raw items of a model. Raises ``InputError`` if it takes tensors only."""
    runner = model.images or model.recordings or model.texts
    if runner is None:
        raise InputError(f"{artifact} takes tensors only", "make it again from st:, hf: or with --tokenizer")
    return runner
