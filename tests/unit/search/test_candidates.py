"""candidates: the baseline first, the fastest precision next, each build once."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import requirements, trial

from corewise.engines import engine
from corewise.engines.qdq import first_rung
from corewise.machine.layouts import thread_layouts
from corewise.records.build import Build, Plan, QuantizationOptions
from corewise.records.cpu import Cpu, LogicalCpu
from corewise.records.fidelity import Fidelity, GroupFidelity
from corewise.records.goal import Latency, Slo, Throughput
from corewise.records.measurement import Measurement
from corewise.search.candidates import (
    BASELINE,
    PRECISION_ORDER,
    at_learned_rung,
    first_plan,
    highest_rungs,
    layouts,
    list_candidates,
    with_reverted_layers,
    worth_climbing,
)
from corewise.search.trial import VERIFY_BATCH, _observe_int8

CPU = Cpu(
    architecture="x86_64",
    vendor="V",
    model="M",
    isa=("avx2", "avx512_vnni", "avx512_bf16"),
    cpus=tuple(LogicalCpu(cpu=i, core=i // 2, socket=0, node=0) for i in range(8)),
    caches=(),
    affinity=tuple(range(8)),
    quota_cores=None,
    memory_bytes=2**33,
    memory_limit_bytes=None,
)


class Offering:
    """An engine that offers builds of these precisions; of what an engine has, list_candidates() sees no more."""

    def __init__(self, name, *precisions):
        self._builds = tuple(Build(engine=name, precision=precision) for precision in precisions)

    def candidates(self, cpu, operators):
        return self._builds


def test_the_baseline_is_first_though_no_engine_offers_it():
    assert list_candidates(CPU, {}, {}) == (BASELINE,)


def test_what_needs_no_calibration_is_first_then_the_fastest_precision_and_engines_keep_their_order():
    offered = {"b": Offering("b", "fp32", "bf16", "int8"), "a": Offering("a", "int8-dynamic", "int8")}
    found = list_candidates(replace(CPU, isa=("avx2",)), {}, offered)
    labels = [build.label for build in found]
    assert labels == ["eager/fp32", "a/int8-dynamic", "b/bf16", "b/fp32", "b/int8", "a/int8"]


def test_where_the_cpu_multiplies_int8_that_comes_after_one_build_that_is_sure():
    offered = {"b": Offering("b", "fp32", "bf16", "int8"), "a": Offering("a", "int8-dynamic", "int8")}
    found = list_candidates(CPU, {}, offered)
    labels = [build.label for build in found]
    assert labels == ["eager/fp32", "a/int8-dynamic", "b/int8", "a/int8", "b/bf16", "b/fp32"]


def test_what_takes_long_to_build_comes_late():
    ours = Build(engine="b", precision="int8", options=(("quantizer", "corewise"),))
    slow, fast = Offering("torch-int8", "int8", "int8-dynamic"), Offering("b", "int8")
    fast._builds += (ours,)
    found = list_candidates(CPU, {}, {"torch-int8": slow, "b": fast})
    assert found[1:] == (slow._builds[1], fast._builds[0], first_rung(ours), slow._builds[0])


def test_the_baseline_is_there_once_though_eager_offers_it():
    found = list_candidates(CPU, {}, {"eager": engine("eager")})
    assert found == (BASELINE, Build(engine="eager", precision="bf16"))


def test_every_precision_of_a_build_has_a_place():
    assert set(PRECISION_ORDER) == {"int8", "int8-dynamic", "bf16", "fp32"}


@pytest.mark.parametrize(
    ("cpu", "threads"), [(CPU, 4), (replace(CPU, quota_cores=2.5), 2), (replace(CPU, affinity=(6,)), 1)]
)
def test_the_first_plan_uses_the_usable_cores(cpu, threads):
    assert first_plan(cpu, Latency()) == Plan(threads_per_instance=threads, batch=1)
    assert (
        first_plan(cpu, Throughput())
        == first_plan(cpu, Slo(p99_ms=9.0))
        == Plan(threads_per_instance=threads, batch=16)
    )


def test_the_baseline_is_pytorch_as_people_run_it():
    assert layouts(CPU, BASELINE) == ((4, 1),)
    assert layouts(CPU, Build(engine="openvino", precision="int8")) == thread_layouts(CPU)


def test_ignored_layers_are_known_to_our_quantizer_only():
    found = list_candidates(
        CPU, {"aten.linear.default": 3}, {"onnxruntime": engine("onnxruntime")}, ("head", "layer.*")
    )
    assert [build.label for build in found] == [
        "eager/fp32",
        "onnxruntime/fp32",
        "onnxruntime/int8/ignored=head layer.*/quantizer=corewise/rung=0",
    ]


# --- rungs --------------------------------------------------------------------------------------------------------


def ours_at(rung, engine="a", **options):
    build = Build(engine=engine, precision="int8")
    return build.with_quantization(QuantizationOptions(quantizer="corewise", rung=rung, **options))


def judged(build, *, state="ok", per_s=100.0, drop_high=0.005, floor_db=10.0):
    """A trial that reached the gate; its drop is 0 and its only group of channels has 20 dB."""
    fidelity = Fidelity(
        metric="top1",
        samples=100,
        baseline_value=0.9,
        value=0.9,
        drop=0.0,
        drop_low=-0.005,
        drop_high=drop_high,
        sqnr_db=20.0,
        cosine=1.0,
        agreement=1.0,
        groups=(GroupFidelity(name="output_0", sqnr_db=20.0, floor_db=floor_db),),
    )
    measured = Measurement(
        plan=Plan(threads_per_instance=2, batch=16),
        latencies_ms=(1.0,),
        throughput_per_s=per_s,
        p50_ms=1e3 / per_s,
        p99_ms=1e3 / per_s,
        spread=0.0,
    )
    return trial(build, state=state, fidelity=fidelity, measurements=(measured,) if state == "ok" else ())


def test_a_rung_that_was_rejected_is_not_tried_with_another_engine():
    assert at_learned_rung(ours_at(0, "b"), []) == ours_at(0, "b")
    climbing = [judged(ours_at(rung), state="rejected") for rung in (0, 2)]
    assert at_learned_rung(ours_at(0, "b", placement="everywhere"), climbing) == ours_at(2, "b", placement="everywhere")
    assert at_learned_rung(ours_at(3, "b"), climbing) == ours_at(3, "b")
    assert at_learned_rung(ours_at(0, "b"), [*climbing, judged(ours_at(None))]) == ours_at(None, "b")
    assert at_learned_rung(ours_at(0, "b"), [trial(ours_at(4), state="failed")]) == ours_at(0, "b")
    own = Build(engine="b", precision="int8")
    assert at_learned_rung(own, climbing) == own


def test_of_each_family_the_highest_rung_counts():
    low, high, other = (judged(build) for build in (ours_at(1), ours_at(None), ours_at(3, "b")))
    reverted = judged(with_reverted_layers(ours_at(0), 4))
    assert highest_rungs([low, high, other, reverted]) == (high, other)


def test_a_build_that_passed_is_corrected_further_only_close_to_a_limit():
    limits = requirements(max_drop=0.01)
    sure, unsure = judged(ours_at(0)), judged(ours_at(0), drop_high=0.02)
    assert worth_climbing([], limits) is None
    assert worth_climbing([sure], limits) is None
    assert worth_climbing([unsure], limits) == unsure
    near_floor = judged(ours_at(0), floor_db=18.0)
    assert worth_climbing([near_floor], limits) == near_floor
    fastest = judged(Build(engine="a", precision="int8"), per_s=200.0)
    assert worth_climbing([unsure, fastest], limits) is None
    assert worth_climbing([replace(unsure, state="rejected", measurements=())], limits) is None


def test_what_runs_in_int8_is_observed_in_calls_that_the_program_takes():
    plans = []
    client = SimpleNamespace(observe_int8=lambda payload, build, plan, samples: plans.append(plan))
    context = SimpleNamespace(cpu=CPU, workspace=SimpleNamespace(holdout=Path("holdout")))
    int8 = Build(engine="openvino", precision="int8")
    for build in (int8, int8.with_fixed_batch(2)):
        _observe_int8(build, context, client, Path("payload"))
    assert [plan.batch for plan in plans] == [VERIFY_BATCH, 2]
