"""What ``optimize`` returns: the report, the model ready to call, and the way to an artifact."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from corewise import artifact
from corewise.artifact.checks import program_ranges
from corewise.artifact.model import Model
from corewise.artifact.packing import LazyProgram
from corewise.artifact.photos import image_runner
from corewise.artifact.recordings import audio_runner
from corewise.artifact.texts import text_runner
from corewise.artifact.tuned import partitions
from corewise.artifact.watch import seen_range
from corewise.common.nested import Structure
from corewise.engines import BuildInputs, Engine, Session
from corewise.pipeline import CostTable, TextEncoder, TextRunner, audio_pipeline, fit, image_pipeline, infer
from corewise.pipeline.calls import by_tokens
from corewise.records.pipeline import AudioPipeline, ImagePipeline, PhotoPlan, TextPipeline
from corewise.records.ranges import InputRange, SeenRanges
from corewise.records.report import Report
from corewise.report import words
from corewise.runtime.client import read_outputs
from corewise.runtime.elastic import open_elastic
from corewise.runtime.instances import open_plan, whole_calls
from corewise.runtime.workspace import Workspace
from corewise.samples import Samples
from corewise.search.packing import Packed
from corewise.search.task import fitting_class_names

GOLDEN_ROWS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The outcome of one optimization."""

    report: Report
    build_inputs: BuildInputs
    holdout: Samples
    output_structure: Structure
    payload: Path
    outputs: Path
    """The winner's outputs for the holdout."""
    opener: Engine
    """The winner's engine."""
    workspace: Workspace
    """Holds the payload."""
    class_names: tuple[str, ...] | None = None
    pipeline: TextPipeline | None = None
    """How texts become inputs, and outputs become answers; ``None`` if the model takes no texts."""
    tokenizer: bytes = b""
    photos: PhotoPlan | None = None
    """The plan from files of photos to answers, if it was searched."""
    call_costs: CostTable | None = None
    """What calls of texts cost under the winner's plan, if it takes texts."""
    packed: Packed | None = None
    """The winner once more, for rows of several texts, if that is faster."""

    @property
    def headline(self) -> str:
        """The whole result in one sentence."""
        return words.headline(self.report)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each build won, lost or failed: a sentence by the build's label, the winner first."""
        choice = self.report.choice
        losers = {loser.build.label: words.said(loser.reason) for loser in choice.losers}
        return {choice.winner.label: words.said(choice.reason), **losers}

    @cached_property
    def model(self) -> Model:
        """The winner, opened in this process; call it as the original."""
        choice = self.report.choice
        opened = self.opener, self.payload, choice.winner
        cpu, elasticity = self.build_inputs.cpu, choice.elasticity
        if elasticity is None or elasticity.chosen is None:
            session = open_plan(*opened, choice.plan, cpu)
        else:
            measured = (*self.report.winner.measurements, *elasticity.measurements)
            session = open_elastic(*opened, elasticity.plan, partitions(elasticity.plan, measured), cpu)
        images = self._images
        return Model(
            session,
            inputs=self.build_inputs.inputs,
            input_structure=self.holdout.structure,
            output_structure=self.output_structure,
            ranges=self._ranges,
            seen_ranges=self._seen_ranges,
            texts=self._texts(session),
            images=None if images is None else image_runner(images, session, choice.plan, photos=self.photos),
            recordings=audio_runner(self._recordings, session, choice.plan),
            files=self.workspace,
        )

    def _texts(self, session: Session) -> TextRunner | None:
        """What answers texts by calls of ``session``; ``None`` if the model takes none."""
        if self._fitted is None:
            return None
        choice, packed = self.report.choice, None
        if self.packed is not None:
            packing, payload = self.packed.packing, self.packed.files.payload
            opened = self.opener, payload, choice.winner, packing.under(choice.plan), self.build_inputs.cpu
            packed = LazyProgram(packing, partial(open_plan, *opened))
        return text_runner(
            self._fitted,
            self.tokenizer,
            self._ranges,
            whole_calls(session),
            choice.plan,
            cost=self.call_costs or by_tokens,
            packed=packed,
        )

    def save(
        self,
        folder: str | Path,
        *,
        reference: bool = True,
        labels: Sequence[str] | None = None,
        tokenizer: str | Path | None = None,
    ) -> artifact.Artifact:
        """Write the artifact, whole or not at all.

        An artifact of a model that cannot be exported holds its weights; loading it needs the module's code.

        Args:
            folder: where it goes; must not exist.
            reference: keep the fp32 program, which ``bench`` and the server's shadow need.
            labels: names of the classes in the order of the scores, for the server. Default: the ``class_names`` given
                to ``optimize``.
            tokenizer: the path of a ``tokenizer.json`` that makes the artifact take texts, for a model optimized
                without one.

        Returns:
            The artifact as it was read back.

        Raises:
            OutputError: ``folder`` exists or cannot be written, or the disk is full.
            InputError: the tokenizer file is not a tokenizer, or does not fit the model's inputs; or there are more or
                fewer labels than classes.
        """
        from corewise.report import html, markdown

        names, pipeline, content = self.class_names, self._fitted, self.tokenizer
        if labels is not None:
            names = fitting_class_names(labels, (), self.build_inputs.outputs) or ()
            if pipeline is not None and pipeline.labels:
                pipeline = replace(pipeline, labels=names)
        if tokenizer is not None:
            pipeline, content = self._inferred(Path(tokenizer), names or ())
        artifact.write(
            Path(folder),
            manifest=lambda files: replace(self._manifest(files), labels=names, pipeline=pipeline),
            tokenizer=content or None,
            packed=None if self.packed is None else self.packed.files,
            payload=self.payload,
            reference=self.build_inputs.program if reference and self.build_inputs.program.exists() else None,
            golden=self._golden(),
            report=self.report,
            report_text=markdown.render(self.report),
            report_page=html.render(self.report),
        )
        return artifact.read(Path(folder))

    def _manifest(self, files: dict[str, artifact.FileFacts]) -> artifact.Manifest:
        choice = self.report.choice
        return artifact.Manifest(
            schema=artifact.SCHEMA,
            model=self.report.model,
            created=self.report.created,
            versions=self.report.versions,
            architecture=self.report.cpu.architecture,
            needs=self.opener.needs(choice.winner),
            build=choice.winner,
            plan=choice.plan,
            inputs=self.build_inputs.inputs,
            outputs=self.build_inputs.outputs,
            input_structure=self.holdout.structure.to_data(),
            output_structure=self.output_structure.to_data(),
            preprocess=self.holdout.preprocess,
            files=files,
            input_ranges=self._ranges,
            photos=self.photos,
            audio=self.holdout.audio,
            seen_ranges=self._seen_ranges,
            call_costs=self.call_costs,
            elastic=choice.elastic,
            packing=None if self.packed is None else self.packed.packing,
        )

    def _inferred(self, tokenizer: Path, labels: Sequence[str]) -> tuple[TextPipeline, bytes]:
        """The pipeline of a model of which only the tokenizer is known, tried on a text, and the file's content."""
        inputs = self.build_inputs
        made = infer(tokenizer, inputs.inputs, inputs.outputs, ranges=self._ranges, labels=labels)
        TextEncoder(made, tokenizer).encode(["a text"])
        return made, tokenizer.read_bytes()

    @property
    def _images(self) -> ImagePipeline | None:
        """How images become inputs and outputs answers, if the samples were images."""
        if self.holdout.preprocess is None or len(self.build_inputs.inputs) != 1:
            return None
        _, outputs = self._golden()
        return image_pipeline(
            self.holdout.preprocess, outputs, self.class_names or (), [spec.name for spec in self.build_inputs.outputs]
        )

    @property
    def _recordings(self) -> AudioPipeline | None:
        """How recordings become inputs and outputs answers, if the samples were recordings."""
        if self.holdout.audio is None or len(self.build_inputs.inputs) != 1:
            return None
        _, outputs = self._golden()
        pipeline = audio_pipeline(self.holdout.audio, outputs, self.class_names or ())
        return replace(pipeline, shape=self.build_inputs.inputs[0].shape[1:])

    @cached_property
    def _fitted(self) -> TextPipeline | None:
        """The pipeline with the most tokens that the program takes."""
        return self.pipeline and fit(self.pipeline, self.build_inputs.inputs, self.build_inputs.outputs, self._ranges)

    @cached_property
    def _ranges(self) -> tuple[InputRange, ...] | None:
        """The range of each input; ``None`` for a model that cannot be exported."""
        samples = (self.build_inputs.calibration, self.holdout)
        batches = (inputs for part in samples for _, inputs in part.batches(GOLDEN_ROWS))
        return program_ranges(self.build_inputs.program, self.build_inputs.inputs, batches)

    @cached_property
    def _seen_ranges(self) -> SeenRanges:
        """What the calibration samples and the winner's outputs for the holdout were like."""
        specs, leaves = self.build_inputs, read_outputs(self.outputs).leaves

        def column(k: int) -> Iterator[np.ndarray]:
            return (inputs[k] for _, inputs in specs.calibration.batches(GOLDEN_ROWS))

        return SeenRanges(
            inputs=tuple(seen_range(spec, column(k)) for k, spec in enumerate(specs.inputs)),
            outputs=tuple(seen_range(spec, [leaf]) for spec, leaf in zip(specs.outputs, leaves, strict=True)),
        )

    def _golden(self) -> tuple[tuple[np.ndarray, ...], list[np.ndarray]]:
        """The first holdout samples of one shape, and the winner's outputs for them."""
        rows, inputs = next(self.holdout.batches(GOLDEN_ROWS))
        leaves = read_outputs(self.outputs).rows(rows).leaves
        return inputs, [np.stack(list(leaf)) for leaf in leaves]
