"""The Serve application: one gateway, one deployment for each model, one for the draft pool.

`build_app` is the import path of `serveConfigV2` (`import_path: cluster.app:build_app`, `args:` a
`ClusterConfig`). Everything schedules on two cores with the default configuration.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.deployment import Application

from cluster.config import ClusterConfig, ModelConfig
from cluster.deployments.draft import DraftPool
from cluster.deployments.target import Target
from cluster.gateway.ingress import Ingress

APP_NAME = "s2d"
GATEWAY = "gateway"
DRAFT_POOL = "draft-pool"
GRPC_HEALTH = "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"
GRPC_SERVICER = "cluster.gateway.grpc_proxy.add_generation_service"
CONTROL_CALLS = 64
"""Room for info, state, tokenize and health calls beside admitted requests."""
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
GRACE_S = 30.0


def deployment_name(model: str) -> str:
    """Deployment of a model: readable, valid for Serve, and different for different models."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    digest = hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"target-{readable}" if readable == model else f"target-{readable}-{digest}"


def thread_env(threads: int) -> dict[str, str]:
    """Environment of a worker process. Idle threads sleep instead of spinning: workers share cores."""
    env = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return env


def _actor_options(num_cpus: float, num_gpus: float, env: Mapping[str, str]) -> dict[str, Any]:
    return {"num_cpus": num_cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": dict(env)}}


def _ongoing_limit(model: ModelConfig) -> int:
    """Above the engine's own admission limit, so that refusals (429, Retry-After) come from it."""
    return 2 * (model.engine.max_num_seqs + model.engine.max_queued) + CONTROL_CALLS


def target_app(model: ModelConfig, config: ClusterConfig) -> Application:
    """The init arguments name this model and no other: adding a model restarts no target."""
    deployment = serve.deployment(
        name=deployment_name(model.name),
        num_replicas=model.replicas,
        max_ongoing_requests=_ongoing_limit(model),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=GRACE_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options=_actor_options(model.num_cpus, model.num_gpus, thread_env(model.engine.threads)),
    )
    return deployment(Target).bind(
        model.model_dump(mode="json"),
        config.draft_pool.model_dump(mode="json"),
        config.gateway.stream_interval_ms,
        _routed(config),
    )


def _routed(config: ClusterConfig) -> dict[str, Any] | None:
    return None if config.routed is None else config.routed.model_dump(mode="json")


def draft_pool_app(config: ClusterConfig) -> Application:
    pool = config.draft_pool
    deployment = serve.deployment(
        name=DRAFT_POOL,
        num_replicas=pool.replicas,
        max_ongoing_requests=CONTROL_CALLS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=GRACE_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options=_actor_options(pool.num_cpus, pool.num_gpus, thread_env(pool.threads)),
    )
    return deployment(DraftPool).bind(pool.model_dump(mode="json"), _routed(config))


def build_app(args: dict[str, Any] | ClusterConfig) -> Application:
    """The whole application. Raises pydantic.ValidationError for a configuration that is not valid."""
    config = args if isinstance(args, ClusterConfig) else ClusterConfig.model_validate(args)
    pool = config.draft_pool
    gateway = serve.deployment(
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=CONTROL_CALLS + 2 * sum(_ongoing_limit(m) * m.replicas for m in config.models),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=GRACE_S,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options=_actor_options(config.gateway.num_cpus, 0, thread_env(1)),
    )
    return gateway(Ingress).bind(
        config.model_dump(mode="json"),
        {model.name: target_app(model, config) for model in config.models},
        draft_pool_app(config) if pool.replicas else None,
    )


def serve_options(config: ClusterConfig) -> dict[str, Any]:
    """Keyword arguments of `serve.start`: both ports, the client service, gRPC reflection."""
    gateway = config.gateway
    timeout = gateway.request_timeout_s + 10.0
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
