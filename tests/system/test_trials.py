"""trial: real children, and engines that misbehave in them. Each ends as a record, and the next trial runs."""

import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
from builders import said
from trial_folder import fill, make_context

from corewise.common.errors import CorewiseError, OutputError
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build
from corewise.records.events import TrialStep
from corewise.runtime.client import Died, Worker, read_outputs
from corewise.runtime.race import Contender, ContenderFailed, run_race
from corewise.samples import from_python
from corewise.search import trial as module
from corewise.search.budget import Budget
from corewise.search.trial import run_trial

SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)))
FAKE = Build(engine="fake", precision="int8")

ENGINES = '''
import os, subprocess, sys, time
from corewise.engines.fake import Fake

class Parent(Fake):
    """Hangs with a process of its own, as one that runs a compiler."""
    def build(self, material, build, folder):
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        (folder.parent / "helper").write_text(str(helper.pid))
        time.sleep(3600)

class Leaving(Fake):
    """Exits as a script does."""
    def build(self, material, build, folder):
        print("I have had enough")
        os._exit(7)

class Full(Fake):
    """Finds the disk full."""
    def build(self, material, build, folder):
        raise OSError(28, "No space left on device")
'''


def misbehaving(name, **options):
    return Build(engine=f"corewise.testing.engines:{name}", precision="int8", options=tuple(options.items()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "MEASURE_S", 0.05)


@pytest.fixture
def context(tmp_path):
    return make_context(fill(tmp_path, SAMPLES), max_drop=0.2)


def children():
    """The processes that this one started and that still run or were not waited for."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has just ended
            found.update((task / "children").read_text().split())
    return found


@pytest.fixture(autouse=True)
def no_orphans():
    before = children()
    yield
    assert children() <= before


def test_a_sound_build_is_verified_and_measured(context):
    steps = []
    context = make_context(context.workspace, max_drop=0.2, on_event=steps.append)
    found = run_trial(FAKE, context, is_baseline=True)
    assert (found.state, said(found.reason)) == ("ok", "the baseline")
    assert found.fidelity.agreement == 1.0
    assert found.payload_bytes == (context.workspace.payload(FAKE) / "fake.json").stat().st_size
    assert found.measurements[0].plan == context.plan
    assert found.peak_memory_bytes > 10e6
    assert [step.step for step in steps if isinstance(step, TrialStep)] == [
        "building",
        "verifying",
        "measuring",
    ]


def test_outputs_come_in_the_order_of_the_samples(context):
    run_trial(FAKE, context)
    (found,) = read_outputs(context.workspace.outputs(FAKE)).leaves
    weights = np.random.default_rng(0).standard_normal((6, 5)) / np.sqrt(6)
    np.testing.assert_allclose(found, np.stack([row[0] for row in SAMPLES.rows]) @ weights, rtol=1e-4, atol=1e-5)


MISBEHAVING = {
    "Segfault": "crashed with SIGSEGV while building",
    "KilledForMemory": r"killed \(SIGKILL, most likely by the kernel because memory ran out\) while building",
    "RaisesInBuild": "building: RuntimeError: no kernel for aten.frobnicate",
    "CrashesInRun": "crashed with SIGSEGV while verifying",
    "NanOutputs": "NaN or infinity where fp32's has none",
    "Absent": "building: .*engine 'corewise.testing.engines:Absent' cannot be loaded",
}


def test_a_misbehaving_engine_fails_its_own_trial_only(context):
    assert run_trial(FAKE, context, is_baseline=True).state == "ok"
    for name, told in MISBEHAVING.items():
        found = run_trial(misbehaving(name), context)
        assert found.state == "failed", name
        assert re.search(told, said(found.reason))
        assert "\n" not in said(found.reason)
        assert found.measurements == ()
    assert run_trial(FAKE, context).state == "ok"


class Impatient(Worker):
    """Starts in its own time, and then has 3 s for each answer."""

    def __init__(self, **options):
        super().__init__(**options)
        self._timeout_s = 3.0


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "Worker", Impatient)


@pytest.mark.usefixtures("impatient")
def test_a_hanging_engine_is_ended(context):
    found = run_trial(misbehaving("Hang"), context)
    assert found.state == "failed"
    assert said(found.reason) == "hung while building: no answer in 3 s, so it was killed"


@pytest.fixture
def user_engines(tmp_path, monkeypatch):
    (tmp_path / "user_engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: Build(engine=f"user_engines:{name}", precision="int8")
    sys.modules.pop("user_engines", None)


def test_a_trial_is_ended_when_its_share_of_the_budget_is_spent(context, monkeypatch):
    monkeypatch.setattr("corewise.runtime.client.LEAST_S", 0.2)
    budget = Budget(total_s=20.0)
    found = run_trial(misbehaving("Hang"), make_context(context.workspace, max_drop=0.2, budget=budget), share=0.15)
    assert found.state == "pruned"
    assert re.match(r"ended while it was tried: \d+ s of the budget of 20 s were spent", said(found.reason))
    assert budget.left_s() > 0


def test_a_crash_is_told_though_the_budget_is_spent(context):
    spent = Budget(total_s=1e-3)  # each step has its least time all the same
    found = run_trial(misbehaving("Segfault"), make_context(context.workspace, max_drop=0.2, budget=spent))
    assert (found.state, "SIGSEGV" in said(found.reason)) == ("failed", True)


@pytest.mark.usefixtures("impatient")
def test_what_a_hanging_engine_started_is_ended_with_it(context, user_engines):
    run_trial(user_engines("Parent"), context)
    helper = int((context.workspace.folder / "builds" / "helper").read_text())
    deadline = time.monotonic() + 60
    while running(helper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(helper)


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_the_last_words_of_a_child_are_told(context, user_engines):
    found = run_trial(user_engines("Leaving"), context)
    assert found.state == "failed"
    assert said(found.reason).startswith("exited with code 7 while building")


def test_a_full_disk_ends_the_run_not_the_trial(context, user_engines):
    with pytest.raises(
        OutputError, match=r"the disk is full: .*No space left on device.*; free space and run the same"
    ):
        run_trial(user_engines("Full"), context)


def test_an_inaccurate_build_is_rejected_before_it_is_measured(context):
    run_trial(FAKE, context, is_baseline=True)
    noisy = Build(engine="fake", precision="int8", options=(("noise", 3.0),))
    found = run_trial(noisy, context)
    assert found.state == "rejected"
    assert found.fidelity.agreement < 0.8
    assert found.measurements == ()


def test_a_build_that_silently_runs_in_fp32_has_failed(context):
    found = run_trial(misbehaving("SilentFp32"), context)
    assert found.state == "failed"
    assert said(found.reason) == "all 54 layers silently ran in fp32"
    assert found.receipt.words == "int8: 0 of 54 convolutions and linears, 54 fell back"
    assert found.measurements == ()


def test_a_build_in_fp32_is_not_asked_for_a_receipt(context):
    found = run_trial(replace(misbehaving("SilentFp32"), precision="fp32"), context)
    assert found.state == "ok"
    assert found.receipt is None


def test_a_hopelessly_slow_build_is_pruned(context):
    run_trial(FAKE, context, is_baseline=True)
    slow = Build(engine="fake", precision="int8", options=(("seconds_per_call", 0.05),))
    found = run_trial(slow, context, best_verified_per_s=1e6)
    assert found.state == "pruned"
    assert said(found.reason).startswith("too slow to measure: ")


def test_an_interrupt_leaves_no_child(context):
    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(FAKE, make_context(context.workspace, max_drop=0.2, on_event=interrupt))


def test_a_worker_that_is_gone_says_so_each_time(tmp_path):
    with Worker(cpu=inspect_cpu(), log=tmp_path / "log", timeout_s=inf) as worker:
        with pytest.raises(CorewiseError, match="has no open session"):
            worker.run_round(0.1)
        worker._process.kill()
        for _ in range(2):
            with pytest.raises(Died, match="killed"):
                worker.run_round(0.1)


# --- the race -----------------------------------------------------------------------------------------------------


def contender(context, build):
    run_trial(build, context, is_baseline=True)
    return Contender(build=build, plan=context.plan, payload=context.workspace.payload(build))


def raced(context, contenders, **options):
    return run_race(
        contenders, samples=context.workspace.holdout, start=context.client, rounds=4, round_s=0.05, **options
    )


def test_contenders_are_raced_in_alternating_rounds(context, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    builds = [Build(engine="fake", precision="int8", options=(("seconds_per_call", s),)) for s in (0.004, 0.06)]
    rounds = []
    told = lambda number, total, rates: rounds.append((number, total, [len(one.per_s) for one in rates]))  # noqa: E731
    found = raced(context, [contender(context, build) for build in builds], on_round=told)
    assert rounds == [(n, 4, [n, n]) for n in (1, 2, 3, 4)]
    fast, slow = found.rates
    assert np.median(fast.per_s) > 1.5 * np.median(slow.per_s)
    assert found.peak_memory_bytes > 20e6


def test_a_contender_that_fails_in_the_race_is_named(context, monkeypatch):
    monkeypatch.setattr("corewise.runtime.race.WARM_S", 0.05)
    broken = misbehaving("CrashesInRun")
    sound = contender(context, FAKE)
    with pytest.raises(ContenderFailed, match="crashed with SIGSEGV while warming up for the race") as fell:
        raced(context, [sound, Contender(build=broken, plan=sound.plan, payload=sound.payload)])
    assert fell.value.build == broken
