"""gRPC's connections are shared out, and what it keeps for a client is limited, which its library does not do."""

import asyncio
from contextlib import ExitStack, asynccontextmanager

import grpc
from http2_frames import ACCEPT_CHARSET, NO_WINDOW, call, connect, frame, is_open

from corewise.serving.front import Front
from corewise.serving.memory_limit import LARGE_ANSWER_BYTES, answer_bytes
from corewise.serving.protocol import Limits
from corewise.serving.rpc import Service
from corewise.serving.rpc_connections import ENTRY_BYTES, LOOK_S, METADATA_BYTES, Overfull, Shares
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


def test_who_makes_much_metadata_of_few_bytes_is_barred_and_others_are_answered():
    async def main():
        refused, most = [], METADATA_BYTES // ENTRY_BYTES
        async with echoing(refused) as port:
            with connect(port, "127.0.0.3", call("/toy/Echo", ACCEPT_CHARSET * (most // 2))) as honest:
                with connect(port, "127.0.0.2", call("/toy/Echo", ACCEPT_CHARSET * 2 * most)) as bomb:
                    await until(lambda: not is_open(bomb))
                with connect(port, "127.0.0.2") as again:
                    await until(lambda: not is_open(again))
                assert is_open(honest)
            assert await ask(port) == b"hello"
            assert len(refused) >= 2

    asyncio.run(main())


class Large(Service):
    """Answers at length."""

    async def _infer(self, data, context):
        return bytes(4 * LARGE_ANSWER_BYTES)


def test_a_large_answer_over_grpc_counts_towards_its_address_until_it_is_read():
    path = "/inference.GRPCInferenceService/ModelInfer"
    unread = NO_WINDOW + call(path, ends=False) + frame(0, 1, 1, bytes(5))

    async def main():
        booked_bytes = answer_bytes(4 * LARGE_ANSWER_BYTES)
        front = Front(Limits(bodies_bytes=3 * booked_bytes, client_share=0.5), 16)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Large(None, None, Limits(), Tokens(()), front).handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def is_answered():
                code = await channel.unary_unary(path)(b"x", timeout=20).code()
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
