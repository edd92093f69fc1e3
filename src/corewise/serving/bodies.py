"""The bodies of HTTP requests, within limits before anything is kept."""

import asyncio
import zlib

from starlette.requests import Request

from corewise.serving.protocol import Limits, ProtocolError


class Bodies:
    """Reads them, and knows how many bytes are coming in together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._coming_bytes = 0

    async def read(self, request: Request) -> bytes:
        """The whole body, unpacked. Raises ``ProtocolError`` where it is too large, too slow, or no such packing."""
        told = request.headers.get("content-length", "")
        known = told.isascii() and told.isdecimal()
        if known and (len(told) > 20 or int(told) > self._limits.body_bytes):
            raise self._too_large()
        size = int(told) if known else self._limits.body_bytes
        if self._coming_bytes and self._coming_bytes + size > self._limits.bodies_bytes:
            raise ProtocolError("too many large requests are being read", "try again later", 503)
        self._coming_bytes += size
        try:
            body = await self._whole(request)
        finally:
            self._coming_bytes -= size
        packing = request.headers.get("content-encoding", "identity").strip().lower()
        return body if packing == "identity" else self._unpacked(body, packing)

    async def _whole(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self._limits.body_bytes:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError as error:
            raise ProtocolError(f"the body did not come in {self._limits.body_s:g} s", status=408) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _unpacked(self, body: bytes, packing: str) -> bytes:
        if packing not in ("gzip", "deflate"):
            raise ProtocolError(f"the content encoding {packing[:20]!r} is unknown", "use gzip, deflate or none", 415)
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | (16 if packing == "gzip" else 0))
        try:
            found = unpacker.decompress(body, self._limits.body_bytes + 1)
        except zlib.error as error:
            raise ProtocolError(f"the body is no {packing}: {error}") from error
        if len(found) > self._limits.body_bytes:
            raise self._too_large()
        if not unpacker.eof:
            raise ProtocolError(f"the body is no whole {packing}")
        return found

    def _too_large(self) -> ProtocolError:
        return ProtocolError(f"the body has more than {self._limits.body_bytes} bytes", "send less at a time", 413)
