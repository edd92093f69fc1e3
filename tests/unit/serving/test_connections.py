"""Connections: how they are shared out, what is written to them, and what is booked until it is read."""

import asyncio
import socket
import ssl
from itertools import pairwise
from time import monotonic
from types import SimpleNamespace

import numpy as np
import pytest
from gate_tools import Known, Transport, Wire, crowded, gate_of, parts, rounds
from starlette.requests import Request
from uvicorn.server import ServerState

from corewise.batching import Answer
from corewise.serving import connections, infer, messages, web_server
from corewise.serving.app import App, RequestLog
from corewise.serving.connections import HEALTH_CONNECTIONS, JOINED_BYTES, Acceptor, Room
from corewise.serving.connections import PER_ROUND as ROUND
from corewise.serving.front import Front
from corewise.serving.gate import RequestIds
from corewise.serving.memory_limit import COPIES, LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.protocol import InferRequest, Limits
from corewise.serving.text_routes import PIECE_BYTES, TextRoutes
from corewise.serving.tokens import Tokens

# --- seats --------------------------------------------------------------------------------------------------------


class Counted(asyncio.Protocol):
    """A connection."""

    made = 0

    def connection_made(self, transport):
        Counted.made += 1
        transport.close()


def test_new_connections_are_taken_a_few_in_each_round_and_at_the_end_all_that_wait():
    async def main():
        Counted.made, protocols = 0, []

        def make(seat):
            assert not seat.is_extra
            protocols.append(Counted())
            return protocols[-1]

        with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
            acceptor = Acceptor(listening, make, Room(1000, 1.0))
            clients = [socket.create_connection(listening.getsockname()) for _ in range(4 * ROUND)]
            seen = [0]
            while len(protocols) < len(clients):
                await asyncio.sleep(0)
                seen.append(len(protocols))
            assert max(after - before for before, after in pairwise(seen)) <= ROUND
            clients += [socket.create_connection(listening.getsockname()) for _ in range(4 * ROUND)]
            acceptor.close()
            acceptor.close()
        while Counted.made < len(clients):
            await asyncio.sleep(0)
        await rounds(3)
        for client in clients:
            client.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_one_address_has_its_share_of_connections_and_of_those_for_health_checks():
    room = Room(10, 0.5)
    seats = [room.seat("2.2.2.2") for _ in range(5 + HEALTH_CONNECTIONS // 2)]
    assert [seat.is_extra for seat in seats] == [False] * 5 + [True] * (HEALTH_CONNECTIONS // 2)
    assert room.seat("2.2.2.2") is None
    others = [room.seat("3.3.3.3") for _ in range(5)]
    assert not any(seat.is_extra for seat in others)
    assert room.seat("4.4.4.4").is_extra
    seats[0].leave()
    seats[0].leave()  # only once
    assert [room.seat("4.4.4.4").is_extra for _ in range(2)] == [False, True]


def test_clients_of_a_unix_socket_have_no_address_to_share():
    room = Room(10, 0.5)
    assert [room.seat("").is_extra for _ in range(11)] == [False] * 10 + [True]


def test_a_connection_without_a_seat_is_told_and_closed_before_anything_is_made_for_it():
    async def main():
        loop, refused = asyncio.get_running_loop(), []
        with socket.create_server(("127.0.0.1", 0)) as listening:
            room = Room(1, 1.0)
            while room.seat("127.0.0.1") is not None:
                pass
            acceptor = Acceptor(listening, pytest.fail, room, on_refused=lambda: refused.append(1))
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(b"GET /v2 HTTP/1.1\r\n\r\n")
                client.setblocking(False)
                told = await loop.sock_recv(client, 4096)
                assert await loop.sock_recv(client, 4096) == b""
            acceptor.close()
        head, _, body = told.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"connection: close" in head
        assert b"too many connections" in body
        assert refused == [1]

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("is_full", [True, False])
def test_tls_has_its_seat_before_the_handshake_which_must_not_take_long(is_full, monkeypatch):
    monkeypatch.setattr(connections, "HANDSHAKE_S", 0.05)

    async def main():
        loop, refused, room = asyncio.get_running_loop(), [], Room(1, 1.0)
        while is_full and room.seat("127.0.0.1") is not None:
            pass
        with socket.create_server(("127.0.0.1", 0)) as listening:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            acceptor = Acceptor(listening, lambda seat: Counted(), room, on_refused=lambda: refused.append(1), tls=tls)
            with socket.create_connection(listening.getsockname()) as client:
                client.setblocking(False)
                while not (refused if is_full else room._seats._total):
                    await asyncio.sleep(0.001)
                assert await loop.sock_recv(client, 4096) == b""
            acceptor.close()
            while not is_full and room._seats._total:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 30))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_request_that_was_refused_is_refused_again_without_reading_it_again():
    async def app(scope, receive, send):
        """Is not asked."""

    def test(front):
        made, wire, room = gate_of(front), Wire(), Room(10, 1.0)
        config = web_server.config(app, room)
        config.gate = made.gate
        connection = web_server._Patient(config, ServerState(), {}, room.seat("1.1.1.1"))
        connection.connection_made(wire)
        head = (
            b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\nx-request-timeout-ms: 500\r\n%bcontent-length: 3\r\n\r\n"
        )
        for more in (b"", b"a: b\r\n"):
            connection.data_received(head % more + b"abc")
        connection.data_received((head % b"x-request-id: mine\r\n") + b"abc")
        connection.data_received(head[:50])  # in pieces
        connection.data_received((head % b"")[50:] + b"abc")
        assert len(wire.written) == made.known.model.refused == 4
        parser, connection.parser = connection.parser, None
        for more in (b"", b"a: b\r\n", b""):
            connection.data_received(head % more + b"abc")
        assert len(wire.written) == made.known.model.refused == 7
        for ours, again in ((0, 4), (1, 5), (3, 6)):
            found = [parts(wire.written[k]) for k in (ours, again)]
            ids = {headers.pop("x-request-id") for _, headers, _ in found}
            assert found[0] == found[1]
            assert len(ids) == 2
        others = (
            (head % b"") + b"ab",
            (head % b"") + b"abcd",
            (head % b"c: d\r\n") + b"abc",
            (head % b"x-request-id: mine\r\n") + b"abc",
        )
        for data in others:
            with pytest.raises(AttributeError):
                connection.data_received(data)
        connection.parser = parser
        connection.data_received((head % b"") + b"ab")
        connection.data_received(b"c" + (head % b"") + b"abc")
        assert len(wire.written) == 9
        connection._is_waiting = False  # the rest of a body
        connection.parser = None
        with pytest.raises(AttributeError):
            connection.data_received(head % b"" + b"abc")
        connection.connection_lost(None)

    crowded(test)


@pytest.mark.parametrize(
    ("more", "is_read"),
    [
        (b"", True),
        (b"host: y\r\n", False),
        (b"transfer-encoding: Chunked\r\n", True),
        (b"transfer-encoding: gzip, chunked\r\n", False),
        (b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n", False),
    ],
)
def test_a_request_with_two_hosts_or_an_unknown_coding_is_none(more, is_read):
    async def app(scope, receive, send):
        """Is asked only if the gate has no answer."""

    def test(front):
        made, wire, room = gate_of(front), Wire(), Room(10, 1.0)
        config = web_server.config(app, room)
        config.gate = made.gate
        connection = web_server._Patient(config, ServerState(), {}, room.seat("1.1.1.1"))
        connection.connection_made(wire)
        length = b"" if b"chunked" in more.lower() else b"content-length: 3\r\n"
        connection.data_received(b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n" + length + more + b"\r\n")
        assert any(part.startswith(b"HTTP/1.1 400") for part in wire.written) != is_read
        connection.connection_lost(None)

    crowded(test)


@pytest.mark.parametrize(
    ("method", "size", "more", "writes"),
    [
        ("GET", 5, "", 1),
        ("GET", 0, "", 1),
        ("GET", JOINED_BYTES + 1, "", 2),
        ("GET", 5, "connection: close\r\n", 1),
        ("HEAD", 5, "", 1),
        ("POST", 5, "expect: 100-continue\r\ncontent-length: 1\r\n", 2),
    ],
)
def test_an_answer_is_one_write(method, size, more, writes):
    async def main():
        told = asyncio.Event()

        async def app(scope, receive, send):
            if method == "POST":
                asyncio.get_running_loop().call_soon(connection.data_received, b"x")
                await receive()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
            await send({"type": "http.response.body", "body": b"x" * size})
            told.set()

        wire, room = Wire(), Room(10, 1.0)
        connection = web_server._Patient(web_server.config(app, room), ServerState(), {}, room.seat(""))
        connection.connection_made(wire)
        connection.data_received(f"{method} /v2 HTTP/1.1\r\nhost: x\r\n{more}\r\n".encode())
        await told.wait()
        assert len(wire.written) == writes
        assert b"".join(wire.written).endswith(b"\r\n\r\n" + (b"" if method == "HEAD" else b"x" * size))
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


# --- answers that wait for their readers --------------------------------------------------------------------------


def test_a_large_answer_is_booked_until_it_is_read_and_refused_if_there_is_no_room():
    async def main():
        answer, read = b"x" * (LARGE_ANSWER_BYTES + 1), asyncio.Event()
        booked_bytes = answer_bytes(len(answer))
        front = Front(Limits(bodies_bytes=3 * booked_bytes, client_share=0.5), 16)

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": answer[: scope["size"]]})

        log = RequestLog(app, Known(), RequestIds(), front)

        async def ask(size, waits=None):
            sent = []

            async def send(message):
                if message.get("body") == b"" and waits is not None:
                    await waits.wait()
                sent.append(message)

            scope = {"http_version": "1.1", "headers": [], "client": ("1.1.1.1", 5), "size": size}
            await log(scope, None, send)
            return sent

        slow = asyncio.ensure_future(ask(len(answer), read))
        await rounds(3)
        refused, small = await ask(len(answer)), await ask(LARGE_ANSWER_BYTES)
        assert (refused[0]["status"], small[0]["status"]) == (503, 200)
        assert b"too many bytes" in refused[1]["body"]
        assert dict(refused[0]["headers"])[b"x-request-id"] != dict(small[0]["headers"])[b"x-request-id"]
        assert len(small) == 2
        read.set()
        start, *parts = await slow
        assert start["status"] == 200
        assert b"".join(part["body"] for part in parts) == answer
        assert (await ask(len(answer)))[0]["status"] == 200
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("by_client", [True, False])
def test_an_answer_to_a_connection_that_was_cut_off_is_dropped(method, by_client, caplog):
    async def main():
        asked, told = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            await asked.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            told.set()

        room = Room(10, 1.0)
        connection = web_server._Patient(web_server.config(app, room), ServerState(), {}, room.seat(""))
        transport = Transport(0)  # which cannot write, as uvloop's after that
        connection.connection_made(transport)
        connection.data_received(f"{method} /v2 HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        if by_client:
            transport.abort()
        else:
            connection._cut_off()
        asked.set()
        await told.wait()
        connection.send_400_response("the headers are too long")
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert not caplog.records


def test_what_is_unread_of_a_connection_that_was_cut_off_is_nothing():
    async def app(scope, receive, send):
        """Is not asked."""

    async def main():
        room, transport = Room(10, 1.0), Transport(9000)
        connection = web_server._Patient(web_server.config(app, room), ServerState(), {}, room.seat(""))
        connection.connection_made(transport)
        transport.unread_bytes = ()  # as uvloop has it
        connection.pause_writing()
        assert connection._unread is None
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("unread_bytes", [(9000,), (9000, 8000, 7000, 7000)])
def test_a_client_that_reads_no_more_of_its_answer_is_cut_off(unread_bytes, monkeypatch):
    monkeypatch.setattr(web_server, "UNREAD_S", 0.01)

    async def app(scope, receive, send):
        """Is not asked."""

    async def main():
        config = web_server.config(app, Room(10, 1.0))
        transport, seat = Transport(*unread_bytes), Room(10, 1.0).seat("")
        protocol = web_server._Patient(config, ServerState(), {}, seat)
        protocol.connection_made(transport)
        protocol.pause_writing()
        protocol.resume_writing()  # it was read at once
        assert protocol._unread is None
        transport.unread_bytes = list(unread_bytes)
        protocol.pause_writing()
        while not transport.is_aborted:
            await asyncio.sleep(0.001)
        assert transport.unread_bytes == [unread_bytes[-1]]  # not before
        protocol.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_goes_after_a_long_body_is_seen_to_be_gone(at_once):
    class Paused(Transport):
        is_paused = False

        def pause_reading(self):
            self.is_paused = True

        def resume_reading(self):
            self.is_paused = False

        def write(self, data):
            pass

    async def main():
        bodies, began = [], asyncio.Event()

        async def app(scope, receive, send):
            while (message := await receive())["type"] == "http.request":
                bodies.append(len(message["body"]))
                if not message["more_body"]:
                    began.set()
                    await asyncio.sleep(3600)

        transport = Paused()
        config = web_server.config(app, Room(10, 1.0))
        connection = web_server._Patient(config, ServerState(), {}, Room(10, 1.0).seat(""))
        connection.connection_made(transport)
        head, body = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n", b"x" * 200_000
        parts = (head + body,) if at_once else (head, body[:100_000], body[100_000:])
        for part in parts:
            await rounds(3)
            assert not transport.is_paused  # the app asks for more
            connection.data_received(part)
        await began.wait()
        assert sum(bodies) == len(body)
        assert not transport.is_paused
        connection.data_received(head + body)  # the next one has to wait for the answer to this one
        assert transport.is_paused
        connection.connection_lost(None)
        await connection.cycle.message_event.wait()
        for task in connection.tasks:
            task.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


class Silent(Transport):
    """One to which can be written."""

    def write(self, data):
        pass


@pytest.mark.parametrize("by_gate", [True, False])
@pytest.mark.parametrize("body", [b"ab", b"abc"])
def test_the_rest_of_a_body_that_is_answered_may_not_take_for_ever(by_gate, body, monkeypatch):
    monkeypatch.setattr(web_server, "REST_S", 0.0)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def main():
        front = Front(Limits(), 16)
        for _ in range(8):
            front.enter("", None)
        made, transport = gate_of(front), Silent(0)
        config = web_server.config(app, Room(10, 1.0))
        config.gate = made.gate if by_gate else None
        connection = web_server._Patient(config, ServerState(), {}, Room(10, 1.0).seat(""))
        connection.connection_made(transport)
        head = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n"
        connection.data_received(head + body)
        assert made.known.model.refused == by_gate
        while not (by_gate or connection.cycle.response_complete):
            await asyncio.sleep(0)
        if body == b"abc":
            assert connection._rest is None
        else:
            while not transport.is_aborted:
                await asyncio.sleep(0.001)
        connection.connection_lost(None)
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_answer_for_an_image_is_booked_until_what_is_in_it_is_found(monkeypatch):
    async def main():
        front = Front(Limits(), 16)
        made = gate_of(front)
        outputs = [np.zeros((1, 84, 8400), np.float32)]

        async def ask(models, served, asked, deadline_s, gone):
            return served, Answer(outputs=outputs, waited_s=0.0, ran_s=0.0, batch_rows=1)

        async def read(body, deadline_s):
            return InferRequest(inputs=(np.zeros((1, 3, 8, 8), np.float32),), outputs=())

        async def receive():
            return {"type": "http.request", "body": b"an image", "more_body": False}

        monkeypatch.setattr(front, "ask", ask)
        app = App(made.known, made.metrics, Limits(), Tokens(()), front)
        scope = {"type": "http", "headers": [], "client": ("1.1.1.1", 5), "request_id": "mine"}
        answered = app._answered(Request(scope, receive), made.known.model, read, lambda size, deadline_s: None)
        async with answered as (_, answer, _):
            assert answer.outputs is outputs
            assert front.budget._used_bytes == outputs[0].nbytes
        assert front.budget._used_bytes == 0
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_what_describing_tokens_takes_is_booked():
    async def main():
        front = Front(Limits(), 16)
        made, booked_bytes = gate_of(front), []
        body = b'{"inputs": "........"}'

        def described(items, special, prompt):
            booked_bytes.append(front.budget._used_bytes)
            return []

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        routes = TextRoutes(
            made.known, made.metrics, Limits(), front, told=None, deadline_s=lambda request: monotonic() + 60
        )
        model = SimpleNamespace(name="m", version="1", text=SimpleNamespace(described=described))
        routes._models.chosen = lambda name, *tasks: model
        scope = {"type": "http", "headers": [], "client": ("1.1.1.1", 5), "request_id": "mine"}
        assert (await routes.tokenize(Request(scope, receive))).body == b"[]"
        assert booked_bytes == [len(body) + PIECE_BYTES * len(body) // COPIES]
        assert front.budget._used_bytes == 0
        front.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    ("host", "peer", "client"),
    [
        ("192.0.2.1", "ipv4:192.0.2.1:5", "192.0.2.1"),
        ("::ffff:192.0.2.1", "ipv6:%5B::ffff:192.0.2.1%5D:5", "192.0.2.1"),
        ("2001:db8::1:2:3:4", "ipv6:%5B2001:db8::4:3:2:1%5D:5", "2001:db8::"),
        ("fe80::1%eth0", "ipv6:%5Bfe80::2%25eth0%5D:5", "fe80::"),
        (None, "unix:/run/a:b", ""),
    ],
)
def test_a_client_is_the_same_over_both_protocols_and_with_ipv6_a_network(host, peer, client):
    assert infer.client_of({"client": host and (host, 5)}) == client
    assert messages.client_of(SimpleNamespace(peer=lambda: peer)) == client
