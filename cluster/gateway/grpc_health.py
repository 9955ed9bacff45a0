"""The standard health service (grpc.health.v1) on the client port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

from cluster.gateway.routes import Gateway
from protos.s2d.v1 import generation_pb2

SERVICES = ("", generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name)
"""The empty name asks for the server as a whole."""
WATCH_INTERVAL_S = 1.0


class HealthServicer:
    """SERVING while every model answers and new requests are accepted: what `/ready` says."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def _status(self, service: str) -> int:
        if service not in SERVICES:
            return int(health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._gateway.in_flight.draining or await self._gateway.directory.unready():
            return int(health_pb2.HealthCheckResponse.NOT_SERVING)
        return int(health_pb2.HealthCheckResponse.SERVING)

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        status = await self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"unknown service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=status)

    async def watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes, until the client leaves or the request timeout ends it."""
        last: int | None = None
        while True:
            status = await self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(WATCH_INTERVAL_S)
