"""What HTTP permits and few clients do, and what the server tells of itself."""

import asyncio
import json
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from gate_tools import Wire, gate_of, rounds
from starlette.requests import ClientDisconnect
from uvicorn.server import ServerState

from corewise.batching import Answer, NotServed
from corewise.serving import images, pages, web_server
from corewise.serving.app import App
from corewise.serving.connections import Room
from corewise.serving.deliveries import Deliveries, Waiters
from corewise.serving.front import Front
from corewise.serving.protocol import InferRequest, Limits
from corewise.serving.statistics import HISTORY_S
from corewise.serving.tokens import Tokens


def connected(app, wire):
    room = Room(10, 1.0)
    connection = web_server._Patient(web_server.config(app, room), ServerState(), {}, room.seat(""))
    connection.connection_made(wire)
    return connection


async def answered(send):
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


def test_trailers_are_no_headers():
    async def main():
        seen, told = [], asyncio.Event()

        async def app(scope, receive, send):
            await receive()
            seen.extend(scope["headers"])
            await answered(send)
            told.set()

        wire = Wire()
        connection = connected(app, wire)
        head = b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
        connection.data_received(head + b"authorization: Bearer secret\r\nexpect: 100-continue\r\n\r\n")
        await told.wait()
        assert [name for name, _ in seen] == [b"host", b"transfer-encoding"]
        connection.data_received(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.headers == [(b"host", b"x")]
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("endless", [b"0\r\nx: ", b"1;x="], ids=["trailer", "extension"])
@pytest.mark.parametrize("is_answered", [True, False])
def test_what_lies_beside_chunks_ends(endless, is_answered):
    """The parser would keep all of it, and copy it each time that more comes."""

    async def main():
        go_on = asyncio.Event()

        async def app(scope, receive, send):
            if is_answered:
                await answered(send)
            await go_on.wait()

        wire = Wire()
        wire.abort, wire.close = lambda: ended.append("cut off"), lambda: ended.append("closed")
        wire.pause_reading = wire.resume_reading = lambda: None
        ended = []
        connection = connected(app, wire)
        connection.data_received(b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        await rounds(3)
        for _ in range(5000):  # honest chunks, each in a piece of its own
            connection.data_received(b"400\r\n" + b"a" * 1024 + b"\r\n")
        connection.data_received(endless)
        sent = 0
        while not ended:
            connection.data_received(b"a" * 4096)
            sent += 4096
            assert sent < 2**20
        assert ended == ["cut off" if is_answered else "closed"]
        go_on.set()
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("reads", [True, False])
def test_a_body_that_its_client_was_not_told_to_send_ends_the_connection(reads):
    """The client may send it or not: the server would take its next request for it."""

    async def main():
        told = asyncio.Event()

        async def app(scope, receive, send):
            if reads:
                asyncio.get_running_loop().call_soon(connection.data_received, b"abc")
                while (await receive())["more_body"]:
                    pass
            await answered(send)
            told.set()

        wire = Wire()
        connection = connected(app, wire)
        connection.data_received(b"POST /v2 HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        await told.wait()
        assert (b"connection: close" in b"".join(wire.written)) != reads
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
def test_a_connection_that_was_cut_off_leaves_no_timer_behind(error):
    """It would keep the connection in memory for more than a minute; a crowd of them, gigabytes."""

    async def main():
        async def app(scope, receive, send):
            await answered(send)

        connection = connected(app, Wire())
        connection.data_received(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
        while connection.timeout_keep_alive_task is None:
            await asyncio.sleep(0)
        timer = connection.timeout_keep_alive_task
        connection.connection_lost(error)
        assert timer.cancelled()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_client_that_went_while_its_request_was_read_has_no_place_in_the_queue():
    async def main():
        waiters, ended = Waiters(), Future()
        early = Deliveries().wait(Future())
        waiters.add(early)
        waiters.disconnect()
        late = Deliveries().wait(ended)
        waiters.add(late)
        for each in (early, late):
            with pytest.raises(ClientDisconnect):
                await each
        await rounds(2)
        assert ended.cancelled()

    asyncio.run(main())


def test_many_who_ask_for_the_same_are_told_it_once():
    async def main():
        front, begun, go_on, times = Front(Limits(), 16), threading.Event(), threading.Event(), []

        def work():
            begun.set()
            go_on.wait(30)
            times.append(1)
            return len(times)

        first = [asyncio.ensure_future(front.tell("figures", work)) for _ in range(50)]
        while not begun.is_set():
            await asyncio.sleep(0.001)
        gone = asyncio.ensure_future(front.tell("figures", work))
        await asyncio.sleep(0)
        gone.cancel()  # the others are told all the same
        go_on.set()
        assert await asyncio.gather(*first) == [1] * 50
        assert await front.tell("figures", work) == 2
        with pytest.raises(ZeroDivisionError):
            await front.tell("figures", lambda: 1 / 0)
        assert not front._told
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_history_has_few_beginnings():
    now = int(time.time())
    assert pages.since(str(now - 5)) == now - 5
    assert {pages.since(text) for text in ("", "x", "-1", "²", "9" * 20, "0", str(now - HISTORY_S - 9))} == {0}


def test_what_is_found_in_an_image_is_told_though_its_time_is_over(monkeypatch):
    """The model has run: to refuse the answer now would waste that."""

    async def main():
        front = Front(Limits(), 16)
        made = gate_of(front)
        served = made.known.model
        served.audio = None
        box = {"class": 0, "label": None, "score": 0.5, "box": [0, 0, 1, 1]}

        async def ask(models, served, asked, deadline_s, gone):
            front._decoders._costs.note("boxes", 1, 60.0)  # they have taken a minute lately, and all threads are busy
            busy.extend(asyncio.ensure_future(front._decoders.run(held.wait, kind="pixels", size=1)) for _ in range(16))
            await asyncio.sleep(0)
            held.set()
            return served, Answer(outputs=[np.zeros((1, 6))], waited_s=0.0, ran_s=0.0, batch_rows=1)

        async def file(body, served, *, client, deadline_s):
            return InferRequest(inputs=(np.zeros((1, 3, 8, 8), np.float32),), outputs=()), (8, 8)

        async def receive():
            return {"type": "http.request", "body": b"an image", "more_body": False}

        async def send(message):
            sent.append(message)

        held, busy, sent = threading.Event(), [], []
        monkeypatch.setattr(front, "ask", ask)
        monkeypatch.setattr(front, "file", file)
        monkeypatch.setattr(images, "thresholds", lambda score, iou, served: None)
        monkeypatch.setattr(images, "objects", lambda outputs, served, size, asked: [box])
        app = App(made.known, made.metrics, Limits(timeout_s=5.0), Tokens(()), front)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v2/models/m/detect",
            "query_string": b"",
            "headers": [],
            "client": ("1.1.1.1", 5),
            "request_id": "mine",
        }
        await app.asgi(scope, receive, send)
        assert sent[0]["status"] == 200
        assert json.loads(sent[1]["body"])["objects"] == [box]
        await asyncio.gather(*busy, return_exceptions=True)
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_headers_of_images_hold_up_nothing_that_is_parsed():
    async def main():
        front, held, begun = Front(Limits(), 16), threading.Event(), threading.Semaphore(0)

        def work():
            begun.release()
            held.wait(30)

        busy = [asyncio.ensure_future(front._headers.run(work, kind="headers", size=1)) for _ in range(9)]
        await asyncio.to_thread(begun.acquire)
        assert await front.read(lambda: "parsed", 10**6) == "parsed"
        assert await front.tell("what", lambda: "told") == "told"
        held.set()
        await asyncio.gather(*busy)
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_more_than_may_wait_is_refused(monkeypatch):
    monkeypatch.setattr("corewise.serving.pool.MOST_WAITING", 3)

    async def main():
        front, held = Front(Limits(), 16), threading.Event()
        asked = [asyncio.ensure_future(front.tell(number, held.wait)) for number in range(9)]
        await asyncio.sleep(0.01)
        held.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(each, NotServed) for each in found)
        assert found[0] is True
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_openapi_is_made_once_for_the_same_models():
    model = SimpleNamespace(name="m", takes_files=True, file_call="detect", text=None)
    made = pages.openapi([model])
    assert pages.openapi([model]) is made
    assert "/v2/models/{name}/detect" in json.loads(made)["paths"]
    other = SimpleNamespace(name="n", takes_files=False, file_call=None, text=object())
    paths = json.loads(pages.openapi([other]))["paths"]
    assert "/v1/embeddings" in paths
    assert "/v2/models/{name}/detect" not in paths
