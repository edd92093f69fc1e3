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
from corewise.machine.layouts import ThreadLayout
from corewise.records.build import Build, Plan, TensorSpec
from corewise.records.goal import Requirements
from corewise.records.measurement import Rates
from corewise.records.reason import Reason, ReasonKind
from corewise.runtime.client import Hung
from corewise.runtime.race import Race
from corewise.runtime.workspace import Workspace
from corewise.samples import from_python
from corewise.search.alone import AloneGuard
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


def by_default(case):
    """The same where nobody asked to be robust and the model takes token ids."""
    case.gate.integer_inputs = True
    return case


def searching(case, journal, candidates):
    """A search that has the baseline's trial and these."""
    baseline = run_trial(FP32, case.context, is_baseline=True)
    trials = [baseline, *candidates]
    search = Search([trial.build for trial in trials], case.gate, case.context, journal, case.guard)
    search.trials = trials
    return search


def raced(trials):
    """A race in which each is faster than the one before it."""
    plan = trials[0].measurements[0].plan
    rates = [
        Rates(build=trial.build, plan=plan, per_s=tuple(100.0 * number + wobble for wobble in range(8)))
        for number, trial in enumerate(trials, 1)
    ]
    return Race(rates=tuple(rates), peak_memory_bytes=0)


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
    assert said(judged.reason).endswith("and calibrating it again without those samples needs about 21 min 27 s")
    case.gate.robust = False
    assert case.guard.judged(trial, share=0.5) is trial
    assert case.guard.doubt(trial) is None


def test_where_nobody_asked_for_it_what_there_was_no_time_to_judge_wins_with_a_warning(tmp_path):
    case = by_default(Case(tmp_path, robust=None, budget_s=1000.0))
    trial = replace(run_trial(INT8, case.context), build_s=990.0)
    with Journal(case.workspace.journal, "key") as journal:
        search = searching(case, journal, [trial])
        search.judge_under_shift()
        search.race_result = raced(search.trials)
        choice = search.choose()
    assert choice.winner == INT8
    assert search.trials[1].state == "ok"
    assert [warning.kind for warning in choice.warnings][-1] == ReasonKind.NOT_JUDGED_UNDER_SHIFT
    assert said(choice.warnings[-1]).startswith(f"{INT8.label} could not be judged on samples unlike")
    assert "calibrating it again without those samples needs about" in said(choice.warnings[-1])


def test_a_winner_that_was_not_judged_yet_is_judged_before_it_is_chosen(tmp_path):
    case = Case(tmp_path, robust=True)
    with Journal(case.workspace.journal, "key") as journal:
        search = searching(case, journal, [run_trial(INT8, case.context)])
        search.race_result = raced(search.trials)
        choice = search.choose()
    assert choice.winner == FP32
    assert search.trials[1].inaccurate


@pytest.mark.parametrize(("other", "leaks"), [(False, False), (True, False), (True, True)])
def test_a_winner_is_judged_on_texts_alone_before_it_is_chosen(tmp_path, monkeypatch, other, leaks):
    case = Case(tmp_path, robust=False)
    rows = np.arange(40)
    texts = case.gate.holdout.take(rows)
    if other:  # what it answers to others stands for an answer that depends on its neighbours
        texts = case.gate.holdout.take(rows[::-1])
    if not leaks:  # else the baseline's answers depend on them too
        monkeypatch.setattr(AloneGuard, "_baseline_passes", True)
    with Journal(case.workspace.journal, "key") as journal:
        search = searching(case, journal, [run_trial(INT8, case.context)])
        search.alone = AloneGuard(gate=case.gate, context=case.context, baseline=FP32, texts=texts, rows=rows)
        search.race_result = raced(search.trials)
        choice = search.choose()
    rejected = other and not leaks
    assert choice.winner == (FP32 if rejected else INT8)
    if rejected:
        assert said(search.trials[1].reason).startswith("on texts in calls of their own: concordance")


def test_int8_that_holds_is_preferred_to_int8_about_as_fast_that_was_not_judged(tmp_path):
    case = by_default(Case(tmp_path, robust=None, budget_s=1000.0))
    other = Build(engine="fake", precision="int8", options=(("noise", 1e-4),))
    slow, judged = replace(run_trial(INT8, case.context), build_s=990.0), run_trial(other, case.context)
    shift = replace(judged.fidelity, shift=judged.fidelity)
    for factor, state in ((0.95, "pruned"), (0.5, "ok")):
        per_s = factor * slow.measurements[0].throughput_per_s
        held = replace(judged, fidelity=shift, measurements=(replace(judged.measurements[0], throughput_per_s=per_s),))
        with Journal(case.workspace.journal, "key") as journal:
            search = searching(case, journal, [slow, held])
            search.judge_under_shift()
        assert [trial.state for trial in search.trials] == ["ok", state, "ok"]


def test_what_is_left_for_lack_of_a_twins_time_is_not_tuned(tmp_path):
    case = Case(tmp_path, robust=True, budget_s=1000.0)
    case.context = replace(case.context, layouts=lambda build: (ThreadLayout(1, 1),))
    trial = replace(run_trial(INT8, case.context), build_s=990.0)
    with Journal(case.workspace.journal, "key") as journal:
        search = searching(case, journal, [trial])
        search.judge_under_shift()
        search.tune_plans()
        assert journal.get(INT8) is None
    assert (search.trials[1].state, search.trials[1].tuned) == ("pruned", None)


def test_a_twin_that_the_budget_ends_is_tried_again_with_more_time(tmp_path, monkeypatch):
    case = Case(tmp_path, robust=True, budget_s=1000.0)
    trial = run_trial(INT8, case.context)
    case.judged(BF16)

    def hang(*args):
        case.guard.context = replace(case.context, budget=Budget(total_s=1e-6))
        raise Hung(Reason.of(ReasonKind.HUNG, step="building", timeout_s=10.0))

    monkeypatch.setattr(case.guard, "_outputs", hang)
    judged = case.guard.judged(trial, share=1.0)
    assert (judged.state, judged.reason.kind) == ("pruned", ReasonKind.BUDGET_SPENT_DURING)


def test_no_time_to_split_samples_costs_no_build_that_needs_no_calibration(tmp_path):
    case = Case(tmp_path, robust=True, budget_s=1e-6)
    trial = run_trial(BF16, case.context)
    assert case.guard.judged(trial, share=1.0) is trial


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
