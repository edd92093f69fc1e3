"""The Open Inference Protocol over Ray Serve's gRPC proxy: each message goes through the service of ``corewise serve``.

The proxy carries a call's message, metadata and client, but not its deadline.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import grpc

from corewise.serving import oip
from corewise.serving.rpc import Service


class Encoded:
    """A message that is encoded already; Ray Serve encodes what a call returns."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        """Its bytes."""
        return self._data


class _Aborted(Exception):
    """A call ended with the status that its context was told."""


class _Context:
    """What a service asks of a call's context, from Ray Serve's."""

    def __init__(self, told: Any) -> None:
        self._told = told

    def peer(self) -> str:
        return str(self._told.peer())

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return list(self._told.invocation_metadata())

    def time_remaining(self) -> None:
        return None

    def add_done_callback(self, done: Callable[[Any], None]) -> None:
        """Call it now: the proxy takes an answer as soon as it is there."""
        done(self)

    def set_trailing_metadata(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._told.set_trailing_metadata(list(pairs))

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self._told.set_code(code)
        self._told.set_details(details)
        raise _Aborted


class Calls:
    """The calls of the protocol by their names, as Ray Serve's proxy looks for them."""

    service: Service | None = None

    async def answer(self, name: str, data: bytes, told: Any) -> Encoded:
        """Answer one call; what is refused is an answer too, whose status the context has."""
        assert self.service is not None, "it is open while it has requests"
        handler = self.service.handler.service(SimpleNamespace(method=f"/{oip.SERVICE}/{name}"))
        try:
            answer = await handler.stream_unary(_one(data), _Context(told))
        except _Aborted:
            return Encoded(b"")
        return Encoded(handler.response_serializer(answer))


def _call(name: str) -> Any:
    async def call(self: Calls, request: bytes, grpc_context: Any) -> Encoded:
        return await self.answer(name, request, grpc_context)

    return call


for _name in oip.METHODS:
    setattr(Calls, _name, _call(_name))


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


def add_to_server(servicer: Any, server: Any) -> None:
    """Have Ray Serve's gRPC proxy take the protocol's calls, and hand their bytes on as they are."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(servicer) for name in oip.METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))
