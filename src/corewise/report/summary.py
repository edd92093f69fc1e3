"""A report as one flat JSON object, for programs."""

from typing import Any

from corewise.records.jsonable import to_json
from corewise.records.report import Report
from corewise.records.trial import Trial
from corewise.report.reasons import sentence

_FIDELITY = (
    "metric",
    "lower_is_better",
    "basis",
    "suggested_metrics",
    "baseline_value",
    "value",
    "drop",
    "drop_low",
    "drop_high",
    "shift_drop",
    "sqnr_db",
    "cosine",
    "agreement",
)


def summarize(report: Report) -> dict[str, Any]:
    """The object that ``corewise show ART --json`` prints: the winner's figures, and every trial's under ``trials``.

    ``throughput_per_s`` and ``baseline_throughput_per_s`` are items/s in the race (for latency 1/latency), ``promise``
    is the load that confirmed the winner's rate under the SLO, ``receipt`` says what the winner ran in int8. A trial's
    ``throughput_per_s``, ``p50_ms`` and ``p99_ms`` are the best that its own trial measured, its ``reason`` says why it
    lost or won. Unknown values are ``None``.
    """
    choice, fidelity = report.choice, report.winner.fidelity
    return {
        "model": report.model,
        "created": report.created,
        "engine": choice.winner.engine,
        "precision": choice.winner.precision,
        "options": dict(choice.winner.options),
        "plan": to_json(choice.plan),
        "elastic": to_json(choice.elastic),
        "objective": report.requirements.flat(),
        "throughput_per_s": choice.throughput_per_s,
        "baseline_throughput_per_s": choice.baseline_throughput_per_s,
        "speedup": choice.speedup,
        "speedup_low": choice.speedup_low,
        "speedup_high": choice.speedup_high,
        **{name: to_json(getattr(fidelity, name, None)) for name in _FIDELITY},
        "worst_group": to_json(fidelity.worst_group) if fidelity else None,
        "receipt": to_json(report.winner.receipt),
        "holdout": report.samples.holdout,
        "calibration": report.samples.calibration,
        "wall_s": report.wall_s,
        "peak_memory_bytes": report.peak_memory_bytes,
        "promise": to_json(choice.certified),
        "reason": sentence(choice.reason),
        "warnings": [sentence(warning) for warning in choice.warnings],
        "notes": [sentence(note) for note in report.notes],
        "trials": [_trial(trial, report) for trial in report.trials],
    }


def _trial(trial: Trial, report: Report) -> dict[str, Any]:
    choice, build, best = report.choice, trial.build, report.requirements.goal.best(trial)
    reasons = {loser.build: loser.reason for loser in choice.losers} | {choice.winner: choice.reason}
    return {
        "label": build.label,
        "engine": build.engine,
        "precision": build.precision,
        "options": dict(build.options),
        "chosen": build == choice.winner,
        "state": trial.state,
        "reason": sentence(reasons.get(build, trial.reason)),
        "value": trial.fidelity.value if trial.fidelity else None,
        "drop": trial.fidelity.drop if trial.fidelity else None,
        "shift_drop": trial.fidelity.shift_drop if trial.fidelity else None,
        "worst_group": to_json(trial.fidelity.worst_group) if trial.fidelity else None,
        "receipt": to_json(trial.receipt),
        "throughput_per_s": best.throughput_per_s if best else None,
        "p50_ms": best.p50_ms if best else None,
        "p99_ms": best.p99_ms if best else None,
        "build_s": trial.build_s,
        "payload_bytes": trial.payload_bytes,
        "notes": list(trial.notes),
    }
