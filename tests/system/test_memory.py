"""Attacks on a live server with a memory limit, and a few hundred malformed requests (``bench attacks``, ``fuzz``)."""

import io
import time

import grpc
import numpy as np
import pytest
from PIL import Image
from serving_tools import image_artifact, serving
from waiting import eventually

from bench import attacks, fuzz, fuzzing
from bench.attacks import MIB, Target, at_once
from bench.wire import MODEL, post
from corewise.machine.inspect import inspect_cpu
from corewise.serving import oip
from corewise.serving.memory_limit import resident_bytes

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")

ROW = np.zeros((1, 3, 12, 12), np.float32)
REQUEST = attacks._request("input", list(ROW.shape), "FP32", ROW.tobytes())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = image_artifact(tmp_path_factory.mktemp("memory") / "toy.cw")
    with serving(f"{MODEL}={folder}", "--memory-limit", "1GiB") as found:
        found.answered = infer(found)
        yield found


def infer(server):
    described = {"name": "input", "datatype": "FP32", "shape": list(ROW.shape), "data": ROW.reshape(-1).tolist()}
    return server.post(f"/v2/models/{MODEL}/infer", json={"inputs": [described]}).json()["outputs"][0]["data"]


def used_bytes(server):
    """Without what was there: the tests compare with it."""
    (engine,) = server.engine_pids()
    return attacks_bytes(server.process.pid) + attacks_bytes(engine)


def attacks_bytes(pid):
    from corewise.serving import memory_limit

    return memory_limit._status_bytes(str(pid), ("RssAnon",))


def after(server, before):
    """Healthy, with the same answers, and with its memory back."""
    assert server.get("/v2/health/ready").status_code == 200
    assert infer(server) == server.answered
    assert eventually(lambda: used_bytes(server) < before + 50 * MIB), (before, used_bytes(server))


def test_the_limit_is_told(server):
    assert "note: the memory limit leaves 21.3 MiB for a body over HTTP and 8 MiB over gRPC" in server.printed


def photo(side):
    file = io.BytesIO()
    Image.new("L", (side, side), 7).save(file, "PNG")
    return post(f"/v2/models/{MODEL}/classify", file.getvalue())


def test_small_files_of_many_pixels_are_refused_or_decoded_one_at_a_time(server):
    before, target = used_bytes(server), Target(server)
    at_once(lambda: target.send(photo(7070)), 3)
    assert target.answers == {"413": 3}
    at_once(lambda: target.send(photo(3500)), 6)
    assert sum(target.answers.values()) == 9
    assert set(target.answers) <= {"413", "200", "503"}
    assert target.answers["200"] >= 1
    after(server, before)


def test_messages_of_grpc_leave_no_memory_behind(server):
    before, target = used_bytes(server), Target(server)
    at_once(lambda: target.call(bytes(20 * MIB)), 3)
    assert target.answers == {"RESOURCE_EXHAUSTED": 3}
    large = attacks._request("input", [MIB * 7 // 4, 1], "FP32", bytes(7 * MIB))
    at_once(lambda: target.call(large), 12)
    at_once(lambda: target.call(b"\x2a\x00" * (3 * MIB)), 4)
    for method in ("grpc.health.v1.Health/Check", f"{oip.SERVICE}/ModelConfig"):
        at_once(lambda method=method: target.call(bytes(7 * MIB), f"/{method}"), 4)
    assert set(target.answers) <= {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}
    at_once(lambda: target.call(bytes(MIB), f"/{oip.SERVICE}/ServerLive"), 4)
    assert target.answers["OK"] == 4  # it is not read
    after(server, before)


def test_a_stream_is_told_which_of_its_messages_are_too_large(server):
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream(f"/{oip.SERVICE}/ModelStreamInfer")
        tiny = b"\x2a\x00" * (3 * MIB)
        answers = list(map(oip.message("ModelStreamInferResponse").FromString, call(iter([REQUEST, tiny, REQUEST]))))
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert "beside its raw tensors" in answers[1].error_message


def test_calls_that_never_send_their_message_keep_nobody_out(server):
    release, targets = [], Target(server)
    channels = [grpc.insecure_channel(targets.grpc) for _ in range(2)]

    def nothing():
        while not release:
            time.sleep(0.05)
        yield from ()

    try:
        calls = [channel.stream_unary(attacks.RPC).future(nothing()) for channel in channels for _ in range(8)]
        streams = [channels[0].stream_stream(f"/{oip.SERVICE}/ModelStreamInfer")(nothing()) for _ in range(6)]
        time.sleep(0.3)
        targets.call(b"", f"/{oip.SERVICE}/ServerReady")
        targets.call(b"", "/grpc.health.v1.Health/Check")
        targets.call(REQUEST)  # it waits until a silent one has to go
        assert targets.answers == {"OK": 3}
        assert eventually(lambda: any(stream.done() for stream in streams))
        refused = next(stream for stream in streams if stream.done())
        with pytest.raises(grpc.RpcError, match="streams already"):
            list(refused)
    finally:
        release.append(True)
        for channel in channels:
            channel.close()
    assert len(calls) == 16


def test_three_hundred_malformed_requests_harm_nobody(server):
    before = used_bytes(server)
    model = fuzzing.Model(name=MODEL, input="input", row=ROW)
    outcomes = fuzz.fuzz(model, server.ports["http"], server.grpc, 300, first=0)
    assert not outcomes.broken
    assert sum(sum(counts.values()) for counts in outcomes.counts.values()) >= 300
    assert {"400", "404"} <= set(outcomes.counts["http"])
    assert {"OK", "INVALID_ARGUMENT"} <= set(outcomes.counts["grpc"])
    assert not any("Traceback" in line or '"error"' in line for line in server.logged)
    after(server, before)


def test_what_counts_is_the_processes_own_memory():
    found = np.ones(64 * MIB, np.uint8)
    assert resident_bytes([]) >= found.nbytes
    assert resident_bytes([2**22 + 1]) == pytest.approx(resident_bytes([]), rel=0.1)  # a process that is gone
