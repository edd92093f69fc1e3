"""partitions: the best way to divide cores and rows, against brute force and published figures."""

from functools import cache
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.published import alone_s, bert_partitions
from corewise.batching import LatencyTable, Partitions
from corewise.batching.partition import Part


def table(*ms):
    return LatencyTable(points=tuple((2**k, value) for k, value in enumerate(ms)))


@st.composite
def tables(draw, cores=5, most=4):
    """Rising milliseconds for each row, of some numbers of threads."""
    found = {}
    for threads in draw(st.sets(st.integers(1, cores), min_size=1)):
        steps = draw(st.lists(st.integers(0, 20), min_size=1, max_size=most))
        found[threads] = LatencyTable(points=tuple((k + 1, 1.0 + sum(steps[: k + 1])) for k in range(len(steps))))
    return found


def least_s(found, cores, rows):
    """Brute force: every call that may be the first, and every way to go on."""
    calls = {
        (threads, count): one.latency_ms(count) / 1e3
        for threads, one in found.items()
        for count in range(1, one.points[-1][0] + 1)
    }

    @cache
    def end_s(cores, rows):
        if not rows:
            return 0.0
        return min(
            (
                max(seconds, end_s(cores - threads, rows - count))
                for (threads, count), seconds in calls.items()
                if threads <= cores and count <= rows
            ),
            default=inf,
        )

    return end_s(cores, rows)


@given(tables(), st.integers(1, 5), st.integers(1, 8))
def test_no_partition_ends_sooner(found, cores, rows):
    partitions = Partitions(found, cores=5)
    end_s = least_s(found, cores, rows)
    parts = partitions.split(cores, rows)
    assert sum(part.threads for part in parts) <= cores
    if end_s == inf:  # they take several rounds, if any
        assert bool(parts) == (cores >= min(found))
        assert 0 <= sum(part.rows for part in parts) < rows
        return
    assert sum(part.rows for part in parts) == rows
    assert partitions.seconds(cores, rows) == pytest.approx(end_s)
    assert max(partitions.call_s(part) for part in parts) == pytest.approx(end_s)


@given(tables(), st.integers(1, 40))
def test_rows_that_do_not_fit_take_rounds_until_none_is_left(found, rows):
    partitions = Partitions(found, cores=5)
    expected_s, left = partitions.seconds(5, rows), rows
    total_s = 0.0
    while left:
        parts = partitions.split(5, left)
        total_s += max(partitions.call_s(part) for part in parts)
        left -= sum(part.rows for part in parts)
    assert total_s == pytest.approx(expected_s)


@given(tables(), st.integers(1, 5), st.integers(1, 12))
def test_more_cores_or_fewer_rows_never_end_later_within_a_round(found, cores, rows):
    partitions = Partitions(found, cores=5)
    if least_s(found, cores, rows) < inf:
        assert partitions.seconds(5, rows) <= partitions.seconds(cores, rows)
        assert partitions.seconds(cores, rows - 1) <= partitions.seconds(cores, rows)


def test_few_rows_take_all_cores_in_one_call_and_many_rows_are_divided():
    partitions = Partitions({1: table(4.0, 6.0, 10.0), 2: table(2.0, 3.5, 6.5, 12.0)}, cores=2)
    assert partitions.split(2, 1) == (Part(2, 1),)
    assert partitions.split(2, 8) == (Part(1, 4), Part(1, 4))
    assert partitions.split(1, 8) == (Part(1, 4),)
    assert Partitions({2: table(2.0)}, cores=2).split(1, 1) == ()


def test_calls_share_the_cores_only_where_threads_gain_too_little():
    scales_badly = Partitions({1: table(4.0), 2: table(3.0)}, cores=2)
    assert [scales_badly.share(2, 1, calls) for calls in (1, 1.3, 1.4, 2, 9)] == [2, 2, 1, 1, 1]
    scales_well = Partitions({1: table(4.1), 2: table(2.0)}, cores=2)
    assert {scales_well.share(2, 1, calls) for calls in (1, 2, 9)} == {2}


def test_tables_of_more_threads_than_cores_are_refused():
    for wrong in ({}, {3: table(1.0)}):
        with pytest.raises(ValueError, match="for 2 cores"):
            Partitions(wrong, cores=2)


@pytest.mark.parametrize("cores", [16, 32, 64])
def test_published_times_of_large_batches_get_shorter_by_a_factor_of_1_4(cores):
    partitions = bert_partitions(cores)
    for rows in (32, 64, 128, 256):
        assert alone_s(partitions, rows) >= 1.4 * partitions.seconds(cores, rows)
