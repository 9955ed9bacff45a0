"""The Serve application: one gateway, one deployment for each model, one for the draft pool.

`build_app` is the import path of `serveConfigV2` (`import_path: cluster.app:build_app`, `args:` a
`ClusterConfig`). Everything schedules on two cores with the default configuration.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.deployment import Application

from cluster.config import ClusterConfig, DraftPoolConfig, GatewayConfig
from cluster.deployments.draft import DraftPool
from cluster.draft_scaling import DraftPoolPolicy
from cluster.gateway.ingress import Ingress
from cluster.model_apps import (
    CONTROL_CALLS,
    HEALTH_PERIOD_S,
    HEALTH_TIMEOUT_S,
    actor_options,
    routed,
    target_app,
    thread_env,
)

POOL_GRACE_S = 30.0
"""Streams of a draft worker that stops go on without it."""
GATEWAY = "gateway"
DRAFT_POOL = "draft-pool"
GRPC_HEALTH = "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"
GRPC_SERVICER = "cluster.gateway.grpc_proxy.add_generation_service"


def _pool_replicas(pool: DraftPoolConfig) -> dict[str, Any]:
    """How many there are, as options of the deployment."""
    if pool.autoscaling is None:
        return {"num_replicas": pool.replicas}
    options = pool.autoscaling.model_dump()
    target = options.pop("target_utilisation")
    policy = {"policy_function": DraftPoolPolicy, "policy_kwargs": {"target_utilisation": target}}
    return {"autoscaling_config": options | {"policy": policy}}


def draft_pool_app(config: ClusterConfig) -> Application:
    pool = config.draft_pool
    deployment = serve.deployment(
        name=DRAFT_POOL,
        **_pool_replicas(pool),
        max_ongoing_requests=CONTROL_CALLS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=POOL_GRACE_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options=actor_options(pool.num_cpus, thread_env(pool.compute_threads), pool),
    )
    return deployment(DraftPool).bind(pool.model_dump(mode="json"), routed(config))


def _longest_request_s(gateway: GatewayConfig) -> float:
    """Of one that first wakes its model."""
    return gateway.cold_start_timeout_s + gateway.request_timeout_s


def build_app(args: dict[str, Any] | ClusterConfig) -> Application:
    """The whole application. Raises pydantic.ValidationError for a configuration that is not valid."""
    config = args if isinstance(args, ClusterConfig) else ClusterConfig.model_validate(args)
    pool, request_timeout_s = config.draft_pool, config.gateway.request_timeout_s
    gateway = serve.deployment(
        name=GATEWAY,
        num_replicas=1,
        max_surge_percent=100,  # a changed one starts before the old one takes no more requests
        max_ongoing_requests=config.gateway.max_ongoing_requests,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=_longest_request_s(config.gateway),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options=actor_options(config.gateway.num_cpus, thread_env(1)),
    )
    return gateway(Ingress).bind(
        config.model_dump(mode="json"),
        {
            m.name: target_app(m, config, config.gateway.stream_interval_ms, request_timeout_s)
            for m in config.models
        },
        draft_pool_app(config) if pool.replicas else None,
    )


def serve_options(config: ClusterConfig) -> dict[str, Any]:
    """Keyword arguments of `serve.start`: both ports, the client service, gRPC reflection. The proxies wait
    longer than a request may take that first wakes its model: the gateway answers what takes too long."""
    gateway = config.gateway
    timeout = _longest_request_s(gateway) + 10.0
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": gateway.host, "port": gateway.http_port, "request_timeout_s": timeout},
        "grpc_options": {
            "port": gateway.grpc_port,
            "grpc_servicer_functions": [GRPC_SERVICER, GRPC_HEALTH],
            "request_timeout_s": timeout,
            "enable_reflection": True,
        },
    }
