"""The same client over gRPC: HTTP/2 frames of prepared messages, one call at a time on each connection.

gRPC's own clients for Python take several times as long for a call as the server does. Frames and the compression of
headers are those of RFC 9113 and RFC 7541; headers are sent as they are, and of the answer's only their end is read.
"""

import numpy as np

from bench.wire import MODEL, Connection
from corewise.serving import oip

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
NO_TABLE, WINDOW = b"\x00\x01\x00\x00\x00\x00", b"\x00\x04\x7f\xff\xff\xff"
"""Settings: the server's headers refer to no earlier ones, and the client reads whatever comes."""
FIRST_WINDOW = 65535
HEAD = 9
"""Bytes before each frame's content."""


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """A frame."""
    return len(content).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + content


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that is not remembered; both parts shorter than 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


CALL = b"\x83\x86" + b"".join(  # POST and http
    _literal(name, value)
    for name, value in (
        (b":path", f"/{oip.SERVICE}/ModelInfer".encode()),
        (b":authority", b"bench"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)


def message(name: str, row: np.ndarray) -> bytes:
    """A ``ModelInferRequest`` with one float32 row."""
    described = {"name": name, "datatype": "FP32", "shape": row.shape}
    made: bytes = oip.message("ModelInferRequest")(
        model_name=MODEL, inputs=[described], raw_input_contents=[row.tobytes()]
    ).SerializeToString()
    return made


class GrpcConnection(Connection):
    """One call at a time over gRPC."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._stream, self._window, self._data = -1, FIRST_WINDOW, b""
        more = (2**31 - 1 - FIRST_WINDOW).to_bytes(4, "big")
        opening = frame(SETTINGS, 0, 0, NO_TABLE + WINDOW) + frame(WINDOW_UPDATE, 0, 0, more)
        self.socket.send(PREFACE + opening)

    def begin(self, request: bytes) -> None:
        """Put a call with that message into ``out``."""
        self._stream += 2
        self._data = b""
        content = b"\x00" + len(request).to_bytes(4, "big") + request
        self._window -= len(content)
        if self._window < 0:
            raise RuntimeError("the server has not read what it was sent")
        called = frame(HEADERS, END_HEADERS, self._stream, CALL)
        self.out = memoryview(called + frame(DATA, END_STREAM, self._stream, content))

    def answer(self) -> tuple[int, bytes] | None:
        """200 and the message, once the call has ended; 0 if it has none."""
        ended = False
        while len(self.received) >= HEAD:
            end = HEAD + int.from_bytes(self.received[:3], "big")
            if len(self.received) < end:
                break
            kind, flags = self.received[3], self.received[4]
            content, self.received = self.received[HEAD:end], self.received[end:]
            if kind == DATA:
                self._data += content
            elif kind == WINDOW_UPDATE:
                self._window += int.from_bytes(content, "big")
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self.socket.send(frame(kind, ACK, 0, content if kind == PING else b""))
            elif kind == GOAWAY:
                return 0, b""
            ended = ended or bool(kind in (DATA, HEADERS) and flags & END_STREAM)
        if not ended:
            return None
        return (200, self._data[5:]) if self._data else (0, b"")
