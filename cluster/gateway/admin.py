"""Endpoints for operators: /health, /ready, /metrics, /state and POST /admin/reset; see also `router_api`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from actors.engine.messages import ResetScope
from cluster.gateway.errors import ApiError, not_ready
from cluster.gateway.models import ServedModel
from cluster.gateway.routes import Gateway
from cluster.gateway.sse import JsonResponse, to_jsonable
from cluster.telemetry.vllm_names import spec_decode_text
from cluster.version import VERSION

STATE_TIMEOUT_S = 3.0
RESET_TIMEOUT_S = 10.0
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MetricsReader = Callable[[], Awaitable[str]]


async def model_state(model: ServedModel) -> dict[str, Any]:
    """One model's replicas; `error` says why they could not be read."""
    body: dict[str, Any] = {"name": model.name, "ready": model.ready, "state": model.state}
    body |= {"replicas": [], "error": None}
    if model.presence is not None and not model.ready:  # a call would wake it, or wait for it
        body["error"] = model.presence.message or model.state
        return body
    try:
        async with asyncio.timeout(STATE_TIMEOUT_S):
            states = await model.client.states()
    except (ApiError, TimeoutError) as error:
        body["error"] = str(error) or "timed out"
    else:
        body["replicas"] = [to_jsonable(state) for state in states]
    return body


async def draft_state(gateway: Gateway) -> dict[str, Any]:
    try:
        async with asyncio.timeout(STATE_TIMEOUT_S):
            workers = await gateway.draft_pool.states()
    except (ApiError, TimeoutError) as error:
        return {"draft_workers": [], "draft_pool_error": str(error) or "timed out"}
    return {"draft_workers": to_jsonable(workers), "draft_pool_error": None}


def build_admin_router(gateway: Gateway, read_metrics: MetricsReader) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """The gateway answers."""
        return JsonResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 only when every configured model answers, or sleeps, and new requests are accepted."""
        if gateway.in_flight.draining:
            raise not_ready("the service is shutting down", retry_after_s=10.0)
        unready = await gateway.directory.unready()
        if unready:
            raise not_ready(f"models that do not answer: {', '.join(unready)}", retry_after_s=2.0)
        return JsonResponse({"status": "ready", "models": gateway.directory.names()})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text of all Ray nodes, which lags by Ray's report interval (10 s unless configured), and
        live speculation counters under vLLM's names."""
        text, *models = await asyncio.gather(
            read_metrics(), *(model_state(m) for m in gateway.directory.all())
        )
        return Response(text + spec_decode_text(models), media_type=PROMETHEUS_TYPE)

    @router.get("/state")
    async def state() -> Response:
        """Live: every replica and every draft worker is asked now."""
        models, drafts = await asyncio.gather(
            asyncio.gather(*(model_state(m) for m in gateway.directory.all())), draft_state(gateway)
        )
        flight = {"in_flight": gateway.in_flight.count, "draining": gateway.in_flight.draining}
        return JsonResponse({"version": VERSION, "gateway": flight, "models": models, **drafts})

    if gateway.config.admin_endpoints:

        @router.post("/admin/reset")
        async def reset(scope: ResetScope = "all") -> Response:
            """Drop what requests share, see `ResetScope`."""
            models = [m for m in gateway.directory.all() if m.presence is None or m.ready]
            try:
                async with asyncio.timeout(RESET_TIMEOUT_S):
                    await asyncio.gather(*(m.client.reset(scope) for m in models))
            except TimeoutError as error:
                raise not_ready("a model did not answer in time") from error
            return JsonResponse({"status": "reset", "scope": scope, "models": gateway.directory.names()})

    return router
