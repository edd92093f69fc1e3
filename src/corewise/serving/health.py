"""``grpc.health.v1``, for Kubernetes' gRPC probes, service meshes and load balancers.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. Like the HTTP health checks it needs no token.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2

from corewise.serving import oip
from corewise.serving.methods import Method
from corewise.serving.models import Models
from corewise.serving.protocol import ProtocolError

SERVICE = "grpc.health.v1.Health"
LIVENESS = "liveness"
"""The service name for liveness probes: the process answers, whatever its models do."""
READINESS = ("", oip.SERVICE, "readiness")
WATCH_S = 0.25
"""Seconds between two looks at a watched status."""

Status = health_pb2.HealthCheckResponse


def list_methods(models: Models) -> list[Method]:
    """The service's methods."""

    def status(name: str) -> int:
        if name == LIVENESS:
            return int(Status.SERVING)
        if name in READINESS:
            return int(Status.SERVING if models.ready else Status.NOT_SERVING)
        return int(Status.SERVICE_UNKNOWN)

    async def check(request: Any, context: Any) -> Any:
        found = status(request.service)
        if found == Status.SERVICE_UNKNOWN:
            raise ProtocolError(f"there is no service {request.service[:80]!a}", status=404)
        return Status(status=found)

    async def watch(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        request, sent = await anext(requests), None
        while True:
            found = status(request.service)
            if found != sent:
                sent = found
                yield Status(status=found)
            await asyncio.sleep(WATCH_S)

    messages = {"request": health_pb2.HealthCheckRequest, "response": Status, "is_open_to_all": True}
    return [
        Method(path=f"/{SERVICE}/Check", unary=check, **messages),
        Method(path=f"/{SERVICE}/Watch", streaming=watch, takes="one", **messages),
    ]
