"""search: builds that calibration made, judged on samples unlike those that calibrated, with twins that are built."""

from dataclasses import replace

import numpy as np
import pytest
from builders import said

from corewise.accuracy.gate import AccuracyGate
from corewise.accuracy.metrics import resolve
from corewise.common.nested import flatten
from corewise.engines import BuildInputs
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.goal import Requirements
from corewise.records.reason import ReasonKind
from corewise.runtime.workspace import Workspace
from corewise.samples import from_python
from corewise.search.budget import Budget
from corewise.search.journal import Journal
from corewise.search.search import TUNED, Search
from corewise.search.shifting import ShiftGuard
from corewise.search.trial import SearchContext, run_trial
from corewise.testing.engines import Narrow, RaisesInBuild

FP32 = Build(engine="eager", precision="fp32")
BF16, INT8 = (Build(engine="fake", precision=precision) for precision in ("bf16", "int8"))
FAR = 10.0


def samples(count, seed):
    """A fourth of them is far from the rest."""
    values = np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)
    values[::4] += FAR
    return from_python(list(values))


class Case:
    """A search over engines that cut off what calibration did not see, in this process."""

    def __init__(self, folder, *, robust, count=80, budget_s=None):
        self.workspace = Workspace.create(folder)
        calibration, holdout = samples(count, 0), samples(count, 1)
        holdout.save(self.workspace.holdout)
        self.workspace.program.touch()
        cpu = inspect_cpu()
        self.inputs = BuildInputs(
            program=self.workspace.program,
            inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 6)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 5)),),
            operators={},
            calibration=calibration,
            cpu=cpu,
            cache=self.workspace.cache,
        )
        self.workspace.write_build_inputs(self.inputs)
        structure = flatten(np.zeros(1))[1]
        self.gate = AccuracyGate(
            resolve("concordance"), holdout, structure, Requirements(max_drop=0.05), 0, robust=robust
        )
        self.context = SearchContext(
            workspace=self.workspace,
            plan=Plan(threads_per_instance=1, batch=4),
            cpu=cpu,
            timeout_s=60.0,
            verify=self.gate,
            on_event=lambda event: None,
            in_process=Narrow(),
            budget=Budget(total_s=budget_s),
        )
        run_trial(FP32, self.context, is_baseline=True)
        self.guard = ShiftGuard(self.gate, self.context, self.inputs, FP32)

    def judged(self, build):
        trial = run_trial(build, self.context)
        assert trial.state == "ok"
        return trial, self.guard.judged(trial, share=1.0)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr("corewise.search.trial.MEASURE_S", 0.01)


def test_a_build_whose_ranges_do_not_hold_elsewhere_is_rejected_by_a_robust_gate(tmp_path):
    trial, judged = Case(tmp_path, robust=True).judged(INT8)
    assert trial.fidelity.drop < 0.01
    assert judged.fidelity.shift.samples == 20
    assert judged.fidelity.shift_drop > 0.1
    assert judged.inaccurate
    assert said(judged.reason).startswith("on samples unlike the calibration samples: concordance")


def test_without_robust_the_drop_is_told_and_decides_nothing(tmp_path):
    case = Case(tmp_path, robust=False)
    trial, judged = case.judged(INT8)
    assert replace(judged, fidelity=trial.fidelity) == trial
    assert judged.fidelity.shift_drop > 0.1
    assert said(case.guard.doubt(judged)).endswith("--robust keeps such builds out")
    assert case.guard.doubt(trial) is None


def test_what_needs_no_calibration_is_judged_by_its_own_answers(tmp_path):
    case = Case(tmp_path, robust=True)
    _, judged = case.judged(BF16)
    assert (judged.state, judged.fidelity.shift_drop, judged.fidelity.shift.samples) == ("ok", 0.0, 20)
    assert not (tmp_path / "twin").exists()


def test_what_was_judged_is_not_judged_again(tmp_path):
    case = Case(tmp_path, robust=True)
    _, judged = case.judged(BF16)
    assert case.guard.judged(judged, share=1.0) is judged


def test_too_few_samples_cannot_be_split(tmp_path):
    trial, judged = Case(tmp_path, robust=True, count=7).judged(INT8)
    assert judged is trial


def test_a_twin_that_the_budget_has_no_time_for(tmp_path):
    case = Case(tmp_path, robust=True, budget_s=1000.0)
    trial = replace(run_trial(INT8, case.context), build_s=990.0)
    judged = case.guard.judged(trial, share=0.5)
    assert (judged.state, judged.reason.kind) == ("pruned", ReasonKind.BUDGET_TOO_SHORT)
    case.gate.robust = False
    assert case.guard.judged(trial, share=0.5) is trial


def test_a_twin_that_cannot_be_built(tmp_path):
    case = Case(tmp_path, robust=True)
    trial = run_trial(INT8, case.context)
    case.judged(BF16)  # the samples are split from here on
    case.guard.context = replace(case.context, in_process=RaisesInBuild())
    judged = case.guard.judged(trial, share=1.0)
    assert judged.state == "pruned"
    assert "no kernel for aten.frobnicate" in said(judged.reason)


def test_a_search_judges_until_enough_of_the_fastest_hold(tmp_path):
    case = Case(tmp_path, robust=True)
    slower = [Build(engine="fake", precision="bf16", options=(("noise", noise),)) for noise in (1e-4, 1e-3, 1e-5, 1e-6)]
    trials = [run_trial(build, case.context) for build in (FP32, INT8, *slower)]
    with Journal(case.workspace.journal, "key") as journal:
        search = Search([FP32, INT8, *slower], case.gate, case.context, journal, case.guard)
        search.trials = [
            replace(trial, measurements=(replace(trial.measurements[0], throughput_per_s=100.0 - number),))
            for number, trial in enumerate(trials)
        ]
        search.judge_under_shift()
        states = [(trial.state, trial.fidelity.shift is not None) for trial in search.trials]
        assert states == [("ok", False), ("rejected", True), *[("ok", True)] * TUNED, ("ok", False)]
        assert journal.get(INT8).state == "rejected"
