"""Medians, intervals and doubts: every figure that corewise reports goes through here. Pure; numpy only."""

import time
from collections.abc import Callable, Sequence
from math import ceil, comb, exp, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corewise.common.phrases import percent

MIN_ROUNDS = 6
"""The fewest rounds of an alternating run that give a 95 % interval of the median ratio."""

NOISY_SPREAD = 0.1
DRIFT = 0.05

FEWEST_RESAMPLES = 25
_ENOUGH_FOR_PERCENTILES = 200


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Ratio(NamedTuple):
    """How many times faster one contender is than another, with its confidence interval."""

    value: float
    low: float
    high: float


def quantile(values: ArrayLike, q: float) -> float:
    """The ``q`` quantile (0..1) of at least one value, linearly interpolated."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("a quantile needs at least one value")
    return float(np.quantile(array, q))


def spread(values: ArrayLike) -> float:
    """Interquartile range over median: like a standard deviation, but blind to a few outliers."""
    iqr = quantile(values, 0.75) - quantile(values, 0.25)
    return iqr / quantile(values, 0.5) if iqr else 0.0


def ratio_interval(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Ratio:
    """How many times faster ``a`` is than ``b``: items/s of two contenders in the same rounds of an alternating run.

    The median of the rounds' ratios; pairing by round cancels what slows both. The interval is that of
    the median by interpolated order statistics (Hettmansperger and Sheather, Statistics & Probability
    Letters 4, 1986): it assumes no distribution and is not carried away by the outliers of a shared
    machine. With fewer than ``MIN_ROUNDS`` rounds it is their whole range, which holds the true ratio
    in 1 - 2^(1-n) of all cases: 93.75 % with 5 rounds, 75 % with 3.

    Raises ``ValueError`` if the rounds differ in number, there are none, or a rate is not positive.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or not first.size or min(first.min(), second.min()) <= 0:
        raise ValueError("a ratio needs as many rates of one contender as of the other, all above 0")
    logs = np.sort(np.log(first / second))
    median = quantile(logs, 0.5)
    low, high = _median_low(logs, confidence), -_median_low(-logs[::-1], confidence)
    return Ratio(exp(median), exp(min(low, median)), exp(max(high, median)))


def _median_low(ordered: NDArray[np.float64], confidence: float) -> float:
    """The lower end of the median's interval; ``ordered`` ascends."""
    n = len(ordered)

    def coverage(k: int) -> float:
        """Coverage of the interval from the k-th smallest to the k-th largest value."""
        return float(1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n)

    k = 1
    while coverage(k + 1) >= confidence:
        k += 1
    if coverage(k) < confidence or 2 * k >= n:
        return float(ordered[k - 1])
    excess = (coverage(k) - confidence) / (coverage(k) - coverage(k + 1))
    inward = (n - k) * excess / (k + (n - 2 * k) * excess)
    return float((1 - inward) * ordered[k - 1] + inward * ordered[k])


def paired_proportion_interval(first_only: int, second_only: int, n: int, *, confidence: float = 0.95) -> Interval:
    """The difference of two proportions on the same ``n`` samples: the first's minus the second's.

    ``first_only`` counts the samples that only the first has right, ``second_only`` those that only the
    second has. The adjusted Wald interval of Bonett and Price (Journal of Educational and Behavioral
    Statistics 37(4), 2012): one sample is added to each count, so that the interval keeps the width that
    ``n`` samples deserve even if none differs.
    """
    p1, p2 = (first_only + 1) / (n + 2), (second_only + 1) / (n + 2)
    half = _normal(confidence) * sqrt((p1 + p2 - (p1 - p2) ** 2) / (n + 2))
    return Interval(max(-1.0, p1 - p2 - half), min(1.0, p1 - p2 + half))


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    units: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    budget_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of ``units`` exchangeable units (samples, or groups of samples).

    ``statistic`` is given the drawn units' numbers, shape (units,), with repetitions; resamples that give NaN are left
    out. This is the percentile bootstrap, expanded for few units (Hesterberg, The American Statistician 69(4), 2015).
    If ``budget_s`` allows fewer than 200 resamples, percentiles are too coarse, and the interval is estimate +- t *
    standard error, for which 25 to 200 are enough (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    section 6.4).

    Raises ``ValueError`` for fewer than 2 units, or if most resamples are NaN.
    """
    if units < 2:
        raise ValueError("it needs at least 2 samples or groups")
    estimate = statistic(np.arange(units))
    rng = np.random.default_rng(seed)
    drawn: list[float] = []
    start = clock()
    while len(drawn) < resamples and (len(drawn) < FEWEST_RESAMPLES or clock() - start < budget_s):
        drawn.append(statistic(rng.integers(units, size=units)))
    values = np.array(drawn)[~np.isnan(drawn)]
    if 2 * len(values) < len(drawn):
        raise ValueError(f"it is undefined on {len(drawn) - len(values)} of {len(drawn)} resamples")
    reach = sqrt(units / (units - 1)) * _student(confidence, units - 1)
    if len(values) < _ENOUGH_FOR_PERCENTILES:
        half = reach * float(np.std(values, ddof=1))
        return Interval(estimate - half, estimate + half)
    tail = NormalDist().cdf(-reach)
    return Interval(min(estimate, quantile(values, tail)), max(estimate, quantile(values, 1 - tail)))


def bootstrap_mean_interval(values: ArrayLike, groups: NDArray[np.intp] | None = None, **options: Any) -> Interval:
    """The interval of the mean of ``values`` (N,), by ``bootstrap_interval`` with its options.

    ``groups`` (N,) numbers the groups 0, 1, ... of samples that belong together and are drawn together.
    """
    array = np.asarray(values, dtype=np.float64)
    members = np.arange(len(array)) if groups is None else groups
    sums, counts = np.bincount(members, weights=array), np.bincount(members)
    return bootstrap_interval(lambda units: float(sums[units].sum() / counts[units].sum()), len(sums), **options)


def holdout_needed(samples: int, half_width: float, margin: float) -> int:
    """About how many samples would narrow an interval of ``half_width``, from ``samples``, to ``margin``.

    Widths shrink with the square root of the number of samples. Rounded up to two digits.
    Raises ``ValueError`` for a margin of 0 or less, which no number of samples reaches.
    """
    if margin <= 0:
        raise ValueError("no number of samples reaches a margin of 0")
    needed = ceil(samples * (half_width / margin) ** 2)
    unit = int(10 ** max(0, len(str(needed)) - 2))
    return ceil(needed / unit) * unit


def noise_warnings(values: Sequence[float], throttled: int = 0) -> tuple[str, ...]:
    """Doubts about times or rates taken one after the other, in words with what to do about each.

    Noise is a ``spread`` above 0.1; drift is a trend (Mann, Econometrica 13, 1945, on at most 30 block
    medians, at 3 standard deviations) by more than 5 % from the first third to the last; ``throttled``
    is the growth of the cgroup's ``nr_throttled`` meanwhile.
    """
    warnings = []
    if throttled:
        warnings.append(
            f"throttled {throttled} times by the CPU quota: the figures are too low; use fewer threads or raise it"
        )
    if (noise := spread(values)) > NOISY_SPREAD:
        warnings.append(
            f"noisy: the middle half spreads over {percent(noise)} of the median; close other programs and rerun"
        )
    if abs(drift := _drift(values)) > DRIFT:
        warnings.append(
            f"drifted by {percent(drift, signed=True)} from first to last; let the machine settle (heat, other load) "
            "and rerun"
        )
    return tuple(warnings)


def _drift(values: Sequence[float]) -> float:
    """The relative change from the first third to the last, 0 where it may be chance."""
    array = np.asarray(values, dtype=np.float64)
    blocks = np.array([np.median(block) for block in np.array_split(array, min(len(array), 30))])
    n = len(blocks)
    rises = np.triu(np.sign(blocks[None, :] - blocks[:, None])).sum()
    if abs(rises) <= 3 * sqrt(n * (n - 1) * (2 * n + 5) / 18):
        return 0.0
    return float(np.median(blocks[-(n // 3) :]) / np.median(blocks[: n // 3]) - 1)


def _normal(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student(confidence: float, df: int) -> float:
    """Student's t quantile by its expansion around the normal one (Abramowitz and Stegun 26.7.5); near from df 3 on."""
    z = _normal(confidence)
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
