"""search: what becomes of int8 builds that the gate rejects, with real children."""

import numpy as np
import pytest

from corewise.candidates import returning
from corewise.cpu import inspect
from corewise.engines import Material
from corewise.fidelity import compare, gate
from corewise.journal import Journal
from corewise.metrics import default
from corewise.samples import from_python
from corewise.search import give_back
from corewise.trial import Setting, run_trial
from corewise.values import Build, Objective, Plan, TensorSpec
from corewise.worker import CALIBRATION, HOLDOUT, PROGRAM, write_material

SAMPLES = from_python(list(np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)))
LAYERED = "corewise.testing.engines:Layered"


def layered(noise, *options):
    return Build(engine=LAYERED, precision="int8", options=tuple(sorted((("noise", noise), *options))))


def ours(noise):
    return layered(noise, ("quantizer", "corewise"))


@pytest.fixture
def setting(tmp_path, monkeypatch):
    monkeypatch.setattr("corewise.trial.MEASURE_S", 0.05)
    for name in ("builds", "outputs", "logs", "cache"):
        (tmp_path / name).mkdir()
    SAMPLES.save(tmp_path / CALIBRATION)
    SAMPLES.save(tmp_path / HOLDOUT)
    cpu = inspect()
    material = Material(
        program=tmp_path / PROGRAM,
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 6)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 5)),),
        operators={},
        calibration=SAMPLES,
        cpu=cpu,
        cache=tmp_path / "cache",
    )
    write_material(tmp_path, material)
    reference = []

    def verify(outputs):
        reference.append(outputs)
        metric = default(outputs.leaves[0], None)
        fidelity = compare(reference[0], outputs, metric=metric, labels=None, nest=lambda leaves: leaves[0])
        return fidelity, gate(fidelity, Objective(max_drop=0.05))

    plans = (Plan(threads_per_instance=1, batch=4),)
    return Setting(
        folder=tmp_path, plans=plans, cpus=cpu.usable_cpus, timeout_s=60.0, verify=verify, tell=lambda event: None
    )


def path_of(setting, *builds):
    """The builds' trials after a reference in fp32, and those that ``give_back`` added."""
    with Journal(setting.folder / "journal.jsonl", "key") as journal:
        run_trial(Build(engine=LAYERED, precision="fp32"), setting, is_baseline=True)
        trials = tuple(run_trial(build, setting) for build in builds)
        return trials, give_back(trials, setting, journal)[len(trials) :]


def test_layers_go_back_until_the_gate_passes(setting):
    trials, added = path_of(setting, ours(8.0))
    assert trials[0].state == "rejected"
    assert [trial.build for trial in added] == [returning(ours(8.0), count) for count in (1, 2, 4)]
    assert [trial.state for trial in added] == ["rejected", "rejected", "ok"]
    assert added[-1].receipt.words == "int8: 12 of 16 convolutions and linears, 0 fell back"


def test_the_path_ends_when_half_of_the_layers_are_back(setting):
    _, added = path_of(setting, ours(1e9))
    assert [trial.build.option("returned", 0) for trial in added] == [1, 2, 4, 8]
    assert {trial.state for trial in added} == {"rejected"}


def test_nothing_goes_back_where_another_int8_build_of_the_engine_passed(setting):
    trials, added = path_of(setting, ours(8.0), layered(0.0))
    assert [trial.state for trial in trials] == ["rejected", "ok"]
    assert added == ()


def test_only_our_quantizer_gives_layers_back(setting):
    trials, added = path_of(setting, layered(8.0))
    assert trials[0].state == "rejected"
    assert added == ()
