"""The text pipeline of an artifact, opened to run."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from corewise.artifact.checks import input_ranges
from corewise.artifact.format import PACKED, PAYLOAD, REBUILD, TOKENIZER, Artifact, Manifest, check_files
from corewise.artifact.packing import LazyProgram
from corewise.common.errors import ArtifactError, InputError
from corewise.common.references import guard
from corewise.engines import Engine, engine
from corewise.pipeline import CallCost, CallLimits, CostTable, TextEncoder, TextRunner, infer
from corewise.pipeline.calls import by_tokens
from corewise.pipeline.runner import Run
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.pipeline import Packing, TextPipeline
from corewise.records.ranges import InputRange
from corewise.runtime.instances import open_plan

T = TypeVar("T")
ROWS_ALONE = 32
"""Rows of a call to a single instance whose plan is for single items: all its threads work on one call."""


def text_pipeline(artifact: Artifact) -> TextPipeline | None:
    """How the artifact's texts become inputs and its outputs answers; ``None`` if it takes tensors only.

    For an artifact of a version without pipelines that carries a tokenizer, it is inferred from the model's inputs.

    Raises:
        ArtifactError: The tokenizer is not the pipeline's, or does not fit the model's inputs.
    """
    manifest = artifact.manifest
    if manifest.pipeline is not None:
        facts = manifest.files.get(manifest.pipeline.tokenizer)
        if facts is None or facts.sha256 != manifest.pipeline.tokenizer_sha256:
            raise ArtifactError(f"{artifact.folder} lacks the tokenizer of its pipeline", REBUILD)
        return manifest.pipeline
    if TOKENIZER not in manifest.files:
        return None
    try:
        return infer(
            artifact.folder / TOKENIZER,
            manifest.inputs,
            manifest.outputs,
            ranges=input_ranges(artifact),
            labels=manifest.labels or (),
        )
    except InputError as error:
        raise ArtifactError(f"{artifact.folder}: {error.what}", REBUILD) from error


def open_texts(artifact: Artifact, run: Run, plan: Plan, cpu: Cpu) -> TextRunner | None:
    """What answers the artifact's texts by calls of ``run``, or ``None`` if it takes tensors only.

    Raises:
        ArtifactError: The tokenizer does not fit, or files are missing.
        MissingExtra: The package ``tokenizers`` is not installed.
    """
    pipeline = text_pipeline(artifact)
    if pipeline is None:
        return None
    packing, packed = packing_under(plan, artifact.manifest), None
    if packing is not None:
        packed = LazyProgram(packing, partial(open_packed, artifact, packing, plan, cpu, open_plan))
    return text_runner(
        pipeline,
        artifact.folder / pipeline.tokenizer,
        artifact.manifest.input_ranges,
        run,
        plan,
        cost=call_cost(artifact.manifest, plan),
        packed=packed,
    )


def packing_under(plan: Plan, manifest: Manifest) -> Packing | None:
    """How texts share rows; ``None`` if they do not, or that was measured with other threads and instances."""
    return manifest.packing if _is_measured(manifest, plan) else None


def open_packed(
    artifact: Artifact, packing: Packing, plan: Plan, cpu: Cpu, opener: Callable[[Engine, Path, Build, Plan, Cpu], T]
) -> T:
    """The artifact's packed program as ``opener`` opens it, with the threads and instances of ``plan``.

    Raises ``ArtifactError`` if its files are not those that were read, or cannot be opened here.
    """
    check_files(artifact, PACKED)
    build, payload = artifact.manifest.build, artifact.folder / PACKED / PAYLOAD
    with guard(ArtifactError, f"{payload} cannot be opened here", REBUILD):
        return opener(engine(build.engine), payload, build, packing.under(plan), cpu)


def most_known_id(pipeline: TextPipeline, ranges: Sequence[InputRange] | None) -> int | None:
    """The largest token id that the model has a row for, by its inputs' ranges; ``None`` if that is not known."""
    ids = [each for each, token in zip(ranges or (), pipeline.inputs, strict=False) if token.role == "ids"]
    highs = [one.high for each in ids for one in each.values if one.axis is None and one.high is not None]
    return min(highs, default=None)


def call_cost(manifest: Manifest, plan: Plan) -> CallCost:
    """What calls cost: as measured, if ``plan`` has the threads and instances of then, else by their tokens."""
    return manifest.call_costs if _is_measured(manifest, plan) and manifest.call_costs is not None else by_tokens


def _is_measured(manifest: Manifest, plan: Plan) -> bool:
    """Whether calls of texts were timed with the threads and instances of ``plan``."""
    measured = manifest.plan
    return (plan.threads_per_instance, plan.instances) == (measured.threads_per_instance, measured.instances)


def text_runner(
    pipeline: TextPipeline,
    tokenizer: Path | bytes,
    ranges: Sequence[InputRange] | None,
    run: Run,
    plan: Plan,
    *,
    cost: CallCost,
    packed: LazyProgram | None,
) -> TextRunner:
    """Runs texts as ``plan`` runs batches, in the calls that ``cost`` finds cheapest.

    Args:
        pipeline: How texts become inputs, and outputs become answers.
        tokenizer: Its file, or the file's content.
        ranges: What the model's inputs may be, if that is known.
        run: Makes one call.
        plan: The threads, instances and rows of calls.
        cost: What calls cost.
        packed: The program whose rows have several texts, if there is one for ``plan``.

    Returns:
        What answers texts.

    Raises:
        ArtifactError: ``tokenizer`` is not a tokenizer.
        MissingExtra: The package ``tokenizers`` is not installed.
    """
    encoder = TextEncoder(pipeline, tokenizer, most_id=most_known_id(pipeline, ranges))
    limits = call_limits(plan, cost)
    return TextRunner(encoder, run, instances=plan.instances, limits=limits, cost=cost, packed=packed)


def call_limits(plan: Plan, cost: CallCost) -> CallLimits:
    """The most that one call of texts may have: the plan's rows, or more if those were measured."""
    rows = plan.batch if plan.batch > 1 or plan.instances > 1 else ROWS_ALONE
    return CallLimits.of_few_sizes(max(rows, cost.rows[-1]) if isinstance(cost, CostTable) else rows)
