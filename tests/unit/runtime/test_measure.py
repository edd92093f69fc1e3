"""measure: warming up, timing and batching, on a clock that only the session moves."""

from itertools import chain, repeat
from types import SimpleNamespace

import numpy as np
import pytest

from corewise.batching import LatencyTable
from corewise.records.build import Build, Plan
from corewise.records.jsonable import from_json, to_json
from corewise.records.measurement import Measurement
from corewise.runtime.client import InProcess
from corewise.runtime.measure import (
    KINDS,
    batch_of,
    calls_of,
    measure_instances,
    throughput_per_s,
    time_calls,
    time_in_turns,
    warm_up,
)
from corewise.samples import from_python


class FakeTime:
    """A session whose calls take the given seconds (the last ones for ever), and the clock that shows them."""

    def __init__(self, *seconds):
        self._seconds = chain(seconds, repeat(seconds[-1]))
        self.now = 100.0
        self.calls = []

    def clock(self):
        return self.now

    def run(self, inputs):
        self.calls.append(len(inputs[0]))
        self.now += next(self._seconds)
        return list(inputs)

    def close(self):
        pass


CALLS = ((np.zeros((2, 3), np.float32),),)


def alone(session):
    """One instance at work."""
    return lambda work: [work(session)]


def test_steady_calls_are_warm_after_six():
    time = FakeTime(1.0)
    assert warm_up(time, CALLS, budget_s=100, clock=time.clock) == 6


def test_slow_first_calls_are_warmed_away():
    time = FakeTime(9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    calls = warm_up(time, CALLS, budget_s=1000, clock=time.clock)
    assert time_calls(time, CALLS, budget_s=2.0, clock=time.clock) == [1.0, 1.0, 1.0]
    # Calls 11 to 13 take 1 s, and so does the median of 8 to 10, of which the eighth takes 2 s.
    assert calls == 13


def test_warming_up_ends_with_the_budget_where_calls_never_settle():
    time = FakeTime(*(1.5**i for i in range(40)))
    warm_up(time, CALLS, budget_s=50, clock=time.clock)
    assert 50 <= time.now - 100 < 1.5 * 50 + 50


def test_a_call_longer_than_the_budget_is_made_once():
    time = FakeTime(10.0)
    assert warm_up(time, CALLS, budget_s=1, clock=time.clock) == 1


@pytest.mark.parametrize(("budget_s", "calls"), [(0.0, 3), (3.5, 4), (8.0, 8)])
def test_calls_are_timed_for_the_budget_but_at_least_three(budget_s, calls):
    time = FakeTime(1.0)
    assert time_calls(time, CALLS, budget_s=budget_s, clock=time.clock) == [1.0] * calls


def test_a_measurement_is_of_the_calls_after_the_warm_up():
    time = FakeTime(5.0, 0.125)
    throttled = iter([7, 9])
    plan = Plan(threads_per_instance=1, batch=2)
    found = measure_instances(
        alone(time), CALLS, plan, budget_s=1.0, clock=time.clock, throttled=lambda: next(throttled)
    )
    # The first call spends the warm-up's budget of 0.5 s.
    assert found.latencies_ms == (125.0,) * 8
    assert found.throughput_per_s == 2 / 0.125
    assert found.throttled == 2
    assert found.plan == plan


def test_throughput_is_by_the_median_call_and_the_tail_is_seen():
    time = FakeTime(*[0.125] * 14, 1.0)
    plan = Plan(threads_per_instance=1, batch=2)
    found = measure_instances(alone(time), CALLS, plan, budget_s=2.0, clock=time.clock, throttled=lambda: 0)
    # Six warm-up calls, eight of 0.125 s, and the one that fills the budget.
    assert found.latencies_ms == (*[125.0] * 8, 1000.0)
    assert found.throughput_per_s == 16
    assert found.p50_ms == 125
    assert found.p99_ms > 500
    assert found.spread == 0


def test_a_batch_larger_than_the_samples_repeats_them():
    samples = from_python([np.full(3, i, np.float32) for i in range(3)])
    (batch,) = batch_of(samples, 8)
    assert batch[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_batch_has_one_shape():
    samples = from_python([np.zeros(n, np.float32) for n in (3, 5, 3, 5, 5)])
    assert [batch.shape for batch in batch_of(samples, 2)] == [(2, 3)]
    assert [batch.shape for batch in batch_of(samples, 3)] == [(3, 5)]


def test_calls_stand_for_thirds_of_the_samples_by_size_whatever_the_batch():
    lengths = [9, 1, 1, 4, 2, 1, 4, 9, 9]
    samples = from_python([np.full(length, place, np.float32) for place, length in enumerate(lengths)])
    assert [call.shape for (call,) in calls_of(samples, 2)] == [(2, 1), (2, 4), (2, 9)]
    few, middle, many = calls_of(samples, 5)
    assert [call[0].shape for call in (few, middle, many)] == [(5, 1), (5, 4), (5, 9)]
    assert middle[0][:, 0].tolist() == [3, 6, 3, 6, 3]
    assert len(calls_of(samples.take([1, 2, 5]), 2)) == 1


def test_calls_of_several_kinds_are_timed_in_whole_passes_and_count_alike():
    calls = tuple((np.zeros((2, length), np.float32),) for length in (1, 2, 3))
    time = FakeTime(*[1.0, 2.0, 6.0] * 50)
    plan = Plan(threads_per_instance=1, batch=2)
    found = measure_instances(alone(time), calls, plan, budget_s=40.0, clock=time.clock, throttled=lambda: 0)
    # Three passes of 9 s fill the warm-up's 20 s, and five the 40 s; a pass has six items.
    assert len(time.calls) == 3 * KINDS + 5 * KINDS
    assert found.latencies_ms == (1000.0, 2000.0, 6000.0) * 5
    assert found.throughput_per_s == pytest.approx(6 / 9)
    assert (found.p50_ms, found.spread) == (2000.0, 0)
    assert time_calls(time, calls, budget_s=0.0, min_calls=1, clock=time.clock) == [1.0, 2.0, 6.0]


@pytest.fixture
def watched(tmp_path):
    """A trial of samples of three lengths, which echo, its samples, and the shapes of its calls."""
    samples, shapes = tmp_path / "holdout.safetensors", []
    lengths = [*[3] * 9, *[5] * 9, *[8] * 9]
    from_python([np.full(length, 1 + place, np.float32) for place, length in enumerate(lengths)]).save(samples)

    class Watching:
        def open(self, folder, build, plan):
            return SimpleNamespace(run=self.run, close=int)

        def run(self, inputs):
            shapes.append(inputs[0].shape)
            return list(inputs)

    with InProcess(Watching()) as client:
        client.open(tmp_path, Build(engine="watching", precision="fp32"), Plan(threads_per_instance=1, batch=2))
        yield client, samples, shapes


def test_a_trial_measures_and_races_samples_of_several_lengths_on_calls_of_three(watched):
    client, samples, shapes = watched
    found = client.measure(samples, Plan(threads_per_instance=1, batch=2), 0.01)
    assert set(shapes) == {(2, 3), (2, 5), (2, 8)}
    assert len(found.latencies_ms) >= KINDS
    client.warm_up(samples, 4, 0.01)
    shapes.clear()
    assert client.run_round(0.0).per_s > 0
    assert shapes == [(4, 3), (4, 3), (4, 5), (4, 8)]


def test_load_has_requests_of_three_lengths_which_share_calls_with_their_like(watched):
    client, samples, shapes = watched
    table = LatencyTable(points=((1, 1.0), (2, 1.0)))
    found = client.load(samples, Plan(threads_per_instance=1, batch=2), table, duration_s=0.05, clients=6)
    assert (found.failed, found.refused) == (0, 0)
    assert found.answered >= 6
    assert {length for _, length in shapes} == {3, 5, 8}
    assert {rows for rows, _ in shapes} == {1, 2}


@pytest.mark.parametrize(
    ("budget_s", "seconds"),
    [(30.0, [[1.0] * 4, [2.0] * 4, [3.0] * 4]), (4.0, [[1.0], [2.0]]), (0.0, [[1.0]])],
)
def test_calls_that_take_turns_are_timed_after_one_of_each(budget_s, seconds):
    calls = [(np.zeros((1, length)),) for length in (1, 2, 3)]
    time = FakeTime(1.0)
    time.run = lambda inputs: setattr(time, "now", time.now + inputs[0].shape[1])
    # A pass takes 6 s. Within 2 s only two calls are begun, and within none the first alone.
    assert time_in_turns(time, calls, budget_s=budget_s, clock=time.clock) == seconds


def test_several_instances_are_measured_together():
    fast, slow = FakeTime(0.125), FakeTime(0.5)
    now = lambda: fast.now + slow.now  # noqa: E731 - one after the other: the clock of either is that of both
    each = lambda work: [work(fast), work(slow)]  # noqa: E731
    plan = Plan(threads_per_instance=1, instances=2, batch=2)
    found = measure_instances(
        each, CALLS, plan, budget_s=2.0, clock=now, throttled=lambda: 0, memory_per_instance_bytes=5
    )
    assert found.latencies_ms == (*[125.0] * 16, *[500.0] * 4)
    assert found.throughput_per_s == 2 / 0.125 + 2 / 0.5
    assert found.p50_ms == 125
    assert found.p99_ms == 500
    assert found.memory_per_instance_bytes == 5
    assert from_json(Measurement, to_json(found)) == found


def test_the_throughput_of_several_instances_is_over_all_their_calls():
    assert throughput_per_s(3, [[1.0, 1.0, 4.0], [2.0]]) == 3 * 3 / 6 + 3 * 1 / 2


def test_measurements_from_before_there_were_instances_still_load():
    time = FakeTime(1.0)
    found = measure_instances(alone(time), CALLS, Plan(threads_per_instance=1, batch=2), budget_s=1.0, clock=time.clock)
    old = to_json(found)
    del old["memory_per_instance_bytes"]
    assert from_json(Measurement, old) == found
