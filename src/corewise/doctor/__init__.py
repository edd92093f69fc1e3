"""The doctor: ``diagnose`` what corewise finds on this machine, ``render`` it; ``values.to_json`` makes it JSON."""

from corewise.doctor.diagnosis import (
    ENGINE_PACKAGES,
    Diagnosis,
    EngineStatus,
    Finding,
    TorchFacts,
    diagnose,
    limited_by,
    moved_parts,
    parse_torch_build,
    torch_findings,
)
from corewise.doctor.terminal import render

__all__ = [
    "ENGINE_PACKAGES",
    "Diagnosis",
    "EngineStatus",
    "Finding",
    "TorchFacts",
    "diagnose",
    "limited_by",
    "moved_parts",
    "parse_torch_build",
    "render",
    "torch_findings",
]
