"""Frames of HTTP/2 as no client library would send them."""

import socket
import struct

ACCEPT_CHARSET = b"\x8f"
"""A header of the static table, which is one byte on the wire (RFC 7541, appendix A)."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def call(path: str, more: bytes = b"", *, ends: bool = True, stream: int = 1) -> bytes:
    """The headers of a gRPC call, none of which is kept in a table (RFC 7541, section 6.2.2)."""
    named = {":path": path, ":authority": "x", "content-type": "application/grpc", "te": "trailers"}
    told = b"".join(b"\0%c%b%c%b" % (len(k), k.encode(), len(v), v.encode()) for k, v in named.items())
    return frame(1, 5 if ends else 4, stream, b"\x83\x86" + told + more)


ACKNOWLEDGED = frame(4, 1, 0)
"""The server's settings are."""
MOST_STREAMS = 3
"""The number of the setting that says how many calls a connection may have at a time."""
NO_WINDOW = frame(4, 0, 0, (4).to_bytes(2) + bytes(4))
"""Settings of a client that can read no answer."""


def connect(port: int, address: str, more: bytes = b"") -> socket.socket:
    """A connection from that address of this machine that has begun as HTTP/2, which gRPC waits for."""
    made = socket.create_connection(("127.0.0.1", port), 5, (address, 0))
    try:
        made.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + more)
    except OSError:  # refused before all was sent
        made.close()
        raise
    made.settimeout(0)
    return made


def settings(connection: socket.socket) -> dict[int, int]:
    """What the other side says of itself in its first frame (RFC 9113, section 6.5)."""
    connection.settimeout(60)
    received = b""
    while len(received) < 9 or len(received) < 9 + int.from_bytes(received[:3]):
        received += connection.recv(4096)
    assert received[3] == 4, "its first frame is one of settings"
    payload = received[9 : 9 + int.from_bytes(received[:3])]
    return dict(struct.iter_unpack(">HI", payload))


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has not closed it."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False
