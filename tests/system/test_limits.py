"""What strangers send at a live server costs it little: limits before work, and health all the while."""

import concurrent.futures
import gzip
import http.client
import json
import os
import signal
import socket
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import grpc
import http2_frames
import httpx
import numpy as np
import pytest
from serving_tools import ARTIFACT, serving, token_artifact
from waiting import eventually

from corewise.machine.inspect import inspect_cpu
from corewise.serving import oip

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

ROW = np.zeros((1, 3, 12, 12), np.float32)
INFER = f"/{oip.SERVICE}/ModelInfer"
BROKEN = b"\x0a\xff\xff\xff\xff\xff\x01 nothing"
MIB = 2**20


@pytest.fixture(scope="module")
def server():
    with serving(f"toy={ARTIFACT}", "--queue", "16") as found:
        yield found


def resident_bytes(server):
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """Asks for the server's health, and looks at its memory, while something else happens."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.before_bytes, self.peak_bytes, self.statuses = server, resident_bytes(server), 0, []
        self._done = threading.Event()

    def run(self):
        with httpx.Client(timeout=60) as client:
            while not (self.statuses and self._done.wait(0.02)):
                self.statuses.append(client.get(f"{self.server.url}/v2/health/ready").status_code)
                self.peak_bytes = max(self.peak_bytes, resident_bytes(self.server))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self.join()
        assert set(self.statuses) == {200}

    @property
    def grown_bytes(self):
        return max(self.peak_bytes, resident_bytes(self.server)) - self.before_bytes


def infer(server, model="toy", **options):
    described = {"name": "input", "datatype": "FP32", "shape": list(ROW.shape), "data": ROW.reshape(-1).tolist()}
    return server.post(f"/v2/models/{model}/infer", json={"inputs": [described]}, **options)


def head(length, path="/v2/models/toy/infer", more=""):
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {length}\r\n\r\n".encode()


def connect(server, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", server.ports["http"]), 60, (source, 0))


def call(server, body, method=INFER, metadata=()):
    """The status of a gRPC call with these bytes, and its details."""
    with grpc.insecure_channel(server.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            channel.unary_unary(method)(body, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name, error.details()
    return "OK", ""


def request(model, name, shape, datatype, data):
    described = {"name": name, "datatype": datatype, "shape": shape}
    return oip.message("ModelInferRequest")(
        model_name=model, inputs=[described], raw_input_contents=[data]
    ).SerializeToString()


def test_a_small_body_that_unpacks_to_much_is_refused_before_it_is_unpacked(server):
    bomb = gzip.compress(b'{"inputs":[' + b"[]," * (21 * MIB), 6)
    assert len(bomb) < 100_000
    with Watch(server) as watch:
        for packing, body in (("gzip", bomb), ("deflate", zlib.compress(bytes(64 * MIB)))):
            answer = server.post("/v2/models/toy/infer", content=body, headers={"content-encoding": packing})
            assert answer.status_code == 413
            assert "100 times" in answer.json()["error"]
    assert watch.grown_bytes < 50 * MIB


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"a",'])
def test_json_of_many_things_is_refused_before_they_are_made(server, part):
    body = b'{"inputs":[' + part * (8 * MIB // len(part))
    with Watch(server) as watch:
        assert server.post("/v2/models/toy/infer", content=body).status_code in (400, 413)
    assert watch.grown_bytes < 64 * MIB


def test_a_large_request_in_json_is_answered(server):
    described = {"name": "input", "datatype": "FP32", "shape": [16, 3, 12, 12]}
    packed = gzip.compress(json.dumps({"inputs": [{**described, "data": [0.1234567] * 16 * 432}]}).encode())
    answer = server.post("/v2/models/toy/infer", content=packed, headers={"content-encoding": "gzip"})
    assert answer.status_code == 200


def test_only_bytes_that_arrived_are_booked(server):
    idle = [connect(server, "127.0.0.2") for _ in range(8)]
    for each in idle:
        each.sendall(head(64 * MIB) + b"X")
    assert [infer(server).status_code for _ in range(10)] == [200] * 10
    # An address has half of the places for requests that are on their way.
    with connect(server, "127.0.0.2") as one_more:
        one_more.sendall(head(64 * MIB) + b"X")
        assert one_more.recv(4096).startswith(b"HTTP/1.1 503")
    for each in idle:
        each.close()


@pytest.fixture(scope="module")
def word_server(tmp_path_factory):
    pytest.importorskip("openvino")
    with serving(token_artifact(tmp_path_factory.mktemp("limits") / "words.cw")) as found:
        yield found


def test_long_texts_are_refused_by_their_bytes(word_server):
    server = word_server
    text = b"w1 " * (8 * MIB // 3)
    with Watch(server) as watch:
        status, why = call(server, request("words", "text", [1], "BYTES", len(text).to_bytes(4, "little") + text))
        assert status == "INVALID_ARGUMENT"
        assert "in parts" in why
        described = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1 " * 80_000]}
        answer = server.post("/v2/models/words/infer", json={"inputs": [described]})
        assert answer.status_code == 400
        assert "at most" in answer.json()["error"]
    assert watch.grown_bytes < 100 * MIB
    short = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1 w2"]}
    assert server.post("/v2/models/words/infer", json={"inputs": [short]}).status_code == 200
    many = {"name": "text", "datatype": "BYTES", "shape": [2000], "data": ["w1"] * 2000}
    assert server.post("/v2/models/words/infer", json={"inputs": [many]}).status_code == 400


def test_broken_protobuf_is_the_clients_error_and_not_logged(server):
    logged = len(server.logged)
    for method in (INFER, f"/{oip.SERVICE}/ModelMetadata", f"/{oip.SERVICE}/ModelConfig"):
        status, why = call(server, BROKEN, method)
        assert status == "INVALID_ARGUMENT"
        assert "protobuf" in why
    assert not any("Traceback" in line or "Error" in line for line in server.logged[logged:])


def test_metadata_beyond_its_limit_is_refused_and_not_logged(server):
    metadata = [(f"x{k:x}", "y") for k in range(500)]
    assert call(server, b"", metadata=metadata)[0] == "RESOURCE_EXHAUSTED"
    assert call(server, b"", metadata=metadata[:300])[0] == "NOT_FOUND"
    time.sleep(0.1)
    assert not any("hpack" in line for line in server.logged)


@pytest.mark.parametrize("name", ["grpc", "admin-grpc"])
def test_metadata_that_is_a_byte_each_takes_no_memory_whenever_its_client_acknowledges(server, name):
    bomb = b"".join(
        http2_frames.call(INFER, http2_frames.ACCEPT_CHARSET * 16_000, ends=False, stream=2 * k + 1) for k in range(200)
    )
    with Watch(server) as watch:
        for sent in (bomb, http2_frames.ACKNOWLEDGED + bomb):
            for _ in range(3):
                with suppress(ConnectionError), http2_frames.connect(server.ports[name], "127.0.0.2", sent) as client:
                    time.sleep(0.1)
                    http2_frames.is_open(client)
    assert watch.grown_bytes < 64 * MIB
    assert call(server, b"", f"/{oip.SERVICE}/ServerReady")[0] == "OK"


def test_large_messages_of_grpc_at_once_are_refused_and_others_are_answered(server):
    body = request("toy", "input", [4 * MIB, 3, 1, 1], "FP32", bytes(48 * MIB))
    with Watch(server), concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = {status for status, _ in pool.map(lambda _: call(server, body), range(6))}
    assert found <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert infer(server).status_code == 200


def test_a_grpc_connection_is_told_how_many_calls_it_may_have_at_a_time(server):
    with http2_frames.connect(int(server.grpc.rpartition(":")[2]), "127.0.0.1") as connection:
        assert http2_frames.settings(connection)[http2_frames.MOST_STREAMS] == 1024


def test_a_deadline_counts_from_the_first_byte(server):
    body = ROW.tobytes()
    with connect(server) as slow:
        slow.sendall(head(len(body), more="x-request-timeout-ms: 300\r\ninference-header-content-length: 0\r\n"))
        time.sleep(0.4)
        slow.sendall(body)
        assert slow.recv(4096).startswith(b"HTTP/1.1 503")


def test_the_end_cuts_no_request(tmp_path):
    statuses, headers = [], {"inference-header-content-length": "0"}
    with serving(f"toy={ARTIFACT}") as server:

        def ask():
            """Requests on one connection, until an answer ends it."""
            client = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=60)
            while True:
                client.request("POST", "/v2/models/toy/infer", ROW.tobytes(), headers)
                answer = client.getresponse()
                answer.read()
                statuses.append(answer.status)
                if answer.will_close:
                    return

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask) for _ in range(8)]
            assert eventually(lambda: len(statuses) > 16)
            server.process.send_signal(signal.SIGTERM)
            for each in asking:
                each.result(120)
        assert server.process.wait(60) == 0
    assert set(statuses) == {200}
