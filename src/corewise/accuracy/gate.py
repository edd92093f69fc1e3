"""The accuracy gate: whether a candidate is close enough to fp32 on the holdout."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from corewise.accuracy import metrics
from corewise.accuracy.alignment import listing_head
from corewise.accuracy.fidelity import compare
from corewise.accuracy.labels import naming
from corewise.accuracy.outputs import Outputs, Rows
from corewise.accuracy.shift import robust_by_default
from corewise.common import stats
from corewise.common.detections import Head
from corewise.common.errors import EngineError, MetricError, SamplesError
from corewise.common.nested import Structure, leaf_names, unflatten
from corewise.records.fidelity import Basis, Fidelity, GroupFidelity
from corewise.records.goal import Requirements
from corewise.records.reason import Detail, Reason, ReasonKind
from corewise.samples import Samples

Rule = Literal["passed", "drop", "floor", "shift_drop", "shift_floor"]
"""What decided: nothing was wrong; the metric drops too much; a group of output channels is below its floor; or one
of these on samples unlike those that calibrated."""

_ROUNDING = 1e-9
"""0.92 - 0.91 is 0.010000000000000009, and may pass for 0.01."""


UNDER_SHIFT = 0.5
"""The share of the drop allowed that a twin may lose under shift: what a model will meet differs more from the samples
that calibrate than one part of them does from the others."""

MOST_SAMPLES = 1_000_000
"""A larger holdout is no advice."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a candidate is accurate enough, why, and what remains uncertain about it."""

    passed: bool
    reason: Reason
    uncertain: Reason | None
    rule: Rule = "passed"


@dataclass
class AccuracyGate:
    """Compares outputs for the holdout with the baseline's, which come first."""

    scorer: metrics.Metric | None
    holdout: Samples
    structure: Structure
    requirements: Requirements
    seed: int
    reference: Outputs | None = field(default=None)
    robust: bool | None = False
    """Whether the drop under shift decides too; ``None`` for texts and embeddings."""
    integer_inputs: bool = False
    """Whether the model takes integers, as token ids are."""
    _basis: Basis = "named"

    def __call__(self, outputs: Outputs) -> tuple[Fidelity, Verdict]:
        """The outputs against the reference; the first ones ever seen become it.

        Outputs for which the metric has no value, as they all are the same, are refused by how far they are from the
        reference. Raises ``EngineError`` if that is not far.
        """
        if self.reference is None:
            self.reference = outputs
        metric = self._metric(self.reference)
        try:
            fidelity = self._compared(self.reference, outputs, None, metric)
        except metrics.UndefinedScore as error:
            if outputs is self.reference:
                raise
            fidelity = self._compared(self.reference, outputs, None, metrics.resolve("concordance"))
            if judge(fidelity, self.requirements).passed:
                raise EngineError(f"{error.what} (for the build's outputs; fp32's have a score)") from error
        return fidelity, judge(fidelity, self.requirements, robust=self.is_robust)

    def of_rows(self, outputs: Outputs, rows: Rows) -> tuple[Fidelity, Verdict]:
        """The same for some rows of the holdout alone; ``outputs`` are for all."""
        assert self.reference is not None
        fidelity = self._part(self.reference, outputs, rows)
        return fidelity, judge(fidelity, self.requirements)

    @property
    def is_robust(self) -> bool:
        """Whether the drop under shift decides; known once there is a reference."""
        if self.robust is not None:
            return self.robust
        return self.reference is not None and robust_by_default(self.reference, integer_inputs=self.integer_inputs)

    def under_shift(
        self, fidelity: Fidelity, outputs: Outputs, rows: Rows, *, calibrated: bool
    ) -> tuple[Fidelity, Verdict]:
        """The same with what a twin of the candidate answers that was calibrated without samples like ``rows``.

        Args:
            fidelity: The candidate's, from an ordinary call.
            outputs: The twin's outputs for the whole holdout; the candidate's own if nothing calibrates it.
            rows: The rows of the holdout that are unlike what calibrated the twin: ``shift.ShiftSplit.judged``.
            calibrated: Whether samples calibrate the candidate.
        """
        assert self.reference is not None
        fidelity = replace(fidelity, shift=self._part(self.reference, outputs, rows))
        return fidelity, judge(fidelity, self.requirements, robust=self.is_robust, calibrated=calibrated)

    def alone(self, outputs: Outputs, rows: Rows) -> Verdict:
        """Outputs for some rows of the holdout, each from a call of its own, against the reference.

        As under shift the drop has to be certain, because the rows are few.
        """
        assert self.reference is not None
        fidelity = self._against(self.reference.rows(rows), outputs, rows)
        reason, rule = _decided(fidelity, replace(self.requirements, strict=False), certain=True)
        told = Reason(kind=reason.kind, details={**reason.details, "alone": True})
        return Verdict(passed=rule == "passed", reason=told, uncertain=None, rule=rule)

    def _part(self, reference: Outputs, outputs: Outputs, rows: Rows) -> Fidelity:
        return self._against(reference.rows(rows), outputs.rows(rows), rows)

    def _against(self, reference: Outputs, outputs: Outputs, rows: Rows) -> Fidelity:
        """Outputs for some rows of the holdout against others for them, by the metric or, where that fails, without."""
        assert self.reference is not None
        try:
            return self._compared(reference, outputs, rows, self._metric(self.reference))
        except (MetricError, SamplesError):  # Not defined on a part of the holdout, as AUC with labels of one class.
            closeness = metrics.default(self._nest(list(reference.leaves)), None)
            return self._compared(reference, outputs, rows, closeness)

    def _compared(self, reference: Outputs, outputs: Outputs, rows: Rows | None, metric: metrics.Metric) -> Fidelity:
        names, labels, groups = self._names, self.holdout.labels, self.holdout.groups
        if rows is not None:
            names = [names[row] for row in rows]
            labels, groups = (None if part is None else part[rows] for part in (labels, groups))
        fidelity = compare(
            reference,
            outputs,
            metric=metric,
            labels=labels,
            groups=groups,
            nest=self._nest,
            names=names,
            output_names=leaf_names(self.structure),
            seed=self.seed,
            head=self._head,
        )
        known = metrics.suggested(self._nest(list(reference.leaves))) if self._basis == "outputs" else ()
        return replace(fidelity, basis=self._basis, suggested_metrics=known)

    @cached_property
    def _head(self) -> Head | None:
        """How the outputs list detections; ``None`` where they list none."""
        assert self.reference is not None
        return listing_head(leaf_names(self.structure), self.reference)

    @property
    def _names(self) -> Sequence[str]:
        """The user's own numbers or file names of the samples, for messages."""
        return [self.holdout.describe(row) for row in range(len(self.holdout))]

    def _nest(self, leaves: list[Any]) -> Any:
        return unflatten(self.structure, leaves)

    def _metric(self, reference: Outputs) -> metrics.Metric:
        """The metric; without one from the user, the one that fits the first reference and the labels."""
        if self.scorer is None:
            with naming(self._names):
                self.scorer = metrics.default(self._nest(list(reference.leaves)), self.holdout.labels)
            closeness: Basis = "answers" if self.scorer.name == "agreement" else "outputs"
            self._basis = closeness if self.scorer.against_reference else "labels"
        return self.scorer


def judge(fidelity: Fidelity, requirements: Requirements, *, robust: bool = False, calibrated: bool = True) -> Verdict:
    """Whether the candidate is close enough to fp32.

    The drop (strict: the upper end of its interval) must be at most ``requirements.max_drop``, and every group of
    output channels must reach its floor. ``robust`` asks both of the comparison under shift too, if there is one. There
    a build that samples ``calibrated`` is allowed half of ``max_drop`` (``UNDER_SHIFT``), by the estimate even where
    ``strict``; and a drop has to be certain, for of twenty samples one answer that flips is a drop of 0.05.
    """
    uncertain = _uncertain(fidelity, requirements.max_drop)
    reason, rule = _decided(fidelity, requirements)
    if rule == "passed" and robust and fidelity.shift is not None:
        allowed = (UNDER_SHIFT if calibrated else 1.0) * requirements.max_drop
        less = replace(requirements, max_drop=allowed, strict=False)
        shifted, under = _decided(fidelity.shift, less, certain=True)
        if under != "passed":
            rule = "shift_drop" if under == "drop" else "shift_floor"
            reason = Reason(kind=shifted.kind, details={**shifted.details, "shifted": True})
    return Verdict(passed=rule == "passed", reason=reason, uncertain=uncertain, rule=rule)


def _decided(fidelity: Fidelity, requirements: Requirements, *, certain: bool = False) -> tuple[Reason, Rule]:
    limit = requirements.max_drop
    judged = fidelity.drop_high if requirements.strict else fidelity.drop
    within = judged <= limit + _ROUNDING or (certain and fidelity.drop_low <= 0)
    details: dict[str, Detail] = {
        "passed": within,
        "metric": fidelity.metric,
        "value": fidelity.value,
        "baseline_value": fidelity.baseline_value,
        "drop": fidelity.drop,
        "drop_low": fidelity.drop_low,
        "drop_high": fidelity.drop_high,
        "max_drop": limit,
        "strict": requirements.strict,
    }
    if not within:
        return Reason(kind=ReasonKind.INACCURATE, details=details), "drop"
    if fidelity.below_floor:
        return Reason(kind=ReasonKind.BELOW_FLOOR, details={**details, **_below(fidelity.below_floor[0])}), "floor"
    return Reason(kind=ReasonKind.ACCURATE, details=details), "passed"


def _below(group: GroupFidelity) -> dict[str, Detail]:
    """What a group or its worst channel lacks."""
    if group.sqnr_db < group.floor_db:
        return {"channels": group.name, "sqnr_db": group.sqnr_db, "floor_db": group.floor_db}
    return {
        "channels": group.worst_channel,
        "sqnr_db": group.worst_channel_db,
        "floor_db": group.channel_floor_db,
    }


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
