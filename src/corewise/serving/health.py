"""``grpc.health.v1``: what Kubernetes' gRPC probes, service meshes and load balancers ask.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. As the HTTP side's health checks it needs no token.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from corewise.serving import oip
from corewise.serving.models import Models

SERVICE = "grpc.health.v1.Health"
LIVENESS = "liveness"
"""The name under which only the process is asked for, and not its models: for liveness probes."""
READINESS = ("", oip.SERVICE, "readiness")
WATCH_S = 0.25
"""How often a watched status is looked at."""

Status = health_pb2.HealthCheckResponse


def handler(models: Models) -> Any:
    """The service, for ``add_generic_rpc_handlers``."""

    def status(name: str) -> int | None:
        """``None`` for a name that is no service."""
        if name == LIVENESS:
            return int(Status.SERVING)
        if name in READINESS:
            return int(Status.SERVING if models.ready else Status.NOT_SERVING)
        return None

    async def check(request: Any, context: Any) -> Any:
        found = status(request.service)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!a}")
        return Status(status=found)

    async def watch(request: Any, context: Any) -> AsyncIterator[Any]:
        told = None
        while True:
            found = status(request.service)
            found = int(Status.SERVICE_UNKNOWN) if found is None else found
            if found != told:
                told = found
                yield Status(status=found)
            await asyncio.sleep(WATCH_S)

    message = {
        "request_deserializer": health_pb2.HealthCheckRequest.FromString,
        "response_serializer": Status.SerializeToString,
    }
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Check": grpc.unary_unary_rpc_method_handler(check, **message),
            "Watch": grpc.unary_stream_rpc_method_handler(watch, **message),
        },
    )
