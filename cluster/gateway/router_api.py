"""The router for operators: GET /admin/router, PUT and DELETE /admin/router/pins/NAME."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from actors.sampling.params import MAX_DRAFT_TOKENS
from cluster.gateway.errors import ApiError, invalid, not_ready
from cluster.gateway.openai_schema import Body
from cluster.gateway.routes import Gateway, parse
from cluster.gateway.sse import JsonResponse, to_jsonable
from cluster.named_actor import ActorUnavailableError
from cluster.router.reports import Pin
from cluster.router.service import PinError

T = TypeVar("T")
CALL_TIMEOUT_S = 12.0
"""Above what the client itself waits for an actor that is being started."""
OFF = "no router runs: it is disabled, or the draft pool has no nested drafter"


class RouterControl(Protocol):
    """The router, however it is reached. Raises PinError and ActorUnavailableError."""

    async def view(self) -> dict[str, Any]: ...

    async def pin(self, target: str, pin: Pin) -> None: ...

    async def unpin(self, target: str) -> None: ...


Depth = Annotated[int, Field(ge=1)]


class PinBody(Body):
    """What to fix for a target; what is left out stays with the router."""

    worker: str | None = Field(None, min_length=1, description="Id of a draft worker.")
    exits: list[Depth] | None = Field(None, min_length=1, description="Allowed exit depths, in layers.")
    cap: int | None = Field(None, ge=0, le=MAX_DRAFT_TOKENS, description="Longest draft; 0 for none.")

    @model_validator(mode="after")
    def _fixes_something(self) -> PinBody:
        if self.worker is None and self.exits is None and self.cap is None:
            raise ValueError("give at least one of worker, exits and cap")
        return self

    def pin(self) -> Pin:
        exits = None if self.exits is None else tuple(sorted(set(self.exits)))
        return Pin(self.worker, exits, self.cap)


async def _ask(call: Awaitable[T]) -> T:
    """Turns what a router may raise into an answer: 404 for an unknown target, 400 for a pin that cannot be
    met, 503 while it is away."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return await call
    except PinError as error:
        if error.field == "target":
            raise ApiError(
                404, error.message, type="not_found_error", param="target", code="target_not_found"
            ) from error
        raise invalid(error.field, error.message) from error
    except (ActorUnavailableError, TimeoutError) as error:
        raise not_ready("the router does not answer; assignments stay as they are") from error


def build_router_api(gateway: Gateway) -> APIRouter:
    """Pins may be changed only with `gateway.admin_endpoints`."""
    api = APIRouter()
    router, limit = gateway.router, gateway.config.max_body_bytes

    def running() -> RouterControl:
        if router is None:
            raise ApiError(409, OFF, code="router_off")
        return router

    @api.get("/admin/router")
    async def view() -> Response:
        """Assignments with their reasons, draft workers and pins."""
        if router is None:
            return JsonResponse({"running": False, "why": OFF, "targets": [], "workers": [], "pins": {}})
        return JsonResponse({"running": True, **to_jsonable(await _ask(router.view()))})

    if gateway.config.admin_endpoints:

        @api.put("/admin/router/pins/{target:path}")
        async def pin(target: str, request: Request) -> Response:
            """Fix worker, exits or cap of a target, or of all targets of a model."""
            body = await parse(request, PinBody, limit)
            await _ask(running().pin(target, body.pin()))
            return JsonResponse({"target": target, "pin": body.model_dump()})

        @api.delete("/admin/router/pins/{target:path}")
        async def unpin(target: str) -> Response:
            """Give it back to the router."""
            await _ask(running().unpin(target))
            return JsonResponse({"target": target, "pin": None})

    return api
