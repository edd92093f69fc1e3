"""The trial child: what it opens, and when again."""

import json
from pathlib import Path

from corewise.engines.fake import MODEL, Fake
from corewise.records.build import Build, Plan
from corewise.runtime.client import InProcess
from corewise.runtime.workspace import Workspace


class Counting(Fake):
    """Notes the plans with which it opens, and builds nothing."""

    def __init__(self) -> None:
        self.opened: list[Plan] = []

    def build(self, build_inputs, build, folder):
        return ()

    def open(self, folder, build, plan):
        self.opened.append(plan)
        return super().open(folder, build, plan)


def test_what_is_open_is_not_opened_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.workspace.Workspace.read_build_inputs", lambda self: None)
    (tmp_path / MODEL).write_text(json.dumps({"inputs": 1, "outputs": []}))
    engine, build = Counting(), Build(engine="fake", precision="fp32")
    small, large = (Plan(threads_per_instance=1, batch=batch) for batch in (1, 4))
    with InProcess(engine) as client:
        first = client.open(tmp_path, build, small)
        assert client.open(tmp_path, build, small) == first
        assert engine.opened == [small]
        client.open(tmp_path, build, large)
        client.build(Workspace(tmp_path), build, tmp_path)
        client.open(tmp_path, build, large)
    assert engine.opened == [small, large, large], "what was built since is opened"
