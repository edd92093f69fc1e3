"""What a crowd meets: turns in the event loop, by deadline and few in a round, and answers from headers alone."""

import asyncio
import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from gate_tools import HEADERS, INFER, ask, crowded, gate_of, parts, rounds

from corewise.batching import NotServed
from corewise.serving.front import Front
from corewise.serving.protocol import Limits
from corewise.serving.rpc import Service
from corewise.serving.tokens import Tokens
from corewise.serving.turns import FIRST_S, PER_ROUND, SAFETY, Turns

# --- turns --------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still unless it is told to go."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


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


# --- answers from headers -----------------------------------------------------------------------------------------


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
