"""retune: where the search begins, where it goes on, and what it takes; on machines of any size, simulated."""

from dataclasses import replace
from itertools import count

import pytest
from builders import measured, requirements
from hypothesis import given
from hypothesis import strategies as st
from machines import machine, machines

from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import most_threads, thread_layouts
from corewise.records.build import Plan
from corewise.runtime.race import ROUND_S, ROUNDS
from corewise.search.plans import BATCHES, SLOW_CALL_MS
from corewise.search.retuning import affordable, best_measurement, guesses, next_plan

THROUGHPUT, LATENCY = requirements(), requirements("latency")


def call_ms(plan, cores):
    """A machine: a fixed part of a call, items that take longer beyond a cache, Amdahl's law, and shared cores."""
    work = 2.0 + plan.batch * (4.0 if plan.batch <= 4 * plan.threads_per_instance else 6.0)
    serial = 0.1
    share = max(1.0, plan.threads_per_instance * plan.instances / cores)
    return work * (serial + (1 - serial) / plan.threads_per_instance) * share


def simulated(plan, cores):
    return measured(plan, call_ms(plan, cores))


def table(cpu):
    """What an exhaustive sweep finds."""
    return [
        simulated(Plan(threads_per_instance=threads, instances=instances, batch=batch), cpu.usable_cores)
        for threads, instances in thread_layouts(cpu)
        for batch in BATCHES
    ]


def search(cpu, objective, stored, most=200):
    """All that would be measured here, in order."""
    first = guesses(cpu, objective, stored)
    found = []
    for _ in range(most):
        plan = next_plan(first, found, [], objective)
        if plan is None:
            return found
        assert plan not in [one.plan for one in found]
        found.append(simulated(plan, cpu.usable_cores))
    raise AssertionError("it does not end")


@pytest.mark.parametrize("there", [1, 2, 8, 64])
@pytest.mark.parametrize("here", [1, 2, 4, 12, 64])
def test_what_it_finds_is_the_best_of_an_exhaustive_sweep(there, here):
    cpu = machine(cores=here)
    everything = table(cpu)
    found = search(cpu, THROUGHPUT, table(machine(cores=there)))
    top = max(one.throughput_per_s for one in everything)
    assert best_measurement(found, THROUGHPUT).throughput_per_s >= 0.97 * top
    assert len(found) <= len(thread_layouts(cpu)) + len(BATCHES) + 2


@given(machines())
def test_every_plan_stays_within_what_the_process_may_use(cpu):
    for objective in (THROUGHPUT, LATENCY):
        for one in search(cpu, objective, table(machine(cores=8))):
            assert one.plan.threads_per_instance * one.plan.instances <= most_threads(cpu)


def test_the_shape_that_was_best_there_comes_first():
    small = Plan(threads_per_instance=1, instances=8, batch=4)
    large = Plan(threads_per_instance=8, instances=1, batch=32)
    slow_team = [measured(small, 4.0), measured(large, 40.0)]
    first = guesses(machine(cores=4), THROUGHPUT, slow_team)
    assert first[0] == Plan(threads_per_instance=1, instances=4, batch=4)
    fast_team = [measured(small, 40.0), measured(large, 4.0)]
    assert guesses(machine(cores=8), THROUGHPUT, fast_team)[0] == large


def test_the_batch_is_scaled_so_that_a_thread_has_as_much_to_do():
    stored = [measured(Plan(threads_per_instance=8, batch=32))]
    found = {one.threads_per_instance: one.batch for one in guesses(machine(cores=16), THROUGHPUT, stored)}
    assert found == {1: 4, 2: 8, 4: 16, 8: 32, 16: 64}


def test_without_a_table_it_begins_anyway():
    assert {(one.threads_per_instance, one.instances) for one in guesses(machine(), THROUGHPUT, [])} == {
        (4, 1),
        (2, 2),
        (1, 4),
        (2, 1),
        (1, 1),
    }


def test_latency_is_single_items_on_one_instance_with_all_numbers_of_threads():
    cpu = machine(cores=4, threads=2)
    found = search(cpu, LATENCY, table(machine(cores=2)))
    assert [one.plan for one in found] == [Plan(threads_per_instance=n) for n in (4, 8, 2, 1)]
    assert best_measurement(found, LATENCY).plan.threads_per_instance == 4


def test_the_latency_table_is_filled_below_the_best_batch():
    cpu = machine(cores=2)
    found = search(cpu, THROUGHPUT, [measured(Plan(threads_per_instance=2, batch=16))])
    top = best_measurement(found, THROUGHPUT).plan
    assert {one.plan.batch for one in found if replace(one.plan, batch=top.batch) == top} >= {
        size for size in BATCHES if size <= top.batch
    }


def test_a_plan_that_fails_is_not_asked_for_again_and_larger_batches_of_slow_calls_are_not():
    first = (Plan(threads_per_instance=1, batch=4), Plan(threads_per_instance=1, instances=2, batch=4))
    slow = measured(first[0], SLOW_CALL_MS + 1)
    seen = []
    for _ in count():
        plan = next_plan(first, [slow], [first[1], *seen], THROUGHPUT)
        if plan is None:
            break
        seen.append(plan)
    assert [one.batch for one in seen] == [2, 1]


def test_an_slo_takes_the_fastest_whose_calls_leave_room_to_wait_for_another():
    slo = requirements("slo", slo_ms=100)
    one, eight, sixteen = (
        measured(Plan(threads_per_instance=1, batch=b), ms) for b, ms in ((1, 10), (8, 50), (16, 80))
    )
    assert best_measurement([one, eight, sixteen], slo) == eight
    assert best_measurement([one, eight, sixteen], requirements("slo", slo_ms=5)) == one


def test_plans_beyond_the_memory_limit_are_no_choice():
    limit = requirements(memory_limit_bytes=1000)
    small, large = (replace(measured(Plan(threads_per_instance=1, batch=b)), memory_bytes=100 * b) for b in (8, 16))
    assert best_measurement([small, large], limit) == small
    assert best_measurement([large], limit) is None


@given(st.floats(-100, 1000), st.floats(0.001, 100))
def test_a_race_keeps_to_the_time_that_is_left_and_has_three_rounds_at_least(left_s, calls_s):
    rounds, round_s = affordable(left_s, calls_s)
    assert 3 <= rounds <= ROUNDS
    assert 0.05 <= round_s <= ROUND_S
    if rounds > 3:
        assert rounds * (2 * calls_s + 2 * round_s) <= left_s + 1e-6


def test_a_container_of_one_core_of_many_gets_one_thread(tmp_path):
    """A fake cgroup tree: 64 cores, and cpu.max of one."""
    system = tmp_path / "sys/devices/system"
    for path, text in {
        tmp_path / "proc/self/cgroup": "0::/pod/app",
        tmp_path / "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup rw",
        tmp_path / "proc/self/status": "Cpus_allowed_list:\t0-63",
        tmp_path / "sys/fs/cgroup/pod/cpu.max": "100000 100000",
        tmp_path / "sys/fs/cgroup/pod/app/cpu.max": "max 100000",
        system / "cpu/online": "0-63",
        **{system / f"cpu/cpu{k}/topology/thread_siblings_list": str(k) for k in range(64)},
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    cpu = inspect_cpu(tmp_path)
    assert len(cpu.affinity) == 64
    assert thread_layouts(cpu) == ((1, 1),)
    for objective in (THROUGHPUT, LATENCY):
        plans = [one.plan for one in search(cpu, objective, table(machine(cores=64)))]
        assert plans
        assert {(plan.threads_per_instance, plan.instances) for plan in plans} == {(1, 1)}
