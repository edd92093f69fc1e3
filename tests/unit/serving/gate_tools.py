"""A gate and its models, and the two ends of a connection, for tests."""

import asyncio
import json
from types import SimpleNamespace

from corewise.serving.front import Front
from corewise.serving.gate import Gate, RequestIds
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.tokens import Tokens
from corewise.serving.traces import Traces

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


async def rounds(count):
    for _ in range(count):
        await asyncio.sleep(0)


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


class Transport:
    """One of which the other side reads what it is told to."""

    def __init__(self, *unread_bytes):
        self.unread_bytes, self.is_aborted = list(unread_bytes), False

    def get_extra_info(self, name, default=None):
        return None

    def get_write_buffer_size(self):
        if not self.unread_bytes:
            raise RuntimeError("the handler is closed")
        return self.unread_bytes.pop(0) if len(self.unread_bytes) > 1 else self.unread_bytes[0]

    def is_closing(self):
        return self.is_aborted

    def abort(self):
        self.is_aborted = True

    close = abort
