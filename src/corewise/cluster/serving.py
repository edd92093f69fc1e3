"""``corewise serve --ray``: artifacts as applications on a cluster, from their deployment until the command is stopped.

The applications live on the cluster. Another command that deploys the same name takes it over: that is an update, in
which Ray Serve replaces one replica after the other, and the first command ends and leaves it alone.
"""

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from corewise._version import __version__
from corewise.cluster.applications import Scale, bound, settings_of
from corewise.cluster.connection import CLIENT, check_address, connected, first_line, require_serve
from corewise.cluster.crew import ABSENT
from corewise.cluster.messages import KINDS
from corewise.cluster.settings import Settings
from corewise.common.errors import CorewiseError, EngineError, InputError
from corewise.serving.host import Options
from corewise.serving.served import Source

SERVICER = "corewise.cluster.rpc.add_to_server"
EVERYWHERE = ("0.0.0.0", "::")
STORE = "corewise"
"""The namespace in the cluster's key-value store that says which command has deployed an application."""
LOOK_S = 0.5
SLOW_S = 30.0
"""An application that waits longer than this for its replicas says what it waits for."""
END_S = 30.0
"""How long replicas may take to end, beside what their requests may take."""
ABOUT_S = 10.0
"""How long replicas may take to say what they run."""

OnEvent = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Where the applications are reached."""

    http: str
    grpc: str | None
    applications: Mapping[str, str]
    """The route of each."""


class _Stopped(Exception):
    """SIGTERM or SIGINT came."""


def serve_on_ray(
    address: str,
    sources: Sequence[Source],
    options: Options,
    scale: Scale,
    *,
    route: str | None = None,
    on_event: OnEvent = lambda what, value: None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until another command takes over.

    Args:
        address: The cluster, or ``local`` to start one.
        sources: The artifacts, in folders that all nodes see.
        options: Those of ``corewise serve``.
        scale: How many replicas there are of each.
        route: The prefix of the only application's paths. Default: ``/`` for one artifact, ``/NAME`` for several.
        on_event: Called with ``("listening", Routes)``, ``("waiting", str)``, ``("ready", list)`` with what each
            replica says of itself, ``("replaced", name)``, ``("unhealthy", str)`` and ``("draining", None)``.

    Raises:
        InputError: Options do not fit together, or not the cluster.
        ArtifactError: An artifact is damaged, or a node cannot read it.
        EngineError: The cluster does not answer or is not safe, or an application does not start.
    """
    require_serve()
    check_address(address)
    if address.startswith(CLIENT):
        raise InputError("Ray Serve's ports are on the cluster's nodes", "run this on a node, with --ray auto")
    http, grpc_port = _ports(options)
    names = [source.name for source in sources]
    if len({*names}) < len(names):
        raise InputError("two artifacts have one name", "give NAME=FOLDER")
    if route is not None and len(sources) > 1:
        raise InputError("--route is for one artifact", "leave it out: each has the route /NAME")
    settings = [settings_of(source, options, scale) for source in sources]
    routes = {one.name: route or ("/" if len(settings) == 1 else f"/{one.name}") for one in settings}
    from ray.exceptions import RayError

    with connected(address):
        _check_nodes(settings, scale)
        started = _start(http, grpc_port, options)
        shown = f"{'https' if options.certificate else 'http'}://{http[0]}:{http[1]}"
        on_event("listening", Routes(http=shown, grpc=str(grpc_port) if grpc_port else None, applications=routes))
        try:
            try:
                _run([(routes[one.name], one) for one in settings], scale, on_event)
            finally:
                if started and address != "local":
                    _shut_down_if_empty()
        except RayError as error:
            raise EngineError(
                f"the cluster does not answer any more: {first_line(error)}", "see 'ray status'"
            ) from error


def _ports(options: Options) -> tuple[tuple[str, int], int | None]:
    """Where Ray Serve's proxies listen. Raises ``InputError`` for what they cannot do."""
    if options.admin is not None or options.admin_grpc is not None:
        raise InputError("there are no admin ports on a cluster", "leave out --admin, and run the command again")
    if options.grace_s != Options.grace_s:
        raise InputError("Ray Serve takes requests away from a replica before it ends", "leave out --grace")
    if not isinstance(options.http, tuple):
        raise InputError("on a cluster HTTP listens on a port", "give --http HOST:PORT")
    if options.grpc is None:
        return options.http, None
    if not isinstance(options.grpc, tuple) or options.grpc[0].strip("[]") not in EVERYWHERE:
        raise InputError("Ray Serve's gRPC port listens on all addresses", f"give --grpc {EVERYWHERE[0]}:PORT")
    if options.certificate is not None:
        raise InputError("Ray Serve's gRPC port has no TLS of its own", "leave out --grpc or --tls-cert")
    return options.http, options.grpc[1]


def _check_nodes(settings: Sequence[Settings], scale: Scale) -> None:
    """Raise ``InputError`` unless the cluster has CPUs for all replicas."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for one in settings:
        if (most := max(nodes, default=0)) < one.cpus:
            raise InputError(
                f"a replica of {one.name} takes {one.cpus} CPUs, and the cluster's nodes have at most {most}",
                "give fewer with --cpus",
            )
    needed, there = sum(one.cpus for one in settings) * scale.replicas[0], sum(nodes)
    if needed > there:
        raise InputError(
            f"the replicas take {needed} CPUs, and the cluster has {there}", "give fewer with --replicas or --cpus"
        )


def _start(http: tuple[str, int], grpc_port: int | None, options: Options) -> bool:
    """Start Ray Serve unless it runs; whether it was started.

    Raises ``InputError`` if it runs on other ports, and ``EngineError`` if it does not start.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http_options: dict[str, Any] = {"host": http[0].strip("[]"), "port": http[1]}
    if options.certificate is not None and options.key is not None:
        http_options["ssl_certfile"] = str(options.certificate.absolute())
        http_options["ssl_keyfile"] = str(options.key.absolute())
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        there = running.http_config
        http_there = HttpThere(there.host, there.port, there.ssl_certfile is not None)
        grpc_there = ray.get(running._controller.get_grpc_config.remote())
        servicers = {*grpc_there.grpc_servicer_functions}
        asked = HttpThere(http_options["host"], http_options["port"], "ssl_certfile" in http_options)
        check_running(http_there, grpc_there.port if SERVICER in servicers else None, asked, grpc_port)
        return False
    grpc_options = {"port": grpc_port, "grpc_servicer_functions": [SERVICER]} if grpc_port else None
    try:
        # Its access log would cost more than many an answer.
        serve.start(
            proxy_location="EveryNode",
            http_options=http_options,
            grpc_options=grpc_options,
            logging_config={"enable_access_log": False},
        )
    except RayError as error:
        raise EngineError(
            f"Ray Serve's proxies do not start: {first_line(error)}",
            "see whether the ports are free on all nodes, and whether RAY_SERVE_ENABLE_HA_PROXY is the same there as "
            "here",
        ) from error
    return True


class HttpThere(NamedTuple):
    """Where and how Ray Serve's HTTP listens."""

    host: str
    port: int
    tls: bool


def check_running(there: HttpThere, grpc_there: int | None, asked: HttpThere, grpc_asked: int | None) -> None:
    """Raise ``InputError`` if Ray Serve runs already and its ports are not those that are asked for. Pure.

    It would keep its own, and the command would tell of ports that nobody opens. The ports of gRPC are those that take
    the protocol's calls.
    """
    runs = "Ray Serve runs on this cluster already,"
    if there[:2] != asked[:2]:
        raise InputError(f"{runs} with HTTP on {there.host}:{there.port}", f"give --http {there.host}:{there.port}")
    if there.tls != asked.tls:
        how, fix = ("with", "give --tls-cert and --tls-key") if there.tls else ("without", "leave out --tls-cert")
        raise InputError(f"{runs} {how} TLS", fix)
    if grpc_asked not in (None, grpc_there):
        how = f"with gRPC on port {grpc_there}" if grpc_there else "without a gRPC port for corewise"
        raise InputError(
            f"{runs} {how}", f"give --grpc {EVERYWHERE[0]}:{grpc_there}" if grpc_there else "leave out --grpc"
        )


def _run(applications: Sequence[tuple[str, Settings]], scale: Scale, on_event: OnEvent) -> None:
    """Deploy, and wait for the end; delete what is still of this command."""
    from ray import serve

    before, ours = {*serve.status().applications}, Ours()
    try:
        with _stoppable():
            try:
                _deploy(applications, scale)
                names = {settings.name for _, settings in applications}
                # What served before is another command's until the update is done: if it fails, that goes on.
                ours.take(names - before)
                _wait(names, on_event)
                ours.take(names)
                on_event("ready", _about(ours.names))
                _watch(ours, on_event)
            except _Stopped:
                on_event("draining", None)
    finally:
        _delete(ours, scale.drain_s)


class Ours:
    """The applications of this command, which says so in the cluster's store: the last one that says it has them."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._sign = os.urandom(16).hex().encode()

    def take(self, names: Iterable[str]) -> None:
        """They are this command's from now on."""
        from ray.experimental.internal_kv import _internal_kv_put

        self.names.update(names)
        for name in self.names:
            _internal_kv_put(name, self._sign, overwrite=True, namespace=STORE)

    def lost(self) -> set[str]:
        """Forget those that another command has deployed since, or that were deleted; which they are."""
        from ray import serve
        from ray.experimental.internal_kv import _internal_kv_get

        alive = serve.status().applications
        gone = {
            name for name in self.names if name not in alive or _internal_kv_get(name, namespace=STORE) != self._sign
        }
        self.names -= gone
        return gone


def _deploy(applications: Sequence[tuple[str, Settings]], scale: Scale) -> None:
    """Hand the applications to Ray Serve."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    targets = [serve.RunTarget(bound(one, scale), name=one.name, route_prefix=route) for route, one in applications]
    try:
        serve.run_many(targets, wait_for_applications_running=False)
    except (RayServeException, RayError, ValueError) as error:
        what = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise InputError(f"Ray Serve does not take it: {what}", "give another --route, or NAME=FOLDER") from error


def _wait(ours: Iterable[str], on_event: OnEvent) -> None:
    """Wait until all applications run. Raises what their replicas raised."""
    from ray import serve

    tell_s = time.monotonic() + SLOW_S
    while True:
        told = serve.status().applications
        open_now = True
        for name in ours:
            application = told.get(name)
            if application is None:
                raise EngineError(f"{name} was deleted while it started", "run the command again")
            messages = [application.message, *(one.message for one in application.deployments.values())]
            if application.status == "DEPLOY_FAILED":
                raise failure(name, "\n".join(messages))
            if application.status != "RUNNING":
                open_now = False
                if time.monotonic() > tell_s:
                    on_event("waiting", f"{name}: {next(filter(None, reversed(messages)), 'its replicas start')}")
                    tell_s += SLOW_S
        if open_now:
            return
        time.sleep(LOOK_S)


def failure(name: str, told: str) -> CorewiseError:
    """The error of an application that does not start, from Ray Serve's message. Pure."""
    kinds = {kind.__name__: kind for kind in KINDS}
    for kind, what in reversed(re.findall(r"^corewise\.common\.errors\.(\w+): (.+)$", told, re.MULTILINE)):
        if kind in kinds:
            text, _, fix = what.rpartition("; ")
            return kinds[kind](text or fix, fix if text else "")
    if ABSENT in told:
        what = f"{name} does not start: corewise is not installed on a node"
        return EngineError(what, f"install corewise {__version__} on every node")
    last = next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "no reason is told")
    return EngineError(f"{name} does not start: {last}", "see the logs of Ray Serve's replicas")


def _about(ours: Iterable[str]) -> list[Mapping[str, str]]:
    """What each replica says of itself."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    found: list[Mapping[str, str]] = []
    for name in sorted(ours):
        until_s = time.monotonic() + ABOUT_S
        while time.monotonic() < until_s:
            try:
                found += serve.get_app_handle(name).broadcast("about").results(timeout_s=ABOUT_S)
                break
            except (RayServeException, RayError, TimeoutError):  # its replicas are not known here yet
                time.sleep(LOOK_S)
    return found


def _watch(ours: Ours, on_event: OnEvent) -> None:
    """Wait until no application is of this command any more."""
    from ray import serve

    ill: set[str] = set()
    while ours.names:
        time.sleep(LOOK_S)
        for name in ours.lost():
            on_event("replaced", name)
        told = serve.status().applications
        for name in ours.names & told.keys():
            if told[name].status == "UNHEALTHY" and name not in ill:
                ill.add(name)
                on_event("unhealthy", f"{name}: {told[name].message}")
            elif told[name].status == "RUNNING":
                ill.discard(name)


def _delete(ours: Ours, drain_s: float) -> None:
    """Take applications out of service, when their replicas have answered what they accepted."""
    from ray import serve

    ours.lost()
    for name in ours.names:
        serve.delete(name, _blocking=False)
    until_s = time.monotonic() + drain_s + END_S
    while time.monotonic() < until_s and not ours.names.isdisjoint(serve.status().applications):
        time.sleep(LOOK_S)


def _shut_down_if_empty() -> None:
    import ray
    from ray import serve

    if not serve.status().applications:
        with redirect_stdout(StringIO()):  # Ray tells there of its own calls to what ends
            serve.shutdown()
            ray.shutdown()


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise ``_Stopped``, once: another one ends the process."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
