"""corewise makes a PyTorch model run as fast on this CPU as the CPU allows, and proves it.

    result = corewise.optimize(model, samples, metric="top1", max_drop=0.01)
    result.model(x)
    result.save("resnet50.cw")
    fast = corewise.load("resnet50.cw")
    fast(x)

Importing corewise imports neither torch nor an engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from corewise._version import __version__
from corewise.common.errors import (
    ArtifactError,
    CorewiseError,
    EngineError,
    InputError,
    MetricError,
    MissingExtra,
    OutputError,
    SamplesError,
    SourceError,
)

if TYPE_CHECKING:
    from corewise.artifact.model import Model
    from corewise.artifact.open import Bench, Verification, bench, load, verify
    from corewise.artifact.under_load import loadtest
    from corewise.cluster.bulk import predict
    from corewise.quantize.explanation import Explanation
    from corewise.records.bulk import BulkProgress, BulkResult
    from corewise.records.events import (
        Event,
        LoadEnded,
        PlansTuned,
        RaceRound,
        StageStarted,
        TrialEnded,
        TrialStarted,
        TrialStep,
    )
    from corewise.records.goal import Goal, Latency, Requirements, Slo, Throughput
    from corewise.records.measurement import LoadTest
    from corewise.records.report import Report
    from corewise.records.tuned import Retuned
    from corewise.search.explanation import explain
    from corewise.search.optimization import optimize
    from corewise.search.result import Result
    from corewise.search.retuning import retune

__all__ = [
    "ArtifactError",
    "Bench",
    "BulkProgress",
    "BulkResult",
    "CorewiseError",
    "EngineError",
    "Event",
    "Explanation",
    "Goal",
    "InputError",
    "Latency",
    "LoadEnded",
    "LoadTest",
    "MetricError",
    "MissingExtra",
    "Model",
    "OutputError",
    "PlansTuned",
    "RaceRound",
    "Report",
    "Requirements",
    "Result",
    "Retuned",
    "SamplesError",
    "Slo",
    "SourceError",
    "StageStarted",
    "Throughput",
    "TrialEnded",
    "TrialStarted",
    "TrialStep",
    "Verification",
    "__version__",
    "bench",
    "explain",
    "load",
    "loadtest",
    "optimize",
    "predict",
    "retune",
    "verify",
]

_LAZY = {
    "corewise.artifact.model": ("Model",),
    "corewise.artifact.open": (
        "Bench",
        "Verification",
        "bench",
        "load",
        "verify",
    ),
    "corewise.artifact.under_load": ("loadtest",),
    "corewise.cluster.bulk": ("predict",),
    "corewise.quantize.explanation": ("Explanation",),
    "corewise.records.bulk": ("BulkProgress", "BulkResult"),
    "corewise.records.events": (
        "Event",
        "LoadEnded",
        "PlansTuned",
        "RaceRound",
        "StageStarted",
        "TrialEnded",
        "TrialStarted",
        "TrialStep",
    ),
    "corewise.records.goal": (
        "Goal",
        "Latency",
        "Requirements",
        "Slo",
        "Throughput",
    ),
    "corewise.records.measurement": ("LoadTest",),
    "corewise.records.report": ("Report",),
    "corewise.records.tuned": ("Retuned",),
    "corewise.search.explanation": ("explain",),
    "corewise.search.optimization": ("optimize",),
    "corewise.search.result": ("Result",),
    "corewise.search.retuning": ("retune",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'corewise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
