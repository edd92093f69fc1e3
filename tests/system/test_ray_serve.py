"""corewise serve --ray on a real Ray: the same answers, replicas that are killed or replaced, and its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from command_line import command
from ray_tools import TOKENS, Cluster, started_ray
from serving_tools import fake_measurement, image_artifact, serving, token_artifact
from waiting import eventually, free_port

from corewise.artifact import tuned
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import packed
from corewise.records.build import Plan
from corewise.records.tuned import Machine, Tuned
from corewise.serving import oip

HTTP, GRPC = free_port(), free_port()
URL = f"http://127.0.0.1:{HTTP}"
CLIENTS = 4

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts, another one of the same form, and a model of images."""
    made = tmp_path_factory.mktemp("serve")
    token_artifact(made / "words.cw")
    token_artifact(made / "other.cw", vocabulary=98)
    image_artifact(made / "photos.cw")
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A node that says that it has four CPUs."""
    with started_ray(4) as cluster:
        yield cluster


@contextmanager
def deployed(
    folder: Path, cluster: Cluster, *artifacts: str, replicas: int = 1, cpus: int = 1, said: list[str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """``corewise serve --ray`` in a process of its own, whose replicas all run; ``said`` gets its lines."""
    options = ["--ray", cluster.address, "--http", f"127.0.0.1:{HTTP}", "--grpc", f"0.0.0.0:{GRPC}"]
    options += ["--replicas", replicas, "--cpus", cpus, "--retune", 0, "--drain", "10s"]
    process = subprocess.Popen(
        command("serve", *artifacts, *options, quick=False),
        cwd=folder,
        env={**os.environ, **TOKENS},
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [] if said is None else said
    try:
        assert process.stdout is not None
        while sum(line.startswith("ready: ") for line in said) < replicas * len(artifacts):
            line = process.stdout.readline()
            assert line, said
            said.append(line)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)
        process.kill()
        process.communicate()


def body(*tokens: int) -> dict[str, Any]:
    data = list(tokens)
    return {"inputs": [{"name": "tokens", "shape": [1, len(data)], "datatype": "INT64", "data": data}]}


def infer(channel: grpc.Channel, *tokens: int) -> Any:
    request = oip.message("ModelInferRequest")(model_name="words")
    given = request.inputs.add(name="tokens", datatype="INT64", shape=[1, len(tokens)])
    given.contents.int64_contents.extend(tokens)
    call = channel.unary_unary(
        f"/{oip.SERVICE}/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=oip.message("ModelInferResponse").FromString,
    )
    return call(request, metadata=(("application", "words"),), timeout=60)


def test_answers_are_those_of_corewise_serve(folder: Path, cluster: Cluster) -> None:
    check_answers(folder, cluster)


@pytest.mark.slow
def test_answers_through_haproxy_are_those_of_corewise_serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with started_ray(4) as cluster:
        check_answers(folder, cluster)


@pytest.mark.slow
def test_a_proxy_of_another_kind_than_the_clusters_is_one_line(folder: Path) -> None:
    with started_ray(1, RAY_SERVE_ENABLE_HA_PROXY="1") as cluster:
        ended = subprocess.run(
            command("serve", "words.cw", "--ray", cluster.address, "--http", f"127.0.0.1:{HTTP}", quick=False),
            cwd=folder,
            env={**os.environ, **TOKENS, "RAY_SERVE_ENABLE_HA_PROXY": "0"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith("corewise: Ray Serve's proxies do not start: "), ended.stderr
    assert "RAY_SERVE_ENABLE_HA_PROXY is the same there as here" in ended.stderr


def check_answers(folder: Path, cluster: Cluster) -> None:
    """The same over HTTP and gRPC from replicas of ``cluster`` as from ``corewise serve`` here."""
    photo = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    requests = [
        ("words", "GET", "/v2/models/words", {}),
        ("words", "GET", "/v2/health/ready", {}),
        ("words", "GET", "/v2/models/words/ready/", {"follow_redirects": False}),
        ("words", "POST", "/v2/models/words/infer", {"json": body(1, 2, 3)}),
        ("words", "POST", "/v2/models/words/infer", {"json": body(1, 2, 999)}),
        ("words", "POST", "/v2/models/words/infer", {"content": b"{"}),
        ("words", "POST", "/v2/models/none/infer", {"json": body(1)}),
        ("words", "POST", "/v1/embeddings", {"json": {"model": "words", "input": ["w1 w2", "w3"]}}),
        (
            "photos",
            "POST",
            "/v2/models/photos/classify",
            {"content": png(photo), "headers": {"content-type": "image/png"}},
        ),
        ("photos", "POST", "/v2/models/photos/classify", {"content": b"no image"}),
    ]
    with serving(folder / "words.cw", folder / "photos.cw") as alone:
        expected = [alone.client.request(method, alone.url + path, **more) for _, method, path, more in requests]
        with grpc.insecure_channel(alone.grpc) as channel:
            expected_rpc = infer(channel, 1, 2, 3)
            with pytest.raises(grpc.RpcError) as refused:
                infer(channel, 999)
    with deployed(folder, cluster, "words.cw", "photos.cw") as process, httpx.Client(timeout=60) as client:
        for (name, method, path, more), there in zip(requests, expected, strict=True):
            got = client.request(method, f"{URL}/{name}{path}", **more)
            content = there.content.replace(b"photos, words", b"words")  # a replica has one model
            assert (got.status_code, got.content) == (there.status_code, content), path
            assert got.headers.get("content-type") == there.headers.get("content-type")
            assert len(got.headers.get_list("x-request-id")) == 1
        assert "corewise_queue_seconds_count" in client.get(f"{URL}/words/metrics").text
        assert client.get(f"{URL}/nothing/v2").status_code == 404
        assert eventually(lambda: "ray_corewise_queue_seconds_count{" in client.get(cluster.metrics).text)
        with grpc.insecure_channel(f"127.0.0.1:{GRPC}") as channel:
            assert infer(channel, 1, 2, 3).outputs == expected_rpc.outputs
            assert infer(channel, 1, 2, 3).raw_output_contents == expected_rpc.raw_output_contents
            with pytest.raises(grpc.RpcError) as refused_there:
                infer(channel, 999)
        assert refused_there.value.code() == refused.value.code()
        assert refused_there.value.details() == refused.value.details()
        assert cores_of(cluster.processes("ray::ServeReplica:")) == min(2, len(os.sched_getaffinity(0)))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said == "draining: accepted requests are finished, new ones are refused\n"
    assert eventually(lambda: not cluster.processes("ray::ServeReplica:"))


def png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def cores_of(pids: Sequence[int]) -> int:
    """On how many hardware threads these processes are pinned together."""
    return len(set().union(*(os.sched_getaffinity(pid) for pid in pids)))


class Callers:
    """Clients that send one request after the other; a context manager that ends them."""

    def __init__(self, rows: dict[bytes, str]) -> None:
        """``rows`` names the answers that are right."""
        self.ended: Counter[str] = Counter()
        self._rows, self._stop = rows, threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(CLIENTS)]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    got = client.post(f"{URL}/v2/models/words/infer", json=body(1, 2, 3))
                    name = self._rows.get(got.content, "wrong") if got.status_code == 200 else str(got.status_code)
                except httpx.HTTPError as error:
                    name = type(error).__name__
                self.ended[name] += 1


def refused(folder: Path, cluster: Cluster) -> str:
    """What the command says of an artifact that the replicas do not find."""
    unseen = "words=/proc/self/cwd/words.cw"  # which is another folder for another process
    options = [
        "--ray",
        cluster.address,
        "--http",
        f"127.0.0.1:{HTTP}",
        "--retune",
        "0",
        "--cpus",
        "1",
        "--replicas",
        "2",
    ]
    done = subprocess.run(
        command("serve", unseen, *options, quick=False),
        cwd=folder,
        env={**os.environ, **TOKENS},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("corewise: node ")
    return line


@pytest.mark.slow
def test_an_artifact_that_a_node_cannot_read_is_named_with_the_node(folder: Path, cluster: Cluster) -> None:
    line = refused(folder, cluster)
    assert "there is no artifact /proc/self/cwd/words.cw there; put it into a folder that all nodes share" in line


@pytest.mark.slow
def test_a_replica_that_is_killed_takes_only_its_own_requests_and_an_update_loses_none(
    folder: Path, cluster: Cluster
) -> None:
    answers: dict[bytes, str] = {}
    for name in ("words", "other"):
        with serving(f"words={folder / name}.cw") as alone:
            answers[alone.post("/v2/models/words/infer", json=body(1, 2, 3)).content] = name
    with deployed(folder, cluster, "words.cw", replicas=2) as first:
        with Callers(answers) as callers:
            assert eventually(lambda: callers.ended["words"] > 50)
            os.kill(cluster.processes("ray::ServeReplica:words")[0], signal.SIGKILL)
            answered = callers.ended["words"]
            assert eventually(lambda: callers.ended["words"] > answered + 50)
            assert eventually(lambda: len(cluster.processes("ray::ServeReplica:words")) == 2)
        failed = {name: count for name, count in callers.ended.items() if name != "words"}
        assert set(failed) <= {"500", "502", "503"}, failed
        assert sum(failed.values()) <= CLIENTS, failed  # those that the replica had

        with Callers(answers) as callers:
            assert "there is no artifact" in refused(folder, cluster)
            assert eventually(lambda: callers.ended["words"] > 50)
            assert set(callers.ended) == {"words"}  # an update that fails changes nothing
            assert first.poll() is None

        with Callers(answers) as callers, deployed(folder, cluster, "words=other.cw", replicas=2):
            assert eventually(lambda: callers.ended["other"] > 50)
            until = time.monotonic() + 60
            assert first.wait(max(1, until - time.monotonic())) == 0  # the other command has taken over
            before = callers.ended["words"]
            assert eventually(lambda: callers.ended["other"] > 200)
            assert callers.ended["words"] == before  # none of the old replicas is left
            lost = {name: count for name, count in callers.ended.items() if name not in ("words", "other")}
            callers.__exit__()
        assert not lost
        assert first.stdout is not None
        assert "replaced: words was deployed again" in first.stdout.read()


@pytest.mark.slow
def test_each_replica_runs_the_plan_of_its_kind_of_machine(tmp_path: Path) -> None:
    """A node of two hardware threads, and one of a single one, that both have two CPUs for Ray."""
    cpu = inspect_cpu()
    if len(cpu.affinity) < 2:
        pytest.skip("there is one core")
    token_artifact(tmp_path / "words.cw")
    kinds = {
        Machine.of(replace(cpu, affinity=packed(cpu, 2))): Plan(threads_per_instance=1, instances=2, batch=3),
        Machine.of(replace(cpu, affinity=cpu.affinity[:1])): Plan(threads_per_instance=1, instances=1, batch=5),
    }
    for machine, plan in kinds.items():
        measured = tuple(fake_measurement(replace(plan, batch=batch), 1.0, 0.0) for batch in (1, plan.batch))
        entry = Tuned(machine=machine, created="2026-01-01", goal="throughput", plan=plan, measurements=measured)
        tuned.write(tmp_path / "words.cw", entry)
    said: list[str] = []
    with (
        started_ray(2) as cluster,
        cluster.joined(2, cpu.affinity[0]),
        deployed(tmp_path, cluster, "words.cw", replicas=2, cpus=2, said=said),
        httpx.Client(timeout=60) as client,
    ):
        answers = {client.post(f"{URL}/v2/models/words/infer", json=body(1, 2, 3)).content for _ in range(40)}
    ready = sorted(line.split(", ")[2:-1] for line in said if line.startswith("ready: "))
    expected = sorted(f"{plan.label} ({machine.label})".split(", ") for machine, plan in kinds.items())
    assert ready == expected
    assert len(answers) == 1


TUNE = """
import logging, os, sys
from pathlib import Path
from corewise.artifact import read
from corewise.cluster.replica import tune_once
from corewise.machine.inspect import inspect_cpu
logging.basicConfig(level="INFO")
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
cpu = inspect_cpu()
tune_once(read(Path(sys.argv[1]), cpu=cpu), cpu, 0.5)
"""


def test_of_several_replicas_on_a_new_kind_of_machine_one_searches_its_plan(folder: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, of which the artifact has a plan")
    started = [
        subprocess.Popen([sys.executable, "-c", TUNE, folder / "other.cw"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("no plan is known" in text for text in said) == 1, said
    (entry,) = tuned.read(folder / "other.cw")
    assert entry.machine.hardware_threads == 1
