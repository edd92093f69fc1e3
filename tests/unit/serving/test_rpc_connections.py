"""gRPC's connections are shared out among addresses, though its library knows no such limit."""

import asyncio
import socket
from contextlib import ExitStack

import grpc

from corewise.serving.rpc_connections import Shares

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""HTTP/2 with no settings: without it gRPC closes a connection by itself."""


def connect(port, address):
    made = socket.create_connection(("127.0.0.1", port), 5, (address, 0))
    made.sendall(PREFACE)
    made.settimeout(0)
    return made


def is_open(connection):
    try:
        while data := connection.recv(4096):
            assert data
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    return False


def test_an_address_has_its_share_of_grpcs_connections_and_keeps_the_older_ones():
    refused = []

    async def main():
        async def echo(request, context):
            return request

        server = grpc.aio.server()
        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("toy", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        shares = Shares(port, 8, 0.5, lambda: refused.append(1))
        with ExitStack() as stack:
            old = [stack.enter_context(connect(port, "127.0.0.2")) for _ in range(4)]
            other = [stack.enter_context(connect(port, "127.0.0.3")) for _ in range(2)]
            await asyncio.sleep(0.6)  # a look, which finds nothing wrong
            assert not refused
            new = [stack.enter_context(connect(port, "127.0.0.2")) for _ in range(3)]
            async with asyncio.timeout(20):
                while len(refused) < 3 or any(map(is_open, new)):
                    await asyncio.sleep(0.02)
            assert all(map(is_open, old + other))
            old.pop().close()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert await channel.unary_unary("/toy/Echo")(b"hello", timeout=20) == b"hello"
            assert len(refused) == 3
        shares.close()
        await server.stop(0)

    asyncio.run(main())
