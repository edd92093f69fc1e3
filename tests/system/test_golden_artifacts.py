"""Every artifact format ever released still opens, verifies and computes what it did (tests/golden/schema-*)."""

import json

import numpy as np
import pytest
from places import GOLDEN

from corewise import ArtifactError, artifact
from corewise.artifact.open import load, verify
from corewise.machine.inspect import inspect_cpu

ARTIFACTS = sorted(GOLDEN.glob("schema-*"))

pytestmark = [
    pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64"),
    pytest.mark.filterwarnings("ignore:.* was tuned on .*, this is .*"),
]


def test_the_current_schema_has_one():
    assert f"schema-{artifact.SCHEMA}" in {path.name for path in ARTIFACTS}


@pytest.mark.parametrize("folder", ARTIFACTS, ids=lambda path: path.name)
def test_it_opens_and_computes_what_it_did(folder):
    assert verify(folder).sqnr_db > 20
    found = artifact.read(folder, cpu=inspect_cpu())
    (inputs,), (expected,) = found.golden()
    with load(folder) as model:
        np.testing.assert_allclose(model(inputs), expected, atol=0.05 * np.abs(expected).max())
    assert found.report.choice.winner == found.manifest.build


@pytest.mark.parametrize("folder", ARTIFACTS, ids=lambda path: path.name)
def test_one_changed_byte_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    for file in folder.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(folder)).write_bytes(file.read_bytes())
    name = next(name for name in json.loads((copy / "manifest.json").read_text())["files"] if "payload" in name)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="altered"):
        load(copy)
