"""Which builds are worth trying, in which order, under which plans. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from corewise.engines import Engine
from corewise.engines.qdq import uses_corewise_quantizer
from corewise.machine.layouts import thread_plans
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Goal
from corewise.records.trial import Trial
from corewise.search.plans import START_BATCH

BASELINE = Build(engine="eager", precision="fp32")
PRECISION_ORDER = ("int8", "int8-dynamic", "bf16", "fp32")
"""The fastest first, among builds that take about as long to make."""
OWN_INT8 = 1
"""The effort of int8 by an engine's own quantizer."""


def candidates(
    cpu: Cpu, operators: dict[str, int], engines: Mapping[str, Engine], ignored: Sequence[str] = ()
) -> tuple[Build, ...]:
    """The baseline, then each available engine's builds: what is made soonest first, and then the fastest precision.

    Where the CPU multiplies int8, what the engines' own quantizers make comes second, after one build that is sure: it
    is nearly always the fastest there. (In three minutes it was not tried on MiniLM and ViT-S, and would have run at
    1.3 and 1.6 times the speed of the choice; Zen 4.) Where layers are ``ignored``, int8 is by our quantizer only: the
    engines' own do not know these names.
    """
    builds = [build for name in engines for build in engines[name].candidates(cpu, operators) if build != BASELINE]
    if ignored:
        builds = [
            build.with_quantization(replace(build.quantization, ignored_layers=tuple(ignored)))
            if uses_corewise_quantizer(build)
            else build
            for build in builds
            if uses_corewise_quantizer(build) or not build.precision.startswith("int8")
        ]
    builds.sort(key=lambda one: (_effort(one), PRECISION_ORDER.index(one.precision), one.engine == "torch-int8"))
    if cpu.int8_dot:
        builds[1:] = sorted(builds[1:], key=lambda one: _effort(one) != OWN_INT8)
    return (BASELINE, *builds)


def following(left: Sequence[Build], trials: Sequence[Trial]) -> Build:
    """The next of the builds that are ``left``: the first one, unless an engine's own int8 was too inaccurate.

    Where no int8 has passed the gate yet, our own for such an engine comes next: it keeps more of the accuracy. (In
    three minutes three engines' own int8 of MobileNetV2 were rejected, and ours, which won when there was time, was
    not reached; Zen 4.)
    """
    int8 = [trial for trial in trials if trial.build.precision == "int8"]
    if any(trial.state == "ok" or uses_corewise_quantizer(trial.build) for trial in int8):
        return left[0]
    rejected = {trial.build.engine for trial in int8 if trial.inaccurate}
    return next((build for build in left if uses_corewise_quantizer(build) and build.engine in rejected), left[0])


def _effort(build: Build) -> int:
    """How long it takes to make: 0 for what needs no calibration, 2 for what takes longest (ours, and PyTorch's).

    Where the budget ends the trials, what is sure and cheap was tried. With int8 first, OpenVINO's fp32 came last, and
    in three minutes it was not tried on MiniLM, whose int8 builds lost to it.
    """
    if build.precision != "int8":
        return 0
    return 2 if uses_corewise_quantizer(build) or build.engine == "torch-int8" else OWN_INT8


def first_plan(cpu: Cpu, goal: Goal) -> Plan:
    """What every build is first measured under: all usable cores for one instance; single items for latency."""
    return Plan(threads_per_instance=cpu.usable_cores, batch=1 if goal == "latency" else START_BATCH)


def shapes(cpu: Cpu, build: Build) -> tuple[tuple[int, int], ...]:
    """(threads per instance, instances) worth trying for a build.

    The baseline is PyTorch as people run it: one instance on all usable cores.
    """
    return ((cpu.usable_cores, 1),) if build == BASELINE else thread_plans(cpu)


def returning(build: Build, count: int) -> Build:
    """The build with ``count`` layers in floating point."""
    return build.with_quantization(replace(build.quantization, reverted_layers=count))
