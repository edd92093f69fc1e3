import math

import numpy as np
import pytest

from corewise.batching import LatencyTable
from corewise.batching.simulate import capacity_per_s, most_rate, service_of, simulate_load, simulate_trace
from corewise.records.build import Plan
from corewise.records.measurement import Measurement


def curve(call_ms=10.0, row_ms=5.0, largest=16):
    return LatencyTable(points=tuple((rows, call_ms + row_ms * rows) for rows in range(1, largest + 1)))


def exactly(table):
    """Calls that last as long as the table says."""
    return lambda rows, rng: table.latency_ms(rows) / 1e3


def run(table, **options):
    wanted = {"service": exactly(table), "instances": 1, "max_batch": 16, "max_waiting": 4096}
    return simulate_load(table, **wanted | options)


def most(table, **options):
    wanted = {"service": exactly(table), "instances": 1, "max_batch": 16, "max_waiting": 4096}
    return most_rate(table, **wanted | options)


# --- against theory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_calls_of_one_request_and_of_one_length_wait_as_theory_says(load):
    """M/D/1."""
    table = LatencyTable(points=((1, 10.0),))
    found = run(table, max_batch=1, max_waiting=50_000, requests=50_000, rate_per_s=load * 100)
    assert (found.answered, found.refused) == (50_000, 0)
    assert found.p50_ms == pytest.approx(10.0 + 10.0 * md1_quantile(load, 0.5), rel=0.05)
    assert found.p99_ms == pytest.approx(10.0 + 10.0 * md1_quantile(load, 0.99), rel=0.1)


def md1_quantile(load, q):
    """The ``q`` quantile of the wait in calls, by Erlang's series of 1909.

    P(W <= x) = (1 - rho) sum over k <= x of (rho (k - x))^k / k! e^(rho (x - k)).
    """

    def at_most(x):
        terms = ((load * (k - x)) ** k / math.factorial(k) * math.exp(load * (x - k)) for k in range(int(x) + 1))
        return (1 - load) * sum(terms)

    low, high = 0.0, 15.0
    if at_most(0.0) >= q:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if at_most(middle) >= q else (middle, high)
    return high


def test_exponential_calls_on_two_instances_wait_as_theory_says():
    """M/M/2."""
    table = LatencyTable(points=((1, 10.0),))
    found = run(
        table,
        service=lambda rows, rng: rng.exponential(0.01),
        instances=2,
        max_batch=1,
        max_waiting=50_000,
        requests=50_000,
        rate_per_s=120.0,
    )
    # Erlang C for 2 servers at rho = 0.6: 2 rho^2 / (1 + rho) = 0.45 wait, those an exponential time.
    rng = np.random.default_rng(0)
    waits = np.where(rng.random(400_000) < 0.45, rng.exponential(1 / (200.0 - 120.0), 400_000), 0.0)
    expected = np.quantile(waits + rng.exponential(0.01, 400_000), [0.5, 0.99]) * 1e3
    assert (found.p50_ms, found.p99_ms) == (pytest.approx(expected[0], rel=0.05), pytest.approx(expected[1], rel=0.1))


def test_at_a_trickle_every_request_runs_alone():
    found = run(curve(), rate_per_s=0.05, requests=500)
    assert (found.p50_ms, found.p99_ms) == (pytest.approx(15.0), pytest.approx(15.0))
    assert found.goodput_per_s == pytest.approx(0.05, rel=0.2)


def test_overload_is_refused_and_the_work_done_stays_near_capacity():
    table = curve()
    capacity = capacity_per_s(exactly(table), instances=2, max_batch=16)
    assert capacity == pytest.approx(2 * 16 / 0.09)
    found = run(table, instances=2, rate_per_s=3 * capacity, slo_ms=400.0)
    assert found.answered + found.refused == 2000
    assert found.goodput_per_s > 0.9 * capacity
    assert found.p99_ms <= 400.0 + 1e-6


def test_a_trace_is_played_as_it_comes_and_says_of_each_request_what_became_of_it():
    table = curve(call_ms=10.0, row_ms=0.0, largest=1)
    told = {"service": exactly(table), "instances": 1, "max_batch": 1, "max_waiting": 10}
    assert simulate_trace(table, [0.0, 0.002, 0.05], **told) == pytest.approx([0.010, 0.018, 0.010])
    late = simulate_trace(table, [0.0, 0.002, 0.004, 0.05], slo_ms=20.0, **told)
    assert late == pytest.approx([0.010, 0.018, math.inf, 0.010])
    assert simulate_trace(table, [], **told) == []


# --- the highest rate ---------------------------------------------------------------------------------------------


def test_with_a_loose_slo_the_highest_rate_is_near_capacity():
    table = curve()
    capacity = capacity_per_s(exactly(table), instances=1, max_batch=16)
    assert 0.9 * capacity < most(table, slo_ms=2000.0) <= capacity


def test_what_is_found_holds_and_a_little_more_does_not():
    table = curve()
    for slo_ms in (60.0, 200.0, 500.0):
        rate = most(table, slo_ms=slo_ms, requests=4000)
        held = run(table, rate_per_s=rate, slo_ms=slo_ms, requests=4000)
        assert held.refused <= 40
        assert held.p99_ms <= slo_ms + 1e-6
        assert run(table, rate_per_s=1.1 * rate, slo_ms=slo_ms, requests=4000).refused > 40


def test_more_instances_and_longer_slos_hold_more():
    table = curve()
    by_instances = [most(table, instances=n, slo_ms=150.0) for n in (1, 2, 4)]
    assert by_instances[1] > 1.8 * by_instances[0]
    assert by_instances[2] > 1.8 * by_instances[1]
    by_slo = [most(table, slo_ms=slo_ms) for slo_ms in (20.0, 50.0, 150.0, 1000.0)]
    assert by_slo == sorted(by_slo)
    assert by_slo[0] < 0.5 * by_slo[-1]


def test_larger_batches_hold_more_where_there_is_time_for_them():
    table = curve()
    assert most(table, slo_ms=500.0) > 2 * most(table, slo_ms=500.0, max_batch=1)


def test_an_slo_shorter_than_a_call_holds_nothing():
    assert most(curve(), slo_ms=14.9) == 0.0
    # Admission by a table that is too good lets them in, and they are late.
    assert most(curve(), service=lambda rows, rng: 0.2, slo_ms=100.0) == 0.0


def test_calls_that_are_slower_than_the_table_hold_less():
    table = curve()
    noisy = lambda rows, rng: table.latency_ms(rows) / 1e3 * (3.0 if rng.random() < 0.02 else 1.0)  # noqa: E731
    assert 0 < most(table, service=noisy, slo_ms=150.0) < 0.9 * most(table, slo_ms=150.0)


def test_it_is_the_same_each_time_and_another_with_another_seed():
    table = curve()
    service = lambda rows, rng: table.latency_ms(rows) / 1e3 * rng.uniform(0.8, 1.0)  # noqa: E731
    first, again, other = (run(table, service=service, rate_per_s=100.0, slo_ms=200.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    rates = [most(table, service=service, slo_ms=100.0, seed=seed) for seed in (1, 1, 2)]
    assert rates[0] == rates[1]
    assert rates[2] == pytest.approx(rates[0], rel=0.3)


# --- measured calls -----------------------------------------------------------------------------------------------


def measurement(batch, *latencies_ms):
    return Measurement(
        plan=Plan(threads_per_instance=1, batch=batch),
        latencies_ms=latencies_ms,
        throughput_per_s=1.0,
        p50_ms=float(np.median(latencies_ms)),
        p99_ms=max(latencies_ms),
        spread=0.0,
    )


def test_calls_are_drawn_from_the_nearest_measured_batch():
    draw = service_of([measurement(8, 40.0, 40.0, 80.0), measurement(1, 10.0, 11.0, 9.0)])
    rng = np.random.default_rng(0)
    drawn = lambda rows: {round(draw(rows, rng) * 1e3, 6) for _ in range(200)}  # noqa: E731
    assert drawn(1) == {9.0, 10.0, 11.0}
    assert drawn(8) == {40.0, 80.0}
    middle = 10.0 + 30.0 * 2 / 7  # of three rows on the curve of the medians
    assert drawn(3) == {round(share * middle, 6) for share in (0.9, 1.0, 1.1)}
    assert drawn(16) == {80.0, 160.0}
    with pytest.raises(ValueError, match="latency table"):
        service_of([])


@pytest.mark.parametrize("times", [1.0, 1.3, 2.0])
def test_overload_leaves_most_of_what_slower_calls_can_do(times):
    """What else runs on the machine makes calls slower than they were measured; most that is let in is in time."""
    table = curve()
    able_per_s = capacity_per_s(exactly(table), instances=2, max_batch=16) / times
    found = run(
        table,
        service=lambda rows, rng: times * table.latency_ms(rows) / 1e3 * rng.uniform(0.95, 1.0),
        instances=2,
        rate_per_s=3 * able_per_s,
        slo_ms=600.0,
        requests=6000,
    )
    assert found.goodput_per_s >= 0.9 * able_per_s
