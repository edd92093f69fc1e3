"""How a round begins: thresholds by the load, and never worse than either layout alone in the model that is solved."""

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corewise.batching.rounds import Rounds, _solution

NARROW, BOTH = (0.0, 4.0, 7.5, 11.0, 14.5), (0.0, 2.4, 4.5, 6.65, 8.8)
SLOW_BOTH = (0.0, 3.8, 7.2, 10.6, 14.0)


def rounds(wide=BOTH, narrow=NARROW, **about):
    """With times in seconds, so that rates are requests per second."""
    return Rounds(wide, narrow, **{"instances": 2, **about})


def test_a_request_that_is_alone_is_wide_and_the_more_come_the_fewer_that_wait_are():
    made = rounds()
    most_per_s = 2 * 4 / 14.5
    shares = [made.wide_requests(2, 1, load * most_per_s) for load in (0.0, 0.1, 0.5, 0.9, 2.0)]
    assert shares == [1, 1, 0, 0, 0]
    assert [made.wide_requests(1, 1, load * most_per_s) for load in (0.0, 0.5, 0.95)] == [1, 1, 1]
    assert made.wide_requests(500, 1, 0.9 * most_per_s) == 0


def test_where_more_threads_hardly_help_a_request_is_wide_only_if_hardly_any_other_comes():
    made = rounds(SLOW_BOTH)
    assert made.wide_requests(1, 1, 0.0) == 1
    assert {made.wide_requests(1, 1, load * 8 / 14.5) for load in (0.2, 0.5, 0.8)} == {0}


def test_where_wide_calls_do_more_all_that_fit_are_in_one():
    made = rounds((0.0, 2.0, 2.5, 3.0, 3.5))
    assert [made.wide_requests(waiting, 1, 0.5) for waiting in (1, 2, 4, 9)] == [1, 2, 4, 4]


def test_requests_of_many_rows_are_counted_by_what_they_need_and_those_that_share_no_call_run_one_by_one():
    assert rounds((0.0, 2.0, 2.5, 3.0, 3.5)).wide_requests(4, 2, 0.1) == 2
    assert rounds((0.0, 2.0, 2.5, 3.0, 3.5), shared=False).wide_requests(4, 1, 0.1) == 1
    assert rounds(BOTH[:3]).wide_requests(3, 4, 0.1) == 0, "a wide call does not have so many rows"


STEPS = st.lists(st.floats(0.05, 8.0), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(STEPS, STEPS, st.floats(0.0, 3.0), st.integers(1, 40), st.integers(1, 5))
def test_for_any_times_the_calls_are_possible_and_their_mean_cost_is_least(few, many, load, waiting, instances):
    narrow, wide = ((0.0, *np.cumsum(steps)) for steps in (few, many))
    made = rounds(wide, narrow, instances=instances)
    taken = made.wide_requests(waiting, 1, load)
    assert 0 <= taken <= min(waiting, len(wide) - 1)
    per_s = 0.5 * made._most_per_s(1)
    best = made._solved(1, per_s)
    costs = {tuple(counts): mean_cost(made, counts, per_s) for counts in (best, *(map(list, made._counts(1))))}
    assert costs[tuple(best)] <= min(costs.values()) * (1 + 1e-6)


def mean_cost(made, counts, per_s):
    """Mean number of requests that wait or run if rounds always begin so, by the stationary distribution of rounds."""
    chosen = made._way(np.array(counts), 1, per_s)
    size = len(chosen.seconds)
    system = np.vstack([chosen.after.T - np.eye(size), np.ones(size)])
    share = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0]
    seconds = share @ chosen.seconds
    return share @ chosen.cost_s / seconds if seconds > 0 else inf


@pytest.mark.parametrize("wide", [(0.0, 2e-5), (0.0, 8e-5, 185.0)])
def test_instances_that_are_thousands_of_times_as_slow_as_one_on_all_cores_have_a_solution(wide):
    made = rounds(wide, (0.0, 0.34, 0.34), instances=40)
    assert {made.wide_requests(waiting, 1, load) for waiting in (1, 9, 99) for load in (0.0, 1e9)} == {1}


@pytest.mark.parametrize("instances", [1, 2, 64])
def test_probabilities_are_whole(instances):
    made = rounds(instances=instances)
    made.wide_requests(1, 1, 0.1)
    for counts in made._counts(1):
        way = made._way(counts, 1, 0.3)
        assert way.after.sum(axis=1) == pytest.approx(1.0)
        assert (way.after >= 0).all()
        assert (way.seconds > 0).all()


@pytest.mark.parametrize("instances", [96, 128])
def test_probabilities_of_very_many_arrivals_are_numbers(instances):
    narrow, wide = ((0.0, *(base_ms + row_ms * np.arange(1, 65))) for base_ms, row_ms in ((1.0, 0.002), (0.2, 0.001)))
    made = rounds(wide, narrow, instances=instances)
    per_s = 0.98 * made._most_per_s(1)
    for counts in made._counts(1):
        way = made._way(counts, 1, per_s)
        assert way.after.sum(axis=1) == pytest.approx(1.0)
        assert np.isfinite(way.cost_s).all()


def test_single_rows_are_solved_beforehand_and_other_sizes_as_powers_of_two():
    made = rounds((0.0, *np.linspace(2.0, 12.0, 16)), (0.0, *np.linspace(4.0, 20.0, 12)))
    solved = set(made._tables)
    for load in np.linspace(0.0, 2.0, 50):
        made.wide_requests(1, 1, load * made._most_per_s(1))
    assert set(made._tables) == solved
    for rows in range(1, 13):
        assert made.wide_requests(1, rows, 0.001) == 1, rows
    assert {rows for rows, _ in made._tables} == {1, 2, 4, 8, 12}


def test_equations_are_solved_by_blocks():
    rng = np.random.default_rng(0)
    system, sums = np.eye(129) + rng.random((129, 129)) / 129, rng.random((129, 1))
    assert _solution(system, sums) == pytest.approx(np.linalg.solve(system, sums))
