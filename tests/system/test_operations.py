"""What operators and Triton's clients reach for, and values that a model has no place for, on a live server."""

import asyncio
import json
import queue
import re
import shutil
import subprocess

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from serving_tools import ARTIFACT, fake_artifact, serving, token_artifact
from waiting import eventually

import corewise
from corewise import artifact
from corewise.common.errors import InputError
from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan
from corewise.serving import oip

pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

LABELS = ("ant", "bee", "cat")
ROWS = artifact.read(ARTIFACT).golden()[0][0]
SERVICE = "inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    tokens = token_artifact(folder / "tokens.cw", labels=LABELS)
    toy = fake_artifact(folder / "toy.cw", Plan(threads_per_instance=1, instances=1, batch=4))
    (folder / "tokens").write_text("secret\n")
    return folder, tokens, toy


@pytest.fixture(scope="module")
def server(folders):
    _, tokens, toy = folders
    with serving(tokens, f"toy@1={toy}", f"toy@2={toy}") as found:
        yield found


@pytest.fixture(scope="module")
def strict(folders):
    """With a token, and without NaN."""
    folder, _, toy = folders
    with serving(toy, "--check-finite", "--token-file", folder / "tokens") as found:
        yield found


def ask(server, ids, **more):
    ids = np.asarray(ids)
    described = {"name": "tokens", "datatype": "INT64", "shape": list(ids.shape), "data": ids.ravel().tolist()}
    return server.post("/v2/models/tokens/infer", json={"inputs": [described], **more})


def token_input(client, ids):
    given = client.InferInput("tokens", list(ids.shape), "INT64")
    given.set_data_from_numpy(ids)
    return given


# --- values -------------------------------------------------------------------------------------------------------

WRONG = [
    ([[1, 2, 10_000_000]], "input 'tokens' has the value 10000000 in row 0; give values from 0 to 98"),
    ([[1, 2, 3], [1, -1, 3]], "input 'tokens' has the value -1 in row 1; give values from 0 to 98"),
    ([[0] * 42], "input 'tokens' has size 42 in dimension 1; give at most 41"),
]


@pytest.mark.parametrize(("ids", "match"), WRONG)
def test_a_value_without_a_place_in_the_model_is_refused_and_others_get_their_own_answers(server, ids, match):
    good = np.array([[5, 6, 7], [8, 9, 98]])
    expected = ask(server, good).json()["outputs"][0]["data"]
    refused = ask(server, ids)
    assert refused.status_code == 400
    assert match in refused.json()["error"]
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        with pytest.raises(triton_grpc.InferenceServerException, match="INVALID_ARGUMENT") as caught:
            client.infer("tokens", [token_input(triton_grpc, np.array(ids))])
        assert match in str(caught.value)
        found = client.infer("tokens", [token_input(triton_grpc, good)]).as_numpy("scores")
    np.testing.assert_array_equal(found.ravel(), np.array(expected, np.float32))
    assert ask(server, good).json()["outputs"][0]["data"] == expected


def test_texts_are_as_long_as_the_model_has_positions(server):
    def embed(words):
        text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [" ".join(["w5"] * words)]}
        return server.post("/v2/models/tokens/infer", json={"inputs": [text]})

    assert embed(41).status_code == 200  # with padding to a multiple of 8 it would be too long
    refused = embed(42)
    assert refused.status_code == 400
    assert "has 42 tokens, the model takes 41" in refused.json()["error"]


def test_a_loaded_model_refuses_them_too(folders):
    with corewise.load(folders[1]) as model:
        good = np.array([[5, 6, 7], [8, 9, 98]])
        before = model(good)
        for ids, match in WRONG:
            with pytest.raises(InputError) as caught:
                model(np.array(ids))
            assert match in str(caught.value)
        np.testing.assert_array_equal(model(good), before)


def test_metadata_says_which_values_a_model_takes(server):
    parameters = {"minimum": 0, "maximum": 98, "maximum_size_1": 41}
    assert server.get("/v2/models/tokens").json()["inputs"][0]["parameters"] == parameters
    assert "parameters" not in server.get("/v2/models/toy").json()["inputs"][0]
    assert "maximum 98" in server.get("/docs").text


def toy(rows, name="input"):
    return {"name": name, "datatype": "FP32", "shape": list(rows.shape)}


def with_value(value):
    """A request whose second row has this value."""
    rows = ROWS[:2].copy()
    rows[1, 0, 0, 0] = value
    head = json.dumps({"inputs": [{**toy(rows), "parameters": {"binary_data_size": rows.nbytes}}]}).encode()
    return head + rows.tobytes(), {"inference-header-content-length": str(len(head))}


def test_json_answers_hold_null_where_a_number_is_none(server):
    body, headers = with_value(np.nan)
    found = server.post("/v2/models/toy/infer", content=body, headers=headers)
    assert found.status_code == 200
    assert "NaN" not in found.text
    data = json.loads(found.text, parse_constant=pytest.fail)["outputs"][0]["data"]
    assert data[4:] == [None] * 4
    assert None not in data[:4]
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        given = triton_http.InferInput("input", [2, 3, 12, 12], "FP32")
        rows = ROWS[:2].copy()
        rows[1, 0, 0, 0] = np.nan
        given.set_data_from_numpy(rows)
        for binary in (True, False):  # Triton's client reads null as NaN
            wanted = triton_http.InferRequestedOutput("output_0", binary_data=binary)
            scores = client.infer("toy", [given], outputs=[wanted]).as_numpy("output_0")
            assert np.isnan(scores[1].astype(np.float32)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_where_the_operator_wants_that(strict, value):
    body, headers = with_value(value)
    found = strict.post("/v2/models/toy/infer", content=body, headers={**headers, "authorization": "Bearer secret"})
    assert found.status_code == 400
    assert f"input 'input' has the value {value} in row 1; give finite numbers" in found.json()["error"]


# --- Triton's extensions --------------------------------------------------------------------------------------------


def test_the_configuration_is_tritons_on_both_protocols(server):
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        config = client.get_model_config("tokens")
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("tokens", "corewise", 4)
    assert config["input"] == [{"name": "tokens", "data_type": "TYPE_INT64", "dims": [-1]}]
    assert config["output"] == [{"name": "scores", "data_type": "TYPE_FP32", "dims": [8]}]
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["dynamic_batching"] == {
        "preferred_batch_size": [4],
        "priority_levels": 100,
        "default_priority_level": 50,
    }
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        assert client.get_model_config("tokens", as_json=True)["config"]["input"][0]["dims"] == ["-1"]
        assert client.get_model_config("toy", "2").config.output[0].data_type == 11
        assert client.get_model_config("toy").config.dynamic_batching.priority_levels == 100
        with pytest.raises(triton_grpc.InferenceServerException, match="NOT_FOUND"):
            client.get_model_config("none")


def test_classes_on_both_protocols(server):
    ids = np.array([[5, 6, 7], [8, 9, 98]])
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        scores = client.infer("tokens", [token_input(triton_http, ids)]).as_numpy("scores")
        answers = [
            client.infer(
                "tokens",
                [token_input(triton_http, ids)],
                outputs=[triton_http.InferRequestedOutput("scores", binary_data=binary, class_count=3)],
            ).as_numpy("scores")
            for binary in (True, False)
        ]
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        wanted = triton_grpc.InferRequestedOutput("scores", class_count=3)
        answers.append(client.infer("tokens", [token_input(triton_grpc, ids)], outputs=[wanted]).as_numpy("scores"))
    best = np.argsort(-scores, axis=1)[:, :3]
    labels = [f":{name}" for name in LABELS] + [""] * 5
    expected = [[f"{scores[row, k]:f}:{k}{labels[k]}" for k in best[row]] for row in range(2)]
    for found in answers:
        assert [[text if isinstance(text, str) else text.decode() for text in row] for row in found] == expected


def test_a_stream_answers_in_order_and_an_error_is_one_requests_own(server):
    answers = queue.Queue()
    batches = [np.full((1, 3), k) for k in range(20)]
    batches[7] = np.full((1, 3), 10_000_000)
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for k, ids in enumerate(batches):
            client.async_stream_infer("tokens", [token_input(triton_grpc, ids)], request_id=str(k))
        found = [answers.get(timeout=60) for _ in batches]
        client.stop_stream()
        assert "the value 10000000" in str(found[7][1])
        assert [error for k, (_, error) in enumerate(found) if k != 7] == [None] * 19
        assert [result.get_response().id for result, _ in found if result] == [str(k) for k in range(20) if k != 7]
        alone = client.infer("tokens", [token_input(triton_grpc, batches[3])]).as_numpy("scores")
    np.testing.assert_array_equal(found[3][0].as_numpy("scores"), alone)


def test_tritons_asynchronous_client(server):
    async def ask_all():
        async with triton_aio.InferenceServerClient(server.grpc) as client:
            assert await client.is_model_ready("tokens")
            ids = [np.array([[k, k, k]]) for k in range(10)]
            answers = await asyncio.gather(*(client.infer("tokens", [token_input(triton_grpc, each)]) for each in ids))
            return [answer.as_numpy("scores") for answer in answers]

    assert len({found.tobytes() for found in asyncio.run(ask_all())}) == 10


def states(index):
    return {(each["name"], each["version"]): each["state"] for each in index}


def test_models_are_unloaded_and_loaded_at_the_admin_ports(server):
    with triton_http.InferenceServerClient(server.admin.removeprefix("http://")) as admin:
        admin.unload_model("toy")
        index = states(admin.get_model_repository_index())
        assert index == {("tokens", "1"): "READY", ("toy", "1"): "UNAVAILABLE", ("toy", "2"): "UNAVAILABLE"}
        gone = server.post("/v2/models/toy/infer", json={"inputs": []})
        assert (gone.status_code, gone.json()["error"]) == (404, "the model toy was unloaded")
        assert server.get("/v2/health/ready").status_code == 200
        assert [model["name"] for model in server.get("/live.json").json()["models"]] == ["tokens"]
        admin.load_model("toy")
        assert set(states(admin.get_model_repository_index()).values()) == {"READY"}
        with pytest.raises(triton_http.InferenceServerException, match="as it is in its folder"):
            admin.load_model("toy", config="{}")
        with pytest.raises(triton_http.InferenceServerException, match="there is no model 'none'"):
            admin.unload_model("none")
    assert server.get("/v2/models/toy/ready").json()["ready"] is True
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.ports['admin-grpc']}") as admin:
        admin.unload_model("toy")
        assert len(admin.get_model_repository_index().models) == 3
        admin.load_model("toy")
        with pytest.raises(triton_grpc.InferenceServerException, match="NOT_FOUND"):
            admin.load_model("none")
    assert server.get("/v2/models/toy/ready").json()["ready"] is True


def test_pages_cannot_use_the_admin_port(server):
    """A browser on the operator's machine reaches loopback, and sends simple requests for any page."""
    for origin in ("https://example.org", "null", server.admin):
        refused = httpx.post(f"{server.admin}/v2/repository/models/toy/unload", headers={"origin": origin})
        assert refused.status_code == 403
    assert server.get("/v2/models/toy/ready").json()["ready"] is True


def test_the_admin_port_has_nothing_else_and_reaches_no_other_folder(server):
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/v2/models/toy"),
        ("POST", "/v2/models/toy/infer"),
        ("POST", "/v2/repository/models/..%2F..%2Fetc/load"),
    ):
        assert httpx.request(method, server.admin + path).status_code == 404, path
    assert server.get("/v2/models/toy/ready").json()["ready"] is True


def test_the_repository_is_at_no_other_port(server):
    assert server.post("/v2/repository/index").status_code == 404
    assert server.post("/v2/repository/models/toy/unload").status_code == 404
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        for call in (client.get_model_repository_index, lambda: client.unload_model("toy")):
            with pytest.raises(triton_grpc.InferenceServerException, match=r"UNIMPLEMENTED.*--admin-grpc"):
                call()


def test_perf_analyzer_runs(server):
    found = shutil.which("perf_analyzer")
    if found is None:
        pytest.skip("no perf_analyzer: the one in the wheel of tritonclient 2.50.0 was tried")
    http = server.url.removeprefix("http://")
    for more in (["-i", "http", "-u", http], ["-i", "grpc", "--streaming", "-a", "-u", server.grpc]):
        command = [found, "-m", "toy", "-p", "500", "-r", "3", "-s", "99", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode in (0, 1), done.stderr  # 1: the load was not steady
        assert "Throughput:" in done.stdout, done.stderr


# --- probes and reflection ------------------------------------------------------------------------------------------


def test_grpc_health_needs_no_token_and_knows_its_services(strict):
    with grpc.insecure_channel(strict.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def status(name):
            return health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30).status

        serving = health_pb2.HealthCheckResponse.SERVING
        assert [status(name) for name in ("", SERVICE, "readiness", "liveness")] == [serving] * 4
        with pytest.raises(grpc.RpcError) as caught:
            status("none")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watched = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
        assert next(watched).status == serving
        watched.cancel()
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="none"), timeout=30)
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()


def test_grpc_health_hears_of_the_end(folders):
    slow = fake_artifact(folders[0] / "slow.cw", Plan(threads_per_instance=1, instances=1, batch=4), call_ms=1500.0)
    with serving(slow) as server, grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            given = triton_grpc.InferInput("input", [4, 3, 12, 12], "FP32")
            given.set_data_from_numpy(ROWS[:4])
            accepted = queue.Queue()
            for _ in range(2):
                client.async_infer("slow", [given], lambda result, error: accepted.put((result, error)))
            assert eventually(lambda: server.get("/live.json").json()["models"][0]["waiting_rows"] == 4)
            server.process.terminate()
            assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
            alive = health.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=60)
            assert alive.status == health_pb2.HealthCheckResponse.SERVING
            assert [accepted.get(timeout=60)[1] for _ in range(2)] == [None, None]
        watched.cancel()


def test_reflection_describes_calls_that_a_client_can_make(server):
    with grpc.insecure_channel(server.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        method = DescriptorPool(database).FindServiceByName(SERVICE).methods_by_name["ModelConfig"]
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_unary(
            f"/{SERVICE}/ModelConfig",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert call(request(name="toy"), timeout=30).config.name == "toy"


def test_both_versions_of_reflection_are_there_for_those_who_have_the_token(strict):
    for version in ("v1", "v1alpha"):
        with grpc.insecure_channel(strict.grpc) as channel:
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            call = channel.stream_stream(path)
            asked = b"\x3a\x00"  # list_services
            with pytest.raises(grpc.RpcError) as caught:
                next(call(iter([asked]), timeout=30))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            answer = next(call(iter([asked]), timeout=30, metadata=(("authorization", "Bearer secret"),)))
            assert SERVICE.encode() in answer


BROKEN = b"\x0a\xff\xff\xff\xff\xff\x01 nothing"


@pytest.mark.parametrize("name", [*oip.METHODS, *oip.EXTENSIONS])
def test_the_token_is_looked_at_before_the_message_of_each_call_but_those_of_health(strict, name):
    logged = len(strict.logged)
    with grpc.insecure_channel(strict.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        for body in (b"", BROKEN, bytes(2**20)):
            call = channel.unary_unary(f"/{SERVICE}/{name}").future(body, timeout=60)
            assert (call.code() == grpc.StatusCode.OK) == (name in ("ServerLive", "ServerReady"))
            assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED)
        right = channel.unary_unary(f"/{SERVICE}/{name}").future(
            b"", timeout=60, metadata=(("authorization", "Bearer secret"),)
        )
        assert right.code() != grpc.StatusCode.UNAUTHENTICATED
    assert not any("Traceback" in line for line in strict.logged[logged:])


# --- what is seen of it ---------------------------------------------------------------------------------------------


def counts(server, name, headers):
    lines = server.get("/metrics", headers=headers).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


def test_who_is_turned_away_is_counted_and_logged(strict):
    token = {"authorization": "Bearer secret"}
    for _ in range(30):
        assert strict.get("/v2/models/toy").status_code == 401
    assert strict.get("/v2/none", headers=token).status_code == 404
    assert strict.get("/v2/models/none", headers=token).status_code == 404
    assert strict.get("/v2/models/toy/infer", headers=token).status_code == 405
    with grpc.insecure_channel(strict.grpc) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/{SERVICE}/None")(b"", timeout=30)
    found = counts(strict, "corewise_turned_away_requests_total", token)
    for protocol, reason, least in (
        ("http", "unauthenticated", 30),
        ("http", "unknown_path", 1),
        ("http", "unknown_model", 1),
        ("http", "unknown_method", 1),
        ("grpc", "unknown_method", 1),
    ):
        assert found[f'corewise_turned_away_requests_total{{protocol="{protocol}",reason="{reason}"}}'] >= least

    def logged():
        lines = [json.loads(line) for line in strict.logged if '"refused"' in line]
        return sum(line["reasons"].get("unauthenticated", 0) for line in lines)

    assert eventually(lambda: logged() >= 30, 60)
    assert sum('"refused"' in line for line in strict.logged) < 20


def test_latencies_are_counted_up_to_a_minute(server):
    ask(server, [[1, 2, 3]])
    text = server.get("/metrics").text
    for name in ("corewise_request_seconds", "corewise_queue_seconds"):
        assert f'{name}_bucket{{le="60.0",model="tokens",version="1"}}' in text
    assert "process_resident_memory_bytes" in text


def test_the_page_knows_what_was_before_it(server, tmp_path):
    before = server.get("/live.json").json()["now"]
    for _ in range(3):
        ask(server, [[1, 2, 3]])
    assert eventually(lambda: server.get("/live.json").json()["now"] > before + 1)
    found = server.get("/live.json").json()
    tokens = next(model for model in found["models"] if model["name"] == "tokens")
    assert sum(tokens["history"]["answered"]) >= 3
    assert max(tokens["history"]["at"]) <= found["now"]  # a second may have ended between the two
    later = server.get(f"/live.json?since={found['now']}").json()["models"][0]["history"]
    assert later["at"] == []
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    page = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", server.url], capture_output=True, text=True, timeout=120
    ).stdout
    # Axes with their units, and lines that were drawn from the server's history.
    for words in ("Requests/s", "Latency, ms", "now</text>", "min ago</text>", "openvino fp32", 'class="line one"'):
        assert words in page
    for words in ('class="pill good"', "tokens", "toy", "fake fp32", "answered"):
        assert words in page
    assert "Requests/s over the last 300 s" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
