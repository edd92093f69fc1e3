"""More requests than a live server can answer, clients that go, engines that die, and drains, with slow calls.

Calls sleep, so that what a busy machine adds to them is little.
"""

import concurrent.futures
import json
import os
import re
import signal
import socket
import time

import httpx
import numpy as np
import pytest
from requests_to_fakes import ROWS, expected, infer, tensor
from serving_tools import fake_artifact, serving
from waiting import eventually

from corewise.machine.inspect import inspect_cpu
from corewise.records.build import Plan

pytestmark = pytest.mark.skipif(inspect_cpu().architecture != "x86_64", reason="the golden artifacts are for x86-64")


def waiting(server):
    return server.get("/live.json").json()["models"][0]["waiting_rows"]


@pytest.fixture
def slow(tmp_path):
    """A server whose calls take 300 ms, of up to 2 rows."""
    plan = Plan(threads_per_instance=1, instances=1, batch=2)
    folder = fake_artifact(tmp_path / "slow.cw", plan, call_ms=300.0, dies_above=100.0)
    with serving(folder, "--queue", "8") as found:
        yield found


def many(server, count, rows=ROWS[:1], headers=None):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda k: infer(server, rows, "slow", headers), range(count)))


def test_an_overload_is_refused_at_once_and_says_when_to_come_again(slow):
    answers = many(slow, 30, headers={"x-request-timeout-ms": "1350"})
    codes = [one.status_code for one in answers]
    assert set(codes) == {200, 503}
    assert 1 <= codes.count(200) <= 10
    refused = next(one for one in answers if one.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    text = slow.get("/metrics").text
    assert 'outcome="overloaded"' in text or 'outcome="queue_full"' in text
    counted = slow.get("/v2/models/slow/stats").json()["model_stats"][0]["batch_stats"]
    assert 2 in [each["batch_size"] for each in counted]

    def figures():
        return slow.get("/live.json").json()["models"][0]

    # They leave out the second that is in progress, in which all answers may have come.
    assert eventually(lambda: figures()["refused_per_s"] > 0 and figures()["batch_rows"].get("2", 0) > 0)


def send(server, row):
    """A connection with a request of one row that is on its way."""
    body = json.dumps({"inputs": [tensor(row)]}).encode()
    one = socket.create_connection(("127.0.0.1", server.ports["http"]))
    one.settimeout(60)
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    one.sendall(head + body)
    return one


def cancelled(server):
    found = re.findall(r'^corewise_requests_total.*outcome="cancelled".* (.+)$', server.get("/metrics").text, re.M)
    return sum(map(float, found))


def test_one_of_three_in_a_call_goes_and_the_others_get_their_own_answers(tmp_path):
    plan = Plan(threads_per_instance=1, instances=1, batch=4)
    folder = fake_artifact(tmp_path / "slow.cw", plan, call_ms=1500.0)
    with serving(folder) as server:
        for count, when in ((1, "waiting"), (2, "running")):
            first = send(server, ROWS[:1])
            time.sleep(0.4)  # its call has begun, and takes a second more
            three = [send(server, ROWS[k : k + 1]) for k in range(1, 4)]
            assert eventually(lambda: waiting(server) == 3)
            if when == "running":
                assert eventually(lambda: waiting(server) == 0)
            three[1].close()
            for connection, k in ((first, 0), (three[0], 1), (three[2], 3)):
                found = b""
                while b"outputs" not in found or not found.endswith(b"}"):
                    came = connection.recv(1 << 16)
                    assert came, found
                    found += came
                connection.close()
                answer = json.loads(found.partition(b"\r\n\r\n")[2])["outputs"][0]
                np.testing.assert_allclose(np.reshape(answer["data"], (1, -1)), expected(ROWS[k : k + 1]), rtol=1e-5)
            assert eventually(lambda count=count: cancelled(server) == count), when


def test_an_engine_that_dies_is_replaced_and_the_others_are_answered(slow):
    (pid,) = slow.engine_pids()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(infer, slow, ROWS[:1], "slow") for _ in range(5)]
        time.sleep(0.4)
        os.kill(pid, signal.SIGKILL)
        codes = sorted(one.result().status_code for one in answers)
    assert codes.count(500) <= 2
    assert codes.count(200) >= 3
    assert eventually(lambda: slow.get("/v2/health/ready").status_code == 200)
    assert slow.engine_pids() != [pid]
    assert infer(slow, ROWS[:1], "slow").status_code == 200
    assert infer(slow, ROWS[:1] + 1000, "slow").status_code == 500
    assert eventually(lambda: slow.get("/live.json").json()["models"][0]["restarts"] == 2)
    assert infer(slow, ROWS[:1], "slow").status_code == 200


FULL = ROWS[:4]
"""As many rows as a call of ``one_at_a_time`` has."""


@pytest.fixture
def one_at_a_time(tmp_path):
    """An artifact whose calls take a second."""
    plan = Plan(threads_per_instance=1, instances=1, batch=4)
    return fake_artifact(tmp_path / "slow.cw", plan, call_ms=1000.0)


def test_sigterm_loses_nothing_that_was_accepted(one_at_a_time):
    with serving(one_at_a_time, "--grace", "0.1") as slow, concurrent.futures.ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(infer, slow, FULL, "slow") for _ in range(5)]
        assert eventually(lambda: waiting(slow) >= 3 * len(FULL))
        slow.process.send_signal(signal.SIGTERM)
        slow.until("draining:")
        late = infer(slow, FULL, "slow")
        assert slow.get("/v2/health/ready").status_code == 503
        assert [one.result().status_code for one in answers] == [200] * 5
        assert late.status_code == 503
        assert "the server is stopping" in late.json()["error"]
        assert slow.process.wait(60) == 0


def test_a_drain_that_is_too_short_says_so(one_at_a_time):
    with serving(one_at_a_time, "--drain", "0.2", "--grace", "0.1") as server:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(infer, server, FULL, "slow") for _ in range(3)]
            assert eventually(lambda: waiting(server) >= len(FULL))
            assert server.stop() == 2
            late = [answer for answer in answers if answer.exception() or answer.result().status_code >= 500]
            assert late
            assert all(answer.exception() is None or isinstance(answer.exception(), httpx.HTTPError) for answer in late)
        assert any("not every accepted request was answered in 0.2 s" in line for line in server.logged)
