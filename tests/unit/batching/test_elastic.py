"""elastic policy: a call that is alone takes all cores, calls from many threads share them, and no core is idle."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corewise.batching import ElasticPolicy, LatencyTable, Partitions, simulate
from corewise.batching.elastic import Start
from corewise.batching.partition import Part
from corewise.batching.simulate import simulate_callers, simulate_calls


def table(*ms):
    return LatencyTable(points=tuple((2**k, value) for k, value in enumerate(ms)))


ONE, BOTH = table(4.0, 7.5, 14.5, 28.0), table(2.4, 4.5, 8.8, 17.4)
"""On two cores a call of one row gains 1.67 by the second."""
ELASTIC, NARROW = (Partitions(found, cores=2) for found in ({1: ONE, 2: BOTH}, {1: ONE}))
SCALES_WELL = table(2.05, 4.05, 8.0, 16.0)
ONE_CORE, ALL = Part(1, 1), Part(2, 1)


def test_a_call_that_is_alone_takes_all_cores_however_often_it_comes():
    policy, now_s = ElasticPolicy(ELASTIC), 0.0
    for call in range(50):
        policy.arrive(call, 1, now_s)
        assert policy.starts(now_s) == [Start(call, ALL)]
        assert policy.free == 0
        now_s += ELASTIC.call_s(ALL)
        policy.ended(2, now_s)


def test_a_call_of_many_rows_is_divided_among_instances_and_its_rest_goes_on_behind_others():
    policy = ElasticPolicy(ELASTIC)
    policy.arrive(0, 20, 0.0)
    assert policy.starts(0.0) == [Start(0, Part(1, 8)), Start(0, Part(1, 8))]
    policy.arrive(1, 1, 0.001)
    assert policy.starts(0.001) == []
    policy.ended(1, 0.028)
    assert policy.starts(0.028) == [Start(0, Part(1, 4))]
    policy.ended(1, 0.029)
    assert policy.starts(0.029) == [Start(1, ONE_CORE)]


def test_two_that_come_together_get_one_core_each_and_the_next_ones_too():
    policy = ElasticPolicy(ELASTIC)
    policy.arrive(0, 1, 0.0)
    policy.arrive(1, 1, 0.0)
    assert policy.starts(0.0) == [Start(0, ONE_CORE), Start(1, ONE_CORE)]
    policy.ended(1, 0.004)
    policy.arrive(2, 1, 0.004)
    assert policy.starts(0.004) == [Start(2, ONE_CORE)]


def test_a_crowd_is_remembered_and_forgotten():
    hardly_scales = Partitions({1: ONE, 2: table(3.8, 7.2, 14.0, 27.0)}, cores=2)
    policy, now_s = ElasticPolicy(hardly_scales), 0.0
    policy.arrive(0, 1, now_s)
    policy.arrive(1, 1, now_s)
    policy.starts(now_s)
    for call in range(2, 40):  # two callers, each of whom comes while the other one's call runs
        now_s += 0.002
        policy.ended(1, now_s)
        policy.arrive(call, 1, now_s)
        assert policy.starts(now_s) == [Start(call, ONE_CORE)]
    now_s += 0.004
    policy.ended(1, now_s)
    policy.ended(1, now_s)
    policy.arrive(100, 1, now_s)
    assert policy.starts(now_s) == [Start(100, ONE_CORE)]
    policy.ended(1, now_s + 0.004)
    now_s += 60.0
    policy.arrive(101, 1, now_s)
    assert policy.starts(now_s) == [Start(101, ALL)]


def test_a_call_that_leaves_starts_no_more():
    policy = ElasticPolicy(ELASTIC)
    policy.arrive(0, 40, 0.0)
    threads = sum(start.part.threads for start in policy.starts(0.0))
    policy.arrive(1, 1, 0.0)
    policy.leave(0)
    policy.leave(7)
    policy.ended(threads, 0.03)
    assert [start.call for start in policy.starts(0.03)] == [1]


@st.composite
def machines(draw):
    """Partitions of up to four cores, by two layouts."""
    cores = draw(st.sampled_from([2, 3, 4]))
    few = draw(st.sampled_from([threads for threads in (1, 2) if cores % threads == 0 and threads < cores]))
    found = {}
    for threads in (few, cores):
        steps = draw(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4))
        found[threads] = LatencyTable(points=tuple((k + 1, sum(steps[: k + 1])) for k in range(len(steps))))
    return Partitions(found, cores=cores)


@given(machines(), st.lists(st.tuples(st.floats(0.0, 0.01), st.integers(1, 9)), min_size=1, max_size=20))
def test_every_row_runs_once_and_no_core_is_idle_while_a_call_waits_that_fits(partitions, offered):
    policy, now_s = ElasticPolicy(partitions), 0.0
    left, running = {}, []

    def start():
        for one in policy.starts(now_s):
            running.append((now_s + partitions.call_s(one.part), one))
            left[one.call] -= one.part.rows
            assert left[one.call] >= 0
        assert policy.free == partitions.cores - sum(one.part.threads for _, one in running) >= 0
        assert policy.free < partitions.threads[0] or not any(left.values())

    for call, (gap_s, rows) in enumerate(offered):
        now_s += gap_s
        while running and min(running)[0] <= now_s:
            ended = min(running)
            running.remove(ended)
            policy.ended(ended[1].part.threads, now_s)
            start()
        left[call] = rows
        policy.arrive(call, rows, now_s)
        start()
    while running:
        ended = min(running)
        running.remove(ended)
        now_s = max(now_s, ended[0])
        policy.ended(ended[1].part.threads, now_s)
        start()
    assert not any(left.values())
    assert policy.free == partitions.cores


# --- simulated ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [BOTH, SCALES_WELL])
def test_at_every_load_it_is_about_as_good_as_the_better_layout_alone(both):
    most_per_s = simulate_callers(NARROW, callers=4).rate_per_s
    ways = [Partitions(found, cores=2) for found in ({1: ONE, 2: both}, {2: both}, {1: ONE})]
    for load in (0.05, 1 / 3, 2 / 3, 0.9):
        elastic, wide, narrow = (simulate_calls(one, rate_per_s=load * most_per_s) for one in ways)
        assert elastic.p50_ms <= 1.1 * min(wide.p50_ms, narrow.p50_ms)
        assert elastic.p99_ms <= 1.15 * min(wide.p99_ms, narrow.p99_ms)
    assert simulate_callers(ways[0], callers=4).rate_per_s >= 0.99 * most_per_s
    assert simulate_callers(ways[0], callers=1).p50_ms == pytest.approx(both.latency_ms(1))


def test_on_eight_cores_hardly_another_number_of_calls_that_wait_for_all_cores_is_better(monkeypatch):
    """By p50 and p99 together: at half the load each number that lowers the one makes the other longer."""
    eight = Partitions({1: ONE, 8: table(*(ms / 1.67**3 for ms in (4.0, 7.5, 14.5, 28.0)))}, cores=8)

    def latency_ms():
        found = simulate_calls(eight, rate_per_s=0.5 * 8 / 0.004)
        return sqrt(found.p50_ms * found.p99_ms)

    ours_ms, others_ms = latency_ms(), []
    for most in (0, 4, 5, 6, 8):

        class AtMost(ElasticPolicy):
            def _is_wide(self, rows, most=most):
                return self.free == 8 and len(self._waiting) < most

        monkeypatch.setattr(simulate, "ElasticPolicy", AtMost)
        others_ms.append(latency_ms())
    assert ours_ms <= 1.12 * min(others_ms)


def test_simulated_calls_are_all_answered_and_the_same_each_time():
    first = simulate_calls(ELASTIC, rate_per_s=300.0, rows=3, calls=500)
    assert first == simulate_calls(ELASTIC, rate_per_s=300.0, rows=3, calls=500)
    assert (first.answered, first.refused) == (500, 0)
    assert simulate_callers(ELASTIC, callers=3, rows=5, calls=100).answered == 100
