"""What a crowd meets: turns in the event loop, by deadline and few in a round, and answers from headers alone."""

import asyncio
import json
import logging
import socket
from itertools import pairwise
from types import SimpleNamespace

import pytest
from uvicorn.server import ServerState

from corewise.batching import NotServed
from corewise.serving import web_server
from corewise.serving.app import ANSWER_COPIES, LARGE_ANSWER_BYTES, RequestLog
from corewise.serving.connections import HEALTH_CONNECTIONS, Acceptor, Room
from corewise.serving.connections import PER_ROUND as ROUND
from corewise.serving.front import Front
from corewise.serving.gate import Gate, RequestIds
from corewise.serving.memory_limit import COPIES
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.rpc import Service
from corewise.serving.tokens import Tokens
from corewise.serving.traces import Traces
from corewise.serving.turns import FIRST_S, PER_ROUND, SAFETY, Turns

# --- turns --------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still unless it is told to go."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


async def rounds(count):
    for _ in range(count):
        await asyncio.sleep(0)


def test_in_each_round_a_few_begin_and_those_that_are_due_first():
    async def main():
        turns, begun = Turns(Clock()), []

        async def request(deadline_s):
            await turns.turn(deadline_s)
            begun.append(deadline_s)

        deadlines = [1000.0 - k for k in range(5 * PER_ROUND)]
        tasks = [asyncio.ensure_future(request(deadline_s)) for deadline_s in deadlines]
        await rounds(1)
        assert begun == deadlines[:PER_ROUND]  # nobody waited, so these were begun as they came
        assert turns.are_taken
        seen = [len(begun)]
        while len(begun) < len(deadlines):
            await rounds(1)
            seen.append(len(begun))
        assert max(after - before for before, after in pairwise(seen)) <= PER_ROUND
        assert begun[PER_ROUND:] == sorted(deadlines[PER_ROUND:])
        await asyncio.gather(*tasks)
        await rounds(2)
        assert not turns.are_taken
        assert turns.wait_s() == 0

    asyncio.run(main())


def test_what_would_have_its_turn_too_late_is_refused_at_once_and_what_is_due_before_others_is_not():
    async def main():
        clock = Clock()
        turns = Turns(clock)
        waiting = [asyncio.ensure_future(turns.turn(clock.now_s + 10)) for _ in range(PER_ROUND + 100)]
        await rounds(1)
        wait_s = 100 * FIRST_S
        assert turns.wait_s() == pytest.approx(wait_s)
        assert turns.wait_s(clock.now_s + 5) == 0
        assert turns.late_s(clock.now_s + 20) < 0
        for deadline_s, after_s in ((10.0, 10.0), (10.0, 10.0 - SAFETY * wait_s + 1e-3)):
            with pytest.raises(NotServed) as refused:
                await turns.turn(clock.now_s + deadline_s + 1e-6, after_s)
            assert refused.value.reason == "overloaded"
            assert refused.value.retry_after_s > 0
        urgent = asyncio.ensure_future(turns.turn(clock.now_s + 1e-3))
        await asyncio.wait_for(urgent, 10)
        assert not waiting[-1].done()
        await asyncio.gather(*waiting)

    asyncio.run(main())


def test_the_time_from_turn_to_turn_is_measured_while_requests_wait():
    async def main():
        clock = Clock()
        turns = Turns(clock)

        async def request():
            await turns.turn(clock.now_s + 1e6)
            clock.now_s += 0.01  # what it takes in the loop

        clock.now_s += 3600  # an idle hour is no request's
        await asyncio.gather(*(request() for _ in range(60 * PER_ROUND)))
        assert turns._each_s == pytest.approx(0.01, rel=0.05)

    asyncio.run(main())


def test_who_is_gone_or_late_has_no_turn():
    async def main():
        clock, gone = Clock(), set()
        turns = Turns(clock)
        first = [asyncio.ensure_future(turns.turn(clock.now_s + 100)) for _ in range(2 * PER_ROUND)]
        left = asyncio.ensure_future(turns.turn(clock.now_s + 200, gone=gone))
        late = asyncio.ensure_future(turns.turn(clock.now_s + 300))
        last = asyncio.ensure_future(turns.turn(clock.now_s + 1000))
        await asyncio.sleep(0)
        (waiter,) = gone
        waiter.set_exception(ConnectionError())
        clock.now_s += 301
        ended = await asyncio.gather(*first[PER_ROUND:], left, late, last, return_exceptions=True)
        assert {type(each) for each in ended[:PER_ROUND]} == {NotServed}
        assert isinstance(ended[-3], ConnectionError)
        assert isinstance(ended[-2], NotServed)
        assert ended[-2].reason == "expired"
        assert ended[-1] is None
        assert not gone

    asyncio.run(main())


# --- connections --------------------------------------------------------------------------------------------------


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


# --- answers from headers -----------------------------------------------------------------------------------------

INFER = b"/v2/models/m/infer"
HEADERS = [(b"host", b"x"), (b"content-length", b"100"), (b"x-request-id", b"mine")]


class Served:
    """A model of which requests are counted."""

    name, version = "m", "1"

    def __init__(self):
        self.refused = 0
        self.statistics = self

    def not_served(self):
        self.refused += 1


class Known:
    """Models that are there."""

    stopping, ready, served = False, True, ()

    def __init__(self):
        self.model = Served()

    def find(self, name, version):
        if name != "m" or version not in (None, "1"):
            raise ProtocolError("there is none", status=404)
        return self.model


def gate_of(front, *tokens):
    known = Known()
    metrics = Metrics(Models([], lambda source: None), Traces())
    return SimpleNamespace(
        known=known,
        metrics=metrics,
        gate=Gate(known, metrics, Limits(), Tokens(tokens), front, RequestIds()),
    )


def ask(made, method=b"POST", url=INFER, headers=HEADERS, client="1.1.1.1", stays_open=True, arrived_s=1e9):
    return made.gate.answer(method, url, headers, client=client, arrived_s=arrived_s, stays_open=stays_open)


def parts(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    assert headers["content-type"] == "application/json"
    return status, headers, json.loads(body)


def crowded(test):
    """Run a test with a front whose places for one client are taken."""

    async def main():
        front = Front(Limits(), 16)
        try:
            for _ in range(8):
                front.enter("1.1.1.1", None)
            test(front)
            await rounds(2)
        finally:
            front.close()

    asyncio.run(main())


def test_health_is_answered_from_its_headers():
    def test(front):
        made = gate_of(front)
        for url in (b"/v2/health/live", b"/v2/health/ready", b"/health"):
            status, headers, body = parts(ask(made, b"GET", url, HEADERS[:1]))
            assert status == "HTTP/1.1 200 OK"
            assert body == ({"live": True} if b"live" in url else {"ready": True})
            assert len(headers["x-request-id"]) == 32
            assert "connection" not in headers
        status, headers, _ = parts(
            ask(made, b"GET", b"/v2/health/live", [(b"x-request-id", b"mine")], stays_open=False)
        )
        assert (headers["connection"], headers["x-request-id"]) == ("close", "mine")
        made.known.ready = False
        assert parts(ask(made, b"GET", b"/health", []))[0] == "HTTP/1.1 503 Service Unavailable"
        assert parts(ask(made, b"GET", b"/v2/health/live", []))[0] == "HTTP/1.1 200 OK"
        for method, url, headers in (
            (b"GET", b"/v2/health/live", [(b"origin", b"https://x")]),
            (b"GET", b"/v2/health/live", [(b"content-length", b"9")]),
            (b"GET", b"/v2/health/live?x", []),
            (b"GET", b"/v2", []),
            (b"HEAD", b"/v2/health/live", []),
        ):
            assert ask(made, method, url, headers) is None

    crowded(test)


@pytest.mark.parametrize(
    "url", [INFER, b"/v2/models/m/versions/1/infer", b"/v2/models/m/classify?top=3", b"/v2/models/m/detect"]
)
def test_who_finds_no_room_is_refused_from_the_headers_and_counted(url):
    def test(front):
        made = gate_of(front)
        status, headers, body = parts(ask(made, url=url))
        assert status == "HTTP/1.1 503 Service Unavailable"
        assert (headers["retry-after"], headers["x-request-id"]) == ("1", "mine")
        assert "the queue is full" in body["error"]
        assert ask(made, url=url, client="2.2.2.2") is None
        text = made.metrics.text().decode()
        assert 'corewise_requests_total{model="m",outcome="queue_full",protocol="http",version="1"} 1.0' in text
        assert made.known.model.refused == 1

    crowded(test)


def test_all_else_goes_the_ordinary_way():
    def test(front):
        made = gate_of(front)
        chunked = [(b"transfer-encoding", b"chunked")]
        for options in (
            {"url": b"/v2/models/none/infer"},
            {"url": b"/v2/models/m/versions/2/infer"},
            {"url": b"/v2/models/m%2F/infer"},
            {"url": b"/v2/models/m/infer/"},
            {"url": b"/v1/embeddings"},
            {"headers": [*HEADERS, (b"origin", b"https://x")]},
            {"headers": [*HEADERS, (b"expect", b"100-continue")]},
            {"headers": chunked},
            {"headers": [*HEADERS, (b"x-request-timeout-ms", b"soon")]},
            {"headers": [(b"content-length", b"99999999")]},
            {"stays_open": False},
        ):
            assert ask(made, **options) is None, options
        made.known.stopping = True
        assert ask(made) is None
        assert ask(made, b"GET", b"/v2/health/live", []) is None

    crowded(test)


def test_a_refusal_is_for_those_who_have_the_token():
    def test(front):
        made = gate_of(front, "secret")
        assert ask(made) is None
        assert ask(made, headers=[*HEADERS, (b"authorization", b"Bearer secret")]).startswith(b"HTTP/1.1 503")
        assert ask(made, b"GET", b"/v2/health/live", []).startswith(b"HTTP/1.1 200")

    crowded(test)


def test_with_a_line_for_each_request_none_is_answered_early(caplog):
    caplog.set_level(logging.DEBUG, "corewise.serve")
    crowded(lambda front: ask(gate_of(front)) is None or pytest.fail("no line"))


def test_a_turn_that_comes_too_late_is_known_from_the_headers():
    async def main():
        front = Front(Limits(), 1024)
        made = gate_of(front)
        now_s = asyncio.get_running_loop().time()
        waiting = [asyncio.ensure_future(front.turn(now_s + 1000)) for _ in range(200)]
        await asyncio.sleep(0)
        timeout = [*HEADERS, (b"x-request-timeout-ms", b"1")]
        status, _, body = parts(ask(made, headers=timeout, arrived_s=now_s - 1))
        assert status.startswith("HTTP/1.1 503")
        assert "would miss its deadline" in body["error"]
        assert ask(made, arrived_s=now_s + 1000) is None
        await asyncio.gather(*waiting)
        front.close()

    asyncio.run(main())


class Wire:
    """A connection on which all that is written is kept."""

    def __init__(self):
        self.written = []

    def get_extra_info(self, name, default=None):
        return ("1.1.1.1", 5) if name == "peername" else None

    def write(self, data):
        self.written.append(data)

    def is_closing(self):
        return False

    close = is_closing


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


def test_a_call_over_grpc_is_refused_before_its_message_is_received():
    def test(front):
        made = gate_of(front)
        service = Service(made.known, made.metrics, Limits(), Tokens(()), front)
        context = SimpleNamespace(peer=lambda: "ipv4:1.1.1.1:5", time_remaining=lambda: 0.5)
        with pytest.raises(NotServed, match="queue is full"):
            service._answered("ModelInfer", None, None, None, context).send(None)
        label = 'corewise_turned_away_requests_total{protocol="grpc",reason="queue_full"} 1.0'
        assert label in made.metrics.text().decode()

    crowded(test)


# --- answers that wait for their readers --------------------------------------------------------------------------


def test_a_large_answer_is_booked_until_it_is_read_and_refused_if_there_is_no_room():
    async def main():
        answer, read = b"x" * (LARGE_ANSWER_BYTES + 1), asyncio.Event()
        booked_bytes = ANSWER_COPIES * len(answer) // COPIES
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


class Transport:
    """One of which the other side reads what it is told to."""

    def __init__(self, *unread_bytes):
        self.unread_bytes, self.is_aborted = list(unread_bytes), False

    def get_extra_info(self, name, default=None):
        return None

    def get_write_buffer_size(self):
        return self.unread_bytes.pop(0) if len(self.unread_bytes) > 1 else self.unread_bytes[0]

    def abort(self):
        self.is_aborted = True

    close = is_closing = abort


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
        while not transport.is_aborted:
            await asyncio.sleep(0.001)
        assert transport.unread_bytes == [unread_bytes[-1]]  # not before
        protocol.connection_lost(None)

    asyncio.run(asyncio.wait_for(main(), 30))
