"""gRPC's connections are shared out, and what it keeps for a client is limited, which its library does not do."""

import asyncio
import errno
import os
import socket
from contextlib import ExitStack, asynccontextmanager

import grpc
import pytest
from http2_frames import ACCEPT_CHARSET, NO_WINDOW, call, connect, frame, is_open

from corewise.serving import oip
from corewise.serving.front import Front
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.protocol import Limits
from corewise.serving.rpc import Service
from corewise.serving.rpc_connections import ENTRY_BYTES, LOOK_S, METADATA_BYTES, Overfull, Shares
from corewise.serving.rpc_extensions import Handlers, list_methods
from corewise.serving.tokens import Tokens


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def echoing(refused):
    """The port of a server of which an address may have four connections."""

    async def echo(request, context):
        return request

    shares = Shares(8, 0.5, lambda: refused.append(1))
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    sizes = [(f"grpc.{name}max_metadata_size", METADATA_BYTES) for name in ("", "absolute_")]
    server = grpc.aio.server(options=sizes)
    server.add_generic_rpc_handlers((Overfull(shares), grpc.method_handlers_generic_handler("toy", handlers)))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    shares.start(port)
    yield port
    shares.close()
    await server.stop(0)


async def ask(port):
    """What the server answers to a client of 127.0.0.1."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        return await channel.unary_unary("/toy/Echo")(b"hello", timeout=20)


def test_an_address_has_its_share_of_grpcs_connections_and_keeps_the_older_ones():
    async def main():
        refused = []
        async with echoing(refused) as port:
            with ExitStack() as stack:
                old = [stack.enter_context(connect(port, "127.0.0.2")) for _ in range(4)]
                other = [stack.enter_context(connect(port, "127.0.0.3")) for _ in range(2)]
                await asyncio.sleep(1.5 * LOOK_S)
                assert not refused
                new = [stack.enter_context(connect(port, "127.0.0.2")) for _ in range(2)]
                await until(lambda: len(refused) == 2 and not any(map(is_open, new)))
                assert all(map(is_open, old + other))
                other.pop().close()
                assert await ask(port) == b"hello"
            assert len(refused) == 2

    asyncio.run(main())


def test_much_metadata_of_few_bytes_ends_its_connection_and_no_other_of_that_address():
    async def main():
        refused, most = [], METADATA_BYTES // ENTRY_BYTES
        async with echoing(refused) as port:
            with connect(port, "127.0.0.3", call("/toy/Echo", ACCEPT_CHARSET * (most // 2))) as honest:
                with connect(port, "127.0.0.3", call("/toy/Echo", ACCEPT_CHARSET * 2 * most)) as bomb:
                    await until(lambda: not is_open(bomb))
                assert await ask(port) == b"hello"
                assert is_open(honest)
            assert len(refused) == 1

    asyncio.run(main())


def test_the_older_connections_stay_whatever_their_files_numbers_and_each_is_counted_once(monkeypatch):
    def dup(handle):
        raise OSError(errno.EMFILE, "no file is left")

    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as stack:
        port = listening.getsockname()[1]
        shares = Shares(8, 0.5, lambda: None)

        def accept():
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.settimeout(0)
            return client, stack.enter_context(listening.accept()[0])

        low = os.open(os.devnull, os.O_RDONLY)  # whose number the newest connection gets
        stack.callback(os.close, low)
        old = [accept() for _ in range(4)]
        assert shares._look(port, ()) == 0
        with monkeypatch.context() as full:
            full.setattr(os, "dup", dup)
            assert shares._look(port, ()) == 0
        new, held = accept()
        os.dup2(held.fileno(), low)
        held.close()
        assert [shares._look(port, ()) for _ in range(2)] == [1, 0]
        assert not is_open(new)
        assert all(is_open(client) for client, _ in old)


def test_only_new_sockets_are_looked_at(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as stack:
        pairs = [stack.enter_context(one) for _ in range(20) for one in socket.socketpair()]
        shares, copies = Shares(8, 0.5, lambda: None), []
        shares._look(listening.getsockname()[1], ())
        copy = os.dup
        monkeypatch.setattr(os, "dup", lambda handle: copies.append(handle) or copy(handle))
        shares._look(listening.getsockname()[1], ())
        assert not copies
        pairs += [stack.enter_context(one) for one in socket.socketpair()]
        shares._look(listening.getsockname()[1], ())
        assert len(copies) == 2


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
