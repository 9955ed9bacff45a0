"""Models that Ray Serve knows of: which there are, how they are, loading and unloading them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentStatusTrigger, ReplicaState
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from cluster.config import ClusterConfig, ModelConfig
from cluster.gateway.errors import not_ready
from cluster.gateway.models import ModelState, Presence
from cluster.gateway.serve_clients import ServeModelClient
from cluster.model_apps import (
    APP_NAME,
    ModelAppConfig,
    application_name,
    build_model_app,
    deployment_name,
    model_of,
)

logger = logging.getLogger(__name__)
_FAILED = {"DEPLOY_FAILED", "UNHEALTHY"}
_SETTLED = {"RUNNING", "HEALTHY"}
"""Values of Serve's statuses of applications, or of deployments."""
SERVE_CALL_S = 10.0


class ModelApplications:
    """`ModelDiscovery` and `ModelLoader` over Ray Serve, for a gateway of the cluster of `config`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._configured = {model.name for model in config.models}
        # Those of them that may be scaled to zero.
        self._sleepers = {m.name for m in config.models if m.autoscaling and m.autoscaling.min_replicas == 0}
        self._said: set[str] = set()

    async def presences(self) -> Mapping[str, Presence]:
        """Models with applications of their own, and those of the cluster's that may sleep."""
        applications = (await _in_thread(serve.status)).applications
        found: dict[str, Presence] = {}
        for name, application in applications.items():
            model = model_of(name)
            if model is None or application.status is ApplicationStatus.DELETING:
                continue
            if model in self._configured:
                self._say_unused(name, model)
            else:
                found[model] = _presence(application, deployment_name(model))
        own = applications.get(APP_NAME)
        for model in self._sleepers if own is not None else ():
            found[model] = _presence(own, deployment_name(model))
        return found

    def _say_unused(self, application: str, model: str) -> None:
        """Once: `model` was loaded before the configuration had it."""
        if application not in self._said:
            self._said.add(application)
            logger.warning(
                "the application %s is not used: the configuration has `%s`; unloading `%s` removes it",
                application, model, model,
            )  # fmt: skip

    def client(self, name: str) -> ServeModelClient:
        # Whether it exists is known; asking again would block the event loop.
        handle: Any = serve.get_deployment_handle(
            deployment_name(name), app_name=application_name(name), _check_exists=False
        )
        return ServeModelClient(handle)

    async def load(self, model: ModelConfig) -> None:
        """Begin to load; `presences` tells how it goes."""
        target = serve.RunTarget(
            build_model_app(ModelAppConfig.joining(self._config, model)),
            name=application_name(model.name),
            route_prefix=None,
            logging_config={"log_level": "INFO", "enable_access_log": False},
        )
        await _in_thread(
            serve.run_many,
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    async def unload(self, name: str) -> bool:
        """Begin to unload. Serve lets requests that run at a worker end first, for as long as the deployment
        allows. Calls that wait for a worker are never answered: there must be none.

        Of a model of the configuration this removes the application that it had before; False without one.
        """
        application = application_name(name)
        there = (await _in_thread(serve.status)).applications.get(application)
        if there is None or there.status is ApplicationStatus.DELETING:
            return False
        logger.info("the application %s is being removed", application)
        await _in_thread(serve.delete, application, _blocking=False)
        return True


def _presence(application: Any, deployment: str) -> Presence:
    """By the deployment alone: others of its application may fail, or start, and say nothing of this one."""
    status = application.deployments.get(deployment)
    counts = {} if status is None else status.replica_states
    # An application runs once all workers have taken the place of those before.
    settled = application.status is ApplicationStatus.RUNNING
    deployed_at = application.last_deployed_time_s if settled else None
    if counts.get(ReplicaState.RUNNING, 0):
        return Presence("ready", deployed_at=deployed_at)
    judged = (application if status is None else status).status.value
    if judged in _FAILED:
        message = (status.message if status is not None else "") or application.message
        return Presence("failed", message.strip().splitlines()[-1] if message.strip() else "")
    # A worker that starts because of a request that waits for it is not what the model still lacks.
    woken = status is not None and status.status_trigger is DeploymentStatusTrigger.AUTOSCALING
    state: ModelState = "asleep" if judged in _SETTLED or woken else "starting"
    return Presence(state, deployed_at=deployed_at)


async def _in_thread(call: Any, *args: Any, **options: Any) -> Any:
    """Serve's client blocks. Raises 503 when it does not answer in time, or cannot."""
    try:
        async with asyncio.timeout(SERVE_CALL_S):
            return await asyncio.to_thread(call, *args, **options)
    except TimeoutError as error:
        raise not_ready("Ray Serve does not answer") from error
    except RayError as error:  # its text may hold a stack trace
        logger.warning("a call to Ray Serve failed: %s", error)
        raise not_ready("Ray Serve does not answer", retry_after_s=5.0) from error
    except RayServeException as error:
        raise not_ready(str(error), retry_after_s=5.0) from error
