"""The audio pipeline of an artifact, opened to run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from corewise.artifact.format import Artifact
from corewise.engines import Session
from corewise.pipeline import AudioRunner, audio_pipeline, rows_of_call
from corewise.records.build import Plan
from corewise.records.pipeline import AudioPipeline
from corewise.runtime.instances import whole_calls
from corewise.samples.audio import AudioReader


def audio_of(artifact: Artifact) -> AudioPipeline | None:
    """How the artifact's recordings become inputs and its outputs answers; ``None`` if it was not made from any."""
    manifest = artifact.manifest
    if manifest.audio is None or len(manifest.inputs) != 1:
        return None
    _, outputs = artifact.golden()
    pipeline = audio_pipeline(manifest.audio, outputs, manifest.labels or ())
    return replace(pipeline, shape=manifest.inputs[0].shape[1:])


def audio_runner(
    pipeline: AudioPipeline | None, session: Session, plan: Plan, function: str | Callable[..., Any] | None = None
) -> AudioRunner | None:
    """Runs recordings as ``plan`` runs batches; ``None`` without a pipeline, or if a function that is not given
    prepares them: an artifact never causes an import.

    Raises ``SamplesError`` if there is no such function.
    """
    if pipeline is None or (pipeline.preprocess.function is not None and function is None):
        return None
    reader = None if function is None else AudioReader(pipeline.preprocess, function)
    return AudioRunner(
        pipeline,
        session.run,
        instances=plan.instances,
        rows=rows_of_call(plan),
        reader=reader,
        whole=whole_calls(session),
    )
