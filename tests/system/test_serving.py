"""A live server, and clients that nobody here wrote."""

import concurrent.futures
import gzip
import http.server
import json
import queue
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from functools import partial

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from certificates import self_signed
from command_line import several
from places import ROOT
from requests_to_fakes import OUTPUTS, ROWS, expected, infer, output, tensor
from serving_tools import ARTIFACT, fake_artifact, serving
from waiting import eventually

from corewise.batching import NotServed
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan
from corewise.serving.models import Models
from corewise.serving.served import Served, Source, Trust

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

PROJECT = ROOT
CLOSE = 5e-3
"""Its int8 is scaled by what is in the call."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    shutil.copytree(ARTIFACT, folder / "net.cw")
    fake = fake_artifact(folder / "fake.cw", Plan(threads_per_instance=1, instances=2, batch=4), fails_above=100.0)
    with serving(folder / "net.cw", f"toy@3={fake}", f"toy@12={fake}") as found:
        yield found


# --- the protocol, by its own clients -----------------------------------------------------------------------------


def test_health_and_descriptions(server):
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/ready").json() == {"ready": True}
    assert server.get("/v2/models/net/ready").json()["ready"] is True
    described = server.get("/v2").json()
    assert described["name"] == "corewise"
    assert "binary_tensor_data" in described["extensions"]
    model = server.get("/v2/models/toy").json()
    assert model["versions"] == ["3", "12"]
    assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 12, 12]}]
    assert server.get("/v2/models/toy/versions/3").json()["name"] == "toy"


def test_tritons_http_client_gets_the_golden_outputs(server):
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net")
        assert client.get_model_metadata("net")["platform"] == "corewise_onnxruntime"
        for binary in (True, False):
            given = triton_http.InferInput("input", ROWS.shape, "FP32")
            given.set_data_from_numpy(ROWS, binary_data=binary)
            asked = triton_http.InferRequestedOutput("output_0", binary_data=binary)
            found = client.infer("net", [given], outputs=[asked], request_id="seven")
            np.testing.assert_allclose(found.as_numpy("output_0"), OUTPUTS[0], atol=CLOSE)
            assert found.get_response()["id"] == "seven"
        found = client.infer("net", [given])
        np.testing.assert_allclose(found.as_numpy("output_0"), OUTPUTS[0], atol=CLOSE)
        packed = client.infer("net", [given], request_compression_algorithm="gzip")
        np.testing.assert_allclose(packed.as_numpy("output_0"), OUTPUTS[0], atol=CLOSE)
        counted = client.get_inference_statistics("net")["model_stats"][0]
        assert counted["inference_count"] >= 4 * len(ROWS)
        with pytest.raises(triton_http.InferenceServerException, match="there is no model 'nothing'"):
            client.infer("nothing", [given])


def test_tritons_grpc_client_gets_the_golden_outputs(server):
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net")
        assert list(client.get_model_metadata("toy").versions) == ["3", "12"]
        given = triton_grpc.InferInput("input", ROWS.shape, "FP32")
        given.set_data_from_numpy(ROWS)
        found = client.infer("net", [given], request_id="seven")
        np.testing.assert_allclose(found.as_numpy("output_0"), OUTPUTS[0], atol=CLOSE)
        assert found.get_response().id == "seven"
        for order in (1, -1, 1):  # the message is known but for its tensor
            given.set_data_from_numpy(np.ascontiguousarray(ROWS[::order]))
            np.testing.assert_allclose(
                client.infer("net", [given]).as_numpy("output_0"), OUTPUTS[0][::order], atol=CLOSE
            )
        assert client.get_inference_statistics("net").model_stats[0].inference_count >= len(ROWS)
        with pytest.raises(triton_grpc.InferenceServerException, match="NOT_FOUND"):
            client.infer("nothing", [given])
        wrong = triton_grpc.InferInput("input", [1, 2], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 2), np.float32))
        with pytest.raises(triton_grpc.InferenceServerException, match="INVALID_ARGUMENT"):
            client.infer("net", [wrong])


KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferInput, InferRequest, InferenceGRPCClient, InferenceRESTClient, RESTConfig

rows, http, rpc, folder = np.load(sys.argv[1]), *sys.argv[2:]

async def ask(side, kind):
    given = InferInput("input", list(rows.shape), "FP32")
    given.set_data_from_numpy(rows, binary_data=kind == "binary")
    if side == "rest":
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
        assert await client.is_server_ready(http)
        assert await client.is_server_live(http)
        assert await client.is_model_ready(http, "net")
        return await client.infer(http, InferRequest(model_name="net", infer_inputs=[given]), model_name="net")
    client = InferenceGRPCClient(url=rpc)
    assert await client.is_server_ready()
    assert await client.is_server_live()
    assert await client.is_model_ready("net")
    return await client.infer(InferRequest(model_name="net", infer_inputs=[given]))

async def main():
    for side in ("rest", "grpc"):
        for kind in ("json", "binary"):
            np.save(f"{folder}/{side}-{kind}.npy", (await ask(side, kind)).outputs[0].as_numpy())

asyncio.run(main())
"""


def test_kserves_clients_get_the_golden_outputs(server, tmp_path):
    # In a process of their own: their protobuf names are Triton's.
    np.save(tmp_path / "in.npy", ROWS)
    command = [sys.executable, "-c", KSERVE, tmp_path / "in.npy", server.url, server.grpc, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for side in ("rest", "grpc"):
        for kind in ("json", "binary"):
            found = np.load(tmp_path / f"{side}-{kind}.npy")
            np.testing.assert_allclose(found, OUTPUTS[0], atol=CLOSE, err_msg=f"{side} {kind}")


def test_answers_are_their_requests_own(server):
    random = np.random.default_rng(0)

    def ask(k):
        rows = random_rows[k]
        return np.abs(output(infer(server, rows)) - expected(rows)).max()

    random_rows = [random.standard_normal((1 + k % 3, 3, 12, 12)).astype(np.float32) for k in range(60)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert max(pool.map(ask, range(60))) < 1e-4


def test_more_rows_than_a_call_has_run_in_several(server):
    rows = np.random.default_rng(1).standard_normal((11, 3, 12, 12)).astype(np.float32)
    np.testing.assert_allclose(output(infer(server, rows)), expected(rows), atol=1e-4)
    many = np.zeros((1100, 3, 12, 12), np.float32)
    refused = infer(server, many)
    assert refused.status_code == 400
    assert "more rows than a call may have" in refused.json()["error"]


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "match"),
    [
        ("/v2/models/none/infer", 404, "there is no model 'none'"),
        ("/v2/models/toy/versions/4/infer", 404, "has no version '4'"),
        ("/v2/nothing", 404, "there is nothing at this path"),
        ("/v2/health/live", 405, "this path has another method"),
        ("/v2/models/net/classify", 501, "was not made from images"),
    ],
)
def test_wrong_paths_are_told(server, path, status, match):
    found = server.post(path, content=b"{}")
    assert found.status_code == status
    assert match in found.json()["error"]


def test_wrong_bodies_are_told(server):
    path = "/v2/models/toy/infer"
    length = "inference-header-content-length"
    bomb = gzip.compress(b"[" * (80 * 2**20))
    for status, match, options in (
        (400, "cannot be read", {"content": b"{"}),
        (413, "more than 67108864 bytes", {"content": b" " * (65 * 2**20)}),
        (413, "100 times", {"content": bomb, "headers": {"content-encoding": "gzip"}}),
        (400, "the body is not gzip", {"content": b"nothing", "headers": {"content-encoding": "gzip"}}),
        (400, "not a whole gzip", {"content": bomb[:100], "headers": {"content-encoding": "gzip"}}),
        (415, "content encoding 'br'", {"content": b"{}", "headers": {"content-encoding": "br"}}),
        (
            400,
            "Inference-Header-Content-Length",
            {"content": b"{}", "headers": {length: "-1"}},
        ),
        (
            400,
            "Inference-Header-Content-Length",
            {"content": b"{}", "headers": {length: "9" * 50}},
        ),
        (400, "x-request-timeout-ms", {"content": b"{}", "headers": {"x-request-timeout-ms": "soon"}}),
        (400, "does not end", {"content": b'{"inputs":' + b"[" * 10**6}),
    ):
        found = server.post(path, **options)
        assert (found.status_code, match in found.json()["error"]) == (status, True), found.text[:300]
    assert infer(server, ROWS[:1]).status_code == 200


def test_a_call_that_fails_tells_its_own_requests_and_no_internals(server):
    bad = ROWS[:1] + 1000
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda k: infer(server, bad if k == 0 else ROWS[:1], headers={"x-request-id": f"r{k}"}), range(8))
        )
    failed = answers[0]
    assert failed.status_code == 500
    assert failed.json() == {"error": "the call failed; the server's log says why, at request r0"}
    assert failed.headers["x-request-id"] == "r0"
    assert any("an input is above 100" in line for line in server.logged)
    assert infer(server, ROWS[:1]).status_code == 200


def test_a_time_that_is_too_short_is_refused_at_once(server):
    found = infer(server, ROWS[:1], headers={"x-request-timeout-ms": "1"})
    assert found.status_code == 503
    # Which is said depends on how busy the machine is.
    assert re.search("even an idle instance would miss its deadline|try again later", found.json()["error"])
    assert infer(server, ROWS[:1], parameters={"timeout": 1000}).status_code == 503
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        given = triton_grpc.InferInput("input", [1, 3, 12, 12], "FP32")
        given.set_data_from_numpy(ROWS[:1])
        with pytest.raises(triton_grpc.InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("toy", [given], timeout=1000)


# --- drains and reloads ---------------------------------------------------------------------------------------------


def test_from_the_moment_they_drain_models_accept_nothing_and_finish_what_they_have(tmp_path):
    folder = fake_artifact(tmp_path / "slow.cw", Plan(threads_per_instance=1, instances=1, batch=1), call_ms=300.0)
    models = Models([Source.of(str(folder))], partial(Served, trust=Trust()))
    models.open()
    try:
        _, accepted = models.submit("slow", None, [ROWS[:1]], timeout_s=10.0, priority=0)
        models.draining = True
        assert not models.ready
        with pytest.raises(NotServed, match="stopping"):
            models.submit("slow", None, [ROWS[:1]], timeout_s=10.0, priority=0)
        assert models.drain(10.0)
        assert len(accepted.result().outputs) == 1
    finally:
        models.close(0.0)


def the_engine_after(server, before):
    """The process of the one engine, once it is another one than before."""
    found = []

    def is_another():
        found[:] = server.engine_pids()
        return len(found) == 1 and found != [before]

    assert eventually(is_another), found
    return found[0]


def test_a_reload_drops_nothing_and_an_unsound_artifact_changes_nothing(tmp_path):
    folder = fake_artifact(tmp_path / "live.cw", call_ms=5.0)
    with serving(folder) as server:
        (before,) = server.engine_pids()
        codes, stop = [], threading.Event()

        def keep_asking():
            while not stop.is_set():
                codes.append(infer(server, ROWS[:1], "live").status_code)

        asking = [threading.Thread(target=keep_asking) for _ in range(3)]
        for one in asking:
            one.start()
        assert httpx.post(f"{server.admin}/v2/repository/models/live/load", timeout=60).json() == {}
        after = the_engine_after(server, before)
        server.process.send_signal(signal.SIGHUP)
        now = the_engine_after(server, after)
        payload = folder / "payload" / "fake.json"
        payload.write_text(payload.read_text() + " ")
        found = httpx.post(f"{server.admin}/v2/repository/models/live/load", timeout=60)
        assert found.status_code == 500
        assert "is truncated or altered" in found.json()["error"]
        assert server.engine_pids() == [now]
        stop.set()
        for one in asking:
            one.join()
        assert set(codes) == {200}
        index = httpx.post(f"{server.admin}/v2/repository/index").json()
        assert index == [{"name": "live", "version": "1", "state": "READY"}]
        assert httpx.post(f"{server.admin}/v2/repository/models/none/load").status_code == 404


# --- who may, and how -------------------------------------------------------------------------------------------


def test_without_its_token_nobody_is_answered(tmp_path):
    (tmp_path / "tokens").write_text("first\nsecond\n")
    with serving(
        fake_artifact(tmp_path / "toy.cw"), "--token-file", tmp_path / "tokens", "--log-level", "debug"
    ) as server:
        assert server.get("/v2/health/ready").status_code == 200
        assert server.get("/v2/models/toy").status_code == 401
        assert infer(server, ROWS[:1], headers={"authorization": "Bearer third"}).status_code == 401
        assert infer(server, ROWS[:1], headers={"authorization": "Bearer second"}).status_code == 200
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            assert client.is_server_live()
            with pytest.raises(triton_grpc.InferenceServerException, match="UNAUTHENTICATED"):
                client.get_model_metadata("toy")
            assert client.get_model_metadata("toy", headers={"authorization": "Bearer first"}).name == "toy"
        assert not any("second" in line for line in server.logged)
        line = next(json.loads(one) for one in server.logged if '"path": "/v2/models/toy/infer"' in one)
        assert {"time", "level", "id", "method", "status", "ms"} <= set(line)


def test_tls_on_both_ports(tmp_path):
    certificate, key = self_signed(tmp_path)
    files = ("--tls-cert", certificate, "--tls-key", key)
    with serving(fake_artifact(tmp_path / "toy.cw"), *files) as server:
        url = server.url.replace("http:", "https:")
        assert httpx.get(f"{url}/v2/health/ready", verify=ssl.create_default_context(cafile=certificate)).json() == {
            "ready": True
        }
        with pytest.raises(httpx.HTTPError):
            server.get("/v2/health/ready")
        secure = {"ssl": True, "root_certificates": str(certificate)}
        with triton_grpc.InferenceServerClient(server.grpc, **secure) as client:
            assert client.is_server_ready()


def test_headers_that_do_not_come_end_the_connection(server, monkeypatch):
    started = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", server.ports["http"]), 120) as slow_one,
        socket.create_connection(("127.0.0.1", server.ports["grpc"]), 120) as silent_one,
    ):
        slow_one.sendall(b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\n")
        for each in (slow_one, silent_one):
            while each.recv(1000):
                pass
    assert time.monotonic() - started > 5
    with socket.create_connection(("127.0.0.1", server.ports["http"])) as long_one:
        long_one.settimeout(60)
        long_one.sendall(b"GET /v2 HTTP/1.1\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n")
        assert b" 400 " in long_one.recv(1000)
    assert server.get("/v2/health/live").status_code == 200


def anew(server, path):
    """What a connection of its own is answered; nothing where it is closed."""
    try:
        return httpx.get(server.url + path).json()
    except httpx.HTTPError:
        return {}


def test_too_many_connections_are_told_and_the_others_are_answered(tmp_path):
    # 100 are left for connections on each port, and 16 for health checks; half of each for one address. One over gRPC
    # takes three files.
    with serving(fake_artifact(tmp_path / "toy.cw"), most_files=528) as server:

        def crowd_of(source):
            place = ("127.0.0.1", server.ports["http"])
            return [socket.create_connection(place, 60, (source, 0)) for _ in range(70)]

        def told():
            return [one for one in select.select(crowd, [], [], 0)[0] if one.recv(1, socket.MSG_PEEK)]

        crowd = crowd_of("127.0.0.2")
        assert eventually(lambda: 12 <= len(told()) <= 20)  # the eight for health checks have two seconds
        assert anew(server, "/v2").get("name") == "corewise"
        assert infer(server, ROWS[:1]).status_code == 200
        crowd += crowd_of("127.0.0.1")
        assert eventually(lambda: len(told()) >= 24)
        answers = [one.recv(1000) for one in told()]
        assert all(b" 503 " in answer and b"too many connections" in answer for answer in answers)
        # Those that say nothing soon make room for health checks, and for nothing else.
        assert eventually(lambda: anew(server, "/v2/health/ready").get("ready"))
        assert "too many connections" in anew(server, "/v2")["error"]
        for one in crowd:
            one.close()
        assert eventually(lambda: server.get("/v2/health/ready").status_code == 200)
        assert infer(server, ROWS[:1]).status_code == 200
        text = server.get("/metrics").text
        (count,) = re.findall(r'^corewise_refused_connections_total{protocol="http"} (.+)$', text, re.MULTILINE)
        assert float(count) >= len(answers)


def test_requests_are_spans_of_their_clients_traces(tmp_path):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    came = queue.Queue()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            came.put((self.path, gzip.decompress(body) if packed else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *about):
            pass

    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
        with serving(fake_artifact(tmp_path / "toy.cw"), "--traces", environment=where) as server:
            headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "seven"}
            assert infer(server, ROWS[:1], headers=headers).status_code == 200
            assert infer(server, ROWS[:1, :1], headers=headers).status_code == 400
            assert server.stop() == 0
        collector.shutdown()
    spans, services = [], set()
    while not came.empty():
        path, body = came.get()
        assert path == "/v1/traces"
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            services |= {one.value.string_value for one in group.resource.attributes if one.key == "service.name"}
            spans += [span for scope in group.scope_spans for span in scope.spans]
    assert services == {"corewise"}
    assert [(span.name, span.trace_id.hex()) for span in spans] == [("infer toy", trace)] * 2
    found = [{one.key: one.value for one in span.attributes} for span in spans]
    assert [one["corewise.outcome"].string_value for one in found] == ["ok", "invalid"]
    assert found[0]["corewise.call_rows"].int_value == 1
    assert [one["corewise.request_id"].string_value for one in found] == ["seven"] * 2


def test_wrong_arguments_are_one_line(tmp_path):
    toy = fake_artifact(tmp_path / "toy.cw")
    free = ("--http", "127.0.0.1:0")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    (tmp_path / "empty").write_text("\n")
    wrong = (
        ([tmp_path / "none.cw", "--http", "127.0.0.1:0"], "none.cw does not exist"),
        ([tmp_path, "--http", "127.0.0.1:0"], "give a folder that corewise optimize wrote"),
        ([toy, toy], "two models are named toy, version 1"),
        ([toy, "--http", f"127.0.0.1:{port}"], "nothing can listen on 127.0.0.1"),
        ([toy, "--http", "8000"], "--http is 8000; give HOST:PORT"),
        ([toy, "--http", "none"], "the server has no port"),
        ([toy, "--token-file", tmp_path / "empty"], "holds no token"),
        ([toy, "--tls-cert", tmp_path / "empty"], "--tls-cert and --tls-key go together; give both or neither"),
        (
            [toy, *free, "--tls-cert", tmp_path / "empty", "--tls-key", tmp_path / "empty"],
            "TLS cannot use",
        ),
        ([toy, *free, "--shadow", "0.5"], "carries no fp32 program"),
    )
    found = several([("serve", *arguments) for arguments, _ in wrong])
    for (arguments, match), (code, printed, errors) in zip(wrong, found, strict=True):
        assert (code, printed) == (2, ""), (arguments, printed, errors)
        assert match in errors, errors
        assert errors.count("\n") == 1
    taken.close()


# --- people -------------------------------------------------------------------------------------------------------


def test_the_pages_say_how_it_goes(server):
    infer(server, ROWS[:1])
    page = server.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    found = server.get("/live.json").json()
    assert found["ready"] is True
    assert {"name", "rate_per_s", "p50_ms", "p99_ms", "waiting_rows", "plan", "engine"} <= set(found["models"][0])
    docs = server.get("/docs").text
    assert "net, version 1" in docs
    assert "FP32 (any, 3, 12, 12)" in docs
    text = server.get("/metrics").text
    assert 'corewise_requests_total{model="toy",outcome="ok",protocol="http",version="12"}' in text
    assert 'corewise_ready{model="net",version="1"} 1.0' in text
    assert set(server.get("/openapi.json").json()["paths"]) >= {"/v2/models/{name}/infer", "/v2/health/ready"}


def test_schemathesis_finds_no_server_error(server, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--max-examples", "10"]
    command += ["--checks", "not_a_server_error", "--seed", "0", "--no-color", "--request-timeout", "20"]
    # A deadline of less than a millisecond is answered with 503, rightly.
    command += ["-H", "X-Request-Timeout-Ms: 60000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert server.get("/v2/health/ready").status_code == 200


def test_noise_on_the_wire_harms_nobody(server):
    random = np.random.default_rng(0)
    body = json.dumps({"inputs": [tensor(ROWS[:1])]}).encode()
    head = f"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    whole = np.frombuffer(head + body, np.uint8)
    for _ in range(400):
        broken = whole.copy()
        places = random.integers(0, len(head) + 200, random.integers(1, 8))
        broken[places] = random.integers(0, 256, len(places))
        with socket.create_connection(("127.0.0.1", server.ports["http"])) as one:
            one.sendall(broken.tobytes()[: random.integers(1, len(broken))])
    with socket.create_connection(("127.0.0.1", server.ports["grpc"])) as one:
        one.sendall(random.integers(0, 256, 10_000).astype(np.uint8).tobytes())
    assert infer(server, ROWS[:1]).status_code == 200
    assert server.process.poll() is None
    assert not any("Traceback" in line for line in server.logged)


@pytest.mark.slow
def test_an_image_is_named_by_a_model_made_from_images(tmp_path, data_folder):
    from PIL import Image

    with np.load(data_folder / "cifar10.npz") as data:
        images, labels = data["images"][:300], data["labels"][:300]
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    command = ["optimize", "examples/resnet20.py:build", "--samples", str(tmp_path / "some.npz"), "--resize", "32"]
    command += ["--crop", "32", "--engine", "torch-int8", "--max-drop", "0.05", "--objective", "latency"]
    command += ["-o", str(tmp_path / "resnet20.cw")]
    done = subprocess.run(
        [sys.executable, "-m", "corewise.cli", *command], capture_output=True, text=True, timeout=300, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    with serving(tmp_path / "resnet20.cw", "--shadow", "1", "--trust") as server:
        right = 0
        for k, (pixels, label) in enumerate(zip(images[:40], labels[:40], strict=True)):
            Image.fromarray(pixels).save(tmp_path / f"{k}.png")
            found = server.post("/v2/models/resnet20/classify?top=2", content=(tmp_path / f"{k}.png").read_bytes())
            assert found.status_code == 200, found.text
            best = found.json()["classes"]
            assert len(best) == 2
            right += best[0]["class"] == label
        assert right >= 33
        for content, status in ((b"no image", 415), ((tmp_path / "0.png").read_bytes()[:200], 415), (b"", 415)):
            assert server.post("/v2/models/resnet20/classify", content=content).status_code == status
        assert server.post("/v2/models/resnet20/classify?top=0", content=b"").status_code == 400
        assert eventually(lambda: server.get("/live.json").json()["models"][0]["shadow"], 240)
        assert server.get("/live.json").json()["models"][0]["shadow"]["sqnr_db"] > 15
        figures = server.get("/metrics").text
        assert "corewise_shadow_sqnr_db" in figures
        assert "corewise_range_checks_total" in figures
        assert server.get("/live.json").json()["models"][0]["outside"]["checks"] > 0
