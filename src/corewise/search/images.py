"""How the artifact's images become answers: decoding, and what the engine takes."""

from dataclasses import dataclass, replace

from corewise.accuracy.gate import AccuracyGate
from corewise.engines import engine
from corewise.records.reason import Reason, ReasonKind
from corewise.records.report import Choice, Preprocess
from corewise.search.decoding import choose_decoding
from corewise.search.pixels import judge_pixels
from corewise.search.task import Task
from corewise.search.trial import SearchContext


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """How images are prepared, and what was found when there was a choice."""

    preprocess: Preprocess | None
    reasons: tuple[Reason, ...] = ()


def prepare_images(task: Task, choice: Choice, gate: AccuracyGate, context: SearchContext) -> ImagePlan:
    """Choose for the winner how images are decoded, and whether it normalizes them itself."""
    decoding = choose_decoding(task.holdout, choice, gate, context)
    reason = judge_pixels(task.holdout, choice, context, task.in_process or engine(choice.winner.engine))
    preprocess = decoding.preprocess
    if preprocess is not None and reason is not None and reason.kind == ReasonKind.TAKES_PIXELS:
        preprocess = replace(preprocess, dtype="uint8")
    return ImagePlan(preprocess=preprocess, reasons=tuple(found for found in (decoding.reason, reason) if found))
