"""A replica of a Ray Serve application: corewise's own server without its ports, within the CPUs that Ray gave it.

Ray Serve's proxy, or the port that it opens here, hands each request to the same ASGI app that ``corewise serve`` has,
and each gRPC message to the same service. Ray's router only chooses a replica: the queue, the batches, deadlines and
refusals are corewise's.
"""

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from corewise.artifact import MANIFEST, Artifact, identity, read, tuned
from corewise.cluster.connection import check_tokens
from corewise.cluster.distributed import keep
from corewise.cluster.exporting import Exporter
from corewise.cluster.messages import unpacked_alike
from corewise.cluster.rpc import Calls
from corewise.cluster.scaling import Load
from corewise.cluster.settings import Settings
from corewise.common.errors import ArtifactError, CorewiseError, EngineError
from corewise.machine.inspect import inspect_cpu
from corewise.machine.layouts import most_threads
from corewise.records.cpu import Cpu
from corewise.records.tuned import Machine
from corewise.runtime.cores import ClaimedCores
from corewise.search.retuning import find_plan
from corewise.serving import memory, memory_limit
from corewise.serving.app import RequestLog
from corewise.serving.gate import REQUEST_ID, RequestIds
from corewise.serving.host import Host, for_pages
from corewise.serving.infer import ARRIVED
from corewise.serving.logs import to_stderr
from corewise.serving.models import Models
from corewise.serving.server import SWITCH_S

log = logging.getLogger("corewise.serve")

LOAD_WINDOW_S = 10
"""Window over which a replica reports its load."""


class Replica(Calls):
    """What Ray Serve makes an actor of (``ingress``)."""

    def __init__(self, settings: str) -> None:
        """``settings`` is a packed ``Settings``."""
        self._message = settings
        self._host: Host | None = None
        self._cores: ClaimedCores | None = None
        self._exporting: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Open the artifact under the plan for this machine; the app that answers. Ray Serve calls it once.

        Raises ``CorewiseError`` with the node's name and why it cannot serve there.
        """
        try:
            return await self._open()
        except CorewiseError as error:
            raise type(error)(f"{_place()}: {error.what}", error.fix) from None

    async def _open(self) -> ASGIApp:
        settings = self._settings
        to_stderr("info")
        await asyncio.to_thread(check_tokens, _cluster())
        memory.tune()
        sys.setswitchinterval(SWITCH_S)
        memory_bytes = _memory_bytes(settings.cpus)
        self._cores = ClaimedCores(settings.cpus, Path(tempfile.gettempdir()))
        artifact = _checked(settings, self._cores.cpu)
        if settings.retune_s:
            await asyncio.to_thread(tune_once, artifact, self._cores.cpu, settings.retune_s)
        host = self._host = Host([settings.source], settings.options(memory_bytes), settings.tokens)
        host.front.watch_loop()
        await asyncio.to_thread(host.models.open)
        host.guard.start()
        self.service = host.service()
        self._exporting = asyncio.ensure_future(Exporter(host.metrics).run())
        log.info("%s", json.dumps(await self.about()))
        app = for_pages(RequestLog(host.app().asgi, host.models, RequestIds(), host.front), settings.cors_origins)
        return Mounted(app, self._close)

    async def about(self) -> dict[str, str]:
        """Where it runs what."""
        (served,) = self._models.served
        build = served.manifest.build
        plan = f"{served.plan.label} ({Machine.of(inspect_cpu()).label})"
        return {
            "node": _place(),
            "model": f"{served.name}, version {served.version}: {build.engine} {build.precision}",
            "plan": plan,
            "notes": "; ".join(served.notes),
        }

    async def check_health(self) -> None:
        """Raise ``EngineError`` if the model does not answer: Ray Serve replaces the replica if that stays so."""
        if not self._models.ready:
            raise EngineError(f"{self._settings.name} has no engine process", "see the replica's log")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load of the last seconds, for ``scaling.QueueSeconds``."""
        (served,) = self._models.served
        recent = served.statistics.recent(LOAD_WINDOW_S)
        load = Load(
            queue_s=recent.queue_ms / 1e3,
            busy=min(1.0, recent.busy / served.plan.instances),
            answered_per_s=recent.rate_per_s,
            refused_per_s=recent.refused_per_s,
        )
        return load._asdict()

    async def _close(self) -> None:
        """End the engine process: the requests that it had are answered, or their time is over."""
        if self._exporting is not None:
            self._exporting.cancel()
        host, self._host = self._host, None
        if host is not None:
            await asyncio.to_thread(host.models.close, 0.0)
            host.guard.close()
            host.front.close()
            await asyncio.to_thread(host.traces.close)
            host.metrics.close()
        if self._cores is not None:
            self._cores.close()

    @cached_property
    def _settings(self) -> Settings:
        return unpacked_alike(Settings, self._message)

    @property
    def _models(self) -> Models:
        assert self._host is not None, "it is open while it has requests"
        return self._host.models


class Mounted:
    """An app below the prefix of its route, as Ray Serve calls it."""

    def __init__(self, app: ASGIApp, close: Callable[[], Awaitable[None]]) -> None:
        """``close`` is called when there are no more requests."""
        self._app, self._close = app, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            root: str = scope.get("root_path", "")
            path = scope["path"].removeprefix(root) or "/"
            inner = {**scope, "path": path, "root_path": "", ARRIVED: time.monotonic()}
            await self._app(inner, receive, _mounted(root.encode("latin-1"), send))

    async def _live(self, receive: Receive, send: Send) -> None:
        while (kind := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{kind}.complete"})
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})


def _mounted(root: bytes, send: Send) -> Send:
    """Redirects stay below the root, and the request's id is left to Ray's proxy, which names it itself."""

    async def told(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [header for header in message["headers"] if header[0] != REQUEST_ID]
            message["headers"] = [(name, root + value if name == b"location" else value) for name, value in headers]
        await send(message)

    return told


def _checked(settings: Settings, cpu: Cpu) -> Artifact:
    """The artifact, which is the one that the application was made of and may be opened: a search opens it first."""
    folder = settings.folder
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact {folder} there", "put it into a folder that all nodes share")
    try:
        artifact = read(folder, cpu=cpu)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read there: {error.strerror}", "let Ray's user read it") from error
    if identity(folder) != settings.identity:
        raise ArtifactError(f"{folder} is another artifact there", "give every node the same one, and deploy again")
    settings.vouched_for.check(artifact, settings.identity)
    return artifact


def tune_once(artifact: Artifact, cpu: Cpu, budget_s: float) -> None:
    """Keep a plan for this kind of machine in the artifact's folder, if it has none.

    Of several replicas one searches, and the others wait for what it finds. Nothing is done if the folder cannot be
    written, as then each would search at every start.
    """
    if not _is_new(artifact, cpu) or not os.access(artifact.folder, os.W_OK | os.X_OK):
        return
    with _one_at_a_time(artifact.folder / MANIFEST):
        if _is_new(artifact, cpu):
            log.info("no plan is known for %s: searching for %g s", Machine.of(cpu).label, budget_s)
            try:
                found = find_plan(artifact.folder, budget_s=budget_s)
            except CorewiseError as error:  # it serves under the plan that it has
                log.warning("no plan was found: %s", error)
                return
            if note := keep(artifact.folder, found.entry):
                log.warning("%s", note)


def _is_new(artifact: Artifact, cpu: Cpu) -> bool:
    """Whether nothing was measured on such a machine."""
    return tuned.fit(artifact, cpu).tuned is None and Machine.of(artifact.report.cpu) != Machine.of(cpu)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """A lock on a file; on disks without locks, nobody waits."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _memory_bytes(cpus: int) -> int:
    """The share of ``cpus`` CPUs in the memory that this process may use. Call it before pinning."""
    cpu = inspect_cpu()
    whole_bytes = memory_limit.machine_bytes(cpu.memory_limit_bytes, cpu.memory_bytes)
    return int(whole_bytes * min(1.0, cpus / most_threads(cpu)))


def _cluster() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _place() -> str:
    """This node's name and address."""
    from ray.util import get_node_ip_address

    return f"node {socket.gethostname()} ({get_node_ip_address()})"
