"""Plain data of schema 1, whose reasons are sentences, as data of today's records."""

from typing import Any

from corewise.records.reason import ReasonKind

Data = dict[str, Any]
NOT_TUNED = "its plans were not searched"


def upgrade_report(data: Data) -> Data:
    """A report."""
    choice = _renamed(data["choice"], "promise", "certified")
    choice["reason"] = _reason(choice["reason"])
    choice["losers"] = [{**loser, "reason": _reason(loser["reason"])} for loser in choice["losers"]]
    choice["warnings"] = [_reason(warning) for warning in choice.get("warnings", ())]
    choice["certified"] = _load(choice["certified"]) if choice.get("certified") else None
    return {
        **_renamed(data, "objective", "requirements"),
        "trials": [upgrade_trial(trial) for trial in data["trials"]],
        "choice": choice,
        "notes": [_reason(note) for note in data.get("notes", ())],
    }


def upgrade_trial(data: Data) -> Data:
    """A trial."""
    trial = _renamed(data, "explored", "tuned")
    ended = trial.get("tuned", "")
    trial["tuned"] = _reason(ended)
    if trial["tuned"] and ended.startswith(NOT_TUNED):
        trial["tuned"]["kind"] = ReasonKind.MUCH_SLOWER
    trial["reason"] = _reason(trial["reason"]) or _words("")
    trial["measurements"] = [upgrade_measurement(measurement) for measurement in trial.get("measurements", ())]
    trial["loads"] = [_load(load) for load in trial.get("loads", ())]
    return trial


def upgrade_measurement(data: Data) -> Data:
    """A measurement."""
    return {**data, "why": _reason(data.get("why")), "rejected": _reason(data.get("rejected"))}


def _load(data: Data) -> Data:
    return _renamed(data, "promised", "certified")


def _reason(sentence: Any) -> Data | None:
    """A reason that is data already stays as it is."""
    return _words(sentence) if isinstance(sentence, str) and sentence else sentence or None


def _words(sentence: str) -> Data:
    return {"kind": ReasonKind.TEXT, "details": {"text": sentence}}


def _renamed(data: Data, old: str, new: str) -> Data:
    return {new if key == old else key: value for key, value in data.items()}
