"""tuned: a plan for each machine beside the manifest, and never a reason for an artifact not to load."""

import json
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from builders import measured
from test_artifact import CPU, PLAN, STORY, X
from test_artifact import write as write_artifact

from corewise import artifact
from corewise.artifact import TUNED, TUNED_NEW
from corewise.artifact.open import load, verify
from corewise.artifact.tuned import MOST_BYTES, Fit, Machine, Tuned, asked, fit, read, usable_table, write
from corewise.common.errors import ArtifactError, InputError, OutputError
from corewise.machine.layouts import most_threads
from corewise.records.build import ElasticPlan, Plan
from corewise.runtime.elastic import Elastic
from corewise.runtime.instances import Pool

HERE = Machine.of(CPU)
ELSEWHERE = replace(HERE, model="Another CPU", quota_cores=1.5)
HERES = Plan(threads_per_instance=1, instances=1, batch=2)
two_threads = pytest.mark.skipif(most_threads(CPU) < 2, reason="needs two threads")


def entry(machine=HERE, plan=HERES, **changes):
    values = {"goal": "throughput", "measurements": (measured(plan),)}
    return Tuned(machine=machine, created="2026-01-02T03:04:05+00:00", plan=plan, **{**values, **changes})


@pytest.fixture
def made(tmp_path):
    return write_artifact(tmp_path / "m.cw")


def loaded(folder):
    """The batch that a loaded model cuts its calls by, and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with load(folder) as model:
            model(X)
            return model._session._batch, [str(one.message) for one in told]


def rewrite(folder, change):
    """Alter the file and sign it again."""
    content = json.loads((folder / TUNED).read_text())
    change(content)
    content.pop("digest", None)
    (folder / TUNED).write_text(json.dumps({**content, "digest": artifact.digest(content)}))


# --- which plan ---------------------------------------------------------------------------------------------------


def test_without_one_the_manifests_plan_runs_and_nothing_is_told(made):
    assert read(made) == ()
    assert loaded(made) == (PLAN.batch, [])
    assert verify(made).notes == ()


def test_the_plan_of_this_machine_runs(made):
    before = artifact.read(made)
    write(made, entry())
    assert read(made) == (entry(),)
    assert artifact.read(made) == before
    assert loaded(made) == (HERES.batch, [])
    (note,) = verify(made).notes
    assert note.startswith("runs 1 thread x 1, batch 2: tuned on this kind of machine")
    assert note.endswith("on 2026-01-02")


def test_the_plan_of_another_machine_does_not(made):
    write(made, entry(ELSEWHERE))
    assert loaded(made) == (PLAN.batch, [])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Another CPU"},
        {"isa": ("avx2", "avx512")},
        {"quota_cores": 7.5},
        {"affinity": (*CPU.affinity, 4001)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_machine_other_than_the_artifacts_is_told_how_to_retune(tmp_path, monkeypatch, change):
    made = write_artifact(tmp_path / "m.cw", report=replace(STORY, cpu=replace(CPU, **change)))
    batch, (told,) = loaded(made)
    assert batch == PLAN.batch
    assert f"{made} was tuned on " in told
    assert told.endswith(f"; run corewise retune {made}")
    before, now = told.partition("was tuned on ")[2].partition(", this is ")[::2]
    assert before != now.partition(":")[0]
    assert verify(made).notes == (told,)
    write(made, entry())
    assert loaded(made) == (HERES.batch, [])


def cores(count, quota=None, model="64 cores"):
    one = CPU.cpus[0]
    cpus = tuple(replace(one, cpu=number, core=number) for number in range(count))
    return replace(CPU, cpus=cpus, affinity=tuple(range(count)), quota_cores=quota, model=model)


@pytest.mark.parametrize(
    ("count", "quota", "plan"),
    [(1, None, (1, 1)), (64, 1.0, (1, 1)), (4, None, (4, 1)), (9, None, (4, 2)), (64, None, (4, 16))],
)
def test_elsewhere_a_plan_is_cut_down_to_the_cores_there_are(tmp_path, count, quota, plan):
    large = Plan(threads_per_instance=4, instances=16, batch=8)
    made = write_artifact(tmp_path / "m.cw", plan=large, report=replace(STORY, cpu=cores(64)))
    found = fit(artifact.read(made), cores(count, quota, "its own"))
    assert found.plan == Plan(threads_per_instance=plan[0], instances=plan[1], batch=8)
    assert ("was reduced to" in found.warnings[0]) == (found.plan != large)


def test_too_many_threads_on_the_plans_own_machine_are_allowed_and_told(tmp_path):
    crowd = Plan(threads_per_instance=3, instances=2)
    made = write_artifact(tmp_path / "m.cw", plan=crowd, report=replace(STORY, cpu=cores(2)))
    found = fit(artifact.read(made), cores(2))
    assert found.plan == crowd
    assert found.warnings == (
        f"{made} runs 3 threads x 2, batch 1: 6 threads take turns because only 2 can compute at once; "
        f"run corewise retune {made}",
    )


def test_what_is_asked_for_takes_the_place_of_the_plans_own(made):
    found = artifact.read(made)
    assert asked(found, CPU) == fit(found, CPU)
    assert asked(found, CPU, batch=5).plan == replace(PLAN, batch=5)
    write(made, entry())
    assert asked(found, CPU, batch=5).plan == replace(HERES, batch=5)
    most = most_threads(CPU)
    crowd = asked(found, CPU, threads_per_instance=most, instances=2)
    assert crowd.plan == Plan(threads_per_instance=most, instances=2, batch=HERES.batch)
    assert crowd.warnings == (
        f"{crowd.plan.label}, as requested: {2 * most} threads take turns because only {most} can compute at once",
    )
    with load(made, batch=3) as model:
        assert model._session._batch == 3


@pytest.mark.parametrize("name", ["threads_per_instance", "instances", "batch"])
@pytest.mark.parametrize("number", [0, -1, 2.5, "4", True])
def test_what_is_no_plan_is_told(made, name, number):
    with pytest.raises(InputError, match=f"{name.replace('_', ' ')} is {number!r}; give a whole number"):
        load(made, **{name: number})


@pytest.mark.parametrize("asks", [{"batch": 10**6}, {"threads_per_instance": 4096, "instances": 64}])
def test_what_no_machine_has_is_told(made, asks):
    with pytest.raises(InputError, match="is more than any machine has; stay within 4096 threads and batch 65536"):
        load(made, **asks)


def test_what_is_asked_for_hides_no_other_warning(tmp_path):
    made = write_artifact(tmp_path / "m.cw", report=replace(STORY, cpu=cores(64)))
    for asks in ({"batch": 3}, {"instances": 1}):
        (told,) = asked(artifact.read(made), cores(2), **asks).warnings
        assert "was tuned on" in told


def test_latencies_of_a_plan_that_was_not_measured_are_estimated_from_what_was_here(made):
    found = artifact.read(made)
    write(made, entry(plan=Plan(threads_per_instance=2), measurements=(measured(Plan(threads_per_instance=2)),)))
    here = Fit(plan=PLAN, tuned=read(made)[0], warnings=())
    for plan, ms, estimated in (
        (Plan(threads_per_instance=2), 1.0, False),
        (Plan(threads_per_instance=1, instances=4), 2.0 * 2.0, True),
        (Plan(threads_per_instance=8), 4.0, True),
    ):
        table, notes = usable_table(found, replace(here, plan=plan), cores(2))
        assert table.latency_ms(1) == ms
        assert [note.endswith("until then latencies are estimated") for note in notes] == [True] * estimated


def test_a_plan_of_more_threads_than_the_machine_has_is_not_taken(tmp_path):
    made = write_artifact(tmp_path / "m.cw", report=replace(STORY, cpu=cores(2)))
    write(made, entry(Machine.of(cores(2)), Plan(threads_per_instance=4, instances=600)))
    assert fit(artifact.read(made), cores(2)).plan == PLAN


# --- elastic plans ------------------------------------------------------------------------------------------------

ELASTIC = ElasticPlan(
    wide=Plan(threads_per_instance=2, batch=2), narrow=Plan(threads_per_instance=1, instances=2, batch=2)
)


def elastic_entry(**changes):
    plans = [replace(plan, batch=batch) for plan in (ELASTIC.wide, ELASTIC.narrow) for batch in (1, 2)]
    values = {"elastic": ELASTIC, "measurements": tuple(measured(plan, plan.batch) for plan in plans)}
    return entry(HERE, ELASTIC.narrow, **{**values, **changes})


@two_threads
def test_an_elastic_plan_is_loaded_and_verified(made):
    write(made, elastic_entry())
    assert read(made) == (elastic_entry(),)
    with load(made) as model:
        assert isinstance(model._session, Elastic)
        elastically = model(X)
    with load(made, batch=2) as model:
        assert isinstance(model._session, Pool)
        np.testing.assert_allclose(model(X)["scores"], elastically["scores"], rtol=1e-5)
    (note,) = verify(made).notes
    assert note.startswith(f"runs {ELASTIC.label}, depending on the load: tuned")


@two_threads
def test_an_elastic_plan_without_its_tables_or_with_other_threads_is_damage(made):
    for changes in ({"measurements": elastic_entry().measurements[1:]}, {"plan": HERES}):
        write(made, replace(elastic_entry(), **changes))
        with pytest.raises(ArtifactError, match="is damaged"):
            read(made)


def test_files_of_versions_without_elastic_plans_are_read(made):
    write(made, entry())
    rewrite(made, lambda content: [machine.pop("elastic") for machine in content["machines"]])
    assert read(made) == (entry(),)


# --- damage -------------------------------------------------------------------------------------------------------


def link(folder):
    (folder / TUNED).unlink()
    (folder / TUNED).symlink_to("manifest.json")


def folder_in_its_place(folder):
    (folder / TUNED).unlink()
    (folder / TUNED).mkdir()


DAMAGE = {
    "empty": lambda folder: (folder / TUNED).write_text(""),
    "cut off": lambda folder: (folder / TUNED).write_text((folder / TUNED).read_text()[:-9]),
    "binary": lambda folder: (folder / TUNED).write_bytes(bytes(range(256))),
    "deep": lambda folder: (folder / TUNED).write_text("[" * 100_000),
    "a list": lambda folder: (folder / TUNED).write_text("[]"),
    "null": lambda folder: (folder / TUNED).write_text("null"),
    "too long": lambda folder: (folder / TUNED).write_text(" " * (MOST_BYTES + 1)),
    "a link": link,
    "a folder": folder_in_its_place,
    "altered": lambda folder: (folder / TUNED).write_text((folder / TUNED).read_text().replace("01-02", "01-03")),
    "schema": lambda folder: rewrite(folder, lambda content: content.update(schema=3)),
    "another artifact": lambda folder: rewrite(folder, lambda content: content.update(manifest="0" * 64)),
    "no machine": lambda folder: rewrite(folder, lambda content: content.update(machines={})),
    "machines": lambda folder: rewrite(folder, lambda content: content.update(machines=content["machines"] * 65)),
    "no plan": lambda folder: rewrite(folder, lambda content: content["machines"][0].pop("plan")),
    "words": lambda folder: rewrite(folder, lambda content: content["machines"][0]["plan"].update(batch="many")),
    **{
        f"{key} {value}": lambda folder, key=key, value=value: rewrite(
            folder, lambda content: content["machines"][0]["plan"].update({key: value})
        )
        for key in ("threads_per_instance", "instances", "batch")
        for value in (0, -1, 10**9)
    },
    **{
        f"{key} {value}": lambda folder, key=key, value=value: rewrite(
            folder, lambda content: content["machines"][0]["measurements"][0].update({key: value})
        )
        for key in ("p50_ms", "p99_ms", "throughput_per_s")
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_told_and_the_artifact_serves_all_the_same(made, name):
    write(made, entry())
    DAMAGE[name](made)
    with pytest.raises(ArtifactError, match=r"tuned\.json is damaged \(.+\); run corewise retune .* or remove it"):
        read(made)
    batch, (told,) = loaded(made)
    assert batch == PLAN.batch
    assert told.startswith(f"{made / TUNED} is damaged (")
    assert "its plans are not used; run corewise retune" in told
    assert verify(made).notes == (told,)


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "a folder"])
def test_writing_makes_a_damaged_file_anew(made, name):
    write(made, entry())
    DAMAGE[name](made)
    write(made, entry())
    assert read(made) == (entry(),)
    assert not (made / TUNED).is_symlink()


# --- writing ------------------------------------------------------------------------------------------------------


def test_each_machine_has_its_own_entry_and_keeps_it(made):
    write(made, entry(ELSEWHERE))
    write(made, entry())
    again = replace(entry(), plan=replace(HERES, batch=4))
    write(made, again)
    assert read(made) == (again, entry(ELSEWHERE))


def test_machines_that_write_at_the_same_time_all_get_in(made):
    machines = [replace(HERE, hardware_threads=number) for number in range(1, 25)]
    start = threading.Barrier(8)

    def work(part):
        start.wait(60)
        for machine in part:
            write(made, entry(machine))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [machines[k::8] for k in range(8)]))
    assert {one.machine for one in read(made)} == set(machines)
    assert sorted(os.listdir(made.parent)) == ["m.cw"]
    assert not (made / TUNED_NEW).exists()


def test_an_artifact_can_be_read_at_any_moment_of_writing(made):
    code = "import sys; from pathlib import Path; from test_tuned import *\n"
    code += "for _ in range(60): write(Path(sys.argv[1]), entry())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    writer = subprocess.Popen([sys.executable, "-c", code, str(made)], env={**os.environ, "PYTHONPATH": path})
    reads = 0
    while writer.poll() is None:
        artifact.read(made)
        assert read(made) in ((), (entry(),))
        reads += 1
    assert writer.returncode == 0
    assert reads > 10


def test_a_writer_that_was_killed_leaves_nothing_in_the_way(made):
    (made / TUNED_NEW).write_text("half")
    assert loaded(made) == (PLAN.batch, [])
    write(made, entry())
    assert not (made / TUNED_NEW).exists()


def test_a_folder_that_cannot_be_written_is_told(made):
    (made / TUNED_NEW).mkdir()  # stops root too
    with pytest.raises(OutputError, match=r"tuned\.json cannot be written: .*; make the folder writable, or copy"):
        write(made, entry())
    assert read(made) == ()
    assert np.isfinite(verify(made).sqnr_db)


def test_whoever_serves_it_may_read_it(made):
    write(made, entry())
    assert (made / TUNED).stat().st_mode & 0o777 == 0o644
