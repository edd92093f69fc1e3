"""The connection to a Ray cluster: the right version, an address that answers within seconds, and tokens."""

import logging
import re
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from corewise.common.errors import EngineError, InputError, MissingExtra
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import most_threads

LEAST_RAY = (2, 59)
"""Older versions run code of web pages and of data (CVE-2026-57516 and before), or start clusters without tokens."""
SERVE_NEEDS = ("grpc", "fastapi", "starlette", "uvicorn", "aiohttp")
"""Packages of Ray's extra ``serve``, which ``pip install ray`` alone leaves out."""
ANSWER_S = 10.0
"""How long an address may take to answer."""
STORE_BYTES = 256 * 2**20
"""What a cluster that we start may have in its object store: a few parts."""
CLIENT = "ray://"
PROBES = {CLIENT: "/ray.rpc.RayletDriver/ClusterInfo", "": "/ray.rpc.NodeInfoGcsService/CheckAlive"}
"""A question without consequences, which a Ray client's server and a cluster's head answer."""
NO_RAY = ("DEADLINE_EXCEEDED", "UNAVAILABLE", "UNIMPLEMENTED")
"""What comes of that question where nobody is, or another service."""
VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""The versions of the cluster and of this process, where Ray says that they differ."""
SAFE = "start all of its nodes with RAY_AUTH_MODE=token ('ray get-auth-token --generate' makes the token)"
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token"


def check_ray(installed: str | None) -> None:
    """Raise ``MissingExtra`` without Ray, and ``EngineError`` for a version with known holes. Pure."""
    if installed is None:
        raise MissingExtra("ray", "ray", "running on a cluster")
    numbers = tuple(int(part) for part in installed.split(".")[:2] if part.isdecimal())
    if numbers < LEAST_RAY:
        least = ".".join(map(str, LEAST_RAY))
        raise EngineError(
            f"ray {installed} is installed, which has known security holes", f"pip install 'ray>={least}'"
        )


def installed_ray() -> str | None:
    """The version of the package ``ray``; ``None`` if it is not installed."""
    try:
        return version("ray")
    except PackageNotFoundError:
        return None


def require_ray(packages: Iterable[str] = ("grpc",)) -> None:
    """``check_ray`` of this Python, and ``MissingExtra`` if it has a Ray without those packages."""
    check_ray(installed_ray())
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(package, "ray", "running on a cluster")


def require_serve() -> None:
    """``require_ray``, with what Ray Serve needs."""
    require_ray(SERVE_NEEDS)


def check_address(address: str) -> None:
    """Raise ``InputError`` for what is no address of a cluster. Pure."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if address not in ("local", "auto") and not (host and "/" not in host and port.isdecimal()):
        raise InputError(
            f"{address!r} is not an address of a Ray cluster",
            "give local, auto, HOST:PORT or ray://HOST:PORT (6379 and 10001 are Ray's own ports)",
        )


@contextmanager
def connected(address: str) -> Iterator[str | None]:
    """A connection to the cluster, or to one that is started here for as long as it lasts (``local``).

    A process that is connected already stays so, with ``auto``.

    Returns:
        The id of the node that this process runs on; ``None`` if it is none of the cluster's.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: The address is none, or this process is connected elsewhere.
        EngineError: Nothing answers there, it is no cluster that this Ray can talk to, or it takes commands from
            anyone.
    """
    require_ray()
    check_address(address)
    import ray

    if ray.is_initialized():
        if address != "auto":
            raise InputError("this process is connected to a Ray cluster already", "give auto as its address")
        check_tokens(address)
        yield ray.get_runtime_context().get_node_id()
        return
    if address == "auto":
        address = found_address()
    if address != "local":
        check_guarded(address, probe(address))
    _connect(address)
    try:
        if address == "local":
            check_tokens(address)
        yield None if address.startswith(CLIENT) else ray.get_runtime_context().get_node_id()
    finally:
        ray.shutdown()


def found_address() -> str:
    """The cluster that ``auto`` stands for, as Ray finds it: that of RAY_ADDRESS, or this machine's.

    Ray itself would wait for minutes if nothing answers there. Raises ``EngineError`` if there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return str(canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError as error:
        several = "multiple" in str(error)
        what = "there are several Ray clusters" if several else "there is no Ray cluster"
        raise EngineError(f"{what} on this machine", f"give its address{'' if several else ', or local'}") from error
    except ValueError as error:
        raise EngineError(
            f"auto means RAY_ADDRESS, which is not HOST:PORT: {first_line(error)}",
            "set RAY_ADDRESS to HOST:PORT, or give ray://HOST:PORT itself with --ray",
        ) from error


def check_tokens(address: str) -> None:
    """Raise ``EngineError`` if the cluster that this process is connected to takes commands without a token."""
    import ray

    check_guarded(address, probe(str(ray.get_runtime_context().gcs_address)))


Answer = Literal["guarded", "open", "silent"]


def probe(address: str) -> Answer:
    """What a cluster says to a question without a token: it refuses, it answers, or nothing comes in ``ANSWER_S``.

    The last is also what an address says that speaks no gRPC, TLS, or is another service.
    """
    import grpc

    prefix = CLIENT if address.startswith(CLIENT) else ""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError, UnicodeError):  # the last for what is no name of a host
        return "silent"
    with grpc.insecure_channel(address.removeprefix(CLIENT), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(PROBES[prefix])(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            code = error.code()
            if code.name in NO_RAY:
                return "silent"
            return "guarded" if code == grpc.StatusCode.UNAUTHENTICATED else "open"
    return "open"


def check_guarded(address: str, answer: Answer) -> None:
    """Raise ``EngineError`` unless a cluster wants tokens. Pure."""
    if answer == "silent":
        raise EngineError(f"no Ray cluster answers at {address}", "check the address and that 'ray status' answers")
    if answer == "open":
        raise EngineError(f"the Ray cluster at {address} runs code for anyone who reaches it", SAFE)


def _connect(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RayError

    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {
            "num_cpus": most_threads(inspect_cpu()),
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }
    try:
        with warnings.catch_warnings():
            # It announces how a later Ray will treat accelerators, of which there are none.
            warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
            ray.init(address, **options)
    except AuthenticationError as error:
        raise EngineError(f"the Ray cluster at {address} wants a token: {first_line(error)}", TOKEN) from error
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise unreachable(address, error) from error


def unreachable(address: str, error: Exception) -> EngineError:
    """The error for what Ray says of a cluster that it cannot use. Pure."""
    match VERSIONS.findall(str(error)):
        case [(ray_there, python_there), (ray_here, python_here), *_] if "Version mismatch" in str(error):
            return EngineError(
                f"the Ray cluster at {address} has Ray {ray_there} and Python {python_there}, and this machine has "
                f"Ray {ray_here} and Python {python_here}",
                "install the same versions on all machines",
            )
    if "No node info found" in str(error):
        host = address.rpartition(":")[0]
        return EngineError(
            f"this machine is no node of the Ray cluster at {address}",
            f"run the command on one of its nodes, or give {CLIENT}{host}:10001",
        )
    return EngineError(f"Ray cannot be reached at {address}: {first_line(error)}", "see 'ray status' on that machine")


def first_line(error: BaseException) -> str:
    """The beginning of a message, without its last full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__
