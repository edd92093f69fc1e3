"""cluster.connection: versions, addresses, and what an address says to a question without a token."""

import re
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from corewise.cluster import connection
from corewise.cluster.connection import (
    check_address,
    check_guarded,
    check_ray,
    connected,
    found_address,
    probe,
    require_ray,
    require_serve,
    unreachable,
)
from corewise.common.errors import EngineError, InputError, MissingExtra


def test_versions() -> None:
    check_ray("2.59.0")
    check_ray("3.0.0rc1")
    with pytest.raises(MissingExtra, match=r"needs the package 'ray'; pip install 'corewise\[ray\]'"):
        check_ray(None)
    with pytest.raises(EngineError, match=r"ray 2\.58\.1 is installed, .*; pip install 'ray>=2\.59'"):
        check_ray("2.58.1")


@pytest.mark.parametrize(("require", "package"), [(require_ray, "grpc"), (require_serve, "fastapi")])
def test_a_ray_without_its_extras_is_named(
    monkeypatch: pytest.MonkeyPatch, require: Callable[[], None], package: str
) -> None:
    pytest.importorskip("ray")
    require()
    monkeypatch.setattr(connection, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(MissingExtra, match=rf"needs the package '{package}'; pip install 'corewise\[ray\]'"):
        require()


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "[::1]:6379", "ray://head:10001"])
def test_addresses(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", ["", "head", "http://head:8265", "ray://head", "head:port"])
def test_no_addresses(address: str) -> None:
    with pytest.raises(InputError, match="is not an address of a Ray cluster; give local, auto, HOST:PORT or ray://"):
        check_address(address)


def test_auto_is_the_cluster_that_ray_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")
    with pytest.raises(EngineError, match=r"no Ray cluster answers at .*:1; check the address"), connected("auto"):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(
        EngineError,
        match=r"auto means RAY_ADDRESS, which is not HOST:PORT: .*; set RAY_ADDRESS to HOST:PORT, or give ray",
    ):
        found_address()


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (
            "Could not find any running Ray instance.",
            "there is no Ray cluster on this machine; give its address, or local",
        ),
        (
            "Found multiple active Ray instances: {'a:1'}.",
            "there are several Ray clusters on this machine; give its address",
        ),
    ],
)
def test_auto_without_a_single_cluster(said: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    services = pytest.importorskip("ray._private.services")

    def find(address: str) -> str:
        raise ConnectionError(said)

    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", find)
    with pytest.raises(EngineError, match=f"^{what}$"):
        found_address()


@pytest.fixture
def mute() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Head(grpc.GenericRpcHandler):
    """Answers each question in one way."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_code(self.code)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize("prefix", ["", "ray://"])
@pytest.mark.parametrize(("code", "said"), [(grpc.StatusCode.UNAUTHENTICATED, "guarded"), (grpc.StatusCode.OK, "open")])
def test_a_cluster_says_whether_it_wants_tokens(prefix: str, code: grpc.StatusCode, said: str) -> None:
    server = grpc.server(ThreadPoolExecutor(1), [Head(code)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert probe(f"{prefix}127.0.0.1:{port}") == said
    finally:
        server.stop(0).wait()


def test_an_address_that_says_nothing_is_not_waited_for(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.3)
    assert probe(mute) == "silent"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert probe(f"127.0.0.1:{port}") == "silent"


def test_a_name_that_no_host_can_have_is_no_cluster() -> None:
    assert probe("head..local:6379") == "silent"


def test_what_ray_says_of_a_cluster_that_it_cannot_use() -> None:
    utils = pytest.importorskip("ray._private.utils")
    with pytest.raises(RuntimeError) as caught:
        utils.check_version_info({"ray_version": "2.59.0", "python_version": "3.10.1"}, "node 10.0.0.5")
    here = ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(
        r"the Ray cluster at head:6379 has Ray 2\.59\.0 and Python 3\.10\.1, and this machine has Ray \S+ and Python "
        rf"{re.escape(here)}; install the same versions on all machines",
        str(unreachable("head:6379", caught.value)),
    )
    outside = RuntimeError("No node info found matching attributes: '' when trying to resolve node to connect to.")
    assert str(unreachable("head:6379", outside)) == (
        "this machine is no node of the Ray cluster at head:6379; run the command on one of its nodes, or give "
        "ray://head:10001"
    )
    assert str(unreachable("head:6379", ConnectionError("refused. Try again.\nTraceback"))) == (
        "Ray cannot be reached at head:6379: refused; see 'ray status' on that machine"
    )


def test_only_a_guarded_cluster_is_used() -> None:
    check_guarded("head:6379", "guarded")
    with pytest.raises(EngineError, match="no Ray cluster answers at head:6379; check the address"):
        check_guarded("head:6379", "silent")
    with pytest.raises(EngineError, match=r"runs code for anyone who reaches it; start .* RAY_AUTH_MODE=token"):
        check_guarded("head:6379", "open")
