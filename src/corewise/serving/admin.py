"""The admin ports: load and unload models over HTTP and gRPC, with Triton's extension ``model_repository``.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md. A model is
loaded from the folder that the server was started with, and from no other.
"""

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from corewise.common.errors import CorewiseError
from corewise.serving import bodies
from corewise.serving.addresses import Address
from corewise.serving.budget import Budget
from corewise.serving.connections import Room
from corewise.serving.infer import CLOSED_REQUEST
from corewise.serving.methods import Method, Unary
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.protocol import Limits, ProtocolError
from corewise.serving.tokens import Tokens

if TYPE_CHECKING:
    from corewise.serving.rpc_connections import RpcPort

log = logging.getLogger("corewise.serve")

MOST_BODY_BYTES = 64 * 1024
LIMITS = Limits(body_bytes=MOST_BODY_BYTES)


class Repository:
    """The models that the server was started with, each in service or not."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._changing = asyncio.Lock()
        """However many models are to be changed, one thread waits for them: there are few, and others need them."""

    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Name, version and state of each model, with the reason if it is not ready."""
        served = {(each.name, each.version): each for each in self._models.served}
        listed = []
        for name, version in self._models.names:
            model = served.get((name, version))
            entry = {"name": name, "version": version, "state": "READY"}
            if model is None or not model.ready:
                why = "unloaded" if (name, version) in self._models.unloaded else "not open"
                entry |= {"state": "UNAVAILABLE", "reason": why if model is None else "its engine is restarting"}
            if not ready_only or entry["state"] == "READY":
                listed.append(entry)
        return listed

    async def load(self, name: str, version: str | None = None) -> str:
        """Open a model's folder again, in all versions unless one is named; returns why that failed, or nothing.

        If it fails, what was in service stays. Raises ``ProtocolError`` for an unknown name or version.
        """
        for each in [version] if version else self._models.versions(name):
            try:
                async with self._changing:
                    await asyncio.to_thread(self._models.reload, name, each)
            except ProtocolError:
                raise
            except (CorewiseError, OSError) as error:
                log.error("%s, version %s, was not loaded, and what was in service stays: %s", name, each, error)
                return str(error)
            log.info("%s, version %s, was loaded", name, each)
        return ""

    async def unload(self, name: str, version: str | None = None) -> None:
        """Take a model out of service, after it has finished what it accepted. Raises as ``load``."""
        versions = self._models.versions(name)
        loaded = [each for each in versions if (name, each) not in self._models.unloaded]
        for each in [version] if version else loaded or versions:
            async with self._changing:
                await asyncio.to_thread(self._models.unload, name, each)
            log.info("%s, version %s, was unloaded", name, each)

    async def reload_all(self) -> None:
        """Open the folders of all models in service again."""
        for name, version in self._models.names:
            if (name, version) not in self._models.unloaded:
                try:
                    await self.load(name, version)
                except ProtocolError as error:  # it is not open yet
                    log.error("%s was not reloaded: %s", name, error)


def web(repository: Repository) -> ASGIApp:
    """The HTTP side."""

    async def index(request: Request) -> Response:
        asked = await _json(request)
        return JSONResponse(repository.index(ready_only=asked.get("ready") is True))

    async def load(request: Request) -> Response:
        if (await _json(request)).get("parameters"):
            raise ProtocolError("a model is loaded only as it is in its folder", "send no parameters")
        why = await repository.load(request.path_params["name"], request.query_params.get("version"))
        return JSONResponse({"error": why}, 500) if why else JSONResponse({})

    async def unload(request: Request) -> Response:
        await _json(request)
        await repository.unload(request.path_params["name"], request.query_params.get("version"))
        return JSONResponse({})

    async def told(request: Request, error: Any) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=CLOSED_REQUEST)

    app = Starlette(
        routes=[
            Route("/v2/repository/index", index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
            Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
        ],
        exception_handlers={ProtocolError: told, ClientDisconnect: left},
    )
    refused = JSONResponse({"error": "the admin port is not for web pages"}, 403)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        # Browsers send this with every POST: any page could reach what listens on its reader's machine.
        is_page = any(name == b"origin" for name, _ in scope["headers"])
        await (refused if is_page else app)(scope, receive, send)

    return answer


async def _json(request: Request) -> dict[str, Any]:
    """The body, which may be empty. Raises ``ProtocolError``."""
    body = await bodies.read(request, LIMITS, Budget(LIMITS).booking(""))
    try:
        found = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the body is not JSON") from error
    if not isinstance(found, dict):
        raise ProtocolError("the body is not a JSON object")
    return found


def list_methods(repository: Repository, models: Models) -> list[Method]:
    """The gRPC side."""
    from corewise.serving import oip

    async def server_live(request: Any, context: Any) -> Any:
        return oip.message("ServerLiveResponse")(live=True)

    async def server_ready(request: Any, context: Any) -> Any:
        return oip.message("ServerReadyResponse")(ready=models.ready)

    async def index(request: Any, context: Any) -> Any:
        return oip.message("RepositoryIndexResponse")(models=repository.index(ready_only=request.ready))

    async def load(request: Any, context: Any) -> Any:
        if request.parameters:
            raise ProtocolError("a model is loaded only as it is in its folder", "send no parameters")
        if why := await repository.load(request.model_name):
            raise ProtocolError(why, status=500)
        return oip.message("RepositoryModelLoadResponse")()

    async def unload(request: Any, context: Any) -> Any:
        await repository.unload(request.model_name)
        return oip.message("RepositoryModelUnloadResponse")()

    calls: dict[str, Unary] = {
        "ServerLive": server_live,
        "ServerReady": server_ready,
        "RepositoryIndex": index,
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": unload,
    }
    classes = {**oip.METHODS, **oip.EXTENSIONS}
    return [
        Method(path=f"/{oip.SERVICE}/{name}", request=classes[name][0], response=classes[name][1], unary=unary)
        for name, unary in calls.items()
    ]


def rpc_port(address: Address, room: Room, repository: Repository, models: Models, metrics: Metrics) -> "RpcPort":
    """The gRPC side. Raises ``InputError`` if the address is taken."""
    from corewise.serving.rpc_connections import RpcPort
    from corewise.serving.rpc_extensions import Handlers

    handlers = Handlers(list_methods(repository, models), metrics, Tokens(()), LIMITS)
    return RpcPort(address, (handlers,), room, Budget(LIMITS), message_bytes=MOST_BODY_BYTES)
