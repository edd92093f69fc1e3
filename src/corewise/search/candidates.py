"""Which builds are worth trying, in which order, under which plans. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from corewise.engines import Engine
from corewise.engines.qdq import uses_corewise_quantizer
from corewise.machine.layouts import ThreadLayout, thread_layouts
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Goal
from corewise.records.trial import State, Trial
from corewise.search.plans import START_BATCH

BASELINE = Build(engine="eager", precision="fp32")

PRECISION_ORDER = ("int8", "int8-dynamic", "bf16", "fp32")
"""The fastest first, among builds that take about as long to make."""
OWN_INT8 = 1
"""The effort of int8 by an engine's own quantizer."""


def is_baseline(build: Build) -> bool:
    """Whether it is eager PyTorch in fp32, with whatever batch its program takes."""
    return (build.engine, build.precision) == (BASELINE.engine, BASELINE.precision)


def list_candidates(
    cpu: Cpu,
    operators: dict[str, int],
    engines: Mapping[str, Engine],
    ignored: Sequence[str] = (),
    fixed_batch: int | None = None,
) -> tuple[Build, ...]:
    """The baseline, then each available engine's builds: what is made soonest first, and then the fastest precision.

    If the CPU multiplies int8, the engines' own quantizers come second, after one build that is sure to work: they make
    nearly always the fastest build there. (In three minutes they were not reached on MiniLM and ViT-S, and would have
    run at 1.3 and 1.6 times the speed of the choice; Zen 4.) With ``ignored`` layers, int8 is by corewise's quantizer
    only: the engines' own quantizers do not know these names.
    """
    builds = [
        build
        for name in engines
        for build in engines[name].candidates(cpu, operators)
        # A row's answer must not depend on a stranger's row beside it.
        if not is_baseline(build) and build.precision not in getattr(engines[name], "MIXING", ())
    ]
    if ignored:
        builds = [
            build.with_quantization(replace(build.quantization, ignored_layers=tuple(ignored)))
            if uses_corewise_quantizer(build)
            else build
            for build in builds
            if uses_corewise_quantizer(build) or not build.precision.startswith("int8")
        ]
    builds.sort(
        key=lambda build: (_effort(build), PRECISION_ORDER.index(build.precision), build.engine == "torch-int8")
    )
    if cpu.int8_dot:
        builds[1:] = sorted(builds[1:], key=lambda build: _effort(build) != OWN_INT8)
    builds = [BASELINE, *builds]
    return tuple(builds if fixed_batch is None else (build.with_fixed_batch(fixed_batch) for build in builds))


def following(left: Sequence[Build], trials: Sequence[Trial]) -> Build:
    """The next of the builds that are ``left``: the first one, unless an engine's own int8 was too inaccurate.

    If no int8 has passed the gate yet, corewise's quantizer for such an engine comes next: it keeps more of the
    accuracy. (In three minutes three engines' own int8 of MobileNetV2 were rejected, and corewise's, which won when
    there was time, was not reached; Zen 4.)
    """
    int8 = [trial for trial in trials if trial.build.precision == "int8"]
    if any(trial.state == State.OK or uses_corewise_quantizer(trial.build) for trial in int8):
        return left[0]
    rejected = {trial.build.engine for trial in int8 if trial.inaccurate}
    return next((build for build in left if uses_corewise_quantizer(build) and build.engine in rejected), left[0])


def _effort(build: Build) -> int:
    """How long it takes to make: 0 without calibration, 2 for the slowest (corewise's quantizer, and PyTorch's).

    When the budget ends the trials, the sure and cheap builds were tried. With int8 first, OpenVINO's fp32 came last,
    and in three minutes it was not tried on MiniLM, whose int8 builds lost to it.
    """
    if build.precision != "int8":
        return 0
    return 2 if uses_corewise_quantizer(build) or build.engine == "torch-int8" else OWN_INT8


def first_plan(cpu: Cpu, goal: Goal, fixed_batch: int | None = None) -> Plan:
    """What every build is first measured under: all usable cores for one instance; single items for latency."""
    return Plan(threads_per_instance=cpu.usable_cores, batch=fixed_batch or (1 if goal.single_items else START_BATCH))


def layouts(cpu: Cpu, build: Build) -> tuple[ThreadLayout, ...]:
    """The thread layouts worth trying for a build.

    The baseline is PyTorch as people run it: one instance on all usable cores.
    """
    return (ThreadLayout(cpu.usable_cores, 1),) if is_baseline(build) else thread_layouts(cpu)


def with_reverted_layers(build: Build, count: int) -> Build:
    """The build with ``count`` layers in floating point."""
    return build.with_quantization(replace(build.quantization, reverted_layers=count))
