"""Models as Serve deployments, in the cluster's application or in one of their own, beside it: loaded and
unloaded while the cluster runs.

Serve gives all deployments of an application one code version, which changes with the application's
arguments, so that a model added to an application would restart all others. An application of its own
restarts nothing. Its name holds the model's, so that a gateway finds the models by asking Serve what runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from pydantic import Field
from ray import serve
from ray.serve.deployment import Application

from cluster.config import (
    ClusterConfig,
    DraftPoolConfig,
    GatewayConfig,
    ModelConfig,
    RouterConfig,
)
from cluster.deployments.target import Target
from cluster.worker_config import ConfigModel, PlacedConfig

APP_NAME = "s2d"
"""The cluster's application: gateway, draft pool and the models of its configuration."""
PREFIX = "s2d-model-"
CONTROL_CALLS = 64
"""Room for info, state, tokenize and health calls beside admitted requests."""
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0


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


def actor_options(
    num_cpus: float, env: Mapping[str, str], placed: PlacedConfig | None = None
) -> dict[str, Any]:
    """Ray's options of a worker; without `placed` it reserves nothing but CPUs."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": 0, "runtime_env": {"env_vars": dict(env)}}
    return options if placed is None else options | {"num_gpus": placed.gpus, "resources": placed.resources}


def _ongoing_limit(model: ModelConfig) -> int:
    """Above the engine's own admission limit, so that refusals (429, Retry-After) come from it."""
    return 2 * (model.engine.max_num_seqs + model.engine.max_queued) + CONTROL_CALLS


def _replicas(model: ModelConfig) -> dict[str, Any]:
    """How many there are, as options of a deployment."""
    scaling = model.autoscaling
    if scaling is None:
        return {"num_replicas": model.replicas}
    target = scaling.target_ongoing_requests or max(1.0, model.engine.max_num_seqs / 2)
    options = scaling.model_dump(exclude_none=True) | {"target_ongoing_requests": target}
    return {"autoscaling_config": options}


def target_app(
    model: ModelConfig, config: ClusterConfig, stream_interval_ms: float | None, grace_s: float
) -> Application:
    """The init arguments name this model and no other. A replica that Serve stops ends when nothing runs on
    it, after `grace_s` at the latest."""
    deployment = serve.deployment(
        name=deployment_name(model.name),
        **_replicas(model),
        max_ongoing_requests=_ongoing_limit(model),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=grace_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options=actor_options(model.num_cpus, thread_env(model.engine.compute_threads), model),
    )
    return deployment(Target).bind(
        model.model_dump(mode="json"),
        config.draft_pool.model_dump(mode="json"),
        stream_interval_ms,
        routed(config),
    )


def routed(config: ClusterConfig) -> dict[str, Any] | None:
    return None if config.routed is None else config.routed.model_dump(mode="json")


class ModelAppConfig(ConfigModel):
    """`args` of `import_path: cluster.model_apps:build_model_app`: one model, and what the cluster that it
    joins has configured for all."""

    model: ModelConfig
    draft_pool: DraftPoolConfig = Field(default_factory=DraftPoolConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    stream_interval_ms: float | None = Field(None, ge=0, description="As in the cluster's gateway.")
    request_timeout_s: float = Field(
        GatewayConfig().request_timeout_s,
        gt=0,
        description="As in the cluster's gateway: unloading waits that long for running requests.",
    )

    @classmethod
    def joining(cls, cluster: ClusterConfig, model: ModelConfig) -> ModelAppConfig:
        return cls(
            model=model,
            draft_pool=cluster.draft_pool,
            router=cluster.router,
            stream_interval_ms=cluster.gateway.stream_interval_ms,
            request_timeout_s=cluster.gateway.request_timeout_s,
        )


def application_name(model: str) -> str:
    return PREFIX + quote(model, safe="")


def model_of(application: str) -> str | None:
    """The model that an application serves; None for one that is no model's."""
    return unquote(application.removeprefix(PREFIX)) if application.startswith(PREFIX) else None


def build_model_app(args: dict[str, Any] | ModelAppConfig) -> Application:
    """Raises pydantic.ValidationError for arguments that are not valid."""
    config = args if isinstance(args, ModelAppConfig) else ModelAppConfig.model_validate(args)
    cluster = ClusterConfig(
        models=(config.model,),
        draft_pool=config.draft_pool,
        router=config.router,
    )
    return target_app(config.model, cluster, config.stream_interval_ms, config.request_timeout_s)
