"""The accuracy gate: whether a candidate is close enough to fp32 on the holdout."""

from dataclasses import dataclass, field
from typing import Any

from corewise.accuracy import metrics
from corewise.accuracy.fidelity import Outputs, compare
from corewise.common import stats
from corewise.common.nested import Structure, unflatten
from corewise.records.goal import Requirements
from corewise.records.reason import Reason, ReasonKind
from corewise.records.trial import Fidelity
from corewise.samples import Samples

_ROUNDING = 1e-9
"""0.92 - 0.91 is 0.010000000000000009, and may pass for 0.01."""


MOST_SAMPLES = 1_000_000
"""A larger holdout is no advice."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate is accurate enough, why, and what remains uncertain about it."""

    passed: bool
    reason: Reason
    uncertain: Reason | None


@dataclass
class AccuracyGate:
    """Compares outputs for the holdout with the baseline's, which come first."""

    scorer: metrics.Metric | None
    holdout: Samples
    structure: Structure
    requirements: Requirements
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
        return fidelity, judge(fidelity, self.requirements)


def judge(fidelity: Fidelity, requirements: Requirements) -> Verdict:
    """Whether the drop (strict: the upper end of its interval) is at most ``requirements.max_drop``."""
    limit = requirements.max_drop
    judged = fidelity.drop_high if requirements.strict else fidelity.drop
    passed = judged <= limit + _ROUNDING
    reason = Reason.of(
        ReasonKind.ACCURATE if passed else ReasonKind.INACCURATE,
        passed=passed,
        metric=fidelity.metric,
        value=fidelity.value,
        baseline_value=fidelity.baseline_value,
        drop=fidelity.drop,
        drop_low=fidelity.drop_low,
        drop_high=fidelity.drop_high,
        max_drop=limit,
        strict=requirements.strict,
    )
    return Verdict(passed=passed, reason=reason, uncertain=_uncertain(fidelity, limit))


def _uncertain(fidelity: Fidelity, limit: float) -> Reason | None:
    """Set if the drop's interval holds the limit."""
    if not fidelity.drop_low <= limit + _ROUNDING < fidelity.drop_high:
        return None
    margin = abs(limit - fidelity.drop)
    half = fidelity.drop_high - fidelity.drop if fidelity.drop <= limit else fidelity.drop - fidelity.drop_low
    needed = stats.holdout_needed(fidelity.samples, half, margin) if margin > _ROUNDING else None
    return Reason.of(
        ReasonKind.DROP_UNCERTAIN,
        samples=fidelity.samples,
        max_drop=limit,
        needed=needed if needed and needed <= MOST_SAMPLES else None,
    )
