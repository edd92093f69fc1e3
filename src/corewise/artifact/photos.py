"""The image pipeline of an artifact, opened to run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from corewise.artifact.format import Artifact
from corewise.engines import Session
from corewise.pipeline import ImageRunner, image_pipeline, rows_of_call
from corewise.records.build import Plan
from corewise.records.pipeline import ImagePipeline, PhotoPlan
from corewise.runtime.instances import whole_calls
from corewise.samples.images import ImageReader


def images_of(artifact: Artifact) -> ImagePipeline | None:
    """How the artifact's images become inputs and its outputs answers; ``None`` if it was not made from images."""
    manifest = artifact.manifest
    if manifest.preprocess is None or len(manifest.inputs) != 1:
        return None
    _, outputs = artifact.golden()
    names = [spec.name for spec in manifest.outputs]
    pipeline = image_pipeline(manifest.preprocess, outputs, manifest.labels or (), names)
    return replace(pipeline, shape=manifest.inputs[0].shape[1:])


def open_images(
    artifact: Artifact, session: Session, plan: Plan, function: str | Callable[[Any], Any] | None
) -> ImageRunner | None:
    """What answers images by calls of ``session``.

    ``None`` if the artifact was not made from images, or by a function of the user's that is not given: an artifact
    never causes an import. Raises ``SamplesError`` if there is no such function.
    """
    pipeline, photos = images_of(artifact), artifact.manifest.photos
    return None if pipeline is None else image_runner(pipeline, session, plan, function, photos)


def image_runner(
    pipeline: ImagePipeline,
    session: Session,
    plan: Plan,
    function: str | Callable[[Any], Any] | None = None,
    photos: PhotoPlan | None = None,
) -> ImageRunner | None:
    """Runs images as ``plan`` runs batches; ``None`` if a function that is not given prepares them.

    As many threads decode as ``photos`` says, if it was measured with that plan.
    """
    if pipeline.preprocess.function is not None and function is None:
        return None
    reader = None if function is None else ImageReader(pipeline.preprocess, function)
    decoders = photos.decoders if photos is not None and photos.plan == plan and reader is None else None
    return ImageRunner(
        pipeline,
        session.run,
        instances=plan.instances,
        rows=rows_of_call(plan),
        reader=reader,
        decoders=decoders,
        whole=whole_calls(session),
    )
