"""The HTTP application: routers, authentication, request ids, and errors in OpenAI's shape."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway.admin import MetricsReader, build_admin_router
from cluster.gateway.errors import ApiError, internal, invalid
from cluster.gateway.models_api import build_models_api
from cluster.gateway.router_api import build_router_api
from cluster.gateway.routes import REQUEST_ID, Gateway, build_router
from cluster.gateway.sse import ClientGoneError, JsonResponse

logger = logging.getLogger(__name__)
OPEN_PATHS = frozenset({"/health", "/ready"})
MAX_REQUEST_ID = 256


def error_response(error: ApiError) -> Response:
    return JsonResponse(error.body(), error.status, error.headers())


def authorized(header: str | None, api_key: str) -> bool:
    """Whether an Authorization header carries the key, compared in constant time."""
    scheme, _, given = (header or "").partition(" ")
    # Header values arrive as Latin-1, whatever the client encoded.
    raw = given.strip().encode("latin-1", errors="replace")
    return scheme.lower() == "bearer" and hmac.compare_digest(raw, api_key.encode())


def unauthorized() -> ApiError:
    return ApiError(401, "a valid API key is required", type="authentication_error", code="invalid_api_key")


class ApiKeyMiddleware:
    """Plain ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            header = Headers(scope=scope).get("authorization")
            if not authorized(header, self._api_key):
                await error_response(unauthorized())(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestIdMiddleware:
    """Echoes X-Request-Id, or makes one up. Not used behind Serve's proxy, which does the same itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID)
        request_id = given if given and len(given) <= MAX_REQUEST_ID else str(uuid.uuid4())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def build_http_app(gateway: Gateway, read_metrics: MetricsReader, *, echo_request_id: bool = True) -> FastAPI:
    """`echo_request_id` False leaves X-Request-Id to the proxy in front."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gateway.directory.start()
        yield
        await gateway.directory.close()

    app = FastAPI(title="S2D Serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(build_router(gateway))
    app.include_router(build_admin_router(gateway, read_metrics))
    app.include_router(build_router_api(gateway))
    app.include_router(build_models_api(gateway))
    if gateway.config.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=gateway.config.api_key)
    if echo_request_id:
        app.add_middleware(RequestIdMiddleware)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = "not_found" if error.status_code == 404 else None
        message = f"{request.method} {request.url.path}: {error.detail}"
        refused = ApiError(error.status_code, message, code=kind)
        return JsonResponse(refused.body(), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(_: Request, error: RequestValidationError) -> Response:
        """Of the query: bodies are not FastAPI's to read."""
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return error_response(invalid(param, first["msg"][:1].lower() + first["msg"][1:]))

    @app.exception_handler(ClientGoneError)
    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(internal("the server failed; see its log"))

    return app
