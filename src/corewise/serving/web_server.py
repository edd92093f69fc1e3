"""HTTP as uvicorn serves it, with limits: on connections, headers, pipelines and chunks, and on waiting for clients."""

import asyncio
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from corewise.common.errors import InputError
from corewise.serving.addresses import client_of
from corewise.serving.app import OPEN_TO_ALL
from corewise.serving.connections import FULL, Acceptor, Connection, Room, Seat
from corewise.serving.deliveries import Waiters
from corewise.serving.gate import Gate
from corewise.serving.infer import ARRIVED, GONE, WHOLE

HEADERS_S = 10.0
"""How long a request's headers may take to come, and a connection may stay without a first request."""
HEADERS_BYTES = 64 * 1024
HEADER_BYTES = 32
"""What each header counts beside its own bytes: tens of thousands of tiny ones would take megabytes."""
FIRST_BODY_BYTES = 256 * 1024
"""What may come in one piece with the end of the headers."""
KEEP_ALIVE_S = 75
UNREAD_S = 30.0
"""A client that reads nothing of its answer for so long is disconnected."""
REST_S = 30.0
"""How long the rest of a body may take that was answered before all of it came."""
MOST_PIPELINED = 64
"""Requests of one HTTP connection that wait for the answers to those before them, or that come in one piece."""
MOST_CHUNKS, CHUNK_BYTES = 4096, 256
"""Most chunks of a body: MOST_CHUNKS, and one more for each CHUNK_BYTES. A chunk costs as much CPU as a kilobyte."""
CHUNK_LINE_BYTES = 32
"""Around each chunk; beside that, extensions and trailers may take HEADERS_BYTES, as the parser keeps a long one whole.
"""
HEALTH_S = 2.0
"""What a connection beyond the limit has for a health check."""
LINGER_S = 0.2
"""From the last new connection to the end of those without a request."""
LAST_WORDS_S = 2.0
"""How long answers that are on their way when all work is done may take."""


class Http(uvicorn.Server):
    """uvicorn, whose signals are the server's to handle."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them."""
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, and take new connections a few at a time."""
        assert isinstance(self.config, Config)
        config = self.config

        def make(seat: Seat) -> _Patient:
            return _Patient(config, self.server_state, {}, seat)

        self.servers = [
            Acceptor(each, make, config.room, on_refused=config.on_refused, tls=config.ssl)  # type: ignore[misc]
            for each in sockets or ()
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """End, but let requests arrive first whose connections are new."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


class Config(uvicorn.Config):
    """uvicorn's, with what this protocol needs beside it."""

    room: Room
    """Counts the connections."""
    on_refused: Callable[[], None] = staticmethod(lambda: None)
    arrived_s: Callable[[], float] = staticmethod(time.monotonic)
    """When bytes that are read now came, on the monotonic clock."""
    gate: Gate | None = None
    """Answers some requests by their headers."""


class _Patient(Connection):
    """A connection with timeouts for headers that do not end, bodies that do not come and answers that nobody reads."""

    _is_answered = False
    """Whether this request was answered by its headers."""
    _is_refused = False
    """Whether that was a refusal."""
    _is_begun = False
    """Whether headers have begun that have not ended."""
    _is_waiting = True
    """Whether no request has begun, or the last was read to its end."""
    _used_s = 0.0
    """When it was last used, if uvicorn does not know of that."""
    _waiting: asyncio.TimerHandle | None = None
    _pieced = 0
    """Requests in the piece of data that is parsed now."""
    _chunks = _chunk_bytes = _other_bytes = 0
    """The chunks of this request's body, their bytes, and the bytes that came with them but belong to none."""
    _header_bytes = 0
    _fed_bytes = 0
    """Bytes parsed since the headers began: the parser reports a header only when it is complete."""
    _rest: asyncio.TimerHandle | None = None
    """Ends a connection whose client goes on with a body that is answered already."""
    _unread: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    """Bytes of answers that the client had not read when they were last looked at."""

    def __init__(self, config: "Config", state: ServerState, app_state: dict[str, Any], seat: Seat) -> None:
        super().__init__(config, state, app_state)
        self._seat, self._arrived_s, self._gate = seat, config.arrived_s, config.gate
        self._waiters = Waiters()
        if seat.is_extra:
            self.app = _only_health(self.app)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._client = client_of(self.client[0]) if self.client else ""
        self._wait(HEALTH_S if self._seat.is_extra else HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._come()
        self._seat.leave()
        self._expect_no_rest()
        self._look_no_more()
        self._unset_keepalive_if_required()  # which uvicorn leaves, and with it this object, if the client is cut off
        super().connection_lost(exc)
        self._waiters.disconnect()

    def data_received(self, data: bytes) -> None:
        if self._is_waiting and self._gate is not None and self._answers_again(data, self._gate):
            return
        was_waiting, self._pieced = self._is_waiting, 0
        in_body, before_bytes = self._is_in_body, self._chunk_bytes
        super().data_received(data)
        if in_body and self._is_in_body and not self._pieced:
            self._check_chunks(len(data) - (self._chunk_bytes - before_bytes))
        if was_waiting and self._is_waiting and self._pieced == 1 and self._is_refused and self._gate is not None:
            self._gate.remember(data, self.url, self.headers)
        if self._is_begun:
            self._wait(HEADERS_S)
        elif self._is_answered:
            self._expect_rest()
        self._fed_bytes = 0 if self._waiting is None else self._fed_bytes + len(data)
        if self._fed_bytes > HEADERS_BYTES + FIRST_BODY_BYTES and not self.transport.is_closing():
            self.send_400_response("the headers are too long")
        # uvicorn stops its keep-alive timer at any byte between requests, and restarts it only after an answer.
        if (self.cycle is None or self.cycle.response_complete) and self._waiting is None:
            self._wait_for_next()

    def on_message_begin(self) -> None:
        self._header_bytes = self._chunks = self._chunk_bytes = self._other_bytes = 0
        self._is_begun, self._is_waiting = True, False
        self._is_answered = self._is_refused = False
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[ARRIVED], scope[GONE] = self._arrived_s(), self._waiters

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + HEADER_BYTES  # ``_count``, without a call for each header
        if self._header_bytes > HEADERS_BYTES:
            raise ValueError("the headers are too long")
        if self._is_begun:  # what comes after the body are trailers, which no proxy looks at (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_begun = False
        self._come()
        self._check_headers()
        self._pieced += 1
        if self._pieced > MOST_PIPELINED or len(self.pipeline) >= MOST_PIPELINED:
            self._cut_off()
            raise ValueError("the client sends requests and waits for no answers")
        if self._gate is not None and self._answers_early(self._gate):
            return
        super().on_headers_complete()
        if self._seat.is_extra and self.cycle is not None:
            self.cycle.keep_alive = self._would_keep = False

    def on_body(self, body: bytes) -> None:
        self._chunks += 1
        self._chunk_bytes += len(body)
        if self._chunks > MOST_CHUNKS + self._chunk_bytes // CHUNK_BYTES:
            raise ValueError("the chunks are too small")
        if not self._is_answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_waiting = True
        self._expect_no_rest()
        if self._is_answered:
            return
        super().on_message_complete()
        self.scope[WHOLE] = True  # type: ignore[literal-required]
        if not self.pipeline and not self.transport.is_closing():
            # A long body may have paused reading. Only while reading goes on is a closed connection noticed.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._look_if_read()
        elif self.cycle.response_complete and not self._is_begun:
            self._expect_rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_if_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look_no_more()

    def timeout_keep_alive_handler(self) -> None:
        left_s = self._used_s + self.timeout_keep_alive - self.loop.time()
        if self._count_unread():  # closing would wait for it
            self._cut_off()
        elif left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _expect_rest(self) -> None:
        """Have the rest of a body come, which nobody reads: after an early answer, clients send it all the same."""
        if not self._is_waiting and self._rest is None:
            self._rest = self.loop.call_later(REST_S, self._cut_off)

    def _expect_no_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _look_if_read(self) -> None:
        """Look now and then at what the client has not read, until nearly all is read."""
        self._unread_bytes = self._count_unread()
        if self._unread is None and self._unread_bytes:
            self._unread = self.loop.call_later(UNREAD_S, self._end_if_unread)

    def _look_no_more(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _count_unread(self) -> int:
        try:
            return self.transport.get_write_buffer_size()
        except RuntimeError:  # uvloop's, of a connection that was cut off
            return 0

    def _end_if_unread(self) -> None:
        self._unread = None
        left_bytes = self._count_unread()
        if left_bytes and left_bytes >= self._unread_bytes:
            self._cut_off()
        elif left_bytes:
            self._look_if_read()

    def _answers_early(self, gate: Gate) -> bool:
        """Whether the gate had an answer, which is written; what comes of the request's body is dropped."""
        if not self._may_answer or self.parser.get_http_version() != "1.1" or self.parser.should_upgrade():
            return False
        stays_open = self.parser.should_keep_alive()
        answer = gate.answer(
            self.parser.get_method(),
            self.url,
            self.headers,
            client=self._client,
            arrived_s=self.scope[ARRIVED],  # type: ignore[literal-required]
            stays_open=stays_open,
        )
        if answer is None:
            return False
        self._is_answered, self._is_refused = True, self.parser.get_method() == b"POST"
        self.transport.write(answer)
        if not stays_open:
            self.transport.close()
        return True

    def _answers_again(self, data: bytes, gate: Gate) -> bool:
        """The same for a whole request that was refused before, without reading it again."""
        if not self._may_answer:
            return False
        answer = gate.answer_again(data, client=self._client, arrived_s=self._arrived_s())
        if answer is None:
            return False
        self._come()
        self._used_s = self.loop.time()
        self._wait_for_next()
        self.transport.write(answer)
        return True

    @property
    def _may_answer(self) -> bool:
        """Whether an answer may be written now: answers come in the order of requests."""
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        return not (self._seat.is_extra or self.flow.write_paused or self.transport.is_closing())

    def _check_headers(self) -> None:
        """Raise ``ValueError`` where servers disagree on whose request it is, or where it ends.

        See RFC 9112, sections 3.2 and 6.1.
        """
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]) or sum(name == b"host" for name, _ in self.headers) > 1:
            raise ValueError("there are two hosts, or a transfer coding other than chunked")

    @property
    def _is_in_body(self) -> bool:
        """Whether what comes now is the body of a request, or what lies between its chunks or behind them."""
        return not (self._is_waiting or self._is_begun)

    def _check_chunks(self, other_bytes: int) -> None:
        """End a connection that sends more beside the chunks of a body than belongs there."""
        self._other_bytes += other_bytes
        if self._other_bytes <= HEADERS_BYTES + CHUNK_LINE_BYTES * self._chunks or self.transport.is_closing():
            return
        if self._is_answered or self.cycle.response_started:
            self._cut_off()
        else:
            self.send_400_response("the chunks or trailers are too long")

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADERS_BYTES:
            raise ValueError("the headers are too long")

    def _wait(self, seconds: float) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(seconds, self.transport.close)

    def _wait_for_next(self) -> None:
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _come(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def _only_health(app: Any) -> ASGIApp:
    """The app for a connection too many."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_TO_ALL:
            await app(scope, receive, send)
            return
        status, headers, body = FULL
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


def config(app: Any, room: Room, *, certificate: Path | None = None, key: Path | None = None) -> Config:
    """How to serve an app, with TLS if there are a certificate and its key. Raises ``InputError`` for wrong ones."""
    secure: dict[str, Any] = {}
    if certificate is not None and key is not None:
        secure = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    made = Config(
        app,
        http=_Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        # Warnings are of requests that are none: who sends them must not fill the log. They are answered with 400.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
        **secure,
    )
    made.room = room
    try:
        made.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"TLS cannot use {certificate} and {key}: {error}", "give PEM files") from error
    return made
