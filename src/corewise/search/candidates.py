"""Which builds are worth trying, in which order, under which plans. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from corewise.accuracy.gate import judge
from corewise.engines import Engine
from corewise.engines.qdq import first_rung, uses_corewise_quantizer
from corewise.machine.layouts import ThreadLayout, thread_layouts
from corewise.records.build import Build, Plan
from corewise.records.cpu import Cpu
from corewise.records.goal import Goal, Requirements
from corewise.records.trial import State, Trial
from corewise.search.plans import NEAR, START_BATCH

BASELINE = Build(engine="eager", precision="fp32")

PRECISION_ORDER = ("int8", "int8-dynamic", "bf16", "fp32")
"""The fastest first, among builds that take about as long to make."""
OWN_INT8 = 1
"""The effort of int8 by an engine's own quantizer."""
NEAR_FLOOR_DB = 3.0
"""A group of channels whose error power is within a factor of two of its floor is close to it."""


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
    run at 1.3 and 1.6 times the speed of the choice; Zen 4.) corewise's quantizer starts at its first rung. With
    ``ignored`` layers, int8 is by corewise's quantizer only: the engines' own quantizers do not know these names.
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
    builds = [first_rung(build) if uses_corewise_quantizer(build) else build for build in builds]
    builds.sort(
        key=lambda build: (_effort(build), PRECISION_ORDER.index(build.precision), build.engine == "torch-int8")
    )
    if cpu.int8_dot:
        builds[1:] = sorted(builds[1:], key=lambda build: _effort(build) != OWN_INT8)
    builds = [BASELINE, *builds]
    return tuple(builds if fixed_batch is None else (build.with_fixed_batch(fixed_batch) for build in builds))


def _effort(build: Build) -> int:
    """How long it takes to make: 0 without calibration, 2 for the slowest (corewise's quantizer, and PyTorch's).

    When the budget ends the trials, the sure and cheap builds were tried. With int8 first, OpenVINO's fp32 came last,
    and in three minutes it was not tried on MiniLM, whose int8 builds lost to it.
    """
    if build.precision != "int8":
        return 0
    return 2 if uses_corewise_quantizer(build) or build.engine == "torch-int8" else OWN_INT8


def family(build: Build) -> Build:
    """The build at the top rung with no layer reverted: what all rungs of it have in common."""
    return build.with_quantization(replace(build.quantization, rung=None, reverted_layers=0))


def at_learned_rung(build: Build, trials: Sequence[Trial]) -> Build:
    """A build of corewise's quantizer at the rung that its builds turned out to need so far.

    All engines run the same ranges and weights, so a rung that the gate rejected once is not tried again elsewhere.
    """
    if not uses_corewise_quantizer(build):
        return build
    judged = [trial for trial in trials if uses_corewise_quantizer(trial.build) and trial.fidelity is not None]
    return at_rung_of(max((trial.build for trial in judged), key=rung_height, default=build), build)


def at_rung_of(other: Build, build: Build) -> Build:
    """A build at the rung of another one, if both are of corewise's quantizer and it has fewer corrections."""
    if not uses_corewise_quantizer(build) or rung_height(other) <= rung_height(build):
        return build
    return build.with_quantization(replace(build.quantization, rung=other.quantization.rung))


def rung_height(build: Build) -> float:
    """Orders builds of corewise's quantizer by their corrections."""
    return inf if build.quantization.rung is None else build.quantization.rung


def highest_rungs(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trial with the most corrections of each family of builds."""
    highest: dict[Build, Trial] = {}
    for trial in trials:
        known = highest.get(family(trial.build))
        if known is None or rung_height(trial.build) > rung_height(known.build):
            highest[family(trial.build)] = trial
    return tuple(highest.values())


def worth_climbing(trials: Sequence[Trial], requirements: Requirements) -> Trial | None:
    """The trial whose build deserves a further correction although it passed; ``None`` if none does.

    It is the fastest build of corewise's quantizer, if it is about as fast as the winner so far and close to a limit:
    the interval of its drop holds ``max_drop``, or a group of output channels is less than ``NEAR_FLOOR_DB`` above its
    floor.
    """
    goal = requirements.goal
    able = [trial for trial in trials if trial.state == State.OK and goal.best(trial) is not None]
    ours = [trial for trial in highest_rungs(able) if uses_corewise_quantizer(trial.build)]
    if not ours:
        return None
    fastest, best = (min(group, key=goal.cost) for group in (ours, able))
    if _throughput_per_s(fastest, goal) < NEAR * _throughput_per_s(best, goal) or not _close_to_limit(
        fastest, requirements
    ):
        return None
    return fastest


def _throughput_per_s(trial: Trial, goal: Goal) -> float:
    best = goal.best(trial)
    return best.throughput_per_s if best else 0.0


def _close_to_limit(trial: Trial, requirements: Requirements) -> bool:
    fidelity = trial.fidelity
    if fidelity is None:
        return False
    group = fidelity.worst_group
    near_floor = group is not None and group.sqnr_db < group.floor_db + NEAR_FLOOR_DB
    return near_floor or judge(fidelity, requirements).uncertain is not None


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
