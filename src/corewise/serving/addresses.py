"""Where a server listens, host and port or the path of a unix socket, and who calls it."""

import socket
import stat
from contextlib import ExitStack
from functools import lru_cache
from ipaddress import IPv6Address
from pathlib import Path

from corewise.common.errors import InputError

Address = tuple[str, int] | Path
"""(host, port), port 0 for any that is free, or the path of a unix socket."""
BACKLOG = 2048


def bound(address: Address) -> socket.socket:
    """A socket that listens there. Raises ``InputError``."""
    try:
        with ExitStack() as undo:
            if isinstance(address, Path):
                remove_stale(address)
                made = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                made.bind(str(address))
            else:
                family, *_ = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
                # asyncio sets TCP_NODELAY on connections of sockets that name TCP only; without it each answer waits
                # 40 ms for the acknowledgement of its own headers.
                made = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(address)
            made.listen(BACKLOG)
            undo.pop_all()
    except OSError as error:
        raise InputError(
            f"nothing can listen on {shown(address)}: {error.strerror or error}", "give another HOST:PORT or unix:PATH"
        ) from error
    return made


def remove_stale(path: Path) -> None:
    """Remove a unix socket on which no server listens any more.

    Raises ``InputError`` if one does, or if the path is not a socket that this process may use.
    """
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise InputError(f"{path} exists and is not a socket", "give the path of a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"unix:{path} cannot be used: {error.strerror or error}", "give another path") from error
    raise InputError(f"another server listens on unix:{path}", "give another path")


@lru_cache(4096)
def client_of(host: str) -> str:
    """The client at a numeric address: with IPv6 one has all addresses of its network of 64 bits.

    Example:
        >>> client_of("192.0.2.1"), client_of("::ffff:192.0.2.1"), client_of("2001:db8::1:2:3:4")
        ('192.0.2.1', '192.0.2.1', '2001:db8::')
    """
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or IPv6Address(int(address) >> 64 << 64))


def shown(address: Address) -> str:
    """As the command line has it, which is gRPC's way of naming it too."""
    if isinstance(address, Path):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
