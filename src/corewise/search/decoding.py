"""Whether the winner may have large JPEGs decoded at a smaller scale: the holdout's photos, decoded so, decide.

A few dozen photos cannot show a third of a point of top-1: one answer of 25 that turns over is four points. But they
show how far the outputs move. So the answers must pass the gate, and what decoding adds to the winner's errors must be
small, also beside those that the gate has let pass already.
"""

from dataclasses import dataclass, replace
from math import floor, inf, log10
from time import perf_counter

import numpy as np

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.outputs import Rows
from corewise.common.errors import CorewiseError, InputError
from corewise.records.build import Plan
from corewise.records.reason import Detail, Reason, ReasonKind
from corewise.records.report import Choice, Preprocess
from corewise.runtime.client import read_outputs
from corewise.samples import RawSamples, Samples
from corewise.samples.files import image_samples
from corewise.samples.image_files import sharpness_left
from corewise.samples.images import ImageReader
from corewise.search.budget import FINISHING
from corewise.search.trial import VERIFY_BATCH, SearchContext

SHARPNESS = (1.0, 1.4, 2.0, 2.8)
"""What is tried for ``Preprocess.sharpness``: the more pixels are left, the more the resizing still averages."""
LEAST_DB, BELOW_DB = 27.0, 10.0
"""How little decoding may move the outputs: ``LEAST_DB``, or ``BELOW_DB`` above the decibels that the winner has
against fp32 for photos decoded in full if that is less, which adds hardly anything to that difference. Of
MobileNetV2's top-1 answers, 22 dB turn 5 % over and cost 1.3 points, 28 dB turn 2 % over, as many for the better as for
the worse, and 32 dB 1 %."""
HARDLY_DB = 99.0
"""Said where decoding adds nothing."""
PLACES = 1000
"""Sharpness is rounded down to thousandths."""
LEAST_PHOTOS = 16
"""Photos of the holdout that are decoded at another scale; fewer prove nothing."""
TIMED_PHOTOS = 4
"""Under a budget, photos that are decoded first to see whether there is time for all."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the artifact's images are prepared, and why, if there was a choice."""

    preprocess: Preprocess | None
    reason: Reason | None = None

    @property
    def passed(self) -> bool:
        """Whether photos are decoded at a smaller scale."""
        return self.preprocess is not None and self.preprocess.decode == "scaled"


def choose_decoding(holdout: Samples, choice: Choice, gate: AccuracyGate, context: SearchContext) -> Decoding:
    """Scaled decoding, if the winner's answers to the holdout decoded so pass the gate as any build does.

    They are compared with those of fp32 to photos decoded in full, so that both losses count together, and with what
    the winner loses on these (``LEAST_DB``); only those to photos that are decoded otherwise count. The smallest scales
    are tried first. The artifact leaves no photo less sharp than the least sharp one that was judged.
    """
    decoding = Decoding(preprocess=holdout.preprocess)
    if holdout.preprocess is None or holdout.preprocess.function is not None or holdout.originals is None:
        return decoding
    least = 0.0
    for sharpness in SHARPNESS:
        scaled = replace(holdout.preprocess, decode="scaled", sharpness=sharpness)
        left = {
            row: found
            for row, item in enumerate(holdout.originals.items)
            if (found := sharpness_left(item, scaled)) is not None
        }
        if len(left) < LEAST_PHOTOS:
            break  # a larger scale would be judged on fewer photos
        if min(left.values()) == least:
            continue  # it would be judged the same
        least = min(left.values())
        scaled = replace(scaled, sharpness=floor(PLACES * least) / PLACES)
        if _needed_s(holdout.originals, ImageReader(scaled), choice, context) > context.budget.left_s(FINISHING):
            reason = Reason.of(ReasonKind.DECODING_NOT_JUDGED, sharpness=scaled.sharpness)
            return Decoding(preprocess=holdout.preprocess, reason=reason)
        judged = _judged(scaled, np.array(list(left), np.intp), holdout, choice, gate, context)
        decoding = judged or decoding
        if judged is None or judged.passed:
            break
    return decoding


def _judged(
    scaled: Preprocess, gaining: Rows, holdout: Samples, choice: Choice, gate: AccuracyGate, context: SearchContext
) -> Decoding | None:
    """What the gate says of photos that are decoded so; ``None`` where it could not be found out."""
    photos, reader = holdout.originals, ImageReader(scaled)
    assert photos is not None
    started_s = perf_counter()
    samples = image_samples(photos, reader)
    decode_s = (perf_counter() - started_s) / len(photos)
    if len(samples) != len(holdout):
        return None
    build, workspace = choice.winner, context.workspace
    path = workspace.folder / "scaled.safetensors"
    samples.save(path)
    try:
        with context.client(build, share=FINISHING) as client:
            client.open(
                workspace.payload(build), build, Plan(threads_per_instance=context.cpu.usable_cores, batch=VERIFY_BATCH)
            )
            outputs = path.with_name("scaled-outputs.safetensors")
            client.run_samples(path, VERIFY_BATCH, outputs)
        fidelity, verdict = gate.of_rows(read_outputs(outputs), gaining)
        own_db = gate.of_rows(read_outputs(workspace.outputs(build)), gaining)[0].sqnr_db
    except InputError:
        raise
    except CorewiseError:
        return None  # The winner is what it was; only this choice was not made.
    moved_db, needed_db = _added_db(own_db, fidelity.sqnr_db), min(LEAST_DB, own_db + BELOW_DB)
    details: dict[str, Detail] = {
        "photos": len(gaining),
        "metric": fidelity.metric,
        "value": fidelity.value,
        "drop": fidelity.drop,
        "decode_ms": decode_s * 1e3,
        "sharpness": scaled.sharpness,
        "moved_db": moved_db,
        "needed_db": needed_db,
    }
    if verdict.passed and moved_db >= needed_db:
        return Decoding(preprocess=scaled, reason=Reason.of(ReasonKind.SCALED_DECODING, **details))
    return Decoding(preprocess=holdout.preprocess, reason=Reason.of(ReasonKind.FULL_DECODING, **details))


def _added_db(own_db: float, scaled_db: float) -> float:
    """How far decoding alone moves the answers: what it adds to the power of the winner's errors against fp32's.

    Both outputs of an int8 winner have its rounding errors, but not the same ones, so that comparing them with each
    other would find these: 24 dB for MobileNetV2, whatever the scale.
    """
    added = 10 ** (-scaled_db / 10) - 10 ** (-own_db / 10)
    return min(HARDLY_DB, -10 * log10(added)) if added > 0 else HARDLY_DB


def _needed_s(photos: RawSamples, reader: ImageReader, choice: Choice, context: SearchContext) -> float:
    """Seconds to decode and to answer all photos, as one thread decodes; 0 where the search may take any time."""
    if context.budget.left_s() == inf:
        return 0.0
    started_s = perf_counter()
    for item in photos.items[:TIMED_PHOTOS]:
        reader(item)
    decode_s = (perf_counter() - started_s) / TIMED_PHOTOS
    return len(photos) * (decode_s + 1 / choice.throughput_per_s)
