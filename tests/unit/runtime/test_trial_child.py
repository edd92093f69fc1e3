"""The trial child: what it opens, and when again."""

import json
from dataclasses import replace
from pathlib import Path

from corewise.engines.fake import MODEL, Fake
from corewise.records.build import Build, Plan
from corewise.runtime.messages import BuildPayload, OpenPayload
from corewise.runtime.worker import TrialChild


class Counting(Fake):
    """Notes the plans with which it opens, and builds nothing."""

    def __init__(self) -> None:
        self.opened: list[Plan] = []

    def build(self, build_inputs, build, folder):
        return ()

    def open(self, folder, build, plan):
        self.opened.append(plan)
        return super().open(folder, build, plan)


class Child(TrialChild):
    def __init__(self, engine: Counting) -> None:
        super().__init__()
        self._engine = engine

    def engine(self, name: str) -> Counting:
        return self._engine


def test_what_is_open_is_not_opened_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("corewise.runtime.workspace.Workspace.read_build_inputs", lambda self: None)
    (tmp_path / MODEL).write_text(json.dumps({"inputs": 1, "outputs": []}))
    engine, build = Counting(), Build(engine="fake", precision="fp32")
    child, small = Child(engine), Plan(threads_per_instance=1, batch=1)
    large = replace(small, batch=4)
    wanted = OpenPayload(payload=tmp_path, build=build, plan=small)
    first = child.answer(wanted)
    assert child.answer(wanted) == first
    assert engine.opened == [small]
    child.answer(replace(wanted, plan=large))
    child.answer(BuildPayload(workspace=tmp_path, build=build, payload=tmp_path))
    child.answer(replace(wanted, plan=large))
    assert engine.opened == [small, large, large], "what was built since is opened"
    child._close()
