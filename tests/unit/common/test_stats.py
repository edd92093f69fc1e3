from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from corewise.common import stats

rates = st.floats(0.1, 1e4)


def test_quantile_and_spread_are_the_textbook_ones():
    assert stats.quantile([1, 2, 3, 4], 0.5) == 2.5
    assert stats.quantile([5.0], 0.99) == 5.0
    assert stats.spread([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    assert stats.spread([3.0, 3.0]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        stats.quantile([], 0.5)


@given(st.lists(st.tuples(rates, rates), min_size=1, max_size=20), st.sampled_from([0.5, 0.8, 0.95, 0.99]))
def test_the_ratio_interval_holds_the_estimate_and_inverts(rounds, confidence):
    a, b = zip(*rounds, strict=True)
    ratio, inverse = (stats.ratio_interval(x, y, confidence=confidence) for x, y in ((a, b), (b, a)))
    assert 0 < ratio.low <= ratio.value <= ratio.high
    assert inverse == pytest.approx((1 / ratio.value, 1 / ratio.high, 1 / ratio.low))


def test_rounds_slowed_together_leave_the_ratio_alone():
    slow = np.array([1, 0.3, 0.9, 0.5, 1, 0.7, 1.2])
    assert stats.ratio_interval(list(40 * slow), list(10 * slow)) == pytest.approx((4, 4, 4))


def test_one_disturbed_round_does_not_carry_the_ratio_away():
    quiet = stats.ratio_interval([40.0, 41, 39, 40.5, 39.5, 40, 41, 39.8, 40.2], [10.0] * 9)
    disturbed = stats.ratio_interval([40.0, 41, 39, 40.5, 39.5, 40, 41, 39.8, 2.0], [10.0] * 9)
    assert disturbed.value == pytest.approx(quiet.value, rel=0.01)
    assert disturbed.low > 3.5


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0])])
def test_rates_that_are_no_pairs_are_refused(a, b):
    with pytest.raises(ValueError, match="as many rates"):
        stats.ratio_interval(a, b)


NOISES = {
    "normal": lambda rng, shape: rng.normal(0, 0.05, shape),
    "heavy tails": lambda rng, shape: 0.03 * rng.standard_t(2, shape),
    "skewed": lambda rng, shape: rng.exponential(0.1, shape) - 0.1 * np.log(2),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rounds", [5, 6, 9, 15])
def test_the_ratio_interval_covers_the_true_ratio_as_often_as_it_says(noise, rounds):
    rng = np.random.default_rng([rounds, 1])
    runs = 1000
    ratios = 4 * np.exp(NOISES[noise](rng, (runs, rounds)))
    intervals = [stats.ratio_interval(list(row), [1.0] * rounds) for row in ratios]
    covered = np.mean([low <= 4 <= high for _, low, high in intervals])
    promised = 0.95 if rounds >= stats.MIN_ROUNDS else 1 - 2 ** (1 - rounds)
    assert covered >= promised - 3 * np.sqrt(0.05 * 0.95 / runs)
    assert covered < 0.99


def test_bonett_price_gives_the_published_form():
    # By hand: p1 = 9/102, p2 = 4/102, half = 1.96 sqrt((13/102 - (5/102)^2) / 102).
    low, high = stats.paired_proportion_interval(8, 3, 100)
    assert (low, high) == pytest.approx((0.04902 - 0.06863, 0.04902 + 0.06863), abs=2e-4)


def test_no_differing_sample_still_leaves_the_doubt_that_n_deserves():
    assert stats.paired_proportion_interval(0, 0, 300) == pytest.approx((-0.00918, 0.00918), abs=1e-4)
    assert stats.paired_proportion_interval(0, 0, 3).high > 0.5


@given(st.integers(1, 400), st.data())
def test_the_paired_proportion_interval_holds_the_estimate(n, data):
    first = data.draw(st.integers(0, n))
    second = data.draw(st.integers(0, n - first))
    low, high = stats.paired_proportion_interval(first, second, n)
    assert -1 <= low <= (first - second) / n <= high <= 1


@pytest.mark.parametrize(("first", "second"), [(0.02, 0.01), (0.05, 0.05), (0.005, 0.0), (0.3, 0.1)])
def test_the_paired_proportion_interval_covers(first, second):
    counts = np.random.default_rng(3).multinomial(300, [first, second, 1 - first - second], size=2000)
    intervals = [stats.paired_proportion_interval(int(a), int(b), 300) for a, b, _ in counts]
    assert np.mean([low <= first - second <= high for low, high in intervals]) > 0.94


@pytest.mark.parametrize("n", [20, 60])
def test_the_bootstrapped_mean_covers(n):
    rng = np.random.default_rng(5)
    means = [stats.bootstrap_mean_interval(rng.normal(size=n), resamples=250, seed=i) for i in range(150)]
    assert 0.9 <= np.mean([low <= 0 <= high for low, high in means]) < 0.99


def test_samples_of_one_group_count_as_one():
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(20), 10)
    covered = {"grouped": 0, "ungrouped": 0}
    for seed in range(80):
        values = rng.normal(size=20)[groups] + 0.1 * rng.normal(size=200)
        for name, members in (("grouped", groups), ("ungrouped", None)):
            low, high = stats.bootstrap_mean_interval(values, members, resamples=200, seed=seed)
            covered[name] += low <= 0 <= high
    assert covered["grouped"] >= 70
    assert covered["ungrouped"] < 50


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.sampled_from([30, 250]))
def test_the_bootstrap_interval_holds_the_estimate(values, resamples):
    low, high = stats.bootstrap_mean_interval(values, resamples=resamples)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9


def test_the_bootstrap_is_seeded():
    values = list(np.random.default_rng(0).normal(size=50))
    assert stats.bootstrap_mean_interval(values, seed=1) == stats.bootstrap_mean_interval(values, seed=1)
    assert stats.bootstrap_mean_interval(values, seed=1) != stats.bootstrap_mean_interval(values, seed=2)


@pytest.mark.parametrize(("second_per_call", "calls"), [(0.001, 1000), (0.02, 250), (10, 25)])
def test_the_bootstrap_keeps_to_its_budget(second_per_call, calls):
    done = 0
    values = np.random.default_rng(0).normal(size=100)

    def slow_mean(units):
        nonlocal done
        done += 1
        return float(values[units].mean())

    low, high = stats.bootstrap_interval(slow_mean, 100, budget_s=5, clock=lambda: done * second_per_call)
    assert done - 1 == pytest.approx(calls, abs=1)
    assert high - low == pytest.approx(2 * 1.98 * values.std() / 10, rel=0.3)


def test_undefined_resamples_are_left_out_unless_they_are_most():
    turn = count()
    low, high = stats.bootstrap_interval(lambda units: float("nan") if next(turn) % 3 == 2 else 1.0, 10)
    assert (low, high) == (1, 1)
    with pytest.raises(ValueError, match="undefined on 1000 of 1000"):
        stats.bootstrap_interval(lambda units: float("nan"), 10)
    with pytest.raises(ValueError, match="at least 2"):
        stats.bootstrap_interval(lambda units: 0.0, 1)


@pytest.mark.parametrize("df", [3, 9, 50])
def test_students_t_is_near_scipys(df):
    assert stats._student(0.95, df) == pytest.approx(scipy_stats.t.ppf(0.975, df), rel=0.01)


def test_the_holdout_needed_makes_the_interval_as_narrow_as_the_margin():
    assert stats.holdout_needed(300, 0.02, 0.01) == 1200
    assert stats.holdout_needed(300, 0.0115, 0.01) == 400
    needed = stats.holdout_needed(100, 0.05, 0.02)
    low, high = stats.paired_proportion_interval(5 * needed // 100, 3 * needed // 100, needed)
    before = stats.paired_proportion_interval(5, 3, 100)
    assert (high - low) / (before.high - before.low) == pytest.approx(0.02 / 0.05, rel=0.1)
    with pytest.raises(ValueError, match="margin"):
        stats.holdout_needed(300, 0.02, 0.0)


def test_quiet_times_raise_no_doubt():
    for seed in range(50):
        assert stats.noise_warnings(list(np.random.default_rng(seed).normal(10, 0.3, 200))) == ()
    assert stats.noise_warnings([1.0]) == stats.noise_warnings([2.0] * 10) == ()


def test_noise_drift_and_throttling_are_told_apart():
    rng = np.random.default_rng(0)
    (noisy,) = stats.noise_warnings(list(rng.normal(10, 2, 200)))
    (drifting,) = stats.noise_warnings(list(np.linspace(10, 11, 200) + rng.normal(0, 0.1, 200)))
    (throttled,) = stats.noise_warnings([10.0] * 20, throttled=3)
    assert noisy.startswith("noisy: the middle half spreads over 2")
    assert drifting.startswith("drifted by +7 % from first to last")
    assert throttled.startswith("throttled 3 times")
    assert len(stats.noise_warnings(list(np.linspace(10, 20, 30)), throttled=1)) == 3
