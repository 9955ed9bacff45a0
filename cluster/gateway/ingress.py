"""The ingress deployment: a thin shell that gives HTTP and gRPC the same `Gateway`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig
from cluster.gateway.grpc_health import HealthServicer
from cluster.gateway.grpc_service import GenerationServicer
from cluster.gateway.http_app import build_http_app
from cluster.gateway.in_flight import InFlight
from cluster.gateway.model_applications import ModelApplications
from cluster.gateway.models import ModelDirectory
from cluster.gateway.routes import Gateway
from cluster.gateway.serve_clients import LeasedDraftPool, ServeModelClient
from cluster.registry import RegistryClient
from cluster.router_actor import RouterClient
from cluster.telemetry.collect import collect
from cluster.telemetry.metrics import GatewayMetrics
from protos.s2d.v1 import generation_pb2 as pb


class GatewayDeployment:
    """HTTP through the FastAPI app that `__serve_build_asgi_app__` returns, gRPC through the methods named
    as in the proto. `draft_pool` is bound only so that Serve deploys it with the application."""

    def __init__(
        self,
        config: dict[str, Any],
        targets: Mapping[str, DeploymentHandle[Any]],
        draft_pool: DeploymentHandle[Any] | None,
    ) -> None:
        parsed = ClusterConfig.model_validate(config)
        self._draft_pool_handle = draft_pool
        applications = ModelApplications(parsed)
        metrics = GatewayMetrics()
        self._gateway = Gateway(
            config=parsed.gateway,
            directory=ModelDirectory(
                {name: ServeModelClient(handle) for name, handle in targets.items()},
                applications,
                parsed.gateway.cold_start_timeout_s,
            ),
            loader=applications,
            draft_pool=LeasedDraftPool(parsed.draft_pool, RegistryClient()),
            in_flight=InFlight(),
            on_resume=metrics.resumed,
            on_failure=metrics.failed,
            router=None if parsed.routed is None else RouterClient(parsed.routed.interval_s),
        )
        self._servicer = GenerationServicer(self._gateway)
        self._health = HealthServicer(self._gateway)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy adds X-Request-Id to every response itself.
        return build_http_app(self._gateway, collect, echo_request_id=False)

    async def drain(self, timeout_s: float) -> int:
        """Refuse new requests and wait for the running ones; how many are left."""
        return await self._gateway.in_flight.drain(timeout_s)

    async def unready(self) -> list[str]:
        """Names of the models that do not answer."""
        return await self._gateway.directory.unready()

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async for chunk in self._servicer.generate(request, grpc_context):
            yield chunk

    async def Chat(
        self, request: pb.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        async for chunk in self._servicer.chat(request, grpc_context):
            yield chunk

    async def Tokenize(
        self, request: pb.TokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.TokenizeResponse:
        return await self._servicer.tokenize(request, grpc_context)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> pb.DetokenizeResponse:
        return await self._servicer.detokenize(request, grpc_context)

    async def ListModels(self, _: Empty, grpc_context: RayServegRPCContext) -> pb.ListModelsResponse:
        return await self._servicer.list_models(grpc_context)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.ModelInfo:
        return await self._servicer.get_model_info(request, grpc_context)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """grpc.health.v1: SERVING while every model answers. NOT_FOUND for a service that is not ours."""
        return await self._health.check(request, grpc_context)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        async for response in self._health.watch(request):
            yield response


Ingress = serve.ingress()(GatewayDeployment)
