"""Records for tests, with what a test does not care about filled in."""

from corewise.records.goal import Requirements, parse_goal
from corewise.records.measurement import Measurement
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
