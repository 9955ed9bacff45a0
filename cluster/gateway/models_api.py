"""Loading and unloading models while the cluster runs: POST /admin/models, DELETE /admin/models/NAME."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from cluster.config import ModelConfig
from cluster.gateway.errors import ApiError, from_validation_error
from cluster.gateway.models import ModelLoader
from cluster.gateway.routes import Gateway, read_json
from cluster.gateway.sse import JsonResponse


def build_models_api(gateway: Gateway) -> APIRouter:
    """Nothing without `gateway.admin_endpoints`."""
    api = APIRouter()
    directory, limit = gateway.directory, gateway.config.max_body_bytes
    if not gateway.config.admin_endpoints or gateway.loader is None:
        return api
    loader: ModelLoader = gateway.loader

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
        if model.name in directory.names():
            raise ApiError(409, f"`{model.name}` is served already", param="name", code="model_exists")
        await loader.load(model)
        await directory.refresh()
        return JsonResponse({"id": model.name, "state": "starting"}, 202)

    @api.delete("/admin/models/{name:path}")
    async def unload(name: str) -> Response:
        """Begin to unload: new requests get 404 from now on, running ones end. 202."""
        await directory.refresh()
        model = directory.find(name)
        if not model.loaded:
            raise ApiError(
                409,
                f"`{name}` is part of the cluster's configuration, not loaded into it",
                param="model",
                code="model_configured",
            )
        await loader.unload(name)
        directory.forget(name)
        return JsonResponse({"id": name, "state": "unloading"}, 202)

    return api
