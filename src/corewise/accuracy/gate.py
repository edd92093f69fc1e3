"""The accuracy gate: whether a candidate is close enough to fp32 on the holdout."""

from dataclasses import dataclass, field
from typing import Any

from corewise.accuracy import metrics
from corewise.accuracy.fidelity import Outputs, compare
from corewise.common import stats
from corewise.common.nested import Structure, unflatten
from corewise.records.goal import Objective
from corewise.records.trial import Fidelity
from corewise.samples import Samples

_ROUNDING = 1e-9
"""0.92 - 0.91 is 0.010000000000000009, and may pass for 0.01."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate is accurate enough, why, and what remains uncertain about it (empty: nothing)."""

    passed: bool
    reason: str
    uncertain: str


@dataclass
class AccuracyGate:
    """Compares outputs for the holdout with the baseline's, which come first."""

    scorer: metrics.Metric | None
    holdout: Samples
    structure: Structure
    objective: Objective
    seed: int
    reference: Outputs | None = field(default=None)

    def __call__(self, outputs: Outputs) -> tuple[Fidelity, Verdict]:
        """The outputs against the reference; the first ones ever seen become it."""

        def nest(leaves: list[Any]) -> Any:
            return unflatten(self.structure, leaves)

        if self.reference is None:
            self.reference = outputs
        if self.scorer is None:
            self.scorer = metrics.default(nest(list(self.reference.leaves)), self.holdout.labels)
        fidelity = compare(
            self.reference,
            outputs,
            metric=self.scorer,
            labels=self.holdout.labels,
            groups=self.holdout.groups,
            nest=nest,
            seed=self.seed,
        )
        return fidelity, judge(fidelity, self.objective)


def judge(fidelity: Fidelity, objective: Objective) -> Verdict:
    """Whether the drop (strict: the upper end of its interval) is at most ``objective.max_drop``."""
    limit = objective.max_drop
    judged = fidelity.drop_high if objective.strict else fidelity.drop
    passed = judged <= limit + _ROUNDING
    figures = (
        f"{fidelity.metric} {fidelity.value:.4f} against {fidelity.baseline_value:.4f}: "
        f"drop {fidelity.drop:.4f} [{fidelity.drop_low:.4f}, {fidelity.drop_high:.4f}]"
    )
    verdict = "within" if passed else "above"
    what = " at its upper end" if objective.strict else ""
    return Verdict(passed=passed, reason=f"{figures} {verdict} {limit:g}{what}", uncertain=_uncertain(fidelity, limit))


def _uncertain(fidelity: Fidelity, limit: float) -> str:
    """What to say where the drop's interval holds the limit; empty where it does not."""
    if not fidelity.drop_low <= limit + _ROUNDING < fidelity.drop_high:
        return ""
    margin = abs(limit - fidelity.drop)
    half = fidelity.drop_high - fidelity.drop if fidelity.drop <= limit else fidelity.drop - fidelity.drop_low
    needed = stats.holdout_needed(fidelity.samples, half, margin) if margin > _ROUNDING else None
    advice = f"about {needed} would" if needed and needed <= 1_000_000 else "the drop is too near to it for any number"
    return f"a holdout of {fidelity.samples} is too small to tell whether the drop is within {limit:g}; {advice}"
