"""gRPC's connections are shared out and bound by limits from their beginning, and answers count until they are read."""

import asyncio
import socket
from contextlib import ExitStack, asynccontextmanager

import grpc
import pytest
from certificates import self_signed
from http2_frames import ACCEPT_CHARSET, ACKNOWLEDGED, NO_WINDOW, call, connect, frame, is_open

from corewise.common.errors import InputError
from corewise.serving import messages, oip, rpc_connections
from corewise.serving.budget import Budget
from corewise.serving.connections import HEALTH_CONNECTIONS, KEEPALIVE, Room
from corewise.serving.front import Front
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.protocol import Limits
from corewise.serving.rpc import Service
from corewise.serving.rpc_connections import (
    FRAME_BYTES,
    HELD_BYTES,
    METADATA_BYTES,
    PREFACE,
    Greeting,
    RpcPort,
    secured,
)
from corewise.serving.rpc_extensions import Handlers, list_methods
from corewise.serving.tokens import Tokens

MIB = 2**20
OPTIONS = [(f"grpc.max_{side}_message_length", -1) for side in ("send", "receive")]


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


class Toy(grpc.GenericRpcHandler):
    """Calls that echo, tell who called, wait, or answer at length; how much metadata each had is kept."""

    def __init__(self):
        self.metadata, self.go_on = [], asyncio.Event()

    def service(self, details):
        self.metadata.append(len(details.invocation_metadata))

        async def echo(request, context):
            return request

        async def who(request, context):
            return messages.client_of(context).encode()

        async def wait(request, context):
            await self.go_on.wait()
            return b"waited"

        async def large(request, context):
            return bytes(8 * MIB)

        calls = {"Echo": echo, "Who": who, "Wait": wait, "Large": large}
        return grpc.unary_unary_rpc_method_handler(calls[details.method.removeprefix("/toy/")])


@asynccontextmanager
async def port_of(toy, address=("127.0.0.1", 0), **options):
    """One of which an address may have four connections."""
    limits = Limits()
    port = RpcPort(address, (toy,), Room(8, 0.5), Budget(limits), message_bytes=64 * MIB, **options)
    await port.start()
    try:
        yield port
    finally:
        await port.stop(0)


async def ask(place, method="Echo", message=b"hello", credentials=None):
    """What the server answers."""
    target = f"127.0.0.1:{place}" if isinstance(place, int) else f"unix:{place}"
    if credentials is None:
        channel = grpc.aio.insecure_channel(target, OPTIONS)
    else:
        channel = grpc.aio.secure_channel(target, credentials, OPTIONS)
    async with channel:
        return await channel.unary_unary(f"/toy/{method}")(message, timeout=20)


# --- greetings --------------------------------------------------------------------------------------------------------


SETTINGS = frame(4, 0, 0, bytes(6))
EARLY = call("/toy/Echo", ends=False) + frame(0, 1, 1, b"data")


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_greeting_is_whole_with_the_acknowledgement_which_goes_before_what_came_earlier(step):
    sent, wanted = PREFACE + SETTINGS + EARLY + ACKNOWLEDGED, PREFACE + SETTINGS + ACKNOWLEDGED + EARLY
    greeting, found = Greeting(), []
    for start in range(0, len(sent), step):
        assert not any(found)
        found.append(greeting.add(sent[start : start + step]))
    assert found[-1] == wanted
    assert Greeting().add(sent + b"more") == wanted + b"more"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + EARLY,
        PREFACE + ACKNOWLEDGED,
        PREFACE + SETTINGS + frame(0, 0, 1, bytes(FRAME_BYTES + 1)),
        PREFACE + SETTINGS + frame(1, 0, 1, ACCEPT_CHARSET * FRAME_BYTES) * (HELD_BYTES // FRAME_BYTES + 1),
    ],
    ids=["http1", "call first", "acknowledgement first", "long frame", "much"],
)
def test_what_is_no_greeting_is_told_at_once(sent):
    with pytest.raises(ValueError, match=r"HTTP/2|settings|acknowledges"):
        Greeting().add(sent)


# --- connections ------------------------------------------------------------------------------------------------------


def test_metadata_of_few_bytes_is_refused_by_grpc_whenever_its_client_acknowledges():
    """Before that the library lets it have 16 MiB, of which each header of one byte takes 46."""
    bomb = call("/toy/Echo", ACCEPT_CHARSET * 16_000, ends=False)
    honest = call("/toy/Echo", stream=3, ends=False) + frame(0, 1, 3, bytes(5))

    async def main():
        toy = Toy()
        async with port_of(toy) as port:
            for sent in (bomb + ACKNOWLEDGED + honest, ACKNOWLEDGED + bomb + honest):
                with connect(port.place, "127.0.0.3", sent) as client:
                    await until(lambda: toy.metadata)
                    assert max(toy.metadata) <= METADATA_BYTES // 32
                    assert is_open(client)
                toy.metadata.clear()

    asyncio.run(main())


def test_who_acknowledges_nothing_reaches_no_library_and_is_disconnected(monkeypatch):
    monkeypatch.setattr(rpc_connections, "HANDSHAKE_S", 0.2)
    bomb = call("/toy/Echo", ACCEPT_CHARSET * 16_000)

    async def main():
        toy = Toy()
        async with port_of(toy) as port:
            with connect(port.place, "127.0.0.3", bomb) as one, connect(port.place, "127.0.0.3", bomb * 6) as many:
                await until(lambda: not is_open(many))
                await until(lambda: not is_open(one))
            assert not toy.metadata
            await until(lambda: port.budget._used_bytes == 0)
            monkeypatch.undo()
            assert await ask(port.place) == b"hello"
            await until(lambda: not port.clients)

    asyncio.run(main())


def test_an_address_has_its_share_of_grpcs_connections_and_others_theirs(monkeypatch):
    monkeypatch.setattr(rpc_connections, "HEALTH_S", 60.0)

    async def main():
        refused = []
        async with port_of(Toy(), on_refused=lambda: refused.append(1)) as port:
            with ExitStack() as stack:
                seats = 4 + HEALTH_CONNECTIONS // 2
                held = [stack.enter_context(connect(port.place, "127.0.0.2", ACKNOWLEDGED)) for _ in range(seats)]
                await until(lambda: len(port.clients) == seats)
                with connect(port.place, "127.0.0.2") as beyond:
                    await until(lambda: refused)
                    beyond.settimeout(20)
                    told = beyond.recv(4096)
                    assert told.startswith(frame(4, 0, 0))
                    assert told[9 + 3] == 7  # GOAWAY
                    assert b"too many connections" in told
                assert await ask(port.place) == b"hello"
                held.pop(0).close()
                await until(lambda: len(port.clients) == seats - 1)
                stack.enter_context(connect(port.place, "127.0.0.2"))
                await until(lambda: len(port.clients) == seats)
            assert len(refused) == 1
            await until(lambda: not port.clients)

    asyncio.run(main())


def test_a_connection_beyond_the_limit_has_time_for_a_health_check(monkeypatch):
    monkeypatch.setattr(rpc_connections, "HEALTH_S", 0.3)

    async def main():
        async with port_of(Toy()) as port:
            with ExitStack() as stack:
                for address in ("127.0.0.2", "127.0.0.3"):
                    for _ in range(4):
                        stack.enter_context(connect(port.place, address, ACKNOWLEDGED))
                await until(lambda: len(port.clients) == 8)
                with connect(port.place, "127.0.0.4", ACKNOWLEDGED) as extra:
                    await until(lambda: not is_open(extra))
                assert len(port.clients) == 8

    asyncio.run(main())


def test_the_library_is_told_whose_connection_it_is(tmp_path):
    async def main():
        toy = Toy()
        async with port_of(toy) as port, port_of(toy, tmp_path / "socket") as local:
            assert await ask(port.place, "Who") == b"127.0.0.1"
            assert await ask(local.place, "Who") == b""
        assert not (tmp_path / "socket").exists()
        try:
            async with (
                port_of(toy, ("::1", 0)) as port,
                grpc.aio.insecure_channel(f"[::1]:{port.place}") as channel,
            ):
                assert await channel.unary_unary("/toy/Who")(b"", timeout=20) == b"::"
        except InputError:
            pytest.skip("this machine has no IPv6")

    asyncio.run(main())


@pytest.mark.parametrize("is_secure", [False, True])
def test_long_messages_pass_both_ways(is_secure, tmp_path):
    message = bytes(range(256)) * (12 * MIB // 256)

    async def main():
        tls, credentials = None, None
        if is_secure:
            certificate, key = self_signed(tmp_path)
            tls, credentials = secured(certificate, key), grpc.ssl_channel_credentials(certificate.read_bytes())
        async with port_of(Toy(), tls=tls) as port:
            found = await asyncio.gather(*(ask(port.place, message=message, credentials=credentials) for _ in range(3)))
            assert found == [message] * 3

    asyncio.run(main())


def test_a_client_that_reads_nothing_is_disconnected(monkeypatch):
    monkeypatch.setattr(rpc_connections, "UNREAD_S", 0.2)
    window = (2**31 - 65536).to_bytes(4)
    wide = frame(4, 0, 0, (4).to_bytes(2) + (2**31 - 1).to_bytes(4)) + frame(8, 0, 0, window)

    async def main():
        async with port_of(Toy()) as port:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port.place))
                asked = call("/toy/Large", ends=False) + frame(0, 1, 1, bytes(5))
                client.sendall(PREFACE + wide + ACKNOWLEDGED + asked)
                await until(lambda: port.clients)
                await until(lambda: not port.clients)

    asyncio.run(main())


def test_a_client_that_vanished_without_a_word_is_noticed():
    async def main():
        async with port_of(Toy()) as port:
            with connect(port.place, "127.0.0.1", ACKNOWLEDGED):
                await until(lambda: port.clients)
                (client,) = port.clients
                held = client.transport.get_extra_info("socket")
                assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle_s, pause_s, times = (held.getsockopt(socket.IPPROTO_TCP, option) for option in KEEPALIVE)
                assert idle_s + pause_s * times <= 120

    asyncio.run(main())


def test_at_its_end_calls_are_answered_and_connections_are_no_longer_taken():
    async def main():
        toy = Toy()
        async with port_of(toy) as port:
            waiting = asyncio.ensure_future(ask(port.place, "Wait"))
            await until(lambda: toy.metadata)
            stopping = asyncio.ensure_future(port.stop(20))
            await until(lambda: port._acceptor is None)
            with pytest.raises(ConnectionRefusedError):
                connect(port.place, "127.0.0.1")
            toy.go_on.set()
            assert await waiting == b"waited"
            await stopping

    asyncio.run(main())


def test_what_cannot_be_used_is_told(tmp_path, monkeypatch):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="nothing can listen on"):
            async with port_of(Toy(), taken.getsockname()):
                pass
        with pytest.raises(InputError, match="give PEM files"):
            secured(tmp_path / "none", tmp_path / "none")
        (tmp_path / ("x" * 100)).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
        with pytest.raises(InputError, match="set TMPDIR to a short path"):
            async with port_of(Toy()):
                pass

    asyncio.run(main())


# --- answers ----------------------------------------------------------------------------------------------------------


class Large(Service):
    """Answers at length."""

    async def _infer(self, data, context):
        return bytes(4 * LARGE_ANSWER_BYTES)


async def infer_at_length(request, context):
    """The same for a stream."""
    return oip.message("ModelInferResponse")(raw_output_contents=[bytes(4 * LARGE_ANSWER_BYTES)])


@pytest.mark.parametrize("unread_call", ["ModelInfer", "ModelStreamInfer"])
def test_a_large_answer_over_grpc_counts_towards_its_address_until_it_is_read(unread_call):
    path = "/inference.GRPCInferenceService/"
    unread = NO_WINDOW + call(path + unread_call, ends=False) + frame(0, 1, 1, bytes(5))

    async def main():
        booked_bytes = answer_bytes(4 * LARGE_ANSWER_BYTES)
        front = Front(Limits(bodies_bytes=3 * booked_bytes, client_share=0.5), 16)
        server = grpc.aio.server()
        tokens, limits = Tokens(()), Limits()
        streams = Handlers(list_methods(None, None, infer_at_length, front, limits), None, tokens, limits)
        server.add_generic_rpc_handlers((Large(None, None, limits, tokens, front).handler, streams))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def is_answered():
                code = await channel.unary_unary(path + "ModelInfer")(b"x", timeout=20).code()
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
                return code is grpc.StatusCode.OK

            for _ in range(4):
                assert await is_answered()
            with connect(port, "127.0.0.1", unread):
                await until(lambda: front.budget.total_booked_bytes >= 5 * booked_bytes)
                assert not await is_answered()
            async with asyncio.timeout(20):
                while not await is_answered():
                    pass
        await server.stop(0)
        front.close()

    asyncio.run(main())
