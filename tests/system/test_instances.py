"""instances: real engines run by several pinned instances in one process, in this one and in a trial child."""

import mmap
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import place

from corewise.batching import LatencyTable, Partitions
from corewise.common.errors import CorewiseError, EngineError
from corewise.engines import BuildInputs, engine
from corewise.engines.base import Sharing
from corewise.engines.denormals import flushed
from corewise.engines.inductor import Inductor
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import assign, warning
from corewise.records.build import Build, ElasticPlan, Plan
from corewise.runtime.client import Worker
from corewise.runtime.elastic import open_elastic
from corewise.runtime.instances import Instances, memory_bytes, open_plan
from corewise.samples import from_python
from corewise.source import export, save_program
from corewise.testing.engine_contract import tiny_material

CPU = inspect_cpu()
PLAN = Plan(threads_per_instance=1, instances=2, batch=4)
BUILDS = {
    "eager": Build(engine="eager", precision="fp32"),
    "torch-int8": Build(engine="torch-int8", precision="int8", options=(("reduce_range", True),)),
    "openvino": Build(engine="openvino", precision="fp32"),
    "onnxruntime": Build(engine="onnxruntime", precision="fp32"),
    # As the contract's, whose payload is there if its tests ran before; without options where it has no builds.
    "inductor": next(iter(Inductor().candidates(CPU, {})[-1:]), Build(engine="inductor", precision="fp32")),
}
CALLS = 20

two_cores = pytest.mark.skipif(CPU.usable_cores < 2, reason="needs two cores")


@pytest.fixture(scope="module", params=list(BUILDS))
def payload(request, tmp_path_factory):
    """The build of a small network, its folder, and the network's material."""
    build = BUILDS[request.param]
    made = engine(build.engine)
    if reason := made.unavailable():
        pytest.skip(reason)
    if missing := [name for name in made.needs(build) if name != "int8_dot" and not CPU.has(name)]:
        pytest.skip(f"this CPU lacks {missing}")
    # The network of any shape for inductor: one package instead of two to compile.
    net = "text" if build.engine == "inductor" else "images"
    _, material = tiny_material(net, tmp_path_factory.getbasetemp() / f"contract-{net}")
    folder = tmp_path_factory.mktemp("payload")
    compiled = place(tmp_path_factory, net, build)
    if build.engine == "inductor" and compiled.is_dir():
        shutil.copytree(compiled, folder, dirs_exist_ok=True)
    else:
        made.build(material, build, folder)
    return build, folder, material


def opened(build, folder, plan=PLAN, cpus=None):
    cpus = assign(CPU, plan.threads_per_instance, plan.instances) if cpus is None else cpus
    return Instances(engine(build.engine), folder, build, plan, cpus)


def batch(material, seed, size=4):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 50, (size, *array.shape))
        if array.dtype.kind == "i"
        else rng.standard_normal((size, *array.shape), np.float32)
        for array in material.calibration.rows[0]
    ]


def test_each_instance_gives_its_own_answers_while_the_other_works(payload):
    build, folder, material = payload
    inputs = [[batch(material, (instance, call)) for call in range(CALLS)] for instance in range(2)]
    alone = engine(build.engine).open(folder, build, Plan(threads_per_instance=1, batch=4))
    expected = [[alone.run(one) for one in calls] for calls in inputs]
    alone.close()
    assert not np.allclose(expected[0][0][0], expected[1][0][0], atol=0.01)
    found = [[], []]
    with opened(build, folder) as instances:
        together = threading.Barrier(2)

        def run(instance):
            for one in inputs[instance]:
                together.wait(60)
                found[instance].append(instances.run(instance, one))

        threads = [threading.Thread(target=run, args=(instance,)) for instance in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for calls, wanted in zip(found, expected, strict=True):
        assert len(calls) == CALLS
        for outputs, right in zip(calls, wanted, strict=True):
            assert all(np.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(outputs, right, strict=True))


def test_closing_the_first_instance_leaves_the_others(payload):
    build, folder, material = payload
    with opened(build, folder) as instances:
        inputs = batch(material, 0)
        expected = instances.run(1, inputs)
        instances.each(lambda session: session.close() if session is instances._sessions[0] else None)
        assert all(map(np.array_equal, instances.run(1, inputs), expected))


def masks():
    """Each thread of this process, and the hardware threads it may run on."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:
            continue
        found[int(task.name)] = next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))
    return found


@two_cores
@pytest.mark.parametrize("payload", ["eager", "onnxruntime"], indirect=True)
def test_an_instances_team_runs_where_the_instance_does(payload):
    build, folder, material = payload
    one, other = CPU.usable_cpus[:2]
    before = masks()
    plan = Plan(threads_per_instance=2, instances=2, batch=64)
    with opened(build, folder, plan, ((one,), (other,))) as instances:
        instances.touch(batch(material, 0, 64))
        assert instances.each(lambda session: os.sched_getaffinity(0)) == [{one}, {other}]
        new = [mask for thread, mask in masks().items() if thread not in before]
        # A runtime may start a helper more; all threads of an instance inherit its hardware thread.
        assert set(new) == {str(one), str(other)}
        assert min(new.count(str(one)), new.count(str(other))) >= 2
    # A runtime keeps a helper or two with the mask of whoever was first; teams end with their instances.
    kept = [mask for thread, mask in masks().items() if thread not in before and mask in (str(one), str(other))]
    assert len(kept) < len(new)


@two_cores
@pytest.mark.parametrize("payload", ["openvino"], indirect=True)
def test_openvino_has_a_stream_on_its_own_core_for_each_instance(payload):
    build, folder, material = payload
    inputs = batch(material, 0)
    cores = {str(number) for number in CPU.usable_cpus[:2]}
    with opened(build, folder) as instances:
        asked = lambda session: session._for_batch(4).get_compiled_model().get_property("NUM_STREAMS")  # noqa: E731
        assert instances.each(asked) == [2, 2]
        seen = set()
        stop = threading.Event()

        def work(session):
            while not stop.is_set():
                session.run(inputs)

        before = set(masks())
        callers = instances.each(lambda session: threading.get_native_id())
        working = threading.Thread(target=instances.each, args=(work,))
        working.start()
        for _ in range(2000):
            seen |= {mask for thread, mask in masks().items() if thread in before and thread not in callers}
            if seen >= cores:
                break
        stop.set()
        working.join()
        assert seen >= cores


@pytest.mark.parametrize("payload", ["openvino"], indirect=True)
def test_openvino_says_when_it_has_too_few_streams(payload):
    build, folder, _ = payload
    many = Plan(threads_per_instance=1, instances=4 * len(CPU.cpus))
    with pytest.raises(EngineError, match=r"OpenVINO has \d+ streams here, not one for each of \d+ instances; use at"):
        opened(build, folder, many)


class Scale(torch.nn.Module):
    """One multiplication, of so many numbers that a team shares it."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1e-2]))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_instances_and_their_teams_take_denormals_as_zeros_and_nobody_else_does(tmp_path, name):
    if reason := engine(name).unavailable():
        pytest.skip(reason)
    row = np.full(1 << 18, 1e-38, np.float32)
    samples = from_python([row] * 4)
    exported = export(Scale(), samples)
    material = material_of(exported, samples, tmp_path)
    folder = tmp_path / "payload"
    folder.mkdir()
    engine(name).build(material, BUILDS[name], folder)
    inputs = [np.stack([row] * 4)]
    denormal = lambda outputs: int((outputs[0].view(np.int32) != 0).sum())  # noqa: E731 - what numpy may flush itself
    plan = Plan(threads_per_instance=2, instances=min(2, CPU.usable_cores), batch=4)
    with opened(BUILDS[name], folder, plan) as instances:
        for number in range(len(instances)):
            assert denormal(instances.run(number, inputs)) == 0
        assert all(instances.each(lambda session: flushed()))
    session = engine(name).open(folder, BUILDS[name], Plan(threads_per_instance=1, batch=4))
    assert denormal(session.run(inputs)) == inputs[0].size
    session.close()
    assert not flushed()


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("payload", ["eager"], indirect=True)
def test_what_one_instance_raises_harms_no_other(payload):
    build, folder, material = payload
    done = []

    def work(session):
        if session is instances._sessions[0]:
            raise Broken("the first")
        done.append(session.run(batch(material, 0)))

    with opened(build, folder) as instances:
        with pytest.raises(Broken, match="the first"):
            instances.each(work)
        assert len(done) == 1
        assert instances.run(0, batch(material, 0))


@pytest.mark.parametrize("payload", ["eager"], indirect=True)
def test_hardware_threads_that_are_not_there_are_told(payload):
    build, folder, _ = payload
    before = threading.active_count()
    with pytest.raises(EngineError, match=r"cannot run on the hardware threads 4000: .*; measure again"):
        opened(build, folder, cpus=((CPU.affinity[0],), (4000,)))
    assert threading.active_count() == before


# --- in a trial child ---------------------------------------------------------------------------------------------

WIDE = 2048
ALONE = """
from corewise.engines.eager import Eager

class Selfish(Eager):
    '''Its instances share nothing.'''
    def open(self, folder, build, plan):
        session = super().open(folder, build, plan)
        class Alone:
            run, close = session.run, session.close
        return Alone()
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """BuildInputs of 50 MB of weights and few activations."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDE, WIDE) for _ in range(3)))
    rng = np.random.default_rng(0)
    samples = from_python([rng.standard_normal(WIDE, np.float32) for _ in range(8)])
    samples.save(folder / "samples.safetensors")
    return material_of(export(model, samples), samples, folder)


def material_of(exported, samples, folder):
    save_program(exported.program, folder / "program.pt2")
    return BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators={},
        calibration=samples,
        cpu=CPU,
        cache=folder,
    )


@contextmanager
def child(tmp_path, cpus=CPU.usable_cpus):
    with Worker(cpu=replace(CPU, affinity=tuple(cpus)), log=tmp_path / "log", timeout_s=120) as worker:
        yield worker


def open_in(worker, build, folder, plan):
    return worker.open(folder, build, plan)


def measured(tmp_path, build, folder, samples, plan):
    with child(tmp_path) as worker:
        answer = open_in(worker, build, folder, plan)
        measurement = worker.measure(samples, plan, 0.1)
        worker.warm_up(samples, plan.batch, 0.05)
        per_s = worker.run_round(0.05).per_s
    return answer, measurement, per_s


@two_cores
@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_a_second_instance_shares_the_weights(tmp_path, wide, name):
    build, folder = BUILDS[name], tmp_path / "payload"
    if reason := engine(name).unavailable():
        pytest.skip(reason)
    folder.mkdir()
    engine(name).build(wide, build, folder)
    weights = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert weights > 3 * WIDE * WIDE * 4
    plan = Plan(threads_per_instance=1, instances=2, batch=2)
    samples = str(wide.cache / "samples.safetensors")
    answer, found, per_s = measured(tmp_path, build, folder, samples, plan)
    assert [list(cpus) for cpus in answer.cpus] == [[number] for number in CPU.usable_cpus[:2]]
    assert answer.warning == ""
    assert found.plan == plan
    assert len(found.latencies_ms) >= 6
    assert per_s > 0
    # It may be 0: a second instance can fit into what the first one's opening freed.
    assert found.memory_per_instance_bytes < weights / 4


@two_cores
def test_the_memory_of_instances_that_share_nothing_is_seen(tmp_path, wide, monkeypatch):
    (tmp_path / "selfish_engine.py").write_text(ALONE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "payload"
    folder.mkdir()
    engine("eager").build(wide, BUILDS["eager"], folder)
    build = Build(engine="selfish_engine:Selfish", precision="fp32")
    plan = Plan(threads_per_instance=1, instances=2, batch=2)
    _, found, _ = measured(tmp_path, build, folder, str(wide.cache / "samples.safetensors"), plan)
    assert found.memory_per_instance_bytes > 0.8 * 3 * WIDE * WIDE * 4


def test_one_instance_costs_no_further_memory(tmp_path, wide):
    folder = tmp_path / "payload"
    folder.mkdir()
    engine("eager").build(wide, BUILDS["eager"], folder)
    plan = Plan(threads_per_instance=1, batch=2)
    _, found, _ = measured(tmp_path, BUILDS["eager"], folder, str(wide.cache / "samples.safetensors"), plan)
    assert found.memory_per_instance_bytes == 0


def test_more_threads_than_cores_are_allowed_and_told(tmp_path, wide):
    folder = tmp_path / "payload"
    folder.mkdir()
    engine("eager").build(wide, BUILDS["eager"], folder)
    plan = Plan(threads_per_instance=2, instances=2, batch=1)
    with child(tmp_path, CPU.usable_cpus[:1]) as worker:
        answer = open_in(worker, BUILDS["eager"], folder, plan)
    assert [list(cpus) for cpus in answer.cpus] == [[CPU.usable_cpus[0]]] * 2
    assert answer.warning == "4 threads take turns because only 1 can compute at once"
    assert warning(CPU, 1, 1) == ""


def test_an_instance_that_cannot_open_is_the_trials_reason(tmp_path, wide):
    with child(tmp_path) as worker:
        with pytest.raises(CorewiseError, match=r"opening with .*: .*"):
            open_in(worker, BUILDS["eager"], tmp_path / "nothing", PLAN)
        with pytest.raises(CorewiseError, match="has no open session"):
            worker.run_round(0.1)


# --- the process --------------------------------------------------------------------------------------------------


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_a_process_on_one_core_plans_for_one():
    code = (
        "from corewise.machine.inspect import inspect_cpu\n"
        "from corewise.machine.layouts import assign, most_threads, thread_layouts\n"
        "cpu = inspect_cpu()\n"
        "print(cpu.usable_cores, most_threads(cpu), tuple(map(tuple, thread_layouts(cpu))), assign(cpu, 1, 1))"
    )
    number = CPU.affinity[-1]
    assert output_of("taskset", "-c", str(number), sys.executable, "-c", code) == f"1 1 ((1, 1),) (({number},),)"


FAULTS = """
import resource, sys, threading
import torch
from corewise.engines.torch_tools import keep_freed_memory
from corewise.runtime.instances import one_arena
if sys.argv[1] == "one":
    one_arena()
def work():
    keep_freed_memory()
    torch.set_num_threads(1)
    run()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    run()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
def run():
    for _ in range(20):
        blocks = [torch.ones(3_000_000).add_(1) for _ in range(6)]
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.slow
def test_threads_keep_freed_memory_too():
    # Where a thread of a library has had an arena before, the next one may get that; so the fewest of some tries.
    per_thread, one = (
        min(int(output_of(sys.executable, "-c", FAULTS, mode)) for _ in range(4)) for mode in ("per-thread", "one")
    )
    assert per_thread > 10_000
    assert one < per_thread / 20


def test_memory_that_is_taken_is_seen():
    size = 64_000_000
    before = memory_bytes()
    with mmap.mmap(-1, size) as block:
        block.write(b"1" * size)
        assert memory_bytes() - before > 0.9 * size


def test_all_engines_of_ours_share_weights(payload):
    build, folder, _ = payload
    with opened(build, folder) as instances:
        assert isinstance(instances._sessions[0], Sharing)


@pytest.mark.parametrize("instances", [1, 2])
def test_a_plan_as_one_session_gives_the_answers_of_a_single_call(payload, instances):
    build, folder, material = payload
    if build.engine == "openvino" and instances > CPU.usable_cores:
        pytest.skip("OpenVINO has no more streams than cores")
    plan = replace(PLAN, instances=instances)
    inputs = batch(material, 7, 11)
    alone = engine(build.engine).open(folder, build, Plan(threads_per_instance=1, batch=11))
    expected = alone.run(inputs)
    alone.close()
    session = open_plan(engine(build.engine), folder, build, plan, CPU)
    try:
        found = session.run(inputs)
    finally:
        session.close()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@two_cores
def test_an_elastic_plan_gives_the_answers_of_single_calls(payload):
    build, folder, material = payload
    plan = ElasticPlan(wide=Plan(threads_per_instance=2, batch=4), narrow=PLAN)
    tables = {
        1: LatencyTable(points=((1, 1.0), (4, 3.0))),
        2: LatencyTable(points=((1, 0.7), (4, 2.8))),
    }
    inputs = [batch(material, seed, size) for seed, size in enumerate((1, 1, 11, 1, 4, 2))]
    alone = engine(build.engine).open(folder, build, Plan(threads_per_instance=1, batch=4))
    expected = [alone.run(one) for one in inputs]
    alone.close()
    session = open_elastic(engine(build.engine), folder, build, plan, Partitions(tables, cores=2), CPU)
    try:
        found = [session.run(inputs[0])]  # alone, on both cores
        with ThreadPoolExecutor(4) as threads:
            found += threads.map(session.run, inputs[1:])
    finally:
        session.close()
    for answers, right in zip(found, expected, strict=True):
        for one, other in zip(answers, right, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
