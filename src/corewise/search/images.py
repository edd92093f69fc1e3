"""How the artifact's images become answers: decoding, and what the engine takes."""

from dataclasses import dataclass, replace

from corewise.accuracy.gate import AccuracyGate
from corewise.engines import engine
from corewise.records.pipeline import PhotoPlan
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Choice, Preprocess
from corewise.search.decoding import choose_decoding
from corewise.search.end_to_end import plan_photos, reason_of
from corewise.search.pixels import judge_pixels
from corewise.search.task import Task
from corewise.search.trial import SearchContext


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """How images are prepared, and what was found when there was a choice."""

    preprocess: Preprocess | None
    photos: PhotoPlan | None = None
    """The plan from files to answers."""
    reasons: tuple[Reason, ...] = ()


def prepare_images(
    task: Task, choice: Choice, gate: AccuracyGate, context: SearchContext, *, end_to_end: bool
) -> ImagePlan:
    """Choose for the winner how images are decoded, whether it normalizes them itself, and the plan from their files.

    The plan only with ``end_to_end``.
    """
    decoding = choose_decoding(task.holdout, choice, gate, context)
    reason = judge_pixels(task.holdout, choice, context, task.in_process or engine(choice.winner.engine))
    preprocess = decoding.preprocess
    if preprocess is not None and reason is not None and reason.kind == ReasonKind.TAKES_PIXELS:
        preprocess = replace(preprocess, dtype="uint8")
    found = plan_photos(task, preprocess, choice, context) if end_to_end and preprocess is not None else None
    reasons = (decoding.reason, reason, reason_of(found) if found else None)
    return ImagePlan(
        preprocess=preprocess,
        photos=found.best.plan if found else None,
        reasons=tuple(one for one in reasons if one is not None),
    )
