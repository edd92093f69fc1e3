"""cluster.applications, .serving and .replica, as far as they need no cluster."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import GOLDEN

from corewise._version import __version__
from corewise.artifact import read, tuned
from corewise.cluster import applications, replica
from corewise.cluster.applications import Scale, settings_of
from corewise.cluster.messages import packed, unpacked
from corewise.cluster.replica import Mounted
from corewise.cluster.serving import HttpThere, _ports, check_running, failure, serve_on_ray
from corewise.cluster.settings import Settings
from corewise.common.errors import ArtifactError, EngineError, InputError
from corewise.machine.inspect import inspect_cpu
from corewise.records.tuned import Machine
from corewise.serving.host import Options
from corewise.serving.served import Source, Trust

ARTIFACT = GOLDEN / "schema-1"
SOURCE = Source(name="m", version="1", folder=ARTIFACT)


def test_what_replicas_are_told_crosses_as_it_is_and_without_the_tokens() -> None:
    options = Options(tokens=("secret",), trust=Trust(digests=frozenset({"b", "a"})), cors_origins=("*",))
    told = settings_of(SOURCE, options, Scale(cpus=3, retune_s=0.0))
    crossed = packed(told)
    assert "secret" not in crossed
    assert unpacked(Settings, crossed) == told
    assert told.tokens.admit(b"Bearer secret")
    assert not told.tokens.admit(b"Bearer other")
    theirs = told.options(2**30)
    assert (theirs.trust, theirs.cors_origins, theirs.limits, theirs.memory_bytes) == (
        options.trust, options.cors_origins, options.limits, 2**30,
    )  # fmt: skip


def test_a_single_token_is_one_and_not_its_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applications, "require_serve", lambda: None)
    monkeypatch.setattr(applications, "bound", lambda settings, scale: settings)
    told = applications.deployment(ARTIFACT, tokens="secret").tokens
    assert told.admit(b"Bearer secret")
    assert not told.admit(b"Bearer s")


def test_a_replica_has_the_cpus_of_the_plan_unless_told_otherwise() -> None:
    assert settings_of(SOURCE, Options(), Scale()).cpus == 2
    assert settings_of(SOURCE, Options(), Scale(cpus=4)).cpus == 4


@pytest.mark.parametrize(
    ("replicas", "said"),
    [((0, 1), "0 to 1"), ((3, 2), "3 to 2"), (("2", "8"), "2 to 8"), ("2-8", "'2-8'"), ((2,), r"\(2,\)")],
)
def test_replicas_that_are_none(replicas: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"there cannot be {said} replicas; give 1 or more, or the fewest and"):
        Scale(replicas=replicas)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"cpus": 0}, "a replica cannot have 0 CPUs; give a whole number, 1 or more"),
        ({"cpus": 1.5}, "a replica cannot have 1.5 CPUs"),
        ({"queue_s": 0.0}, "the queue cannot be kept at 0 s; give more than 0"),
    ],
)
def test_replicas_of_no_cpus_or_for_no_queue(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Scale(**wrong)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (Options(http=None), "on a cluster HTTP listens on a port; give --http HOST:PORT"),
        (Options(http=Path("/a")), "on a cluster HTTP listens on a port; give --http HOST:PORT"),
        (Options(grpc=("127.0.0.1", 9000)), "listens on all addresses; give --grpc 0.0.0.0:PORT"),
        (Options(grpc=("0.0.0.0", 9000), certificate=Path("a"), key=Path("b")), "no TLS of its own; leave out"),
        (Options(admin=("127.0.0.1", 1)), "there are no admin ports on a cluster"),
        (Options(grace_s=5.0), "takes requests away from a replica before it ends; leave out --grace"),
    ],
)
def test_ports_that_ray_serve_does_not_have(options: Options, what: str) -> None:
    with pytest.raises(InputError, match=what):
        _ports(options)


HERE = HttpThere("127.0.0.1", 8000, tls=False)


@pytest.mark.parametrize(
    ("there", "grpc_there", "what"),
    [
        (HERE._replace(port=80), 9000, "with HTTP on 127.0.0.1:80; give --http 127.0.0.1:80$"),
        (HERE._replace(host="0.0.0.0"), 9000, "with HTTP on 0.0.0.0:8000; give --http 0.0.0.0:8000$"),
        (HERE._replace(tls=True), 9000, "with TLS; give --tls-cert and --tls-key$"),
        (HERE, None, "without a gRPC port for corewise; leave out --grpc$"),
        (HERE, 9001, "with gRPC on port 9001; give --grpc 0.0.0.0:9001$"),
    ],
)
def test_a_ray_serve_that_runs_on_other_ports(there: HttpThere, grpc_there: int | None, what: str) -> None:
    with pytest.raises(InputError, match=f"^Ray Serve runs on this cluster already, {what}"):
        check_running(there, grpc_there, HERE, 9000)
    check_running(there, grpc_there, there, None)
    check_running(HERE, 9000, HERE, 9000)


@pytest.mark.parametrize(
    ("address", "sources", "route", "what"),
    [
        ("head", [SOURCE], None, "'head' is not an address of a Ray cluster"),
        ("ray://head:10001", [SOURCE], None, "run this on a node, with --ray auto"),
        ("local", [SOURCE, SOURCE], None, "two artifacts have one name; give NAME=FOLDER"),
        ("local", [SOURCE, Source.of(f"n={ARTIFACT}")], "/x", "--route is for one artifact"),
        ("127.0.0.1:1", [SOURCE], None, "no Ray cluster answers at 127.0.0.1:1; check the address"),
        ("127.0.0.1:1", [Source.of("nowhere.cw")], None, "nowhere.cw"),
    ],
)
def test_what_is_wrong_is_said_before_a_cluster_starts(
    address: str, sources: list[Source], route: str | None, what: str
) -> None:
    pytest.importorskip("ray")
    with pytest.raises((InputError, EngineError, ArtifactError), match=what):
        serve_on_ray(address, sources, Options(), Scale(), route=route)


def test_why_a_replica_does_not_start_is_said_in_one_line() -> None:
    told = (
        "Traceback (most recent call last):\n  File ...\n"
        "corewise.common.errors.ArtifactError: node a (10.0.0.1): there is no artifact /m.cw there; put it into a "
        "folder that all nodes share\n\nThe above exception ...\nRuntimeError: replica failed"
    )
    error = failure("m", told)
    assert isinstance(error, ArtifactError)
    assert str(error) == (
        "node a (10.0.0.1): there is no artifact /m.cw there; put it into a folder that all nodes share"
    )
    absent = failure("m", "Traceback\nModuleNotFoundError: No module named 'corewise'\n")
    assert str(absent) == (
        f"m does not start: corewise is not installed on a node; install corewise {__version__} on every node"
    )
    assert str(failure("m", "out of luck\n")) == "m does not start: out of luck; see the logs of Ray Serve's replicas"


def test_a_replica_serves_under_the_plan_that_it_has_if_no_other_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(ARTIFACT, tmp_path / "m.cw")
    cpu = inspect_cpu()
    found = read(tmp_path / "m.cw")
    assert Machine.of(found.report.cpu) != Machine.of(cpu)

    def fail(folder: Path, budget_s: float) -> None:
        raise EngineError("no plan can be measured", "free memory")

    monkeypatch.setattr(replica, "find_plan", fail)
    with caplog.at_level(logging.INFO, "corewise.serve"):
        replica.tune_once(found, cpu, 1.0)
    assert caplog.messages[-1] == "no plan was found: no plan can be measured; free memory"
    assert not tuned.read(tmp_path / "m.cw")


def test_a_mounted_app_sees_its_own_paths_and_ends_when_it_is_told() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], scope["root_path"]))
        headers = [(b"x-request-id", b"a"), (b"location", b"/v2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def close() -> None:
        seen.append("closed")

    async def run() -> list[Any]:
        sent: list[Any] = []
        told = iter(["lifespan.startup", "lifespan.shutdown"])

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> dict[str, str]:
            return {"type": next(told)}

        mounted = Mounted(app, close)
        await mounted({"type": "lifespan"}, receive, send)
        for path, root in (("/m/v2", "/m"), ("/v2", ""), ("/m", "/m")):
            await mounted({"type": "http", "path": path, "root_path": root}, receive, send)
        await mounted({"type": "websocket"}, receive, send)
        return sent

    sent = asyncio.run(run())
    assert seen == ["closed", ("/v2", ""), ("/v2", ""), ("/", "")]
    assert [message["type"] for message in sent[:2]] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert [message["headers"] for message in sent[2:4]] == [[(b"location", b"/m/v2")], [(b"location", b"/v2")]]
    assert sent[-1] == {"type": "websocket.close"}
