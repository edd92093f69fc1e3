"""How clients connect to a live server, and how it and its engines end."""

import concurrent.futures
import os
import re
import signal
import socket
import threading
import time

import grpc
import httpx
import numpy as np
import pytest
from serving_tools import ARTIFACT, fake_artifact, serving
from waiting import eventually, free_port

from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan
from corewise.serving import oip

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

ROW = np.zeros((1, 3, 12, 12), np.float32)
RAW = {"inference-header-content-length": "0"}
PAGE = "https://example.org"
LIVE = "/v2/health/live"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With slow calls, one at a time."""
    plan = Plan(threads_per_instance=1, instances=1, batch=1)
    folder = fake_artifact(tmp_path_factory.mktemp("ends") / "toy.cw", plan, call_ms=300.0)
    with serving(folder, "--cors-origin", PAGE, "--cors-origin", "http://localhost:3000") as found:
        yield found


def talk(server, sent, *, close_writing=False):
    """All that comes back over a connection, until the server closes it or says nothing for a while."""
    with socket.create_connection(("127.0.0.1", server.ports["http"]), 60) as connection:
        connection.sendall(sent)
        if close_writing:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            return received, False
        return received, True


def flood(server, sent):
    """What comes back to a client that is cut off, maybe while it sends; then it may be nothing."""
    try:
        return talk(server, sent)
    except ConnectionError:
        return b"", True


def post(body, version="1.1", more=""):
    head = f"POST /v2/models/toy/infer HTTP/{version}\r\nhost: x\r\n{more}inference-header-content-length: 0\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


# --- connections --------------------------------------------------------------------------------------------------


def test_a_client_that_closes_its_side_after_its_request_is_answered(server):
    for sent in (post(ROW.tobytes()), post(ROW.tobytes(), "1.0")):
        received, is_closed = talk(server, sent, close_writing=True)
        assert b" 200 OK" in received
        assert received.endswith(b"}") or b"application/octet-stream" in received
        assert is_closed
    assert received.startswith(b"HTTP/1.1 200 OK")  # HTTP/1.0 has no interim answers
    received, is_closed = talk(server, post(ROW.tobytes())[:-9], close_writing=True)
    assert b" 200 OK" not in received  # not a whole request
    assert is_closed


def test_answers_keep_to_the_order_of_requests(server):
    """Though health is answered from its headers, before other requests have their turn."""
    live, closing = (f"GET {LIVE} HTTP/1.1\r\nhost: x\r\n{more}\r\n".encode() for more in ("", "connection: close\r\n"))
    received, is_closed = talk(server, live + live + post(ROW.tobytes()) + live + live + closing)
    bodies = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert [body == b'{"live":true}' for body in bodies] == [True, True, False, True, True, True]
    assert is_closed


@pytest.mark.parametrize("path", ["/v2", LIVE])
def test_a_client_that_waits_for_no_answer_is_cut_off(server, path):
    received, is_closed = flood(server, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 4000)
    assert is_closed
    assert received.count(b"200 OK") < 4000
    assert not [line for line in server.logged if '"error"' in line]


def test_a_body_of_tiny_chunks_is_cut_off(server):
    head = b"POST /v2/models/toy/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    received, is_closed = flood(server, head + b"1\r\n \r\n" * 20_000)
    assert received.startswith(b"HTTP/1.1 400") or not received
    assert is_closed
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (ROW.tobytes()[:1], ROW.tobytes()[1:]))
    head = head.replace(b"chunked", b"chunked\r\ninference-header-content-length: 0\r\nconnection: close")
    received, is_closed = talk(server, head + chunks + b"0\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200")
    assert is_closed


def test_tiny_headers_count_too(server):
    headers = b"".join(b"%x: y\r\n" % k for k in range(10_000))
    received, is_closed = flood(server, b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
    assert received.startswith(b"HTTP/1.1 400") or not received  # cut before it was read
    assert is_closed


def test_a_client_that_is_gone_frees_its_place_all_the_same(server):
    def waiting():
        return server.get("/live.json").json()["models"][0]["waiting_rows"]

    def cancelled():
        pattern = r'^corewise_requests_total\{.*outcome="cancelled".*\} (.+)$'
        return sum(map(float, re.findall(pattern, server.get("/metrics").text, re.MULTILINE)))

    before = cancelled()
    gone = [socket.create_connection(("127.0.0.1", server.ports["http"])) for _ in range(40)]
    for each in gone:
        each.sendall(post(ROW.tobytes()))
    assert eventually(lambda: waiting() >= 20)  # forty calls take 12 s
    for each in gone:
        each.close()
    assert eventually(lambda: waiting() == 0)
    assert eventually(lambda: cancelled() >= before + 10)


def test_http_1_0_keeps_a_connection_if_it_asks_for_it(server):
    asked = f"GET {LIVE} HTTP/1.0\r\nconnection: keep-alive\r\n\r\n".encode()
    received, is_closed = talk(server, asked + f"GET {LIVE} HTTP/1.0\r\n\r\n".encode())
    assert received.count(b" 200 OK") == 2
    assert received.lower().count(b"connection: keep-alive") == 1
    assert is_closed


def test_an_old_request_in_chunks_ends_its_connection(server):
    """Old proxies do not know chunks: to them the body may end elsewhere."""
    asked = f"GET {LIVE} HTTP/1.0\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    received, is_closed = talk(server, asked.encode() * 2)
    assert received.count(b" 200 OK") == 1
    assert is_closed


def test_a_request_that_offers_an_upgrade_is_answered_with_its_body_as_any_other(server):
    """As Java's client does; dropped, the body would be read as another request."""
    offer = "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
    asked, live = post(ROW.tobytes(), more=offer), f"GET {LIVE} HTTP/1.1\r\nhost: x\r\n{offer}\r\n".encode()
    closing = f"GET {LIVE} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    received, is_closed = talk(server, asked + live + asked + closing)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert received.count(b"application/octet-stream") == 2
    assert is_closed
    smuggled = b"GET /v2 HTTP/1.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.ports["http"]), 60) as connection:
        connection.sendall(post(smuggled, more=offer).removesuffix(smuggled))
        time.sleep(0.1)
        connection.sendall(smuggled + closing)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 ") == 2
    assert b" 400 " in received.partition(b"\r\n")[0]
    refused, is_closed = talk(server, b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n" + closing)
    assert refused.startswith(b"HTTP/1.1 400")
    assert is_closed


@pytest.mark.parametrize("path", ["/v2/health/ready/", "/v2/models/toy/?a=b", "/v2//evil.example/"])
def test_a_redirect_stays_on_the_server_whatever_host_says(server, path):
    answer = server.get(path, headers={"host": "evil.example"}, follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == path.replace("/?", "?").removesuffix("/")
    assert server.get("//evil.example/", follow_redirects=False).status_code == 404


def test_pages_of_named_origins_may_call_it(server):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = server.client.options(f"{server.url}/v2/models/toy/infer", headers={"origin": PAGE, **asks})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    answer = server.get("/v2", headers={"origin": PAGE})
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    other = server.get("/v2", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_unix_sockets_on_both_protocols(tmp_path):
    http, rpc = tmp_path / "http.sock", tmp_path / "grpc.sock"
    left = socket.socket(socket.AF_UNIX)  # by a server that was killed
    left.bind(str(http))
    left.close()
    with serving(f"toy={ARTIFACT}", http=f"unix:{http}", grpc=f"unix:{rpc}") as server:
        assert f"http at unix:{http}, grpc at unix:{rpc}" in server.printed[0]
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(http)), base_url="http://corewise") as client:
            assert client.get("/v2/health/ready").json() == {"ready": True}
            assert client.post("/v2/models/toy/infer", content=ROW.tobytes(), headers=RAW).status_code == 200
        with grpc.insecure_channel(f"unix:{rpc}") as channel:
            answer = channel.unary_unary(f"/{oip.SERVICE}/ModelInfer")(message("toy"), timeout=30)
            assert b"output_0" in answer
        assert server.stop() == 0
        assert not http.exists()
        assert not rpc.exists()


# --- ends ---------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_stopped_is_noticed_and_replaced(server):
    (pid,) = server.engine_pids()
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: server.get("/v2/health/ready").status_code == 503)
    assert eventually(lambda: server.get("/v2/health/ready").status_code == 200)
    assert server.engine_pids() != [pid]
    assert server.post("/v2/models/toy/infer", content=ROW.tobytes(), headers=RAW).status_code == 200
    assert any("was stopped for 1 s" in line for line in server.logged)


def test_standard_streams_that_are_full_or_closed_end_nothing(tmp_path):
    port = free_port()
    reading, closed = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(closed, "w") as pipe:
        for stdout, stderr in ((full, full), (pipe, pipe)):
            options = ("--log-level", "debug")
            address = f"127.0.0.1:{port}"
            with serving(f"toy={ARTIFACT}", *options, wait=False, http=address, stdout=stdout, stderr=stderr) as server:
                server.ports["http"] = port
                assert eventually(lambda server=server: is_ready(server))
                assert server.post("/v2/models/toy/infer", content=ROW.tobytes(), headers=RAW).status_code == 200
                assert server.get("/v2/none").status_code == 404
                assert server.stop() == 0


def is_ready(server):
    try:
        return server.get("/v2/health/ready").status_code == 200
    except httpx.HTTPError:
        return False


def message(model):
    described = {"name": "input", "datatype": "FP32", "shape": list(ROW.shape)}
    return oip.message("ModelInferRequest")(
        model_name=model, inputs=[described], raw_input_contents=[ROW.tobytes()]
    ).SerializeToString()


def test_a_rolling_update_of_two_servers_without_an_error(tmp_path):
    """Clients that look at readiness, as load balancers do, and try nothing twice."""
    folder = fake_artifact(tmp_path / "toy.cw", call_ms=2.0)
    statuses, over = [], threading.Event()
    # Long enough for a busy machine to see that the first one is no longer ready.
    with serving(folder, "--grace", "3") as first, serving(folder) as second:
        ready = {first: True, second: True}

        def look():
            while not over.wait(0.02):
                for each in ready:
                    ready[each] = is_ready(each)

        def over_http():
            with httpx.Client(timeout=30) as client:
                while not over.is_set():
                    chosen = next(each for each in ready if ready[each])
                    url = f"{chosen.url}/v2/models/toy/infer"
                    statuses.append(client.post(url, content=ROW.tobytes(), headers=RAW).status_code)

        def over_grpc():
            channels = {each: grpc.insecure_channel(each.grpc, [("grpc.enable_retries", 0)]) for each in ready}
            while not over.is_set():
                chosen = next(each for each in ready if ready[each])
                channels[chosen].unary_unary(f"/{oip.SERVICE}/ModelInfer")(message("toy"), timeout=30)
                statuses.append(200)

        with concurrent.futures.ThreadPoolExecutor(7) as pool:
            pool.submit(look)
            asking = [pool.submit(work) for work in (over_http, over_http, over_http, over_grpc, over_grpc)]
            assert eventually(lambda: len(statuses) > 50)
            assert first.stop() == 0
            enough = len(statuses) + 50
            assert eventually(lambda: len(statuses) > enough)
            over.set()
            for each in asking:
                each.result(60)
    assert set(statuses) == {200}
