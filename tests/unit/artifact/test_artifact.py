"""artifact: whole or not there, and refused where it is not what was written."""

import hashlib
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import TESTS
from safetensors.numpy import save
from torch import nn

from corewise import artifact
from corewise.artifact import (
    GOLDEN,
    MANIFEST,
    PAYLOAD,
    REFERENCE,
    REPORT,
    TUNED,
    TUNED_NEW,
    Manifest,
    check_golden,
    check_output,
    read,
)
from corewise.artifact.format import _sqnr_db
from corewise.artifact.open import load, verify
from corewise.artifact.under_load import loadtest
from corewise.common.errors import ArtifactError, CorewiseError, EngineError, OutputError
from corewise.common.nested import flatten
from corewise.engines import BuildInputs, engine
from corewise.engines.eager import Eager
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Build, Plan, TensorSpec
from corewise.samples import from_python
from corewise.source import Flat

STORY = runpy.run_path(str(TESTS / "golden" / "make.py"))["REPORT"]
CPU = inspect_cpu()
STORY = replace(STORY, cpu=CPU)  # made here: loading warns of other machines
BUILD = Build(engine="fake", precision="int8")
PLAN = Plan(threads_per_instance=1, batch=4)
INPUTS = (TensorSpec(name="x", dtype="float32", shape=(None, 6)),)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=(None, 5)),)
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
REPORT_TEXT = "# modèle\n"


def write(folder, *, build=BUILD, golden=None, reference=None, report=STORY, maker=None, **changes):
    """An artifact of the fake engine, or of ``maker``; ``golden`` replaces its golden outputs."""
    payload = folder.parent / f"{folder.name}.payload"
    payload.mkdir(exist_ok=True)
    material = BuildInputs(
        program=folder.parent / "none",
        inputs=INPUTS,
        outputs=OUTPUTS,
        operators={},
        calibration=from_python(list(X)),
        cpu=CPU,
        cache=folder.parent,
    )
    maker = maker or engine("fake")
    maker.build(material, build, payload)
    outputs = maker.open(payload, build, PLAN).run([X]) if golden is None else golden

    def manifest(files):
        values = {
            "schema": artifact.SCHEMA,
            "model": "m",
            "created": "2026-01-01",
            "versions": {"corewise": "0"},
            "architecture": CPU.architecture,
            "needs": (),
            "build": build,
            "plan": PLAN,
            "inputs": INPUTS,
            "outputs": OUTPUTS,
            "input_structure": flatten(((X,), {}))[1].to_data(),
            "output_structure": flatten({"scores": X})[1].to_data(),
            "preprocess": None,
            "files": files,
        }
        return Manifest(**{**values, **changes})

    artifact.write(
        folder,
        manifest=manifest,
        payload=payload,
        reference=reference,
        golden=([X], outputs),
        report=report,
        report_text=REPORT_TEXT,
        report_page="<!doctype html>\n",
    )
    shutil.rmtree(payload)
    return folder


def rewrite(folder, change, *, sign=True):
    """Alter the manifest; signed, its digest is made to fit."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    if sign:
        del content["digest"]
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


@pytest.fixture
def made(tmp_path):
    return write(tmp_path / "m.cw")


# --- writing ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(made):
    found = read(made, cpu=CPU)
    assert set(found.manifest.files) == {"payload/fake.json", GOLDEN, REPORT, "report.md", "report.html"}
    assert (found.manifest.build, found.manifest.plan) == (BUILD, PLAN)
    assert found.report == STORY
    inputs, outputs = found.golden()
    np.testing.assert_array_equal(inputs[0], X)
    assert outputs[0].shape == (4, 5)
    assert os.listdir(made.parent) == ["m.cw"]


def test_the_reference_is_kept_where_one_is_given(tmp_path):
    (tmp_path / "p.pt2").write_bytes(b"program")
    made = write(tmp_path / "m.cw", reference=tmp_path / "p.pt2")
    assert (made / REFERENCE).read_bytes() == b"program"
    assert REFERENCE in read(made).manifest.files


def test_it_loads_and_answers_as_its_golden_outputs(made):
    with load(made) as model:
        answer = model(X)
    np.testing.assert_array_equal(answer["scores"], read(made).golden()[1][0])


def test_an_artifact_is_never_written_over_another(made):
    before = (made / MANIFEST).read_bytes()
    with pytest.raises(OutputError, match="exists already; remove it or give another name"):
        write(made)
    assert (made / MANIFEST).read_bytes() == before


def test_a_report_that_names_files_whose_names_are_not_utf_8_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "REPORT_TEXT", "1 of 40 images was set aside: a\udcff.jpg is empty\n")
    folder = write(tmp_path / "m.cw")
    assert "aside: a?.jpg is empty" in (folder / artifact.REPORT_TEXT).read_text(encoding="utf-8")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_output_that_exists_is_told(tmp_path, make):
    make(tmp_path / "m.cw")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "m.cw")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("missing/m.cw", "there is no folder .*missing; create it"),
        ("file/m.cw", "there is no folder .*file"),
        ("n" * 300, "cannot be written: File name too long"),
        ("n" * 250, "cannot be written: File name too long"),
        ("n\udcff.cw", "has a name that is not UTF-8; give another place"),
    ],
)
def test_an_output_that_cannot_be_is_told(tmp_path, output, told):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=told):
        check_output(tmp_path / output)


def test_a_folder_that_cannot_be_written_is_told():
    # /proc takes no files, not even from root.
    with pytest.raises(OutputError, match=r"/proc/m\.cw cannot be written: .*; give another place"):
        check_output(Path("/proc/m.cw"))


def test_it_is_written_whatever_encoding_files_have_here(tmp_path):
    code = "import sys; from pathlib import Path; from test_artifact import write; write(Path(sys.argv[1]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.cw"], check=True, env=environment)
    assert (tmp_path / "m.cw" / artifact.REPORT_TEXT).read_text(encoding="utf-8") == REPORT_TEXT


def test_nothing_is_left_where_writing_fails(tmp_path):
    def broken(files):
        raise OSError(28, "No space left on device")

    (tmp_path / "payload").mkdir()
    with pytest.raises(OutputError, match="No space left on device; free space"):
        artifact.write(
            tmp_path / "m.cw",
            manifest=broken,
            payload=tmp_path / "payload",
            reference=None,
            golden=([X], [X]),
            report=STORY,
            report_text="",
            report_page="",
        )
    assert os.listdir(tmp_path) == ["payload"]


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_missing_and_a_foreign_folder_are_told(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist; give a folder that corewise optimize wrote"):
        read(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"is not an artifact: it has no manifest\.json"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"digest": 1}',
        b'{"schema": 1}',
        pytest.param(b"[" * 10**5, id="deep"),
    ],
)
def test_a_manifest_of_another_program_is_told(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json is not a manifest of corewise"):
        read(tmp_path)


def files_of(made):
    return [path for path in sorted(made.rglob("*")) if path.is_file() and path.name != MANIFEST]


def test_every_file_is_checked_for_its_end(made):
    for path in files_of(made):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=f"{path.name} is truncated or altered: {len(whole) - 1} bytes instead"):
            read(made)
        path.write_bytes(whole)
    read(made)


def test_every_file_is_checked_for_its_content(made):
    for path in files_of(made):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=f"{path.name} was altered: its sha256"):
            read(made)
        path.write_bytes(whole)
    read(made)


def test_every_file_must_be_there(made):
    for path in files_of(made):
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(ArtifactError, match=f"{path.name} is missing; copy the artifact again"):
            read(made)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "add",
    [
        lambda made: (made / "payload" / "more.bin").touch(),
        lambda made: (made / "payload" / "link").symlink_to("fake.json"),
        lambda made: (made / "elsewhere").symlink_to("/etc"),
    ],
)
def test_a_file_too_many_is_told(made, add):
    add(made)
    with pytest.raises(ArtifactError, match="is not in the manifest; remove it"):
        read(made)


def test_a_link_in_place_of_a_file_is_told(made):
    (made / GOLDEN).rename(made.parent / "golden")
    (made / GOLDEN).symlink_to(made.parent / "golden")
    with pytest.raises(ArtifactError, match="which is outside the folder"):
        read(made)
    (made / GOLDEN).unlink()
    shutil.copy(made / REPORT, made / "payload" / "copy")
    (made / GOLDEN).symlink_to("payload/copy")
    rewrite(made, lambda content: content["files"].update({"payload/copy": content["files"][REPORT]}))
    with pytest.raises(ArtifactError, match="is a link"):
        read(made)


@pytest.mark.parametrize("name", ["../outside", "payload/../../outside", "/etc/passwd", "nul\0"])
def test_a_manifest_that_names_a_file_outside_is_told(made, name):
    (made.parent / "outside").touch()
    facts = {"sha256": hashlib.sha256(b"").hexdigest(), "size_bytes": 0}
    rewrite(made, lambda content: content["files"].update({name: facts}))
    with pytest.raises(ArtifactError, match="which is outside the folder"):
        read(made)


@pytest.mark.parametrize("schema", [0, 3, "1", None])
def test_another_schema_is_told(made, schema):
    rewrite(made, lambda content: content.update(schema=schema))
    with pytest.raises(ArtifactError, match=r"has schema .*, this corewise reads 1, 2; use the corewise that wrote it"):
        read(made)


@pytest.mark.parametrize("key", ["model", "needs", "plan", "files"])
def test_a_manifest_altered_by_hand_is_told(made, key):
    rewrite(made, lambda content: content.update({key: content["created"]}), sign=False)
    with pytest.raises(ArtifactError, match=r"manifest\.json was altered after it was written"):
        read(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("plan"),
        lambda content: content.update(plan={"threads_per_instance": "many"}),
        lambda content: content.update(files=[]),
        lambda content: content.update(input_structure={"kind": "leaf"}),
        lambda content: content["output_structure"].update(kind="module"),
    ],
)
def test_a_signed_manifest_of_other_types_is_told(made, change):
    rewrite(made, change)
    with pytest.raises(ArtifactError, match="does not fit its schema"):
        read(made)


@pytest.mark.parametrize("name", [GOLDEN, REPORT])
def test_a_signed_manifest_without_its_proofs_is_told(made, name):
    (made / name).unlink()
    rewrite(made, lambda content: content["files"].pop(name))
    with pytest.raises(ArtifactError, match=f"does not list {name}"):
        read(made)


def test_a_signed_manifest_of_other_golden_samples_is_told(made):
    content = save({"input.1": X})
    (made / GOLDEN).write_bytes(content)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    rewrite(made, lambda manifest: manifest["files"].update({GOLDEN: facts}))
    with pytest.raises(ArtifactError, match=r"golden\.safetensors has no golden outputs: 'input\.0'; copy"):
        verify(made)


def test_a_cpu_of_another_architecture_is_told(tmp_path):
    made = write(tmp_path / "m.cw", architecture="riscv64")
    read(made)
    with pytest.raises(ArtifactError, match=f"was made for riscv64, this CPU is {CPU.architecture}; make it again"):
        read(made, cpu=CPU)


@pytest.mark.parametrize("need", ["int8_dot", "bf16", "avx512_vnni"])
def test_what_the_payload_needs_must_be_here(tmp_path, need):
    made = write(tmp_path / "m.cw", needs=(need,))
    with pytest.raises(ArtifactError, match=re.escape(f"needs a CPU with {need}, which {CPU.model} lacks")):
        read(made, cpu=replace(CPU, isa=("avx2",)))
    read(made, cpu=replace(CPU, isa=("avx512_vnni", "avx512_bf16")))


@pytest.mark.parametrize("name", [TUNED, TUNED_NEW])
def test_plans_of_other_machines_are_no_part_of_it(made, name):
    before = read(made)
    (made / name).write_text("anything")
    assert read(made) == before
    (made / "payload" / name).touch()
    with pytest.raises(ArtifactError, match="is not in the manifest; remove it"):
        read(made)


# --- golden outputs -----------------------------------------------------------------------------------------------


def test_equal_golden_outputs_are_verified(made):
    found = verify(made)
    assert (found.sqnr_db, found.golden_samples, found.files) == (200.0, 4, 5)


@pytest.mark.parametrize(
    ("precision", "noise", "sound"),
    [("fp32", 1e-3, True), ("fp32", 1e-2, False), ("bf16", 1e-2, True), ("int8", 0.05, True), ("int8", 0.3, False)],
)
def test_golden_outputs_may_differ_by_what_the_precision_allows(tmp_path, precision, noise, sound):
    noisy = Build(engine="fake", precision=precision, options=(("noise", noise),))
    exact = write(tmp_path / "exact.cw", build=replace(noisy, options=()))
    made = write(tmp_path / "m.cw", build=noisy, golden=read(exact).golden()[1])
    if sound:
        assert verify(made).sqnr_db == pytest.approx(-20 * np.log10(noise), abs=6)
    else:
        with pytest.raises(ArtifactError, match=r"have an SQNR of .* dB here, below the required .* dB"):
            verify(made)


@pytest.mark.parametrize("value", [0, np.inf, -np.inf])
def test_golden_outputs_that_are_something_else_do_not_pass(tmp_path, value):
    made = write(tmp_path / "m.cw", golden=[np.full((4, 5), value, np.float32)])
    with pytest.raises(ArtifactError, match=r"golden outputs of .* have an SQNR"):
        verify(made)


def test_outputs_that_are_nan_here_do_not_pass(tmp_path):
    importlib.import_module("corewise.testing.engines")  # what was imported is trusted
    broken = Build(engine="corewise.testing.engines:NanOutputs", precision="int8")
    made = write(tmp_path / "m.cw", build=broken, golden=[np.ones((4, 5), np.float32)])
    with pytest.raises(ArtifactError, match=r"golden outputs of .* have an SQNR"):
        verify(made)


def test_equal_infinities_pass(tmp_path):
    found = [np.array([[1.0, -np.inf]], np.float32)]
    assert _sqnr_db(found, [found[0].copy()]) == 200


def test_outputs_of_another_shape_do_not_pass(tmp_path):
    made = write(tmp_path / "m.cw", golden=[np.zeros((4, 7), np.float32)])
    found = read(made)
    session = engine("fake").open(made / PAYLOAD, BUILD, PLAN)
    with pytest.raises(ArtifactError, match="outputs of other shapes"):
        check_golden(found, session)


def test_weights_without_code_need_the_model_itself(tmp_path):
    net = nn.Linear(6, 5)
    eager = Eager(Flat(net, flatten(((X,), {}))[1]))
    folder = write(tmp_path / "m.cw", build=Build(engine="eager", precision="fp32"), maker=eager)
    for model in (net, nn.DataParallel(net)):  # unwrapped as for optimize
        with load(folder, model=model) as opened:
            np.testing.assert_array_equal(opened(X)["scores"], net(torch.from_numpy(X)).detach().numpy())
    for model, told in (
        ("m.py:build", "the model is a str; give a torch.nn.Module"),
        (nn.Linear(3, 3), "give the model that it was made from"),
    ):
        with pytest.raises(CorewiseError, match=told):
            load(folder, model=model)
    with pytest.raises(EngineError, match="give the module"):
        load(folder)
    with pytest.raises(ArtifactError, match="a load test needs a model that can be exported"):
        loadtest(folder, clients=1)


def test_an_artifact_never_imports_a_foreign_engine(tmp_path):
    (tmp_path / "foreign_engine.py").write_text("raise SystemExit('imported')")
    made = write(tmp_path / "f.cw")
    rewrite(made, lambda content: content["build"].update(engine="foreign_engine:Engine"))
    for use in (load, verify):
        with pytest.raises(ArtifactError, match="import foreign_engine first if you trust it"):
            use(made)
