"""A metric of fp32 and of a candidate on the same samples, and the interval of their difference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corewise.accuracy.metrics import Metric, evaluate
from corewise.accuracy.outputs import Array, Outputs, Rows
from corewise.accuracy.pooled import Pooled
from corewise.common import stats
from corewise.common.errors import MetricError

_REORDERED = 1e-3
"""How much a metric may change when samples change places (rounding, ties) and still be one of independent samples."""

Nest = Callable[[list[Array]], Any]


@dataclass(frozen=True)
class Score:
    """The metric as a function of flat outputs and of the rows they are for."""

    reference: Outputs
    metric: Metric
    labels: Array | None
    nest: Nest

    def __call__(self, outputs: Outputs, rows: Rows | None = None) -> NDArray[np.float64] | Pooled:
        """Scores of some rows (all, where none are named): (rows,) or (), or pooled."""
        reference, labels = self.reference, self.labels
        if rows is not None:
            outputs, reference = outputs.rows(rows), reference.rows(rows)
            labels = labels if labels is None else labels[rows]
        truth = self.nest(list(reference.leaves)) if self.metric.against_reference else labels
        return evaluate(self.metric, self.nest(list(outputs.leaves)), truth, len(outputs))

    def drop(self, baseline: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much scores are worse than the baseline's."""
        return scores - baseline if self.metric.lower_is_better else baseline - scores


def paired_scores(
    score: Score, candidate: Outputs, members: Rows | None, **options: Any
) -> tuple[float, float, stats.Interval]:
    """The metric of fp32 and of the candidate, and the interval of their difference."""
    baseline = score(score.reference)
    scores = baseline if candidate is score.reference else score(candidate)
    name = score.metric.name
    if candidate is score.reference:  # only whether there will be an interval is asked, which few tell
        options["resamples"] = stats.FEWEST_RESAMPLES
    try:
        if isinstance(baseline, Pooled) and isinstance(scores, Pooled):
            interval = _by_pooled(score, baseline, scores, members, **options)
            baseline, scores = np.asarray(baseline.value), np.asarray(scores.value)
        elif isinstance(baseline, Pooled) or isinstance(scores, Pooled) or baseline.shape != scores.shape:
            shapes = ["pooled" if isinstance(part, Pooled) else part.shape for part in (baseline, scores)]
            what = f"the metric {name!r} returns shape {shapes[0]} for fp32 but {shapes[1]} for a build"
            raise MetricError(what, "return one kind of score")
        elif scores.ndim:
            interval = _by_sample(score.drop(baseline, scores), members, baseline, scores, **options)
        else:
            interval = _by_resampling(score, candidate, members, **options)
    except ValueError as error:
        raise MetricError(f"the drop of {name!r} has no confidence interval: {error}", "give more samples") from error
    if candidate is score.reference:
        interval = stats.Interval(0.0, 0.0)
    return float(baseline.mean()), float(scores.mean()), interval


def _by_sample(
    drops: NDArray[np.float64],
    members: Rows | None,
    baseline: NDArray[np.float64],
    scores: NDArray[np.float64],
    **options: Any,
) -> stats.Interval:
    """The drop's interval where the metric gives one score per sample."""
    intervals = []
    if np.isin([baseline, scores], (0, 1)).all():
        worse, better = int((drops > 0).sum()), int((drops < 0).sum())
        intervals.append(stats.paired_proportion_interval(worse, better, len(drops)))
    if not intervals or members is not None:
        intervals.append(stats.bootstrap_mean_interval(drops, members, **options))
    # Right-or-wrong scores in groups: the first interval knows no groups, the second nothing of what did not occur.
    return stats.Interval(min(low for low, _ in intervals), max(high for _, high in intervals))


def _by_pooled(score: Score, baseline: Pooled, scores: Pooled, members: Rows | None, **options: Any) -> stats.Interval:
    """The drop's interval where the metric tells the score of any selection of samples."""
    units, draw = _units(scores.members if members is None else members, scores.samples)

    def drop(drawn: Rows) -> float:
        rows = draw(drawn)
        return float(score.drop(np.asarray(baseline.of_rows(rows)), np.asarray(scores.of_rows(rows))))

    return stats.bootstrap_interval(drop, units, **options)


def _by_resampling(score: Score, candidate: Outputs, members: Rows | None, **options: Any) -> stats.Interval:
    """The drop's interval where the metric gives one number for all: on resampled rows, or groups of rows."""
    units, draw = _units(members, len(candidate))

    def of_rows(outputs: Outputs, rows: Rows | None = None) -> float:
        scores = score(outputs, rows)
        return scores.value if isinstance(scores, Pooled) else float(scores)

    whole = of_rows(score.reference)
    shuffled = of_rows(score.reference, draw(np.random.default_rng(0).permutation(units)))
    if abs(whole - shuffled) > _REORDERED * max(1.0, abs(whole)):
        what = f"the metric {score.metric.name!r} changes from {whole:.4f} to {shuffled:.4f} when samples are reordered"
        raise MetricError(
            what, "use the labels that are passed to it, and put samples that belong together in one group"
        )

    def drop(drawn: Rows) -> float:
        rows = draw(drawn)
        try:
            baseline, value = of_rows(score.reference, rows), of_rows(candidate, rows)
        except MetricError:  # Undefined on this resample, e.g. a correlation with a constant.
            return float("nan")
        return float(score.drop(np.asarray(baseline), np.asarray(value)))

    return stats.bootstrap_interval(drop, units, **options)


def _units(members: Rows | None, samples: int) -> tuple[int, Callable[[Rows], Rows]]:
    """How many units are drawn, and what maps drawn units to rows.

    Each drawn group takes the place of one, so that a layout by place (first all left sentences, then
    all right ones) survives; groups of unequal sizes follow each other.
    """
    if members is None:
        return samples, lambda drawn: drawn
    groups = [np.flatnonzero(members == group) for group in range(int(members.max()) + 1)]
    if len({len(group) for group in groups}) > 1:
        return len(groups), lambda drawn: np.concatenate([groups[unit] for unit in drawn])
    table = np.stack(groups)

    def place(drawn: Rows) -> Rows:
        rows = np.empty(samples, dtype=np.intp)
        rows[table] = table[drawn]
        return rows

    return len(groups), place
