"""The bodies of HTTP requests, unpacked as they arrive and within limits before anything is kept."""

import asyncio
import zlib
from collections.abc import Iterator

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from corewise.serving.budget import Booking
from corewise.serving.protocol import Limits, ProtocolError

RATIO = 100
"""How many times its size a packed body may unpack to; JSON of numbers has 2 to 10, of zeros up to 60."""
SMALL_BYTES = 2**20
"""What any body may unpack to."""
PIECE_BYTES = 2**16
"""What is unpacked at once: under a millisecond."""


async def read(request: Request, limits: Limits, booking: Booking) -> bytes:
    """The whole body, unpacked; each part is booked when it is there.

    Raises ``ProtocolError`` where it is too large or too slow, where its packing is not known or not whole, and where
    there is no room for it.
    """
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 20 or int(length) > limits.body_bytes):
        raise too_large(limits)
    packing = request.headers.get("content-encoding", "identity").strip().lower()
    unpacker = None if packing == "identity" else _Unpacker(packing, limits)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for arrived in request.stream():
                for part in (arrived,) if unpacker is None else unpacker.parts(arrived):
                    size += len(part)
                    if size > limits.body_bytes:
                        raise too_large(limits)
                    booking.add(len(part))
                    parts.append(part)
                    if unpacker is not None:
                        await asyncio.sleep(0)
    except TimeoutError as error:
        raise ProtocolError(f"the body did not arrive in {limits.body_s:g} s", status=408) from error
    if unpacker is not None:
        unpacker.finish()
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def whole(receive: Receive, limits: Limits, booking: Booking) -> bytes:
    """A body that has arrived completely and is not packed, so that it needs neither a timeout nor an unpacker.

    Raises ``ProtocolError`` where it is too large or there is no room for it, and ``ClientDisconnect``.
    """
    message = await receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    body: bytes = message["body"]
    if len(body) > limits.body_bytes:
        raise too_large(limits)
    booking.add(len(body))
    return body


class _Unpacker:
    """Unpacks a body piece by piece."""

    def __init__(self, packing: str, limits: Limits) -> None:
        if packing not in ("gzip", "deflate"):
            raise ProtocolError(f"the content encoding {packing[:20]!r} is unknown", "use gzip, deflate or none", 415)
        self._packing, self._limits = packing, limits
        self._zlib = zlib.decompressobj(wbits=zlib.MAX_WBITS | (16 if packing == "gzip" else 0))
        self._packed_bytes = self._unpacked_bytes = 0

    def parts(self, packed: bytes) -> Iterator[bytes]:
        """What these bytes unpack to, in pieces. Raises ``ProtocolError``."""
        self._packed_bytes += len(packed)
        while packed:
            if self._zlib.eof:
                raise ProtocolError(f"the body goes on after its {self._packing}", "pack all of it at once")
            try:
                part = self._zlib.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                raise ProtocolError(f"the body is not {self._packing}: {error}") from error
            packed = self._zlib.unconsumed_tail or self._zlib.unused_data
            self._unpacked_bytes += len(part)
            if self._unpacked_bytes > max(SMALL_BYTES, RATIO * self._packed_bytes):
                raise ProtocolError(
                    f"the body unpacks to more than {RATIO} times its size", "send it with less compression", 413
                )
            if part:
                yield part

    def finish(self) -> None:
        """Raise ``ProtocolError`` where the body ended too early."""
        if not self._zlib.eof:
            raise ProtocolError(f"the body is not a whole {self._packing}")


def too_large(limits: Limits) -> ProtocolError:
    """The error of a body that has more bytes than it may."""
    return ProtocolError(f"the body has more than {limits.body_bytes} bytes", "send less at a time", 413)
