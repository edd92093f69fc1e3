"""What a node of a cluster checks before it opens an artifact: the job, the artifact, and whose code is in it."""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from places import GOLDEN

from corewise._version import __version__
from corewise.artifact import MANIFEST, identity
from corewise.artifact.format import digest
from corewise.artifact.model import Model
from corewise.cli.environment import settle_ray
from corewise.cluster import replica
from corewise.cluster.actor import Answerer
from corewise.cluster.applications import Scale, settings_of
from corewise.cluster.messages import Answered, Prepared, Task, answer, packed, packed_rows
from corewise.cluster.replica import Replica
from corewise.common.errors import ArtifactError, CorewiseError, EngineError, OutputError, SamplesError
from corewise.machine.inspect import inspect_cpu
from corewise.pipeline import ImageAsk, ImageRunner
from corewise.pipeline.job import folder_of
from corewise.pipeline.parts import Record
from corewise.pipeline.runner import Rejected
from corewise.records.pipeline import ImagePipeline
from corewise.records.report import Preprocess
from corewise.serving.host import Options
from corewise.serving.served import NATIVE, Source, Trust

CPU = inspect_cpu()

pytestmark = pytest.mark.skipif(CPU.architecture != "x86_64", reason="the golden artifact is for x86-64")


def of_engine(name: str, folder: Path) -> Path:
    """The golden artifact, as if it were of that engine."""
    shutil.copytree(GOLDEN / "schema-1", folder)
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    content["build"]["engine"] = name
    content["digest"] = digest(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A job whose folder was begun."""
    folder = tmp_path / "m.cw"
    shutil.copytree(GOLDEN / "schema-1", folder)
    folder_of(tmp_path / "out", several=True).about.parent.mkdir()
    folder_of(tmp_path / "out", several=True).about.write_text("{}")
    return Task(
        version=__version__,
        artifact=folder,
        identity=identity(folder),
        output=str(tmp_path / "out"),
        job=hashlib.sha256(b"{}").hexdigest(),
        several=True,
        prompt=None,
        ask=None,
        preprocess=None,
        seen=(),
    )


def prepared(task: Task) -> Prepared:
    told = Answerer(packed(task), keep_cores=lambda cores: CPU).prepare(1)
    return answer(Prepared, told, "node a")


def test_a_node_that_has_the_drivers_artifact_and_folder_takes_part(task: Task) -> None:
    assert prepared(task).pid == os.getpid()


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (
            {"version": "0.0.1"},
            EngineError,
            f"node a: it has corewise {__version__}; install 0.0.1",
        ),
        ({"artifact": Path("/none.cw")}, ArtifactError, "node a: there is no artifact /none.cw there; put it into"),
        ({"identity": "0" * 64}, ArtifactError, "m.cw is another artifact there; give every node the same one"),
        ({"job": "0" * 64}, OutputError, "out is not the job's folder there; write to a folder that all nodes share"),
    ],
)
def test_a_node_that_has_others_takes_no_part(
    task: Task, change: dict[str, Any], kind: type[CorewiseError], what: str
) -> None:
    with pytest.raises(kind, match=what):
        prepared(replace(task, **change))


def test_a_node_checks_every_file_and_imports_no_engine_that_it_does_not_know(task: Task, tmp_path: Path) -> None:
    foreign = of_engine("foreign_engine:Engine", tmp_path / "foreign.cw")
    with pytest.raises(ArtifactError, match="import foreign_engine first if you trust it"):
        prepared(replace(task, artifact=foreign, identity=identity(foreign)))
    with (task.artifact / "report.md").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ArtifactError, match=r"report\.md is truncated or altered"):
        prepared(task)


class Sizes(ImageRunner):
    """Answers each photo with the size of its file."""

    def __init__(self) -> None:
        self.pipeline = ImagePipeline(task="vectors", preprocess=Preprocess(), labels=())

    def answers(self, items: Any, ask: Any = None) -> Iterator[Any]:
        for path in map(Path, items):
            yield np.array([path.stat().st_size], np.float32) if path.is_file() else Rejected("cannot be read")


def test_a_node_that_has_lost_the_inputs_sets_none_of_them_aside(task: Task, tmp_path: Path) -> None:
    """It would take one part after the other, as nothing is faster than a file that is not there."""
    photos = [tmp_path / "photos" / f"{row}.jpg" for row in range(3)]
    photos[0].parent.mkdir()
    for photo in photos[:2]:
        photo.touch()
    node = Answerer(packed(replace(task, seen=(str(photos[0]),), ask=ImageAsk())), keep_cores=lambda cores: CPU)
    node._model = cast(Model, SimpleNamespace(images=Sizes()))
    rows = packed_rows([Record(row, str(photo), "", str(photo), "") for row, photo in enumerate(photos)])
    found = answer(Answered, node.answer(0, rows), "node a")
    assert found == Answered(rows=3, failed=1, example=f"{photos[2]} cannot be read")
    shutil.rmtree(photos[0].parent)
    with pytest.raises(SamplesError, match=r"^node a: there is no input .*0\.jpg there; put the inputs into a folder"):
        answer(Answered, node.answer(1, rows), "node a")
    assert not list((tmp_path / "out").glob("*part-000001*"))


# --- replicas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NATIVE)
def test_code_that_nobody_vouched_for_is_not_opened_by_a_replica_nor_to_search_its_plan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = of_engine(name, tmp_path / "m.cw")
    source, told = Source.of(str(folder)), rf"m\.cw holds code \({name}\), which runs with this server's rights"
    with pytest.raises(ArtifactError, match=told):
        settings_of(source, Options(trust=Trust(digests=frozenset({"0" * 64}))), Scale())
    for trust in (Trust(everything=True), Trust(digests=frozenset({identity(folder)}))):
        settings = settings_of(source, Options(trust=trust), Scale())
        assert replica._checked(settings, CPU).folder == folder
    with pytest.raises(ArtifactError, match=told):
        replica._checked(replace(settings, trust=False, trusted=()), CPU)


class Open(grpc.GenericRpcHandler):
    """A cluster's head that answers whoever asks."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")


@pytest.fixture
def open_head() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), [Open()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_a_replica_does_not_start_on_a_cluster_that_takes_commands_from_anyone(
    open_head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    context = SimpleNamespace(gcs_address=open_head, get_node_id=lambda: "a")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(replica, "to_stderr", lambda level: None)
    settings = settings_of(Source.of(str(GOLDEN / "schema-1")), Options(), Scale(retune_s=0.0))
    with pytest.raises(EngineError, match=f"the Ray cluster at {open_head} runs code for anyone who reaches it"):
        asyncio.run(Replica(packed(settings))._open())


# --- the command's own cluster ------------------------------------------------------------------------------------


def test_a_cluster_that_a_command_starts_wants_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "before")
    settle_ray("auto")
    assert os.environ["RAY_AUTH_TOKEN"] == "before", "that of the cluster"
    tokens = set()
    for _ in range(2):
        settle_ray("local")
        assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert {len(token) for token in tokens} == {64}
    assert len(tokens) == 2
