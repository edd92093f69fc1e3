"""Records for tests, with what a test does not care about filled in."""

from corewise.records.goal import Requirements, parse_goal
from corewise.records.measurement import LoadRun, Measurement
from corewise.records.reason import Reason
from corewise.records.trial import Trial
from corewise.report.reasons import sentence


def requirements(goal="throughput", *, slo_ms=None, **limits):
    """What the user asks for, by the names that ``optimize`` takes."""
    return Requirements(goal=parse_goal(goal, slo_ms=slo_ms), **limits)


def said(reason):
    """The sentence of a reason, "" for none."""
    return "" if reason is None else sentence(reason)


def text(words=""):
    """A reason in words."""
    return Reason.text(words)


def trial(build, state="ok", reason="", **fields):
    """A trial whose reason is in words."""
    return Trial(build=build, state=state, reason=text(reason), **fields)


def measured(plan, p50_ms=1.0):
    """The measurement of a plan whose calls all take that long."""
    return Measurement(
        plan=plan,
        latencies_ms=(p50_ms,) * 3,
        throughput_per_s=1e3 * plan.batch * plan.instances / p50_ms,
        p50_ms=p50_ms,
        p99_ms=p50_ms,
        spread=0.0,
    )


def load_run(plan, rate_per_s, duration_s, in_time, **fields):
    """A load at a rate of which all requests were answered and so many in time."""
    offered = int(rate_per_s * duration_s)
    return LoadRun(
        plan=plan,
        rate_per_s=rate_per_s,
        clients=None,
        duration_s=duration_s,
        offered=offered,
        answered=offered,
        refused=0,
        failed=0,
        in_time=in_time,
        p50_ms=2.0,
        refusal_p99_ms=0.0,
        **fields,
    )


def build_inputs(model, samples, folder):
    """What builds of a module are made from; its program is in ``folder``."""
    from corewise.engines import BuildInputs
    from corewise.machine.inspect import inspect_cpu
    from corewise.source import export, operators, save_program

    exported = export(model, samples)
    assert exported.program is not None, exported.why_not
    save_program(exported.program, folder / "program.pt2")
    return BuildInputs(
        program=folder / "program.pt2",
        inputs=exported.inputs,
        outputs=exported.outputs,
        operators=operators(exported.program),
        calibration=samples,
        cpu=inspect_cpu(),
        cache=folder,
    )
