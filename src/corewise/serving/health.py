"""``grpc.health.v1``, for Kubernetes' gRPC probes, service meshes and load balancers.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. Like the HTTP health checks it needs no token.
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
"""The service name for liveness probes: the process answers, whatever its models do."""
READINESS = ("", oip.SERVICE, "readiness")
WATCH_S = 0.25
"""Seconds between two looks at a watched status."""

Status = health_pb2.HealthCheckResponse


def handler(models: Models) -> Any:
    """The service's handler, for ``add_generic_rpc_handlers``."""

    def status(name: str) -> int | None:
        """The status of a service; ``None`` for an unknown name."""
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
