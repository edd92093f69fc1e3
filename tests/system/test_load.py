"""Loads on real children: the fake engine, engines that misbehave under load, and the command line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from command_line import several
from places import GOLDEN
from trial_folder import fill

from corewise.artifact import tuned
from corewise.artifact.tuned import Machine, Tuned
from corewise.batching import LatencyTable
from corewise.common.errors import CorewiseError
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import most_threads
from corewise.records.build import Build, Plan
from corewise.records.jsonable import from_json
from corewise.records.measurement import LoadRun, Measurement
from corewise.runtime.client import Worker
from corewise.samples import from_python

ARTIFACT = GOLDEN / "schema-1"
CPU = inspect_cpu()
SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)))
PLAN = Plan(threads_per_instance=1, instances=2, batch=4)
TABLE = LatencyTable(points=((1, 6.0), (4, 12.0)))

ENGINES = '''
import numpy as np
from corewise.engines.fake import Fake

class Mixing:
    """Calls of several rows give each row the answer of the next one."""
    def __init__(self, session):
        self.session = session

    def run(self, inputs):
        return [np.roll(output, 1, axis=0) for output in self.session.run(inputs)]

    def close(self):
        pass

class MixesUp(Fake):
    def open(self, folder, build, plan):
        return Mixing(super().open(folder, build, plan))

class Failing(Mixing):
    """Calls of several rows fail, but the first ones, which are no load yet."""
    calls = 0
    def run(self, inputs):
        self.calls += len(inputs[0]) > 1
        if len(inputs[0]) > 1 and self.calls > 2:
            raise RuntimeError("no memory for so many")
        return self.session.run(inputs)

class FailsUnderLoad(Fake):
    def open(self, folder, build, plan):
        return Failing(super().open(folder, build, plan))
'''


@pytest.fixture
def child(tmp_path):
    """Opens the engine in a child, and asks that for loads."""
    workspace = fill(tmp_path / "work", SAMPLES)
    with Worker(cpu=CPU, log=tmp_path / "log", timeout_s=120) as worker:

        def load(engine="fake", call_ms=2.0, table=TABLE, plan=PLAN, **options):
            build = Build(engine=engine, precision="fp32", options=(("seconds_per_call", call_ms / 1e3),))
            payload = workspace.empty_payload(build)
            worker.build(workspace, build, payload)
            worker.open(payload, build, plan)
            return worker.load(workspace.holdout, plan, table, **{"duration_s": 1.0, **options})

        yield load


def counted(run):
    assert run.offered == run.answered + run.refused + run.failed
    return run


def test_an_open_loop_is_answered(child):
    run = counted(child(rate_per_s=100.0))
    assert (run.plan, run.rate_per_s, run.clients, run.slo_ms) == (PLAN, 100.0, None, None)
    assert 60 < run.offered < 140
    assert (run.refused, run.failed) == (0, 0)
    assert run.met
    assert 2.0 <= run.p50_ms <= run.p99_ms


def test_a_closed_loop_keeps_its_clients_busy(child):
    run = counted(child(clients=8))
    assert (run.rate_per_s, run.clients) == (None, 8)
    assert run.answered == run.offered > 8
    one = counted(child(clients=1, call_ms=20.0))
    assert 2 <= one.offered <= 50


def test_more_than_it_can_do_is_refused_at_once_and_the_rest_is_answered(child):
    run = counted(
        child(rate_per_s=3000.0, call_ms=20.0, table=LatencyTable(points=((1, 25.0), (4, 25.0))), slo_ms=200.0)
    )
    assert run.refused > run.offered / 3
    assert run.answered > 0
    assert run.failed == 0
    assert not run.met
    assert run.refusal_p99_ms > 0


def test_an_slo_shorter_than_a_call_is_too_urgent_for_all(child):
    run = counted(child(rate_per_s=100.0, slo_ms=5.0))
    assert run.refused == run.offered > 0
    assert (run.answered, run.p99_ms) == (0, 0.0)


@pytest.fixture
def user_engines(tmp_path, monkeypatch):
    (tmp_path / "loaded_engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)


def test_answers_that_belong_to_others_have_failed(user_engines, child):
    run = counted(child("loaded_engines:MixesUp", clients=16, call_ms=5.0))
    assert run.failed > 0
    assert not run.met


def test_calls_that_fail_are_counted(user_engines, child):
    plan = Plan(threads_per_instance=1, instances=1, batch=4)
    run = counted(child("loaded_engines:FailsUnderLoad", clients=16, call_ms=5.0, plan=plan))
    assert run.failed > 0


def test_what_is_no_load_is_said_by_the_child(child):
    with pytest.raises(CorewiseError, match="under load: a load needs either a rate or clients"):
        child(rate_per_s=1.0, clients=1)


# --- the command line ---------------------------------------------------------------------------------------------


x86 = pytest.mark.skipif(CPU.architecture != "x86_64", reason="the golden artifacts are for x86-64")
MOST = most_threads(CPU)


def tuned_here(folder, calls_ms=()):
    """A copy of the golden artifact, tuned on this machine with calls that take so long: batch to milliseconds."""
    plan = Plan(threads_per_instance=1, batch=16)
    measured = tuple(
        Measurement(
            plan=replace(plan, batch=batch),
            latencies_ms=(ms,),
            throughput_per_s=1e3 * batch / ms,
            p50_ms=ms,
            p99_ms=ms,
            spread=0.0,
        )
        for batch, ms in calls_ms
    )
    shutil.copytree(ARTIFACT, folder)
    made = Tuned(machine=Machine.of(CPU), created="2026-01-01", goal="slo", plan=plan, measurements=measured)
    tuned.write(folder, made)
    return str(folder)


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """What each command prints, all of them in one process: (exit code, output, errors)."""
    folder = tmp_path_factory.mktemp("loads")
    here, bare = tuned_here(folder / "golden.cw", ((1, 2.0), (16, 4.0))), tuned_here(folder / "bare.cw")
    commands = {
        "met": ("loadtest", here, "--rate", "50", "--duration", "1", "--slo-ms", "5000"),
        "old": ("load", here, "--rate", "50", "--duration-s", "1"),
        "json": ("loadtest", here, "--clients", "3", "--duration", "1", "--json"),
        "too urgent": ("loadtest", here, "--rate", "50", "--duration", "1", "--slo-ms", "1"),
        "bare": ("loadtest", bare, "--rate", "5", "--duration", "1"),
        "threads": ("loadtest", here, "--clients", "2", "--duration", "1", "--threads", 2 * MOST, "--batch", "4"),
    }
    return {"folder": bare, **dict(zip(commands, several(commands.values()), strict=True))}


@x86
def test_load_tells_what_became_of_the_requests(loads):
    code, output, errors = loads["met"]
    assert (code, errors) == (0, "")
    assert "50 requests/s, arriving at random" in output
    assert "0 refused, 0 failed" in output
    assert "the SLO of 5,000 ms (p99) was met: the p99 was" in output


@x86
def test_the_old_names_work_with_a_warning(loads):
    code, output, errors = loads["old"]
    assert code == 0
    assert "50 requests/s, arriving at random" in output
    assert [line.split(";")[0] for line in errors.splitlines()] == [
        "corewise: warning: the command load will be removed in the next version",
        "corewise: warning: the option --duration-s will be removed in the next version",
    ]


@x86
def test_load_as_json(loads):
    code, output, errors = loads["json"]
    assert (code, errors) == (0, "")
    data = json.loads(output)
    run = from_json(LoadRun, data["run"])
    assert (run.clients, run.plan.batch) == (3, 16)
    assert run.answered == run.offered > 3
    assert data["held"] is True
    assert data["goodput_per_s"] == run.goodput_per_s


@x86
def test_an_slo_that_one_call_misses_is_a_result_in_words(loads):
    code, output, errors = loads["too urgent"]
    assert (code, errors) == (0, "")
    assert "0 answered" in output
    assert "cannot be met: one call alone takes 2.00 ms, so every request was refused" in output


@x86
def test_a_plan_that_was_not_measured_is_loaded_by_estimates(loads):
    code, output, errors = loads["bare"]
    assert (code, errors) == (0, "")
    assert f"note: {loads['folder']} has no measurement with 1 thread x 1, batch 16" in output
    assert "until then latencies are estimated" in output


@x86
def test_a_plan_of_the_users_own_runs_with_a_warning_where_threads_are_too_many(loads):
    code, output, errors = loads["threads"]
    assert (code, errors) == (0, "")
    assert f"on {2 * MOST} threads x 1, batch 4" in output
    assert f"as requested: {2 * MOST} threads take turns because only {MOST} can compute at once" in output
    assert "0 refused, 0 failed" in output


REFUSED = (
    ((), "neither --rate nor --clients is given; give one of them: --rate for random arrivals, or --clients"),
    (("--rate", "5", "--clients", "2"), "--rate and --clients are both given"),
    (("--rate", "0"), "--rate is 0; give a number above 0"),
    (("--rate", "-2"), "--rate is -2"),
    (("--rate", "1e9"), "more than one sender can send"),
    (("--clients", "0"), "--clients is 0; give a whole number, 1 or more"),
    (("--rate", "5", "--slo-ms", "0"), "--slo-ms is 0; give a number above 0"),
    (("--rate", "5", "--duration", "nan"), "--duration is nan; give a time above 0"),
    (("--rate", "5", "--threads", "0"), "--threads is 0; give a whole number, 1 or more"),
    (("--rate", "5", "--threads", "-3"), "--threads is -3"),
    (("--rate", "5", "--instances", "0"), "--instances is 0"),
    (("--rate", "5", "--batch", "0"), "--batch is 0"),
    (("--rate", "5", "--batch", "100000"), "batch 100000 is more than any machine has; stay within 4096 threads"),
)


def test_bad_input_is_one_line():
    found = several([("loadtest", ARTIFACT, *arguments) for arguments, _ in REFUSED])
    for (arguments, told), (code, output, errors) in zip(REFUSED, found, strict=True):
        assert (code, output) == (2, ""), arguments
        assert errors.startswith("corewise: ")
        assert errors.count("\n") == 1
        assert told in errors
