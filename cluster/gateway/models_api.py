"""Loading and unloading models while the cluster runs: POST /admin/models, DELETE /admin/models/NAME."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from cluster.config import ModelConfig
from cluster.gateway.errors import ApiError, from_validation_error
from cluster.gateway.models import ModelLoader, ServedModel
from cluster.gateway.routes import Gateway, read_json
from cluster.gateway.sse import JsonResponse

logger = logging.getLogger(__name__)

UNLOAD_ATTEMPTS, UNLOAD_PAUSE_S = 10, 5.0
"""Of a model that was in use: how often Ray Serve is asked, and the seconds between."""


def build_models_api(gateway: Gateway) -> APIRouter:
    """Nothing without `gateway.admin_endpoints`."""
    api = APIRouter()
    directory, limit = gateway.directory, gateway.config.max_body_bytes
    if not gateway.config.admin_endpoints or gateway.loader is None:
        return api
    loader: ModelLoader = gateway.loader
    loading: set[str] = set()
    unloading: set[asyncio.Task[None]] = set()

    @api.post("/admin/models")
    async def load(request: Request) -> Response:
        """Begin to load the model that the body describes, as in the configuration file. 202; GET /v1/models
        tells when it is ready, or why it is not."""
        data = await read_json(request, limit)
        try:
            model = ModelConfig.model_validate(data)
        except ValidationError as error:
            raise from_validation_error(error) from error
        await directory.refresh()
        if directory.taken(model.name) or model.name in loading:
            message = f"`{model.name}` is served already, or still being unloaded"
            raise ApiError(409, message, param="name", code="model_exists")
        loading.add(model.name)
        try:
            await loader.load(model)
            await directory.refresh()
        finally:
            loading.discard(model.name)
        return JsonResponse({"id": model.name, "state": "starting"}, 202)

    async def unload_when_idle(model: ServedModel, attempts: int) -> None:
        """Its prompts that still wait for a worker would wait for ever once Serve has begun to delete it."""
        try:
            running = await model.in_flight.drain(gateway.config.request_timeout_s)
            if running:
                logger.warning("`%s` is unloaded under %d running requests", model.name, running)
            for left in reversed(range(attempts)):
                try:
                    await loader.unload(model.name)
                    break
                except Exception:
                    if not left:
                        raise
                    logger.warning("`%s` was not unloaded; trying again", model.name, exc_info=True)
                    await asyncio.sleep(UNLOAD_PAUSE_S)
        finally:
            directory.forget(model.name)

    def ended(task: asyncio.Task[None]) -> None:
        unloading.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a model was not unloaded", exc_info=error)

    @api.delete("/admin/models/{name:path}")
    async def unload(name: str) -> Response:
        """Begin to unload: new requests get 404 from now on, running ones end. 202. Of a model of the
        configuration only what was loaded under its name before can be unloaded."""
        await directory.refresh()
        model = directory.find(name)
        if not model.loaded:
            if await loader.unload(name):
                return JsonResponse({"id": name, "state": model.state}, 202)
            raise ApiError(
                409,
                f"`{name}` is part of the cluster's configuration, not loaded into it",
                param="model",
                code="model_configured",
            )
        directory.retire(name)
        idle = model.in_flight.count == 0
        attempts = 1 if idle else UNLOAD_ATTEMPTS  # nobody is told of a failure once the answer was sent
        task = asyncio.get_running_loop().create_task(unload_when_idle(model, attempts))
        unloading.add(task)
        task.add_done_callback(ended)
        if idle:
            await asyncio.shield(task)  # what goes wrong is the answer
        return JsonResponse({"id": name, "state": "unloading"}, 202)

    return api
