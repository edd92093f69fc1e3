"""corewise retune: an artifact on another machine, in a smaller container, on a disk that is read-only."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from builders import requirements
from places import GOLDEN, TESTS

import corewise
from corewise import artifact
from corewise.artifact import TUNED
from corewise.artifact.open import verify
from corewise.artifact.tuned import Machine, read, write
from corewise.common.errors import ArtifactError, CorewiseError, InputError, OutputError
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import most_threads
from corewise.records.build import Build, Plan
from corewise.records.events import StageStarted
from corewise.report.lines import retuned_lines

MADE = runpy.run_path(str(TESTS / "unit" / "artifact" / "test_artifact.py"))
ARTIFACT = GOLDEN / f"schema-{artifact.SCHEMA}"
RETUNE = import_module("corewise.search.retuning")
retune = RETUNE.retune  # "corewise.search.retuning" is the module by now
CPU = inspect_cpu()
ONE_CORE = ("taskset", "-c", str(CPU.affinity[-1]))
SINGLE = Plan(threads_per_instance=1)
QUICK = """
import sys
from importlib import import_module
from corewise.report.lines import retuned_lines
from corewise.runtime import race
import_module("corewise.search.retuning").MEASURE_S = race.WARM_S = 0.05
elastic = import_module("corewise.search.elastic")
elastic.REQUESTS, elastic.ROUNDS, elastic.DUEL_S, elastic.SHORTEST_DUEL_S = 100, 1, 0.05, 0.05
from corewise.cli import main
main()
"""
ENGINE = '''
import os
from collections import Counter
from pathlib import Path
from corewise.engines.fake import Fake
from corewise.common.errors import EngineError

class Moody(Fake):
    """A fake engine that has trouble with plans of one batch, by its option ``trouble`` (``refuses 16``)."""

    def open(self, folder, build, plan):
        kind, _, batch = str(build.option("trouble", "none 0")).partition(" ")
        if plan.batch == int(batch):
            if kind == "refuses":
                raise EngineError(f"no batch {batch} today")
            if kind == "dies":
                os.kill(os.getpid(), 9)
        session = super().open(folder, build, plan)
        if kind == "tires":  # every plan but that one is slow from the second process on
            opened = Path(str(build.option("log", ""))) / f"{plan.label}.{os.getpid()}"
            opened.touch()
            if plan.batch != int(batch) and len(list(opened.parent.glob(f"{plan.label}.*"))) > 1:
                object.__setattr__(session, "seconds_per_call", 0.8)
        return session
'''

x86_only = pytest.mark.skipif(CPU.architecture != "x86_64", reason="the golden artifact is for x86-64")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure for a moment only."""
    for name in ("MEASURE_S", "ROUND_S"):
        monkeypatch.setattr(RETUNE, name, 0.05)
    monkeypatch.setattr(import_module("corewise.runtime.race"), "WARM_S", 0.05)
    for name, value in {"REQUESTS": 100, "ROUNDS": 1, "DUEL_S": 0.05, "SHORTEST_DUEL_S": 0.05}.items():
        monkeypatch.setattr(f"corewise.search.elastic.{name}", value)


def make(folder, *, plan=SINGLE, goal="throughput", engine="fake", golden=None, **options):
    """An artifact of the fake engine whose calls take time: 20 ms, and 1 ms an item, unless told otherwise."""
    options = {"seconds_per_call": 0.02, "seconds_per_item": 0.001, "serial": 1.0, **options}
    build = Build(engine=engine, precision="int8", options=tuple(sorted(options.items())))
    report = replace(MADE["STORY"], requirements=requirements(goal=goal))
    made = MADE["write"](folder, build=replace(build, engine="fake"), golden=golden, plan=plan, report=report)
    return made, build


def with_engine(folder, build):
    """The artifact, as if it had been made with that engine."""
    MADE["rewrite"](folder, lambda content: content["build"].update(engine=build.engine))
    return folder


@pytest.fixture
def moody(tmp_path, monkeypatch):
    """Makes artifacts of the engine ``Moody``, which this process trusts."""
    (tmp_path / "moody_engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("moody_engine")
    yield lambda **options: with_engine(*make(tmp_path / "m.cw", engine="moody_engine:Moody", **options))
    del sys.modules["moody_engine"]


def command(*args, on=()):
    return subprocess.run(
        [*on, sys.executable, "-c", QUICK, *map(str, args)], capture_output=True, text=True, timeout=300, check=False
    )


def ok(*args, on=()):
    found = command(*args, on=on)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    return found.stdout


# --- the main job -------------------------------------------------------------------------------------------------


def test_a_faster_plan_is_found_saved_and_loaded(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    before = artifact.read(folder)
    events = []
    found = retune(folder, budget_s=60, on_event=events.append)
    assert found.old == SINGLE
    assert found.best == found.entry.plan != SINGLE
    assert not found.kept
    assert found.comparison.low > 1
    assert found.best_per_s > found.old_per_s > 0
    assert found.comparison.rounds >= 3
    assert all(isinstance(event, StageStarted) for event in events)
    assert len(events) == len(found.entry.measurements) + 1
    assert read(folder) == (found.entry,)
    assert found.entry.machine == Machine.of(CPU)
    assert artifact.read(folder) == before
    with corewise.load(folder) as model:
        x = np.zeros((found.best.batch + 1, 6), np.float32)
        assert model(x)["scores"].shape == (found.best.batch + 1, 5)
    assert found.best.label in found.entry.label  # beside another one if an elastic plan seems to pay
    assert found.entry.label in verify(folder).notes


@pytest.mark.slow
def test_again_it_begins_with_the_tuned_plan(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    first = retune(folder, budget_s=15)
    again = retune(folder, budget_s=15)
    assert again.old == first.entry.plan
    assert len(read(folder)) == 1


@pytest.mark.slow
@x86_only
def test_a_real_artifact_in_a_container_of_one_core(tmp_path):
    folder = tmp_path / "golden.cw"
    shutil.copytree(ARTIFACT, folder)
    found = json.loads(ok("retune", folder, "--budget", "20", "--json", on=ONE_CORE))
    machine = found["entry"]["machine"]
    assert (machine["usable_cores"], machine["hardware_threads"]) == (1, 1)
    plans = [one["plan"] for one in found["entry"]["measurements"]]
    here = [plan for plan in plans if plan != found["old"]]
    assert {(plan["threads_per_instance"], plan["instances"]) for plan in here} == {(1, 1)}
    assert found["old_per_s"] > 0
    (entry,) = read(folder)
    assert entry.machine.model == CPU.model
    shown = ok("show", folder, on=ONE_CORE)
    assert shown.splitlines()[-1].startswith(f"here it runs {entry.plan.label}: tuned on this kind of machine")
    notes = json.loads(ok("verify", folder, "--json", on=ONE_CORE))["notes"]
    assert notes == [entry.label]


@x86_only
def test_the_words_tell_both_plans_and_where_it_was_saved(tmp_path):
    folder = tmp_path / "golden.cw"
    shutil.copytree(ARTIFACT, folder)
    lines = ok("retune", folder, "--budget", "5").splitlines()
    assert lines[0].startswith("old plan ")
    assert lines[-1] == f"saved {folder / TUNED}"
    assert any(re.match(r"\d+ plans? measured in .* on ", line) and CPU.model in line for line in lines)


def test_two_machines_share_a_folder(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    here = retune(folder, budget_s=10).entry
    elsewhere = replace(
        here, machine=replace(here.machine, model="Another CPU"), plan=replace(SINGLE, batch=2), elastic=None
    )
    write(folder, elsewhere)
    assert set(read(folder)) == {here, elsewhere}
    again = retune(folder, budget_s=10).entry
    assert set(read(folder)) == {again, elsewhere}


@pytest.mark.slow
def test_one_machine_with_other_limits_is_another_machine(tmp_path):
    if len(CPU.affinity) < 2:
        pytest.skip("needs two hardware threads")
    folder, _ = make(tmp_path / "m.cw")
    whole = retune(folder, budget_s=10).entry
    ok("retune", folder, "--budget", "10", on=ONE_CORE)
    part = next(one for one in read(folder) if one != whole)
    assert set(read(folder)) == {whole, part}
    assert part.machine.usable_cores == 1
    assert all(one.plan.threads_per_instance * one.plan.instances == 1 for one in part.measurements)


def test_the_old_plan_stays_where_no_other_is_tried(tmp_path):
    folder, _ = make(tmp_path / "m.cw", goal="latency")
    found = ok("retune", folder, "--budget", "10", on=ONE_CORE)
    assert "no other plan tried is faster: the old plan stays" in found
    (entry,) = read(folder)
    assert entry.plan == SINGLE
    assert [one.plan for one in entry.measurements] == [SINGLE]


@pytest.mark.slow
def test_the_old_plan_stays_where_the_race_does_not_bear_out_the_search(moody, tmp_path):
    (tmp_path / "log").mkdir()
    folder = moody(trouble="tires 1", log=str(tmp_path / "log"), seconds_per_call=0.002)
    found = retune(folder, budget_s=60)
    assert found.best != found.old
    assert found.comparison.ratio < 1
    assert found.kept
    assert found.entry.plan == SINGLE
    assert any("the old plan is as good and stays" in line for line in retuned_lines(found))


def test_the_package_has_it(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    code = "import sys, corewise; print(corewise.retune(sys.argv[1], budget_s=1).old.label)"
    found = subprocess.run([*ONE_CORE, sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert found.stdout == f"{SINGLE.label}\n"


# --- trouble ------------------------------------------------------------------------------------------------------


def test_plans_that_do_not_run_are_noted_and_others_measured(moody):
    found = retune(moody(trouble="refuses 64"), budget_s=60)
    assert found.entry.plan.batch not in (1, 64)
    assert any("batch 64 does not run here: opening" in note and "no batch 64 today" in note for note in found.notes)


def test_a_child_that_dies_is_replaced(moody):
    found = retune(moody(trouble="dies 64"), budget_s=60)
    assert found.entry.plan.batch not in (1, 64)
    assert any("batch 64 does not run here: killed (SIGKILL" in note for note in found.notes)


def test_an_old_plan_that_does_not_run_here_is_replaced_without_a_race(moody):
    found = retune(moody(trouble="refuses 7", plan=replace(SINGLE, batch=7)), budget_s=60)
    assert found.old_per_s is None
    assert found.comparison is None
    assert not found.kept
    assert any("batch 7 does not run here" in note for note in found.notes)


def test_nothing_that_runs_is_an_error(tmp_path):
    folder, _ = make(tmp_path / "m.cw", goal="latency", seconds_per_call=-1.0, golden=[np.zeros((4, 5), np.float32)])
    with pytest.raises(CorewiseError, match=r"m\.cw runs under no plan here: .*"):
        retune(folder, budget_s=5)
    assert read(folder) == ()


@pytest.mark.parametrize("budget_s", [0, -1, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_told(tmp_path, budget_s):
    with pytest.raises(InputError, match=r"the budget is .* s; give more than 0, e\.g\. 30"):
        retune(tmp_path / "m.cw", budget_s=budget_s)


def test_a_budget_too_short_for_anything_still_measures_the_old_plan(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    found = retune(folder, budget_s=0.001)
    assert [one.plan for one in found.entry.measurements] == [SINGLE]
    assert found.kept


def test_an_engine_that_nobody_imported_is_not_run(tmp_path):
    folder = with_engine(*make(tmp_path / "m.cw", engine="foreign_engine:Engine"))
    with pytest.raises(ArtifactError, match="import foreign_engine first if you trust it"):
        retune(folder)


def test_what_is_damaged_is_refused_but_its_tuned_plans_are_made_anew(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    (folder / TUNED).write_text("damaged")
    retune(folder, budget_s=5)
    assert len(read(folder)) == 1
    with (folder / "golden.safetensors").open("ab") as file:
        file.write(b"!")
    found = command("retune", folder)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(f"corewise: {folder}/golden.safetensors is truncated or altered")
    assert found.stderr.count("\n") == 1


@pytest.fixture
def read_only(tmp_path):
    """An artifact on a file system that takes no files, for root too where it may mount one."""
    folder, _ = make(tmp_path / "m.cw", goal="latency")
    place = tmp_path / "read-only"
    place.mkdir()
    if os.geteuid():
        shutil.copytree(folder, place / "m.cw")
        (place / "m.cw").chmod(0o555)
        yield place / "m.cw"
        (place / "m.cw").chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "corewise-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    shutil.copytree(folder, place / "m.cw")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    yield place / "m.cw"
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_folder_is_told_after_the_plan(read_only):
    found = command("retune", read_only, "--budget", "5", on=ONE_CORE)
    assert found.returncode == 2
    assert found.stdout.startswith("old plan ")
    assert found.stderr.startswith(f"corewise: {read_only / TUNED} cannot be written: ")
    assert found.stderr.endswith("copy the artifact to a place of your own and retune it there\n")
    with pytest.raises(OutputError, match="cannot be written"):
        retune(read_only, budget_s=1)


# --- limits -------------------------------------------------------------------------------------------------------


def test_doctor_knows_of_one_core_only():
    found = json.loads(ok("doctor", "--json", on=ONE_CORE))
    assert found["cpu"]["affinity"] == [CPU.affinity[-1]]


def test_no_measured_plan_has_more_threads_than_may_compute(tmp_path):
    folder, _ = make(tmp_path / "m.cw")
    for one in retune(folder, budget_s=10).entry.measurements:
        assert one.plan.threads_per_instance * one.plan.instances <= most_threads(CPU)
