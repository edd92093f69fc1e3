"""Raw items in, answers out: tokenizing, filling calls, running them on all instances, and decoding the outputs.

A pipeline is data (``records.pipeline``) that the artifact carries; what it does is here, the same for ``predict``, for
samples and for the server. No torch.
"""

from corewise.pipeline.answers import ClassAnswer, Span, decode
from corewise.pipeline.boxes import Detection, Thresholds, detected
from corewise.pipeline.calls import Call, CallCost, CallLimits, CostTable, fill
from corewise.pipeline.costs import cost_points, cost_table
from corewise.pipeline.inferred import fit, infer
from corewise.pipeline.photos import (
    TOP,
    ImageAsk,
    ImageRunner,
    MediaRunner,
    check_top,
    image_pipeline,
    rows_of_call,
    top_classes,
)
from corewise.pipeline.recordings import AudioRunner, audio_pipeline
from corewise.pipeline.runner import Rejected, TextRunner, stacked
from corewise.pipeline.samples import text_samples
from corewise.pipeline.tokens import TextEncoder, TokenPiece, Tokens

__all__ = [
    "TOP",
    "AudioRunner",
    "Call",
    "CallCost",
    "CallLimits",
    "ClassAnswer",
    "CostTable",
    "Detection",
    "ImageAsk",
    "ImageRunner",
    "MediaRunner",
    "Rejected",
    "Span",
    "TextEncoder",
    "TextRunner",
    "Thresholds",
    "TokenPiece",
    "Tokens",
    "audio_pipeline",
    "check_top",
    "cost_points",
    "cost_table",
    "decode",
    "detected",
    "fill",
    "fit",
    "image_pipeline",
    "infer",
    "rows_of_call",
    "stacked",
    "text_samples",
    "top_classes",
]
